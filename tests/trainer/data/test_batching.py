"""From samples to tensors and back: the same numbers whatever the layout and however many tokens share a forward."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from property_settings import PROPERTY
from tiny_models import causal_lm
from torch import Tensor

from fastkl.head import fuse
from fastkl.loss import policy_gradient_loss
from fastkl.trainer.data.batching import Batch, Layout, batches, collate, first_fit
from fastkl.trainer.data.samples import UNKNOWN, Sample, make_sample
from fastkl.trainer.errors import RunError
from fastkl.trainer.teachers.local import LocalTeacher

LAYOUTS: list[Layout] = list(get_args(Layout))
CPU = torch.device("cpu")
FUSED = {  # sliding windows must not look across sequences either
    kind: fuse(causal_lm(kind, sliding_window=4) if kind == "mistral" else causal_lm(kind))
    for kind in ("llama", "qwen3", "mistral", "gemma3_text")
}
lengths = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=7)


def make_samples(pairs: list[tuple[int, int]], seed: int = 0) -> list[Sample]:
    """Samples with so many prompt and completion tokens, all values different."""
    draw = random.Random(seed)
    samples = []
    for index, (prompt, completion) in enumerate(pairs):
        ids = [draw.randrange(3, 64) for _ in range(prompt + completion)]
        sample = make_sample(ids[:prompt], ids[prompt:], index, [-draw.random() for _ in range(completion)])
        sample.advantages = [0.0] * prompt + [draw.gauss(0, 1) for _ in range(completion)]
        samples.append(sample)
    return samples


def multi_turn(sample: Sample) -> Sample:
    """Every third completion token comes from the environment: context, but not counted."""
    sample.loss_mask = [counted and place % 3 != 0 for place, counted in enumerate(sample.loss_mask)]
    return sample


def alone(model: torch.nn.Module, sample: Sample, temperature: float = 1.0) -> Tensor:
    """Log-probs of a sample's counted tokens from all the logits of a forward pass of its own."""
    ids = torch.tensor(sample.ids).long()[None]
    scores = torch.log_softmax(model(ids).logits[0, :-1] / temperature, -1)
    scores = scores.gather(1, ids[0, 1:, None])[:, 0]
    return scores[torch.tensor(sample.loss_mask[1:])]


def scored(samples: list[Sample], layout: Layout, max_tokens: int, kind: str = "llama") -> list[list[float]]:
    LocalTeacher(FUSED[kind], layout, max_tokens, 0.8, CPU).score(samples)
    return [sample.teacher_logprobs.tolist() for sample in samples]


@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_are_those_of_each_sample_alone(layout: Layout, kind: str) -> None:
    samples = make_samples([(3, 8), (1, 1), (9, 2), (2, 9), (5, 5)])
    for sample, values in zip(samples, scored(samples, layout, 24, kind), strict=True):
        wanted = alone(FUSED[kind].eval(), sample, temperature=0.8).tolist()
        assert values == pytest.approx([0.0] * (len(values) - len(wanted)) + wanted, abs=2e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_environment_tokens_are_context_and_do_not_count(layout: Layout) -> None:
    samples = [multi_turn(sample) for sample in make_samples([(3, 8), (1, 7), (4, 9)])]
    for sample, values in zip(samples, scored(samples, layout, 100), strict=True):
        wanted = alone(FUSED["llama"].eval(), sample, temperature=0.8).tolist()
        assert [v for v, counted in zip(values, sample.loss_mask, strict=True) if counted] == pytest.approx(
            wanted, abs=2e-5
        )
        assert all(v == 0 for v, counted in zip(values, sample.loss_mask, strict=True) if not counted)


@settings(max_examples=15, deadline=None)
@given(pairs=lengths, max_tokens=st.integers(1, 60), layout=st.sampled_from(LAYOUTS))
def test_scores_do_not_depend_on_the_batching(pairs: list[tuple[int, int]], max_tokens: int, layout: Layout) -> None:
    wanted = scored(make_samples(pairs), "padded", 1)  # one sample per forward
    for got, row in zip(scored(make_samples(pairs), layout, max_tokens), wanted, strict=True):
        assert got == pytest.approx(row, abs=2e-5)


def update(samples: list[Sample], layout: Layout, max_tokens: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the policy-gradient step, accumulated over the batches as the trainer does it."""
    model, total = FUSED["llama"], 0.0
    model.train().zero_grad()
    tokens = sum(sample.loss_tokens for sample in samples)
    for batch in batches(samples, max_tokens, layout, CPU):

        def function(hidden: Tensor, weight: Tensor, batch: Batch = batch, **head: Any) -> Tensor:
            return policy_gradient_loss(
                hidden.flatten(0, 1)[batch.rows],
                weight,
                batch.tokens,
                batch.per_token("advantages"),
                batch.per_token("sampler_logprobs"),
                normalizer=tokens,
                **head,
            ).loss

        loss = model(fused=function, **batch.inputs)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@settings(max_examples=10, deadline=None)
@given(pairs=lengths, max_tokens=st.integers(1, 60), layout=st.sampled_from(LAYOUTS))
def test_loss_and_gradients_do_not_depend_on_the_batching(
    pairs: list[tuple[int, int]], max_tokens: int, layout: Layout
) -> None:
    loss, gradients = update(make_samples(pairs), "padded", 1)
    again, found = update(make_samples(pairs), layout, max_tokens)
    assert again == pytest.approx(loss, rel=1e-4, abs=1e-5)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        error, scale = (found[name] - gradient).abs().max(), gradient.abs().max()
        assert error <= 1e-4 * scale + 1e-5, f"{name}: off by {error} at a scale of {scale}"


@given(pairs=lengths, max_tokens=st.integers(1, 60), layout=st.sampled_from(LAYOUTS), seed=st.integers(0, 99))
def test_batches_hold_every_sample_once_within_the_limit(
    pairs: list[tuple[int, int]], max_tokens: int, layout: Layout, seed: int
) -> None:
    samples = [multi_turn(s) if s.prompt_index % 2 else s for s in make_samples(pairs, seed)]
    made = list(batches(samples, max_tokens, layout, CPU))
    assert sorted(s.prompt_index for b in made for s in b.samples) == list(range(len(samples)))
    for batch in made:
        ids = batch.inputs["input_ids"]
        assert ids.numel() <= max_tokens or len(batch.samples) == 1
        flat = ids.flatten()
        assert len(batch.rows) == len(batch.tokens) == sum(s.loss_tokens for s in batch.samples)
        assert torch.equal(flat[batch.rows + 1], batch.tokens)  # the state before a token predicts it
        assert batch.tokens.tolist() == [t for s in batch.samples for t in itertools.compress(s.ids, s.loss_mask)]
        positions = batch.inputs["position_ids"].flatten()[batch.rows + 1].tolist()
        assert positions == [i for s in batch.samples for i, counted in enumerate(s.loss_mask) if counted]
        if layout == "packed":
            assert ids.shape[0] == 1
            assert "attention_mask" not in batch.inputs  # Transformers reads the sequences off the positions
        else:
            assert batch.inputs["attention_mask"].sum(1).tolist() == [len(s.ids) for s in batch.samples]


@given(sizes=st.lists(st.integers(2, 40), min_size=1, max_size=40))
def test_packed_rows_are_well_filled(sizes: list[int]) -> None:
    samples = make_samples([(1, size - 1) for size in sizes])
    made = list(batches(samples, 40, "packed", CPU))
    filled = sorted(batch.inputs["input_ids"].numel() for batch in made)
    assert len(filled) == 1 or filled[0] + filled[1] > 40  # no two would go into one


@given(pairs=lengths, layout=st.sampled_from(LAYOUTS))
def test_scatter_is_the_inverse_of_per_token(pairs: list[tuple[int, int]], layout: Layout) -> None:
    samples = [multi_turn(s) if s.prompt_index % 2 else s for s in make_samples(pairs)]
    for batch in batches(samples, 30, layout, CPU):
        batch.scatter(batch.per_token("advantages"), "teacher_logprobs")
    for sample in samples:
        wanted = [a if counted else 0.0 for a, counted in zip(sample.advantages, sample.loss_mask, strict=True)]
        assert sample.teacher_logprobs == pytest.approx(wanted, rel=1e-6)


def test_a_list_that_is_not_aligned_is_an_error() -> None:
    (sample,) = make_samples([(3, 4)])
    sample.advantages = sample.advantages[:-1]
    (batch,) = batches([sample], 100, "packed", CPU)
    with pytest.raises(ValueError, match="advantages of a sample has 6 entries for 7 tokens"):
        batch.per_token("advantages")


def test_ids_beyond_the_teachers_head_are_unknown_to_it() -> None:
    """Its vocabulary may be padded less than the student's; such a token must not be scored as another one."""
    (sample,) = make_samples([(3, 4)])
    (whole,) = scored([sample], "packed", 100)
    beyond = make_sample(sample.ids[:3], [*sample.ids[3:6], 64 + 5], 0, [0.0] * 4)
    (values,) = scored([beyond], "packed", 100)
    assert values == pytest.approx([*whole[:6], UNKNOWN], abs=1e-5)


def test_what_follows_an_unknown_id_is_still_scored() -> None:
    (sample,) = make_samples([(3, 4)])
    ids = [*sample.ids[:4], 64 + 5, *sample.ids[5:]]
    (values,) = scored([make_sample(ids[:3], ids[3:], 0, [0.0] * 4)], "packed", 100)
    ids[4] = 0
    (wanted,) = scored([make_sample(ids[:3], ids[3:], 0, [0.0] * 4)], "packed", 100)
    assert values == pytest.approx([*wanted[:4], UNKNOWN, *wanted[5:]], abs=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_teachers_hidden_states_are_in_the_order_of_the_samples(layout: Layout) -> None:
    samples = make_samples([(3, 4), (6, 2), (2, 7)])
    found = LocalTeacher(FUSED["qwen3"], layout, 8, 1.0, CPU).head(samples, CPU)
    logits = torch.nn.functional.linear(found.hidden, found.weight)
    rows = logits.log_softmax(-1).gather(
        1, torch.tensor([i for s in samples for i in s.ids[-s.loss_tokens :].tolist()])[:, None]
    )
    torch.testing.assert_close(rows[:, 0], torch.cat([alone(FUSED["qwen3"], s) for s in samples]))


@pytest.mark.parametrize("top_k", [None, 3])
def test_a_teacher_that_is_not_finite_for_some_text_ends_the_run(top_k: int | None) -> None:
    fused = fuse(causal_lm())
    teacher = LocalTeacher(fused, "padded", 100, 1.0, CPU, top_k=top_k)
    with torch.no_grad():
        fused.get_input_embeddings().weight[9] = torch.nan  # type: ignore[union-attr, operator]
    sample = make_sample([5, 9, 7], [8, 6], 0)
    with pytest.raises(RunError, match="the teacher gives 2 of 2 tokens a log-prob that is not finite"):
        teacher.score([sample])


def test_a_mismatch_is_that_of_sampled_tokens_alone() -> None:
    """Completions of the data stand in the same batch, with and without log-probs of their own."""
    given = dataclasses.replace(make_sample([1], [2, 3], 0), given=True)
    filled = dataclasses.replace(make_sample([1], [2], 1, [-9.0]), given=True)
    sampled = make_sample([1, 2], [3, 4], 2, [-1.0, -2.0])
    for order in itertools.permutations([given, sampled, filled]):
        batch = collate(list(order), "padded", torch.device("cpu"))
        found = batch.beside_sampler(torch.full((5,), -0.5))
        assert found.tolist() == [[-0.5, -1.0], [-0.5, -2.0]]


@PROPERTY
@given(st.lists(st.integers(1, 14), max_size=40), st.integers(1, 12))
def test_the_first_place_with_room(sizes: list[int], capacity: int) -> None:
    room: list[int] = []
    for size, place in zip(sizes, first_fit(sizes, capacity), strict=True):
        wanted = next((index for index, left in enumerate(room) if size <= left), len(room))
        assert place == wanted
        room += [capacity] * (place == len(room))
        room[place] -= size
