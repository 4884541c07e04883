"""What stands packed or end to end in memory reads as a list of it does."""

from __future__ import annotations

import dataclasses
import tracemalloc
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_models import tokenizer

from fastkl.trainer.config.data import DataConfig
from fastkl.trainer.data.arrays import Ragged
from fastkl.trainer.data.formats.packed import BLOCK, EndToEnd, Packed
from fastkl.trainer.data.prompts import EncodedPrompt, Prompts, encode_completions, encode_prompts, given_samples
from fastkl.trainer.data.rows import Prompt
from fastkl.trainer.data.samples import make_sample

TOGETHER = 64  # rows that are more than one block
COUNTS = [0, 1, TOGETHER, 5 * TOGETHER + 3]
SLICES = [slice(None), slice(1, None), slice(None, -2), slice(40, 20, -3), slice(90, 95)]


def rows(count: int) -> list[Prompt]:
    chat: list[dict[str, Any]] = [{"role": "user", "content": "1+1="}]
    prompts = [chat if line % 3 else f"{line}+1=" for line in range(count)]
    some = [Prompt(f"d:{line}", prompt, f"{line}", metadata={"n": line}) for line, prompt in enumerate(prompts)]
    return [dataclasses.replace(row, answer="7" * (2 * BLOCK // TOGETHER)) for row in some]


@pytest.mark.parametrize("count", COUNTS)
def test_rows_and_sequences_of_them(count: int) -> None:
    plain = rows(count)
    packed, halves = Packed(plain), EndToEnd([Packed(plain[: count // 2]), Packed(), plain[count // 2 :]])
    for found in (packed, halves):
        assert [*found] == plain
        assert [found[place] for place in reversed(range(count))] == plain[::-1]  # whatever was unpacked before
        assert [found[some] for some in SLICES] == [plain[some] for some in SLICES]
        for outside in (count, -count - 1):
            with pytest.raises(IndexError):
                found[outside]


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=5), min_size=1, max_size=20))
@example([[], [0]])
def test_ragged_lists(lists: list[list[int]]) -> None:
    ragged = Ragged()
    for each in lists:
        ragged.append(each)
    assert [ragged[place].tolist() for place in range(len(ragged))] == lists
    assert ragged.lengths.tolist() == [len(each) for each in lists]
    assert ragged.longest() == max(lists, key=len)
    highest = max((max(each) for each in lists if each), default=-1)
    assert ragged.highest() == (highest, next((place for place, each in enumerate(lists) if highest in each), 0))


def test_prompts_and_given_completions_are_those_of_single_rows() -> None:
    words, count = tokenizer(), TOGETHER + 5
    plain = [Prompt(row.source, row.prompt, completion="2" * (1 + line % 4)) for line, row in enumerate(rows(count))]
    config = DataConfig(chat_template=False, max_prompt_tokens=5)
    found = encode_prompts(Packed(plain), words, config, dataset="sums", first=7)
    alone = [encode_prompts([row], words, DataConfig(chat_template=False))[0] for row in plain]
    short = [prompt for prompt in alone if len(prompt.tokens) <= 5]
    assert 0 < len(short) < count
    assert [(p.row, p.ids, p.index, p.dataset) for p in found] == [
        (p.row, p.ids, index, "sums") for index, p in enumerate(short, start=7)
    ]
    given = given_samples(found, words)
    completions = [encode_completions([prompt], words)[0] for prompt in found]
    wanted = [make_sample(p.ids, own, p.index, dataset="sums") for p, own in zip(found, completions, strict=True)]
    assert [sample.ids.tolist() for sample in given] == [sample.ids.tolist() for sample in wanted]
    assert [sample.loss_mask.tolist() for sample in given] == [sample.loss_mask.tolist() for sample in wanted]
    assert [sample.prompt_index for sample in given] == [sample.prompt_index for sample in wanted]
    assert given.lengths.tolist() == [len(sample.ids) for sample in wanted]


def test_a_prompt_takes_few_bytes_beyond_its_ids() -> None:
    """What many prompts hold, of a text of 256 characters and 64 ids."""
    count, ids = 4096, [*range(64)]
    plain = [Prompt(f"d:{line}", f"{line:0256}", f"{line}", metadata={"level": 1}) for line in range(count)]
    tracemalloc.start()
    packed = Prompts(Packed(plain))
    for place in range(count):
        packed.add(place, ids, None)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert packed[count - 1] == EncodedPrompt(plain[-1], packed.ids[count - 1], count - 1)
    assert held / count < 2 * len(ids) * 17 / 16 + 80
