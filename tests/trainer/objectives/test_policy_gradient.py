"""The KL's part of an advantage, and what is left out of the loss: each against its formula, written out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import kl
from groups import in_group
from run_cases import WORDS, Run, check_equal, completion_logprobs, counted, distilled, interrupt, log, run
from run_settings import config, distillation
from stub_server import serving
from tiny_data import write_jsonl
from tiny_models import llama, save_model, tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastkl.head import fuse
from fastkl.trainer.config.loss import LossConfig
from fastkl.trainer.config.sampling import SamplingConfig
from fastkl.trainer.data.batching import collate
from fastkl.trainer.data.samples import UNKNOWN, Sample, make_sample
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.objectives.advantages import set_advantages
from fastkl.trainer.objectives.policy_gradient import PolicyGradient
from fastkl.trainer.runs.folder import check_run_folder
from fastkl.trainer.teachers.local import LocalTeacher, TeacherHead

CPU = torch.device("cpu")


class Scores:
    """What a run's samples say, and what its models say of the same places, over the ids that all heads have."""

    def __init__(self, done: Run, folder: Path, temperature: float = 1.0) -> None:
        self.samples = done.samples
        student, teacher, reference = (
            AutoModelForCausalLM.from_pretrained(folder / name) for name in ("student", "teacher", "reference")
        )
        self.p, self.q, self.r = (
            [completion_logprobs(model, sample, temperature, WORDS).detach().double() for sample in done.samples]
            for model in (student, teacher, reference)
        )

    def logged(self, field: str) -> list[Tensor]:
        return [torch.tensor(counted(sample, field)).double() for sample in self.samples]

    def kl(self, theirs: list[Tensor]) -> list[Tensor]:
        return [kl(p, q) for p, q in zip(self.p, theirs, strict=True)]


def of_others(values: list[Tensor]) -> list[Tensor]:
    """Each sample's values less the mean of all others'."""
    rest = [torch.cat([*values[:index], *values[index + 1 :]]) for index in range(len(values))]
    return [own - other.mean() for own, other in zip(values, rest, strict=True)]


def plain(scores: Scores) -> list[Tensor]:
    ours, theirs = scores.logged("sampler_logprobs"), scores.logged("teacher_logprobs")
    return [a - b for a, b in zip(ours, theirs, strict=True)]


def extrapolated(scores: Scores) -> list[Tensor]:
    """d of a factor 1.5."""
    refs = zip(*(scores.logged(f"{who}_logprobs") for who in ("sampler", "teacher", "reference")), strict=True)
    return [(a - r) - 1.5 * (b - r) for a, b, r in refs]


def bounded(scores: Scores) -> list[Tensor]:
    """d of the power 2."""
    ours, theirs = scores.logged("sampler_logprobs"), scores.logged("teacher_logprobs")
    return [((2 * a).exp() - (2 * b).exp()) / 2 for a, b in zip(ours, theirs, strict=True)]


def less(values: list[Tensor], baseline: list[Tensor]) -> list[Tensor]:
    return [a - b for a, b in zip(values, baseline, strict=True)]


def past(scores: Scores) -> list[Tensor]:
    pairs = zip(scores.kl(scores.q), scores.kl(scores.r), strict=True)
    return less(extrapolated(scores), [1.5 * a - 0.5 * b for a, b in pairs])


# Settings of `loss`, and what is minus the advantage.
EXTRAPOLATE: dict[str, object] = {"loss__extrapolate": 1.5}
CASES: dict[str, tuple[dict[str, object], Callable[[Scores], list[Tensor]]]] = {
    "mean": ({"loss__baseline": "mean"}, lambda scores: of_others(plain(scores))),
    "kl": ({"loss__baseline": "kl"}, lambda scores: less(plain(scores), scores.kl(scores.q))),
    "power": ({"loss__advantage_power": 2}, bounded),
    "power-mean": ({"loss__advantage_power": 2, "loss__baseline": "mean"}, lambda s: of_others(bounded(s))),
    "clip": ({"loss__advantage_clip": 0.7}, lambda scores: [d.clamp(-0.7, 0.7) for d in plain(scores)]),
    "extrapolate": (EXTRAPOLATE, extrapolated),
    "extrapolate-kl-clip": (
        EXTRAPOLATE | {"loss__baseline": "kl", "loss__advantage_clip": 2},
        lambda scores: [d.clamp(-2, 2) for d in past(scores)],
    ),
}
TEMPERATURE = 0.8


def with_reference(models: Path, options: dict[str, object]) -> dict[str, object]:
    return options | ({"reference__path": models / "reference"} if "loss__extrapolate" in options else {})


@pytest.mark.parametrize("case", CASES)
def test_advantages_are_those_of_the_formula(tmp_path: Path, models: Path, case: str) -> None:
    options, formula = CASES[case]
    settings = with_reference(models, options) | {"sampling__temperature": TEMPERATURE, "batch__max_tokens": 40}
    done = run(tmp_path / "run", models, optim__steps=1, **settings)
    scores, (row,) = Scores(done, models, TEMPERATURE), done.metrics
    wanted = [-d for d in formula(scores)]
    for sample, advantages in zip(done.samples, wanted, strict=True):
        found = torch.tensor(counted(sample, "advantages")).double()
        torch.testing.assert_close(found, advantages, atol=1e-4, rtol=1e-4)
        assert all(a == 0.0 for a, counts in zip(sample["advantages"], sample["loss_mask"], strict=True) if not counts)
    assert row["loss"] == pytest.approx(-torch.cat(wanted).mean().item(), abs=1e-4)
    if "loss__advantage_clip" in options:
        limit = float(str(options["loss__advantage_clip"]))
        share = (torch.cat(wanted).abs() == limit).double().mean().item()
        assert 0 < row["advantages/clip_fraction"] == pytest.approx(share)
    if case == "kl":
        assert row["advantages/kl_baseline"] == pytest.approx(torch.cat(scores.kl(scores.q)).mean().item(), rel=1e-4)
    if "loss__extrapolate" in options:
        gap = torch.cat(less(scores.logged("sampler_logprobs"), scores.logged("reference_logprobs")))
        assert row["reference_kl"] == pytest.approx(gap.mean().item(), rel=1e-5)
        tokens = torch.cat(scores.logged("ids")).long()
        said = torch.cat(scores.r).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(torch.cat(scores.logged("reference_logprobs")), said, atol=1e-4, rtol=1e-4)


def test_the_exact_kl_over_heads_of_different_sizes(tmp_path: Path, padded: Path) -> None:
    """The tokenizer's ids alone are compared; the teacher lacks some that the student samples."""
    done = run(tmp_path / "run", padded, optim__steps=1, loss__baseline="kl")
    student, teacher = (AutoModelForCausalLM.from_pretrained(padded / name) for name in ("student", "teacher"))
    beyond = 0
    for sample in done.samples:
        p, q = (torch.log_softmax(completion_logprobs(model, sample, ids=WORDS), -1) for model in (student, teacher))
        exact, tokens = kl(p, q).detach(), torch.tensor(counted(sample, "ids"))
        torch.testing.assert_close(torch.tensor(counted(sample, "kl_baseline")), exact, atol=1e-4, rtol=1e-4)
        theirs = torch.tensor(counted(sample, "teacher_logprobs"))
        assert torch.equal(theirs == UNKNOWN, tokens >= WORDS)
        wanted = theirs - torch.tensor(counted(sample, "sampler_logprobs")) + exact
        torch.testing.assert_close(torch.tensor(counted(sample, "advantages")), wanted, atol=1e-4, rtol=1e-4)
        beyond += int((tokens >= WORDS).sum())
    assert beyond > 0


def test_the_exact_kl_beside_given_completions_and_two_teachers(tmp_path: Path, models: Path) -> None:
    """Each sample's place is compared with its own teacher; a given completion keeps its constant."""
    data = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(6)]
    write_jsonl(tmp_path / "sums.jsonl", data)
    entries = {
        name: {"data": {"path": str(tmp_path / "sums.jsonl")}, "teacher": {"path": str(models / name)}}
        for name in ("teacher", "reference")
    }
    alone = {"teacher__path": "", "data__path": "null", "mixture": json.dumps(entries)}
    half: dict[str, object] = {"sampling__on_policy_fraction": 0.5, "sampling__prompts_per_step": 8}
    done = run(tmp_path / "run", models, optim__steps=1, loss__baseline="kl", **alone, **half)
    scores = Scores(done, models)
    kls = {"teacher": scores.kl(scores.q), "reference": scores.kl(scores.r)}
    assert {(sample["dataset"], sample["given"]) for sample in done.samples} == {
        (name, given) for name in entries for given in (False, True)
    }
    for index, sample in enumerate(done.samples):
        exact = kls[sample["dataset"]][index].float()
        torch.testing.assert_close(torch.tensor(counted(sample, "kl_baseline")), exact, atol=1e-4, rtol=1e-4)
        gap = torch.tensor(counted(sample, "teacher_logprobs")) - torch.tensor(counted(sample, "old_logprobs"))
        wanted = torch.ones_like(gap) if sample["given"] else gap + exact
        torch.testing.assert_close(torch.tensor(counted(sample, "advantages")), wanted, atol=1e-4, rtol=1e-4)


def test_lists_for_an_added_forward_kl_come_with_the_exact_kl(tmp_path: Path, models: Path) -> None:
    added: dict[str, object] = {"optim__steps": 1, "loss__forward_kl_above": 0.5, "loss__forward_kl_top_k": 3}
    both, alone = (run(tmp_path / name, models, loss__baseline=name, **added).metrics[0] for name in ("kl", "none"))
    for name in ("policy/added_forward_kl", "policy/unsure_fraction"):
        assert both[name] == pytest.approx(alone[name], rel=1e-4)


def test_a_shuffled_control_takes_baseline_and_reference_along(tmp_path: Path, models: Path) -> None:
    settings = with_reference(models, EXTRAPOLATE | {"loss__baseline": "kl", "optim__steps": 1})
    plain, shuffled = (
        [
            a
            for sample in run(tmp_path / str(control), models, loss__control=control, **settings).samples
            for a in counted(sample, "advantages")
        ]
        for control in ("null", "shuffled")
    )
    assert shuffled != pytest.approx(plain, abs=1e-3)
    assert sorted(shuffled) == pytest.approx(sorted(plain), abs=1e-5)


@pytest.mark.parametrize("options", [{"loss__baseline": "kl"}, {}], ids=str)
def test_the_base_of_a_lora_student_is_its_reference_without_a_copy(
    tmp_path: Path, models: Path, options: dict[str, object]
) -> None:
    lora: dict[str, object] = {"student__lora__rank": 2, "optim__lr": 0.1, **EXTRAPOLATE, **options}
    rows = [
        log(distilled(distillation(tmp_path / name, models, **lora) | reference))
        for name, reference in (
            ("own", {"reference.self": "base"}),
            ("copy", {"reference.path": models / "student"}),
        )
    ]
    assert rows[0][0]["reference_kl"] == pytest.approx(0, abs=1e-5)  # a new adapter does nothing
    assert abs(rows[0][-1]["reference_kl"]) > 1e-3
    for own, copy in zip(*rows, strict=True):
        assert own == pytest.approx(copy, rel=2e-3, abs=1e-4)


def test_a_reference_beside_a_served_teacher(tmp_path: Path, models: Path) -> None:
    local = run(tmp_path / "local", models, optim__steps=1, **with_reference(models, EXTRAPOLATE))
    with serving(models / "teacher") as stub:
        server = {"teacher__path": "", "teacher__server__url": stub.url, "teacher__server__model": "stub"}
        there = run(tmp_path / "there", models, optim__steps=1, **with_reference(models, EXTRAPOLATE | server))
    ours, theirs = there.metrics[0], local.metrics[0]
    assert ours.keys() == theirs.keys() - {"flops/teacher"}
    for name in ("teacher_kl", "reference_kl", "loss", "flops/reference"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4)


def test_a_run_with_all_of_it_resumes_exactly(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tamed: dict[str, object] = {"loss__baseline": "mean", "loss__advantage_clip": 1, "loss__ratio_bounds": [0.5, 2.0]}
    lines = [
        distillation(tmp_path / name, models, optim__substeps=2, checkpoint__every=1, **tamed) for name in ("a", "b")
    ]
    distilled(lines[0])
    interrupt(monkeypatch, lines[1], step=2)
    distilled(lines[1])
    check_equal(tmp_path / "b", tmp_path / "a")


def test_the_reference_of_a_run_does_not_change(tmp_path: Path, models: Path) -> None:
    save_model(tmp_path / "base", seed=2)
    settings = distillation(tmp_path / "run", models, optim__steps=1, **EXTRAPOLATE)
    distilled(settings | {"reference.path": tmp_path / "base"})
    with pytest.raises(ConfigError, match=r"Within a run reference\.path cannot change"):
        check_run_folder(config("distill", settings | {"reference.path": models / "teacher", "resume": "change"}))
    save_model(tmp_path / "base", seed=3)
    longer = settings | {"reference.path": tmp_path / "base", "optim.steps": 2, "resume": "change"}
    with pytest.raises(ConfigError, match="the weights of the reference changed since the run began"):
        distilled(longer)


def test_a_reference_that_reads_otherwise_is_refused(tmp_path: Path, models: Path) -> None:
    save_model(tmp_path / "other")
    words = tokenizer()
    words.add_tokens(["more"])
    words.bos_token = words.eos_token
    words.save_pretrained(tmp_path / "other")
    save_model(tmp_path / "short", max_position_embeddings=8)
    for name, said in (("other", "in the reference's; give both the same"), ("short", "the reference's context of 8")):
        settings = distillation(tmp_path / "run", models, **EXTRAPOLATE) | {"reference.path": tmp_path / name}
        with pytest.raises(ConfigError, match=said):
            distilled(settings)
    with pytest.raises(ConfigError, match=r"reference\.device is 'gpu', which cannot be used here"):
        distilled(
            distillation(tmp_path / "run", models, **with_reference(models, EXTRAPOLATE), reference__device="gpu")
        )
    assert not (tmp_path / "run").exists()


def sampled(seed: int, lengths: list[int]) -> list[Sample]:
    """Samples with log-probs of student, teacher and reference."""
    random = torch.Generator().manual_seed(seed)
    samples = []
    for index, length in enumerate(lengths):
        own, theirs, ref = (-5 * torch.rand(3, length, generator=random)).tolist()
        sample = make_sample([1, 2], [3] * length, index, own)
        sample.teacher_logprobs, sample.reference_logprobs = [0.0, 0.0, *theirs], [0.0, 0.0, *ref]
        samples.append(sample)
    return samples


def advantages_of_shares(rank: int, count: int) -> list[tuple[list[list[float]], dict[str, float]]]:
    """This process's advantages, and the metrics, of several samples and of one."""
    loss = LossConfig(baseline="mean", advantage_clip=1.0, discount=0.5, kl_coef=0.7)
    found = []
    for lengths in ([3, 5, 1, 4, 2], [3]):
        samples = sampled(0, lengths)
        samples[-1].given = len(samples) > 1
        mine = samples[len(samples) * rank // count : len(samples) * (rank + 1) // count]
        metrics = set_advantages(mine, loss, given_coef=0.5)
        found.append(([sample.advantages.tolist() for sample in mine], metrics))
    return found


def test_processes_share_one_mean_and_one_count() -> None:
    """A process may have no sample at all."""
    wanted = advantages_of_shares(0, 1)
    for one, *shares in zip(wanted, *in_group(advantages_of_shares), strict=True):
        assert [row for rows, _ in shares for row in rows] == one[0]
        assert all(said == one[1] for _, said in shares)
        assert one[1]["advantages/clip_fraction"] > 0
    assert wanted[0][0][-1] == [0.0, 0.0, 0.5, 0.5]


def test_a_given_completion_is_no_part_of_the_mean() -> None:
    samples = sampled(1, [3, 4, 2])
    samples[2].given, samples[2].reward_advantage = True, 7.0
    set_advantages(samples, LossConfig(baseline="mean"))
    gaps = [[t - s for s, t in zip(x.sampler_logprobs, x.teacher_logprobs, strict=True)][2:] for x in samples[:2]]
    for own, other, sample in zip(gaps, reversed(gaps), samples[:2], strict=True):
        assert sample.advantages[2:] == pytest.approx([gap - sum(other) / len(other) for gap in own], abs=1e-6)


def test_a_clip_leaves_rewards_alone() -> None:
    samples = sampled(2, [4])
    samples[0].reward_advantage = 10.0
    set_advantages(samples, LossConfig(advantage_clip=1e-3))
    assert samples[0].advantages[2:] == pytest.approx([10.0] * 4, abs=2e-3)


def test_an_id_that_the_reference_lacks_is_not_run_away_to() -> None:
    samples = sampled(3, [3])
    samples[0].reference_logprobs[3] = UNKNOWN
    set_advantages(samples, LossConfig(extrapolate=2.0))
    ours, theirs, ref = (getattr(samples[0], f"{who}_logprobs") for who in ("sampler", "teacher", "reference"))
    wanted = [2 * (t - r) - (s - r) for s, t, r in zip(ours, theirs, ref, strict=True)]
    wanted[3] = theirs[3] - ours[3]
    assert samples[0].advantages[2:] == pytest.approx(wanted[2:], abs=1e-5)


def test_a_teacher_that_forbids_a_token_gives_no_baseline(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exact KL is infinite, where all that was sampled is allowed."""
    head = LocalTeacher.head

    def forbidding(self: LocalTeacher, *args: Any) -> TeacherHead:
        given, sampled = head(self, *args), {token for sample in args[0] for token in sample.ids.tolist()}
        bias = torch.zeros(len(given.weight))
        bias[min({*range(WORDS)} - sampled)] = -torch.inf
        return given._replace(options={**given.options, "bias": bias})

    monkeypatch.setattr(LocalTeacher, "head", forbidding)
    done = run(tmp_path / "run", models, optim__steps=1, loss__baseline="kl")
    for sample in done.samples:
        assert set(sample["kl_baseline"]) == {0.0}
    assert math.isfinite(done.metrics[0]["loss"])


BOUNDS = [0.8, 1.25]


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_what_is_outside_the_bounds_is_left_out(ratio: Any) -> None:
    """Against the loss with all the logits; the samples are two turns with a reply between them."""
    model = llama(len(tokenizer()))
    samples = [make_sample([5, 6], [7, 8, 9, 10], 0), make_sample([5], [6, 7], 1), make_sample([8, 9], [3, 4, 5], 2)]
    samples[0].loss_mask[3] = False
    random = torch.Generator().manual_seed(0)
    values, tokens = [], 0
    for sample in samples:
        logits = model(torch.tensor(sample.ids)[None]).logits[0, :-1].log_softmax(-1)
        own = logits.gather(1, torch.tensor(sample.ids[1:]).long()[:, None])[:, 0]
        shifts = 0.6 * torch.rand(len(own), generator=random) - 0.25 + 0.4 * (sample is samples[1])
        sample.old_logprobs = [0.0, *(own.detach() - shifts).tolist()]
        sample.advantages = [0.0, *torch.randn(len(own), generator=random).tolist()]
        kept = torch.tensor(sample.loss_mask[1:])
        differences = (own - torch.tensor(sample.old_logprobs[1:]))[kept]
        ratios = differences.exp() if ratio == "token" else differences.mean().exp().expand(len(differences))
        inside = (ratios >= BOUNDS[0]) & (ratios <= BOUNDS[1])
        advantages = torch.tensor(sample.advantages[1:])[kept]
        values.append((-(ratios * advantages).where(inside, 0.0), inside))
        tokens += int(kept.sum())
    wanted = torch.cat([value for value, _ in values]).sum() / tokens
    outside = 1 - torch.cat([inside for _, inside in values]).double().mean().item()
    assert 0 < outside < 1
    objective = PolicyGradient(LossConfig(ratio=ratio, ratio_bounds=BOUNDS), SamplingConfig())
    output = objective(fuse(model), collate(samples, "padded", CPU), tokens, 0)
    assert output.loss.item() == pytest.approx(wanted.item(), abs=1e-5)
    assert output.metrics["out_of_bounds_fraction"].item() == pytest.approx(outside)
