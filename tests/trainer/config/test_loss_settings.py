"""Settings of losses, advantages, rewards and references that are refused, and in which words."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import get_args

import pytest
from run_cases import check_refused, refusals
from run_settings import SERVED, URL

from fastkl.kernels.options import Sparse, Surrogate
from fastkl.trainer.config.loss import OPTION_OF, LossConfig, ObjectiveName

KL_PARTS: list[tuple[dict[str, object], list[str]]] = [
    ({"loss.discount": 0.5}, ["loss.discount is 0.5"]),
    ({"loss.baseline": "mean"}, ["loss.baseline is 'mean'"]),
    ({"loss.advantage_power": 2}, ["loss.advantage_power is 2"]),
    ({"loss.advantage_clip": 5}, ["loss.advantage_clip is 5"]),
    ({"loss.extrapolate": 2, "reference.path": "r"}, ["loss.extrapolate is 2"]),
]
SAMPLED_TAIL: dict[str, object] = {"loss.objective": "top_k", "loss.top_k_tail": "sampled"}
# settings, what the message must hold: the setting with its value, and the way out
REFUSED: list[tuple[dict[str, object], list[str]]] = [
    ({"loss.discount": 1.5}, ["loss.discount is 1.5", "between 0 and 1"]),
    ({"loss.clip_high": 0.3}, ["loss.clip_high is 0.3", "loss.method 'importance_sampling'", "cispo"]),
    ({"loss.method": "ppo", "loss.old_logprobs": "current"}, ["loss.method is ppo", "sampler or recompute"]),
    ({"loss.kl_coef": -1.0}, ["loss.kl_coef is -1.0", "at least 0"]),
    ({"loss.advantage_power": -1}, ["loss.advantage_power is -1", "in [0, 1000]"]),
    ({"loss.advantage_clip": 0}, ["loss.advantage_clip is 0", "> 0", "null"]),
    ({"loss.extrapolate": 0}, ["loss.extrapolate is 0", "> 0"]),
    (
        {"loss.baseline": "kl", "loss.advantage_power": 1},
        ["loss.baseline is kl", "loss.advantage_power is 1", "set loss.baseline to mean"],
    ),
    (
        {"loss.advantage_power": 1, "loss.extrapolate": 2, "reference.path": "r"},
        ["loss.extrapolate is 2", "loss.advantage_power is 1", "unset one"],
    ),
    *(
        (
            {"loss.kl_coef": 0, "reward.grader": "boxed", "reward.baseline": "none", **option},
            [*said, "loss.kl_coef is 0"],
        )
        for option, said in KL_PARTS
    ),
    *(
        ({"sampling.on_policy_fraction": 0, **option}, [*said, "sampling.on_policy_fraction is 0", "unset one"])
        for option, said in KL_PARTS
    ),
    *(
        ({"loss.objective": "top_k", **option}, [*said, "loss.objective is top_k", "belongs to policy_gradient"])
        for option, said in (*KL_PARTS, ({"loss.ratio": "sequence"}, ["loss.ratio is 'sequence'"]))
    ),
    (
        {"loss.baseline": "mean", "sampling.prompts_per_step": 1},
        ["loss.baseline is mean", "one sample", "sampling.prompts_per_step"],
    ),
    (
        SERVED | {"loss.baseline": "kl"},
        ["loss.baseline is kl", f"teacher.server.url is '{URL}'", "to mean", "teacher.path"],
    ),
    ({"loss.extrapolate": 1.25}, ["loss.extrapolate is 1.25", "reference.path is empty", "reference.self"]),
    ({"reference.path": "r"}, ["reference.path is 'r'", "loss.extrapolate is 1", "set loss.extrapolate"]),
    ({"reference.device": "cpu"}, ["reference.device is 'cpu'", "loss.extrapolate is 1"]),
    (
        {"loss.extrapolate": 1.25, "reference.self": "base"},
        ["reference.self is base", "student.lora.rank is 0", "reference.path"],
    ),
    (
        {"loss.extrapolate": 2, "reference.self": "base", "reference.path": "r", "student.lora.rank": 2},
        ["reference.path is 'r'", "reference.self is base", "unset one"],
    ),
    *(
        ({"loss.control": "no_teacher", **option}, [said, "loss.control is no_teacher", "unset one"])
        for option, said in (
            ({"loss.baseline": "kl"}, "loss.baseline is kl"),
            ({"loss.extrapolate": 2, "reference.path": "r"}, "loss.extrapolate is 2"),
        )
    ),
    ({"loss.ratio_bounds": [2]}, ["loss.ratio_bounds is [2.0]", "two numbers", ".inf"]),
    ({"loss.ratio_bounds": [2, 1]}, ["loss.ratio_bounds is (2.0, 1.0)", "low < high"]),
    *(
        ({"loss.old_logprobs": "current", **option}, [said, "loss.old_logprobs is current", "sampler or recompute"])
        for option, said in (
            ({"loss.ratio_bounds": [0.5, 2]}, "loss.ratio_bounds is [0.5, 2.0]"),
            ({"loss.ratio": "sequence"}, "loss.ratio is 'sequence'"),
        )
    ),
    ({"loss.clip_low": 1.5}, ["loss.clip_low is 1.5", "<= 1"]),
    ({"loss.clip_high": -0.1}, ["loss.clip_high is -0.1", ">= 0"]),
    ({"loss.dual_clip": 3}, ["loss.dual_clip is 3", "loss.method 'importance_sampling'", "ppo"]),
    ({"loss.dual_clip": 1, "loss.method": "ppo"}, ["loss.dual_clip is 1", "> 1"]),
    ({"loss.truncate_ratio": 0}, ["loss.truncate_ratio is 0", "> 0", "null"]),
    (
        {"loss.truncate_ratio": 2, "loss.old_logprobs": "current"},
        ["loss.truncate_ratio is 2", "loss.old_logprobs is current", "set loss.old_logprobs"],
    ),
    (
        {"loss.objective": "jsd", "loss.kl_coef": 0.5},
        ["loss.kl_coef is 0.5", "loss.objective is jsd", "belongs to policy_gradient"],
    ),
    ({"loss.objective": "reverse_kl", "loss.method": "ppo"}, ["loss.method is 'ppo'", "loss.objective is reverse_kl"]),
    ({"loss.jsd_beta": 0.2}, ["loss.jsd_beta is 0.2", "loss.objective is policy_gradient", "belongs to jsd"]),
    ({"loss.jsd_beta": 2, "loss.objective": "jsd"}, ["loss.jsd_beta is 2", "in [0, 1]"]),
    ({"loss.skew_alpha": 0.3}, ["loss.skew_alpha is 0.3", "skewed_reverse_kl and skewed_forward_kl"]),
    ({"loss.skew_alpha": 1, "loss.objective": "skewed_reverse_kl"}, ["loss.skew_alpha is 1", "in [0, 1)"]),
    ({"loss.divergence_power": 2}, ["loss.divergence_power is 2", "belongs to density_power"]),
    (
        {"loss.divergence_power": -1, "loss.objective": "density_power"},
        ["loss.divergence_power is -1", "in [0, 1000]"],
    ),
    ({"loss.top_k": 5}, ["loss.top_k is 5", "belongs to top_k"]),
    ({"loss.weights": ["entropy:1"]}, ["loss.weights has 'entropy:1'", "skip_first:N", "function:MODULE.NAME"]),
    ({"loss.weights": ["function:"]}, ["loss.weights has 'function:'", "function:MODULE.NAME"]),
    ({"loss.weights": ["skip_first:2.5"]}, ["loss.weights has 'skip_first:2.5'", "N of", "whole number from 1 on"]),
    ({"loss.weights": ["skip_first"]}, ["loss.weights has 'skip_first'", "whole number from 1 on"]),
    ({"loss.weights": ["top_gap:0"]}, ["loss.weights has 'top_gap:0'", "SHARE of", "above 0 and at most 1"]),
    ({"loss.weights": ["drift:inf"]}, ["loss.weights has 'drift:inf'", "GAMMA of", "finite"]),
    (
        {"loss.weights": ["drift:1"], "loss.kl_coef": 0, "reward.grader": "boxed", "teacher.path": ""}
        | {"sampling.samples_per_prompt": 2},
        ["loss.weights has drift:1", "the run has none", "name a teacher"],
    ),
    *(
        (
            {"loss.weights": ["skip_first:1", rule], "sampling.on_policy_fraction": 0, **option},
            [f"loss.weights has {rule}", "sampling.on_policy_fraction is 0", "would weigh 1", "name another rule"],
        )
        for rule, option in (
            ("drift:1", {"loss.objective": "top_k"}),
            ("tip:0.5", {"loss.objective": "reverse_kl"}),
            ("top_gap:0.5", {"loss.old_logprobs": "current"}),
        )
    ),
    *(
        (
            {"loss.control": control, "sampling.on_policy_fraction": 0},
            [f"loss.control is '{control}'", "sampling.on_policy_fraction is 0", "unset one"],
        )
        for control in ("shuffled", "no_teacher")
    ),
    *(
        (
            {"loss.forward_kl_above": 1, "loss.objective": objective, f"loss.{setting}": 0},
            ["loss.forward_kl_above is 1", f"loss.objective is {objective}, loss.{setting} 0", "KL already"],
        )
        for objective, setting in (("jsd", "jsd_beta"), ("skewed_forward_kl", "skew_alpha"))
    ),
    ({"loss.method": "reinforce", "loss.ratio": "sequence"}, ["loss.ratio is 'sequence'", "reinforce", "unset this"]),
    (
        SAMPLED_TAIL | {"loss.tail_weight": 0, "loss.truncate_ratio": 2},
        ["loss.truncate_ratio is 2", "loss.tail_weight is 0", "unset one"],
    ),
    ({"loss.forward_kl_above": -1}, ["loss.forward_kl_above is -1", "at least 0", "or null"]),
    ({"loss.forward_kl_coef": 2}, ["loss.forward_kl_coef is 2", "loss.forward_kl_above is null"]),
    ({"loss.forward_kl_above": 1, "loss.forward_kl_coef": 0}, ["loss.forward_kl_coef is 0", "> 0"]),
    ({"loss.forward_kl_above": 1, "loss.objective": "forward_kl"}, ["loss.forward_kl_above is 1", "KL already"]),
    (
        {"loss.forward_kl_above": 1, "loss.objective": "top_k", "loss.top_k_direction": "forward"},
        ["loss.forward_kl_above is 1", "loss.top_k_direction forward", "KL already"],
    ),
    (
        {"loss.forward_kl_above": 1, "loss.objective": "top_k", "loss.forward_kl_top_k": 5},
        ["loss.forward_kl_top_k is 5", "belongs to policy_gradient"],
    ),
    (
        {"loss.forward_kl_above": 1, "loss.control": "shuffled"},
        ["loss.forward_kl_above is 1", "loss.control is shuffled"],
    ),
    (
        {"loss.forward_kl_above": 1, "loss.kl_coef": 0, "reward.grader": "boxed", "teacher.path": ""}
        | {"sampling.samples_per_prompt": 2},
        ["loss.forward_kl_above is 1", "no teacher", "unset it"],
    ),
    ({"loss.trust_weights": True}, ["loss.trust_weights is true", "loss.weights is []", "unset it"]),
    ({"loss.control": "shuffled", "loss.objective": "jsd"}, ["loss.control is shuffled", "jsd", "policy_gradient or"]),
    (
        {"loss.control": "no_teacher", "loss.objective": "top_k"},
        ["loss.control is no_teacher", "needs policy_gradient"],
    ),
    ({"loss.control_penalty": 1}, ["loss.control_penalty is 1", "loss.control is null", "set it to no_teacher"]),
    ({"loss.control": "no_teacher", "loss.control_penalty": 0}, ["loss.control_penalty is 0", "> 0"]),
    ({"loss.control": "no_teacher", "loss.control_share": 1.5}, ["loss.control_share is 1.5", "between 0 and 1"]),
    (
        {"loss.control": "shuffled", "loss.kl_coef": 0, "reward.grader": "boxed", "sampling.samples_per_prompt": 2},
        ["loss.control is shuffled", "loss.kl_coef and loss.redistribute are 0", "unset it"],
    ),
    (
        {"loss.control": "shuffled", "loss.weights": ["skip_first:1", "drift:1"]},
        ["loss.control is shuffled", "loss.weights has drift:1", "unset one"],
    ),
    (
        {"loss.control": "shuffled", "sampling.prompts_per_step": 1},
        ["loss.control is shuffled", "a single sample", "sampling.prompts_per_step"],
    ),
    ({"loss.top_k_of": "both"}, ["loss.top_k_of is 'both'", "belongs to top_k"]),
    ({"loss.top_k": 0, "loss.objective": "top_k"}, ["loss.top_k is 0", "at least 1"]),
    ({"loss.tail_weight": 0.5}, ["loss.tail_weight is 0.5", "belongs to top_k"]),
    (
        {"loss.tail_weight": 0.5, "loss.objective": "top_k"},
        ["loss.tail_weight is 0.5", "loss.top_k_tail is bucket: it belongs to sampled"],
    ),
    ({"loss.truncate_ratio": 2, "loss.objective": "top_k"}, ["loss.truncate_ratio is 2", "loss.top_k_tail is bucket"]),
    ({"loss.truncate_ratio": 2, "loss.objective": "jsd"}, ["loss.truncate_ratio is 2", "policy_gradient and top_k"]),
    (SAMPLED_TAIL | {"loss.tail_weight": 1.5}, ["loss.tail_weight is 1.5", "in [0, 1]"]),
    (SAMPLED_TAIL | {"loss.truncate_ratio": 0}, ["loss.truncate_ratio is 0", "must be > 0"]),
    (
        SAMPLED_TAIL | {"loss.top_k_direction": "forward"},
        ["loss.top_k_tail is sampled", "loss.top_k_direction is forward", "set loss.top_k_direction to reverse"],
    ),
    (
        SAMPLED_TAIL | {"sampling.on_policy_fraction": 0},
        ["loss.top_k_tail is sampled", "sampling.on_policy_fraction is 0", "set loss.top_k_tail to bucket"],
    ),
    (
        SAMPLED_TAIL | {"loss.control": "shuffled"},
        ["loss.control is shuffled", "loss.top_k_tail is sampled", "set loss.top_k_tail to bucket"],
    ),
    (SAMPLED_TAIL | {"reward.grader": "regex:a"}, ["reward.grader is 'regex:a'", "loss.objective is top_k"]),
    (
        SAMPLED_TAIL | {"loss.old_logprobs": "recompute"},
        ["loss.old_logprobs is 'recompute'", "belongs to policy_gradient"],
    ),
    (
        SERVED | {"loss.objective": "forward_kl"},
        ["loss.objective is forward_kl", URL, "policy_gradient or top_k", "teacher.path"],
    ),
    ({"loss.redistribute": 0.5}, ["loss.redistribute is 0.5", "reward.grader is null", "name a grader"]),
    ({"loss.redistribute": 1.5}, ["loss.redistribute is 1.5", "between 0 and 1"]),
    ({"loss.redistribute_clip": 0.1}, ["loss.redistribute_clip is 0.1", "loss.redistribute is 0"]),
    ({"loss.redistribute": 0.5, "loss.redistribute_clip": 1}, ["loss.redistribute_clip is 1", "below 1"]),
    ({"loss.redistribute": 0.5, "loss.objective": "jsd"}, ["loss.redistribute is 0.5", "belongs to policy_gradient"]),
    (
        {"loss.redistribute": 0.5, "loss.kl_coef": 0, "reward.grader": "boxed", "reward.baseline": "none"}
        | {"teacher.path": ""},
        ["teacher.path is empty", "teacher.self"],
    ),
]


@pytest.mark.parametrize(("command", "settings", "parts"), refusals("distill", REFUSED))
def test_refused_settings(
    command: str, settings: dict[str, object], parts: list[str], empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(capsys, empty_folder, command, settings, *parts)


def test_options_of_a_loss_are_its_own() -> None:
    """Their names and defaults are those of the losses' records, and each belongs to objectives that exist."""
    assert LossConfig().surrogate() == Surrogate()
    assert LossConfig(backward="sparse").backward_pass(seed=3) == Sparse(seed=3)
    assert LossConfig().backward_pass(seed=3) == "exact"
    names = {field.name for field in dataclasses.fields(LossConfig)}
    assert OPTION_OF.keys() <= names
    assert {objective for objectives in OPTION_OF.values() for objective in objectives} <= {*get_args(ObjectiveName)}
