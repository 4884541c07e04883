"""What a model writes after prompts that are asked alike, graded or not: evaluations and transcripts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from fastkl.trainer.data.formats.packed import OnDemand
from fastkl.trainer.data.prompts import EncodedPrompt, Prompts
from fastkl.trainer.data.replies import content_of
from fastkl.trainer.models.sizes.flops import Cost, writing_flops
from fastkl.trainer.rollouts.grading.named import NamedGrader
from fastkl.trainer.rollouts.single_turn import Responder
from fastkl.trainer.runs import processes


@dataclass(frozen=True)
class Ask:
    """Prompts, and how they are asked.

    Args:
        samples: So many answers to each prompt.
        grader: Scores an answer; None: nothing does.
    """

    prompts: Prompts
    samples: int
    temperature: float
    max_new_tokens: int
    grader: NamedGrader | None

    @property
    def each(self) -> Repeated:
        """The prompt of each answer: the answers to one prompt follow each other."""
        return Repeated(self.prompts, self.samples)


class Repeated(OnDemand[EncodedPrompt]):
    """Prompts, each so many times."""

    def __init__(self, prompts: Prompts, times: int) -> None:
        self._prompts, self._times = prompts, times

    def __len__(self) -> int:
        return len(self._prompts) * self._times

    def at(self, place: int) -> EncodedPrompt:
        return self._prompts.at(place // self._times)


@dataclass(frozen=True)
class Answer:
    """What was written after a prompt."""

    prompt: EncodedPrompt
    text: str  # of the last message, for a grader: without special tokens
    ids: list[int]  # of the last message
    score: float | None  # None: nobody graded it
    tokens: int  # all that follows the prompt
    sampled: int  # of those, what the model wrote: an environment's are not
    truncated: bool


def answers_to(
    prompts: Sequence[EncodedPrompt], ask: Ask, responder: Responder, tokenizer: PreTrainedTokenizerBase, seed: int
) -> list[Answer]:
    """Some of the answers that are asked for; several processes share the writing, and all have all answers."""
    mine = responder.my_share(prompts)
    own = processes.raise_together(
        lambda: responder.respond(
            mine,
            max_new_tokens=[ask.max_new_tokens] * len(mine),
            temperature=ask.temperature,
            seed=processes.seed(seed),
        )
    )
    found = []
    for prompt, trajectory in zip(prompts, processes.gather(own), strict=True):
        text = tokenizer.decode(trajectory.answer_ids, skip_special_tokens=True)
        score = None if ask.grader is None else ask.grader(text, prompt.row)
        tokens, sampled = len(trajectory.token_ids), sum(trajectory.counted)
        found.append(Answer(prompt, text, trajectory.answer_ids, score, tokens, sampled, trajectory.truncated))
    return found


def completion_of(answer: Answer, tokenizer: PreTrainedTokenizerBase) -> str:
    """What a row of data holds of it, up to its end. A limit may have cut a character in two: half of it is left out."""
    ids, prompt = answer.ids if answer.truncated else answer.ids[:-1], answer.prompt
    text: str = tokenizer.decode(ids, skip_special_tokens=False)
    if answer.truncated:
        return text.rstrip("\ufffd")
    return text if prompt.chat is None else content_of(prompt.chat, prompt.row, prompt.chat.prompt(prompt.row), text)


def answers_flops(cost: Cost, answers: Iterable[Answer]) -> float:
    return writing_flops(cost, ((len(one.prompt.tokens), one.tokens, one.sampled) for one in answers))
