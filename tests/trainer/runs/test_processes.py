"""Several processes: the losses, weights and files of one, whoever shards the model and whoever wrote the checkpoint."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from composites import composite
from context_cases import GRADED, SAMPLES, SIBLING
from launches import REPOSITORY, free_port, give_samples, together
from run_cases import PEERS, check_equal, check_same, log
from run_settings import arguments, distillation, evaluated
from tiny_data import pair_and_sums
from tiny_models import save_model, tokenizer

from fastkl.trainer.commands import command_line as commands
from fastkl.trainer.distill import OnPolicy
from fastkl.trainer.errors import ServerError
from fastkl.trainer.rollouts.rollout import Rollouts
from fastkl.trainer.rollouts.samplers.generate import GenerateSampler
from fastkl.trainer.runs.folder import RunFolder
from fastkl.trainer.teachers.local import LocalTeacher

GIVEN = dict.fromkeys((0, 1), give_samples)
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = pair_and_sums(tmp_path_factory.mktemp("models"), layers=2)
    save_model(path / "untied", tie_word_embeddings=False)
    return path


def settings(deep: Path, run: Path, **overrides: object) -> list[str]:
    options: dict[str, object] = {
        "batch__max_tokens": 40,
        "optim__steps": 3,
        "optim__substeps": 2,
        "sampling__prompts_per_step": 7,
        **evaluated(deep, eval__every=1),
        **overrides,
    }
    student = deep / str(options.pop("student", "student"))
    return arguments("distill", distillation(run, deep, **options) | {"student.path": student})


def run(command_line: list[str], errors: Path, count: int, fsdp: bool = False) -> Path:
    """With given samples, so that they are the same for any number of processes."""
    codes, said = together(
        command_line, errors, count=count, fsdp=fsdp, before=dict.fromkeys(range(count), give_samples)
    )
    assert codes == [0] * count, "\n".join(said)
    assert count == 1 or f"{count} processes, {'FSDP 2' if fsdp else 'DDP'}" in said[0]
    return Path(next(word.removeprefix("--run=") for word in command_line if word.startswith("--run=")))


LORA: dict[str, object] = {"student__lora__rank": 2}
BASE: dict[str, object] = {**LORA, "teacher__path": "", "teacher__self": "base"}
REWARD: dict[str, object] = {"reward__grader": "regex:[0-4]$", "reward__baseline": "none", "teacher__path": ""}
LIVE: dict[str, object] = {**REWARD, "teacher__self": "live"}
EMA: dict[str, object] = {**REWARD, "teacher__self": "ema", "teacher__ema_rate": 0.3}
TOLD: dict[str, object] = {"teacher__path": "", "teacher__self": "live", "teacher__context__system": "in words"}
SYNCED: dict[str, object] = {**REWARD, "teacher__self": "synced", "teacher__sync_every": 2}
VARIANTS: dict[str, dict[str, object]] = {
    "full": {},
    "lora": {"student__lora__rank": 2, "loss__old_logprobs": "recompute"},
    "untied": {"student": "untied", "loss__old_logprobs": "recompute", "student__gradient_checkpointing": "true"},
    "packed": {"batch__layout": "packed", "loss__method": "ppo", "optim__substeps": 3},
    "rounded": {"sampling__dtype": "bfloat16"},
    "context": {"teacher__context__system": "in words", "loss__objective": "top_k"},
    "context-whole": {"teacher__context__system": "in words", "loss__objective": "reverse_kl"},
    "context-samples": SAMPLES | {"reward__grader": "regex:[0-9]", "sampling__samples_per_prompt": 2},
    "siblings": SIBLING | GRADED | {"reward__coef": 0},
    "base": BASE | {"loss__objective": "policy_gradient"},
    "base-whole": BASE | {"loss__objective": "reverse_kl"},
    "live": LIVE,
    "ema": EMA | {"student": "untied"},
    "ema-lora": EMA | LORA,
    "synced": SYNCED,
    "told": TOLD,
    "told-whole": TOLD | {"loss__objective": "reverse_kl"},
    "told-whole-lora": TOLD | LORA | {"loss__objective": "reverse_kl"},
    "tamed": {
        "loss__baseline": "mean",
        "loss__advantage_clip": 2,
        "loss__ratio": "sequence",
        "loss__ratio_bounds": [0.5, 2],
    },
    "extrapolated": BASE | {"loss__baseline": "kl", "loss__extrapolate": 1.5, "reference__self": "base"},
    "continuous": {"sampling__engine": "continuous_batching"},
    "weights": {"loss__weights": ["top_gap:0.4", "drift:0.5"]},
    "weights-whole": {"loss__weights": ["top_gap:0.4", "skip_first:1"], "loss__objective": "reverse_kl"},
    "unsure": {"loss__forward_kl_above": 1.4, "loss__forward_kl_top_k": 4, "student": "untied"},
    "unsure-whole": {"loss__forward_kl_above": 3.0, "loss__objective": "reverse_kl", "student__lora__rank": 2},
    "shuffled": {"loss__control": "shuffled"},
    "shuffled-lists": {"loss__control": "shuffled", "loss__objective": "top_k"},
    "no-teacher": {"loss__control": "no_teacher", "loss__old_logprobs": "recompute"},
    "given": {"sampling__on_policy_fraction": 0.5, "sampling__given_coef": 0.3, "loss__weights": ["top_gap:0.4"]},
    "partial": {"sampling__tokens_per_step": 3},
    "grouped": GRADED | {"reward__baseline": "group", "reward__normalize": "true"},
    "filtered": {"sampling__min_completion_tokens": 3, "sampling__drop_truncated": "true"},
    "tail": {"loss__objective": "top_k", "loss__top_k": 2, "loss__top_k_tail": "sampled"},
    "tip": {"loss__weights": ["tip:0.5"], "loss__old_logprobs": "recompute"},
}

QUICK = (("full", "ddp"), ("full", "fsdp"), ("context-samples", "ddp"))


@pytest.mark.parametrize(
    ("variant", "fsdp"),
    [
        pytest.param(variant, fsdp, id=f"{variant}-{name}", marks=() if (variant, name) in QUICK else slow)
        for variant in VARIANTS
        for name, fsdp in PEERS.items()
    ],
)
def test_two_processes_do_what_one_does(tmp_path: Path, deep: Path, variant: str, fsdp: bool) -> None:
    options = VARIANTS[variant]
    one = run(settings(deep, tmp_path / "one", **options), tmp_path / "said", 1)
    two = run(settings(deep, tmp_path / "two", **options), tmp_path / "said", 2, fsdp)
    assert len(log(one)) == 4
    check_same(two, one)


@slow
@pytest.mark.parametrize(
    "variant", ["full", "siblings", "shuffled", "given", "partial", "grouped", "filtered", "tail", "tip"]
)
def test_four_processes_do_what_one_does(tmp_path: Path, deep: Path, variant: str) -> None:
    """Some have no sample in an optimizer step."""
    one = run(settings(deep, tmp_path / "one", **VARIANTS[variant]), tmp_path / "said", 1)
    check_same(run(settings(deep, tmp_path / "four", **VARIANTS[variant]), tmp_path / "said", 4), one)


@slow
@pytest.mark.parametrize("rank", [0, 2], ids=["full", "lora"])
@pytest.mark.parametrize("fsdp", PEERS.values(), ids=PEERS)
def test_whole_distributions_of_an_average(tmp_path: Path, deep: Path, fsdp: bool, rank: int) -> None:
    """It moves within an update, while it is gathered; another teacher gives the student something to learn."""
    data = {"path": str(deep / "sums.jsonl")}
    teachers = {"own": {"self": "ema", "ema_rate": 0.3}, "other": {"path": str(deep / "teacher")}}
    mixture = {name: {"data": data, "teacher": teacher} for name, teacher in teachers.items()}
    options: dict[str, object] = {"mixture": json.dumps(mixture), "data__path": "null", "teacher__path": ""}
    options |= {"loss__objective": "reverse_kl", "student__lora__rank": rank}
    one = run(settings(deep, tmp_path / "one", **options), tmp_path / "said", 1)
    check_same(run(settings(deep, tmp_path / "two", **options), tmp_path / "said", 2, fsdp), one)


@slow
@pytest.mark.parametrize("rank", [0, 2], ids=["full", "lora"])
@pytest.mark.parametrize("fsdp", PEERS.values(), ids=PEERS)
@pytest.mark.parametrize("kind", ["gemma3", "qwen3_vl"])
def test_a_composite_student(tmp_path: Path, deep: Path, kind: str, fsdp: bool, rank: int) -> None:
    """DDP waits for no gradient of what text does not reach."""
    words = tokenizer()
    model = composite(kind, vocab_size=len(words), initializer_range=0.3)
    model.generation_config.eos_token_id = words.eos_token_id
    model.save_pretrained(tmp_path / "student")
    words.save_pretrained(tmp_path / "student")
    options = {"student": tmp_path / "student", "student__lora__rank": rank}
    one = run(settings(deep, tmp_path / "one", **options), tmp_path / "said", 1)
    check_same(run(settings(deep, tmp_path / "two", **options), tmp_path / "said", 2, fsdp), one)


@slow
@pytest.mark.parametrize("fsdp", PEERS.values(), ids=PEERS)
def test_a_cache_knows_the_base_of_a_sharded_student(tmp_path: Path, deep: Path, fsdp: bool) -> None:
    """What one process has kept spares two of them the teacher, in every step."""
    options = BASE | {"loss__objective": "policy_gradient", "teacher__cache": str(tmp_path / "cache")}
    one = run(settings(deep, tmp_path / "one", **options), tmp_path / "said", 1)
    two = run(settings(deep, tmp_path / "two", **options), tmp_path / "said", 2, fsdp)
    for ours, theirs in zip(log(two)[1:], log(one)[1:], strict=True):
        assert (ours["teacher_cache/hits"], ours["teacher_cache/misses"]) == (7, 0)
        assert ours["teacher_kl"] == pytest.approx(theirs["teacher_kl"], abs=1e-5)
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


RESHAPES = {
    "fsdp-2-to-1": ((2, True), (1, False)),
    "ddp-2-to-1": ((2, False), (1, False)),
    "1-to-ddp-2": ((1, False), (2, False)),
    "1-to-fsdp-2": ((1, False), (2, True)),
    "ddp-2-to-fsdp-2": ((2, False), (2, True)),
    "fsdp-2-to-2": ((2, True), (2, True)),
}
FAST = ("fsdp-2-to-1", 0)


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        pytest.param(name, lora, id=f"{name}{'-lora' * (lora > 0)}", marks=() if (name, lora) == FAST else slow)
        for name in RESHAPES
        for lora in (0, 2)
    ],
)
def test_a_checkpoint_knows_nothing_of_processes(tmp_path: Path, deep: Path, name: str, lora: int) -> None:
    """Saved by some and resumed by others, the run is the one that was never interrupted; its teacher's weights too."""
    (before, first), (after, then) = RESHAPES[name]
    options: dict[str, object] = {"student__lora__rank": lora, "optim__steps": 4, "checkpoint__every": 2, **EMA}
    whole = run(settings(deep, tmp_path / "whole", **options), tmp_path / "said", 1)
    command_line = settings(deep, tmp_path / "run", **options)
    codes, _ = together(
        command_line, tmp_path / "said", count=before, fsdp=first, before=dict.fromkeys(range(before), stop_at_step_3)
    )
    assert codes == [130] * before
    check_same(run(command_line, tmp_path / "said", after, then), whole)


def stop_at_step_3() -> None:
    give_samples()
    stop_real_at_step_3()


def fails(deep: Path, run: Path, hooks: dict[int, Callable[[], None]], **options: object) -> tuple[list[Any], str]:
    """A run of two processes that ends badly: their exit statuses, and all that was said."""
    codes, said = together(settings(deep, run, **options), run.parent / "said", before=hooks)
    assert all(codes)
    return codes, "".join(said)


@pytest.mark.parametrize("kind", ["lock", pytest.param("config", marks=slow), pytest.param("check", marks=slow)])
def test_what_a_user_can_mend_is_said_once(tmp_path: Path, deep: Path, kind: str) -> None:
    path = tmp_path / "run"
    if kind == "lock":
        with RunFolder(commands.parse(settings(deep, path))[1]):
            codes, said = fails(deep, path, {})
        expected = f"fastkl: another process is writing to {path}"
    elif kind == "config":
        codes, said = fails(deep, path, {1: other_learning_rate})
        expected = "fastkl: the 2 processes were started with different configs"
    else:
        codes, said = fails(deep, path, {}, sampling__prompts_per_step=1, optim__substeps=1)
        expected = "fastkl: a step has 1 samples for 2 processes"
    assert codes == [2, 2]
    assert said.count("fastkl: ") == said.count(expected) == 1
    assert "Traceback" not in said


def other_learning_rate() -> None:
    parse = commands.parse
    commands.parse = lambda argv: parse([*argv, "--optim.lr=0.5"])


@slow
def test_a_teacher_that_one_process_cannot_reach_ends_both_with_a_checkpoint(tmp_path: Path, deep: Path) -> None:
    codes, said = fails(deep, tmp_path / "run", {0: give_samples, 1: lose_the_teacher})
    assert codes == [2, 2]
    assert said.count("fastkl: gone") == 1
    assert "Traceback" not in said
    assert [entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]


def lose_the_teacher() -> None:
    give_samples()
    calls = itertools.count()

    def score(self: Any, samples: Any, score: Any = LocalTeacher.score) -> None:
        if next(calls) == 2:
            raise ServerError("gone")
        score(self, samples)

    LocalTeacher.score = score  # type: ignore[method-assign]


@slow
@pytest.mark.parametrize("way", ["interrupted", "killed", "crashed"])
def test_one_process_that_ends_ends_the_other(tmp_path: Path, deep: Path, way: str) -> None:
    """Ctrl-C reaches both, one of them while it waits for the other; a crash or a kill only one."""
    hooks = {rank: functools.partial(end_in_step_2, way, rank) for rank in (0, 1)}
    codes, said = fails(deep, tmp_path / "run", hooks, checkpoint__every=1)
    if way == "interrupted":
        assert codes[1] == 130
        assert said.count("fastkl: interrupted") == 1
    elif way == "crashed":
        assert said.count("Traceback") == said.count("ValueError: broken") == 1
    else:
        assert codes[1] == -signal.SIGKILL
    codes, said_now = together(settings(deep, tmp_path / "run", checkpoint__every=1), tmp_path / "said", before=GIVEN)
    assert codes == [0, 0]
    assert "resumed" in said_now[0]


def end_in_step_2(way: str, rank: int) -> None:
    give_samples()
    samples, write = OnPolicy.samples, Rollouts._write

    def ends(self: OnPolicy, step: int, *args: Any) -> Any:
        if step == 2 and way == "interrupted":
            threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
        if step == 2 and rank == 1 and way == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return samples(self, step, *args)

    def broken(self: Rollouts, starts: Any, step: int) -> Any:
        if step == 2 and rank == 1 and way == "crashed":
            raise ValueError("broken")
        if step == 2 and rank == 1 and way == "interrupted":
            time.sleep(20)
        return write(self, starts, step)

    OnPolicy.samples, Rollouts._write = ends, broken  # type: ignore[method-assign]


@pytest.mark.parametrize("fsdp", [False, pytest.param(True, marks=slow)], ids=PEERS)
def test_gaps_in_one_process(tmp_path: Path, deep: Path, fsdp: bool) -> None:
    """Empty completions, batches of nothing else, and a gradient that is not finite: two processes decide as one."""
    hooks = dict.fromkeys((0, 1), with_gaps)
    for count in (1, 2):
        command_line = settings(deep, tmp_path / str(count), batch__max_tokens=1, optim__steps=4)
        codes, said = together(command_line, tmp_path / "said", count=count, fsdp=fsdp and count > 1, before=hooks)
        assert codes == [0] * count, said
    rows = log(tmp_path / "1")
    assert [row.get("optim/skipped") for row in rows] == [None, 0, 0, 1, 0]
    check_same(tmp_path / "2", tmp_path / "1")


def with_gaps() -> None:
    give_samples()
    sample, samples = GenerateSampler.sample, OnPolicy.samples

    def gaps(self: Any, prompts: list[list[int]], **options: Any) -> Any:
        found = sample(self, prompts, **options)
        return [
            c._replace(token_ids=[], logprobs=[], truncated=False) if sum(p) % 3 == 0 else c
            for p, c in zip(prompts, found, strict=True)
        ]

    def infinite(self: OnPolicy, step: int, *args: Any) -> Any:
        found, metrics = samples(self, step, *args)
        for sample in found if step == 2 else ():
            if sample.place % 2 == 0:  # the first optimizer step's
                sample.advantages = [math.inf if counted else 0.0 for counted in sample.loss_mask]
        return found, metrics

    GenerateSampler.sample = gaps  # type: ignore[method-assign]
    OnPolicy.samples = infinite  # type: ignore[method-assign]


@slow
def test_resume_is_exact(tmp_path: Path, deep: Path) -> None:
    """With real samples, and dropout of each process's own."""
    save_model(tmp_path / "dropout", attention_dropout=0.2)
    options: dict[str, object] = {"student": tmp_path / "dropout", "optim__steps": 4, "checkpoint__every": 2}
    options["student__dropout"] = "keep"
    for name, hooks in (("whole", {}), ("run", dict.fromkeys((0, 1), stop_real_at_step_3)), ("run", {})):
        codes, said = together(settings(deep, tmp_path / name, **options), tmp_path / "said", before=hooks)
        assert codes == ([130, 130] if hooks else [0, 0]), said
    check_equal(tmp_path / "run", tmp_path / "whole")


def stop_real_at_step_3() -> None:
    samples = OnPolicy.samples

    def interrupted(self: OnPolicy, step: int, *args: Any) -> Any:
        if step == 3:
            raise KeyboardInterrupt
        return samples(self, step, *args)

    OnPolicy.samples = interrupted  # type: ignore[method-assign]


@slow
@pytest.mark.parametrize("machines", [1, 2])
@pytest.mark.parametrize(("way", "name"), [("ddp", "DDP"), ("fsdp2", "FSDP 2")])
def test_accelerate_launch(tmp_path: Path, deep: Path, way: str, name: str, machines: int) -> None:
    """As a user starts it; two machines are two launchers with a process each."""
    recipe = REPOSITORY / "recipes" / "accelerate" / f"{way}.yaml"
    common = [f"--config_file={recipe}", "--num_processes=2", f"--main_process_port={free_port()}"]
    launches = [
        [
            *(sys.executable, "-m", "accelerate.commands.launch", *common, f"--num_machines={machines}"),
            *([f"--machine_rank={rank}", "--main_process_ip=127.0.0.1"] if machines > 1 else []),
            *("-m", "fastkl.cli", *settings(deep, tmp_path / "run")),
        ]
        for rank in range(machines)
    ]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    running = [
        subprocess.Popen(launch, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, env=offline) for launch in launches
    ]
    said = [process.communicate(timeout=240)[1] for process in running]
    assert [process.returncode for process in running] == [0] * machines, "\n".join(said)
    assert "".join(said).count("step 3/3") == "".join(said).count(f"2 processes, {name}") == 1
    assert [row["step"] for row in log(tmp_path / "run")] == [0, 1, 2, 3]


# Large blocks between small ones that stay, after a freed block has raised glibc's limit to 16 MiB.
HOLES = """
import ctypes, sys
from pathlib import Path
from fastkl.trainer.runs.processes import give_back_large_blocks

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def block(size):
    start = allocate(size)
    ctypes.memset(start, 1, size)
    return start

libc = ctypes.CDLL(None)
allocate, free = libc.malloc, libc.free
allocate.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
free(block(16 << 20))
if sys.argv[1] == "given back":
    give_back_large_blocks()
large = []
for _ in range(50):
    large.append(block(2 << 20))
    block(64 << 10)
before = resident()
for start in large:
    free(start)
print((before - resident()) >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux" or os.confstr("CS_GNU_LIBC_VERSION") is None, reason="of glibc")
@pytest.mark.parametrize(
    ("call", "limit", "freed"),
    [("given back", None, True), ("kept", None, False), ("given back", str(32 << 20), False)],
)
def test_what_is_freed_between_blocks_that_stay_is_given_back(call: str, limit: str | None, freed: bool) -> None:
    """Of 100 MiB; what the environment says of the limit stays."""
    environment = {name: value for name, value in os.environ.items() if name != "MALLOC_MMAP_THRESHOLD_"}
    if limit is not None:
        environment["MALLOC_MMAP_THRESHOLD_"] = limit
    line = [sys.executable, "-c", HOLES, call]
    ran = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    assert (int(ran.stdout) > 90) == freed
