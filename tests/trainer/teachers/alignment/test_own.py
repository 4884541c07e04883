"""Completions as a teacher with its own tokenizer reads them: ends, limits, and tokenizers that are refused."""

from __future__ import annotations

import itertools
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import FAMILIES, GEMMA, QWEN, R1, SMOLLM, family_tokenizer
from run_settings import config
from segment_cases import words
from tiny_data import write_jsonl
from transformers import PreTrainedTokenizerBase

from fastkl.trainer.data.chat import ChatTemplate
from fastkl.trainer.data.mixture import read_data_sets
from fastkl.trainer.data.replies import opened_thought
from fastkl.trainer.data.samples import Sample, make_sample
from fastkl.trainer.data.turns import make_turn
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.rollouts.turn_markers import turn_markers
from fastkl.trainer.teachers.alignment.counts import Counts
from fastkl.trainer.teachers.context.prompts import TeacherPrompts

TEXT = "1+1 = 2, né — 日本 🙂"


class Pair:
    """A student's tokenizer and a teacher's, and what the teacher reads of samples of the only row."""

    def __init__(
        self,
        folder: Path,
        student: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase,
        row: dict[str, Any] | None = None,
        **settings: object,
    ) -> None:
        teacher.save_pretrained(folder / "teacher")
        file = write_jsonl(folder / "rows.jsonl", [row or {"prompt": "1+1=", "completion": TEXT}])
        given = {"run": folder / "run", "student.path": "s", "teacher.path": folder / "teacher", "data.path": file}
        given |= {"teacher.tokenizer": "own"} | {name.replace("__", "."): value for name, value in settings.items()}
        found = config("distill", given)
        self.data_sets = read_data_sets(found.data_sets(), student, with_given=False)
        self.read = TeacherPrompts(found, self.data_sets, student)
        self.student, self.teacher = student, self.read.reader("").tokenizer
        self.prompt = self.data_sets[0].prompts[0]

    def encoded(self, ids: list[int]) -> tuple[Sample, Counts]:
        """A sample with this completion."""
        sample = make_sample(self.prompt.ids, ids, 0)
        self.read.give_fixed([sample])
        return sample, self.read.encode([sample])

    def sample(self, text: str, end: str = "") -> Sample:
        ids = self.student(text, add_special_tokens=False)["input_ids"]
        return self.encoded(ids + ([self.student.convert_tokens_to_ids(end)] if end else []))[0]


def own_segments(sample: Sample) -> list[int]:
    found: list[int] = sample.segments[sample.prompt_length :].tolist()
    return found


def theirs(sample: Sample) -> list[int]:
    assert sample.teacher_completion is not None
    found: list[int] = sample.teacher_completion.tolist()
    return found


ENDS = {"gemma": "<end_of_turn>", "llama": "<|eot_id|>", "mistral": "</s>", "phi": "<|end|>", "r1": "<|end|>"}
ENDS |= {
    "qwen": "<|im_end|>",
    "qwen-base": "<|im_end|>",
    "smollm": "<|im_end|>",
    "alpaca": "<eos>",
    "ernie": "<|im_end|>",
}


BEGINNINGS = {"mistral": " ", "ernie": "<response>\n"} | dict.fromkeys(("qwen", "qwen-base"), "<think>\n\n</think>\n\n")


@pytest.mark.parametrize(("ours", "other"), [*itertools.product(["llama", "qwen-base", "ernie"], FAMILIES)])
def test_the_end_of_a_turn_is_that_of_the_teachers_turn(tmp_path: Path, ours: str, other: str) -> None:
    """With what a template writes before it. R1 opens a thought: the student does not begin in one."""
    student, teacher = family_tokenizer(ours), family_tokenizer(other)
    if other == "r1":
        with pytest.raises(
            ConfigError, match=r"rows\.jsonl:1: the student's prompt ends in .*<think>.*template_kwargs"
        ):
            Pair(tmp_path, student, teacher)
        return
    pair = Pair(tmp_path, student, teacher)
    closing = {name: "\n</response>\n" if name == "ernie" else "" for name in (ours, other)}
    sample = pair.sample(TEXT + closing[ours], ENDS[ours])
    begins = "" if {ours, other} == {ours} or {ours, other} <= {"qwen", "qwen-base"} else BEGINNINGS.get(other, "")
    assert pair.teacher.decode(theirs(sample)) == begins + TEXT + closing[other] + ENDS[other]
    numbers, bytes_of_text = own_segments(sample), len(TEXT.encode())
    assert numbers[:bytes_of_text] == list(range(1, bytes_of_text + 1))
    end = bytes_of_text + 1
    assert numbers[bytes_of_text:] == [end] * (len(sample.ids) - sample.prompt_length - bytes_of_text)
    assert sample.teacher_segments.tolist()[-1] == end


def real_templates() -> dict[str, Path]:
    """Those that TRL brings; none where it is not installed."""
    package = find_spec("trl")
    places = [] if package is None else package.submodule_search_locations or []
    files = [file for place in places for file in Path(place, "chat_templates").glob("*.jinja")]
    return {file.stem: file for file in files if "_training" not in file.stem}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*real_templates()])
def test_real_templates(tmp_path: Path, name: str) -> None:
    """A teacher reads an answer as its template writes one, a student's is read without what its own writes around it.

    Thoughts that only one of them opens are refused, unless the teacher's template closes them.
    """
    template = real_templates()[name].read_text(encoding="utf-8")
    added = dict.fromkeys(re.findall(r"<\|\w+\|>|<\w*turn\|?>|<\w+>|</\w+>|<｜[^｜]+｜>|\[/?INST\]", template))
    real = family_tokenizer("qwen", template=template, special=("<eos>", *added), added=(), bos="<bos>")
    chat, plain = ChatTemplate(real), family_tokenizer("smollm")
    opens, closes = opened_thought(chat.opening), chat.before_answer
    if opens and not closes:
        with pytest.raises(ConfigError, match="ends in"):
            Pair(tmp_path / "teacher", plain, real)
    else:
        pair = Pair(tmp_path / "teacher", plain, real)
        whole = chat.render([make_turn("user", "1+1="), make_turn("assistant", TEXT)], to_answer=False)
        sample = pair.sample(TEXT, ENDS["smollm"])
        assert sample.teacher_prompt is not None
        ids = [*sample.teacher_prompt.tolist(), *theirs(sample)]
        ids = ids if chat.end_token else ids[:-1]  # where no token ends a turn, the end of a text does
        assert real(whole, add_special_tokens=False)["input_ids"][: len(ids)] == ids
        assert 0 not in own_segments(sample)
    if opens:
        with pytest.raises(ConfigError, match="ends in"):
            Pair(tmp_path / "student", real, plain)
        return
    back = Pair(tmp_path / "student", real, plain)
    ids = real(closes + TEXT + chat.after_answer[0], add_special_tokens=False)["input_ids"]
    read, _ = back.encoded(ids)
    assert back.teacher.decode(theirs(read)) == TEXT + (ENDS["smollm"] if chat.end_token else "")


def test_another_end_is_that_of_its_name(tmp_path: Path) -> None:
    """The end of a text in the place of the turn's, which the teacher has too, or has not."""
    qwen = family_tokenizer("qwen")
    same = Pair(tmp_path / "same", qwen, family_tokenizer("qwen-base"))
    assert same.teacher.decode(theirs(same.sample("2", "<|endoftext|>"))) == "2<|endoftext|>"
    other = Pair(tmp_path / "other", qwen, family_tokenizer("gemma"))
    assert other.teacher.decode(theirs(other.sample("2", "<|endoftext|>"))) == "2<end_of_turn>"


def test_an_end_that_the_model_declares(tmp_path: Path) -> None:
    pair = Pair(tmp_path, words("characters"), words("pairs"))
    ids = pair.student("12?")["input_ids"]
    assert pair.teacher.decode(theirs(pair.encoded(ids)[0])) == "12?"
    pair.read.end_with(ids[-1:])
    assert pair.teacher.decode(theirs(pair.encoded(ids)[0])) == "12<eos>"


def test_texts_end_with_the_end_of_a_text(tmp_path: Path) -> None:
    pair = Pair(tmp_path, family_tokenizer("qwen-base"), family_tokenizer("gemma"), data__chat_template="false")
    assert pair.teacher.decode(pair.read.data_sets[0].prompts[0].ids) == "1+1="
    assert pair.teacher.decode(theirs(pair.sample("2", "<|endoftext|>"))) == "2<eos>"


def test_what_has_no_end_gets_none(tmp_path: Path) -> None:
    pair = Pair(tmp_path, family_tokenizer("qwen"), family_tokenizer("gemma"))
    assert pair.teacher.decode(theirs(pair.sample(TEXT))) == TEXT
    nothing, counts = pair.encoded([])
    assert (theirs(nothing), own_segments(nothing), counts.tokens) == ([], [], 0)
    end, counts = pair.encoded([pair.student.eos_token_id])
    assert pair.teacher.decode(theirs(end)) == "<end_of_turn>"
    assert (counts.tokens, counts.aligned, counts.bytes) == (1, 1, 0)


def test_a_character_that_is_cut_is_in_no_segment(tmp_path: Path) -> None:
    """A length limit in the middle of it."""
    pair = Pair(tmp_path, family_tokenizer("qwen"), family_tokenizer("gemma"))
    ids = pair.student("né🙂", add_special_tokens=False)["input_ids"]
    sample, counts = pair.encoded(ids[:-1])
    assert own_segments(sample) == [1, 2, 3, 0, 0, 0]
    assert (counts.tokens, counts.aligned) == (6, 3)
    read = sample.for_teacher()
    assert read.loss_mask[read.prompt_length :].tolist()[:3] == [True] * 3
    assert not read.loss_mask[read.prompt_length + 3 :].any()


@pytest.mark.parametrize(("most", "numbers"), [(64, [1, 1, 1, 1, 2]), (4, [1, 1, 1, 1, 2]), (3, [0, 0, 0, 0, 1])])
def test_segments_that_are_too_long(tmp_path: Path, most: int, numbers: list[int]) -> None:
    """One of a token on both sides is never too long: the end has five letters, and no bytes."""
    teacher = words("characters")
    teacher.add_tokens(["1234"])
    pair = Pair(tmp_path, words("characters"), teacher, loss__max_segment=most)
    assert own_segments(pair.sample("1234", "<eos>")) == numbers


def test_what_the_student_did_not_write_judges_nothing(tmp_path: Path) -> None:
    """Segments of tokens that count and of others; and of the others alone, which take their place in the count."""
    pair = Pair(tmp_path, words("characters"), words("pairs"))
    sample, _ = pair.encoded(pair.student("12 34 5")["input_ids"])
    sample.loss_mask = np.array([*sample.loss_mask[: sample.prompt_length], *map(int, "1011111")], np.bool_)
    counts = pair.read.encode([sample])
    assert own_segments(sample) == [0, 0, 1, 2, 2, 3, 4]
    assert (counts.tokens, counts.aligned, counts.segments) == (6, 5, 4)
    assert sample.for_teacher().loss_mask[-len(theirs(sample)) :].tolist() == [False, True, True, True, True]


def test_one_tokenizer_reads_what_was_written(tmp_path: Path) -> None:
    """Not what it would have written itself, and no text at all."""
    pair = Pair(tmp_path, family_tokenizer("qwen"), family_tokenizer("qwen"))
    ids = [200, 201, pair.student.convert_tokens_to_ids("<|im_start|>"), 199, pair.student.eos_token_id]
    sample, counts = pair.encoded(ids)
    assert theirs(sample) == ids
    assert own_segments(sample) == [1, 2, 3, 4, 5]
    assert counts.aligned == counts.tokens == 5


def test_a_turns_end_that_is_spelled_out_ends_nothing(tmp_path: Path) -> None:
    pair = Pair(tmp_path, words("characters"), family_tokenizer("alpaca"))
    sample = pair.sample("a<e")
    assert theirs(sample) == pair.teacher("a<e")["input_ids"]
    spelled, _ = pair.encoded(pair.student.convert_tokens_to_ids(list("a<eos>b")))
    assert pair.teacher.eos_token_id not in theirs(spelled)
    assert len(set(own_segments(spelled))) == 7


OWN_TEMPLATE = SMOLLM.replace("assistant\n{% endif", "assistant\n{{ '<think>\n' if thinks }}{% endif")


def test_variables_of_the_teachers_template(tmp_path: Path) -> None:
    student, teacher = family_tokenizer("gemma"), family_tokenizer("qwen", template=QWEN)
    plain = Pair(tmp_path / "plain", student, teacher)
    off = {"teacher__context__template_kwargs": "{enable_thinking: false}"}
    told = Pair(tmp_path / "told", student, teacher, **off)
    texts = [pair.teacher.decode(pair.read.data_sets[0].prompts[0].ids) for pair in (plain, told)]
    assert texts[1] == f"{texts[0]}<think>\n\n</think>\n\n"
    with pytest.raises(ConfigError, match=r"teacher\.context\.template_kwargs has 'thinks', which the chat template"):
        Pair(tmp_path / "no", student, teacher, teacher__context__template_kwargs="{thinks: true}")
    thinking = family_tokenizer("smollm", template=OWN_TEMPLATE)
    with pytest.raises(ConfigError, match=r"ends in .*the teacher's, by teacher\.context, in .*<think>"):
        Pair(tmp_path / "on", student, thinking, teacher__context__template_kwargs="{thinks: true}")
    with pytest.raises(ConfigError, match=r"teacher\.context\.template_kwargs is .*but data holds no chats"):
        Pair(tmp_path / "text", student, teacher, **off, data__chat_template="false")


def refused_tokenizer(name: str) -> PreTrainedTokenizerBase:
    if name == "no-template":
        teacher = family_tokenizer("alpaca")
        teacher.chat_template = None
        return teacher
    if name == "no-end":
        teacher = family_tokenizer("alpaca")
        teacher.eos_token = None
        return teacher
    return family_tokenizer("gemma", template=GEMMA.replace("{{ bos_token }}", "{{ raise_exception('not now') }}"))


REFUSED = {
    "no-template": r"the teacher's tokenizer \(.*teacher\) has no chat template, and data holds chats",
    "no-end": r"the teacher's tokenizer declares no end of sequence.*set its eos_token",
    "a-refusal": r"rows\.jsonl:1 with teacher\.tokenizer: the chat template refuses .*not now.*the teacher's template",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_tokenizers(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=REFUSED[name]):
        Pair(tmp_path, words("characters"), refused_tokenizer(name))


def conversation(pair: Pair, turns: list[tuple[str, bool]], reply: str) -> list[tuple[list[int], bool]]:
    """The student's turns (text, whether it ends it itself) with a reply between each two, as rollouts write them."""
    markers = turn_markers(pair.student, "user")
    end = pair.student.convert_tokens_to_ids(ENDS["llama"])
    parts = list[tuple[list[int], bool]]()
    for number, (text, ended) in enumerate(turns):
        own = [*pair.student(text, add_special_tokens=False)["input_ids"], *([end] if ended else [])]
        parts.append((own, True))
        if number + 1 < len(turns):
            parts.append((markers.ids(reply, pair.student, own[-1], {end}), False))
    return parts


@pytest.mark.parametrize("other", ["gemma", "smollm", "phi"])
def test_replies_are_turns_of_the_teachers_template(tmp_path: Path, other: str) -> None:
    """What the teacher reads is what its template writes of the whole conversation."""
    student, teacher = family_tokenizer("llama"), family_tokenizer(other)
    environment = {"environment__name": "class:nods.Nods", "environment__trust": "true", "environment__role": "user"}
    pair = Pair(tmp_path, student, teacher, **environment)
    parts = conversation(pair, [("né", True), ("stop", False), ("2", True)], "ok é")
    sample = make_sample(pair.prompt.ids, [token for ids, _ in parts for token in ids], 0)
    sample.loss_mask = np.array([False] * sample.prompt_length + [own for ids, own in parts for _ in ids])
    pair.read.give_fixed([sample])
    counts = pair.read.encode([sample])
    assert sample.teacher_prompt is not None
    read = pair.teacher.decode([*sample.teacher_prompt.tolist(), *theirs(sample)])
    said = ["né", "ok é", "stop", "ok é", "2"]
    messages = [{"role": "user", "content": "1+1="}]
    messages += [{"role": ("assistant", "user")[i % 2], "content": text} for i, text in enumerate(said)]
    whole = pair.teacher.apply_chat_template(messages, tokenize=False)
    whole = whole[: whole.rindex(ENDS[other]) + len(ENDS[other])]
    assert read == whole
    judged = [number > 0 for number in own_segments(sample)]
    assert judged == [own for ids, own in parts for _ in ids]
    assert counts.aligned == counts.tokens == sample.loss_tokens
    scored = sample.for_teacher()
    kept = pair.teacher.decode(scored.ids[scored.loss_mask].tolist())
    assert kept == f"né{ENDS[other]}stop2{ENDS[other]}"


def test_a_role_that_the_teachers_template_does_not_know(tmp_path: Path) -> None:
    environment = {"environment__name": "class:nods.Nods", "environment__trust": "true", "environment__role": "tool"}
    with pytest.raises(ConfigError, match=r"of the teacher: environment\.role is 'tool', but the tokenizer's chat"):
        Pair(tmp_path, family_tokenizer("llama"), family_tokenizer("gemma"), **environment)


def test_a_thought_that_both_begin(tmp_path: Path) -> None:
    pair = Pair(tmp_path, family_tokenizer("r1"), family_tokenizer("smollm", template=R1))
    assert pair.teacher.decode(pair.read.data_sets[0].prompts[0].ids).endswith("<think>\n")
