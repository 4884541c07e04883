"""Rollouts of coming steps: by which weights, in what order, what a checkpoint holds of them, and how they end."""

from __future__ import annotations

import io
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launches import killed, together
from run_cases import check_equal, check_refused, check_same, distilled, fields, log
from run_settings import Settings, arguments, distillation, evaluated
from safetensors import SafetensorError
from server_cases import served
from stub_server import serving
from stub_vllm import StubVllm
from tiny_data import read_jsonl

from fastkl import cli
from fastkl.trainer import loop
from fastkl.trainer.config.loss import LossConfig
from fastkl.trainer.config.sampling import SamplingConfig, SamplingServerConfig
from fastkl.trainer.data.prompts import EncodedPrompt
from fastkl.trainer.data.rows import Prompt
from fastkl.trainer.data.samples import Completion, Sample
from fastkl.trainer.errors import ServerError
from fastkl.trainer.models.saving import save_weights
from fastkl.trainer.objectives.advantages import set_advantages
from fastkl.trainer.objectives.controls import with_scores
from fastkl.trainer.rollouts.ahead import AheadRollouts
from fastkl.trainer.rollouts.samplers import served as samplers_served
from fastkl.trainer.rollouts.samplers.remote import Ended
from fastkl.trainer.rollouts.single_turn import SingleTurn

SERVER = SamplingServerConfig(url="http://127.0.0.1:9/v1", model="m")
TWO = [EncodedPrompt(Prompt("rows:1", "q"), [90 + index], index) for index in range(2)]
slow = pytest.mark.slow


class Versioned:
    """Writes numbers from that of its weights on: 2, 3, 4, 5 by those of version 2. Holds weights as a server's sampler."""

    shared = False

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.version = self.at = 0
        self.held: list[Any] = []
        self.gate = threading.Semaphore(1000)  # calls that are let through
        self.error_at: int | None = None
        self.over = threading.Event()

    def hold(self, weights: Any = None) -> Any:
        state = {"version": self.version}
        self.held.append(weights or SimpleNamespace(version=self.version, state=lambda: state))
        return self.held[-1]

    def restored(self, state: dict[str, Any]) -> Any:
        return self.hold(SimpleNamespace(version=-1 - state["version"], state=lambda: state))

    def release(self, weights: Any) -> None:
        self.held.remove(weights)

    def is_current(self, weights: Any) -> bool:
        return weights.version == self.version

    @contextmanager
    def pinned(self, weights: Any, over: threading.Event) -> Iterator[None]:
        self.at, self.over = weights.version if weights.version >= 0 else -1 - weights.version, over
        yield

    def sample(self, prompts: list[list[int]], arrived: Any = None, **options: Any) -> list[Completion]:
        while not self.gate.acquire(timeout=0.01):
            if self.over.is_set():
                raise Ended
        if self.error_at == self.at:
            raise ServerError(f"gone at {self.at}")
        self.calls.append(options)
        tokens = list(range(self.at, self.at + options["max_new_tokens"]))
        completions = [Completion(tokens, [-1.0 - token / 7 for token in tokens], True) for _ in prompts]
        for place, completion in reversed([*enumerate(completions)] if arrived else []):
            arrived(place, completion)
        return completions


def ahead(steps_ahead: int, sampler: Versioned | None = None, steps: int = 8, **more: Any) -> tuple[Any, Versioned]:
    sampler = sampler or Versioned()
    tell = more.pop("tell", lambda sample: None)
    config = SamplingConfig(max_new_tokens=4, server=SERVER, steps_ahead=steps_ahead, **more)
    parts = (config, SingleTurn(sampler, 100), lambda step: TWO, 5, TWO, [], None)
    return AheadRollouts(*parts, sampler=sampler, steps=steps, tell=tell), sampler


def take(rollouts: Any, sampler: Versioned, step: int) -> list[Sample]:
    """A step, whose update makes other weights."""
    rollouts.ask(step)
    samples: list[Sample] = rollouts.samples(step)
    rollouts.carry_over(samples)
    sampler.version += 1
    return samples


def by(samples: list[Sample]) -> int:
    """The version that wrote all of them."""
    (found,) = {sample.ids[sample.prompt_length] for sample in samples}
    return found


@pytest.mark.parametrize("count", [1, 2, 4])
def test_each_step_is_written_by_the_weights_of_so_many_steps_before(count: int) -> None:
    rollouts, sampler = ahead(count)
    for step in range(8):
        samples = take(rollouts, sampler, step)
        assert by(samples) == max(0, step - count)
        assert [sample.staleness for sample in samples] == [step - by(samples)] * 2
    assert [call["seed"] for call in sampler.calls] == [
        5 * 1_000_003 + step for step in range(8)
    ]  # none beyond the end
    assert sampler.held == []
    rollouts.close()


def test_an_evaluation_waits_for_what_was_asked_for() -> None:
    rollouts, sampler = ahead(2)
    take(rollouts, sampler, 0)
    responder = rollouts.undisturbed(SingleTurn(sampler, 100))
    assert responder.my_share([1]) == [1]
    responder.respond(TWO, max_new_tokens=[1, 1], temperature=0.0, seed=0)
    assert [call["temperature"] for call in sampler.calls] == [1.0] * 3 + [0.0]
    rollouts.close()


def test_an_error_comes_up_at_its_step_and_ends_the_asking() -> None:
    rollouts, sampler = ahead(2)
    sampler.error_at = 1
    for step in range(3):
        take(rollouts, sampler, step)
    rollouts.ask(3)
    for _ in range(2):
        with pytest.raises(ServerError, match="gone at 1"):
            rollouts.samples(3)
    assert len(sampler.calls) == 3
    rollouts.settle(lambda: False)
    rollouts.close()
    assert sampler.held == []


def test_close_ends_the_thread() -> None:
    rollouts, sampler = ahead(1)
    sampler.gate = threading.Semaphore(0)
    rollouts.ask(0)
    assert rollouts._thread.is_alive()
    rollouts.close()
    rollouts._thread.join(10)
    assert not rollouts._thread.is_alive()
    assert sampler.held == []


def kept(rollouts: Any) -> dict[str, Any]:
    """The state as a checkpoint gives it back."""
    file = io.BytesIO()
    torch.save(rollouts.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file)
    return state


@pytest.mark.parametrize("options", [{}, {"tokens_per_step": 3}], ids=["whole", "partial"])
def test_a_checkpoint_holds_all_that_was_asked_for(options: dict[str, Any]) -> None:
    whole, sampler = ahead(2, **options)
    wanted = [take(whole, sampler, step) for step in range(6)]
    whole.close()
    first, sampler = ahead(2, **options)
    found = [take(first, sampler, step) for step in range(3)]
    first.settle(lambda: False)
    state = kept(first)
    first.close()
    assert [(row["step"], row["steps_done"]) for row in state["asked"]] == [(3, 1), (4, 2)]
    assert state["weights"] == {}
    again, other = ahead(2, **options)
    other.version = sampler.version
    again.load_state_dict(state)
    found += [take(again, other, step) for step in range(3, 6)]
    assert [list(map(fields, samples)) for samples in found] == [list(map(fields, samples)) for samples in wanted]
    again.settle(lambda: False)
    again.close()
    assert other.held == []


def test_what_is_not_there_is_written_again_by_the_weights_of_then() -> None:
    first, sampler = ahead(2)
    take(first, sampler, 0)
    first.settle(lambda: False)
    sampler.gate = threading.Semaphore(0)
    take(first, sampler, 1)
    first.ask(2)
    state = kept(first)
    first.close()
    assert [(row["step"], row["trajectories"] is None) for row in state["asked"]] == [(2, False), (3, True)]
    assert list(state["weights"].values()) == [{"version": 1}]

    again, other = ahead(2)
    other.version = 2
    again.load_state_dict(state)
    assert [by(take(again, other, step)) for step in (2, 3, 4)] == [0, 1, 2]
    again.settle(lambda: False)
    again.close()
    assert other.held == []


def test_weights_that_several_steps_wait_for_are_let_go_after_a_checkpoint() -> None:
    first, sampler = ahead(3)
    sampler.gate = threading.Semaphore(1)
    take(first, sampler, 0)
    state = kept(first)
    first.close()
    assert [(row["step"], row["weights"]) for row in state["asked"]] == [(1, 0), (2, 0), (3, 0)]
    assert list(state["weights"]) == [0]
    assert sampler.held == []


@pytest.mark.parametrize("how", ["other-settings", "off-before"])
def test_without_what_a_checkpoint_holds_all_is_asked_for_again(how: str) -> None:
    first, sampler = ahead(2)
    take(first, sampler, 0)
    first.settle(lambda: False)
    state = kept(first) if how == "other-settings" else {"unfinished": []}
    first.close()
    again, other = ahead(2, temperature=0.5)
    other.version = 1
    again.load_state_dict(state)
    assert [by(take(again, other, step)) for step in (1, 2, 3, 4)] == [1, 1, 1, 2]
    again.close()


@pytest.mark.parametrize("control", [None, "shuffled"])
def test_the_kl_is_that_of_the_student_whatever_sampled(control: Any) -> None:
    """The gradient over what older weights sample, with ratios, is that of the student's own reverse KL."""
    logits = [torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in range(3)]
    older, student, teacher = (each.log_softmax(0) for each in logits)
    samples = [Sample([0, token], [False, True], 0, completion_length=1) for token in range(5)]
    for token, sample in enumerate(samples):
        sample.sampler_logprobs = sample.old_logprobs = [0.0, older[token].item()]
        sample.student_logprobs = [0.0, student[token].item()]
        sample.teacher_logprobs = [0.0, teacher[token].item()]
    loss = LossConfig(control=control)
    judged = with_scores(samples, loss)
    set_advantages(judged, loss)
    advantages = torch.tensor([sample.advantages[1] for sample in judged], dtype=torch.float64)
    if control == "shuffled":
        assert sorted(advantages.tolist()) == pytest.approx(sorted((teacher - student).tolist()), abs=1e-6)
        return
    parameter = logits[1].clone().requires_grad_()
    own = parameter.log_softmax(0)
    surrogate = (older.exp() * (own - older).exp() * advantages).sum()
    reverse_kl = (own.exp() * (own - teacher)).sum()
    (found,), (wanted,) = (torch.autograd.grad(each, parameter, retain_graph=True) for each in (surrogate, -reverse_kl))
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def settings(folder: Path, run: Path, stub: StubVllm, count: int, **more: object) -> Settings:
    options = {"optim__steps": 5, "checkpoint__every": 2, "sampling__steps_ahead": count, **more}
    return distillation(run, folder, **options, **served("sampling", stub, concurrency=3))


@pytest.fixture
def stub(folder: Path) -> Iterator[StubVllm]:
    with serving(folder / "student", kind=StubVllm) as server:
        yield server


CASES: dict[str, Settings] = {
    "full": {},
    "lora": {"student__lora__rank": 4},
    "partial": {"sampling__tokens_per_step": 3},
    "tools": {"environment__name": "calculator", "sampling__samples_per_prompt": 2, "reward__grader": "last_number"},
    "given": {"sampling__on_policy_fraction": 0.5},
    "top-k": {"loss__objective": "top_k", "loss__top_k": 2},
}


@pytest.mark.parametrize(
    ("name", "count"),
    [("full", 2), *(pytest.param(name, 1, marks=slow) for name in CASES), pytest.param("lora", 3, marks=slow)],
)
def test_a_run_resumes_exactly_after_its_server_was_gone(
    tmp_path: Path, folder: Path, stub: StubVllm, name: str, count: int
) -> None:
    more = {**evaluated(folder, eval__every=2), **CASES[name]}
    distilled(settings(folder, tmp_path / "whole", stub, count, **more))
    rows = log(tmp_path / "whole")[1:]
    assert [row["staleness/max"] for row in rows] == [min(step, count) for step in range(5)]
    assert [row["staleness/mean"] for row in rows] == [min(step, count) for step in range(5)]
    stale = [row.get("staleness", 0) for row in read_jsonl(tmp_path / "whole" / "samples.jsonl") if not row["given"]]
    assert set(stale) == set(range(count + 1))
    assert rows[0]["sampler_mismatch/mean_abs"] < 1e-5 < rows[count + 1]["sampler_mismatch/mean_abs"]
    asked = sum("return_token_ids" in body for body in stub.bodies)
    assert all(before != after for before, after in itertools.pairwise(stub.loads))  # weights were never missed

    again = settings(folder, tmp_path / "run", stub, count, **more)
    stub.restart()
    stub.bodies.clear()
    stub.down_after = asked * 2 // 3
    assert cli.main(arguments("distill", again)) == 2
    stub.down_after = None
    stub.restart()
    assert cli.main(arguments("distill", again)) == 0
    check_equal(tmp_path / "run", tmp_path / "whole")


def test_weights_that_have_no_room_end_a_run_with_a_checkpoint(
    tmp_path: Path, folder: Path, stub: StubVllm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    distilled(settings(folder, tmp_path / "whole", stub, 1))
    stub.restart()
    calls = itertools.count()

    def full(model: Any, weights: Path) -> None:
        save_weights(model, weights)
        if next(calls) == 2:
            raise SafetensorError("No space left on device")

    again = settings(folder, tmp_path / "run", stub, 1, checkpoint__every=0, sampling__server__weights=tmp_path / "w")
    with monkeypatch.context() as patch:
        patch.setattr(samplers_served, "save_weights", full)
        assert cli.main(arguments("distill", again)) == 2
    assert "weights cannot be written to" in (said := capsys.readouterr().err)
    assert "SafetensorError: No space left on device. Make room" in said
    assert not [name for name in (tmp_path / "w").iterdir() if name.match("*-000003")]
    assert cli.main(arguments("distill", again)) == 0
    check_equal(tmp_path / "run", tmp_path / "whole")


@slow
@pytest.mark.parametrize("seconds", [0.3, 1.2, 2.5])
def test_a_signal_ends_a_run_without_waiting_for_coming_steps(
    tmp_path: Path, folder: Path, stub: StubVllm, seconds: float
) -> None:
    """Wherever it comes; what goes on is the run that nobody stopped."""
    distilled(settings(folder, tmp_path / "whole", stub, 2))
    stub.restart()
    stub.pause = 0.3  # the run is longer than any of these
    again = settings(folder, tmp_path / "run", stub, 2, checkpoint__every=0)
    timer = threading.Timer(seconds, signal.raise_signal, [signal.SIGINT])
    starts = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastkl.trainer.loop.start_trackers", lambda *_: timer.start())
        assert cli.main(arguments("distill", again)) == 130
    assert time.monotonic() - starts < 60
    stub.pause = 0.0
    stub.restart()
    assert cli.main(arguments("distill", again)) == 0
    check_equal(tmp_path / "run", tmp_path / "whole")


@slow
@pytest.mark.parametrize(
    ("target", "call"),
    [("student:Student.update", 4), ("runs.folder:RunFolder.save_checkpoint", 2), ("student:Student._step", 3)],
)
def test_a_run_that_was_killed_resumes_exactly(
    tmp_path: Path, folder: Path, stub: StubVllm, target: str, call: int
) -> None:
    """Between two checkpoints, after one, and in an update, while the server writes for later steps."""
    more = evaluated(folder, eval__every=2)
    distilled(settings(folder, tmp_path / "whole", stub, 2, **more))
    stub.restart()
    line = arguments("distill", settings(folder, tmp_path / "run", stub, 2, **more))
    assert killed(line, f"fastkl.trainer.{target}", call, after=True)
    assert cli.main(line) == 0
    check_equal(tmp_path / "run", tmp_path / "whole")


@slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_learn_what_one_learns(tmp_path: Path, folder: Path, stub: StubVllm, fsdp: bool) -> None:
    for count in (1, 2):
        line = arguments("distill", settings(folder, tmp_path / str(count), stub, 1, **evaluated(folder)))
        codes, said = together(line, tmp_path / "said", count=count, fsdp=fsdp and count > 1)
        assert codes == [0] * count, "\n".join(said)
        stub.restart()
    check_same(tmp_path / "2", tmp_path / "1")


def interrupted_soon() -> None:
    """As by Ctrl-C, once the run has begun."""
    loop.start_trackers = lambda *_: threading.Timer(1.5, os.kill, [os.getpid(), signal.SIGINT]).start()


@slow
def test_two_processes_stop_together_and_resume_exactly(tmp_path: Path, folder: Path, stub: StubVllm) -> None:
    more = {"checkpoint__every": 0}
    assert together(arguments("distill", settings(folder, tmp_path / "whole", stub, 2, **more)), tmp_path)[0] == [0, 0]
    stub.restart()
    stub.pause = 0.3
    line = arguments("distill", settings(folder, tmp_path / "run", stub, 2, **more))
    codes, said = together(line, tmp_path, before=dict.fromkeys(range(2), interrupted_soon))
    assert codes == [130, 130], said
    assert sum("the same command goes on after step" in each for each in said) == 1
    stub.pause = 0.0
    stub.restart()
    assert together(line, tmp_path)[0] == [0, 0]
    check_equal(tmp_path / "run", tmp_path / "whole")


REFUSED: list[tuple[Settings, list[str]]] = [
    ({"sampling.steps_ahead": 1}, ["sampling.steps_ahead is 1, but this process samples", "sampling.server.url"]),
    ({"sampling.steps_ahead": -1}, ["sampling.steps_ahead is -1; it must be at least 0"]),
    ({"sampling.steps_ahead": 2, "sampling.max_staleness": 1}, ["sampling.max_staleness is 1; lower the one or raise"]),
    ({"sampling.steps_ahead": 1, "loss.old_logprobs": "recompute"}, ["loss.old_logprobs is recompute", "to sampler"]),
    ({"sampling.steps_ahead": 1, "sampling.on_policy_fraction": 0}, ["on_policy_fraction is 0: there is nothing to"]),
]


@pytest.mark.parametrize(("given", "parts"), REFUSED, ids=[" ".join(given) for given, _ in REFUSED])
def test_refused(empty_folder: Path, capsys: pytest.CaptureFixture[str], given: Settings, parts: list[str]) -> None:
    server = {} if len(given) == 1 else {"sampling.server.url": SERVER.url, "sampling.server.model": "m"}
    check_refused(capsys, empty_folder, "distill", given | server, *parts)
