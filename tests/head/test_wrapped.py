"""Fused models inside what trains them: DDP, FSDP 2, torch.compile; and models that were wrapped too early."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fused_training import IDS, as_one_of_several, in_one_process, lora, loss_of, model_of, plain_loss
from groups import alone_in_group, in_group
from tiny_models import causal_lm
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastkl.head import fuse
from fastkl.loss import linear_logprobs

slow = pytest.mark.slow
WAYS = ["ddp", "ddp-unused", "ddp-static", "fsdp2", "fsdp2-head", "fsdp2-cast"]
FORMS = ["output", "tensor", "tuple", "dict", "model-output", "dataclass"]
FAST = [("full", "ddp-unused", "output"), ("lora-of-fused", "fsdp2", "dict"), ("full", "fsdp2-head", "tensor")]
ALL = [
    (kind, way, form)
    for kind in ("full", "lora-of-fused", "fused-lora")
    for way in WAYS
    for form in ("output", "tensor")
]
ALL += [("full", "ddp-unused", form) for form in FORMS] + [("full", "fsdp2-head", form) for form in FORMS]
ALL += [(f"{kind}-checkpointing", way, "output") for kind in ("full", "fused-lora") for way in ("ddp", "fsdp2")]


@pytest.mark.parametrize(
    ("kind", "way", "form"),
    [*FAST, *(pytest.param(*case, marks=slow) for case in dict.fromkeys(ALL) if case not in FAST)],
)
def test_two_processes_learn_what_one_does(kind: str, way: str, form: str) -> None:
    """The one with all the logits, plainly: the gradients of both processes are in the weights of both."""
    wanted = in_one_process(kind)
    first, second = in_group(as_one_of_several, kind, way, form)
    start = dict(model_of(kind).named_parameters())
    assert max(float((wanted[name] - start[name].detach()).abs().max()) for name in wanted) > 1e-2
    assert first.keys() == second.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], weight, atol=1e-5, rtol=0)


@pytest.fixture
def group() -> Iterator[None]:
    with alone_in_group():
        yield


class DeepSpeedEngine(nn.Module):
    """By its name; attributes that it lacks are its module's."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "module" else getattr(self.module, name)


class FullyShardedDataParallel(DeepSpeedEngine):
    pass


def shard_a_layer(model: Any) -> Any:
    fully_shard(model.model.layers[0])
    return model


@pytest.mark.parametrize("late", [False, True], ids=["", "fused-before-too"])
@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (
            DistributedDataParallel,
            r"has been wrapped \(DistributedDataParallel\).*: DistributedDataParallel\(fuse\(model\)\)",
        ),
        (fully_shard, r"has been wrapped \(FSDPModule\).*fuse first, then wrap: fully_shard\(fuse\(model\)\)"),
        (shard_a_layer, r"a part of LlamaForCausalLM has been wrapped \(FSDPModule\)"),
        (torch.compile, r"has been wrapped \(OptimizedModule\).*: torch\.compile\(fuse\(model\)\)"),
        (nn.DataParallel, r"has been wrapped \(DataParallel\)"),
        (DeepSpeedEngine, r"has been wrapped \(DeepSpeedEngine\).*deepspeed\.initialize\(model=fuse\(model\), …\)"),
        (FullyShardedDataParallel, r"\(FullyShardedDataParallel\).*: FullyShardedDataParallel\(fuse\(model\)\)"),
        (lambda model: lora(nn.ModuleDict({"model": DeepSpeedEngine(model)})["model"]), "DeepSpeedEngine"),
    ],
    ids=["ddp", "fsdp2", "fsdp2-layer", "compile", "data-parallel", "deepspeed", "fsdp1", "peft-of-deepspeed"],
)
def test_a_wrapped_model_is_refused(wrap: Any, said: str, late: bool, group: None) -> None:
    model = causal_lm()
    with pytest.raises(TypeError, match=said):
        fuse(wrap(fuse(model) if late else model))


@slow
@pytest.mark.parametrize("kind", ["full", "fused-lora", "full-checkpointing"])
def test_torch_compile(kind: str) -> None:
    """One graph, whatever function is given; the same numbers; the model is usable as before afterwards."""
    torch.compiler.reset()
    model = model_of(kind, layers=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=kind == "full")
    for form in ("output", "tensor"):
        results = []
        for each in (model, compiled):
            model.zero_grad()
            loss = loss_of(each, IDS, form)
            loss.backward()
            results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        for ours, plain in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(plain_loss(compiled, IDS), plain_loss(model, IDS))
    assert not any("forward" in vars(module) for module in model.modules() if isinstance(module, nn.Linear))


def test_torch_compile_in_place_and_new_functions_of_each_step() -> None:
    """Fusing compiles nothing; a new closure over new tensors of the same shapes needs no new graph."""
    torch.compiler.reset()
    model = causal_lm(num_hidden_layers=1)
    model.compile(backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "_compiled_call_impl", lambda *_, **__: pytest.fail("compiled"))
        fuse(model)
    losses = []

    def step(seed: int) -> Tensor:
        ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(seed))

        def function(hidden: Tensor, weight: Tensor, **head: Any) -> Tensor:
            return linear_logprobs(hidden[:, :-1], weight, ids[:, 1:], **head).sum()

        found: Tensor = model(input_ids=ids, fused=function)
        found.backward()
        return found.detach()

    losses += [step(0), step(1)]  # the second may have what the first one left: gradients
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses += [step(seed) for seed in (2, 3)]
    model._compiled_call_impl = None
    for seed, loss in enumerate(losses):
        torch.testing.assert_close(loss, step(seed))
