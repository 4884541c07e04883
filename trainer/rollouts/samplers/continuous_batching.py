"""Sampling completions with the continuous batching of Hugging Face Transformers (5.17 to 5.23)."""

import dataclasses
import gc
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from fastkl.trainer.data.samples import Completion
from fastkl.trainer.errors import ConfigError, RunError
from fastkl.trainer.models.sizes.layers import layer_kinds
from fastkl.trainer.rollouts.samplers.common import check_distribution, check_requests, undisturbed, unwrapped
from fastkl.trainer.rollouts.samplers.in_progress import PAGE_SIZE, evened, pages, usual_requests

_CONFIG_FIELDS = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
_PAGE_FIELD = "page_size" if "page_size" in _CONFIG_FIELDS else "block_size"  # renamed in 5.18 or later
_PAGED_PREFIX = "auto_switch_to_flash" not in _CONFIG_FIELDS  # 5.17 names its attention "paged|sdpa"


class ContinuousBatchingSampler:
    """Samples from a causal language model, on its current weights, without changing its state.

    Only the given temperature shapes the distribution: nothing is taken from `model.generation_config`.

    Args:
        model: A Transformers causal language model, or a PEFT model around one.
        eos_token_ids: The token ids that end a completion; none when empty.
        max_requests: The most completions that are in progress at once; None chooses.
        max_batch_tokens: The most tokens in one forward pass; longer prompts are processed in pieces.
    """

    shared = True

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_token_ids: Iterable[int] = (),
        max_requests: int | None = None,
        max_batch_tokens: int = 512,
    ) -> None:
        obstacle = obstacle_to_continuous_batching(model)
        if obstacle is not None:
            raise ConfigError(
                f"no continuous batching: {obstacle}; set sampling.engine to generate and leave max_batch_tokens out"
            )
        if max_batch_tokens < 1 or (max_requests is not None and max_requests < 1):
            raise ConfigError(
                f"max_requests is {max_requests}, max_batch_tokens is {max_batch_tokens}; both must be >= 1"
            )
        self._model = model
        self._base = unwrapped(model)
        self._eos = sorted(set(eos_token_ids))
        self._max_requests = max_requests
        self._max_batch_tokens = max_batch_tokens

    def refresh(self) -> None:
        """Nothing to do: it samples from the model itself."""

    def sample(
        self, prompts: list[list[int]], *, max_new_tokens: int, temperature: float, seed: int
    ) -> list[Completion]:
        """Samples one completion per prompt, in order; takes the likeliest tokens when `temperature` is 0.

        Raises:
            ValueError: For arguments that cannot be sampled from.
            RunError: For logits that are not finite, and when the engine failed.
            RuntimeError: When a completion failed or is missing, naming the prompt and the reason.
        """
        check_requests(self._base.config.get_text_config(), prompts, max_new_tokens, temperature)
        if hasattr(self._base, "_cached_continuous_batching_manager"):
            raise RuntimeError("the model keeps a persistent manager; destroy it before sampling")
        return self.draw(prompts, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)

    def draw(self, prompts: list[list[int]], *, max_new_tokens: int, temperature: float, seed: int) -> list[Completion]:
        """`sample` of arguments that can be sampled from."""
        if not prompts:
            return []
        self._check_finite(prompts[0])
        # The engine seeds and draws from the global generators.
        with _short_collections(), _silent(), undisturbed(self._model), self._paged_attention():
            outputs = self._run(prompts, max_new_tokens, temperature, seed)
        return [self._completion(index, output, max_new_tokens) for index, output in enumerate(outputs)]

    @torch.no_grad()
    def _check_finite(self, prompt: list[int]) -> None:
        """Before the engine draws: on a GPU, to draw from NaN ends the process."""
        read = torch.tensor([prompt], device=self._base.device)
        with undisturbed(self._model):
            try:
                logits = self._model.eval()(input_ids=read, use_cache=False).logits[:, -1]
            except Exception:
                return  # it fails in the engine as well, which says where
        check_distribution(logits.float().log_softmax(-1), 0)

    def _run(self, prompts: list[list[int]], max_new_tokens: int, temperature: float, seed: int) -> list[Any]:
        """Runs all prompts through a fresh manager and returns its outputs in order, None where one is missing."""
        longest = max(len(prompt) for prompt in prompts) + max_new_tokens
        manager = self._base.init_continuous_batching(
            generation_config=self._generation_config(max_new_tokens, temperature),
            continuous_batching_config=self._batching_config(len(prompts), longest, seed),
        )
        try:
            manager.warmup()  # builds the cache and seeds, here rather than in the thread
            # All requests are queued before the thread starts: their schedule then depends on no timing.
            request_ids = manager.add_requests(prompts, max_new_tokens=max_new_tokens)
            manager.start()
            manager.stop()  # waits until every queued request is done
        finally:
            if manager.is_running():  # interrupted while waiting
                manager.stop(hard_stop=True)
        outputs = {}
        while (output := manager.get_result(timeout=0)) is not None:
            outputs[output.request_id] = output
        fatal = manager.background_thread_status.fatal_error
        if fatal is not None:
            raise RunError(f"continuous batching failed: {fatal!r}. Set sampling.engine to generate") from fatal
        return [outputs.get(request_id) for request_id in request_ids]

    def _generation_config(self, max_new_tokens: int, temperature: float) -> GenerationConfig:
        """Spells out every setting that shapes the distribution, so that none is left to a default."""
        shape: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            shape = {"do_sample": True, "temperature": float(temperature), "top_k": 0, "top_p": 1.0}
        return GenerationConfig(
            **shape,
            repetition_penalty=1.0,
            num_return_sequences=1,
            max_new_tokens=max_new_tokens,
            eos_token_id=self._eos or -1,
        )

    def _batching_config(self, num_prompts: int, longest: int, seed: int) -> ContinuousBatchingConfig:
        """Fixes every size that would otherwise depend on the free memory."""
        usual = usual_requests(longest, self._base.device.type == "cpu")
        requests = evened(num_prompts, self._max_requests or usual)
        settings: dict[str, Any] = {
            _PAGE_FIELD: PAGE_SIZE,
            "num_blocks": pages(requests, longest),
            "max_batch_tokens": max(requests, self._max_batch_tokens),
            "max_requests_per_batch": requests,
            "max_blocks_per_request": 0,
            "safety_margin": 0.0,
            "allow_block_sharing": False,
            "use_async_batching": False,
            "use_cuda_graph": False,
            "auto_switch_to_flash": False,
            "return_logprobs": True,
            "seed": seed,
        }
        return ContinuousBatchingConfig(**{key: settings[key] for key in settings if key in _CONFIG_FIELDS})

    def _completion(self, index: int, output: Any, max_new_tokens: int) -> Completion:
        """Checks and converts the output for the prompt at `index`."""
        if output is None:
            raise RuntimeError(f"continuous batching returned nothing for prompt {index}")
        if output.error is not None:
            raise RuntimeError(f"continuous batching failed on prompt {index}: {output.error}")
        tokens, logprobs = output.generated_tokens, output.logprobs
        ended = bool(tokens) and tokens[-1] in self._eos
        if len(tokens) != len(logprobs) or not (ended or len(tokens) == max_new_tokens):
            raise RuntimeError(
                f"continuous batching returned {len(tokens)} tokens and {len(logprobs)} "
                f"log-probabilities for prompt {index}, without an end-of-sequence token"
            )
        return Completion(list(tokens), list(logprobs), not ended)

    @contextmanager
    def _paged_attention(self) -> Iterator[None]:
        """Names the attention as the engine wants it, which keeps it from going to flash; the model gets its own back."""
        attention = self._base.config._attn_implementation
        try:
            if _PAGED_PREFIX and attention in ("sdpa", "eager"):
                self._base.set_attn_implementation(f"paged|{attention}")
            yield
        finally:
            if self._base.config._attn_implementation != attention:
                self._base.set_attn_implementation(attention)


def obstacle_to_continuous_batching(model: PreTrainedModel) -> str | None:
    """Why the engine cannot sample from a model, or would do so from another distribution; None if it can."""
    base = unwrapped(model)
    config, name = base.config.get_text_config(), type(base).__name__
    softcap = getattr(config, "attn_logit_softcapping", None)
    if softcap is not None and base.config._attn_implementation == "eager":
        return f"{name} has attn_logit_softcapping {softcap}, which Transformers' paged eager attention ignores"
    others = sorted(set(layer_kinds(config)) - {"full_attention", "sliding_attention"})
    if others:
        return f"{name} has layers of the kind {', '.join(others)}, which Transformers' engine lacks"
    return None


@contextmanager
def _silent() -> Iterator[None]:
    """Keeps the engine from logging the traceback of an error, which is raised here as well."""
    logger = logging.getLogger("ContinuousBatchingLogger")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _short_collections() -> Iterator[None]:
    """Hides the objects that exist now from the full garbage collections that Transformers makes on every stop."""
    if gc.get_freeze_count():  # unfreezing would also release what the caller froze
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
