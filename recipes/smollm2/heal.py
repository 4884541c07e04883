"""Prune and heal: how likely held-out solutions are to the whole model, to it less six layers, and to that one healed.

    python recipes/smollm2/make.py && python recipes/smollm2/heal.py

Runs `fastkl distill` (resumed, or left as it is, if it was run before), `fastkl score` on the three models, and writes
runs/smollm2/heal.json.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE, FOLDER = Path(__file__).parent, Path("runs/smollm2")
MODELS = {"teacher": "teacher", "pruned": "student", "healed": "distill/student"}


def main() -> None:
    fastkl("distill", HERE / "distill.yaml")
    completions = [row["completion"] for row in _rows(FOLDER / "heldout.jsonl")]
    results = {}
    for name, model in MODELS.items():
        output = FOLDER / f"score-{name}.jsonl"
        if not output.exists():
            fastkl("score", HERE / "score.yaml", "--model.path", str(FOLDER / model), "--output", str(output))
        results[name] = likelihood(_rows(output), completions)
    kl = [row["teacher_kl"] for row in _rows(FOLDER / "distill" / "metrics.jsonl") if "teacher_kl" in row]
    summary = {"solutions": results, "teacher_kl": {"first_step": kl[0], "last_step": kl[-1], "steps": len(kl)}}
    (FOLDER / "heal.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=2))


def likelihood(scores: Sequence[dict[str, Any]], completions: Sequence[str]) -> dict[str, float]:
    """Perplexity per token and bits per byte of the completions, each with its end of sequence."""
    nats = -sum(row["sum"] for row in scores)
    size = sum(len(text.encode()) for text in completions)
    return {"perplexity": math.exp(nats_per_token(scores)), "bits_per_byte": nats / math.log(2) / size}


def nats_per_token(scores: Sequence[dict[str, Any]]) -> float:
    """Of the rows that `fastkl score` writes."""
    return -sum(row["sum"] for row in scores) / sum(sum(row["loss_mask"]) for row in scores)


def fastkl(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "fastkl.cli", *map(str, arguments)], check=True)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
