"""From rows to token ids: prompts, and the completions that the data give."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from fastkl.trainer.config.data import DataConfig
from fastkl.trainer.data.arrays import Array, Ragged
from fastkl.trainer.data.chat import ChatTemplate, chat_template
from fastkl.trainer.data.formats.packed import OnDemand
from fastkl.trainer.data.replies import reply_text, text_reply
from fastkl.trainer.data.rows import Prompt
from fastkl.trainer.data.samples import Sample, make_sample
from fastkl.trainer.data.text import continuation_ids, encode
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.notes import Count

T = TypeVar("T")

AT_ONCE = 1024  # prompts that are encoded together


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A row of a data set as token ids, ready for the completion."""

    row: Prompt
    tokens: Sequence[int]
    index: int = 0  # among the rows of the run's data; of several data sets, all of them end to end
    dataset: str = ""  # which data set of a mixture
    chat: ChatTemplate | None = None  # what wrote it; None: it is a text of its own

    @property
    def ids(self) -> list[int]:
        return list(self.tokens)


class Prompts(OnDemand[EncodedPrompt]):
    """Prompts of a data set.

    Args:
        rows: Where they come from.
        first: The index of the first one.
        dataset: Which data set of a mixture.
    """

    def __init__(self, rows: Sequence[Prompt], *, first: int = 0, dataset: str = "") -> None:
        self.first, self.dataset, self.ids = first, dataset, Ragged()
        self._rows, self._places = rows, array("i")
        self._chats, self._chat_numbers = list[ChatTemplate | None](), array("H")

    def add(self, place: int, ids: Sequence[int], chat: ChatTemplate | None) -> None:
        """The row at this place, encoded."""
        self._places.append(place)
        self.ids.append(ids)
        if chat not in self._chats:
            self._chats.append(chat)
        self._chat_numbers.append(self._chats.index(chat))

    def __len__(self) -> int:
        return len(self._places)

    def at(self, place: int) -> EncodedPrompt:
        row, chat = self._rows[self._places[place]], self._chats[self._chat_numbers[place]]
        return EncodedPrompt(row, self.ids[place], self.first + place, self.dataset, chat)

    @property
    def chats(self) -> dict[ChatTemplate | None, None]:
        """What wrote them."""
        return dict.fromkeys(self._chats)


class Given(OnDemand[Sample]):
    """The data's own completions as samples, one for each prompt."""

    def __init__(self, prompts: Prompts, completions: Ragged) -> None:
        self.prompts, self.completions = prompts, completions

    def __len__(self) -> int:
        return len(self.prompts)

    def at(self, place: int) -> Sample:
        prompt, own = self.prompts, self.completions[place]
        return make_sample(prompt.ids[place], own, prompt.first + place, dataset=prompt.dataset)

    @property
    def lengths(self) -> Array:
        """[n] int64, with the prompts."""
        lengths: Array = self.prompts.ids.lengths + self.completions.lengths
        return lengths

    def longest(self) -> list[int]:
        """The ids of the longest sample."""
        ids: list[int] = self[int(self.lengths.argmax())].ids.tolist()
        return ids


def encode_prompts(
    rows: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    dataset: str = "",
    first: int = 0,
) -> Prompts:
    """Prompts as token ids, without those longer than `max_prompt_tokens`; `first` is the index of the first one.

    Messages go through the chat template, and so does text, as a user's turn, if `chat_template` asks for it. The template
    writes its special tokens itself; to a plain text the tokenizer adds those that it puts first (a BOS, say).
    """

    def is_chat(row: Prompt) -> bool:
        return config.chat_template or not isinstance(row.prompt, str)

    first_chat = next(filter(is_chat, rows), None)
    template = None if first_chat is None else chat_template(first_chat.source, tokenizer, config.template_kwargs)
    if template is None and config.template_kwargs:
        raise ConfigError(
            f"data.template_kwargs is {config.template_kwargs}, but {config.path or config.dataset} holds no chats and "
            f"data.chat_template is false; unset it"
        )
    encoded = Prompts(rows, first=first, dataset=dataset)
    place = 0
    for piece in in_pieces(rows, "encoded"):
        chats = [template if is_chat(row) else None for row in piece]
        texts = [str(row.prompt) if chat is None else chat.prompt(row) for row, chat in zip(piece, chats, strict=True)]
        all_ids = encode(tokenizer, texts, [chat is None for chat in chats])
        for ids, chat in zip(all_ids, chats, strict=True):
            if config.max_prompt_tokens is None or len(ids) <= config.max_prompt_tokens:
                encoded.add(place, ids, chat)
            place += 1
    if not encoded:
        raise ConfigError(
            f"data.max_prompt_tokens is {config.max_prompt_tokens}, and none of the {len(rows)} prompts of "
            f"{config.path or config.dataset} is as short as that"
        )
    return encoded


def in_pieces(items: Sequence[T], title: str) -> Iterator[Sequence[T]]:
    """Those that are worked on together; where there are many, it is shown how far that has come."""
    with Count(title, len(items)) if len(items) > AT_ONCE else nullcontext() as count:
        for start in range(0, len(items), AT_ONCE):
            yield items[start : start + AT_ONCE]
            if count is not None:
                count.at(min(start + AT_ONCE, len(items)))


def encode_completions(prompts: Sequence[EncodedPrompt], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of the given completions, each with its end; what is truncated stands as it is, without one.

    In a chat they are what the template writes for the assistant's turn, up to its end; after a text, and where a template
    ends turns without a special token, the tokenizer's end of sequence follows. A completion that has its end already gets
    no second one.
    """
    for prompt in prompts:
        if prompt.row.completion is None:
            raise ConfigError(f"{prompt.row.source}: no `completion`; each row needs one here")
    befores = [str(p.row.prompt) if p.chat is None else p.chat.prompt(p.row) for p in prompts]
    plain = ChatTemplate(tokenizer)
    afters = [_after(prompt, before, plain) for prompt, before in zip(prompts, befores, strict=True)]
    texts = [before + after for before, after in zip(befores, afters, strict=True)]
    wholes = encode(tokenizer, texts, [p.chat is None for p in prompts])
    completions = continuation_ids(tokenizer, [p.ids for p in prompts], wholes, afters)
    ends = tokenizer.convert_tokens_to_ids(list(plain.ends))
    for prompt, completion in zip(prompts, completions, strict=True):
        ended = bool(completion) and completion[-1] in ends
        if not ended and not prompt.row.truncated and tokenizer.eos_token_id is not None:
            completion.append(tokenizer.eos_token_id)
        if not completion:
            raise ConfigError(f"{prompt.row.source}: `completion` has no tokens; take the row out")
    return completions


def _after(prompt: EncodedPrompt, before: str, plain: ChatTemplate) -> str:
    """The text of the completion after that of the prompt."""
    if prompt.row.truncated:
        return prompt.row.completion or ""
    return text_reply(plain, prompt.row) if prompt.chat is None else reply_text(prompt.chat, prompt.row, before)


def given_samples(prompts: Prompts, tokenizer: PreTrainedTokenizerBase) -> Given:
    """The data's own completions as samples, in the order of the rows."""
    completions = Ragged()
    for piece in in_pieces(prompts, "completions encoded"):
        for ids in encode_completions(piece, tokenizer):
            completions.append(ids)
    return Given(prompts, completions)
