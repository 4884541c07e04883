"""From rows to token ids: prompts, and the completions that the data give."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from fastkl.trainer.config.data import DataConfig
from fastkl.trainer.data.chat import ChatTemplate, chat_template
from fastkl.trainer.data.replies import reply_text, text_reply
from fastkl.trainer.data.rows import Prompt
from fastkl.trainer.data.samples import Sample, make_sample
from fastkl.trainer.data.text import continuation_ids, encode
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.notes import Count

AT_ONCE = 8192  # prompts that are encoded together


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A row of a data set as token ids, ready for the completion."""

    row: Prompt
    tokens: Sequence[int]  # of a data set, arrays: a run holds all of it
    index: int = 0  # among the rows of the run's data; of several data sets, all of them end to end
    dataset: str = ""  # which data set of a mixture
    chat: ChatTemplate | None = None  # what wrote it; None: it is a text of its own

    @property
    def ids(self) -> list[int]:
        return list(self.tokens)


def encode_prompts(
    prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase, config: DataConfig, *, dataset: str = "", first: int = 0
) -> list[EncodedPrompt]:
    """Prompts as token ids, without those longer than `max_prompt_tokens`; `first` is the index of the first one.

    Messages go through the chat template, and so does text, as a user's turn, if `chat_template` asks for it. The template
    writes its special tokens itself; to a plain text the tokenizer adds those that it puts first (a BOS, say).
    """
    chats = [row for row in prompts if config.chat_template or not isinstance(row.prompt, str)]
    template = chat_template(chats[0].source, tokenizer, config.template_kwargs) if chats else None
    if template is None and config.template_kwargs:
        raise ConfigError(
            f"data.template_kwargs is {config.template_kwargs}, but {config.path or config.dataset} holds no chats and "
            f"data.chat_template is false; unset it"
        )
    encoded: list[EncodedPrompt] = []
    for rows in _pieces(prompts):
        templates = [template if config.chat_template or not isinstance(row.prompt, str) else None for row in rows]
        pairs = list(zip(rows, templates, strict=True))
        texts = [str(row.prompt) if chat is None else chat.prompt(row) for row, chat in pairs]
        ids = encode(tokenizer, texts, [chat is None for chat in templates])
        for (row, chat), tokens in zip(pairs, ids, strict=True):
            if config.max_prompt_tokens is None or len(tokens) <= config.max_prompt_tokens:
                encoded.append(EncodedPrompt(row, array("i", tokens), first + len(encoded), dataset, chat))
    if not encoded:
        raise ConfigError(
            f"data.max_prompt_tokens is {config.max_prompt_tokens}, and none of the {len(prompts)} prompts of "
            f"{config.path or config.dataset} is as short as that"
        )
    return encoded


def _pieces(prompts: list[Prompt]) -> Iterator[list[Prompt]]:
    """Prompts that are encoded together; where there are many, it is shown how far that has come."""
    with Count("encoded", len(prompts)) if len(prompts) > AT_ONCE else nullcontext() as count:
        for start in range(0, len(prompts), AT_ONCE):
            yield prompts[start : start + AT_ONCE]
            if count is not None:
                count.at(min(start + AT_ONCE, len(prompts)))


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


def given_samples(prompts: list[EncodedPrompt], tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
    """The data's own completions as samples, in the order of the rows."""
    pairs = zip(prompts, encode_completions(prompts, tokenizer), strict=True)
    return [make_sample(prompt.ids, ids, prompt.index, dataset=prompt.dataset) for prompt, ids in pairs]
