"""A teacher's server that writes: a sampler as any other, where the server can."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from fastkl.trainer.config.teacher import TeacherServerConfig
from fastkl.trainer.data.samples import Completion
from fastkl.trainer.models.tokenizers import vocabulary
from fastkl.trainer.servers.concurrency import gather
from fastkl.trainer.servers.connection import Connection
from fastkl.trainer.servers.generation import GenerationServer


class ServedWriter:
    """Completes prompts by the model of a teacher's server (see `Sampler`).

    Raises ServerError where the server does not answer with token ids and log-probs.
    """

    shared = False

    def __init__(self, config: TeacherServerConfig, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> None:
        self._config, self._ends = config, sorted({*ends})
        self._server = GenerationServer(Connection(config, "the teacher's server"), vocabulary(tokenizer))

    def refresh(self) -> None:
        pass  # its weights never change

    def sample(
        self, prompts: list[list[int]], *, max_new_tokens: int, temperature: float, seed: int
    ) -> list[Completion]:
        def complete(index: int) -> Completion:
            return self._server.complete(
                self._config.model,
                prompts[index],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=(seed + index) % (1 << 63),
                eos_token_ids=self._ends,
                cache_salt="fastkl probe",
            )

        return gather(complete, range(len(prompts)), self._config.concurrency)
