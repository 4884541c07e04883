"""Log-probs of ids that the asker chooses, other ones in each place: vLLM's `prompt_logprob_token_ids`.

vLLM answers this at /inference/v1/generate alone, which it has beside the paths of OpenAI (`--enable-scale-out`). A row of
ids is for a place. The answer is a matrix of float32, as an .npy file in base64.
"""

from __future__ import annotations

import ast
import math
import struct
from base64 import b64decode
from collections.abc import Sequence
from typing import Any

from fastkl.trainer.servers.answers import BadAnswer, Unscored, answering, as_logprob, as_text
from fastkl.trainer.servers.connection import Connection
from fastkl.trainer.servers.quoting import quote_value

FIELD = "prompt_token_id_logprobs"


class ListServer:
    """Log-probs of lists of ids from a server; what it answers is checked.

    Args:
        model: The served model.
    """

    def __init__(self, model: str, connection: Connection) -> None:
        self._model, self._connection = model, connection
        self.url = connection.url

    def score(self, ids: list[int], lists: Sequence[Sequence[int]], temperature: float) -> list[list[float]]:
        """The log-probs of `lists[i]`, distinct ids in place i of the sequence `ids`; −inf for what cannot be.

        A list may be empty. That of the first place is, and another one is not.

        Raises:
            BadAnswer: For anything but a log-prob for each id.
            ServerError: When there is no answer.
        """
        start = next(place for place, listed in enumerate(lists) if listed) - 1
        rows = [[*listed] for listed in lists[start + 1 :]]
        parameters = {
            "max_tokens": 1,
            "temperature": temperature,
            "prompt_logprob_token_ids": rows,
            "prompt_logprob_start": start,
        }
        body = {"model": self._model, "token_ids": ids, "sampling_params": parameters, "stream": False}
        with answering(self._connection.whose, self.url):
            answer = self._connection.post(
                f"{self.url.removesuffix('/v1')}/inference/v1/generate", body, sum(map(len, rows)) + len(ids)
            )
            matrix = _matrix(answer, (len(rows), max(map(len, rows))))
            found = [
                [as_logprob(value, place) for value in values[: len(listed)]]
                for place, (listed, values) in enumerate(zip(rows, matrix, strict=True), start=start + 1)
            ]
        return [[] for _ in range(start + 1)] + found


def _matrix(answer: dict[str, Any], shape: tuple[int, int]) -> list[tuple[float, ...]]:
    """The rows of the array of float32 in an answer; of this shape."""
    text = as_text(answer.get(FIELD), FIELD)
    if text is None:
        raise Unscored(f"the option prompt_logprob_token_ids is ignored: no {FIELD} in the answer")
    try:
        header, numbers = _read_npy(b64decode(text, validate=True))
    except (ValueError, SyntaxError, struct.error, MemoryError, RecursionError) as error:
        raise BadAnswer(f"{FIELD} is {quote_value(text)}; it must be an .npy file in base64") from error
    wanted = {"descr": "<f4", "fortran_order": False, "shape": shape}
    if header != wanted or len(numbers) != 4 * math.prod(shape):
        raise BadAnswer(
            f"{FIELD} is {quote_value(str(header))} with {len(numbers)} bytes; it must be {wanted} with 4 bytes for each "
            f"of the ids that were sent"
        )
    return list(struct.iter_unpack(f"<{shape[1]}f", numbers))


def _read_npy(file: bytes) -> tuple[object, bytes]:
    """The header of an .npy file and its numbers, which come after a magic, a version and the header's length (NumPy)."""
    if file[:6] != b"\x93NUMPY":
        raise ValueError("no .npy file")
    start, size = (10, "<H") if file[6:7] == b"\x01" else (12, "<I")
    end = start + struct.unpack_from(size, file, 8)[0]
    return ast.literal_eval(file[start:end].decode("latin-1").strip()), file[end:]
