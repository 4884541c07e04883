"""What a server calls the tokens that it scored, beside what the tokenizer makes of the ids that were sent."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from fastkl.trainer.models.tokenizers import added_tokens
from fastkl.trainer.servers.answers import TOKEN_ID


class TokenTexts:
    """The texts of a tokenizer's ids, for comparison with a server's."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._added = tokenizer, set(added_tokens(tokenizer))
        self._own: dict[int, str] = {}

    def told(self, ids: Sequence[int], texts: Sequence[str | None]) -> list[tuple[int, str, str]]:
        """Each id with its text here and there; white space, parts of characters and what is untold do not count."""
        pairs = ((token, self._text(token), text.strip()) for token, text in zip(ids, texts, strict=True) if text)
        return [(token, ours, theirs) for token, ours, theirs in pairs if ours and ours.isascii()]

    def differing(self, ids: Sequence[int], texts: Sequence[str | None]) -> list[tuple[int, str, str]]:
        """Those whose texts are not the same."""
        return [entry for entry in self.told(ids, texts) if entry[2] not in (entry[1], f"{TOKEN_ID}{entry[0]}")]

    def differing_words(self, ids: Sequence[int], texts: Sequence[str | None]) -> list[tuple[int, str, str]]:
        """The same without added tokens, and without what a server adds to a token of a character that is not whole."""
        differing = self.differing(ids, texts)
        return [entry for entry in differing if entry[0] not in self._added and "\ufffd" not in entry[2]]

    def _text(self, token: int) -> str:
        if token not in self._own:
            self._own[token] = self._tokenizer.decode([token]).strip()
        return self._own[token]
