"""What the recipe reads: the demo's sums, and tiny models of them with two tokenizers.

    python recipes/tokenizers/make.py

`letters` is the demo's tokenizer: a token for each digit and sign. `pairs` has a token for any two characters in a row, and
takes a text two by two. So the two seldom agree about where a token ends.
"""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path

HERE, DATA = Path(__file__).parent, Path("runs/tokenizers/data")
sys.path.insert(0, str(HERE.parent / "demo"))

from arithmetic import INSTRUCTION, write_data, write_model  # noqa: E402
from making import make_tokenizer, write_llama  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

CHARACTERS = "0123456789+-= \n"
LAYERS = {"teacher": 3, "student": 2}


def main() -> None:
    if (DATA / "done").exists():
        return
    write_data(DATA)
    for role, layers in LAYERS.items():
        write_model(DATA / "letters" / role, layers)
        write_llama(DATA / "pairs" / role, pairs(), width=96, layers=layers)
    (DATA / "done").touch()


def pairs() -> PreTrainedTokenizerFast:
    """One token for the instruction, and one for every one or two characters."""
    two = map("".join, itertools.product(CHARACTERS, CHARACTERS))
    pattern = re.escape(INSTRUCTION).replace("\\ ", " ") + r"|[-+= \n0-9]{1,2}"
    return make_tokenizer([INSTRUCTION, *CHARACTERS, *two], pattern)


if __name__ == "__main__":
    main()
