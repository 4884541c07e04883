"""Ranks of tokens: those of a sort of all the logits, for any head, and in the samples that a run writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from run_cases import WORDS, counted, run
from server_cases import served
from stub_server import serving
from tiny_models import causal_lm, save_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fastkl.head import fuse
from fastkl.loss import linear_ranks
from fastkl.trainer.data.batching import Layout, batches
from fastkl.trainer.data.samples import make_sample
from fastkl.trainer.models.scoring import batch_ranks
from fastkl.trainer.student import Student
from fastkl.trainer.teachers.local import LocalTeacher

CPU = torch.device("cpu")


def sorted_ranks(logits: Tensor, tokens: Tensor) -> list[int]:
    """By sorting each row: the first place that holds the token's logit. An id without a logit has the rank 0."""
    rows = zip(logits.tolist(), tokens.tolist(), strict=True)
    return [1 + sorted(row, reverse=True).index(row[token]) if token < len(row) else 0 for row, token in rows]


def whole_numbers(*shape: int) -> Tensor:
    """Few and exact in any dtype: logits made of them have many ties."""
    return torch.randint(-2, 3, shape).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("vocab_size", [None, 20])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_ranks_are_those_of_a_sort(
    dtype: torch.dtype, with_bias: bool, vocab_size: int | None, chunk_size: int | None
) -> None:
    torch.manual_seed(0)
    hidden, weight, bias = whole_numbers(3, 7, 4), whole_numbers(30, 4), whole_numbers(30) if with_bias else None
    logits = (hidden @ weight.t() + (0 if bias is None else bias))[..., :vocab_size].flatten(0, 1)
    assert all(len(row.unique()) < len(row) for row in logits)
    tokens = torch.randint(20, (3, 7))
    tokens[1, 2] = -100
    cast = None if bias is None else bias.to(dtype)
    options: dict[str, Any] = {"bias": cast, "vocab_size": vocab_size, "chunk_size": chunk_size}
    found = linear_ranks(hidden.to(dtype), weight.to(dtype), tokens, **options)
    assert found.dtype == torch.int64
    assert found.shape == tokens.shape
    assert found[1, 2] == 0
    counted = tokens.flatten() != -100
    assert found.flatten()[counted].tolist() == sorted_ranks(logits[counted], tokens.flatten()[counted])
    assert found.max() > 1


def test_no_rows_and_equal_logits() -> None:
    weight = torch.ones(5, 2)
    assert linear_ranks(torch.ones(0, 2), weight, torch.zeros(0, dtype=torch.int64)).shape == (0,)
    assert linear_ranks(torch.ones(3, 2), weight, torch.tensor([0, 2, 4])).tolist() == [1, 1, 1]


def test_under_autocast_the_logits_are_those_of_the_log_probs() -> None:
    """Operands in 16 bits, sums in 32: the closest two of these logits are one number in bfloat16."""
    hidden, weight = torch.tensor([[1.0, 1 / 256]]), torch.tensor([[1.0, 0.0], [1.0, 0.5]])
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_ranks(hidden, weight, torch.tensor([0])).tolist() == [2]


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "token": ({"tokens": torch.tensor([1, 8])}, ValueError, r"tokens holds the id 8, outside the vocabulary"),
    "padding": ({"vocab_size": 2}, ValueError, r"tokens holds the id 2, outside the vocabulary"),
    "vocab_size": ({"vocab_size": 9}, ValueError, r"vocab_size is 9; it must be an int in 1 … the smallest vocabulary"),
    "shape": ({"tokens": torch.tensor([1])}, ValueError, r"tokens is \[1\] but hidden is \[2, 3\]"),
    "dtype": ({"tokens": torch.ones(2)}, TypeError, r"tokens is torch.float32; expected integer token ids"),
    "bias": ({"bias": torch.ones(7)}, ValueError, r"bias \[7\] does not fit weight \[8, 3\]"),
    "chunk_size": ({"chunk_size": 0}, ValueError, r"chunk_size is 0; it must be a whole number of at least 1"),
}


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"hidden": torch.ones(2, 3), "weight": torch.ones(8, 3), "tokens": torch.tensor([1, 2]), **change}
    with pytest.raises(error, match=message):
        linear_ranks(**arguments)


def biased() -> Any:
    """A model whose head has a bias, which its config does not know."""
    model: Any = causal_lm(tie_word_embeddings=False)
    model.lm_head = nn.Linear(64, 64)
    return model


MODELS = {"llama": causal_lm, "bias": biased, "softcap": lambda: causal_lm("gemma3_text", final_logit_softcapping=30.0)}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("layout", get_args(Layout))
def test_ranks_of_a_models_batch(model: Any, layout: Layout) -> None:
    """Ids from `vocab_size` on are no one's rivals and have no rank."""
    plain, size = model().eval(), 50
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 64, (length,), generator=draw).tolist() for length in (9, 3, 12)]
    samples = [make_sample(row[:2], row[2:], index) for index, row in enumerate(rows)]
    with torch.no_grad():
        for batch in batches(samples, 16, layout, CPU):
            batch.scatter(batch_ranks(fuse(plain), batch, size), "student_ranks")
        for sample in samples:
            ids = torch.tensor(sample.ids).long()
            logits = plain(ids[None]).logits[0, 1:-1, :size]
            assert sample.student_ranks.tolist() == [0, 0, *sorted_ranks(logits, ids[2:])]


def test_a_teacher_is_left_as_it_was() -> None:
    fused = fuse(causal_lm()).train()
    sample = make_sample([5, 6], [7, 8], 0)
    LocalTeacher(fused, "padded", 16384, 1.0, CPU).rank([sample], 64)
    assert fused.training
    assert len(sample.teacher_logprobs) == 0
    assert min(sample.teacher_ranks[2:]) >= 1


def check(samples: list[dict[str, Any]], field: str, model: Path) -> None:
    """Against all the logits of the model, of the ids that the tokenizer has."""
    plain = AutoModelForCausalLM.from_pretrained(model).eval()
    rows = plain.get_input_embeddings().num_embeddings
    for sample in samples:
        ids = torch.tensor(sample["ids"])
        with torch.no_grad():
            logits = plain(ids.where(ids < rows, 0)[None]).logits[0, :-1, :WORDS]
        wanted = [0, *sorted_ranks(logits, ids[1:])]
        assert sample[field] == [rank * bit for rank, bit in zip(wanted, sample["loss_mask"], strict=True)]


@pytest.mark.parametrize("objective", ["policy_gradient", "reverse_kl", "top_k"])
def test_a_run_writes_both_ranks(tmp_path: Path, padded: Path, objective: str) -> None:
    samples = run(tmp_path / "run", padded, loss__objective=objective, sampling__temperature=0.7).samples
    check([sample for sample in samples if sample["step"] == 1], "student_ranks", padded / "student")
    check(samples, "teacher_ranks", padded / "teacher")
    assert any(max(sample["ids"]) >= WORDS for sample in samples)
    ranks = [rank for s in samples for field in ("student_ranks", "teacher_ranks") for rank in counted(s, field)]
    assert 0 <= min(ranks) <= max(ranks) <= WORDS


def test_given_completions_are_ranked_too(tmp_path: Path, padded: Path) -> None:
    samples = run(tmp_path / "run", padded, sampling__on_policy_fraction=0.5, optim__steps=1).samples
    assert {sample["given"] for sample in samples} == {False, True}
    check(samples, "student_ranks", padded / "student")
    check(samples, "teacher_ranks", padded / "teacher")


def test_without_a_teacher_there_are_the_students(tmp_path: Path, padded: Path) -> None:
    alone = {"teacher__path": "", "loss__kl_coef": 0, "reward__grader": "regex:1", "sampling__samples_per_prompt": 2}
    samples = run(tmp_path / "run", padded, optim__steps=1, **alone).samples
    check(samples, "student_ranks", padded / "student")
    assert all(sample["teacher_ranks"] == [] for sample in samples)


@pytest.mark.parametrize("logged", [0, 2])
def test_only_samples_that_are_logged_are_ranked(
    tmp_path: Path, padded: Path, logged: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    for kind in (Student, LocalTeacher):

        def recorded(self: Any, samples: Any, vocab_size: int, rank: Any = kind.rank) -> None:
            counts.append(len(samples))
            rank(self, samples, vocab_size)

        monkeypatch.setattr(kind, "rank", recorded)
    assert len(run(tmp_path / "run", padded, log_samples=logged, optim__steps=2).samples) == 2 * logged
    assert sum(counts) == 2 * 2 * logged


@pytest.mark.parametrize(("api", "known"), [("prompt_logprobs", True), ("echo", False)])
def test_a_server_may_tell_the_teachers(tmp_path: Path, padded: Path, api: str, known: bool) -> None:
    with serving(save_model(tmp_path / "exact", seed=2)) as stub:
        samples = run(tmp_path / "run", padded, optim__steps=1, **served("teacher", stub, api=api)).samples
    check(samples, "student_ranks", padded / "student")
    if known:
        check(samples, "teacher_ranks", tmp_path / "exact")
    else:
        assert all(sample["teacher_ranks"] == [] for sample in samples)
