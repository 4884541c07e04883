"""What is asked of every tokenizer: its vocabulary, and what it makes of a text that is hard to split."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

SAMPLE_TEXT = "The quick brown fox: 3.14 + 2 = 5,14!\n\tdéjà vu — 日本語 🙂 def f(x): return x ** 2"


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> int:
    """The ids of a tokenizer are those below this one."""
    highest: int = max(tokenizer.get_vocab().values())
    return highest + 1
