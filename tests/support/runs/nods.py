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
