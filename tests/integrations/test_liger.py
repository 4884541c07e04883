"""`fastkl.integrations.liger` beside Liger-Kernel itself: the same calls, the same results."""

from __future__ import annotations

import importlib
import inspect
import itertools
import math
import random
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkl import reference
from fastkl.integrations import liger as ours

theirs = pytest.importorskip("liger_kernel.chunked_loss")

FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
B, T, D, D_REF, V = 3, 5, 8, 6, 37


def settings(space: dict[str, tuple[Any, ...]], count: int | None, seed: int) -> Iterator[dict[str, Any]]:
    """All combinations, or so many of them, drawn."""
    every = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
    yield from every if count is None else random.Random(seed).sample(every, min(count, len(every)))


def how_many(few: int, many: int | None) -> pytest.MarkDecorator:
    """So many combinations; in a slow test more. None: all of them."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)], ids=["few", "many"])


class Tensors:
    """Of a batch of sequences, the second of them half masked, the third wholly."""

    def __init__(self, dtype: torch.dtype = torch.float32, *, bias: bool = True):
        g = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=g) * scale).to(dtype)

        self.hidden, self.ref_hidden = normal(B, T, D).requires_grad_(), normal(B, T, D_REF)
        self.weight, self.ref_weight = normal(V, D, scale=0.7).requires_grad_(), normal(V, D_REF, scale=0.8)
        self.bias = normal(V).requires_grad_() if bias else None
        self.ref_bias = normal(V) if bias else None
        self.tokens = torch.randint(V, (B, T), generator=g)
        self.mask = torch.tensor([[1] * T, [1, 1, 1, 0, 0], [0] * T])
        self.advantages = torch.tensor([1.2, -0.7, 0.3])
        now = reference.logprobs(reference.logits(self.hidden, self.weight, self.bias).float(), self.tokens).detach()
        self.old, self.ref = (now + 0.4 * torch.randn(B, T, generator=g) for _ in range(2))
        self.corrections = torch.rand(B, T, generator=g) + 0.5

    @property
    def trained(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]


GRPO = {
    "beta": (0.0, 0.3),
    "delta": (None, 1.1, 1.6),
    "use_bias_correction_kl": (False, True),
    "temperature": (1.0, 0.7),
    "ref": ("logprobs", "model", "none"),
    "old": (True, False),
    "corrections": (None, "sequence", "column", "token"),
    "items": (None, 7, torch.tensor(9)),
    "bias": (True, False),
}
KINDS = [(kind, "token") for kind in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")]
KINDS += [(kind, "sequence") for kind in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")]


def grpo(package: Any, tensors: Tensors, kind: str, level: str, chosen: dict[str, Any], **more: Any) -> Any:
    own = {name: chosen[name] for name in ("beta", "delta", "use_bias_correction_kl", "temperature")}
    options = {"epsilon_low": 0.1, "epsilon_high": 0.3, "max_completion_length": 11, "compiled": False, **more}
    use = chosen["ref"] != "none"
    loss = package.LigerFusedLinearGRPOLoss(
        loss_type=kind, importance_sampling_level=level, use_ref_model=use, **own, **options
    )
    shapes = {None: None, "sequence": tensors.corrections[:, 0], "column": tensors.corrections[:, :1]}
    model = {"ref_input": tensors.ref_hidden, "ref_weight": tensors.ref_weight, "ref_bias": tensors.ref_bias}
    return loss(
        tensors.hidden,
        tensors.weight,
        tensors.tokens,
        tensors.mask,
        tensors.advantages,
        bias=tensors.bias,
        old_per_token_logps=tensors.old if chosen["old"] else None,
        vllm_is_ratio=shapes.get(chosen["corrections"], tensors.corrections),
        num_items_in_batch=chosen["items"],
        **({"ref_per_token_logps": tensors.ref} if chosen["ref"] == "logprobs" else model if use else {}),
    )


def assert_same(tensors: Tensors, found: Any, expected: Any, said: Any) -> None:
    """Results to 1e-5, and gradients of twice the first to 3e-5 of the largest entry.

    Where the KL to the reference is large, Liger's are that far from float64, and ours a sixth of it.
    """
    pair = [result if isinstance(result, Tensor) else result[0] for result in (found, expected)]
    gradients = [torch.autograd.grad(2 * value, tensors.trained) for value in pair]
    torch.testing.assert_close(found, expected, **FLOAT32, msg=lambda text: f"{said}\n{text}")
    for ours_is, theirs_is in zip(*gradients, strict=True):
        near = 3e-5 * max(1.0, float(theirs_is.abs().max()))
        torch.testing.assert_close(ours_is, theirs_is, rtol=1e-5, atol=near, msg=lambda text: f"{said}\n{text}")


@how_many(12, 400)
@pytest.mark.parametrize(("kind", "level"), KINDS, ids=map("-".join, KINDS))
def test_grpo(kind: str, level: str, count: int | None) -> None:
    high = {"cispo": (1.3, 0.8)}.get(kind, (0.3,))
    for chosen in settings({**GRPO, "epsilon_high": high}, count, seed=len(kind)):
        tensors = Tensors(bias=chosen["bias"])
        more = {"epsilon_high": chosen["epsilon_high"]}
        found = grpo(ours, tensors, kind, level, chosen, **more)
        assert_same(tensors, found, grpo(theirs, tensors, kind, level, chosen, **more), (kind, level, chosen))


@pytest.mark.parametrize("kind", ["grpo", "dapo", "luspo"])
def test_grpo_without_bounds(kind: str) -> None:
    """A bound of infinity clips nothing, and a lower one beyond 1 nothing below."""
    for low, high in ((math.inf, math.inf), (1.5, 0.2)):
        tensors, chosen = Tensors(), {name: values[0] for name, values in GRPO.items()}
        more = {"epsilon_low": low, "epsilon_high": high}
        found = grpo(ours, tensors, kind, "token", chosen, **more)
        assert_same(tensors, found, grpo(theirs, tensors, kind, "token", chosen, **more), (kind, more))


@pytest.mark.parametrize("more", [{"epsilon_low": -0.1}, {"epsilon_high": -0.1}, {"beta": -0.3}], ids=str)
def test_grpo_of_negative_settings(more: dict[str, float]) -> None:
    """Liger takes them, whatever they mean."""
    for kind in ("grpo", "cispo"):
        tensors, chosen = Tensors(), {name: values[0] for name, values in GRPO.items()}
        chosen |= {"beta": more.get("beta", 0.0)}
        own = {name: value for name, value in more.items() if name != "beta"}
        found = grpo(ours, tensors, kind, "token", chosen, **own)
        assert_same(tensors, found, grpo(theirs, tensors, kind, "token", chosen, **own), (kind, more))


def test_grpo_of_a_trained_head_is_one_pass(gemms: dict[str, list[int]]) -> None:
    """With a KL to the reference too: the logits, and a product for each gradient."""
    tensors, chosen = Tensors(), {name: values[0] for name, values in GRPO.items()} | {"beta": 0.3}
    loss, _ = grpo(ours, tensors, "dapo", "token", chosen)
    loss.backward()
    assert {name: len(rows) for name, rows in gemms.items()} == dict.fromkeys(gemms, 1)


def test_masked_positions_may_hold_anything() -> None:
    """Liger has NaN there; the rest of the batch is what it was."""
    for kind, level in KINDS:
        if kind == "luspo":  # which looks at masked positions
            continue
        results = []
        for spoilt in (False, True):
            tensors = Tensors()
            if spoilt:
                for name in ("old", "ref"):
                    getattr(tensors, name)[tensors.mask == 0] = torch.nan
                tensors.tokens[tensors.mask == 0] = V + 100
            chosen = {"beta": 0.3, "delta": None, "use_bias_correction_kl": True, "temperature": 1.0, "ref": "logprobs"}
            loss, metrics = grpo(
                ours, tensors, kind, level, {**chosen, "old": True, "corrections": None, "items": None}
            )
            results.append((loss, metrics, torch.autograd.grad(loss, tensors.trained)))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss_type": "ppo"}, "loss_type is 'ppo'; use one of grpo"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level is 'word'; use one of"),
        ({"loss_type": "sapo", "importance_sampling_level": "sequence"}, "loss_type is 'sapo', which has no"),
        ({"loss_type": "dr_grpo"}, "max_completion_length: give it"),
        ({"delta": 0.0}, "delta is 0.0; it must be > 0"),
        ({"sapo_temperature_neg": -1.0}, "sapo_temperature_neg is -1.0; it must be > 0"),
    ],
)
def test_settings_that_do_not_go_together(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ours.LigerFusedLinearGRPOLoss(**options)


def test_calls_that_do_not_fit() -> None:
    tensors = Tensors()
    inputs = tensors.hidden, tensors.weight, tensors.tokens, tensors.mask
    with pytest.raises(ValueError, match="give ref_per_token_logps, or ref_input and ref_weight"):
        ours.LigerFusedLinearGRPOLoss()(*inputs, tensors.advantages)
    loss = ours.LigerFusedLinearGRPOLoss(beta=0.0)
    with pytest.raises(ValueError, match=r"advantages is \[3, 5\]; expected one for each sequence, \[3\]"):
        loss(*inputs, tensors.advantages[:, None].expand(B, T))
    with pytest.raises(ValueError, match=r"vllm_is_ratio is \[3, 4\]; expected \[3\], \[3, 1\] or \[3, 5\]"):
        loss(*inputs, tensors.advantages, vllm_is_ratio=torch.ones(3, 4))


JSD = {
    "weight_hard_loss": (0.0, 0.5, 1.0),
    "weight_soft_loss": (0.5, 1.0, 0.0),
    "beta": (0.0, 0.5, 0.9, 1.0),
    "temperature": (1.0, 0.7),
    "return_soft_hard_loss": (False, True),
    "ignore_index": (-100, 3),
    "bias": (True, False),
    "ignored": ("some", "all"),
}


def jsd(package: Any, tensors: Tensors, chosen: dict[str, Any]) -> Any:
    options = {name: value for name, value in chosen.items() if name not in ("bias", "ignored")}
    labels = tensors.tokens.flatten().where(tensors.mask.flatten() != 0, chosen["ignore_index"])
    if chosen["ignored"] == "all":
        labels = torch.full_like(labels, chosen["ignore_index"])
    return package.LigerFusedLinearJSDLoss(compiled=False, **options)(
        tensors.hidden.flatten(0, 1),
        tensors.weight,
        tensors.ref_hidden.flatten(0, 1),
        torch.nn.Parameter(tensors.ref_weight),
        labels,
        tensors.bias,
        tensors.ref_bias,
    )


@how_many(60, None)
def test_jsd(count: int | None) -> None:
    for chosen in settings(JSD, count, seed=0):
        tensors = Tensors(bias=chosen["bias"])
        assert_same(tensors, jsd(ours, tensors, chosen), jsd(theirs, tensors, chosen), chosen)


def test_a_smaller_student_is_refused() -> None:
    tensors = Tensors()
    tensors.ref_weight, tensors.ref_bias = torch.randn(V + 3, D_REF), None
    with pytest.raises(ValueError, match=f"teacher_weight has {V + 3} ids but student_weight {V}: cut both heads"):
        jsd(ours, tensors, {name: values[0] for name, values in JSD.items()})


@pytest.mark.parametrize("name", [name for name in ours.__all__ if name.endswith("Loss")])
def test_the_signatures_are_those_of_liger(name: str) -> None:
    module = "liger_kernel.transformers.fused_linear_cross_entropy" if "CrossEntropy" in name else theirs.__name__
    kind, other = getattr(ours, name), getattr(importlib.import_module(module), name)
    for found, expected in ((kind, other), (kind.forward, other.forward)):
        pairs = [
            [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()] for f in (found, expected)
        ]
        assert pairs[0] == pairs[1]


def test_liger_need_not_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("liger_kernel", "fastkl.integrations.liger"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    assert importlib.import_module("fastkl.integrations.liger") is not ours
