"""What a server must show before a run samples from it, whatever weights it has at the time."""

from __future__ import annotations

from fastkl.trainer.errors import ConfigError
from fastkl.trainer.servers.answers import BadAnswer
from fastkl.trainer.servers.check import check_limits
from fastkl.trainer.servers.generation import GenerationServer

SEED, PROBE_TOKENS, PROBE_NEW_TOKENS = 7, 24, 8
SALT = "fastkl-check"


def check_sampling(
    server: GenerationServer,
    model: str,
    probe: list[int],
    *,
    temperature: float,
    highest: int,
    longest: list[int],
    remedy: str,
) -> None:
    """A ConfigError says what is wrong with the server, a ServerError that it is not there.

    Args:
        probe: Some prompt.
        temperature: That of the rollouts.
        highest: The highest id of the tokenizer.
        longest: A sequence as long as prompt and completion get.
        remedy: What to do if it is too long.
    """
    try:
        first, second = (
            server.complete(
                model,
                probe,
                max_new_tokens=PROBE_NEW_TOKENS,
                temperature=temperature,
                seed=SEED,
                eos_token_ids=(),
                cache_salt=SALT,
            )
            for _ in range(2)
        )
    except BadAnswer as error:
        raise ConfigError(f"{error}. Serve the student with vLLM") from error
    if first.token_ids != second.token_ids:
        raise ConfigError(
            f"the sampling server at {server.url} ignores seeds: the same request gave {first.token_ids} and "
            f"{second.token_ids}. No run could be repeated. Serve the student with vLLM"
        )
    if temperature != 1:
        _check_temperature(server, model, probe, temperature)
    check_limits(
        lambda sequence: server.likeliest(model, sequence[:-1], temperature),  # and one token that is generated
        f"the sampling server at {server.url} cannot take",
        ([*probe, highest, highest], "Serve the student's own model"),
        (longest, f"{remedy}, or serve with a longer --max-model-len"),
    )


def _check_temperature(server: GenerationServer, model: str, probe: list[int], temperature: float) -> None:
    """Differences of log-probs are those at 1, divided by the temperature, if they are of what is sampled from."""
    plain, scaled = (server.likeliest(model, probe, value) for value in (1.0, temperature))
    common = sorted(plain.keys() & scaled.keys(), key=lambda token: plain[token])
    if len(common) < 2:
        raise ConfigError(
            f"the sampling server at {server.url} lists other likeliest tokens at temperature {temperature} than at 1. "
            f"Serve the student with vLLM"
        )
    before, after = (values[common[-1]] - values[common[0]] for values in (plain, scaled))
    if abs(after - before / temperature) >= abs(after - before):
        raise ConfigError(
            f"sampling.temperature is {temperature}, but the sampling server at {server.url} gives log-probs at "
            f"temperature 1, from before the logits are scaled. The importance ratio would be wrong. Start it with "
            f"--logprobs-mode processed_logprobs, or set the temperature to 1"
        )
