"""Rehearses one_node.sh and nodes.sbatch on a CPU: their own lines, with tiny models and a stand-in for each GPU's part.

    python recipes/cluster/rehearse.py [one_node.sh | nodes.sbatch] [FOLDER]

The servers are the tests' stub, the trainer is two processes. It shows that the parts find one another, in this order
and with these options. It says nothing of vLLM, of Slurm, or of a GPU.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("one_node.sh", "nodes.sbatch")
CONTEXT = 64
SETTINGS = {
    "mixed_precision": "no",
    "student.gradient_checkpointing": "false",
    "data.max_prompt_tokens": 32,
    "data.chat_template": "false",
    "sampling.prompts_per_step": 4,
    "sampling.samples_per_prompt": 1,
    "sampling.max_new_tokens": 6,
    "optim.steps": 2,
    "optim.warmup_steps": 1,
    "batch.max_tokens": 256,
    "eval.max_new_tokens": 6,
    "eval.every": 0,
}


def rehearse(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a script with models and data of the folder's own, which it makes; what the script says comes back."""
    models(folder)
    programs(folder / "bin")
    own = {"student.path": "student", "teacher.tokenizer": "teacher", "run": "run"}
    own |= {"data.path": "sums.jsonl", "eval.data.path": "sums.jsonl"}
    settings = SETTINGS | {name: folder / value for name, value in own.items()}
    ports = dict(zip(("TEACHER_PORT", "SAMPLING_PORT", "MAIN_PORT"), map(str, free_ports(3)), strict=True))
    environment = {
        **os.environ,
        **ports,
        "PATH": f"{folder / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "STUDENT": str(folder / "student"),
        "TEACHER": str(folder / "teacher"),
        "LOGS": str(folder / "logs"),
        "WEIGHTS": str(folder / "weights"),
        "CONTEXT": str(CONTEXT),
        "PROCESSES": "2",
        "SLURM_JOB_NODELIST": "here",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = [str(ROOT / "recipes" / "cluster" / script), *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def models(folder: Path) -> None:
    """Student, teacher and prompts, tiny ones of the tests."""
    sys.path[:0] = [str(ROOT / "tests" / "support" / room) for room in ("models", "runs")]
    from tiny_data import sums, write_jsonl
    from tiny_models import save_model

    size = {"layers": 2, "max_position_embeddings": CONTEXT}
    save_model(folder / "student", **size)
    save_model(folder / "teacher", seed=1, **size)
    write_jsonl(folder / "sums.jsonl", sums())


def programs(folder: Path) -> None:
    """Commands that the scripts call, each a stand-in."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("vllm", "srun", "scontrol"):
        file = folder / name
        stand_in = ROOT / "recipes" / "cluster" / "stand_in.py"
        file.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{stand_in}" {name} "$@"\n', encoding="utf-8")
        file.chmod(0o755)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def main(names: list[str]) -> int:
    scripts = [name for name in names if name in SCRIPTS] or list(SCRIPTS)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(next((name for name in names if name not in SCRIPTS), made)).resolve()
        for script in scripts:
            done = rehearse(script, folder / script.partition(".")[0])
            print(f"{script}\n{done.stdout}{done.stderr}", flush=True)
            if done.returncode:
                return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
