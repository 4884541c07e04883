"""What the advantages of segments estimate, summed over every text of two tiny models with two tokenizations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import pytest
import torch
from torch import Tensor

from fastkl.trainer.config.loss import LossConfig
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.objectives.advantages import set_advantages
from fastkl.trainer.teachers.alignment.segments import Block, Segments, align
from fastkl.trainer.teachers.alignment.unsettled import Unsettled

END = "."
Text = tuple[str, ...]  # tokens


@dataclass
class Model:
    """A distribution over the next token for every prefix, from random logits."""

    tokens: list[str]
    seed: int
    allowed: Callable[[Text], list[str]]
    logits: dict[Text, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def logprob(self, prefix: Text, token: str) -> Tensor:
        if prefix not in self.logits:
            drawn = 1.5 * torch.randn(len(self.tokens), generator=self._generator, dtype=torch.float64)
            self.logits[prefix] = drawn.requires_grad_()
        allowed = [self.tokens.index(each) for each in self.allowed(prefix)]
        return self.logits[prefix][allowed].log_softmax(0)[allowed.index(self.tokens.index(token))]

    def logprobs(self, text: Text, start: int = 0) -> Tensor:
        return torch.stack([self.logprob(text[:place], text[place]) for place in range(start, len(text))])

    def texts(self, prefix: Text = ()) -> list[Text]:
        """All that go on from there, to their ends."""
        if prefix[-1:] == (END,):
            return [prefix]
        return [text for token in self.allowed(prefix) for text in self.texts((*prefix, token))]


@dataclass
class Pair:
    student: Model
    teacher: Model
    split: Callable[[str], Text]  # a text in the teacher's tokens
    looks_ahead: bool = False

    def answers_back(self, text: Text) -> list[int]:
        if not self.looks_ahead:
            return []
        written = "".join(text).removesuffix(END).encode()
        lengths = [len(token.removesuffix(END)) for token in text]
        return Unsettled(token.encode() for token in self.teacher.tokens).back(written, np.array(lengths)).tolist()

    @cached_property
    def texts(self) -> list[Text]:
        return self.student.texts()

    def segments(self, text: Text) -> Segments:
        whole = "".join(text)
        return align(
            [len(token) for token in text], [len(token) for token in self.split(whole)], [Block(0, 0, len(whole))]
        )

    def difference(self, text: Text) -> Tensor:
        """log P − log Q of a text in its tokens; the teacher reads it in its own."""
        theirs = self.teacher.logprobs(self.split("".join(text)))
        return self.student.logprobs(text).sum() - theirs.sum().detach()

    def sample(self, text: Text) -> Sample:
        theirs, found = self.split("".join(text)), self.segments(text)
        sample = Sample(
            ids=range(len(text)),
            loss_mask=[True] * len(text),
            prompt_index=0,
            completion_length=len(text),
            sampler_logprobs=self.student.logprobs(text).tolist(),
            teacher_prompt=[0],
            teacher_completion=range(len(theirs)),
            segments=1 + found.student_of,
            teacher_segments=1 + found.teacher_of,
            answers_back=self.answers_back(text),
        )
        read = sample.for_teacher()
        read.teacher_logprobs = [0.0, *self.teacher.logprobs(theirs).tolist()]
        sample.take_scores(read)
        return sample

    def mean_gradient(self, discount: float, share: Callable[[Segments], np.ndarray] | None = None) -> Tensor:
        """E[−Σ A ∇log p] over all texts, of all parameters; `share` of each token's advantage."""
        samples = [self.sample(text) for text in self.texts]
        set_advantages(samples, LossConfig(discount=discount))
        total = torch.zeros((), dtype=torch.float64)
        for text, sample in zip(self.texts, samples, strict=True):
            logprobs, advantages = self.student.logprobs(text), torch.tensor(sample.advantages.tolist())
            if share is not None:
                advantages = advantages * torch.tensor(share(self.segments(text)))
            total = total - logprobs.sum().exp().detach() * (advantages * logprobs).sum()
        return self.gradient(total)

    def gradient(self, value: Tensor) -> Tensor:
        parameters = list(self.student.logits.values())
        found = torch.autograd.grad(value, parameters, allow_unused=True)
        return torch.cat([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)])

    def kl(self) -> Tensor:
        """Σ P (log P − log Q) over all texts."""
        return torch.stack(
            [self.student.logprobs(text).sum().exp() * self.difference(text) for text in self.texts]
        ).sum()


# Every text is made of the words a, ba and bb, which are the teacher's tokens: what follows a word does not change it.
# The student's are a, b and ab, so that a segment may hold two and more of both.
def words(text: str) -> Text | None:
    """The words of a text; None where the last is not at its end."""
    found, place = [], 0
    while place < len(text):
        size = 2 if text[place] == "b" else 1
        found.append(text[place : place + size])
        place += size
    return tuple(found) if place == len(text) else None


def whole_words(length: int) -> Callable[[Text], list[str]]:
    def allowed(prefix: Text) -> list[str]:
        inside = words("".join(prefix)) is None
        if len(prefix) >= length:
            return ["a", "b"] if inside else [END]
        return ["a", "b", "ab"] if inside else ["a", "b", "ab", END]

    return allowed


def settled(seed: int) -> Pair:
    """What the student writes later does not change the teacher's tokens before the last common boundary."""
    teacher = Model(["a", "ba", "bb", END], seed + 100, lambda _: ["a", "ba", "bb", END])
    student = Model(["a", "b", "ab", END], seed, whole_words(3))
    return Pair(student, teacher, lambda text: (*(words(text.removesuffix(END)) or ()), END))


def greedy(text: str, tokens: Sequence[str]) -> Text:
    """The longest token at each place."""
    found, place = [], 0
    while place < len(text):
        found.append(max((token for token in tokens if text.startswith(token, place)), key=len))
        place += len(found[-1])
    return tuple(found)


def looking_ahead(seed: int) -> Pair:
    """A teacher that merges letters two by two, and a student that may end anywhere."""
    tokens = ["a", "b", "aa", "ab", "ba", "bb", END]
    teacher = Model(tokens, seed + 100, lambda _: tokens)
    student = Model(["a", "b", "ab", END], seed, lambda prefix: ["a", "b", "ab", END] if len(prefix) < 3 else [END])
    return Pair(student, teacher, lambda text: greedy(text, tokens))


def off_by(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("pair", [settled, looking_ahead])
def test_all_segments_together_are_the_kl_of_the_whole_text(pair: Callable[[int], Pair]) -> None:
    """Of the text in these tokens: KL of the bytes, less the entropy of the student's tokenization of them."""
    made = pair(1)
    probabilities = {text: made.student.logprobs(text).sum().exp().item() for text in made.texts}
    value = sum(p * _difference(made.sample(text)) for text, p in probabilities.items())
    assert value == pytest.approx(made.kl().item(), rel=1e-5)
    by_bytes = dict.fromkeys(map("".join, probabilities), 0.0)
    for text, p in probabilities.items():
        by_bytes["".join(text)] += p
    theirs = {text: made.teacher.logprobs(made.split(text)).sum().item() for text in by_bytes}
    kl = sum(p * (np.log(p) - theirs[text]) for text, p in by_bytes.items())
    tokenization = -sum(p * np.log(p / by_bytes["".join(text)]) for text, p in probabilities.items())
    assert tokenization > 0.01
    assert value == pytest.approx(kl - tokenization, rel=1e-5)


def _difference(sample: Sample) -> float:
    return float(sample.sampler_logprobs.sum(dtype=np.float64) - sample.teacher_logprobs.sum(dtype=np.float64))


@pytest.mark.parametrize("looks_ahead", [False, True])
def test_with_discount_1_it_is_the_gradient_of_that_kl(looks_ahead: bool) -> None:
    """Also where tokens answer for segments that they do not close: that adds noise, and no bias."""
    made = replace(settled(1), looks_ahead=looks_ahead)
    exact = made.gradient(made.kl())
    assert off_by(made.mean_gradient(discount=1.0), exact) < 1e-5


def segment_kls(pair: Pair) -> Tensor:
    """Σ P(h) KL(h) over the prefixes h at whose end a segment begins, the gradient through the KLs alone.

    KL(h) is that of all that the next segment may be.
    """
    total = torch.zeros((), dtype=torch.float64)
    seen: set[tuple[Text, Text]] = set()
    for text in pair.texts:
        theirs, found = pair.split("".join(text)), pair.segments(text)
        for number in range(found.count):
            own, read = (np.flatnonzero(places == number) for places in (found.student_of, found.teacher_of))
            prefix, segment = text[: own[0]], text[own[0] : own[-1] + 1]
            if (prefix, segment) in seen:
                continue
            seen.add((prefix, segment))
            reached = pair.student.logprobs(text[: own[0]]).sum().exp().detach() if own[0] else 1.0
            ours = pair.student.logprobs(text[: own[-1] + 1], own[0]).sum()
            other = pair.teacher.logprobs(theirs[: read[-1] + 1], read[0]).sum().detach()
            total = total + reached * ours.exp() * (ours - other)
    return total


@pytest.mark.parametrize("looks_ahead", [False, True])
def test_without_discount_each_segment_goes_down_its_own_kl(looks_ahead: bool) -> None:
    made = replace(settled(1), looks_ahead=looks_ahead)
    assert max(made.segments(text).student_of.tolist().count(0) for text in made.texts) > 1
    assert off_by(made.mean_gradient(discount=0.0), made.gradient(segment_kls(made))) < 1e-5


@pytest.mark.parametrize("discount", [0.0, 1.0])
def test_a_share_of_it_for_each_token_would_be_another_gradient(discount: float) -> None:
    """d / n: what has more tokens would count less, and no baseline would be without effect."""
    made = settled(0)

    def by_size(found: Segments) -> np.ndarray:
        return 1.0 / np.bincount(found.student_of)[found.student_of]

    exact = made.gradient(made.kl() if discount else segment_kls(made))
    assert off_by(made.mean_gradient(discount, by_size), exact) > 0.1


def test_tokens_answer_for_the_ends_that_they_decide_about() -> None:
    """Else a teacher that looks ahead turns the gradient: docs/teachers/tokenizers.md has these numbers."""
    made = [looking_ahead(seed) for seed in range(6)]
    exact = [pair.gradient(pair.kl()) for pair in made]
    biases = [off_by(pair.mean_gradient(discount=1.0), own) for pair, own in zip(made, exact, strict=True)]
    assert np.mean(biases) == pytest.approx(0.21, abs=0.005)
    assert min(biases) == pytest.approx(0.02, abs=0.005)
    assert max(biases) == pytest.approx(0.44, abs=0.005)
    for pair, own in zip(made, exact, strict=True):
        assert off_by(replace(pair, looks_ahead=True).mean_gradient(discount=1.0), own) < 1e-5


def numbers_from_the_right(text: str) -> Text:
    """Two digits a token, counted from the end: each new digit moves all boundaries."""
    digits = text.removesuffix(END)
    odd = len(digits) % 2
    found = [digits[:odd], *(digits[place : place + 2] for place in range(odd, len(digits), 2))]
    return (*filter(None, found), *([END] if text.endswith(END) else []))


def test_they_decide_about_more_than_the_last_end() -> None:
    tokens = ["1", "2", "11", "12", "21", "22", END]
    for seed in range(3):
        teacher = Model(tokens, seed + 100, lambda _: tokens)
        student = Model(["1", "2", END], seed, lambda prefix: ["1", "2", END] if len(prefix) < 4 else [END])
        pair = Pair(student, teacher, numbers_from_the_right, looks_ahead=True)
        assert off_by(pair.mean_gradient(discount=1.0), pair.gradient(pair.kl())) < 1e-5
