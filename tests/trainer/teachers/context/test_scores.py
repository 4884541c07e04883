"""Samples whose teacher has a prompt of its own: scored as a plain forward pass of that prompt and the completion does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from property_settings import PROPERTY
from stub_server import serving
from tiny_models import llama, tokenizer
from torch import Tensor

from fastkl.head import fuse
from fastkl.trainer.config.teacher import TeacherConfig, TeacherServerConfig
from fastkl.trainer.data.batching import Layout, in_order
from fastkl.trainer.data.samples import Sample, make_sample
from fastkl.trainer.models.sizes.flops import cost_of, scoring_flops
from fastkl.trainer.teachers.local import LocalTeacher
from fastkl.trainer.teachers.served import connect
from fastkl.trainer.teachers.several import RoutedTeacher

CPU = torch.device("cpu")
WORDS = len(tokenizer())
MODEL = llama(WORDS, seed=1, tie_word_embeddings=False).requires_grad_(False)


def samples() -> list[Sample]:
    """Prompts of all lengths, one sample whose teacher reads what the student reads, one with an environment's reply."""
    found = [make_sample([5, 6, 7], [8, 9, 10, 0], 0), make_sample([5], [11, 12], 1), make_sample([9, 9], [4, 7, 0], 2)]
    found.append(make_sample([6, 6, 8, 9], [12, 13, 14, 15, 16], 3))
    found[3].loss_mask[6:8] = [False, False]
    for sample, prompt in zip(found, ([20, 21], [22, 23, 24, 25, 5], None, [7]), strict=True):
        sample.teacher_prompt = prompt
    return found


def routed(
    layout: Layout, max_tokens: int = 16384, temperature: float = 0.7, **options: Any
) -> RoutedTeacher[LocalTeacher]:
    return RoutedTeacher({"": LocalTeacher(fuse(MODEL), layout, max_tokens, temperature, CPU, **options)})


def plain(sample: Sample, prompt: Sequence[int]) -> Tensor:
    """Log-probs [n, V] of the places of the tokens that count, in float64."""
    completion = sample.ids[sample.prompt_length :].tolist()
    with torch.no_grad():
        logits = MODEL(torch.tensor([[*prompt, *completion]])).logits[0].double() / 0.7
    counted = [len(prompt) + at for at, bit in enumerate(sample.loss_mask[sample.prompt_length :]) if bit]
    return logits.log_softmax(-1)[torch.tensor(counted) - 1]


def counted(sample: Sample, field: str) -> list[Any]:
    values = getattr(sample, field)
    assert len(values) == len(sample.ids)
    assert not any(value for value, bit in zip(values, sample.loss_mask, strict=True) if not bit)
    return [value for value, bit in zip(values.tolist(), sample.loss_mask, strict=True) if bit]


@pytest.mark.parametrize("max_tokens", [16384, 12])
@pytest.mark.parametrize("layout", ["packed", "padded", "single"])
def test_everything_that_a_teacher_says(layout: Layout, max_tokens: int) -> None:
    teacher, given = routed(layout, max_tokens, top_k=3), samples()
    teacher.score(given)
    teacher.rank(given, WORDS)
    teacher.score_plain(given)
    hidden = teacher.by_data_set[""].head([sample.for_teacher() for sample in given], CPU)
    whole = ((hidden.hidden @ hidden.weight.T).double() / 0.7).log_softmax(-1).split([s.loss_tokens for s in given])
    for sample, distributions in zip(given, whole, strict=True):
        own = sample.ids[: sample.prompt_length]
        wanted = plain(sample, own if sample.teacher_prompt is None else sample.teacher_prompt)
        tokens = torch.tensor([t for t, bit in zip(sample.ids.tolist(), sample.loss_mask, strict=True) if bit])[:, None]
        found = wanted.gather(1, tokens)[:, 0].tolist()
        assert counted(sample, "teacher_logprobs") == pytest.approx(found, abs=1e-5)
        assert counted(sample, "teacher_ranks") == (1 + (wanted > wanted.gather(1, tokens)).sum(1)).tolist()
        torch.testing.assert_close(distributions, wanted, atol=1e-5, rtol=0)
        assert sample.teacher_top_k is not None
        assert sample.teacher_top_k.ids.tolist() == wanted.topk(3).indices.tolist()
        if sample.teacher_prompt is None:
            assert len(sample.plain_logprobs) == 0
        else:
            without = plain(sample, own).gather(1, tokens)[:, 0].tolist()
            assert counted(sample, "plain_logprobs") == pytest.approx(without, abs=1e-5)


def test_lists_of_the_student_are_scored_where_the_teacher_reads() -> None:
    given = samples()
    for sample in given:
        sample.student_top_k = torch.arange(4).repeat(sample.loss_tokens, 1)
    routed("padded").score(given)
    for sample in given:
        wanted = plain(
            sample, sample.ids[: sample.prompt_length] if sample.teacher_prompt is None else sample.teacher_prompt
        )[:, :4]
        assert sample.teacher_top_k is not None
        torch.testing.assert_close(sample.teacher_top_k.logprobs.double(), wanted, atol=1e-5, rtol=0)


def test_flops_are_of_what_is_read() -> None:
    given = samples()
    read = [sample.for_teacher() for sample in given]
    found = routed("padded").flops(given)["flops/teacher"]
    assert found == scoring_flops(cost_of(MODEL), read)
    assert [len(sample.ids) for sample in read] == [6, 7, 5, 6]


def test_a_server_says_the_same(untied: Path) -> None:
    here, there = samples(), samples()
    routed("padded", temperature=1.0, top_k=3).score(here)
    with serving(untied) as stub:
        config = TeacherConfig(server=TeacherServerConfig(url=stub.url, model="stub", sequences_per_request=2))
        server = connect(config, tokenizer(), temperature=1.0, longest=[3] * 20, remedy="", top_k=3)
        RoutedTeacher({"": server}).score(there)
    for ours, theirs in zip(here, there, strict=True):
        assert ours.teacher_logprobs == pytest.approx(theirs.teacher_logprobs, abs=1e-4)
        assert ours.teacher_top_k is not None
        assert theirs.teacher_top_k is not None
        assert ours.teacher_top_k.ids.sort().values.tolist() == theirs.teacher_top_k.ids.sort().values.tolist()


@PROPERTY
@given(st.data())
def test_the_tokens_that_count_are_the_same(data: st.DataObject) -> None:
    """In number, order and id, whatever stands between them; what is written is beside the tokens it is of."""
    ids = st.lists(st.integers(0, 99), min_size=1, max_size=9)
    prompt, completion, own = (data.draw(ids) for _ in range(3))
    sample = make_sample(prompt, completion, 0, [-1.0] * len(completion))
    mask = data.draw(st.lists(st.booleans(), min_size=len(completion), max_size=len(completion)))
    sample.loss_mask[len(prompt) :] = mask
    sample.teacher_prompt = own
    read = sample.for_teacher()
    assert read.ids.tolist() == own + completion
    assert [t for t, bit in zip(read.ids.tolist(), read.loss_mask, strict=True) if bit] == [
        t for t, bit in zip(sample.ids, sample.loss_mask, strict=True) if bit
    ]
    assert len(read.sampler_logprobs) == 0
    read.teacher_logprobs = [float(token) * bit for token, bit in zip(read.ids, read.loss_mask, strict=True)]
    sample.take_scores(read)
    assert sample.teacher_logprobs.tolist() == [
        float(t) * bit for t, bit in zip(sample.ids, sample.loss_mask, strict=True)
    ]
    assert sample.teacher_prompt.tolist() == own
    assert sample.sampler_logprobs[len(prompt) :].tolist() == [-1.0] * len(completion)


@PROPERTY
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.sampled_from(["packed", "padded", "single"]))
def test_batches_in_order(lengths: list[int], layout: Layout) -> None:
    given = [make_sample([1], [2] * length, index) for index, length in enumerate(lengths)]
    found = in_order(given, 16, layout, CPU)
    assert [sample for batch in found for sample in batch.samples] == given
    for batch in found:
        fits = layout != "single" and batch.inputs["input_ids"].numel() <= 16
        assert fits or len(batch.samples) == 1
