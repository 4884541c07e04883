"""What a server must show before a run relies on its log-probs.

Most servers answer anything: they ignore an option they do not know, count one place off, or serve a model with another
tokenizer, and a run would learn from noise. The probes are a text with several last tokens. In a sound answer

- the text before is scored alike in all of them,
- the last token's own log-prob depends on which one it is,
- the likeliest token in its place does not: a server that looks at the logits *after* a token fails here.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from fastkl.trainer.config.teacher import TeacherServerConfig
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.models.tokenizers import SAMPLE_TEXT, vocabulary
from fastkl.trainer.servers.completions import APIS, Api, BadAnswer, CompletionsServer, Scores, Unscored
from fastkl.trainer.servers.connection import Refused

PROBES, PROBE_TOKENS = 4, 24
TOLERANCE = 0.1  # nats: above what 16-bit arithmetic and batching do, below what a defect does
UNWILLING = (400, 422, 501)  # how servers refuse an option
SERVE = "Serve the teacher with vLLM, or load it here with a path"


def check_server(
    server: CompletionsServer,
    config: TeacherServerConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    trusted: bool,
    temperature: float,
    longest: list[int],
    remedy: str,
    top_k: int | None = None,
) -> Api:
    """The way to ask the server; a ConfigError says what is wrong with it, a ServerError that it is not there.

    Args:
        tokenizer: The one whose ids will be sent.
        trusted: It is the server's own tokenizer, by the user's word; asked about where the server tells all the same.
        temperature: That of the log-probs.
        longest: A sequence as long as they get.
        remedy: What to do if it is too long.
        top_k: How many of the likeliest tokens will be asked for.
    """
    told = _check_tokenization(server, tokenizer)
    probes = _probes(tokenizer)
    api, scores = _choose(server, config, probes, top_k)
    if not (told or trusted):
        _check_texts(server, tokenizer, probes[0], scores[0])
    _check_alignment(server, scores)
    if temperature != 1:
        _check_temperature(server, api, probes, scores, temperature)
    highest = vocabulary(tokenizer) - 1
    for ids, what, way_out in (
        (
            [*probes[0], highest],
            f"id {highest}, the tokenizer's highest",
            "Use a teacher with the student's vocabulary",
        ),
        (longest, f"{len(longest)} tokens, the most to come", f"{remedy}, or serve the teacher with a longer context"),
    ):
        try:
            server.score([ids], api, temperature, top_k)
        except (BadAnswer, Refused) as error:
            raise ConfigError(
                f"the teacher's server at {server.url} cannot score {what}: {error}. {way_out}"
            ) from error
    return api


def _check_tokenization(server: CompletionsServer, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Compares how both tokenize a text; False where the server does not tell."""
    text = SAMPLE_TEXT + (tokenizer.eos_token or "")
    ours, theirs = tokenizer(text, add_special_tokens=False)["input_ids"], server.tokenize(text)
    if theirs is not None and ours != theirs:
        raise ConfigError(
            f"the teacher's server at {server.url} tokenizes differently (the same text gives {len(ours)} tokens here "
            f"and {len(theirs)} there, {ours[:8]}… and {theirs[:8]}…): it could not score the student's tokens. Serve a "
            f"teacher of the student's family"
        )
    return theirs is not None


def _probes(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The beginning of the sample text, then one of several tokens of it."""
    ids = tokenizer(SAMPLE_TEXT, add_special_tokens=False)["input_ids"][:PROBE_TOKENS]
    return [[*ids, last] for last in list(dict.fromkeys(ids))[:PROBES]]


def _choose(
    server: CompletionsServer, config: TeacherServerConfig, probes: list[list[int]], top_k: int | None
) -> tuple[Api, list[Scores]]:
    """The first way of asking that gets log-probs of the prompt, and those of the probes."""
    failures = []
    for api in APIS if config.api == "auto" else (config.api,):
        try:
            return api, server.score(probes, api, 1.0, top_k)
        except Unscored as error:
            failures.append(f"{api}: {error}")
        except Refused as error:
            if error.status not in UNWILLING:
                raise
            failures.append(f"{api}: {error}")
        except BadAnswer as error:
            raise ConfigError(f"the teacher's server at {server.url} cannot be used: {error}. {SERVE}") from error
    what = "log-probs" if top_k is None else f"log-probs and {top_k} likeliest tokens (loss.top_k)"
    way_out = SERVE if top_k is None else f"{SERVE}; vLLM lists --max-logprobs tokens, 20 by default"
    raise ConfigError(
        f"the teacher's server at {server.url} gives no {what} of given tokens ({'; '.join(failures)}). {way_out}"
    )


def _check_texts(server: CompletionsServer, tokenizer: PreTrainedTokenizerBase, ids: list[int], scores: Scores) -> None:
    """Compares the texts that both have for the probe's tokens; white space and parts of characters do not count."""
    ours = [tokenizer.decode([token]) for token in ids]
    pairs = [
        (token, a.strip(), b.strip())
        for token, a, b in zip(ids, ours, scores.texts, strict=True)
        if b is not None and a.strip() and a.isascii()
    ]
    if not pairs:
        raise ConfigError(
            f"the teacher's server at {server.url} tells nothing about its tokenizer; give teacher.tokenizer, the folder "
            f"or Hub id of the served model's tokenizer"
        )
    for token, a, b in pairs:
        if b not in (a, f"token_id:{token}"):
            raise ConfigError(
                f"id {token} is {a!r} in the student's tokenizer and {b!r} for the teacher's server at {server.url}: it "
                f"could not score the student's tokens. Serve a teacher of the student's family; if it only writes its "
                f"tokens in another way, give teacher.tokenizer, the folder or Hub id of the served model's tokenizer"
            )


def _check_alignment(server: CompletionsServer, scores: list[Scores]) -> None:
    before = max(_spread(values) for values in zip(*(probe.logprobs[:-1] for probe in scores), strict=True))
    if before > TOLERANCE:
        raise ConfigError(
            f"the teacher's server at {server.url} scores a text differently, by up to {before:.2f}, when only the token "
            f"after it changes: its log-probs are shifted or not reproducible. {SERVE}"
        )
    own = _spread([probe.logprobs[-1] for probe in scores])
    if own < TOLERANCE:
        raise ConfigError(
            f"the teacher's server at {server.url} gives the last token the same log-prob whichever it is (within "
            f"{own:.2g}): its log-probs are shifted. {SERVE}"
        )
    best = [value for probe in scores if (value := probe.best[-1]) is not None]
    if len(best) < 2:
        raise ConfigError(
            f"the teacher's server at {server.url} does not say which token it finds likeliest (top_logprobs): whether its "
            f"log-probs are shifted could not be found out. {SERVE}"
        )
    if _spread(best) > TOLERANCE:
        raise ConfigError(
            f"the teacher's server at {server.url} finds another token likeliest in a place once the token there changes "
            f"(log-probs {', '.join(f'{value:.2f}' for value in best)}): its log-probs are shifted by one, to what comes "
            f"after each token. {SERVE}"
        )


def _check_temperature(
    server: CompletionsServer, api: Api, probes: list[list[int]], plain: list[Scores], temperature: float
) -> None:
    """At temperature T, differences of log-probs in one place are those at 1, divided by T."""
    scaled = server.score(probes, api, temperature)
    before, after = (_differences(scores) for scores in (plain, scaled))
    wrong = max(abs(now - then / temperature) for now, then in zip(after, before, strict=True))
    ignored = max(abs(now - then) for now, then in zip(after, before, strict=True))
    if wrong > TOLERANCE or wrong >= ignored:
        raise ConfigError(
            f"the temperature is {temperature}, but the teacher's server at {server.url} gives log-probs at temperature 1 "
            f"whatever a request asks for, as most do, and one token's log-prob cannot be converted. Set it to 1, or load "
            f"the teacher here with a path"
        )


def _spread(values: list[float] | tuple[float, ...]) -> float:
    return max(values) - min(values)


def _differences(scores: list[Scores]) -> list[float]:
    return [probe.logprobs[-1] - scores[0].logprobs[-1] for probe in scores[1:]]
