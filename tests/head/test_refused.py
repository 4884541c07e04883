"""What a head cannot be fused for, and the remedy that is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_training import lora
from head_cases import build, change_logits, fused_logprobs, token_ids
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from fastkl.head import fuse


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"target_modules": ["q_proj", "lm_head"]}),
        ("llama", {"target_parameters": ["lm_head.weight"]}),
        ("llama-tied", {"trainable_token_indices": [5, 6]}),
    ],
    ids=["module", "parameter", "tied-tokens"],
)
@pytest.mark.parametrize("late", [False, True], ids=["", "fused-before"])
def test_an_adapter_on_the_head_is_refused_with_the_remedy(family: str, options: dict[str, Any], late: bool) -> None:
    model = build(family)
    adapted = lora(fuse(model) if late else model, **options)
    with pytest.raises(TypeError, match=r"LlamaForCausalLM has an adapter .*target_modules.*trainable_token_indices"):
        fused_logprobs(adapted, token_ids()) if late else fuse(adapted)


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Quantised(nn.Linear):
    """As the integer layers of quantisation packages are: a subclass with packed weights."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.weight = nn.Parameter(self.weight.to(torch.int8), requires_grad=False)


def packed() -> nn.Linear:
    """As torchao's: a float32 dtype, and numbers that are elsewhere."""
    head = nn.Linear(64, 64)
    weight: Any = TwoTensor(head.weight.detach(), head.weight.detach())
    head.weight = nn.Parameter(weight, requires_grad=False)
    return head


def forward_of_its_own() -> nn.Linear:
    head = nn.Linear(64, 64, bias=False)
    head.forward = lambda hidden: nn.functional.linear(hidden, head.weight.round(decimals=1))
    return head


@pytest.mark.parametrize(
    "head",
    [nn.Sequential(nn.Linear(64, 64)), Doubling(64, 64), Quantised(64, 64), packed()],
    ids=["sequence", "subclass-with-a-forward-of-its-own", "int8-weight", "packed-weight"],
)
def test_a_head_that_is_no_plain_linear_layer_is_refused(head: nn.Module) -> None:
    model = build("llama")
    model.lm_head = head
    with pytest.raises(TypeError, match=f"LlamaForCausalLM is {type(head).__name__}"):
        fuse(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_head_with_a_forward_that_is_not_linear_is_refused(dtype: torch.dtype) -> None:
    """As packages put it there that quantise on the fly."""
    model = build("llama")
    model.lm_head = forward_of_its_own()
    with pytest.raises(TypeError, match=r"LlamaForCausalLM has a forward of its own \(forward_of_its_own"):
        fuse(model.to(dtype))


@pytest.mark.parametrize(
    "change",
    [
        lambda z: z.square(),
        lambda z: -z,
        lambda z: z + 1,
        lambda z: z.clamp(-30, 30),
        lambda z: torch.tanh(z) + 0.1 * z,
    ],
    ids=["squared", "negated", "shifted", "clamped", "tanh-and-more"],
)
def test_unknown_treatment_of_the_logits_is_refused(change: Callable[[Tensor], Tensor]) -> None:
    model = build("llama")
    change_logits(model, change)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*cannot be fused"):
        fuse(model)
    assert "forward" not in vars(model.lm_head)


def masked(value: float) -> Callable[[Tensor], Tensor]:
    return lambda z: z.index_fill(-1, torch.tensor([40, 41, 63]), value)


BIAS = torch.zeros(1, 64).index_fill(1, torch.tensor([7]), 0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: lora(model)], ids=["plain", "lora"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (masked(-1e9), r"treats 3 ids .* apart.*logit of id 40 becomes -1e\+09 where -1e\+06 was expected"),
        (masked(-torch.inf), "logit of id 40 becomes -inf where -1e"),
        (masked(torch.nan), "logit of id 40 becomes nan where -1e"),
        (lambda z: z + BIAS, r"treats 1 ids .* apart.*logit of id 7 becomes -2.99 where -3 was expected"),
        (lambda z: z[..., :60], r"makes logits of shape \[9, 60\] of \[9, 64\] that its head gives"),
    ],
    ids=["padding-masked", "padding-forbidden", "padding-nan", "bias", "cut"],
)
def test_a_logit_that_depends_on_its_id_is_refused(
    change: Callable[[Tensor], Tensor], message: str, wrap: Callable[[Any], Any], dtype: torch.dtype
) -> None:
    model = build("llama").to(dtype)
    change_logits(model, change)
    with pytest.raises(ValueError, match=rf"LlamaForCausalLM.*{message}"):
        fuse(wrap(model))


def test_weights_that_are_not_finite_are_named() -> None:
    model = build("llama-tied")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"LlamaForCausalLM are not finite.*model.layers.1.mlp.up_proj.weight"):
        fuse(model)


@pytest.mark.parametrize("times", [0, 2])
def test_a_model_that_runs_its_head_another_number_of_times_is_an_error(times: int) -> None:
    model = build("llama")
    plain, calls = model.forward, [1]
    model.forward = lambda **inputs: [plain(**inputs) for _ in range(calls[0])][-1] if calls[0] else None
    fuse(model)
    calls[0] = times
    with pytest.raises(RuntimeError, match=f"LlamaForCausalLM ran its LM head {times} times"):
        model(input_ids=token_ids(), fused=lambda hidden, weight, **head: hidden.sum())
