"""The tables of what fastkl changes in code that people have (`bench integrations`), and beside other people's losses."""

from __future__ import annotations

from typing import Any

from bench.lib.cases import HEADS
from bench.lib.markdown import Report, table
from bench.lib.report import read_result

TRAINERS = {
    "transformers": "Transformers' `Trainer`, cross-entropy",
    "sft": "TRL's `SFTTrainer`",
    "distillation": "TRL's `DistillationTrainer`, reverse KL",
    "distillation_jsd": "TRL's `DistillationTrainer`, JSD",
    "grpo": "TRL's `GRPOTrainer`",
    "rloo": "TRL's `RLOOTrainer`",
    "dpo": "TRL's `DPOTrainer`",
    "kto": "TRL's `KTOTrainer`",
}
OPS = {
    "jsd": "JSD",
    "reverse_kl": "reverse KL",
    "grpo": "GRPO, β = 0",
    "grpo_kl": "GRPO, β = 0.04",
    "cross_entropy": "cross-entropy",
}
PEERS = {"fastkl": "fastkl", "fastkl_for_liger": "its Liger classes", "liger": "Liger", "trl": "TRL", "eager": "eager"}
SMALLER = ("jsd", "reverse_kl", "grpo", "grpo_kl")  # measured on a second shape
# What is written for each trainer and each of Liger's losses in the table of the README.
WRITTEN = {
    "transformers": "`Trainer(model=fuse(model))` and a `compute_loss`",
    **dict.fromkeys(("sft", "distillation", "grpo"), "`fastkl.integrations.trl.use()`"),
}


def in_your_code() -> str:
    """For each thing that people use: what to write, and what it gives."""
    report, own = read_result("cpu-integrations"), _peers("grpo", "trainable")
    rows = [["your own loop, GRPO", "`fuse(model)`, a loss of `fastkl.loss`", *_loss_gain(own, "eager", "fastkl")]]
    for name, line in WRITTEN.items():
        result = report["trainers"][name]
        seconds, memory = result["seconds"], result["extra_mb"]
        gain = f"{seconds['theirs'] / seconds['fastkl']:.2f}, a step", _change(memory)
        rows.append([TRAINERS[name], line, *gain])
    liger = {op: _peers(op, "trainable") for op in ("jsd", "grpo")}
    for op, found in liger.items():
        gain = _loss_gain(found, "liger", "fastkl_for_liger")
        rows.append([f"Liger's {OPS[op]}", "`from fastkl.integrations.liger import …`", *gain])
    rows.append(["verl 0.9.1", "`fastkl.integrations.verl.use()`", "not measured", ""])
    header = ["you use", "write", "times as fast", "extra MB"]
    return table(header, rows, "Trained head, float32", [report, own, *liger.values()], "torch", "transformers")


def under_trainers() -> str:
    """Every trainer of `bench integrations`."""
    report = read_result("cpu-integrations")
    rows = []
    for name, result in report["trainers"].items():
        seconds, memory = result["seconds"], result["extra_mb"]
        figures = f"{seconds['theirs']:.2f} → {seconds['fastkl']:.2f}", f"{seconds['theirs'] / seconds['fastkl']:.2f}"
        share, difference = f"{result['head_share']:.0%}".replace("%", " %"), f"{result['difference']:.0e}"
        rows.append([TRAINERS[name], *figures, share, _change(memory), difference])
    header = ["trainer", "seconds a step", "times as fast", "head's share before", "extra MB", "logs differ by"]
    job, model = report["job"], report["model"]
    shape = f"{model['vocabulary']} × {model['hidden']}, {model['layers']} layers"
    conditions = f"{shape}; {job['rows']} rows of {job['tokens']} tokens, float32, processor time"
    return table(header, rows, conditions, [report], "torch", "transformers", "trl")


def peers() -> str:
    """Units and extra memory of the losses that Liger and TRL have too."""
    cases = [(op, head, "") for head in HEADS for op in OPS] + [(op, "trainable", "-896") for op in SMALLER]
    reports = [_peers(*case) for case in cases]
    rows = []
    for (op, head, _), report in zip(cases, reports, strict=True):
        shape, found = report["problems"][0]["shape"], _by_name(report)
        cells = (_cell(found.get(name), "{forward_backward_units:.1f} ({peak_extra_mb:.0f})") for name in PEERS)
        rows.append([f"{OPS[op]}, {head}, V = {shape[2]}", *cells])
    header = ["forward + backward, units (extra MB)", *PEERS.values()]
    return table(header, rows, "float32, processor time", reports)


def accuracy() -> str:
    """Errors of gradients in bfloat16 against float64."""
    rows, reports = [], []
    for data, nature in (("flat", "a new model's"), ("peaked", "a trained model's")):
        for op in OPS:
            report = read_result(f"cpu-accuracy-{op}-{data}-bf16")
            found = _by_name(report)
            cells = (_cell(found.get(name), "{grad_error:.1e}") for name in PEERS)
            rows.append([f"{OPS[op]}, {nature} rows", *cells])
            reports.append(report)
    shape = ", ".join(map(str, reports[0]["problems"][0]["shape"]))
    header = ["error of the gradient, bfloat16", *PEERS.values()]
    return table(header, rows, f"N, D, V = {shape}, trained head", reports)


def _peers(op: str, head: str, suffix: str = "") -> Report:
    return read_result(f"cpu-peers-{op}-{head}-fp32{suffix}")


def _by_name(report: Report) -> dict[str, dict[str, Any]]:
    return {row["impl"]: row for row in report["rows"]}


def _loss_gain(report: Report, theirs: str, ours: str) -> tuple[str, str]:
    before, after = (_by_name(report)[name] for name in (theirs, ours))
    ratio = before["forward_backward_units"] / after["forward_backward_units"]
    return f"{ratio:.2f}, the loss", _change({"theirs": before["peak_extra_mb"], "fastkl": after["peak_extra_mb"]})


def _change(memory: dict[str, float]) -> str:
    return f"{memory['theirs']:,.0f} → {memory['fastkl']:,.0f}"


def _cell(row: dict[str, Any] | None, text: str) -> str:
    return "–" if row is None else text.format(**row)
