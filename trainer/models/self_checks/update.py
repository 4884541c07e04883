"""Whether an update sees the distribution that was sampled."""

from __future__ import annotations

from fastkl.trainer.errors import ConfigError
from fastkl.trainer.models.modes import Dropout, updating
from fastkl.trainer.models.self_checks.probe import FINE, Probe, distance, token_logprobs

EXACT = 1e-4  # of the spread: the same kernels compute the same numbers


def check_update(probe: Probe, dropout: Dropout) -> None:
    """Forward passes of an update give the log-probs of eval mode, twice: nothing is dropped, nothing is drawn.

    Raises:
        ConfigError: Where they do not, though dropout is off.
    """
    if dropout == "keep":
        return
    ids, logits = probe.texts[0], probe.logits[0]
    limit = EXACT if probe.limit == FINE else probe.limit
    for _ in range(2):
        with updating(probe.model, dropout):
            found = token_logprobs(probe.forward(ids)[:-1], ids[1:])
        error = distance(found, logits[:-1], ids[1:])
        if error > limit:
            raise ConfigError(
                f"student.dropout is off, but {type(probe.model).__name__} computes other log-probs in an update than in "
                f"sampling ({error:.2g} of their spread away). Set student.gradient_checkpointing to false, or "
                f"student.dropout to keep to train with the difference"
            )
