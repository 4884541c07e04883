"""The cluster recipe: page, scripts and files agree with one another, and the scripts run with stand-ins."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from launches import REPOSITORY
from tiny_data import read_jsonl

from fastkl.trainer.commands.command_line import parse

RECIPE = REPOSITORY / "recipes" / "cluster"
CONFIG = "recipes/reasoning/gpu/qwen3-8b-full.yaml"
PAGE = REPOSITORY / "docs" / "cluster" / "cluster.md"
SCRIPTS = ("one_node.sh", "nodes.sbatch")
GPUS = 8
PATIENCE = 60  # seconds until servers that were told to end have done so


def script(name: str) -> str:
    """Its text, with continued lines joined."""
    return (RECIPE / name).read_text(encoding="utf-8").replace("\\\n", " ")


def defaults(name: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+)=\$\{\w+:-([^}]*)\}", script(name)))


def serving(name: str) -> dict[str, str]:
    """The lines that start servers, by the name that they serve."""
    lines = [line for line in script(name).splitlines() if "vllm serve" in line]
    return {option(line, "served-model-name"): line for line in lines}


def option(line: str, name: str, default: str = "") -> str:
    found = re.search(rf"--{name}[ =](\S+)", line)
    return found[1].strip("\"'") if found else default


def settings() -> Any:
    return parse(["distill", str(REPOSITORY / CONFIG)])[1]


def accelerate(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((REPOSITORY / "recipes" / "accelerate" / name).read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_bash(name: str) -> None:
    done = subprocess.run(["bash", "-n", RECIPE / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_servers_are_those_that_the_run_asks(name: str) -> None:
    config, values, lines = settings(), defaults(name), serving(name)
    sampling = config.sampling
    assert set(lines) == {config.teacher.server.model, sampling.server.model}
    assert int(values["TEACHER_PORT"]) == urlsplit(config.teacher.server.url).port
    assert int(values["SAMPLING_PORT"]) == urlsplit(sampling.server.url).port
    assert int(values["CONTEXT"]) > config.data.max_prompt_tokens + sampling.max_new_tokens
    assert values["STUDENT"] == config.student.path
    assert values["TEACHER"] == config.teacher.tokenizer
    assert int(option(lines[sampling.server.model], "max-num-seqs")) == sampling.server.concurrency
    for word in ("VLLM_SERVER_DEV_MODE=1", "--logprobs-mode processed_logprobs", "--generation-config vllm"):
        assert word in lines[sampling.server.model]
    assert config.batch.max_tokens >= config.data.max_prompt_tokens + sampling.max_new_tokens


def test_every_gpu_of_the_node_has_one_part() -> None:
    text, file = script("one_node.sh"), accelerate("one_node.yaml")
    parts = {line: devices.split(",") for devices, line in re.findall(r"^CUDA_VISIBLE_DEVICES=(\S+) (.*)$", text, re.M)}
    used = [int(device) for devices in parts.values() for device in devices]
    assert sorted(used) == list(range(GPUS))
    for line, devices in parts.items():
        if "vllm serve" in line:
            assert int(option(line, "tensor-parallel-size")) == len(devices)
        else:
            assert file["num_processes"] == len(devices) == int(defaults("one_node.sh")["PROCESSES"])


def test_every_gpu_of_the_nodes_has_one_part() -> None:
    text, file = script("nodes.sbatch"), accelerate("nodes.yaml")
    for line in serving("nodes.sbatch").values():
        assert int(option(line, "tensor-parallel-size")) * int(option(line, "data-parallel-size", "1")) == GPUS
    trainer = next(line for line in text.splitlines() if "accelerate launch" in line)
    machines = int(option(trainer, "num_machines"))
    assert machines == file["num_machines"] == int(option(trainer, "nodes")) == int(option(trainer, "ntasks"))
    assert file["num_processes"] == machines * GPUS == int(defaults("nodes.sbatch")["PROCESSES"])
    job = next(line for line in text.splitlines() if line.startswith("#SBATCH"))
    assert int(option(job, "nodes")) == machines + len(serving("nodes.sbatch"))
    assert int(option(job, "gpus-per-node")) == GPUS


@pytest.mark.parametrize("name", ["one_node", "nodes"])
def test_files_of_accelerate_are_those_of_fsdp_2(name: str) -> None:
    general = yaml.safe_load((REPOSITORY / "recipes/accelerate/fsdp2.yaml").read_text(encoding="utf-8"))
    own = accelerate(f"{name}.yaml")
    assert own["distributed_type"] == "FSDP"
    assert own["fsdp_config"] == general["fsdp_config"]
    for key in ("num_machines", "num_processes"):
        assert own.pop(key) >= general.pop(key)
    assert own == general


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_the_trainer_is_given_are_settings(name: str) -> None:
    command = script(name).partition(f"distill {CONFIG}")[2]
    words = re.findall(r"--[a-z_]+\.[a-z_.]+", command)
    assert len(words) == 3
    given = [word for port, setting in enumerate(words, start=1) for word in (setting, f"http://127.0.0.1:{port}/v1")]
    parse(["distill", str(REPOSITORY / CONFIG), *given])


def test_the_page_quotes_the_scripts() -> None:
    texts = [(RECIPE / name).read_text(encoding="utf-8").splitlines() for name in SCRIPTS]
    known = {line.strip() for lines in texts for line in lines}
    code = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    quoted = [line.strip() for block in code for line in block.splitlines()]
    assert len(quoted) > 10
    assert [line for line in quoted if not any(line in own for own in known)] == []


def test_the_page_has_the_runs_numbers() -> None:
    page, one = PAGE.read_text(encoding="utf-8"), accelerate("one_node.yaml")
    for name in SCRIPTS:
        for value in ("CONTEXT", "TEACHER_PORT", "SAMPLING_PORT"):
            assert defaults(name)[value] in page
    assert f"the trainer, {one['num_processes']} processes, FSDP 2" in page
    assert f"`{one['num_processes']} processes, FSDP 2`" in page
    assert str(settings().run) in page


def all_ended(folder: Path) -> bool:
    """Whether no process names the folder any more, soon."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        lines = []
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):  # it has ended meanwhile
                lines.append(file.read_bytes())
        if not any(str(folder).encode() in line for line in lines):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_run_with_stand_ins(name: str, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("rehearse", RECIPE / "rehearse.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    done = module.rehearse(name, tmp_path)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert said.index("the teacher server is ready") < said.index("the sampling server is ready") < said.index("FSDP 2")
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2]  # 0: an evaluation
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()
    assert all_ended(tmp_path)
