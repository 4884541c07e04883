"""What must hold before anything expensive starts. Each failure names both values and the remedy."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastkl.trainer.data.arrays import Array, Ragged
from fastkl.trainer.data.chat import ChatTemplate, Refusal, end_of_turn
from fastkl.trainer.data.prompts import EncodedPrompt, Given, Prompts
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.models.ends import declared_ends, end_of_sequence, tokenizer_ends
from fastkl.trainer.models.loading import context_length
from fastkl.trainer.models.sizes.layers import rope_switch
from fastkl.trainer.models.tokenizers import (
    SAMPLE_TEXT,
    compare_vocabularies,
    first_three,
    text_tokens,
    vocabulary,
    where_they_part,
)

SAME_FAMILY = "Use a {0} of the student's family"
OWN_TOKENIZER = ", or set {0}.tokenizer to own (docs/teachers/tokenizers.md)"
SPECIALS = ("bos_token_id", "eos_token_id", "unk_token_id")
# Remedies where a context is too short.
SHORTER = "Lower {0}.max_new_tokens, or leave long prompts out with {1}.max_prompt_tokens"
SHORTER_CONTEXT = "Lower {0}.max_new_tokens, or shorten what {1} adds"
SHORTER_ROW = "Shorten its completion or take the row out"


def check_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, name: str = "teacher") -> None:
    """What the student can write is one token with one id in both, and both read and end a text alike.

    The teacher may have more tokens than the student. `name` is what messages call it.
    """
    family = (SAME_FAMILY + OWN_TOKENIZER * (name == "teacher")).format(name)
    found = compare_vocabularies(student, teacher)
    if found.differing:
        named = [
            f"{token} is {ours!r} in the student's and {theirs!r} in the {name}'s"
            for token, ours, theirs in found.differing
        ]
        raise ConfigError(
            f"student and {name} tokenize differently: id {first_three(named, '; ')}. The {name} would score other "
            f"tokens than the student wrote. {family}"
        )
    if found.lacking:
        named = [f"{token} {spelling!r}" for token, spelling in found.lacking]
        raise ConfigError(
            f"student and {name} tokenize differently: the {name} lacks ids of the student, {first_three(named, ', ')}. "
            f"It could not score these tokens. {family}. If the student never writes them, take them out of its tokenizer"
        )
    text = SAMPLE_TEXT + (student.eos_token or "")
    ours, theirs = student(text)["input_ids"], teacher(text)["input_ids"]
    if ours != theirs:
        raise ConfigError(
            f"student and {name} tokenize differently (the same text gives {len(ours)} and {len(theirs)} tokens, "
            f"{where_they_part(ours, theirs)}): the {name} could not score the student's tokens. {family}"
        )
    for special in SPECIALS:
        if getattr(student, special) != getattr(teacher, special):
            raise ConfigError(
                f"{special} is {getattr(student, special)} in the student's tokenizer and {getattr(teacher, special)} in "
                f"the {name}'s; give both the same (a base and a chat model of one family often differ here)"
            )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, models: dict[str, PreTrainedModel]) -> None:
    """Every id of the tokenizer has a logit in each model; heads may be padded beyond it.

    A head may lack special tokens that end nothing, as Gemma 3's small models lack <image_soft_token>: no text has them,
    and `check_room` and `check_given` refuse rows that do.
    """
    ends = [getattr(tokenizer, name) for name in SPECIALS]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special and token not in ends}
    highest = max(text_tokens(tokenizer).keys() - special)
    for name, model in models.items():
        rows = _head_rows(model)
        if rows <= highest:
            raise ConfigError(
                f"the {name}'s head has {rows} rows but the tokenizer has ids up to {highest}; resize the model's "
                f"embeddings (model.resize_token_embeddings) or use its own tokenizer"
            )


def check_top_k(k: int, tokenizer: PreTrainedTokenizerBase, setting: str) -> None:
    if k > (known := vocabulary(tokenizer)):
        raise ConfigError(f"{setting} is {k}, more than the {known} ids of the tokenizer; lower it")


def check_chat(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    prompts: Sequence[EncodedPrompt],
    name: str = "teacher",
) -> None:
    """The teacher was trained on the same chat format, where prompts are chats or text is made one."""
    if teacher.chat_template is None or student.chat_template == teacher.chat_template:
        return
    template = None
    for row, chat in ((prompt.row, prompt.chat) for prompt in prompts if prompt.chat is not None):
        template = template or ChatTemplate(teacher, chat.variables)
        ours = chat.prompt(row)
        try:
            theirs = template.render(row.turns, row.tools, to_answer=True)
        except Refusal as error:
            raise ConfigError(f"{row.source}: of the {name}, {error}; give student and {name} one template") from error
        if ours != theirs:
            raise ConfigError(
                f"the chat templates of student and {name} differ: {ours[:80]!r}… and {theirs[:80]!r}…; the {name} "
                f"would judge a format it does not know. Copy the {name}'s chat_template into the student's tokenizer"
                f"{OWN_TOKENIZER.format(name) * (name == 'teacher')}"
            )


def check_end_of_sequence(
    student: PreTrainedModel, teacher: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase, name: str = "teacher"
) -> None:
    """Where the student stops, a teacher that is loaded here can stop; a model that declares no end has the tokenizer's.

    The student also stops where the chat template ends a turn.
    """
    if not end_of_sequence(student, tokenizer):
        raise ConfigError("neither the student nor its tokenizer declares an end-of-sequence token; set eos_token_id")
    if teacher is None:
        return
    ours, theirs = (declared_ends(model) or tokenizer_ends(tokenizer) for model in (student, teacher))
    ours = sorted({*ours, *([] if (turn_end := end_of_turn(tokenizer)) is None else [turn_end])})
    if not set(ours) & set(theirs):
        raise ConfigError(f"the student ends with ids {ours} and the {name} with {theirs}; give them a common one")


def check_room(prompts: Prompts, max_new_tokens: int | Array, models: dict[str, PreTrainedModel], remedy: str) -> None:
    """Every prompt and its completion (a full one, or one of the given length) fit every model's context."""
    lengths = prompts.ids.lengths
    if not lengths.all():
        empty = prompts[int(lengths.argmin())].row.source
        raise ConfigError(f"{empty} is an empty prompt; a completion needs at least one token before it")
    _check_ids(prompts, prompts.ids, models)
    check_length(prompts, max_new_tokens, {name: context_length(model) for name, model in models.items()}, remedy)


def check_length(prompts: Prompts, max_new_tokens: int | Array, limits: dict[str, int | None], remedy: str) -> None:
    """As `check_room`, of models by the lengths of their contexts; None: there is no limit."""
    wholes = prompts.ids.lengths + max_new_tokens
    longest = prompts[int(wholes.argmax())]
    length, whole = len(longest.tokens), int(wholes.max())
    for name, limit in limits.items():
        if limit is not None and whole > limit:
            raise ConfigError(
                f"{longest.row.source} has {length} tokens; with {whole - length} new ones it exceeds the {name}'s context "
                f"of {limit}. {remedy}"
            )


def check_one_rope(lengths: Array, max_new_tokens: int, models: dict[str, PreTrainedModel]) -> None:
    """No model computes otherwise while a text grows, nor for the batch it is in: all texts are on one side of a switch.

    `lengths` are those of the prompts.
    """
    for name, model in models.items():
        switch = rope_switch(model.config.get_text_config())
        if switch is None or not len(lengths) or (shortest := lengths.min()) > switch:
            continue
        if (longest := lengths.max() + max_new_tokens) > switch:
            raise ConfigError(
                f"the {name} rotates positions otherwise in a batch longer than {switch} tokens (rope_type longrope), and "
                f"texts have {shortest} to {longest} tokens: what is sampled and what is scored would be "
                f"two distributions. Keep prompts and sampling.max_new_tokens within {switch} together, with "
                f"max_prompt_tokens of the data, or take prompts that are all longer"
            )


def check_given(given: Given, models: dict[str, PreTrainedModel]) -> None:
    """The data's own completions, one for each prompt, fit every model's context, and it knows their tokens."""
    check_room(given.prompts, given.completions.lengths, models, SHORTER_ROW)
    _check_ids(given.prompts, given.completions, models)


def _check_ids(prompts: Prompts, ids: Ragged, models: dict[str, PreTrainedModel]) -> None:
    """All ids, of which each list belongs to a prompt, are below the rows of every head."""
    highest, place = ids.highest()
    for name, model in models.items():
        if highest >= (known := _head_rows(model)):
            raise ConfigError(
                f"{prompts[place].row.source} has a token with the id {highest}, which the {name} lacks: its head has "
                f"{known} rows. Take the token out of the row"
            )


def _head_rows(model: PreTrainedModel) -> int:
    rows: int = model.get_output_embeddings().weight.shape[0]
    return rows
