"""Who reads a teacher's prompts: by which tokenizer, and in which format."""

from __future__ import annotations

from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from fastkl.trainer.data.chat import ChatTemplate
from fastkl.trainer.data.prompts import EncodedPrompt


class Reader(NamedTuple):
    """A teacher with the student's tokenizer, or with its own."""

    tokenizer: PreTrainedTokenizerBase
    own: bool = False  # the tokenizer is not the student's
    template: ChatTemplate | None = None  # its own; None: the student's, or there are no chats

    def chat(self, prompt: EncodedPrompt) -> ChatTemplate | None:
        """What writes the teacher's chat; None: the student's prompt is a text and no chat."""
        return None if prompt.chat is None else self.template or prompt.chat
