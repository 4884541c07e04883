"""What a server must show before a run relies on its log-probs of given ids: that they are those which it lists itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import TypeVar

from fastkl.trainer.data.samples import UNKNOWN
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.servers.answers import BadAnswer
from fastkl.trainer.servers.check import TOLERANCE
from fastkl.trainer.servers.completions import CompletionsServer
from fastkl.trainer.servers.connection import Refused
from fastkl.trainer.servers.listed import ListServer
from fastkl.trainer.servers.recheck import Reference

COMPARED = 5  # likeliest tokens of each place
T = TypeVar("T")


def check_listed(
    server: CompletionsServer,
    lists: ListServer,
    reference: Reference,
    k: int,
    vocabulary: int,
    longest: list[int],
    remedy: str,
) -> None:
    """Asks about the text that `check_server` has asked about, and about `k` ids in each place of the longest sequence.

    Args:
        vocabulary: Ids below this one are asked about.
        longest: A sequence as long as they get.
        remedy: What to do if it is too long.

    Raises:
        ConfigError: Where the server does not score given ids, or gives them other log-probs than in its own lists.
    """
    unfit = f"the teacher's server at {server.url} does not score given ids, which loss.top_k_of: student and both need"
    way_out = (
        f"Serve the teacher with a vLLM that has prompt_logprob_token_ids (vllm serve --enable-scale-out --max-logprobs "
        f"{max(20, k)}, with VLLM_USE_V2_MODEL_RUNNER=1), or load it here with a path, or set loss.top_k_of to teacher"
    )
    ids, temperature = reference.ids, reference.temperature
    wanted = _asked(lambda: _own_lists(server, reference, k), unfit, way_out)
    half = len(ids) // 2
    later = [{} if place < half or place == half + 2 else entry for place, entry in enumerate(wanted)]
    for asked in (wanted, later):
        ask = partial(lists.score, ids, [[*entry] for entry in asked], temperature)
        apart = _distance(_asked(ask, unfit, way_out), asked)
        if not apart <= TOLERANCE:
            raise ConfigError(
                f"the teacher's server at {server.url} gives ids that are sent to it other log-probs than it gives them in "
                f"its own lists, up to {apart:.2f} nats apart. {way_out}"
            )
    highest = [*range(vocabulary - k, vocabulary)]
    _asked(
        lambda: lists.score(longest, [[], *(highest for _ in longest[1:])], temperature),
        f"the teacher's server at {server.url} cannot score {k} given ids (loss.top_k) in each place of {len(longest)} "
        f"tokens, the most",
        f"{remedy}, or lower loss.top_k, or serve the teacher with a longer context and a higher --max-logprobs",
    )


def _asked(ask: Callable[[], T], unfit: str, way_out: str) -> T:
    try:
        return ask()
    except (BadAnswer, Refused) as error:
        raise ConfigError(f"{unfit}: {error}. {way_out}") from error


def _own_lists(server: CompletionsServer, reference: Reference, k: int) -> list[dict[int, float]]:
    """Log-probs that the server gives in its ordinary answer, in each place; in no order that it could have by itself."""
    own = server.score([reference.ids], reference.api, reference.temperature, min(k, COMPARED))[0]
    lists = []
    for token, logprob, top in zip(reference.ids, own.logprobs, own.top, strict=True):
        known = {} if token in top or logprob == UNKNOWN or not top else {token: logprob}
        lists.append(known | dict(reversed(top.items())))
    return lists


def _distance(found: Sequence[Sequence[float]], wanted: Sequence[dict[int, float]]) -> float:
    values = chain.from_iterable(entry.values() for entry in wanted)
    return max(abs(a - b) for a, b in zip(chain.from_iterable(found), values, strict=True))
