"""Sampling completions with the `generate` of Hugging Face Transformers: whole batches, any model that it knows."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from fastkl.trainer.data.batching import PAD_ID
from fastkl.trainer.data.samples import Completion
from fastkl.trainer.rollouts.samplers.common import check_distribution, check_requests, undisturbed, unwrapped
from fastkl.trainer.rollouts.samplers.in_progress import USUAL


class GenerateSampler:
    """Samples from a causal language model, on its current weights, without changing its state.

    A batch takes as long as its longest completion. Only the given temperature shapes the distribution: nothing is taken
    from `model.generation_config`.

    Args:
        model: A Transformers causal language model, or a PEFT model around one.
        eos_token_ids: The token ids that end a completion; none when empty.
        max_requests: The most completions in a batch; None: 64.
        one_length: Batches of prompts of one length alone: for models that read the padding before a shorter one.
    """

    shared = True

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_token_ids: Iterable[int] = (),
        max_requests: int | None = None,
        one_length: bool = False,
    ) -> None:
        self._model = model
        self._base = unwrapped(model)
        self._eos = sorted(set(eos_token_ids))
        self._max_requests = max_requests or USUAL
        self._one_length = one_length

    def refresh(self) -> None:
        """Nothing to do: it samples from the model itself."""

    def sample(
        self, prompts: list[list[int]], *, max_new_tokens: int, temperature: float, seed: int
    ) -> list[Completion]:
        """Samples one completion per prompt, in order; takes the likeliest tokens when `temperature` is 0.

        Raises:
            ValueError: For arguments that cannot be sampled from.
            RunError: For logits that are not finite.
        """
        check_requests(self._base.config.get_text_config(), prompts, max_new_tokens, temperature)
        return self.draw(prompts, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)

    @torch.no_grad()
    def draw(self, prompts: list[list[int]], *, max_new_tokens: int, temperature: float, seed: int) -> list[Completion]:
        """`sample` of arguments that can be sampled from."""
        random = torch.Generator(self._base.device).manual_seed(seed)
        found: dict[int, Completion] = {}
        with undisturbed(self._model), _no_defaults(self._base):
            self._model.eval()
            for places in self._batches(prompts):
                drawn = _Drawn(temperature, random)
                self._generate([prompts[place] for place in places], max_new_tokens, drawn)
                found |= zip(places, drawn.completions(self._eos), strict=True)
        return [found[place] for place in range(len(prompts))]

    def _batches(self, prompts: list[list[int]]) -> Iterator[list[int]]:
        """Places of prompts, by length so that little is padded, in batches of one size but for one."""
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        groups = itertools.groupby(order, key=lambda place: len(prompts[place]) if self._one_length else 0)
        for group in (list(places) for _, places in groups):
            rounds = -(-len(group) // self._max_requests)
            for index in range(rounds):
                yield group[index * len(group) // rounds : (index + 1) * len(group) // rounds]

    def _generate(self, prompts: list[list[int]], max_new_tokens: int, drawn: _Drawn) -> None:
        width, device = max(map(len, prompts)), self._base.device
        # Padded on the left, so that all completions begin at one place.
        ids = torch.tensor([[PAD_ID] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self._base.generate(
            input_ids=ids,
            attention_mask=(torch.arange(width, device=device) >= width - lengths[:, None]).long(),
            generation_config=GenerationConfig(
                do_sample=False,  # takes the largest score: the token that `drawn` has left
                max_new_tokens=max_new_tokens,
                eos_token_id=self._eos or None,
                pad_token_id=PAD_ID,
                use_cache=True,
            ),
            logits_processor=LogitsProcessorList([drawn]),
        )


class _Drawn(LogitsProcessor):
    """Draws the next tokens itself, so that their log-probs are those of the distribution they come from."""

    def __init__(self, temperature: float, random: torch.Generator) -> None:
        self._temperature, self._random = temperature, random
        self._tokens: list[Tensor] = []  # each [B]
        self._logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] that leave one token a row."""
        logprobs = (scores.float() / (self._temperature or 1.0)).log_softmax(-1)
        check_distribution(logprobs, len(self._tokens))
        if self._temperature == 0:
            tokens = logprobs.argmax(-1, keepdim=True)
        else:
            tokens = torch.multinomial(logprobs.exp(), 1, generator=self._random)
        self._tokens.append(tokens[:, 0])
        self._logprobs.append(logprobs.gather(1, tokens)[:, 0])
        return torch.full_like(scores, float("-inf")).scatter(1, tokens, 0.0)

    def completions(self, eos: list[int]) -> Iterator[Completion]:
        """Per row what was drawn, up to and with its first end of sequence."""
        rows = zip(torch.stack(self._tokens, 1).tolist(), torch.stack(self._logprobs, 1).tolist(), strict=True)
        for tokens, logprobs in rows:
            end = next((place for place, token in enumerate(tokens, 1) if token in eos), None)
            yield Completion(tokens[:end], logprobs[:end], truncated=end is None)


@contextmanager
def _no_defaults(model: Any) -> Iterator[None]:
    """Hides the model's own generation config, which `generate` reads wherever it is given no value."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
