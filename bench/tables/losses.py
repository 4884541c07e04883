"""The tables of losses, kernels and trainers. `TABLES` names the function that makes each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bench.lib.cases import HEADS
from bench.lib.markdown import Report, markdown, table
from bench.lib.report import by_implementation, read_result

OPS = ("policy_gradient", "logprobs", "reverse_kl")
IMPLEMENTATIONS = {"fastkl": "fastkl", "eager": "eager", "compile": "torch.compile"}
MODELS = {"qwen": "Qwen2.5-Coder-1.5B", "smollm2": "SmolLM2-135M"}
REAL_ROWS = ("qwen-T1", "smollm2-T0.7", "smollm2-T1")
DEFAULT_ERROR = 2e-3
# What a trainer is called, and its objective.
TRAINERS = {
    "fastkl": ("fastkl", "policy gradient"),
    "fastkl_bf16_sampling": ("fastkl, `sampling.dtype: bfloat16`", "policy gradient"),
    "fastkl_reverse_kl": ("fastkl", "reverse KL"),
    "fastkl_continuous_batching": ("fastkl, `sampling.engine: continuous_batching`", "reverse KL"),
    "trl_distillation": ("TRL's DistillationTrainer, beta 1", "reverse KL"),
    "trl_gkd": ("TRL's GKDTrainer, lmbda 1, beta 1", "reverse KL"),
}


def losses() -> str:
    """Units and extra memory of each loss and head, for fastkl and for the two ways without it."""
    reports = {(op, head): read_result(f"cpu-{op}-{head}-fp32") for op in OPS for head in HEADS}
    rows = []
    for (op, head), report in reports.items():
        by_name = by_implementation(report)
        measured = (by_name[name] for name in IMPLEMENTATIONS)
        cells = (f"{row['forward_backward_units']:.2f} ({row['peak_extra_mb']:.0f})" for row in measured)
        rows.append([f"{op}, {head} head", *cells])
    header = ["forward + backward, units (extra MB)", *IMPLEMENTATIONS.values()]
    shape = ", ".join(map(str, report["problems"][0]["shape"]))
    return table(header, rows, f"N, D, V = {shape}, float32", reports.values())


def sparse() -> str:
    """Exact and sparse backward on real models' rows, for those who only want to know what it saves."""
    header = ["forward + backward, units", *(f"{way}, {head} head" for head in HEADS for way in ("exact", "sparse"))]
    return _sparse_times(header, REAL_ROWS, ("fastkl", "fastkl_sparse"))


def sparse_times() -> str:
    """The same with eager PyTorch, and with rows that are made up."""
    implementations = {"eager": "eager", "fastkl": "exact", "fastkl_sparse": "sparse"}
    header = ["rows", *(f"{head}: {label}" for head in HEADS for label in implementations.values())]
    return _sparse_times(header, (*REAL_ROWS, "peaked-qwen-shape", "flat"), tuple(implementations))


def sparse_errors() -> str:
    """Kept columns and gradient errors at the default error."""
    reports = [read_result(f"sparse-{rows}") for rows in (*REAL_ROWS, "peaked-qwen-shape")]
    rows = [
        [
            f"{_rows_name(report, report['conditions']['shape'])} ({report['conditions']['mean_entropy']:.2f} nats)",
            str(row["block"]),
            f"{row['kept']:.2%}".replace("%", " %"),
            *(f"{row[name]:.1e}" for name in ("claimed", "hidden", "weight")),
        ]
        for report in reports
        for row in report["rows"]
        if row["error"] == DEFAULT_ERROR
    ]
    header = ["rows (entropy of the first 256)", "block", "kept", "claimed", "dH", "dW"]
    return table(header, rows, f"error {DEFAULT_ERROR:g}, float32", reports)


def trainers() -> str:
    """Seconds per step and memory of a whole step of distillation."""
    report = read_result("cpu-train-smollm2")
    results = report["trainers"]
    first = next(iter(results.values()))["seconds"]["total"]
    rows = []
    for name, result in results.items():
        seconds = result["seconds"]
        phases = (
            f"{seconds[phase]:.2f}" if seconds[phase] else "in the rest" for phase in ("sample", "teacher", "train")
        )
        relative, memory = f"{seconds['total'] / first:.2f}", f"{result['peak_memory_mb']:,.0f}"
        rows.append([*TRAINERS[name], f"{seconds['total']:.2f}", *phases, relative, memory])
    header = [
        "trainer",
        "objective",
        "seconds per step",
        "sampling",
        "teacher",
        "the rest",
        "times the first",
        "peak MB",
    ]
    job = report["job"]
    conditions = f"{job['prompts']} prompts, {job['new_tokens']} new tokens each. Medians over {job['steps'] - 1} steps"
    return table(header, rows, conditions, [report], "torch", "transformers")


def counted_units() -> str:
    """Counted estimates of the plans on a GPU, now and at an earlier commit."""
    earlier, now = read_result("counted-before"), {(r["model"], r["form"]): r for r in read_result("counted")["rows"]}
    rows = []
    for before in earlier["rows"]:
        model, form, variant = before["model"], before["form"], before["variant"]
        after = now[model, form + ", bias" * (variant == "bias")]  # a temperature changes nothing
        pairs = (
            f"{before[key]:,.0f} → {after[key]:,.0f}" for key in ("accumulator_passes", "chunk_rows", "workspace_mb")
        )
        ranges = [
            f"{r[f'{key}_low']:.2f} … {r[f'{key}_high']:.2f}" for r, key in ((before, "stated"), (before, "units"))
        ]
        rows.append(
            [
                f"{model}, {form}{variant and ', '}{variant}",
                *ranges,
                f"{after['units_low']:.2f} … {after['units_high']:.2f}",
                *pairs,
            ]
        )
    header = ["plan", "stated before", "all of it, before", "now", "passes over dW", "chunk, rows", "workspace, MB"]
    return markdown(header, rows)


TABLES: dict[str, Callable[[], str]] = {
    "losses": losses,
    "sparse": sparse,
    "sparse-times": sparse_times,
    "sparse-errors": sparse_errors,
    "trainers": trainers,
    "counted": counted_units,
}


def _sparse_times(header: Sequence[str], names: Sequence[str], implementations: Sequence[str]) -> str:
    """A row for each kind of rows; units of each implementation, the frozen head first."""
    rows, reports = [], []
    for name in names:
        by_head = [read_result(f"cpu-sparse-{name}-{head}") for head in HEADS]
        shape = by_head[0]["problems"][0]["shape"]
        cells = [_units(by_implementation(report).get(which)) for report in by_head for which in implementations]
        rows.append([_rows_name(by_head[0], shape), *cells])
        reports += by_head
    return table(header, rows, "float32", reports)


def _units(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['forward_backward_units']:.2f}"


def _rows_name(report: Report, shape: Sequence[int]) -> str:
    """The model and the temperature it sampled at; of made-up rows their kind and shape."""
    n, d, vocabulary = shape
    conditions = report["conditions"]
    if conditions["data"] in MODELS:
        return f"{MODELS[conditions['data']]}, T = {conditions['temperature']:g}, {n} tokens"
    return f"{conditions['data']}, D = {d}, V = {vocabulary}, {n} tokens"
