"""The tables of recipes/tokenizers: how often real tokenizers agree, and what a teacher with another one teaches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import fmean
from typing import Any

from bench.lib.markdown import each, table
from bench.lib.report import read_recipe

ARMS = {
    "own": "teacher with the other tokenizer",
    "reverse_kl": "… its distribution over the tokens of both",
    "top_k": "… its 20 likeliest tokens, of those of both",
    "same": "teacher with the same tokenizer",
    "sft": "fine-tuned on the other teacher's text",
}
TEXTS = {
    "prose": "prose, English",
    "code": "code, Python",
    "cjk": "Chinese, Japanese, Korean",
    "emoji": "chats with emoji",
}
LAST = 4  # steps whose mean is shown
Run = dict[str, Any]


def compared() -> str:
    """Of each student and arm the mean of its seeds, and what each of them solves."""
    report = read_recipe("tokenizers/comparison")
    arms: dict[tuple[str, str], list[Run]] = {}
    for run in report["runs"]:
        arms.setdefault((run["student"], run["arm"]), []).append(run)
    header = ["student's tokens", "learns from", "before", "after", "seeds", "tokens of a segment", "FLOPs"]
    rows = [[student, ARMS[arm], *_cells(runs)] for (student, arm), runs in arms.items()]
    said = "Greedy answers to 550 held-out problems, ± 2 points each; means of the seeds"
    return table(header, rows, said, [report], "torch", "transformers")


def agreement() -> str:
    """Of each kind of text the means of all pairs, and the pairs that agree least and most."""
    report = read_recipe("tokenizers/segments")
    header = ["text", "segments of 1,000 bytes", "tokens of a segment", "tokens alone in one", "longest, bytes"]
    rows = []
    for kind, label in TEXTS.items():
        pairs = [run for run in report["runs"] if run.get("text") == kind]
        rows.append([
            f"{label} ({pairs[0]['bytes'] / 1000:.0f} kB)",
            _range(pairs, lambda run: 1000 * run["segments"] / run["bytes"], ".0f"),
            _range(pairs, lambda run: run["tokens"] / run["segments"], ".2f"),
            _range(pairs, _alone, ".0%"),
            str(max(run["longest"] for run in pairs)),
        ])  # fmt: skip
    said = "Means of all 56 pairs, in brackets the least and the most"
    return table(header, rows, said, [report], "transformers")


def alone() -> str:
    """What share of a student's tokens in prose are a segment with one token of the teacher."""
    report = read_recipe("tokenizers/segments")
    pairs = {(run["student"], run["teacher"]): run for run in report["runs"] if run.get("text") == "prose"}
    names = list(dict.fromkeys(student for student, _ in pairs))
    rows = [
        [ours, *(f"{_alone(pairs[ours, theirs]):.0%}" if ours != theirs else "" for theirs in names)] for ours in names
    ]
    said = "Prose; a row is a student, a column a teacher"
    return table(["", *names], rows, said, [report], "transformers")


def real() -> str:
    """A real pair on held-out prompts before and after its run, and in the run's first steps and last ones."""
    report = read_recipe("tokenizers/real")
    before, after, training = report["runs"]
    steps, last = training["steps"], len(training["steps"]) - LAST
    rows = [
        ["held-out, before", *_figures([before]), f"{before['segments_per_sample']:.1f}"],
        [f"held-out, after {len(steps)} steps", *_figures([after]), f"{after['segments_per_sample']:.1f}"],
        ["training, step 1", *_figures(steps[:1]), ""],
        [f"training, steps {last + 1} to {len(steps)}", *_figures(steps[last:]), ""],
    ]
    header = [
        "prompts",
        "d of a byte",
        "d of a token",
        "entropy",
        "bytes of a segment",
        "its tokens",
        "segments of a sample",
    ]
    said = f"Nats; {before['samples']} held-out prompts, ± a standard error over samples; its tokens: student / teacher"
    return table(header, rows, said, [report], "torch", "transformers")


def _figures(steps: Sequence[Run]) -> Iterator[str]:
    mean = {name: fmean(step[name] for step in steps) for name in steps[0] if isinstance(steps[0][name], float)}
    error = f" ± {mean['d_per_byte_error']:.3f}" if "d_per_byte_error" in mean else ""
    yield f"{mean['d_per_byte']:.3f}{error}"
    yield f"{mean['teacher_kl']:.2f}"
    yield f"{mean['entropy']:.2f}"
    yield f"{mean['alignment/segment_bytes']:.2f}"
    yield f"{mean['alignment/segment_tokens']:.2f} / {mean['alignment/teacher_segment_tokens']:.2f}"


def _cells(runs: list[Run]) -> Iterator[str]:
    after = [run["accuracy"][-1] for run in runs]
    yield f"{runs[0]['accuracy'][0]:.1%}"
    yield f"{fmean(after):.1%}"
    yield each(after, ".1%")
    names = ("alignment/segment_tokens", "alignment/teacher_segment_tokens")
    yield " / ".join(f"{fmean(run[name] for run in runs):.2f}" for name in names if name in runs[0])
    yield f"{fmean(run['flops'] for run in runs):.1e}"


def _alone(run: Run) -> float:
    return float(run["alone"] / run["tokens"])


def _range(runs: Iterable[Run], of: Callable[[Run], float], form: str) -> str:
    values = [of(run) for run in runs]
    return f"{fmean(values):{form}} ({min(values):{form}} … {max(values):{form}})"


TABLES = {"tokenizers": compared, "tokenizers-real": real, "segments": agreement, "segments-alone": alone}
