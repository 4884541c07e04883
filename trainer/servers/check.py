"""What a server must show before a run relies on its log-probs.

Most servers answer anything: they ignore an option they do not know, are off by one token, or serve a model with another
tokenizer, and a run would learn from noise. The probes are one text, each with another last token. In a sound answer

- the text before is scored alike in all of them,
- the last token's own log-prob depends on which one it is,
- the likeliest token in its place does not: a server that looks at the logits *after* a token fails here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from transformers import PreTrainedTokenizerBase

from fastkl.trainer.config.teacher import TeacherServerConfig
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.models.tokenizers import SAMPLE_TEXT, added_tokens, first_three, vocabulary, where_they_part
from fastkl.trainer.servers.answers import BadAnswer, Unscored
from fastkl.trainer.servers.completions import APIS, Api, CompletionsServer, Scores
from fastkl.trainer.servers.connection import Refused
from fastkl.trainer.servers.quoting import quote, quote_value
from fastkl.trainer.servers.recheck import Reference, distance
from fastkl.trainer.servers.token_texts import TokenTexts

PROBES, PROBE_TOKENS = 4, 24
ADDED_AT_ONCE = 256  # added tokens that the server is asked about in one request, or by scores at all
TOLERANCE = 0.1  # nats: above what 16-bit arithmetic and batching do, below what a defect does
REJECTS_OPTION = (400, 422, 501)  # how servers refuse an option
USE_VLLM = "Serve the teacher with vLLM, or load it here with a path"
NAME_TOKENIZER = "give teacher.tokenizer, the folder or Hub id of the served model's tokenizer"
SAME_FAMILY = (
    "it could not score the student's tokens. Serve a teacher of the student's family, or set teacher.tokenizer to "
    "own:FOLDER (docs/teachers/tokenizers.md)"
)
SAME_VOCABULARY = "Use a teacher with the student's vocabulary"


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
    top_k_setting: str = "loss.top_k",
    own: str | None = None,
) -> Reference:
    """What to ask it again later, and how; a ConfigError says what is wrong with it, a ServerError that it is not there.

    Args:
        tokenizer: The one whose ids will be sent.
        trusted: The user says that it is the server's own tokenizer. It is compared all the same where the server can.
        temperature: That of the log-probs.
        longest: A sequence as long as they get.
        remedy: What to do if it is too long.
        top_k: How many of the likeliest tokens will be asked for.
        top_k_setting: The setting that says so.
        own: What names the tokenizer, where it is not the student's.
    """
    another = None if own is None else f"teacher.tokenizer is {own}; name the tokenizer of the served model"
    compared = _check_tokenization(server, tokenizer, another or SAME_FAMILY)
    ids = _encoded(tokenizer, SAMPLE_TEXT)[:PROBE_TOKENS]
    probes = [[*ids, last] for last in list(dict.fromkeys(ids))[:PROBES]]
    api, scores = _choose_api(server, config, probes, top_k, top_k_setting)
    if not (compared or trusted):
        _check_texts(server, tokenizer, api, probes[0], scores[0])
    _check_alignment(server, scores)
    if temperature != 1:
        _check_temperature(server, api, probes, scores, temperature)
    limits: list[Scores] = []
    check_limits(
        lambda sequence: limits.extend(server.score([sequence], api, temperature, top_k)),
        f"the teacher's server at {server.url} cannot score",
        ([*probes[0], vocabulary(tokenizer) - 1], another or SAME_VOCABULARY),
        (longest, f"{remedy}, or serve the teacher with a longer context"),
    )
    length = len(probes[0])
    first = limits[0].start(length)  # the first probe, which the highest id came after
    alike = [probe.logprobs[:-1] for probe in scores] + ([first.logprobs[:-1]] if temperature == 1 else [])
    noise = max(distance(other, alike[0]) for other in alike)
    return Reference(api, probes[0], temperature, top_k, first, noise)


def check_limits(
    ask: Callable[[list[int]], object], refusal: str, highest: tuple[list[int], str], longest: tuple[list[int], str]
) -> None:
    """Asks about a sequence that ends with the highest id, and about the longest; each comes with its remedy."""
    cases = (
        (f"id {highest[0][-1]}, the tokenizer's highest", *highest),
        (f"{len(longest[0])} tokens, the most", *longest),
    )
    for what, sequence, remedy in cases:
        try:
            ask(sequence)
        except (BadAnswer, Refused) as error:
            raise ConfigError(f"{refusal} {what}: {error}. {remedy}") from error


def _unfit(server: CompletionsServer, reason: str) -> ConfigError:
    return ConfigError(f"the teacher's server at {server.url} {reason}")


def _check_tokenization(server: CompletionsServer, tokenizer: PreTrainedTokenizerBase, remedy: str) -> bool:
    """Compares how both tokenize a text, and the added tokens; False where the server does not tell."""
    text = SAMPLE_TEXT + (tokenizer.eos_token or "")
    ours, theirs = _encoded(tokenizer, text), server.tokenize(text)
    if theirs is None:
        return False
    if ours != theirs:
        raise _unfit(
            server,
            f"tokenizes differently (the same text gives {len(ours)} tokens here and {len(theirs)} there, "
            f"{where_they_part(ours, theirs)}): {remedy}",
        )
    added = list(map(str, tokenizer.convert_ids_to_tokens(added_tokens(tokenizer))))
    for start in range(0, len(added), ADDED_AT_ONCE):
        _check_added(server, tokenizer, added[start : start + ADDED_AT_ONCE], remedy)
    return True


def _check_added(server: CompletionsServer, tokenizer: PreTrainedTokenizerBase, added: list[str], remedy: str) -> None:
    """Compares tokens that no ordinary text has: all of them in one text, and one by one where that differs."""
    if _encoded(tokenizer, "".join(added)) == server.tokenize("".join(added)):
        return
    answers = [(text, _encoded(tokenizer, text), server.tokenize(text)) for text in added]
    named = [
        f"{text!r} is {ours} here and {quote(str(theirs))} there" for text, ours, theirs in answers if ours != theirs
    ]
    if named:
        raise _unfit(server, f"tokenizes differently: {first_three(named, '; ')}: {remedy}")


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _choose_api(
    server: CompletionsServer, config: TeacherServerConfig, probes: list[list[int]], top_k: int | None, setting: str
) -> tuple[Api, list[Scores]]:
    """The first way of asking that gets log-probs of the prompt, and those of the probes."""
    failures = []
    for api in APIS if config.api == "auto" else (config.api,):
        try:
            return api, server.score(probes, api, 1.0, top_k)
        except (Unscored, Refused) as error:
            if isinstance(error, Refused) and error.status not in REJECTS_OPTION:
                raise
            failures.append(f"{api}: {error}")
        except BadAnswer as error:
            raise ConfigError(f"{error}. {USE_VLLM}") from error
    missing, remedy = "log-probs", USE_VLLM
    if top_k is not None:
        missing += f" and {top_k} likeliest tokens ({setting})"
        remedy += "; vLLM lists --max-logprobs tokens, 20 by default"
    raise _unfit(server, f"gives no {missing} of given tokens ({'; '.join(failures)}). {remedy}")


def _check_texts(
    server: CompletionsServer, tokenizer: PreTrainedTokenizerBase, api: Api, ids: list[int], scores: Scores
) -> None:
    """Compares the texts that both have for the probe's tokens, and for added tokens as far as the server scores them."""
    texts = TokenTexts(tokenizer)
    if not texts.told(ids, scores.texts):
        raise _unfit(server, f"tells nothing about its tokenizer; {NAME_TOKENIZER}")
    differing = texts.differing(ids, scores.texts)
    added = added_tokens(tokenizer)[:ADDED_AT_ONCE]
    for start in range(0, len(added), PROBE_TOKENS):
        sequence = [ids[0], *added[start : start + PROBE_TOKENS]]
        with suppress(BadAnswer, Refused):  # some stand for what is no text, as the place of an image
            differing += texts.differing(sequence, server.score([sequence], api, 1.0)[0].texts)
    for token, ours, theirs in differing[:1]:
        raise ConfigError(
            f"id {token} is {ours!r} in the student's tokenizer and {quote_value(theirs)} for the teacher's server at "
            f"{server.url}: {SAME_FAMILY}; if it only writes its tokens in another way, {NAME_TOKENIZER}"
        )


def _check_alignment(server: CompletionsServer, scores: list[Scores]) -> None:
    before = max(_spread(values) for values in zip(*(probe.logprobs[:-1] for probe in scores), strict=True))
    if before > TOLERANCE:
        raise _unfit(
            server,
            f"scores a text differently, by up to {before:.2f}, when only the token after it changes: its log-probs are "
            f"shifted or not reproducible. {USE_VLLM}",
        )
    last = _spread([probe.logprobs[-1] for probe in scores])
    if last < TOLERANCE:
        raise _unfit(
            server,
            f"gives the last token the same log-prob whichever it is (within {last:.2g}): its log-probs are shifted. "
            f"{USE_VLLM}",
        )
    best = [value for probe in scores if (value := probe.best[-1]) is not None]
    if len(best) < 2:
        raise _unfit(
            server,
            f"does not say which token it finds likeliest (top_logprobs), so nobody knows whether its log-probs are "
            f"shifted. {USE_VLLM}",
        )
    if _spread(best) > TOLERANCE:
        raise _unfit(
            server,
            f"finds another token likeliest in a place once the token there changes (log-probs "
            f"{', '.join(f'{value:.2f}' for value in best)}): its log-probs are shifted by one, to what comes after each "
            f"token. {USE_VLLM}",
        )


def _check_temperature(
    server: CompletionsServer, api: Api, probes: list[list[int]], plain: list[Scores], temperature: float
) -> None:
    """At temperature T, differences of log-probs in one place are those at 1, divided by T."""
    scaled = server.score(probes, api, temperature)
    pairs = list(zip(_differences(plain), _differences(scaled), strict=True))
    wrong = max(abs(after - before / temperature) for before, after in pairs)
    ignored = max(abs(after - before) for before, after in pairs)
    if wrong > TOLERANCE or wrong >= ignored:
        raise ConfigError(
            f"the temperature is {temperature}, but the teacher's server at {server.url} gives log-probs at temperature 1 "
            f"whatever a request asks for, as most do. Set it to 1, or load the teacher here with a path"
        )


def _spread(values: list[float] | tuple[float, ...]) -> float:
    return max(values) - min(values)


def _differences(scores: list[Scores]) -> list[float]:
    return [probe.logprobs[-1] - scores[0].logprobs[-1] for probe in scores[1:]]
