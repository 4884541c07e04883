"""What a probe found, for a reader: a table, then sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastkl.trainer.commands.plan.table import GIB
from fastkl.trainer.notes import printable
from fastkl.trainer.runs.guards.measures import FEWEST

Said = Mapping[str, Any]
WAYS = ("greedy", "sampled")
WORTH_TELLING = 0.01
WIDTH = 100  # characters of an aligned text


def lines(said: Said) -> Iterator[str]:
    """The table, line by line; the verdict is the last."""
    yield _row("probed", f"{said['prompts']} prompts, {said['samples']} samples of {said['tokens']:,} tokens")
    yield from _accuracies(said)
    yield _row("teacher_kl", f"{_spread(said['teacher_kl'])} nats per {said['unit']}: ℓ_sampler − ℓ_teacher")
    yield _row("entropy", f"{_spread(said['entropy'])} nats per token: the student's")
    if top := said["top_k"]:
        chance = top["k"] / max(said["vocabularies"])
        by_chance = f" ({chance:.0%} by chance)" if chance >= WORTH_TELLING else ""
        yield _row(
            f"top {top['k']}",
            f"{top['overlap']:.0%} of the teacher's are the student's too{by_chance}; they have "
            f"{top['teacher_mass']:.1%} of the teacher's probability and {top['student_mass']:.1%} of the student's",
        )
    yield _row("gap", _shares(said["share_of_gap"], said["unit"]))
    yield from _alignment(said["alignment"])
    metrics = said["metrics"]
    yield _row(
        "completions",
        f"{metrics['completions/mean_length']:.1f} tokens on average; {metrics['completions/truncated_fraction']:.0%} are "
        f"cut, {metrics['completions/looping_fraction']:.0%} while they repeat themselves",
    )
    yield _row("the run", _cost(said["run"]))
    yield from (_row("missing", text) for text in said["missing"])
    yield from _verdict(said)


def _row(name: str, text: str) -> str:
    return f"{name:12}{text}"


def _accuracies(said: Said) -> Iterator[str]:
    for who in ("student", "teacher"):
        if found := said["accuracy"][who]:
            parts = [f"{way} {_with_error(found[way])}" for way in WAYS if way in found]
            yield _row("accuracy" if who == "student" else "", f"{who}: {', '.join(parts)}")
    if gap := said["accuracy"]["gap"]:
        parts = [f"{way} {value:+.1%}{_plus_minus(said['accuracy']['gap_se'][way])}" for way, value in gap.items()]
        yield _row("", f"gap: {', '.join(parts)}")


def _with_error(found: Mapping[str, float | None]) -> str:
    return f"{found['mean']:.1%}{_plus_minus(found['se'])}"


def _plus_minus(error: float | None) -> str:
    return "" if error is None else f" ± {error:.1%}"


def _spread(found: Mapping[str, float]) -> str:
    points = ", ".join(
        f"{name.removeprefix('p').lstrip('0')} % {value:.3g}" for name, value in found.items() if name != "mean"
    )
    return f"mean {found['mean']:.3g} (percentiles: {points})"


def _shares(gap: Mapping[str, float], unit: str) -> str:
    return (
        f"of Σ|d|, first {unit}s have {gap['first_token']:.0%} (they are {gap['first_tokens_of_all']:.0%} of all), last "
        f"{unit}s {gap['last_token']:.0%} ({gap['last_tokens_of_all']:.0%}), 1 % of all {unit}s {gap['top_1_percent']:.0%}"
    )


def _alignment(found: Mapping[str, Any]) -> Iterator[str]:
    """Of teachers with their own tokenizers."""
    if not found:
        return
    yield _row(
        "alignment",
        f"{found['aligned_fraction']:.1%} of the tokens are in segments of {found['segment_bytes']:.1f} bytes, "
        f"{found['segment_tokens']:.2f} tokens and {found['teacher_segment_tokens']:.2f} of the teacher's; teacher_kl is "
        f"{found['teacher_kl_per_byte']:.3g} nats per byte",
    )
    for lines_of_both in found["samples"]:
        yield from (_row("", f"{who:8}{printable(text[:WIDTH])}") for who, text in lines_of_both.items())


def _cost(run: Mapping[str, Any]) -> str:
    least = "" if run["memory_is_whole"] else "at least "
    served = f", without {run['served_teachers']} on a server" if run["served_teachers"] else ""
    memory = f"{least}{run['memory_bytes'] / GIB:.1f} GiB in one process"
    return f"{memory}; {run['flops']:.2e} FLOPs in {run['steps']} steps{served}"


def _verdict(said: Said) -> Iterator[str]:
    yield ""
    for reason in said["reasons"]:
        yield f"{reason['verdict']}: {reason['text']}. {reason['advice']}."
    if not said["reasons"]:
        yield "Nothing is in the way of this run."
    if said["tokens"] < FEWEST:
        yield f"{said['tokens']} tokens are few to judge by. Probe more prompts, with more in data or by --prompts."
    if said["verdict"] == "fine":
        yield f"A student like this one learned well with loss.objective: {said['objective']}."
    yield f"verdict: {said['verdict']}"
