"""Conversations: the student's turns with an environment's replies between them, many at once.

Sampled ids are kept as they are; a reply is encoded and put after them. So the student's later tokens are scored after
exactly what they were sampled after, whatever a tokenizer would make of the text.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from fastkl.trainer.config.reward import EnvironmentConfig
from fastkl.trainer.data.chat import ChatTemplate
from fastkl.trainer.data.prompts import EncodedPrompt
from fastkl.trainer.data.samples import Completion
from fastkl.trainer.rollouts.environments import Environment, Message
from fastkl.trainer.rollouts.samplers.sampler import Sampler
from fastkl.trainer.rollouts.single_turn import Finished, Trajectory, round_seed, sample_within, sampling_share
from fastkl.trainer.rollouts.turn_markers import TurnMarkers, turn_markers

T = TypeVar("T")


@dataclass(eq=False)
class _Conversation:
    prompt: EncodedPrompt
    budget: int
    messages: list[Message]
    token_ids: list[int] = field(default_factory=list)
    counted: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    message_start: int = 0  # where the student's current message begins
    turns: int = 0
    reward: float = 0.0
    feedback: list[str] = field(default_factory=list)
    truncated: bool = False
    over: bool = False

    def append(self, ids: Sequence[int], logprobs: Sequence[float] | None = None) -> None:
        """Sampled tokens with their log-probs, or the environment's without."""
        self.token_ids += ids
        self.counted += [logprobs is not None] * len(ids)
        self.logprobs += [0.0] * len(ids) if logprobs is None else logprobs


class MultiTurn:
    """Answers prompts in turns, as `EnvironmentConfig` says.

    Args:
        sampler: Completes token ids; it may stop at `stop_ids` too, which saves what would be cut.
        ends: The ids that end a sequence.
        context: The most positions that the sampler's model has; None: no limit.
        chats: What writes the prompts; None: the tokenizer's template without variables.

    Raises:
        ConfigError: For a chat template that cannot carry a conversation on.
    """

    def __init__(
        self,
        sampler: Sampler,
        tokenizer: PreTrainedTokenizerBase,
        environment: Environment,
        config: EnvironmentConfig,
        ends: Sequence[int],
        context: int | None,
        chats: Iterable[ChatTemplate | None] = (None,),
    ) -> None:
        self._sampler, self._tokenizer, self._environment = sampler, tokenizer, environment
        self._config, self._ends, self._context = config, set(ends), context
        self._markers: dict[ChatTemplate | None, TurnMarkers] = {}
        for chat in chats:
            self._markers_after(chat)

    def my_share(self, items: Sequence[T]) -> list[T]:
        return sampling_share(self._sampler, items)

    def respond(
        self,
        prompts: Sequence[EncodedPrompt],
        *,
        max_new_tokens: Sequence[int],
        temperature: float,
        seed: int,
        finished: Finished | None = None,
    ) -> list[Trajectory]:
        """See `Responder`. The environment's tokens count towards `max_new_tokens`; its rewards are added up."""
        conversations = [
            _Conversation(prompt, budget, _messages(prompt))
            for prompt, budget in zip(prompts, max_new_tokens, strict=True)
        ]
        active = list(conversations)
        while active:
            completions = sample_within(
                self._sampler,
                [c.prompt.ids + c.token_ids for c in active],
                [c.budget - len(c.token_ids) for c in active],
                context=self._context,
                temperature=temperature,
                seed=round_seed(seed, 1024 * active[0].turns),  # all have had as many turns
            )
            for conversation, completion in zip(active, completions, strict=True):
                self._advance(conversation, completion)
                if conversation.over and finished is not None:
                    finished(conversations.index(conversation), self._trajectory(conversation))
            active = [conversation for conversation in active if not conversation.over]
        return [self._trajectory(conversation) for conversation in conversations]

    def _advance(self, conversation: _Conversation, completion: Completion) -> None:
        """One turn of the student and the environment's answer to it."""
        length = self._turn_length(completion.token_ids)
        ids = completion.token_ids[:length]
        stopped = length < len(completion.token_ids) or self._stops(ids)
        conversation.append(ids, completion.logprobs[:length])
        conversation.turns += 1
        if not stopped and completion.truncated:
            conversation.truncated = conversation.over = True
            return
        own = Message("assistant", self._text(conversation.token_ids[conversation.message_start :]))
        reply = self._environment.reply([*conversation.messages, own], conversation.prompt.row)
        conversation.reward += reply.reward
        conversation.feedback += [reply.feedback] if reply.feedback else []
        if reply.text is None:
            conversation.over = True
            return
        added = self._reply_ids(reply.text, ids[-1], conversation.prompt.chat)
        room = conversation.budget - len(conversation.token_ids) - len(added)
        if conversation.turns == self._config.max_turns or room < 1:
            conversation.truncated = conversation.over = True
            return
        conversation.append(added)
        if self._config.role is not None:
            conversation.messages += [own, Message(self._config.role, reply.text)]
            conversation.message_start = len(conversation.token_ids)

    def _turn_length(self, ids: list[int]) -> int:
        """Up to and with the token that completes the first stop; all of them without one."""
        if not self._stops(ids):
            return len(ids)
        return bisect.bisect_left(range(len(ids)), True, key=lambda last: self._stops(ids[: last + 1])) + 1

    def _stops(self, ids: list[int]) -> bool:
        text = self._tokenizer.decode(ids, skip_special_tokens=False)
        return any(stop in text for stop in self._environment.stops)

    def _text(self, ids: list[int]) -> str:
        """Of a message, without its end."""
        text: str = self._tokenizer.decode(ids[:-1] if ids[-1] in self._ends else ids, skip_special_tokens=False)
        return text

    def _reply_ids(self, text: str, last: int, chat: ChatTemplate | None) -> list[int]:
        markers = self._markers_after(chat)
        if markers is not None:
            return markers.ids(text, self._tokenizer, last, self._ends)
        if last in self._ends:
            raise ValueError(
                f"the environment {self._config.name} replied {text[:40]!r} inside a message that the student had ended; "
                f"give it a turn of its own (environment.role) or let it reply at a stop only"
            )
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _markers_after(self, chat: ChatTemplate | None) -> TurnMarkers | None:
        if self._config.role is None:
            return None
        if chat not in self._markers:
            variables = None if chat is None else chat.variables
            self._markers[chat] = turn_markers(self._tokenizer, self._config.role, variables)
        return self._markers[chat]

    def _trajectory(self, conversation: _Conversation) -> Trajectory:
        return Trajectory(
            conversation.token_ids,
            conversation.counted,
            conversation.logprobs,
            conversation.truncated,
            conversation.token_ids[conversation.message_start :],
            conversation.reward if self._environment.rewards else None,
            "\n".join(conversation.feedback) or None,
        )


def stop_ids(environment: Environment | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The stops that are one token each: a sampler can end a turn there by itself."""
    stops = [] if environment is None else environment.stops
    encoded = [tokenizer(stop, add_special_tokens=False)["input_ids"] for stop in stops]
    return [ids[0] for ids, stop in zip(encoded, stops, strict=True) if len(ids) == 1 and tokenizer.decode(ids) == stop]


def _messages(prompt: EncodedPrompt) -> list[Message]:
    row = prompt.row.prompt
    return [Message("user", row)] if isinstance(row, str) else [Message(m["role"], str(m["content"])) for m in row]
