"""Settings and the command line: what is refused, in which words, and that nothing is left behind by a refusal."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import pytest
from run_cases import refusal
from run_settings import MINIMAL, config
from tiny_data import sums, write_jsonl
from tiny_models import save_model, tokenizer

from fastkl.kernels.options import Sparse, Surrogate
from fastkl.trainer.commands.command_line import COMMANDS, Command
from fastkl.trainer.commands.schema import group_of, settings_of
from fastkl.trainer.config.loss import OPTION_OF, LossConfig, ObjectiveName
from fastkl.trainer.config.losses.weights import FORMS
from fastkl.trainer.config.mixture import MixtureConfig
from fastkl.trainer.config.training import DistillConfig, SftConfig
from fastkl.trainer.errors import ConfigError

URL = "http://127.0.0.1:9/v1"
SERVED: dict[str, object] = {"teacher.path": "", "teacher.server.url": URL, "teacher.server.model": "m"}
SAMPLED: dict[str, object] = {"sampling.server.url": URL, "sampling.server.model": "m"}
KL_PARTS: list[tuple[dict[str, object], list[str]]] = [
    ({"loss.discount": 0.5}, ["loss.discount is 0.5"]),
    ({"loss.baseline": "mean"}, ["loss.baseline is 'mean'"]),
    ({"loss.advantage_power": 2}, ["loss.advantage_power is 2"]),
    ({"loss.advantage_clip": 5}, ["loss.advantage_clip is 5"]),
    ({"loss.extrapolate": 2, "reference.path": "r"}, ["loss.extrapolate is 2"]),
]
SAMPLED_TAIL: dict[str, object] = {"loss.objective": "top_k", "loss.top_k_tail": "sampled"}
# settings, what the message must hold: the setting with its value, and the way out
BASE: dict[str, object] = {"teacher.self": "base", "teacher.path": ""}
REFUSED_BY_DISTILL: list[tuple[dict[str, object], list[str]]] = [
    ({"run": ""}, ["run is empty", "runs/first"]),
    ({"student.path": ""}, ["student.path is empty", "model folder or a Hub id"]),
    ({"teacher.path": ""}, ["teacher.path is empty", "model folder or a Hub id"]),
    (SERVED | {"teacher.path": "t"}, ["teacher.path is 't'", URL, "exactly one"]),
    ({"teacher.tokenizer": "t"}, ["teacher.tokenizer is 't'", "teacher.path is 't'", "unset it"]),
    ({"teacher.path": ""}, ["teacher.server.url", "or a server's url"]),
    (SERVED | {"teacher.server.url": "127.0.0.1:8000"}, ["server.url is '127.0.0.1:8000'", "http://"]),
    (SERVED | {"teacher.server.url": "http://me:pw@h/v1"}, ["server.url holds a user", "server.api_key_env"]),
    (SERVED | {"teacher.server.url": "http://h:99999/v1"}, ["server.url is 'http://h:99999/v1'", "Port out of range"]),
    (
        SERVED | {"teacher.server.url": "http://[::1/v1"},
        ["server.url is 'http://[::1/v1'", "Invalid IPv6", "give one like"],
    ),
    (SERVED | {"teacher.server.url": "http://a b/v1"}, ["server.url is 'http://a b/v1'", "no address has"]),
    (SERVED | {"teacher.server.url": "http://h/v1#x"}, ["server.url is 'http://h/v1#x'", "have no #"]),
    (SERVED | {"teacher.server.model": ""}, ["server.model is empty", URL]),
    (SERVED | {"teacher.server.url": ""}, ["server.model is 'm'", "server.url is empty"]),
    (SERVED | {"teacher.server.concurrency": 0}, ["server.concurrency is 0", "at least 1"]),
    (SERVED | {"teacher.server.sequences_per_request": 0}, ["server.sequences_per_request is 0", "at least 1"]),
    (SERVED | {"teacher.server.timeout": 1e12}, ["server.timeout is 1e+12", "at most 1e+06 seconds"]),
    (SERVED | {"teacher.server.recheck_every": -1}, ["server.recheck_every is -1", "at least 0"]),
    (SERVED | {"teacher.server.timeout": 0}, ["server.timeout is 0", "> 0"]),
    (SERVED | {"teacher.server.retries": -1}, ["server.retries is -1", "at least 0"]),
    (SERVED | {"teacher.server.api_key_env": "sk-secret"}, ["server.api_key_env is not the name"]),
    (
        {"sampling.dtype": "bfloat16", "student.dtype": "bfloat16"},
        ["sampling.dtype is bfloat16", "student.dtype", "unset sampling.dtype"],
    ),
    (SAMPLED | {"sampling.dtype": "bfloat16"}, ["sampling.dtype is 'bfloat16'", URL, "--dtype", "unset it"]),
    (SAMPLED | {"sampling.max_requests": 4}, ["sampling.max_requests is 4", URL, "--max-num-seqs", "unset it"]),
    (SAMPLED | {"sampling.engine": "generate"}, ["sampling.engine is 'generate'", URL, "unset it"]),
    (
        {"sampling.engine": "generate", "sampling.max_batch_tokens": 64},
        ["sampling.max_batch_tokens is 64", "sampling.engine is generate", "unset it", "sampling.max_requests"],
    ),
    (SAMPLED | {"sampling.server.url": ""}, ["server.model is 'm'", "server.url is empty"]),
    (SAMPLED | {"sampling.server.concurrency": 0}, ["server.concurrency is 0", "at least 1"]),
    (SERVED | {"teacher.dtype": "bfloat16"}, ["teacher.dtype is 'bfloat16'", URL, "unset it"]),
    ({"data.dataset": "x"}, ["data.path is 'd.jsonl'", "data.dataset is 'x'", "exactly one"]),
    ({"data.path": "null"}, ["data.path is None", "data.dataset is None", "exactly one"]),
    ({"data.limit": 0}, ["data.limit is 0", "at least 1", "null"]),
    ({"data.max_prompt_tokens": 0}, ["data.max_prompt_tokens is 0", "at least 1", "null"]),
    ({"log_samples": -1}, ["log_samples is -1", "at least 0"]),
    ({"student.lora.rank": -4}, ["lora.rank is -4", "at least 0"]),
    ({"sampling.prompts_per_step": 0}, ["sampling.prompts_per_step is 0", "at least 1"]),
    ({"sampling.samples_per_prompt": 0}, ["sampling.samples_per_prompt is 0", "at least 1"]),
    ({"sampling.max_new_tokens": 0}, ["sampling.max_new_tokens is 0", "at least 1"]),
    ({"sampling.max_batch_tokens": 0}, ["sampling.max_batch_tokens is 0", "at least 1"]),
    ({"sampling.max_requests": 0}, ["sampling.max_requests is 0", "at least 1"]),
    ({"sampling.temperature": 0}, ["sampling.temperature is 0", "> 0"]),
    ({"sampling.top_p": 0.9}, ["sampling.top_p is 0.9", "importance ratio", "Leave top_p = 1"]),
    ({"sampling.top_k": 50}, ["sampling.top_k is 50", "importance ratio", "top_k = 0"]),
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
    ({"student.lora.alpha": 16.0}, ["student.lora.alpha is 16.0", "set student.lora.rank"]),
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
    (SERVED | {"teacher.device": "cpu"}, ["teacher.device is 'cpu'", URL, "unset it"]),
    (SERVED | {"teacher.quantization": "8bit"}, ["teacher.quantization is '8bit'", URL, "unset it"]),
    (
        {"teacher.self": "base", "student.lora.rank": 2},
        ["teacher.self is base", "teacher.path is 't'", "unset one"],
    ),
    (BASE, ["teacher.self is base", "student.lora.rank is 0", "teacher.path"]),
    (BASE | {"teacher.dtype": "bfloat16"}, ["teacher.self is base", "teacher.dtype is 'bfloat16'", "unset one"]),
    (BASE | {"teacher.server.url": URL, "teacher.server.model": "m"}, ["teacher.self is base", "teacher.server is"]),
    (BASE | {"teacher.ema_rate": 0.1}, ["teacher.ema_rate is 0.1", "teacher.self is base", "belongs to ema"]),
    ({"teacher.sync_every": 5}, ["teacher.sync_every is 5", "teacher.self is null", "belongs to synced"]),
    (BASE | {"teacher.self": "ema"}, ["teacher.self is ema", "teacher.ema_rate is null"]),
    (BASE | {"teacher.self": "ema", "teacher.ema_rate": 1}, ["teacher.ema_rate is 1", "below 1", "live"]),
    (BASE | {"teacher.self": "ema", "teacher.ema_rate": 0}, ["teacher.ema_rate is 0", "above 0", "base"]),
    (BASE | {"teacher.self": "ema", "teacher.ema_rate": "nan"}, ["teacher.ema_rate is nan", "above 0"]),
    (BASE | {"teacher.self": "synced"}, ["teacher.self is synced", "teacher.sync_every is null"]),
    (BASE | {"teacher.self": "synced", "teacher.sync_every": 1}, ["teacher.sync_every is 1", "at least 2", "live"]),
    (
        BASE | {"teacher.self": "ema", "teacher.ema_rate": 0.1, "teacher.device": "cpu", "student.lora.rank": 2},
        ["teacher.device is 'cpu'", "teacher.self is ema", "student.lora.rank is 2", "unset it"],
    ),
    (BASE | {"teacher.self": "live"}, ["teacher.self is live", "its KL is 0", "reward.grader"]),
    (BASE | {"teacher.self": "live", "loss.objective": "reverse_kl"}, ["teacher.self is live", "its KL is 0"]),
    (
        BASE | {"teacher.self": "live", "reward.grader": "boxed", "reward.baseline": "none", "loss.redistribute": 0.5},
        ["teacher.self is live", "loss.redistribute (0.5)", "unset one"],
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
    ({"optim.lr": -1}, ["optim.lr is -1", "at least 0"]),
    ({"optim.steps": 0}, ["optim.steps is 0", "at least 1"]),
    ({"optim.substeps": 0}, ["optim.substeps is 0", "at least 1"]),
    ({"optim.substeps": 65}, ["optim.substeps is 65", "64 samples", "sampling.prompts_per_step"]),
    ({"optim.betas": [0.9]}, ["optim.betas is [0.9]", "two numbers"]),
    ({"optim.betas": [0.9, 1.0]}, ["optim.betas is [0.9, 1.0]", "below 1"]),
    ({"optim.weight_decay": -1}, ["optim.weight_decay is -1", "at least 0"]),
    ({"optim.max_grad_norm": 0}, ["optim.max_grad_norm is 0", "> 0", "null"]),
    ({"optim.warmup_steps": 200}, ["optim.warmup_steps is 200", "optim.steps (100)"]),
    ({"optim.warmup_steps": -1}, ["optim.warmup_steps is -1", "between 0"]),
    ({"batch.max_tokens": 0}, ["batch.max_tokens is 0", "at least 1"]),
    ({"checkpoint.every": -1}, ["checkpoint.every is -1", "at least 0"]),
    ({"checkpoint.keep": 0}, ["checkpoint.keep is 0", "at least 1"]),
    ({"eval.every": -1}, ["eval.every is -1", "at least 0"]),
]
REFUSED: list[tuple[str, dict[str, object], list[str]]] = [
    *(("distill", *case) for case in REFUSED_BY_DISTILL),
    ("score", {"model.path": "", "model.server.url": URL, "model.server.model": "m"}, ["model.tokenizer is None", URL]),
    ("score", {"model.self": "base", "model.path": ""}, ["model.self is base", "model.path"]),
    ("sft", {"optim.substeps": 5, "examples_per_step": 4}, ["examples_per_step is 4", "optim.substeps (5)"]),
    ("eval", {"eval.max_new_tokens": 0}, ["eval.max_new_tokens is 0", "at least 1"]),
    ("eval", {"eval.temperature": -1}, ["eval.temperature is -1", "at least 0"]),
    ("eval", {"model.path": ""}, ["model.path is empty", "model folder or a Hub id"]),
    ("eval", {"eval.data.path": "null"}, ["eval.data.path is None", "eval.data.dataset is None", "exactly one"]),
    ("score", {"model.path": ""}, ["model.path is empty", "model folder or a Hub id"]),
    ("score", {"output": ""}, ["output is empty", "JSONL"]),
    ("score", {"temperature": 0}, ["temperature is 0", "> 0"]),
    ("score", {"data.dataset": "x"}, ["data.path is 'd.jsonl'", "exactly one"]),
]


def name(case: tuple[str, Mapping[str, object], object]) -> str:
    return "-".join([case[0], *(f"{key}={value}" for key, value in case[1].items())])


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("command", "settings", "parts"), REFUSED, ids=map(name, REFUSED))
def test_refused_settings(
    command: str, settings: dict[str, object], parts: list[str], empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refusal(capsys, command, MINIMAL[command] | settings, *parts)
    assert error.startswith("fastkl: ")
    assert error.count("\n") == 1
    assert list(empty_folder.iterdir()) == []


def test_a_key_in_place_of_its_variables_name_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    settings = MINIMAL["distill"] | SERVED | {"teacher.server.api_key_env": "sk-secret"}
    assert "sk-secret" not in refusal(capsys, "distill", settings)


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config("sft", MINIMAL["sft"]).seed = 1


# What shows only once files are read: still one line, status 2, and nothing on disk.
@pytest.mark.parametrize(
    ("command", "settings", "parts"),
    [
        ("distill", {"student.path": "nosuch"}, ["nosuch", "neither a folder here nor on the Hub"]),
        ("distill", {"student.path": "./nosuch"}, ["./nosuch", "no config.json"]),
        ("distill", {"teacher.path": "data"}, ["'data'", "no config.json"]),
        ("distill", {"student.path": "run"}, ["'run' is a run's folder", "its trained model is run/student"]),
        ("distill", {"data.path": "nosuch.jsonl"}, ["nosuch.jsonl does not exist"]),
        ("distill", {"eval.data.path": "d.jsonl", "eval.grader": "vibes"}, ["eval.grader is 'vibes'", "last_number"]),
        ("distill", {"student.liger": "true"}, ["liger is true", "CUDA", "set it to false"]),
        ("distill", {"sampling.max_new_tokens": 100}, ["context of 64", "max_new_tokens"]),
        ("sft", {"data.path": "nosuch.jsonl"}, ["nosuch.jsonl does not exist"]),
        ("eval", {"model.path": "./nosuch"}, ["./nosuch", "no config.json"]),
        ("eval", {"output": "d.jsonl"}, ["output d.jsonl exists already", "another name"]),
        ("score", {"output": "d.jsonl"}, ["output d.jsonl exists already", "another name"]),
        ("score", {"output": "out/o.jsonl", "model.path": "./nosuch"}, ["./nosuch", "no config.json"]),
    ],
    ids=str,
)
def test_refused_once_files_are_read(
    command: str, settings: dict[str, object], parts: list[str], empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(empty_folder / "model")
    write_jsonl(empty_folder / "d.jsonl", sums(3))
    (empty_folder / "data").mkdir()
    (empty_folder / "run").mkdir()
    (empty_folder / "run" / "config.yaml").touch()
    paths = {key: "model" for key in MINIMAL[command] if key.endswith(("student.path", "teacher.path", "model.path"))}
    before = sorted(empty_folder.rglob("*"))
    refusal(capsys, command, MINIMAL[command] | paths | settings, *parts)
    assert sorted(empty_folder.rglob("*")) == before


def test_home_folder_in_a_path(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell expands the `~` of a YAML file."""
    from fastkl.trainer.models.pretrained import load_model, load_tokenizer

    save_model(empty_folder / "model")
    monkeypatch.setenv("HOME", str(empty_folder))
    student = config("sft", MINIMAL["sft"] | {"student.path": "~/model"}).student
    assert load_tokenizer(student).get_vocab() == tokenizer().get_vocab()
    assert load_model(student).config.hidden_size == 16


def test_all_configs_are_covered_here() -> None:
    assert {*MINIMAL, "init", "report"} == COMMANDS.keys()
    assert isinstance(config("sft", MINIMAL["sft"]), SftConfig)
    with pytest.raises(ConfigError):
        config("sft", MINIMAL["sft"] | {"optim.steps": 0})


def test_options_of_a_loss_are_its_own() -> None:
    """Their names and defaults are those of the losses' records, and each belongs to objectives that exist."""
    assert LossConfig().surrogate() == Surrogate()
    assert LossConfig(backward="sparse").backward_pass(seed=3) == Sparse(seed=3)
    assert LossConfig().backward_pass(seed=3) == "exact"
    names = {field.name for field in dataclasses.fields(LossConfig)}
    assert OPTION_OF.keys() <= names
    assert {objective for objectives in OPTION_OF.values() for objective in objectives} <= {*get_args(ObjectiveName)}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_commands_run_a_function_of_their_config(command: Command) -> None:
    module, name = command.function.split(":")
    function = getattr(importlib.import_module(f"fastkl.trainer.{module}"), name)
    first = next(iter(inspect.signature(function, eval_str=True).parameters.values()))
    assert first.annotation is command.config


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_help_is_a_few_short_sentences(command: Command) -> None:
    kinds = [command.config, MixtureConfig] if command.config is DistillConfig else [command.config]
    for kind in kinds:
        for name, text in explanations(kind).items():
            assert text[0].isupper(), f"{name}: {text}"
            assert text.endswith("."), f"{name}: {text}"
            assert text.count(". ") <= 3, f"{name}: {text}"


def test_help_names_every_rule_of_weights() -> None:
    said = explanations(LossConfig)["weights"]
    assert [form for form in FORMS if form not in said] == []


def explanations(kind: type) -> dict[str, str]:
    """The `Args:` of a config and of those within it, by name."""
    found: dict[str, str] = {}
    for name, setting in settings_of(kind).items():
        found[name] = setting.help
        group = group_of(setting.kind)
        found |= {} if group is None else {f"{name}.{inner}": text for inner, text in explanations(group).items()}
    return found
