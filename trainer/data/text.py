"""Texts as token ids: with the special tokens that stand first, and cut where a prompt ends."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_PROBE = "text"


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], begin: Sequence[bool] | None = None
) -> list[list[int]]:
    """Ids of texts. What the tokenizer puts first (a BOS) stands before those that are to `begin`, once.

    What it puts last (an end of sequence) is left out.
    """
    if not texts:
        return []
    first = _special_before(tokenizer) if begin is not None else []
    if first:  # white space before a BOS would hide it
        spelled = tokenizer.convert_ids_to_tokens(first[0])
        texts = [text.lstrip() if text.lstrip().startswith(spelled) else text for text in texts]
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    if begin is None:
        return encoded
    return [
        [*first, *ids] if begins and ids[: len(first)] != first else ids
        for ids, begins in zip(encoded, begin, strict=True)
    ]


def continuation_ids(
    tokenizer: PreTrainedTokenizerBase, heads: Sequence[list[int]], wholes: Sequence[list[int]], texts: Sequence[str]
) -> list[list[int]]:
    """Ids of texts that follow `heads`: those of the whole text after the ids of its head.

    Where a token would reach over the seam, the two are encoded apart, as a model that has read the head writes it.
    """
    found = [
        whole[len(head) :] if whole[: len(head)] == head else None for head, whole in zip(heads, wholes, strict=True)
    ]
    apart = iter(encode(tokenizer, [text for text, ids in zip(texts, found, strict=True) if ids is None]))
    return [next(apart) if ids is None else ids for ids in found]


def _special_before(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before a text."""
    whole, bare = (tokenizer(_PROBE, add_special_tokens=special)["input_ids"] for special in (True, False))
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return list(whole[:start])
    return []
