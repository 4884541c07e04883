"""The verdict: what would keep a run from learning, from the worst down. Guards have the rules that they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from fastkl.trainer.config.offline import ProbeConfig
from fastkl.trainer.runs.guards.rules import CHANCE, RULES, Seen, facts_of, nothing_to_learn

LARGE, FAIR, LOUD = 0.25, 4.0, 2.0  # of Σ|d|; times what so many tokens would have; nats
SHRILL, RARE = 6.0, 2.0  # nats, however long completions are; times what so many tokens would have
FAR = 4.0  # nats per token: a student at 2.7 still learned (docs/metrics/probe.md)
FEW_COMMON = 0.2  # of the likeliest tokens
SURE, AWAY = 0.1, 1.5  # nats: where whole distributions were two to four times cheaper than sampled tokens
FINE = "fine"

Said = Mapping[str, Any]


class Reason(NamedTuple):
    """Something that the figures show."""

    verdict: str
    text: str
    advice: str


def judged(said: Said, config: ProbeConfig) -> dict[str, Any]:
    """`verdict`, the first of the `reasons`, and an `objective` to begin with where nothing is in its way."""
    reasons = [*_found(said, _first_step(said, config))]
    verdict = reasons[0].verdict if reasons else FINE
    return {"verdict": verdict, "reasons": [reason._asdict() for reason in reasons], "objective": _objective(said)}


def _first_step(said: Said, config: ProbeConfig) -> Seen:
    facts = facts_of(config, said["vocabularies"], said["has_experts"])
    return Seen([{"loss": 0.0, **said["metrics"]}], [], facts, config.guards)


def _found(said: Said, seen: Seen) -> Iterator[Reason]:
    """From the worst down."""
    verdicts = {
        "teacher_constant": "the teacher is broken",
        "mismatch": "the sampler is wrong, or has too few bits" if seen.facts.rounds else "the sampler is wrong",
        "nothing_to_learn": "nothing to learn on these prompts",
        "repetition": "completions repeat themselves",
        "few_tokens": "few tokens have it all",
    }
    # What each guard would say of a first step like this: the text and its advice.
    guards = {rule.name: (text, rule.advice) for rule in RULES if (text := rule.find(seen)) is not None}
    rules: tuple[str | Callable[[Said], Reason | None], ...] = (
        "teacher_constant",
        "mismatch",
        "nothing_to_learn",
        partial(little_to_learn, seen=seen),
        first_token,
        last_token,
        "repetition",  # what repeats itself is cut too, and a higher limit ends nothing
        partial(too_far, temperature=seen.facts.temperature),  # nor for a student that knows no end
        truncated,
        no_better,
        "few_tokens",
    )
    for rule in rules:
        if not isinstance(rule, str):
            reason = rule(said)
        else:
            reason = Reason(verdicts[rule], *guards[rule]) if rule in guards else None
        if reason is not None:
            yield reason


def little_to_learn(_: Said, seen: Seen) -> Reason | None:
    """Where the sampled tokens alone would teach nothing, distributions taught something at one high rate."""
    text = nothing_to_learn(seen._replace(facts=seen.facts._replace(compares=False)))
    if text is None or nothing_to_learn(seen) is not None:
        return None
    advice = "Other prompts teach far more; on these, try a rate several times higher, and grade the student on others"
    return Reason("little to learn on these prompts", text, advice)


def first_token(said: Said) -> Reason | None:
    """A teacher that expects another beginning is surprised by the first token, and follows afterwards."""
    return _of_place(said, "first", "begins", "Compare how both models' answers begin: chat template, a space, a tag")


def last_token(said: Said) -> Reason | None:
    """A teacher that goes on, or ends a turn with another token, is surprised by the last one."""
    return _of_place(said, "last", "ends", "Compare how both models' answers end: the token that ends a turn")


def _of_place(said: Said, place: str, verb: str, advice: str) -> Reason | None:
    gap = said["share_of_gap"]
    share, fair, mean = gap[f"{place}_token"], gap[f"{place}_tokens_of_all"], gap[f"{place}_token_mean"]
    is_large = mean >= LOUD and share >= max(LARGE, min(FAIR * fair, (1 + fair) / 2))
    is_shrill = mean >= SHRILL and share >= min(RARE * fair, (1 + fair) / 2)
    if not is_large and not is_shrill:
        return None
    return Reason(
        "formats differ",
        f"the {place} {said['unit']}s are {fair:.0%} of all and have {share:.0%} of the gap, {mean:.2g} nats each: the "
        f"teacher {verb} in another way",
        advice,
    )


def truncated(said: Said) -> Reason | None:
    """A completion that is cut is judged without its end, and is mostly graded wrong."""
    share = said["metrics"]["completions/truncated_fraction"]
    if share < 0.5:
        return None
    text = f"{share:.0%} of the completions are cut at the length limit"
    return Reason("truncated", text, "Raise sampling.max_new_tokens, or teach the student to end (fastkl sft)")


def too_far(said: Said, temperature: float) -> Reason | None:
    """Where the teacher finds nothing of what the student writes likely, its log-probs say little about what is better.

    At a low temperature all log-probs are larger by as much.
    """
    kl, overlap = said["metrics"]["teacher_kl"], said["top_k"].get("overlap")
    is_strange = overlap is not None and overlap < FEW_COMMON
    if kl < FAR * max(1.0, 1 / temperature) and not is_strange:
        return None
    common = f", and {overlap:.0%} of the likeliest tokens are common to both" if is_strange else ""
    advice = "Fine-tune the student on some of the teacher's answers first (fastkl sft), then distil"
    return Reason("too far apart", f"teacher_kl is {kl:.3g} nats per token{common}", advice)


def no_better(said: Said) -> Reason | None:
    """The gap in accuracy is about what distillation can bring (arXiv 2605.30070)."""
    gap, errors = said["accuracy"]["gap"], said["accuracy"]["gap_se"]
    known = {way: difference for way, difference in gap.items() if errors[way] is not None}
    if not known or any(difference > CHANCE * errors[way] for way, difference in known.items()):
        return None
    text = "; ".join(f"{way} {difference:+.1%} ± {errors[way]:.1%}" for way, difference in known.items())
    advice = "Take a better teacher or harder prompts; or more prompts (--prompts), if this may be chance"
    return Reason("the teacher is no better", f"its accuracy less the student's: {text}", advice)


def _objective(said: Said) -> str:
    """What began well on students like this one (docs/metrics/probe.md); with segments, what compares texts."""
    if said["unit"] == "token" and (said["entropy"]["mean"] < SURE or said["metrics"]["teacher_kl"] > AWAY):
        return "reverse_kl"
    return "policy_gradient"
