"""Every metric that a run writes: its unit, what it means, and what is healthy where that is known.

The progress bar, the report's figures and docs/metrics/metrics.md are made from this table. Make the page again after a
change:

    python -m fastkl.trainer.metrics > docs/metrics/metrics.md
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from fastkl.kernels.divergence.formula import DIVERGENCES

METRIC_STEMS = (*DIVERGENCES, "top_k_kl")  # of what a loss says of itself: <stem>_mean, <stem>_max
# Words in a name that stand for others: each such entry is a family.
PLACEHOLDERS = {"DATA_SET": r"[\w-]+", "RULE": r"\w+", "DIVERGENCE": "|".join(METRIC_STEMS), "at_K": r"at_\d+"}
PROGRESS = ("loss", "teacher_kl", "tokens_per_second", "eval/accuracy")  # the columns of the progress bar


class Metric(NamedTuple):
    """A metric or a family of metrics."""

    name: str
    unit: str
    when: str  # what it takes to be written; "": every run has it
    meaning: str
    healthy: str | None = None  # None: not known, or different from run to run
    label: str | None = None  # in the progress bar; None: the name
    format: str = ".4g"

    @property
    def pattern(self) -> str:
        """A regular expression for its names; those of an evaluation may name a set and a temperature."""
        pattern = re.escape(self.name)
        if self.name.startswith("eval/"):
            stem, error = pattern.removeprefix("eval/").removesuffix(ERROR), ERROR * pattern.endswith(ERROR)
            pattern = rf"eval/([\w-]+/)?{stem}(_t[\d.e+-]+)?{error}"
        for word, names in PLACEHOLDERS.items():
            pattern = pattern.replace(word, f"({names})")
        return pattern


class Group(NamedTuple):
    """Metrics that belong together, in the order of the report, which shows them in the part of its page called `part`."""

    title: str
    part: str
    metrics: tuple[Metric, ...]


ERROR = "_se"  # what follows a name, for the standard error of that metric
NATS, SECONDS = "nats per token", "seconds per step"
OWN, DISTILL, EVALUATION = "completions of the student", "distillation", "`eval.data`, in the steps that evaluate"
SEVERAL = "`eval.samples_per_prompt` above 1"
REWARD, SPARSE = "`reward.grader`", "`loss.backward: sparse`"
POLICY = "`loss.objective: policy_gradient`, and sft"
RATIO = "`policy_gradient`, `loss.top_k_tail: sampled`, and sft"
TAIL = "`loss.top_k_tail: sampled`"
CLIPPED = "`loss.method: ppo` or `cispo`"
COMPARED, WHOLE = "another objective", "a divergence over the whole vocabulary"
MISMATCH = f"{OWN}; under another objective than `policy_gradient`, heads of one size"
UNSURE = "`loss.forward_kl_above`"
WEIGHED = "`loss.weights`"
OF_SAMPLES = "`teacher.context.function` of samples"
SIBLING = "`teacher.context.function: sibling`, graded samples"
EXTRAPOLATED = "`loss.extrapolate`"
OWN_TOKENIZER = "`teacher.tokenizer: own`"
AHEAD = "`sampling.steps_ahead`"
GIVEN = "`sampling.on_policy_fraction` below 1, `policy_gradient`"

# fmt: off
GROUPS = (
    Group("Learning", "learning", (
        Metric("teacher_kl", NATS, "a teacher",
               "Mean of ℓ_sampler − ℓ_teacher over the student's own tokens. It estimates the reverse KL.",
               "falls towards 0"),
        Metric("eval/accuracy", "mean score", EVALUATION,
               "Mean of the grader's scores of the answers to held-out prompts.", "rises", "accuracy", ".1%"),
        Metric("eval/accuracy_se", "mean score", EVALUATION,
               "Standard error of `eval/accuracy`, by problem: the answers to one prompt count together."),
        Metric("eval/pass_at_K", "mean score", SEVERAL,
               "Mean of the best score of K answers to a prompt: pass@K. K is 2, 4, 8 … and `eval.samples_per_prompt`."),
        Metric("eval/pass_at_K_se", "mean score", SEVERAL, "Standard error of `eval/pass_at_K`."),
        Metric("entropy", NATS, OWN,
               "Mean of −ℓ_sampler over the student's own tokens. It estimates the student's entropy."),
        Metric("loss", "", "",
               "What the student minimises, as a mean over the step's tokens."),
        Metric("reward/groups_without_signal", "fraction", REWARD,
               "Groups (the completions of one prompt) whose rewards are all equal.",
               "below 1: at 1, `reward.baseline: group` teaches nothing"),
        Metric("reward/mean", "score", REWARD, "Mean reward of the completions.", "rises"),
        Metric("reward/std", "score", REWARD, "Standard deviation of the rewards.", "above 0: at 0 nothing is learned"),
        Metric("teacher_kl/DATA_SET", NATS, "`mixture`", "`teacher_kl` of one data set.", "falls towards 0"),
    )),
    Group("Sampler against trainer", "mismatch", (
        Metric("sampler_mismatch/kl", NATS, MISMATCH,
               "Mean of r − 1 − log r, log r = ℓ − ℓ_sampler. It estimates the KL of the trainer from the sampler.",
               "about 2e-4 for dense models in 16 bits, 1e-3 to 2e-3 for mixtures of experts"),
        Metric("sampler_mismatch/mean_abs", "nats", MISMATCH,
               "Mean of |ℓ − ℓ_sampler|. Sampler and trainer compute the same number in two ways.",
               "about 1e-5 where both compute in float32"),
        Metric("sampler_mismatch/missing", "probability", MISMATCH,
               "1 − mean of r: what the trainer gives to tokens that the sampler does not draw. From 200 tokens on.",
               "about 0; 0.01 to 0.02 with a top-p of 0.9 or 0.95"),
        Metric("sampler_mismatch/missing_se", "probability", MISMATCH, "Standard error of `sampler_mismatch/missing`."),
        Metric("sampler_mismatch/outside_0.9_1.1", "share of ratios", MISMATCH,
               "Tokens whose ratio exp(ℓ − ℓ_sampler) is below 0.9 or above 1.1."),
        Metric("sampler_mismatch/p95_abs", "nats", MISMATCH, "The 95th percentile of |ℓ − ℓ_sampler|."),
        Metric("sampler_mismatch/slope", "", MISMATCH,
               "Slope of ℓ_sampler − ℓ over ℓ, by least squares. Another temperature tilts it. From 200 tokens on.",
               "within 0.02 of 0; about −0.07 where a sampler has temperature 1.1 in place of 1"),
        Metric("sampler_mismatch/slope_se", "", MISMATCH, "Standard error of `sampler_mismatch/slope`."),
    )),
    Group("Age of the samples", "mismatch", (
        Metric("staleness/max", "steps", AHEAD, "How much older the oldest weights that wrote a sample are than those that "
               "learn from it.", "at most `sampling.max_staleness`"),
        Metric("staleness/mean", "steps", AHEAD, "The same, as a mean over the student's own tokens."),
    )),
    Group("Time", "time", (
        Metric("time/align", SECONDS, OWN_TOKENIZER, "Completions in the teacher's tokens."),
        Metric("time/old_logprobs", SECONDS, "`policy_gradient`, or `tip` in `loss.weights`",
               "A forward pass for the log-probs that the ratio is taken against, or for entropies, where one is needed."),
        Metric("time/push_weights", SECONDS, "`sampling.server`", "Handing the student's weights to the sampling server."),
        Metric("time/rollouts", SECONDS, AHEAD,
               "How long the sampling server took for the step's samples, beside earlier steps. No part of "
               "`tokens_per_second`."),
        Metric("time/ranks", SECONDS, DISTILL, "Ranks of the tokens in samples.jsonl."),
        Metric("time/sample", SECONDS, DISTILL,
               "Sampling and grading. With `sampling.steps_ahead`: waiting for the samples, and grading.",
               "with `sampling.steps_ahead` about 0: else the server is slower than the rest"),
        Metric("time/student_top_k", SECONDS, "`loss.top_k_of: student` or `both`",
               "A forward pass for the student's likeliest tokens."),
        Metric("time/teacher", SECONDS, "a teacher, `policy_gradient`, `top_k` or `loss.weights` that need its log-probs",
               "The forward passes of teacher and reference; with `loss.baseline: kl` one of the student too. Divergences "
               "over the whole vocabulary have theirs in `time/train`."),
        Metric("time/train", SECONDS, "", "The update."),
        Metric("tokens_per_second", "tokens", "",
               "Tokens of the step's samples, prompts included, divided by the seconds of all phases.",
               None, "tok/s", ",.0f"),
    )),
    Group("Completions", "rest", (
        Metric("completions/dropped_fraction", "fraction", "a length filter of `sampling`",
               "Completions that the filters leave out of the loss.", "below 1: at 1 a step changes nothing"),
        Metric("completions/looping_fraction", "fraction", OWN,
               "Completions that reached the length limit while they repeated themselves: at least three times, over at "
               "least 16 tokens.", "about 0"),
        Metric("completions/mean_length", "tokens", f"{OWN}, and sft", "Mean length of those that the loss sees."),
        Metric("completions/truncated_fraction", "fraction", OWN,
               "Completions that reached the length limit before an end of sequence."),
        Metric("eval/mean_length", "tokens", EVALUATION, "Mean length of the answers."),
        Metric("eval/truncated_fraction", "fraction", EVALUATION, "Answers that reached the length limit."),
    )),
    Group("FLOPs", "rest", (
        Metric("eval/flops", "FLOPs", EVALUATION,
               "Writing all answers of the evaluation. They are no part of what the run costs: `flops/*`."),
        Metric("flops/reference", "FLOPs", EXTRAPOLATED, "The reference's forward passes."),
        Metric("flops/sampling", "FLOPs", DISTILL, "The student's completions: prefill and decode."),
        Metric("flops/student", "FLOPs", "",
               "The update, and the forward passes of `loss.old_logprobs: recompute`, `tip`, `loss.baseline: kl` and "
               "`loss.top_k_of: student`."),
        Metric("flops/teacher", "FLOPs", "a teacher that no server holds",
               "The teacher's forward passes, but for what `teacher.cache` had."),
    )),
    Group("A cache of the teacher's scores", "rest", (
        Metric("teacher_cache/hits", "samples per step", "`teacher.cache`",
               "Samples whose scores were there already, or that are equal to another of the step.",
               "above 0 where completions are given, and after a restart"),
        Metric("teacher_cache/misses", "samples per step", "`teacher.cache`", "Samples that the teacher was asked about."),
    )),
    Group("The teacher's own prompt", "learning", (
        Metric("context/fallback_fraction", "fraction", SIBLING,
               "Samples without another success or feedback: their teacher read the student's prompt."),
        Metric("context/feedback_fraction", "fraction", SIBLING,
               "Samples whose teacher was given the environment's feedback."),
        Metric("context/gap", NATS, "`teacher.context`, a teacher that no server holds",
               "Mean of ℓ_teacher after its own prompt, less ℓ_teacher after the student's, over the samples in "
               "samples.jsonl.", "above 0 where the student does what the teacher's prompt asks"),
        Metric("context/masked_fraction", "fraction", SIBLING,
               "Samples that are left out of the loss.", "below 1: at 1 a step changes nothing"),
        Metric("context/plain_fraction", "fraction", OF_SAMPLES,
               "Samples for which the function wrote no prompt: the teacher read the student's."),
        Metric("context/sibling_fraction", "fraction", SIBLING,
               "Samples whose teacher was given another sample of the prompt, one that succeeded.",
               "above 0: at 0 nobody succeeds, or everybody"),
        Metric("context/too_long_fraction", "fraction", OF_SAMPLES,
               "Samples of which the function's prompt was too long for the teacher: it read the student's.", "0"),
    )),
    Group("The teacher's own tokenizer", "learning", (
        Metric("alignment/aligned_fraction", "fraction", OWN_TOKENIZER,
               "Tokens that count and are in a segment. The teacher judges no others.", "near 1"),
        Metric("alignment/compared_fraction", "fraction", f"{OWN_TOKENIZER}, other objectives than `policy_gradient`",
               "Tokens at whose beginning the teacher's distribution is compared: it begins one there too. The others have "
               "the weight 0.", "near 1"),
        Metric("alignment/segment_bytes", "bytes", OWN_TOKENIZER, "Mean length of the segments."),
        Metric("alignment/segment_bytes_max", "bytes", OWN_TOKENIZER, "Length of the longest segment.",
               "below `loss.max_segment`, unless it is one token of both"),
        Metric("alignment/segment_tokens", "tokens", OWN_TOKENIZER, "The student's tokens in a segment, on average.",
               "near 1: the teacher then judges single tokens"),
        Metric("alignment/teacher_segment_tokens", "tokens", OWN_TOKENIZER, "The teacher's, in the same segments."),
    )),
    Group("Given completions", "rest", (
        Metric("given/forward_kl", NATS, f"{GIVEN}, a teacher",
               "Mean of ℓ_teacher − ℓ. It estimates the forward KL if the teacher wrote the completions.",
               "falls towards 0"),
        Metric("given/nll", NATS, GIVEN, "Mean of −ℓ.", "falls"),
    )),
    Group("Guards", "rest", (
        Metric("advantages/top_share", "fraction", "`policy_gradient`, at least 200 tokens",
               "What the 1 % of the student's own tokens with the largest advantages have of the sum of |advantage|.",
               "well below 0.9"),
        Metric("guards/RULE", "1", "a step in which the [guard](guards.md) found something", "Written as 1.", "never"),
        Metric("teacher_logprobs/mean", NATS, "a teacher",
               "Mean of ℓ_teacher over the student's own tokens; of several data sets, of the one whose ℓ_teacher vary "
               "least."),
        Metric("teacher_logprobs/std", "nats", "a teacher", "Their standard deviation.",
               "above 0: at 0 the teacher teaches nothing"),
    )),
    Group("The KL's part", "rest", (
        Metric("advantages/clip_fraction", "fraction", "`loss.advantage_clip`",
               "The student's own tokens whose KL part of the advantage was clipped.", "small: a clip is a bias"),
        Metric("advantages/kl_baseline", NATS, "`loss.baseline: kl`",
               "Mean of the exact reverse KL where the student's own tokens stand: `teacher_kl` without its noise. With "
               "`loss.extrapolate: λ`, λ times that and 1 − λ times the one from the reference.", "falls towards 0"),
        Metric("reference_kl", NATS, EXTRAPOLATED,
               "Mean of ℓ_sampler − ℓ_reference over the student's own tokens. It estimates the reverse KL from the "
               "reference."),
    )),
    Group("Optimizer", "rest", (
        Metric("optim/grad_norm", "", "", "Norm of the gradient before it is clipped. The mean over the optimizer steps."),
        Metric("optim/lr", "", "", "Learning rate."),
        Metric("optim/skipped", "optimizer steps", "",
               "Optimizer steps that were left out, because the gradient was not finite.", "0"),
        Metric("optim/unchanged", "fraction", "trained weights of 16 bits",
               "Weights with a gradient, of a sample, that an optimizer step left as they were.",
               "well below 0.5: else `student.dtype: float32`, or LoRA"),
    )),
    Group("Loss", "rest", (
        Metric("policy/DIVERGENCE_max", "nats", COMPARED, "The largest divergence of a token."),
        Metric("policy/DIVERGENCE_mean", NATS, COMPARED, "The divergence from the teacher.", "falls towards 0"),
        Metric("policy/added_forward_kl", NATS, UNSURE,
               "The forward KL that is added, before `loss.forward_kl_coef`. 0 where it is not."),
        Metric("policy/bucket_kl", NATS, TAIL, "The part of the divergence that the lists show: what `bucket` minimises."),
        Metric("policy/clip_fraction", "fraction", RATIO,
               "Tokens whose gradient a clip or `loss.truncate_ratio` changed."),
        Metric("policy/clip_high_fraction", "fraction", CLIPPED,
               "Tokens with a ratio above 1 + `loss.clip_high` and a positive advantage."),
        Metric("policy/clip_low_fraction", "fraction", CLIPPED,
               "Tokens with a ratio below 1 − `loss.clip_low` and a negative advantage."),
        Metric("policy/grad_error", "relative error", SPARSE,
               "Expected error of the sparse gradient.", "at most `loss.sparse_error` (2e-3 by default)"),
        Metric("policy/k1", NATS, POLICY, "Mean of −log r, r the importance ratio. It estimates KL(old ‖ policy)."),
        Metric("policy/k3", NATS, POLICY, "Mean of r − 1 − log r. It estimates the same KL and is never negative."),
        Metric("policy/kept_fraction", "fraction", SPARSE,
               "How much of tokens × vocabulary the sparse backward used.", "below 1: at 1 it saves nothing"),
        Metric("policy/list_mass", "fraction", TAIL, "The student's probability of a list's tokens."),
        Metric("policy/out_of_bounds_fraction", "fraction", "`loss.ratio_bounds`",
               "Tokens that are left out of the loss. With `loss.ratio: sequence`, those of whole completions.",
               "small: what is left out is not learned"),
        Metric("policy/ratio_max", "", RATIO, "The largest importance ratio."),
        Metric("policy/ratio_mean", "", RATIO, "Mean importance ratio.", "about 1, which is its expectation"),
        Metric("policy/ratio_min", "", RATIO, "The smallest importance ratio."),
        Metric("policy/rest_mass", "fraction", f"{OWN_TOKENIZER}, a divergence",
               "The student's probability of the tokens that the teacher does not have, on average.", "small"),
        Metric("policy/tail_baseline", "nats", TAIL,
               "What the gaps of the step are taken against: the mean gap of earlier steps. 0 in the first."),
        Metric("policy/tail_gap", "nats", TAIL,
               "Mean of ℓ − ℓ_teacher − ρ over the student's tokens outside the lists. ρ is the same of both whole tails: "
               "log((1 − P) / (1 − Q)).", "falls towards 0"),
        Metric("policy/tail_share", "fraction", TAIL, "The student's own tokens that are outside the lists."),
        Metric("policy/teacher_entropy", NATS, WHOLE, "Entropy of the teacher."),
        Metric("policy/teacher_rest_mass", "fraction", f"{OWN_TOKENIZER}, a divergence",
               "The teacher's probability of the tokens that the student does not have, on average.", "small"),
        Metric("policy/top1_agreement", "fraction", WHOLE,
               "Tokens for which student and teacher have the same likeliest token.", "rises"),
        Metric("policy/unsure_fraction", "fraction", UNSURE,
               "Tokens for which the teacher's entropy is above `loss.forward_kl_above`."),
        Metric("weights/mean", "", WEIGHED, "Mean weight of the tokens."),
        Metric("weights/selected_fraction", "fraction", WEIGHED,
               "Tokens whose weight is not 0. The means of `policy/*` are over these."),
    )),
)
# fmt: on
METRICS = {metric.name: metric for group in GROUPS for metric in group.metrics}

HEAD = """\
# Metrics

Each step is one row of `metrics.jsonl`, and one point of the figures in `report.html`. Row 0 is the evaluation before the
first step.

- ℓ is the log-prob of a token under the student before the update. ℓ_sampler is what the sampler gave with the token,
  ℓ_teacher and ℓ_reference are what teacher and reference say of it.
- "With" says when a metric is written. Where it is empty, every run has it.
- "Healthy" is empty where it differs from run to run. Many of these numbers are estimates from the samples of one step:
  look at the curve, not at one point.

`python -m fastkl.trainer.metrics > docs/metrics/metrics.md` makes this page from `trainer/metrics.py`."""


def find(name: str) -> Metric | None:
    """The entry of a name that a run wrote; None if there is none."""
    return METRICS.get(name) or next((entry for entry in METRICS.values() if re.fullmatch(entry.pattern, name)), None)


def figures(names: Iterable[str]) -> list[dict[str, Any]]:
    """The report's figures in their order: a name, its unit, and the part of the page. Unknown names come last."""
    names = [name for name in names if not name.endswith(ERROR)]  # they are drawn on the others
    order, parts = list(METRICS), {metric: group.part for group in GROUPS for metric in group.metrics}
    found = [(name, find(name)) for name in sorted(names)]
    found.sort(key=lambda pair: len(order) if pair[1] is None else order.index(pair[1].name))
    return [
        {"name": name, "unit": metric.unit if metric else "", "part": parts[metric] if metric else "rest"}
        for name, metric in found
    ]


NOTES = (
    f"DATA_SET is a name in `mixture`. RULE is the name of a guard. DIVERGENCE is one of {', '.join(METRIC_STEMS)}.",
    "`eval/accuracy` is that of `eval.data` at the first `eval.temperature`. That of an entry of `eval.more` is "
    "`eval/NAME/accuracy`, that at another temperature `eval/accuracy_t1`. All `eval/*` but `eval/flops` are named so.",
)


def page() -> Iterator[str]:
    """The lines of docs/metrics/metrics.md."""
    yield HEAD
    for group in GROUPS:
        yield from (
            "",
            f"## {group.title}",
            "",
            "| metric | unit | with | meaning | healthy |",
            "|---|---|---|---|---|",
        )
        for metric in group.metrics:
            cells = (f"`{metric.name}`", metric.unit, metric.when, metric.meaning, metric.healthy or "")
            yield f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"
    for paragraph in NOTES:
        yield from ("", *textwrap.wrap(paragraph, 120, break_long_words=False, break_on_hyphens=False))


if __name__ == "__main__":
    print(*page(), sep="\n")
