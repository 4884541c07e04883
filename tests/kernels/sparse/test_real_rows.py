"""The sparse backward on hidden states of a real model: the error is the one asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from problem import generator
from sparse_cases import relative_error
from torch import Tensor

from fastkl import loss
from fastkl.kernels.sparse import estimator as sparse_estimator
from fastkl.loss import Sparse

ROLLOUT_TOKENS, ROLLOUTS = 32, 16


@pytest.fixture(scope="module")
def smollm2() -> dict[str, Tensor]:
    """Hidden states [512, 576], head [49152, 576] and tokens of what SmolLM2-135M-Instruct samples at T = 1."""
    transformers = pytest.importorskip("transformers")
    folder = Path("runs/smollm2")
    if not (folder / "prompts.jsonl").exists():
        pytest.skip("runs/smollm2 is not there: recipes/smollm2/make.py makes it (recipes/smollm2/README.md)")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "teacher", padding_side="left")
    lines = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[:ROLLOUTS]
    turns = [[{"role": "user", "content": json.loads(line)["prompt"]}] for line in lines]
    texts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    torch.manual_seed(0)
    length = {"max_new_tokens": ROLLOUT_TOKENS, "min_new_tokens": ROLLOUT_TOKENS}
    with torch.no_grad():
        ids = model.generate(**batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **length)
        mask = torch.cat([batch["attention_mask"], torch.ones(ROLLOUTS, ROLLOUT_TOKENS, dtype=torch.int64)], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        states = model.model(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state
    hidden = states[:, -ROLLOUT_TOKENS - 1 : -1].reshape(-1, states.shape[-1])
    return {
        "hidden": hidden,
        "weight": model.lm_head.weight.detach(),
        "tokens": ids[:, -ROLLOUT_TOKENS:].reshape(-1),
        "advantages": torch.randn(hidden.shape[0], generator=generator(0)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("error", [1e-3, 2e-3, 8e-3])
def test_error_on_real_rollouts(monkeypatch: pytest.MonkeyPatch, smollm2: dict[str, Tensor], error: float) -> None:
    """The error is proportional to the one asked for, for hidden and weight, and less is kept the larger it is."""
    monkeypatch.setattr(sparse_estimator, "BLOCK_ROWS", {"cpu": 128, "accelerator": 1024})

    def gradients(**options: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
        own = {name: smollm2[name].clone().requires_grad_() for name in ("hidden", "weight")}
        output = loss.policy_gradient_loss(**{**smollm2, **own}, **options)
        return list(torch.autograd.grad(output.loss, list(own.values()))), output.metrics

    exact, _ = gradients()
    ours, metrics = gradients(backward=Sparse(0, error=error))
    assert error / 1.2 < float(metrics["grad_error"]) < 1.2 * error
    assert float(metrics["kept_fraction"]) < {1e-3: 0.3, 2e-3: 0.2, 8e-3: 0.06}[error]
    for one, true in zip(ours, exact, strict=True):
        assert error / 1.5 < relative_error(one, true) < 1.5 * error
