"""The tables of what fastkl changes in code that people have (`bench integrations`), and beside other people's losses."""

from __future__ import annotations

from typing import Any

from bench.lib.markdown import Report, table
from bench.lib.report import RESULTS, by_implementation, read_result

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
DATA = {"flat": "a new model", "peaked": "a trained model"}
LIGER, LIGER_LINE = ("jsd", "grpo"), "`from fastkl.integrations.liger import …`"
# What is written for each trainer in the table of the README.
WRITTEN = {
    "transformers": "`Trainer(model=fuse(model))` and a `compute_loss`",
    **dict.fromkeys(("sft", "distillation", "grpo"), "`fastkl.integrations.trl.use()`"),
}


def in_your_code() -> str:
    """For each thing that people use: what to write, and what it gives."""
    report, losses = read_result("cpu-integrations"), {(r["rows"][0]["op"], r["rows"][0]["head"]): r for r in _peers()}
    own = losses["grpo", "trainable"]
    rows = [["your own loop, GRPO", "`fuse(model)`, a loss of `fastkl.loss`", *_loss_gain(own, "eager", "fastkl")]]
    for name, line in WRITTEN.items():
        if name in report["trainers"]:
            rows.append([TRAINERS[name], line, *_step_gain(report["trainers"][name])])
    for op in LIGER:
        gain = _loss_gain(losses[op, "trainable"], "liger", "fastkl_for_liger")
        rows.append([f"Liger's {OPS[op]}", LIGER_LINE, *gain])
    rows.append(["verl 0.9.1", "`fastkl.integrations.verl.use()`", "not measured", ""])
    header = ["you use", "write", "times as fast", "extra MB"]
    return table(header, rows, "Trained head, float32", [report, *losses.values()], "torch")


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
    of_model = f"The model has {model['layers']} layers and V, D = {model['vocabulary']}, {model['hidden']}"
    conditions = f"{of_model}. A step has {job['rows']} rows of {job['tokens']} tokens. float32, processor time"
    return table(header, rows, conditions, [report], "torch", "transformers", "trl")


def peers() -> str:
    """Units and extra memory of the losses that Liger and TRL have too."""
    rows, reports = [], _peers()
    for report in reports:
        found, shape = by_implementation(report), ", ".join(map(str, report["problems"][0]["shape"]))
        cells = (_cell(found.get(name), "{forward_backward_units:.1f} ({peak_extra_mb:.0f})") for name in PEERS)
        first = report["rows"][0]
        rows.append([OPS[first["op"]], first["head"], shape, str(report["conditions"]["teacher_width"] or ""), *cells])
    header = ["units (extra MB)", "head", "N, D, V", "D_t", *PEERS.values()]
    return table(header, rows, "float32, one thread", reports)


def accuracy() -> str:
    """Errors of gradients in bfloat16 against float64."""
    rows, reports = [], _reports("cpu-accuracy-*.json")
    for report in reports:
        found, data = by_implementation(report), report["conditions"]["data"]
        cells = (_cell(found.get(name), "{grad_error:.1e}") for name in PEERS)
        rows.append([OPS[report["rows"][0]["op"]], DATA[data], *cells])
    shape = ", ".join(map(str, reports[0]["problems"][0]["shape"]))
    header = ["error, bfloat16", "rows like those of", *PEERS.values()]
    return table(header, rows, f"N, D, V = {shape}, trained head", reports)


def _peers() -> list[Report]:
    return _reports("cpu-peers-*.json")


def _reports(pattern: str) -> list[Report]:
    """Those of bench/results/, by their ops."""
    reports = [read_result(path.stem) for path in sorted(RESULTS.glob(pattern))]
    return sorted(reports, key=lambda report: list(OPS).index(report["rows"][0]["op"]))


def _loss_gain(report: Report, theirs: str, ours: str) -> tuple[str, str]:
    before, after = (by_implementation(report)[name] for name in (theirs, ours))
    ratio = before["forward_backward_units"] / after["forward_backward_units"]
    return f"{ratio:.2f}, the loss", _change({"theirs": before["peak_extra_mb"], "fastkl": after["peak_extra_mb"]})


def _step_gain(result: dict[str, Any]) -> tuple[str, str]:
    seconds = result["seconds"]
    return f"{seconds['theirs'] / seconds['fastkl']:.2f}, a step", _change(result["extra_mb"])


def _change(memory: dict[str, float]) -> str:
    return f"{memory['theirs']:,.0f} → {memory['fastkl']:,.0f}"


def _cell(row: dict[str, Any] | None, text: str) -> str:
    return "–" if row is None else text.format(**row)


TABLES = {"in-your-code": in_your_code, "under-trainers": under_trainers, "peers": peers, "accuracy": accuracy}
