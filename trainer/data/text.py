"""Texts as token ids: with the special tokens that stand first, and cut where a prompt ends."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_PROBE = "text"


def prompt_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], plain: Sequence[bool]) -> list[list[int]]:
    """Ids of texts that a completion follows; what the tokenizer puts first (a BOS) stands before the plain ones, once.

    What it puts last (an end of sequence) is left out.
    """
    if not texts:
        return []
    first = _special_before(tokenizer)
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [
        [*first, *ids] if alone and ids[: len(first)] != first else list(ids)
        for ids, alone in zip(encoded, plain, strict=True)
    ]


def continuation_ids(
    tokenizer: PreTrainedTokenizerBase, befores: Sequence[str], afters: Sequence[str]
) -> list[list[int]]:
    """Ids of texts that follow others: those of the whole text after the ids of its beginning.

    Where a token would reach over the seam, the two are encoded apart, as a model that has read the beginning writes it.
    """
    if not befores:
        return []
    wholes = [before + after for before, after in zip(befores, afters, strict=True)]
    heads, ids, apart = (
        tokenizer(list(texts), add_special_tokens=False)["input_ids"] for texts in (befores, wholes, afters)
    )
    return [
        list(whole[len(head) :]) if whole[: len(head)] == head else list(alone)
        for head, whole, alone in zip(heads, ids, apart, strict=True)
    ]


def _special_before(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before a text."""
    whole, bare = (tokenizer(_PROBE, add_special_tokens=special)["input_ids"] for special in (True, False))
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return list(whole[:start])
    return []
