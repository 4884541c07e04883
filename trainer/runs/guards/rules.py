"""The rules: what each looks at, why, and where its threshold comes from. docs/metrics/guards.md tells them to users.

A rule is a function of what is known of a run so far. It returns what it found, with numbers, or None.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from fastkl.trainer.config.guards import Action, GuardsConfig
from fastkl.trainer.config.training import DistillConfig, RunConfig
from fastkl.trainer.runs.guards.evaluations import ACCURACY, Evaluated, best_of

WINDOW = 3  # steps whose mean is taken
UNIFORM = 0.05  # of ln V: how near to −ln V the log-probs of a uniform distribution are
WILD = 10.0  # times ln V: how far below chance no language model is; one whose weights were read wrongly was 37 times
EQUAL = 1e-3  # nats: below it two models are one; a model and its copy in bfloat16 are 3e-4 apart
CONVERGED = 0.1  # nats: below it a few tokens may well hold what is left; the demo ends with 82 % in 1 % at 0.06
GREW = 4.0  # times as many completions are cut: a recipe with a short limit went from 42 to 96 %, and learned
CHANCE = 2.0  # standard errors of a difference
DENSE, EXPERTS = 0.002, 0.02  # nats
SURE = 6.0  # standard errors, of tokens that depend on each other
SLOPE = 0.03  # two copies in 16 bits of a small model, at temperature 0.5: 0.017; temperature 1.05 in place of 1: 0.035
ROUNDED = 0.05  # nats: a small model and its copy in bfloat16 were up to 0.016 apart
SAMPLED, WHOLE = 0.1, 0.02  # nats: the least teacher_kl that sampled tokens, and distributions, learned from

Row = Mapping[str, float]


class Facts(NamedTuple):
    """What rules know of a run beside its metrics."""

    vocabularies: frozenset[int]  # how many ids teachers choose from
    has_experts: bool = False  # a mixture of experts
    has_dropout: bool = False  # in the update: it sees other log-probs than the sampler then
    learns_otherwise: bool = False  # from something else than its teachers
    compares: bool = False  # distributions, or lists of likely tokens: more than the sampled token
    temperature: float = 1.0  # of the samples, and of the log-probs of both
    rounds: bool = False  # the sampler, or the update, computes in bfloat16, though the weights have more bits


def facts_of(config: RunConfig, vocabularies: Iterable[int], has_experts: bool) -> Facts:
    sizes, has_dropout = frozenset(vocabularies), config.student.dropout != "off"
    if not isinstance(config, DistillConfig):
        return Facts(sizes, has_experts, has_dropout)
    compares = config.loss.objective != "policy_gradient"
    in_bfloat16 = config.sampling.dtype == "bfloat16" or config.mixed_precision == "bf16"
    rounds = in_bfloat16 and config.student.dtype != "bfloat16"
    return Facts(
        sizes, has_experts, has_dropout, config.learns_otherwise, compares, config.sampling.temperature, rounds
    )


class Seen(NamedTuple):
    """A run up to now, with at least one step."""

    steps: Sequence[Row]  # of metrics.jsonl, the steps from the first on
    evaluations: Sequence[Evaluated]
    facts: Facts
    limits: GuardsConfig

    def first(self, name: str) -> float | None:
        """The mean of a metric over the first steps that have it."""
        return _mean(_some(self.steps, name, WINDOW))

    def now(self, name: str) -> float | None:
        """The mean of a metric over the last steps that have it."""
        return _mean(_some(reversed(self.steps), name, WINDOW))

    def has_begun(self, name: str) -> bool:
        """Whether the first steps of a metric are over, and others have come."""
        return len(_some(self.steps, name, 2 * WINDOW)) == 2 * WINDOW


class Rule(NamedTuple):
    """A rule by its name, which is its setting in `guards`."""

    name: str
    find: Callable[[Seen], str | None]
    advice: str  # what it means, and what to do

    def action(self, config: GuardsConfig) -> Action:
        action: Action = getattr(config, self.name)
        return action


def teacher_constant(seen: Seen) -> str | None:
    """A teacher that finds all tokens equally likely teaches nothing: a broken head, a server that woke up without weights
    (redai-studio/Relax pull request 287). Nor does one whose weights were read in another dtype, or without their scales.

    Log-probs at a temperature below 1 lie farther apart, by its inverse.

    Constant: no distribution of a language model is, unless student and teacher are both sure of everything. Uniform:
    every log-prob is about −ln V. Wild: far below that.
    """
    row = seen.steps[-1]
    std, mean = row.get("teacher_logprobs/std"), row.get("teacher_logprobs/mean")
    if std is None or mean is None:
        return None
    is_constant = std < seen.limits.min_teacher_std and row.get("entropy", 1.0) >= seen.limits.min_entropy
    flat = [math.log(size) for size in seen.facts.vocabularies]
    is_uniform = any(std < UNIFORM * each and abs(mean + each) < UNIFORM * each for each in flat)
    if mean < -WILD * max(flat) * max(1.0, 1 / seen.facts.temperature):
        chance = -max(flat)
        return f"the teacher's log-probs are far below chance: mean {mean:.4g} nats; a uniform teacher has {chance:.3g}"
    if not is_constant and not is_uniform:
        return None
    what = "uniform" if is_uniform else "constant"
    return f"the teacher's log-probs are {what}: mean {mean:.4g}, standard deviation {std:.2g} nats"


def nothing_to_learn(seen: Seen) -> str | None:
    """Memorised prompts: the student is sure, and the teacher agrees. And: the student is the teacher.

    Measured (docs/metrics/guards.md): memorised prompts began with an entropy of 0.001 to 0.061. There sampled tokens
    taught nothing up to a teacher_kl of 0.145. Distributions taught nothing up to 0.017, and something from 0.085 on. The
    surest students that learned from sampled tokens began with 0.45 and 0.05. Rewards, a reference and given completions
    teach without a teacher.
    """
    row, limits = seen.steps[0], seen.limits
    kl, entropy = row.get("teacher_kl"), row.get("entropy")
    if len(seen.steps) > 1 or kl is None or entropy is None or seen.facts.learns_otherwise:
        return None
    if abs(kl) < EQUAL:
        return f"teacher_kl of the first step is {kl:.2g} nats per token: the student is the teacher already"
    if kl < teacher_kl_limit(seen.facts, limits) and entropy < limits.min_entropy:
        return (
            f"teacher_kl and entropy of the first step's samples are {kl:.2g} and {entropy:.2g} nats per token: on these "
            f"prompts the student is sure, and the teacher agrees"
        )
    return None


def teacher_kl_limit(facts: Facts, limits: GuardsConfig) -> float:
    if limits.min_teacher_kl is not None:
        return limits.min_teacher_kl
    return WHOLE if facts.compares else SAMPLED


def entropy_collapse(seen: Seen) -> str | None:
    """Variety is what sampling learns from. Losing it is healthy only where the KL falls, or the reward rises, for it."""
    first, now = seen.first("entropy"), seen.now("entropy")
    if first is None or now is None or not seen.has_begun("entropy") or now >= seen.limits.min_entropy_share * first:
        return None
    for name, gain in (("teacher_kl", -1), ("reward/mean", 1)):
        before, after = seen.first(name), seen.now(name)
        if before is not None and after is not None and gain * (after - before) > 0:
            return None
    return f"entropy fell from {first:.3g} to {now:.3g} nats per token, and nothing was gained by it"


def length_growth(seen: Seen) -> str | None:
    """Completions that grow until they are cut: the known way in which on-policy distillation ends (arXiv 2604.08527)."""
    cut, length = "completions/truncated_fraction", "completions/mean_length"
    before, after, short, long = seen.first(cut), seen.now(cut), seen.first(length), seen.now(length)
    if before is None or after is None or short is None or long is None or not seen.has_begun(cut):
        return None
    if after < seen.limits.max_truncated or before > after / GREW or long <= short:
        return None
    return f"completions grew from {short:.4g} to {long:.4g} tokens; {before:.0%} of them were cut, and now {after:.0%} are"


def repetition(seen: Seen) -> str | None:
    """A loop that only the limit ends: its tokens are cheap for both models, and hide everything else."""
    first, now = seen.first("completions/looping_fraction"), seen.now("completions/looping_fraction")
    if first is None or now is None or now <= seen.limits.max_looping or now < first:
        return None
    return f"{now:.0%} of the completions are cut while they repeat themselves"


def mismatch(seen: Seen) -> str | None:
    """Sampler and trainer are one model. At health their KL is 2e-4 for dense models and 1e-3 to 2e-3 for mixtures of
    experts; 0.09 is a bug (tinker-cookbook, rl_numerics_check). Ten times the healthy value is above it for sure. Where one
    of the two rounds to bfloat16, more is healthy (docs/metrics/guards.md).

    Samples of older weights and dropout differ for another reason.
    """
    if seen.facts.has_dropout:
        return None
    fresh = [row for row in seen.steps[-WINDOW:] if not row.get("staleness/max")]
    now, limit = _mean(_some(fresh, "sampler_mismatch/kl", WINDOW)), mismatch_limit(seen.facts, seen.limits)
    if now is not None and now > limit:
        even = ", even where one of the two computes in bfloat16" if seen.facts.rounds else ""
        return f"the KL between sampler and trainer is {now:.2g} nats per token; above {limit:g} is not healthy{even}"
    return cuts_off(fresh, seen.limits) or sharpens(fresh, seen)


def cuts_off(fresh: Sequence[Row], limits: GuardsConfig) -> str | None:
    """Rounding moves probability from token to token. Only a sampler that draws from fewer tokens loses some."""
    missing, error = _with_error(fresh, "sampler_mismatch/missing")
    if missing <= max(limits.max_missing, SURE * error):
        return None
    return (
        f"the sampler does not draw from tokens that have {missing:.1%} of the trainer's probability, as with a top-p, "
        f"top-k or min-p of its own"
    )


def sharpens(fresh: Sequence[Row], seen: Seen) -> str | None:
    """Rounding knows nothing of what is likely. A temperature moves log-probs in proportion to themselves."""
    slope, error = _with_error(fresh, "sampler_mismatch/slope")
    if abs(slope) <= max(slope_limit(seen.facts, seen.limits), SURE * error):
        return None
    what = "flatter" if slope < 0 else "sharper"
    return (
        f"the sampler is {what} than the trainer: its log-probs differ by {slope:+.1%} of themselves, as with another "
        f"temperature"
    )


def slope_limit(facts: Facts, limits: GuardsConfig) -> float:
    if limits.max_slope is not None:
        return limits.max_slope
    return SLOPE * (2 if facts.rounds or facts.has_experts else 1)


def _with_error(rows: Sequence[Row], name: str) -> tuple[float, float]:
    """The mean of a metric over rows, with its standard error; 0 and 0 without any."""
    errors = _some(rows, f"{name}_se", WINDOW)
    return _mean(_some(rows, name, WINDOW)) or 0.0, math.hypot(*errors) / max(1, len(errors))


def mismatch_limit(facts: Facts, limits: GuardsConfig) -> float:
    if limits.max_mismatch is not None:
        return limits.max_mismatch
    if facts.rounds:
        return ROUNDED
    return EXPERTS if facts.has_experts else DENSE


def few_tokens(seen: Seen) -> str | None:
    """Where 1 % of the tokens have nearly all of the gradient, the rest learns nothing: heavy tails, or a template's
    first tokens. Not once the student is near the teacher: then little is left anywhere."""
    share, kl = seen.now("advantages/top_share"), seen.now("teacher_kl")
    if share is None or kl is None or share <= seen.limits.max_top_share or kl < CONVERGED:
        return None
    return f"1 % of the tokens have {share:.0%} of the advantages, while teacher_kl is {kl:.3g} nats per token"


def rest(seen: Seen) -> str | None:
    """A divergence over the tokens of both compares the rest of each side as one outcome, whatever is in it.

    Measured (docs/metrics/guards.md): at 0.8 on either side students unlearned half or all that they knew, in all six runs.
    """
    sides = {"student": "policy/rest_mass", "teacher": "policy/teacher_rest_mass"}
    masses = {side: seen.steps[-1].get(name, 0.0) for side, name in sides.items()}
    side = max(masses, key=lambda side: masses[side])
    if masses[side] <= seen.limits.max_rest:
        return None
    other = next(name for name in sides if name != side)
    return f"the {side} gives {masses[side]:.0%} of its probability to tokens that the {other} does not have"


def accuracy_falling(seen: Seen) -> str | None:
    """Several evaluations in a row below the best, each by more than two standard errors of the difference."""
    count = seen.limits.evaluations
    earlier, last = seen.evaluations[:-count], seen.evaluations[-count:]
    best = best_of(earlier)
    if best is None or ACCURACY not in seen.steps[-1]:
        return None
    if any(best.accuracy - each.accuracy <= CHANCE * math.hypot(best.error, each.error) for each in last):
        return None
    return (
        f"eval/accuracy was {best.accuracy:.1%} after step {best.step}, and the last {count} evaluations are below by more "
        f"than chance: {', '.join(f'{each.accuracy:.1%}' for each in last)}"
    )


def _some(rows: Iterable[Row], name: str, count: int) -> list[float]:
    """The first so many values of a metric."""
    return [*itertools.islice((row[name] for row in rows if name in row), count)]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


RULES = (
    Rule(
        "teacher_constant",
        teacher_constant,
        "Nothing can be learned from it. Look at the teacher's files or its server",
    ),
    Rule(
        "nothing_to_learn",
        nothing_to_learn,
        "Take other prompts, another teacher, or a student from before it had memorised these. Where the two differ, "
        "reverse_kl and top_k may learn a little",
    ),
    Rule(
        "entropy_collapse",
        entropy_collapse,
        "Lower optim.lr, or go back to an earlier checkpoint",
    ),
    Rule(
        "length_growth",
        length_growth,
        "Lower optim.lr, or raise sampling.max_new_tokens if the teacher writes that long",
    ),
    Rule(
        "repetition",
        repetition,
        "Lower optim.lr, or lower sampling.max_new_tokens; look at the completions in the report",
    ),
    Rule(
        "mismatch",
        mismatch,
        "The update sees another distribution than was sampled from. A server's own settings can cause it: "
        "temperature, top-p, penalties. So can fewer bits: unset sampling.dtype and mixed_precision, let a server compute "
        "as the trainer does, and set student.dtype to float32. Otherwise try sampling.engine: generate",
    ),
    Rule(
        "few_tokens",
        few_tokens,
        "Look at them in the report. Do both models end and begin a turn in the same way? loss.advantage_clip bounds them",
    ),
    Rule(
        "rest",
        rest,
        "Of these the objective sees one sum alone. Set loss.objective to policy_gradient, which compares texts",
    ),
    Rule(
        "accuracy_falling",
        accuracy_falling,
        "Stop here, or lower optim.lr. checkpoint.best keeps the best student",
    ),
)
