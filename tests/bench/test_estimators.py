"""The estimators of a gradient: closed forms against all outcomes, and the gradients that the losses really give."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import bench_refusal
from tiny_models import causal_lm
from torch import Tensor

from bench.__main__ import main
from bench.estimators import formulas, statistics
from bench.estimators.formulas import Estimator, Rows, mean, rows_of, variance
from bench.estimators.rollouts import rounded, spoiled
from bench.estimators.statistics import (
    Error,
    Gradient,
    Length,
    Noise,
    earlier_mean,
    equal_tokens,
    head_gradient,
    ratios,
)
from fastkl.loss import (
    density_power_loss,
    policy_gradient_loss,
    reverse_kl_advantages,
    reverse_kl_loss,
    top_k_kl_loss,
)

N, V, K = 3, 7, 2


def rows(seed: int = 0, spread: float = 1.5) -> Rows:
    torch.manual_seed(seed)
    student, teacher = (spread * torch.randn(N, V, dtype=torch.float64) for _ in range(2))
    return rows_of(student.log_softmax(1), teacher.log_softmax(1))


def listed(given: Rows, k: int = K) -> Tensor:
    return torch.zeros(N, V, dtype=torch.bool).scatter_(1, given.q.topk(k).indices, True)


BASELINE = torch.tensor([[0.3], [-2.0], [5.0]], dtype=torch.float64)  # any numbers, one for each row
ESTIMATORS: dict[str, Callable[[Rows], Estimator]] = {
    "sampled": formulas.sampled,
    "sampled, baseline": lambda r: formulas.sampled(r, BASELINE),
    "clipped": lambda r: formulas.clipped(r, 0.5),
    "power": lambda r: formulas.power(r, 0.7),
    "bucket": lambda r: formulas.bucket(r, listed(r)),
    "renormalise": lambda r: formulas.renormalise(r, listed(r)),
    "drop": lambda r: formulas.drop(r, listed(r)),
    "tail": lambda r: formulas.sampled_tail(r, listed(r)),
    "tail, baseline": lambda r: formulas.sampled_tail(r, listed(r), BASELINE),
    "tail at ½": lambda r: formulas.sampled_tail(r, listed(r), BASELINE, 0.5),
}


def outcomes(given: Rows, estimator: Estimator) -> Tensor:
    """[V, N, V]: the gradient of each row for each token that may be sampled."""
    fixed, weight = (torch.zeros_like(given.p) if x is None else x for x in estimator)
    return torch.stack([fixed + weight[:, [y]] * (torch.eye(V)[y] - given.p) for y in range(V)])


def noise(given: Rows, estimator: Estimator) -> Tensor:
    return variance(given.p, torch.zeros_like(given.p) if estimator.weight is None else estimator.weight)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("spread", [0.1, 1.5, 6.0])
def test_mean_and_variance_are_those_of_all_outcomes(name: str, spread: float) -> None:
    given = rows(spread=spread)
    estimator = ESTIMATORS[name](given)
    gradients, p = outcomes(given, estimator), given.p.t()[:, :, None]
    expected = (p * gradients).sum(0)
    torch.testing.assert_close(mean(given.p, estimator), expected, atol=1e-12, rtol=1e-10)
    spread_out = (p * (gradients - expected).square()).sum((0, 2))
    torch.testing.assert_close(noise(given, estimator), spread_out, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("name", ["sampled", "sampled, baseline", "tail", "tail, baseline"])
@pytest.mark.parametrize("seed", range(3))
def test_these_have_the_gradient_of_the_reverse_kl_as_their_mean(name: str, seed: int) -> None:
    given = rows(seed)
    torch.testing.assert_close(
        mean(given.p, ESTIMATORS[name](given)), mean(given.p, formulas.exact(given)), atol=1e-10, rtol=0
    )


def test_the_weight_of_a_tail_goes_from_the_bucket_to_the_exact_gradient() -> None:
    """What the bench takes for granted of weights that it does not measure."""
    given = rows()
    bucket, exact = mean(given.p, formulas.bucket(given, listed(given))), mean(given.p, formulas.exact(given))
    whole = noise(given, formulas.sampled_tail(given, listed(given), BASELINE))
    for weight in (0.0, 0.5, 0.8):
        estimator = formulas.sampled_tail(given, listed(given), BASELINE, weight)
        torch.testing.assert_close(mean(given.p, estimator), (1 - weight) * bucket + weight * exact)
        torch.testing.assert_close(noise(given, estimator), weight**2 * whole)


def test_a_power_goes_to_the_log_ratio() -> None:
    given = rows()
    torch.testing.assert_close(formulas.power(given, 1e-6).weight, given.d, atol=1e-4, rtol=1e-4)


def gradient(loss: Callable[..., Any], given: Rows, *arguments: Any, **options: Any) -> Tensor:
    """[N, V], by the student's logits: hidden states are the logits where the head is the identity."""
    hidden = given.p.log().requires_grad_()
    loss(hidden, torch.eye(V, dtype=torch.float64), *arguments, reduction="sum", **options).loss.backward()
    assert hidden.grad is not None
    return hidden.grad


def test_exact_is_the_gradient_of_the_loss() -> None:
    given = rows()
    found = gradient(reverse_kl_loss, given, teacher_logits=given.q.log())
    torch.testing.assert_close(found, mean(given.p, formulas.exact(given)))


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "drop"])
@pytest.mark.parametrize("k", [1, 3, V - 1])
def test_lists_have_the_gradients_of_the_loss(tail: str, k: int) -> None:
    given = rows()
    logprobs, ids = given.q.log().topk(k)
    found = gradient(top_k_kl_loss, given, ids, logprobs, direction="reverse", tail=tail)
    torch.testing.assert_close(found, mean(given.p, getattr(formulas, tail)(given, listed(given, k))))


def test_sampled_tokens_have_the_gradient_of_the_loss() -> None:
    given = rows()
    for y, expected in enumerate(outcomes(given, formulas.sampled(given))):
        tokens = torch.full((N,), y)
        logprobs = given.p.log()[:, y]
        advantages = reverse_kl_advantages(logprobs, given.q.log()[:, y])
        torch.testing.assert_close(gradient(policy_gradient_loss, given, tokens, advantages, logprobs), expected)


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_sampled_tails_have_the_gradient_of_the_loss(weight: float) -> None:
    given = rows()
    logprobs, ids = given.q.log().topk(K)
    estimator = formulas.sampled_tail(given, listed(given), BASELINE, weight)
    for y, expected in enumerate(outcomes(given, estimator)):
        found = gradient(
            top_k_kl_loss,
            given,
            ids,
            logprobs,
            tail="sampled",
            tokens=torch.full((N,), y),
            token_teacher_logprobs=given.q.log()[:, y],
            tail_baseline=BASELINE.squeeze(1),
            tail_weight=weight,
        )
        torch.testing.assert_close(found, expected)


def test_a_power_has_the_gradient_of_its_divergence() -> None:
    given = rows()
    found = gradient(density_power_loss, given, teacher_logits=given.q.log(), power=0.7)
    torch.testing.assert_close(found, mean(given.p, formulas.power(given, 0.7)))


def test_a_sampled_power_has_the_gradient_of_the_loss() -> None:
    given = rows()
    for y, expected in enumerate(outcomes(given, formulas.power(given, 0.7))):
        tokens, logprobs = torch.full((N,), y), given.p.log()[:, y]
        advantages = reverse_kl_advantages(logprobs, given.q.log()[:, y], power=0.7)
        torch.testing.assert_close(gradient(policy_gradient_loss, given, tokens, advantages, logprobs), expected)


def test_the_noise_of_the_head_is_that_of_all_outcomes() -> None:
    given, hidden = rows(), torch.randn(N, 4, dtype=torch.float64)
    estimator = formulas.sampled(given)
    gradients = outcomes(given, estimator)
    exact = mean(given.p, estimator).t() @ hidden
    total = 0.0
    for tokens in itertools.product(range(V), repeat=N):
        drawn = torch.stack([gradients[y, i] for i, y in enumerate(tokens)])
        chance = torch.stack([given.p[i, y] for i, y in enumerate(tokens)]).prod()
        total += float(chance * (drawn.t() @ hidden - exact).square().sum())
    assert float(noise(given, estimator) @ hidden.square().sum(1)) == pytest.approx(total, rel=1e-9)


def test_a_length_without_scatter_is_that_of_the_mean() -> None:
    """Over all pairs of completions that can be drawn."""
    torch.manual_seed(0)
    population = [(torch.randn(2, V, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)) for _ in range(3)]
    expected = sum(g.t() @ h for g, h in population) / 3
    lengths = [head_gradient(pair)[1] for pair in itertools.product(population, repeat=2)]
    estimate = sum((length.square - length.scatter) / 2 for length in lengths) / len(lengths)
    assert estimate == pytest.approx(float(expected.square().sum()), rel=1e-9)
    assert Length(1.0, 2.0, 2).of_mean() is None


def test_blocks_of_completions_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    parts = [(torch.randn(n, V, dtype=torch.float64), torch.randn(n, 4, dtype=torch.float64)) for n in (2, 5, 1, 3)]
    whole, length = head_gradient(parts)
    monkeypatch.setattr(statistics, "BLOCK_ROWS", 3)
    blocks, other = head_gradient(parts)
    torch.testing.assert_close(blocks, whole)
    assert other == pytest.approx(length)
    assert length.completions == 4


def test_ratios_and_the_tokens_of_equal_error() -> None:
    """Two completions of 5 tokens; the gradient has no scatter, so ‖E M_c‖² is a quarter of the batch's ‖M‖²."""
    exact = Gradient(4.0, Length(16.0, 8.0, 2))
    bucket, noise = Error(1.0, Length(4.0, 2.0, 2), -2.0), Noise(8.0, 6.0)
    found = ratios(exact, bucket, noise, tokens=10)
    expected = {"bias": 0.5, "variance": 2.0, "head_bias": 0.5, "cosine": 14 / 16, "head_variance": 6 / 16}
    assert found == pytest.approx({**expected, "limit_bias": 0.5, "limit_noise": 10 * 6 / (4 * 4)})
    unbiased = ratios(exact, bucket.scaled(0.0), noise, 10)
    assert equal_tokens(unbiased, found) == pytest.approx(3.75 / 0.25)
    half = ratios(exact, bucket.scaled(0.5), noise.scaled(0.5), 10)
    assert equal_tokens(half, found) == pytest.approx(3.75 / 4 / (0.25 - 0.0625))
    assert equal_tokens(found, found) is None


def test_mean_of_earlier_values() -> None:
    values, counted = torch.tensor([1.0, 2.0, 6.0, 8.0]), torch.tensor([False, True, True, False])
    assert earlier_mean(values, counted).tolist() == [[0.0], [0.0], [2.0], [4.0]]


def test_a_spoiled_model_shares_its_embeddings_alone() -> None:
    model = causal_lm("llama", "eager", num_hidden_layers=3)
    student = spoiled(model, [1], bits=3)
    assert len(student.base_model.layers) == 2 == student.config.num_hidden_layers
    assert [layer.self_attn.layer_idx for layer in student.base_model.layers] == [0, 1]
    assert student.get_input_embeddings() is model.get_input_embeddings()
    ours, theirs = (m.base_model.layers[-1].mlp.up_proj.weight for m in (student, model))
    assert len(ours[0].unique()) <= 7 < len(theirs[0].unique())
    ids = torch.arange(5)[None]
    assert student(ids).logits.isfinite().all()
    assert not torch.allclose(student(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="there is no layer 3"):
        spoiled(model, [3], None)


def test_many_bits_are_no_change() -> None:
    weight = torch.randn(5, 9)
    torch.testing.assert_close(rounded(weight, 16), weight, atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("estimators") / "small.json"
    main(["estimators", "--small", "--completions", "4", "--new-tokens", "6", "--k", "2,20", "--json", str(file)])
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def test_report(report: dict[str, Any]) -> None:
    names = {(row["estimator"], row["of"], row["k"], row["baseline"], row["parameter"]) for row in report["rows"]}
    assert len(names) == len(report["rows"]) == 3 + 2 + 2 + 6 * (1 + 4) + 2 * 2
    assert report["conditions"]["tokens"] <= 24
    assert report["conditions"]["kl"] > 0
    assert {(row["of"], row["k"]) for row in report["lists"]} == set(
        itertools.product(("teacher", "student", "both"), (2, 20))
    )
    for row in report["lists"]:
        assert 0 < row["kl_share"] <= 1
        assert 0 <= row["mass_off"] <= 1
    for row in report["rows"]:
        assert row["variance"] >= 0
        assert -1 < row["cosine"] < 1 + 1e-6


def test_figures_of_the_report_agree(report: dict[str, Any]) -> None:
    rows = {(r["estimator"], r["of"], r["k"], r["baseline"], r["parameter"]): r for r in report["rows"]}
    bucket, half = rows["bucket", "teacher", 20, "none", None], rows["sampled tail", "teacher", 20, "ρ + c", 0.5]
    assert half["bias"] == pytest.approx(bucket["bias"] / 2)
    assert rows["sampled tail", "teacher", 20, "ρ + c", 1.0]["variance"] == pytest.approx(4 * half["variance"])
    assert bucket["bias"] > rows["bucket", "both", 20, "none", None]["bias"] > 0
    assert rows["sampled", None, None, "kl", None]["bias"] == 0 == bucket["variance"]


def test_what_the_command_writes_can_be_drawn(report: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "small.json").write_text(json.dumps(report))
    main(["plot", str(tmp_path / "small.json"), "--out", str(tmp_path)])
    assert (tmp_path / "estimators.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "argument --student: give one, or make one by --drop and --bits; not both"),
        (["--drop", "1", "--student", "S"], "argument --student: give one"),
        (["--drop", "x"], "argument --drop: 'x' is no list of indices"),
        (["--bits", "1"], "argument --bits: 1; it must be from 2 to 16"),
        (["--bits", "4", "--temperature", "0"], "argument --temperature: 0.0; it must be > 0"),
    ],
)
def test_bad_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert message in bench_refusal(capsys, "estimators", *arguments)
