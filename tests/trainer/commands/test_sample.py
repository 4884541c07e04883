"""`fastkl sample`: completions in a file that `sft` reads as they were written, and the same file however it was made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from chat_templates import FAMILIES, family_tokenizer
from launches import killed, together
from run_cases import refusal, tuned
from run_settings import MINIMAL, arguments, config, training
from stub_server import serving
from stub_vllm import StubVllm
from tiny_data import read_jsonl, sums, write_jsonl
from tiny_models import tokenizer

from fastkl import cli
from fastkl.trainer.commands.answering import answer_row
from fastkl.trainer.commands.command_line import parse
from fastkl.trainer.commands.sample import learned
from fastkl.trainer.config.data import DataConfig
from fastkl.trainer.data.prompts import EncodedPrompt, encode_prompts, given_samples
from fastkl.trainer.data.rows import Prompt
from fastkl.trainer.data.sources import load_prompts
from fastkl.trainer.rollouts.answers import Ask, answers_to, completion_of
from fastkl.trainer.rollouts.single_turn import Trajectory

CHAT = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "Hi. Ask!"},
    {"role": "user", "content": "what is 2+2?"},
]
SYSTEM = {"role": "system", "content": "Be brief."}
NO_SYSTEM = ("gemma", "mistral", "r1")  # they refuse such a turn, or leave it out, of a chat of several turns
MANY = {"sampling__samples_per_prompt": 6}  # completions are written in two pieces
WORDS = ("4", "It is 4.\nIs it?", "<tag> é", "")


class Written:
    """Writes what it is told, token by token, with or without an end."""

    def __init__(self, ids: Sequence[list[int]], truncated: bool) -> None:
        self._ids, self._truncated = ids, truncated

    def my_share(self, items: Sequence[Any]) -> list[Any]:
        return list(items)

    def respond(self, prompts: Sequence[EncodedPrompt], **options: Any) -> list[Trajectory]:
        cut = [ids[:-1] for ids in self._ids] if self._truncated else self._ids
        return [Trajectory(ids, [True] * len(ids), [0.0] * len(ids), self._truncated, ids) for ids in cut]


def encoded(file: Path, words: Any, chats: bool) -> list[EncodedPrompt]:
    data = DataConfig(str(file), chat_template=chats)
    return encode_prompts(load_prompts(data, all_columns=True), words, data)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("truncated", [False, True])
def test_what_was_written_is_what_is_learned(tmp_path: Path, name: str, truncated: bool) -> None:
    """Chats of several turns, a system's turn, tools and texts; metadata and the user's own columns come along."""
    words = family_tokenizer(name)
    system = [] if name in NO_SYSTEM else [SYSTEM]
    tools = {"tools": [{"name": "add"}]} if "tools" in FAMILIES[name].template else {}
    more = {"metadata": {"level": 1}, "answer": "4", "id": 7, "score": 0.5}
    thought = "Hm.</think>" if name == "r1" else ""  # its prompts begin one
    texts = [thought + text for text in WORDS if text or not truncated]
    chats = [{"messages": [*system, *CHAT], "completion": text, **tools, **more} for text in texts]
    plain = [{"prompt": "what is 2+2? ", "completion": text, **more} for text in texts]
    for given, as_chat in ((chats, True), (plain, False)):
        prompts = encoded(write_jsonl(tmp_path / "given.jsonl", given), words, as_chat)
        wanted = [sample.ids.tolist() for sample in given_samples(prompts, words)]
        ids = [whole[len(prompt.tokens) :] for whole, prompt in zip(wanted, prompts, strict=True)]
        ask = Ask(prompts, 1, 1.0, 50, None)
        rows = [answer_row(answer, words) for answer in answers_to(prompts, ask, Written(ids, truncated), words, 0)]
        assert all(row["metadata"] == {"level": 1} and row["id"] == 7 and row["answer"] == "4" for row in rows)
        assert not any("score" in row for row in rows)  # that of another's completion
        learned = encoded(write_jsonl(tmp_path / "written.jsonl", rows), words, as_chat)
        assert [prompt.ids for prompt in learned] == [prompt.ids for prompt in prompts]
        found = [sample.ids.tolist() for sample in given_samples(learned, words)]
        assert found == ([whole[:-1] for whole in wanted] if truncated else wanted)


def test_half_a_character_is_left_out() -> None:
    words = family_tokenizer("smollm")
    prompt = encode_prompts([Prompt("d:1", "q")], words, DataConfig("p"))
    ids = words("aé", add_special_tokens=False)["input_ids"]
    (answer,) = answers_to(prompt, Ask(prompt, 1, 1.0, 9, None), Written([ids], True), words, 0)
    assert (answer.text, completion_of(answer, words)) == ("a\ufffd", "a")


def settings(folder: Path, output: Path, **overrides: object) -> dict[str, object]:
    given = {"model.path": folder / "student", "data.path": folder / "sums.jsonl", "output": output}
    given |= {"sampling.max_new_tokens": 6, "sampling.samples_per_prompt": 3, "grader": "regex:[0-9]"}
    return given | {name.replace("__", "."): value for name, value in overrides.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> dict[str, bytes]:
    """The files of a command that was not interrupted."""
    path = tmp_path_factory.mktemp("whole")
    rule = {"keep.path": path / "right.jsonl", "keep.min_score": 1, "keep.truncated": "true"}
    assert cli.main(arguments("sample", settings(folder, path / "all.jsonl", **MANY) | rule)) == 0
    return {name: (path / name).read_bytes() for name in ("all.jsonl", "right.jsonl")}


def test_a_student_learns_from_them(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the file as it is, without a word about columns that nothing reads; what was counted is printed."""
    assert cli.main(arguments("sample", settings(folder, tmp_path / "all.jsonl"))) == 0
    printed = json.loads(capsys.readouterr().out)
    rows = read_jsonl(tmp_path / "all.jsonl")
    assert printed["completions"] == len(rows) == 36
    assert printed["tokens"] == sum(row["tokens"] for row in rows)
    assert printed["flops"] > 0
    assert printed["mean_score"] == pytest.approx(sum(row["score"] for row in rows) / 36)
    assert [row["sample"] for row in rows] == [0, 1, 2] * 12
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in sums() for _ in range(3)]
    tuned(training(tmp_path / "run", folder, data__path=tmp_path / "all.jsonl", optim__steps=1))
    assert "nothing reads" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(1, marks=pytest.mark.slow, id="among-the-completions"),
        pytest.param(2, id="before-the-kept"),
    ],
)
def test_killed_at_any_time_it_makes_the_same_files(
    tmp_path: Path, folder: Path, whole: dict[str, bytes], call: int
) -> None:
    rule = {"keep.path": tmp_path / "right.jsonl", "keep.min_score": 1, "keep.truncated": "true"}
    command = arguments("sample", settings(folder, tmp_path / "all.jsonl", **MANY) | rule)
    assert killed(command, "fastkl.trainer.commands.output:Output._append", call, after=True)
    assert cli.main(command) == 0
    assert {name: (tmp_path / name).read_bytes() for name in whole} == whole


def test_what_is_kept(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another rule needs another file, and samples nothing again."""
    output = tmp_path / "all.jsonl"

    def kept(name: str, **rule: object) -> list[dict[str, Any]]:
        given = {f"keep.{setting}": value for setting, value in rule.items()} | {"keep.path": tmp_path / name}
        assert cli.main(arguments("sample", settings(folder, output) | given)) == 0
        rows = read_jsonl(tmp_path / name)
        told = capsys.readouterr()
        assert json.loads(told.out)["kept"] == len(rows)
        assert ("to learn them" in told.err) == bool(rows)
        return rows

    everything = kept("everything", truncated="true")
    before = output.read_bytes()
    assert everything == read_jsonl(output)
    assert kept("ended") == [row for row in everything if not row["truncated"]]
    assert kept("right", truncated="true", min_score=1) == [row for row in everything if row["score"] >= 1]
    assert kept("first", truncated="true", per_prompt=1) == everything[::3]
    texts = [(row["source"], row["completion"]) for row in kept("distinct", truncated="true", distinct="true")]
    assert texts == list(dict.fromkeys((row["source"], row["completion"]) for row in everything))
    assert kept("none", min_score=2) == []
    assert output.read_bytes() == before
    rule = {"keep.path": tmp_path / "right", "keep.min_score": 0}
    refusal(capsys, "sample", settings(folder, output) | rule, "keep.min_score was 1", "is 0", "another name")
    (tmp_path / "mine").write_text("a month of work")
    rule = {"keep.path": tmp_path / "mine", "model.path": "./nosuch"}
    refusal(
        capsys, "sample", settings(folder, tmp_path / "new") | rule, f"keep.path {tmp_path / 'mine'} exists already"
    )


@pytest.fixture
def stub(folder: Path) -> Iterator[StubVllm]:
    with serving(folder / "student", kind=StubVllm) as server:
        yield server


def test_a_served_model_writes_too(
    tmp_path: Path, folder: Path, stub: StubVllm, capsys: pytest.CaptureFixture[str]
) -> None:
    """Greedily what it writes when it is loaded here; its FLOPs are counted where its config is."""
    greedy: dict[str, object] = {"sampling.temperature": 0, "sampling.samples_per_prompt": 1}
    assert cli.main(arguments("sample", settings(folder, tmp_path / "here") | greedy)) == 0
    here = capsys.readouterr().out
    there = {"model.path": "", "model.server.url": stub.url, "model.server.model": "stub"}
    there |= {"model.tokenizer": folder / "student", "model.server.retries": 1}
    assert cli.main(arguments("sample", settings(folder, tmp_path / "there") | greedy | there)) == 0
    assert capsys.readouterr().out == here
    assert (tmp_path / "there").read_bytes() == (tmp_path / "here").read_bytes()
    tokenizer().save_pretrained(tmp_path / "words")
    there |= {"model.tokenizer": tmp_path / "words"}
    assert cli.main(arguments("sample", settings(folder, tmp_path / "again") | greedy | there)) == 0
    assert "flops" not in json.loads(capsys.readouterr().out)
    evaluation = there | {"eval.data.path": folder / "sums.jsonl", "eval.max_new_tokens": 4}
    assert cli.main(arguments("eval", evaluation)) == 0
    assert "eval/accuracy" in capsys.readouterr().out
    stub.defect = "seedless"
    failing = settings(folder, tmp_path / "new") | there
    refusal(capsys, "sample", failing, "ignores seeds", "Serve the student with vLLM")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_two_processes_share_the_writing(tmp_path: Path, folder: Path) -> None:
    greedy: dict[str, object] = {"sampling.temperature": 0, "sampling.samples_per_prompt": 1}
    assert cli.main(arguments("sample", settings(folder, tmp_path / "one") | greedy)) == 0
    command = arguments("sample", settings(folder, tmp_path / "two") | greedy)
    statuses, said = together(command, tmp_path / "errors")
    assert statuses == [0, 0], said
    assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()


def test_a_runs_student_completes_the_runs_prompts(tmp_path: Path, folder: Path) -> None:
    run = tuned(training(tmp_path / "run", folder, optim__steps=1, data__limit=2))
    given = ["--output", str(tmp_path / "o"), "--sampling.max_new_tokens", "4"]
    assert cli.main(["sample", str(run), *given]) == 0
    assert [row["prompt"] for row in read_jsonl(tmp_path / "o")] == [row["prompt"] for row in sums(2)]


def test_what_it_says_to_learn_is_a_command() -> None:
    """Of the rows as they were asked: the same template, with the same variables."""
    asked = config("sample", {"output": "my rows.jsonl", "model.path": "m", "data.path": "d.jsonl"})
    own = ["fastkl", "sft", "--run", "runs/sft", "--student.path", "STUDENT"]
    assert learned(asked) == [*own, "--data.path", "my rows.jsonl"]
    kwargs = {"name": "it's me"}
    asked = config("sample", MINIMAL["sample"] | {"keep.path": "k", "data.template_kwargs": json.dumps(kwargs)})
    found = parse(learned(asked)[1:])[1]
    assert (found.data.path, found.data.template_kwargs) == ("k", kwargs)
    plain = config("sample", MINIMAL["sample"] | {"data.chat_template": "false"})
    assert not parse(learned(plain)[1:])[1].data.chat_template
