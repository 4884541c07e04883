"""Layouts that a model reads as it reads a sequence alone: what is asked for, what is chosen, what is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from odd_models import odd_model
from tiny_models import causal_lm

from fastkl.head import fuse
from fastkl.trainer.config.optim import BatchConfig
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.models.self_checks import layouts
from fastkl.trainer.models.self_checks.layouts import batch_layout
from fastkl.trainer.models.self_checks.probe import Probe

PACKS = ["llama", "gpt2", "gptj", "deepseek_v3", "qwen3_moe"]
# Their own mask, or a state that runs on.
LEAKS = ["opt", "bloom", "falcon", "openai-gpt", "gpt_oss", "rwkv", "minimax"]
FEW = ("llama", "opt", "rwkv")
CASES = [(kind, kind in PACKS) for kind in (*PACKS, *LEAKS)]


def layout_of(model: Any, layout: Any = "auto") -> str:
    return batch_layout(BatchConfig(layout=layout), fuse(model), Probe(model, "student"))


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` begins as it does with flash attention."""
    monkeypatch.setattr(layouts, "_quickest", lambda _: "packed")


@pytest.mark.parametrize(
    ("kind", "packs"), [pytest.param(*case, marks=() if case[0] in FEW else pytest.mark.slow) for case in CASES]
)
def test_packed_rows_where_nothing_runs_over(
    kind: str, packs: bool, flash: None, capsys: pytest.CaptureFixture[str]
) -> None:
    model = odd_model(kind)
    assert layout_of(model, "padded") == "padded"
    if packs:
        assert layout_of(model, "packed") == layout_of(model) == "packed"
        assert capsys.readouterr().err == ""
        return
    with pytest.raises(ConfigError, match=r"batch.layout is packed, but .* run into one another. Set it to padded"):
        layout_of(model, "packed")
    assert layout_of(model) == "padded"
    assert f"the student reads its sequences in padded rows, because log-probs of {type(model).__name__}" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("kind", "packs"), [("llama", True), ("qwen3_moe", True), ("opt", False)])
def test_rounding_is_no_fault(kind: str, packs: bool, dtype: torch.dtype, flash: None) -> None:
    assert layout_of(odd_model(kind).to(dtype)) == ("packed" if packs else "padded")


@pytest.mark.parametrize(
    ("attention", "wanted"),
    [("sdpa", "padded"), ("flash_attention_2", "packed"), ("kernels-community/flash-attn2", "packed")],
)
def test_what_is_tried_first(attention: str, wanted: str) -> None:
    fused = fuse(causal_lm())
    fused.config._attn_implementation = attention  # type: ignore[union-attr]
    assert layouts._quickest(fused) == wanted


class Rows(torch.nn.Module):
    """A forward pass in which each row sees the whole batch, or that takes one row alone."""

    def __init__(self, inner: Any, fails: bool) -> None:
        super().__init__()
        self.inner, self.fails = inner, fails

    def forward(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fails and len(hidden) > 1 < hidden.shape[1]:
            raise RuntimeError("one row alone\nplease")
        return self.inner(hidden + (hidden.mean((0, 1)) if len(hidden) > 1 else 0), *args, **kwargs)


@pytest.mark.parametrize(("fails", "said"), [(False, "in padded rows are"), (True, "RuntimeError: one row alone)")])
def test_one_at_a_time_where_not_even_padded_rows_are_right(
    fails: bool, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = causal_lm()
    model.model.layers[1].mlp = Rows(model.model.layers[1].mlp, fails)
    assert layout_of(model) == "single"
    assert said in capsys.readouterr().err


def test_a_model_that_counts_its_positions_in_its_own_way_is_refused() -> None:
    """As RoBERTa does, which begins behind its padding id."""
    model = causal_lm()
    forward = model.forward
    model.forward = lambda **inputs: forward(
        **{"position_ids": torch.arange(7, 7 + inputs["input_ids"].shape[1])[None] ** 2, **inputs}
    )
    with pytest.raises(
        ConfigError, match="the student cannot be read: log-probs of LlamaForCausalLM in single rows are"
    ):
        layout_of(model)


@pytest.mark.parametrize("broken", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_weights_that_are_not_finite_are_named(broken: str) -> None:
    model = causal_lm(tie_word_embeddings=False)
    with torch.no_grad():
        model.get_parameter(broken)[3, 5] = torch.inf
        model.get_parameter(broken)[3, 6] = -torch.inf
    with pytest.raises(ConfigError, match=rf"the teacher's logits of a short text are not finite: its weight {broken}"):
        Probe(model, "teacher")


def test_a_short_context_is_respected() -> None:
    for positions in (4, 8, 20, 64):
        model = causal_lm(
            "gpt2", n_positions=positions, max_position_embeddings=positions, num_key_value_heads=4
        ).eval()
        assert max(len(text) for text in Probe(model, "student").texts) <= positions - 3
        assert layout_of(model) == "padded"
