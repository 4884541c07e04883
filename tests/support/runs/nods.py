"""An environment with little to say."""

from __future__ import annotations

from typing import Any

from fastkl.trainer.rollouts.environments import Message, Reply


class Nods:
    """Stops at every "e" and says "ok"; pays for turns."""

    stops = ("e",)
    rewards = True

    def reply(self, conversation: list[Message], row: Any) -> Reply:
        ended = not conversation[-1].content.endswith("e")
        return Reply(None if ended else "ok", 1.0)


class Says:
    """Says nothing to the student; pays for a message that ends in a digit.

    It tells the teacher which it was.
    """

    stops = tuple("012345abcdefgh")
    rewards = True

    def reply(self, conversation: list[Message], row: Any) -> Reply:
        right = conversation[-1].content[-1:].isdigit()
        return Reply(None, float(right), f"{'good' if right else 'bad'}\nend")
