"""Forward passes of an update: what training mode would change is off, activations are recomputed even so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from odd_models import odd_model
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint

from fastkl.head import fuse
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.models.modes import updating
from fastkl.trainer.models.self_checks.probe import Probe
from fastkl.trainer.models.self_checks.update import check_update

NOISY = ["gpt2", "opt", "granite", "phimoe", "mixtral"]
FEW = ("gpt2", "granite", "mixtral")


@pytest.mark.parametrize("kind", [k if k in FEW else pytest.param(k, marks=pytest.mark.slow) for k in NOISY])
def test_an_update_computes_what_is_sampled(kind: str) -> None:
    model = odd_model(kind)
    probe = Probe(model, "student")
    ids = probe.texts[0]
    for recomputed in (False, True):
        if recomputed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with updating(model, "off"):
            assert torch.equal(probe.forward(ids), probe.logits[0])
        with updating(model, "keep"):
            assert not torch.equal(probe.forward(ids), probe.logits[0])
        assert not any(module.training for module in model.modules())
        check_update(probe, "off")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["gpt2", "opt", "granite"])
def test_recomputed_gradients_are_those_of_eval_mode(kind: str, lora: bool) -> None:
    model = odd_model(kind)
    ids = torch.arange(3, 23)[None]
    if lora:
        model.enable_input_require_grads()
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    wanted = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []

    def counted(function: Any, *args: Any, **options: Any) -> Any:
        calls.append(function)
        return checkpoint(function, *args, use_reentrant=False, **options)

    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = counted
    with updating(model, "off"):
        found = gradients()
    assert len(calls) == 2  # layers
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)
    assert all(
        module._gradient_checkpointing_func is counted
        for module in model.modules()
        if hasattr(module, "_gradient_checkpointing_func")
    )


class OldStyle(torch.nn.Module):
    """A model that recomputes its layers itself, as those that bring their own code do."""

    gradient_checkpointing = True

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5))
        self.calls = 0

    def _gradient_checkpointing_func(self, function: Any, *inputs: Any) -> Any:
        self.calls += 1
        return checkpoint(function, *inputs, use_reentrant=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(self.layer.__call__, hidden)  # type: ignore[no-any-return]
        return self.layer(hidden)  # type: ignore[no-any-return]


def test_a_model_that_recomputes_by_itself_does_so_without_dropout() -> None:
    model, hidden = OldStyle().eval(), torch.randn(3, 8)
    with updating(model, "off"):
        assert torch.equal(model(hidden), model.layer(hidden))
    assert model.calls == 1
    assert not model.training


def test_noise_that_nothing_switches_off_is_refused() -> None:
    model = odd_model("llama")
    forward = model.model.layers[0].mlp.forward
    probe = Probe(model, "student")
    model.model.layers[0].mlp.forward = lambda hidden: forward(hidden) * (1 + 0.01 * torch.rand(()))
    with pytest.raises(ConfigError, match=r"student.dropout is off, but LlamaForCausalLM computes other log-probs"):
        check_update(probe, "off")
    check_update(probe, "keep")


def test_rwkv_keeps_its_weights() -> None:
    """Its class divides them in eval mode, in place: a student would be saved so."""
    model = odd_model("rwkv", num_hidden_layers=2, rescale_every=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fuse(model)
    Probe(model, "student")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.rescale_every == 1
