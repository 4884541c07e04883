"""Start-up checks: what would make a run worthless is refused, with both values and the way out, before it begins."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import family_tokenizer
from run_cases import distilled, tuned
from run_settings import distillation, training
from tiny_data import sums, write_jsonl
from tiny_models import CHARACTERS, CHAT_TEMPLATE, causal_lm, llama, save_model, tokenizer
from transformers import PreTrainedTokenizerFast

from fastkl.trainer.config.data import DataConfig
from fastkl.trainer.data.prompts import Prompts, encode_prompts
from fastkl.trainer.data.rows import Prompt
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.models import checks
from fastkl.trainer.models.ends import end_of_sequence
from fastkl.trainer.rollouts.samplers.common import check_requests

CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1="}]
OTHER_TEMPLATE = CHAT_TEMPLATE.replace("<a>", "<a> ")


def encoded(words: PreTrainedTokenizerFast, *prompts: Any, chat_template: bool = True) -> Prompts:
    rows = [Prompt(f"p.jsonl:{line}", prompt) for line, prompt in enumerate(prompts, start=1)]
    return encode_prompts(rows, words, DataConfig(path="p.jsonl", chat_template=chat_template))


def test_tokenizers_that_agree_pass() -> None:
    checks.check_tokenizers(tokenizer(), tokenizer())


OTHERS = {
    "permuted": (CHARACTERS, CHARACTERS[::-1]),  # as many tokens, other ids
    "fewer": (CHARACTERS, CHARACTERS.replace("x", "")),  # one character fewer
    "accents": (CHARACTERS + "é", CHARACTERS),  # differ outside ASCII alone
}


@pytest.mark.parametrize(("student", "teacher"), OTHERS.values(), ids=OTHERS)
def test_tokenizers_that_differ_are_refused(student: str, teacher: str) -> None:
    with pytest.raises(ConfigError, match=r"tokenize differently.*tokens.*student's family"):
        checks.check_tokenizers(tokenizer(student), tokenizer(teacher))


@pytest.mark.parametrize("special", ["bos_token", "eos_token", "unk_token"])
def test_special_tokens_that_differ_are_named(special: str) -> None:
    with pytest.raises(ConfigError, match=rf"{special}_id is \w+ in the student's .* and 3 in the teacher's"):
        checks.check_tokenizers(tokenizer(), tokenizer(**{special: "<s>"}))


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_head_smaller_than_the_vocabulary_is_refused(who: str) -> None:
    words = tokenizer()
    models = {"student": llama(len(words)), "teacher": llama(len(words) + 9), who: llama(len(words) - 1)}
    message = rf"the {who}'s head has {len(words) - 1} rows .* ids up to {len(words) - 1}; resize"
    with pytest.raises(ConfigError, match=message):
        checks.check_vocabulary(words, models)


def test_heads_padded_differently_pass() -> None:
    words = tokenizer()
    checks.check_vocabulary(words, {"student": llama(len(words)), "teacher": llama(len(words) + 9)})


def with_an_image(words: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return words


def test_a_head_may_lack_special_tokens_that_no_row_has() -> None:
    """As those of Gemma 3's small models lack <image_soft_token>, which their tokenizer has."""
    words = with_an_image(tokenizer())
    models = {"student": llama(len(words) - 1)}
    checks.check_vocabulary(words, models)
    checks.check_room(encoded(words, "1+1=", chat_template=False), 4, models, "")
    with pytest.raises(
        ConfigError, match=rf"p\.jsonl:2 has a token with the id {len(words) - 1}, which the student lacks"
    ):
        checks.check_room(encoded(words, "1+1=", "<image>", chat_template=False), 4, models, "")
    words.eos_token = "<image>"
    with pytest.raises(ConfigError, match="the student's head has"):
        checks.check_vocabulary(words, models)
    words.add_tokens(["<think>"])
    with pytest.raises(ConfigError, match=rf"ids up to {len(words) - 1}; resize"):
        checks.check_vocabulary(words, {"student": llama(len(words) - 1)})


def test_a_run_with_a_head_that_lacks_a_special_token(tmp_path: Path) -> None:
    words = with_an_image(tokenizer())
    save_model(tmp_path / "student", words, vocabulary=len(words) - 1)
    save_model(tmp_path / "teacher", words, vocabulary=len(words) + 5, seed=1)
    write_jsonl(tmp_path / "sums.jsonl", sums())
    for objective in ("policy_gradient", "top_k"):
        distilled(distillation(tmp_path / objective, tmp_path, optim__steps=1, loss__objective=objective))
    write_jsonl(tmp_path / "sums.jsonl", [{"prompt": "1", "completion": "<image>"}])
    with pytest.raises(ConfigError, match=r"sums\.jsonl:1 has a token with the id"):
        tuned(training(tmp_path / "sft", tmp_path, examples_per_step=1))


@pytest.mark.parametrize(
    ("prompt", "chat_template"),
    [(CHAT, True), (CHAT, False), ("1+1=", True)],
    ids=["chat", "chat-only", "text-as-chat"],
)
def test_chat_templates_that_differ_are_refused(prompt: Any, chat_template: bool) -> None:
    student, teacher = tokenizer(), tokenizer()
    teacher.chat_template = OTHER_TEMPLATE
    with pytest.raises(ConfigError, match=r"<a>'… and .*<a> '….*Copy the teacher's chat_template"):
        checks.check_chat(student, teacher, encoded(student, prompt, chat_template=chat_template))


def test_chat_templates_are_compared_on_every_prompt() -> None:
    """They may differ for some prompts only, here for those with a system turn."""
    student, teacher = tokenizer(), tokenizer()
    teacher.chat_template = CHAT_TEMPLATE.replace(
        "{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}"
    )
    checks.check_chat(student, teacher, encoded(student, "1+1=", CHAT[1:]))
    with pytest.raises(ConfigError, match="be brief"):
        checks.check_chat(student, teacher, encoded(student, "1+1=", CHAT[1:], CHAT))


def test_a_teachers_template_that_refuses_a_prompt_is_named() -> None:
    student, teacher = tokenizer(), tokenizer()
    teacher.chat_template = "{{ raise_exception('no system') if messages[0].role == 'system' }}" + CHAT_TEMPLATE
    with pytest.raises(ConfigError, match=r"p\.jsonl:2: of the teacher, the chat template refuses.*'no system'"):
        checks.check_chat(student, teacher, encoded(student, "1+1=", CHAT))


def test_chat_templates_that_do_not_matter_pass() -> None:
    student, teacher = tokenizer(), tokenizer()
    teacher.chat_template = OTHER_TEMPLATE
    checks.check_chat(student, teacher, encoded(student, "1+1=", chat_template=False))  # plain text
    teacher.chat_template = CHAT_TEMPLATE + "{# the same text #}"
    checks.check_chat(student, teacher, encoded(student, CHAT))
    teacher.chat_template = None  # a base model: it has no format to insist on
    checks.check_chat(student, teacher, encoded(student, CHAT))


@pytest.mark.parametrize(
    ("declared", "wanted"),
    [(0, [0]), (3, [0, 3]), ([3, 4], [0, 3, 4]), (None, [0])],
    ids=["same", "other", "list", "none"],
)
def test_end_of_sequence_is_the_models_and_the_tokenizers(declared: Any, wanted: list[int]) -> None:
    words = tokenizer()
    model = llama(len(words))
    model.generation_config.eos_token_id = declared
    assert end_of_sequence(model, words) == wanted


def test_models_that_end_differently_are_refused() -> None:
    words = tokenizer()
    student, teacher = llama(len(words)), llama(len(words))
    for ends in (0, [0, 3], None):  # None: it ends as the tokenizer says, with 0
        student.generation_config.eos_token_id = ends
        checks.check_end_of_sequence(student, teacher, words)
    student.generation_config.eos_token_id = 3
    with pytest.raises(ConfigError, match=r"student ends with ids \[3\] and the teacher with \[0\]"):
        checks.check_end_of_sequence(student, teacher, words)
    student.generation_config.eos_token_id = None
    words.eos_token = None
    with pytest.raises(ConfigError, match=r"set eos_token_id"):
        checks.check_end_of_sequence(student, teacher, words)


def test_a_student_also_ends_where_its_chats_end_a_turn() -> None:
    """A base student declares another end than the chat model that teaches it."""
    words = family_tokenizer("qwen-base")
    end, turn_end = words.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    student, teacher = llama(len(words)), llama(len(words))
    student.generation_config.eos_token_id, teacher.generation_config.eos_token_id = end, turn_end
    assert end_of_sequence(student, words) == sorted([end, turn_end])
    checks.check_end_of_sequence(student, teacher, words)
    words.chat_template = None
    assert end_of_sequence(student, words) == [end]
    with pytest.raises(ConfigError, match=r"give them a common one"):
        checks.check_end_of_sequence(student, teacher, words)


def test_room_in_the_context() -> None:
    words = tokenizer()
    student, teacher = llama(len(words)), llama(len(words), max_position_embeddings=32)
    prompts = encoded(words, "1" * 5, "1" * 20, chat_template=False)
    checks.check_room(prompts, 12, {"student": student, "teacher": teacher}, "Do this.")  # 20 + 12 = 32: just fits
    with pytest.raises(ConfigError) as error:
        checks.check_room(prompts, 13, {"student": student, "teacher": teacher}, "Do this.")
    for part in ("p.jsonl:2 has 20 tokens", "with 13 new ones", "teacher's context of 32", "Do this."):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("prompts", "new", "refused"), [((5, 20), 12, False), ((5, 20), 13, True), ((33, 40), 9, False)]
)
def test_texts_on_both_sides_of_a_switch_of_frequencies(prompts: tuple[int, int], new: int, refused: bool) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32}
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    settings: dict[str, Any] = {"original_max_position_embeddings": 32, "rope_parameters": rope | factors}
    model = causal_lm("phi3", vocab_size=len(tokenizer()), **settings)
    refusal = pytest.raises(ConfigError, match=r"5 to 33 tokens: .* within 32 together")
    with refusal if refused else nullcontext():
        checks.check_one_rope(np.array(prompts), new, {"student": model})


def test_a_context_without_an_end_has_room() -> None:
    words = tokenizer()
    student = llama(len(words))
    student.config.max_position_embeddings = -1  # as XLNet's
    checks.check_room(encoded(words, "1" * 20, chat_template=False), 1000, {"student": student}, "")
    check_requests(student.config, [[5] * 20], 1000, 1.0)


def test_an_empty_prompt_is_named() -> None:
    words = tokenizer()
    prompts = encoded(words, "1", "", chat_template=False)
    with pytest.raises(ConfigError, match=r"p\.jsonl:2 is an empty prompt"):
        checks.check_room(prompts, 1, {"student": llama(len(words))}, "")


def _other_template(words: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    words.chat_template = OTHER_TEMPLATE
    return words


REFUSED = {
    "tokenizer": ({"words": tokenizer(CHARACTERS[::-1])}, sums(), {}, "tokenize differently"),
    "special-ids": ({"words": tokenizer(bos_token="<s>")}, sums(), {}, "bos_token_id is None"),
    "chat-template": (
        {"words": _other_template(tokenizer())},
        sums(),
        {},
        "chat templates of student and teacher differ",
    ),
    "head-too-small": ({"vocabulary": len(tokenizer()) - 1}, sums(), {}, "the teacher's head has"),
    "context": ({"max_position_embeddings": 8}, sums(), {}, "the teacher's context of 8"),
    "empty-prompt": ({}, [{"prompt": ""}], {"data__chat_template": "false"}, "sums.jsonl:1 is an empty prompt"),
    "eval-context": (
        {},
        sums(),
        {"eval__data__path": "sums.jsonl", "eval__max_new_tokens": 60},
        "eval.data.max_prompt_tokens",
    ),
    "eval-without-answers": ({}, [{"prompt": "1"}], {"eval__data__path": "sums.jsonl"}, "sums.jsonl:1: no `answer`"),
    "lora-on-the-head": (
        {},
        sums(),
        {"student__lora__rank": 2, "student__lora__target_modules": '["lm_head"]'},
        "adapts lm_head, but its weight is also that of model.embed_tokens",
    ),
}


@pytest.mark.parametrize(("teacher", "rows", "settings", "message"), REFUSED.values(), ids=REFUSED)
def test_distill_refuses_before_the_run_folder_exists(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    teacher: dict[str, Any],
    rows: list[dict[str, object]],
    settings: dict[str, object],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(Path("student"))
    save_model(Path("teacher"), **teacher)
    write_jsonl(Path("sums.jsonl"), rows)
    with pytest.raises(ConfigError) as error:
        distilled(distillation(Path("run"), Path(), **settings))
    assert message in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student", "sums.jsonl", "teacher"]
