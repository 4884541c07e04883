"""The demo: a careless student learns from a careful teacher, on the CPU, in a few minutes. `make demo` runs it.

1. Two tiny Llamas learn to add by `fastkl sft`: the teacher from right solutions, the student from careless ones, in which
   every running total is one too high half of the time. Both at once, one core each.
2. `fastkl distill`: the student solves problems its own way, the teacher says how likely each of its tokens was, and the
   student takes a policy-gradient step on the reverse KL. No answer is ever shown to it.
3. Both are graded on held-out problems, from the text they generate.

Everything is kept in runs/demo: a second run shows the result, an interrupted one goes on where it was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
RUN = Path("runs/demo")
SUMMARY = RUN / "summary.json"
# Models this small leave nothing for a second thread to do; the two stages of step 1 take a core each.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def main() -> None:
    if not SUMMARY.is_file():
        start = time.perf_counter()
        prepare()
        print("1/2  supervised stage: a teacher from right solutions, a student from careless ones", flush=True)
        train_both("teacher", "student")
        print("2/2  on-policy distillation: the student samples, the teacher scores", flush=True)
        wait(fastkl("distill", "distill"))
        summarise(time.perf_counter() - start)
    show(json.loads(SUMMARY.read_text()))


def prepare() -> None:
    """Data and untrained models, once."""
    done = RUN / "data" / "done"
    if done.exists():
        return
    from arithmetic import write_data, write_model

    write_data(RUN / "data")
    write_model(RUN / "data" / "teacher", layers=3)
    write_model(RUN / "data" / "student", layers=2)
    done.touch()


def train_both(*names: str) -> None:
    logs = [(RUN / f"{name}.log").open("w") for name in names]
    processes = [fastkl("sft", name, log.fileno()) for name, log in zip(names, logs, strict=True)]
    for name, process, log in zip(names, processes, logs, strict=True):
        wait(process, f"; see {RUN / name}.log")
        log.close()


def fastkl(command: str, recipe: str, output: int | None = None) -> subprocess.Popen[bytes]:
    config = str(HERE / f"{recipe}.yaml")
    return subprocess.Popen([sys.executable, "-m", "fastkl.cli", command, config], env=ENVIRONMENT, stderr=output)


def wait(process: subprocess.Popen[bytes], hint: str = "") -> None:
    if process.wait() != 0:
        sys.exit(f"{' '.join(map(str, process.args[2:]))} failed with status {process.returncode}{hint}")


def summarise(seconds: float) -> None:
    """summary.json and the plot, from the metrics of the three runs."""
    from fastkl.trainer.runs.files import read_jsonl, write_text
    from fastkl.trainer.runs.report.plot import plot_run

    distill = read_jsonl(RUN / "distill" / "metrics.jsonl")
    accuracies = [row["eval/accuracy"] for row in distill if "eval/accuracy" in row]
    kls = [row["teacher_kl"] for row in distill if "teacher_kl" in row]
    teacher = read_jsonl(RUN / "teacher" / "metrics.jsonl")[-1]["eval/accuracy"]
    summary = {
        "teacher_accuracy": teacher,
        "student_accuracy_before": accuracies[0],
        "student_accuracy_after": accuracies[-1],
        "teacher_kl_first": kls[0],
        "teacher_kl_last": kls[-1],
        "held_out_problems": len(read_jsonl(RUN / "data" / "heldout.jsonl")),
        "seconds": round(seconds, 1),
    }
    levels = {"teacher": teacher, "student before": accuracies[0]}
    plot_run(distill, RUN / "curves.png", title="On-policy distillation: sums of three digits", lines=levels)
    write_text(SUMMARY, json.dumps(summary, indent=2) + "\n")


def show(summary: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("model")
    table.add_column(f"accuracy on {summary['held_out_problems']} held-out problems", justify="right")
    table.add_column("teacher_kl (nats per token)", justify="right")
    table.add_row("teacher", f"{summary['teacher_accuracy']:.1%}", "")
    before, after = summary["student_accuracy_before"], summary["student_accuracy_after"]
    table.add_row("student before", f"{before:.1%}", f"{summary['teacher_kl_first']:.3f}")
    table.add_row("student after", f"{after:.1%}", f"{summary['teacher_kl_last']:.3f}")
    console = Console()
    console.print(table)
    console.print(
        f"{summary['seconds']:.0f} s; curves in {RUN / 'curves.png'}, the student in {RUN / 'distill/student'}"
    )


if __name__ == "__main__":
    main()
