"""Calls as newcomers write them: each wrong one ends in a sentence that says what to write instead."""

from __future__ import annotations

import inspect
import pydoc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_cases import DIVERGENCES, LOSSES, each_loss, fused, fused_output, pattern
from problem import make_problem
from tiny_models import causal_lm
from torch import nan, nn, ones, zeros
from torch.testing._internal.two_tensor import TwoTensor

from fastkl import loss
from fastkl.head import fuse
from fastkl.loss import BadNumbers, policy_gradient_loss, reverse_kl_loss, sampled_reverse_kl_loss

P = make_problem((2, 4), vocabulary=50, dim=16, dtype=torch.float32)
P = P._replace(tokens=P.tokens.clamp(min=0), mask=None)
H, W, IDS, A, LP = P.hidden.clone().requires_grad_(), P.weight, P.tokens, P.advantages, P.sampler_logprobs
TH, TW, LOGITS = P.teacher_hidden, P.teacher_weight, zeros(2, 4, 50)
OUTPUT = policy_gradient_loss(H, W, IDS, A, LP)
PROMPT = ones(1, 4, dtype=torch.long)
TENSOR = "TypeError: a LossOutput is no tensor / output.loss"


def model() -> Any:
    return causal_lm()


def lora_on_the_head() -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model(), LoraConfig(target_modules=["lm_head"]))


# (what is called, the error: parts of its message)
CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    # Keywords.
    "labels": (
        lambda: sampled_reverse_kl_loss(H, W, labels=IDS),
        "TypeError: sampled_reverse_kl_loss() got an unexpected keyword argument 'labels'; did you mean tokens?",
    ),
    "label-smoothing": (
        lambda: sampled_reverse_kl_loss(H, W, IDS, LP, LP, label_smoothing=0.1),
        "TypeError: sampled_reverse_kl_loss() / 'label_smoothing'; help(fastkl.loss.sampled_reverse_kl_loss) lists",
    ),
    "misspelt": (
        lambda: reverse_kl_loss(H, W, TH, TW, temprature=2.0),
        "TypeError: reverse_kl_loss() / 'temprature'; did you mean temperature?",
    ),
    "attention-mask": (
        lambda: loss.top_k_kl_loss(H, W, IDS[..., None], LP[..., None], attention_mask=IDS),
        "TypeError: top_k_kl_loss() / did you mean mask?",
    ),
    "hidden-of-a-divergence": (
        lambda: reverse_kl_loss(hidden=H, weight=W, teacher_hidden=TH, teacher_weight=TW),
        "TypeError: reverse_kl_loss() / 'hidden'; did you mean student_hidden?",
    ),
    "student-weight-of-a-policy": (
        lambda: policy_gradient_loss(H, student_weight=W, tokens=IDS, advantages=A),
        "TypeError: policy_gradient_loss() / 'student_weight'; did you mean weight?",
    ),
    "student-logits": (
        lambda: reverse_kl_loss(student_logits=LOGITS, teacher_logits=LOGITS),
        "TypeError: 'student_logits'; it takes hidden states, what the LM head receives (fastkl.head.fuse",
    ),
    "sampler-logprobs": (
        lambda: policy_gradient_loss(H, W, IDS, A, sampler_logprobs=LP),
        "TypeError: 'sampler_logprobs'; did you mean old_logprobs?",
    ),
    "num-items-in-batch": (lambda: reverse_kl_loss(H, W, TH, TW, num_items_in_batch=8), "TypeError: normalizer?"),
    "labels-of-a-cross-entropy": (
        lambda: loss.linear_cross_entropy(H, W, labels=IDS),
        "TypeError: linear_cross_entropy() / 'labels'; did you mean targets?",
    ),
    "liger's-z-loss": (
        lambda: loss.linear_cross_entropy(H, W, IDS, lse_square_scale=1e-4),
        "TypeError: 'lse_square_scale'; did you mean z_loss?",
    ),
    "liger's-class-weights": (
        lambda: loss.linear_cross_entropy(H, W, IDS, ce_weight=ones(50)),
        "TypeError: 'ce_weight'; did you mean class_weight?",
    ),
    "trl's-reference": (
        lambda: policy_gradient_loss(H, W, IDS, A, LP, ref_per_token_logps=LP),
        "TypeError: 'ref_per_token_logps'; did you mean ref_logprobs?",
    ),
    "trl's-beta": (
        lambda: policy_gradient_loss(H, W, IDS, A, LP, ref_logprobs=LP, beta=0.04),
        "TypeError: 'beta'; did you mean ref_kl_coef?",
    ),
    "two-sided-clipping": (
        lambda: policy_gradient_loss(H, W, IDS, A, LP, method="ppo", delta=4.0),
        "TypeError: 'delta'; did you mean dual_clip?",
    ),
    "liger's-hard-loss": (
        lambda: reverse_kl_loss(H, W, TH, TW, tokens=IDS, weight_hard_loss=0.5),
        "TypeError: 'weight_hard_loss'; did you mean hard_coef?",
    ),
    "hard-targets-without-tokens": (
        lambda: reverse_kl_loss(H, W, TH, TW, hard_coef=0.5),
        "ValueError: hard_coef is 0.5 and needs the tokens of the cross-entropy: pass tokens=",
    ),
    # By position.
    "mask-by-position": (
        lambda: policy_gradient_loss(H, W, IDS, A, LP, ones(2, 4)),
        "TypeError: policy_gradient_loss() takes 5 arguments by position / old_logprobs) and got 6; give the others by",
    ),
    "nothing-to-learn": (
        lambda: policy_gradient_loss(H, W, IDS),
        "TypeError: policy_gradient_loss() missing 1 required positional argument: 'advantages'",
    ),
    "logits-third": (
        lambda: reverse_kl_loss(H, W, LOGITS),
        "ValueError: give teacher_hidden and teacher_weight, or teacher_logits / did you mean teacher_logits=?",
    ),
    "teachers-logits-and-head": (
        lambda: reverse_kl_loss(H, W, LOGITS, TW),
        "ValueError: teacher_hidden looks like logits: give them alone, as teacher_logits=",
    ),
    "logits-twice": (
        lambda: reverse_kl_loss(LOGITS, LOGITS),
        "ValueError: student_weight looks like logits / hidden states and a head (fastkl.reference takes logits)",
    ),
    "logits-as-hidden": (
        lambda: policy_gradient_loss(LOGITS, W, IDS, A),
        "ValueError: hidden [2, 4, 50] / weight [50, 16] / hidden looks like logits: pass what the LM head receives",
    ),
    "students-logits-as-hidden": (
        lambda: reverse_kl_loss(LOGITS, W, TH, TW),
        "ValueError: student_hidden looks like logits",
    ),
    "weight-transposed": (lambda: policy_gradient_loss(H, W.t(), IDS, A), "ValueError: expected [..., D] and [V, D]"),
    # What is no tensor.
    "head-as-weight": (
        lambda: policy_gradient_loss(H, nn.Linear(16, 50), IDS, A),
        "TypeError: weight must be a tensor, not Linear; pass its .weight",
    ),
    "models-output": (
        lambda: policy_gradient_loss(model()(PROMPT), W, IDS, A),
        "TypeError: hidden must be a tensor, not CausalLMOutputWithPast; pass hidden states, what the LM head receives",
    ),
    "array": (
        lambda: policy_gradient_loss(H, W, IDS.numpy(), A),
        "TypeError: tokens must be a tensor, not ndarray; make it one with torch.as_tensor",
    ),
    "loss-output-as-advantages": (lambda: policy_gradient_loss(H, W, IDS, OUTPUT), "TypeError: pass its .loss"),
    # Of a cross-entropy.
    "probabilities-as-targets": (
        lambda: loss.linear_cross_entropy(H, W, LOGITS.softmax(-1)),
        "ValueError: targets is [2, 4, 50] / forward_kl_loss takes a distribution, as teacher_logits=",
    ),
    "floats-as-targets": (
        lambda: loss.linear_cross_entropy(H, W, IDS.float()),
        "TypeError: targets is torch.float32; expected integer token ids",
    ),
    "targets-outside": (
        lambda: loss.linear_cross_entropy(H, W, IDS + 50),
        "ValueError: targets holds the id / outside the vocabulary (0 … 49)",
    ),
    "smoothing-in-percent": (
        lambda: loss.linear_cross_entropy(H, W, IDS, label_smoothing=10),
        "ValueError: label_smoothing is 10; it must be in [0, 1]",
    ),
    "a-negative-z-loss": (
        lambda: loss.linear_cross_entropy(H, W, IDS, z_loss=-1e-4),
        "ValueError: z_loss is -0.0001; it must be >= 0 and finite",
    ),
    "a-weight-per-token": (
        lambda: loss.linear_cross_entropy(H, W, IDS, class_weight=ones(2, 4)),
        "ValueError: class_weight is [2, 4] but weight has 50 ids: expected one for each id, [50]",
    ),
    "a-negative-class-weight": (
        lambda: loss.linear_cross_entropy(H, W, IDS, class_weight=-ones(50)),
        "ValueError: class_weight holds a weight that is negative or not finite; weights are >= 0",
    ),
    "a-list-of-class-weights": (
        lambda: loss.linear_cross_entropy(H, W, IDS, class_weight=[1.0] * 50),
        "TypeError: class_weight must be a tensor, not list; make it one with torch.as_tensor",
    ),
    "statistics-of-labels": (
        lambda: loss.linear_token_stats(H, W, labels=IDS),
        "TypeError: linear_token_stats() / 'labels'; did you mean tokens?",
    ),
    # Shifts.
    "tokens-shifted-alone": (
        lambda: policy_gradient_loss(H, W, IDS[:, 1:], A[:, 1:]),
        "ValueError: tokens is [2, 3] / position t predicts token t + 1, so that hidden[:, :-1] goes with tokens[:, 1:]",
    ),
    "hidden-shifted-alone": (
        lambda: policy_gradient_loss(H[:, :-1], W, IDS, A),
        "ValueError: tokens is [2, 4] / position t predicts token t + 1: pass tokens[:, 1:]",
    ),
    # Log-probs.
    "teachers-probabilities": (
        lambda: sampled_reverse_kl_loss(H, W, IDS, LP.exp(), LP),
        "BadNumbers: teacher_logprobs holds / at most 0: are these probabilities or logits? Give log-probs",
    ),
    "samplers-probabilities": (
        lambda: loss.reverse_kl_advantages(LP.exp(), LP),
        "BadNumbers: sampler_logprobs holds / Give log-probs",
    ),
    "packed": (
        lambda: reverse_kl_loss(H, TwoTensor(W, W), TH, TW),
        "TypeError: student_weight is a TwoTensor / student_weight.dequantize()",
    ),
    # What comes back.
    "backward": (lambda: OUTPUT.backward(), "AttributeError: 'backward'; its loss is a tensor / output.loss.backward"),
    "item": (lambda: OUTPUT.item(), "AttributeError: a LossOutput has no 'item' / output.loss.item"),
    "neither-has-it": (lambda: OUTPUT.values, "AttributeError: a LossOutput has no 'values'"),
    "assignment": (lambda: setattr(OUTPUT, "loss", 0), "AttributeError: cannot be changed / output._replace(loss=…)"),
    "division": (lambda: OUTPUT / 2, TENSOR),
    "twice": (lambda: OUTPUT * 2, TENSOR),
    "half": (lambda: 0.5 * OUTPUT, TENSOR),
    "sum": (lambda: sum([OUTPUT, OUTPUT]), TENSOR),
    "plus": (lambda: OUTPUT + OUTPUT, TENSOR),
    "tensor-plus": (lambda: ones(()) + OUTPUT, TENSOR),
    "minus": (lambda: -OUTPUT, TENSOR),
    "float": (lambda: float(OUTPUT), TENSOR),
    # The fused head.
    "fused-is-no-function": (
        lambda: fuse(model())(PROMPT, fused=True),
        "TypeError: fused is bool, and takes a function / **head / for logits call the model without it",
    ),
    "with-labels": (
        lambda: fuse(model())(PROMPT, labels=PROMPT, fused=lambda hidden, weight, **head: None),
        "TypeError: labels and fused exclude each other / with labels a model makes its own loss out of logits",
    ),
    "function-without-head": (
        lambda: fuse(model())(PROMPT, fused=lambda hidden, weight: None),
        "TypeError: yours takes (hidden, weight) / let it take (hidden, weight, **head), and pass **head on to the loss",
    ),
    "function-of-hidden": (
        lambda: fuse(model())(PROMPT, fused=lambda hidden: None),
        "TypeError: yours takes (hidden)",
    ),
    "headless": (
        lambda: fuse(model().model),
        "TypeError: LlamaModel has no LM head; give the model with its head, as AutoModelForCausalLM.from_pretrained",
    ),
    "lora-on-the-head": (
        lambda: fuse(lora_on_the_head()),
        "TypeError: LlamaForCausalLM has an adapter on it (peft's Linear) / target_modules / modules_to_save",
    ),
    "wrapped": (
        lambda: fuse(nn.DataParallel(model())),
        "TypeError: DataParallel has been wrapped (DataParallel) / fuse first, then wrap: DataParallel(fuse(model))",
    ),
    "fuse-of-a-function": (lambda: fuse(lambda ids: ids), "TypeError: takes a model, not function"),  # type: ignore[type-var]
    "name-of-a-model": (
        lambda: fuse("Qwen/Qwen3-0.6B"),  # type: ignore[type-var]
        "TypeError: takes a model, not str; load one with AutoModelForCausalLM.from_pretrained",
    ),
    "another-module": (
        lambda: fuse(nn.Linear(3, 4)),
        "TypeError: Linear is no causal LM of Transformers / call a loss of fastkl.loss",
    ),
}


@pytest.mark.parametrize(("call", "message"), CALLS.values(), ids=CALLS)
def test_the_sentence_that_helps(call: Callable[[], Any], message: str) -> None:
    kind, _, message = message.partition(": ")
    with pytest.raises((TypeError, ValueError, AttributeError), match=pattern(message)) as caught:
        call()
    assert type(caught.value).__name__ == kind
    assert "\n" not in str(caught.value)


def test_a_function_takes_the_head_by_name_or_by_stars() -> None:
    fused_model = fuse(model())
    named = fused_model(PROMPT, fused=lambda hidden, weight, bias, logit_scale, softcap: hidden.shape)
    assert named == fused_model(PROMPT, fused=lambda *given, **head: given[0].shape) == (1, 4, 64)


@pytest.mark.filterwarnings("default:neither hidden")
@each_loss
def test_nothing_requires_a_gradient(name: str) -> None:
    """PyTorch's own error does not say which tensors were meant. Log-probs are often wanted without a gradient."""
    if name == "linear_logprobs":
        return
    with pytest.warns(UserWarning, match=r"neither hidden, weight nor bias requires.*detached.*no_grad") as warned:
        fused(name, P)
    assert warned[0].filename.endswith("loss_cases.py")  # where the loss is called, not inside it


@pytest.mark.parametrize("value", [nan, torch.inf])
@pytest.mark.parametrize("field", ["teacher_hidden", "teacher_weight", "teacher_bias", "teacher_logits", "function"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_teacher_that_gives_nan(name: str, field: str, value: float) -> None:
    """Named, where it takes part; a student's NaN stays a NaN."""
    p = make_problem((2, 4))._replace(mask=None)
    out = zeros(2, 4, dtype=torch.bool)
    out[1, 1] = True
    p = p._replace(tokens=p.tokens.clamp(min=0))
    if field in ("teacher_weight", "teacher_bias"):
        p, given = p._replace(**{field: getattr(p, field).index_fill(0, torch.tensor(3), value)}), {}
    elif field == "teacher_hidden":
        p, given = p._replace(teacher_hidden=p.teacher_hidden.masked_fill(out[..., None], value)), {}
    else:
        logits = zeros(2, 4, 11, dtype=torch.float64)
        logits[1, 1, 2] = value
        given = {"teacher_logits": logits if field == "teacher_logits" else lambda rows: logits.flatten(0, 1)[rows]}
    said = "teacher_logits" if field == "function" else field
    with pytest.raises(BadNumbers, match=rf"{said} holds NaN or \+inf, at row \d of the flattened tokens"):
        fused(name, p, **given)
    if field in ("teacher_hidden", "teacher_logits"):
        assert fused(name, p._replace(mask=(~out).double()), **given).isfinite()
    sick = p._replace(
        hidden=p.hidden.masked_fill(out[..., None], nan), teacher_hidden=make_problem((2, 4)).teacher_hidden
    )
    clean = {field: getattr(make_problem((2, 4)), field) for field in ("teacher_weight", "teacher_bias")}
    assert fused(name, sick._replace(**clean)).isnan()


@each_loss
def test_help_shows_every_option(name: str) -> None:
    function = LOSSES[name].function
    shown = pydoc.plain(pydoc.render_doc(function))
    assert "options" not in inspect.signature(function).parameters
    for option in ("bias", "temperature", "softcap", "chunk_size", "backward"):
        assert f"{option}:" in shown


def test_fields_are_there_still() -> None:
    output = fused_output("reverse_kl", P, per_token=True)
    assert output._fields == ("loss", "logprobs", "metrics", "per_token")
    assert next(iter(output)) is output.loss
    assert output._replace(metrics={}).metrics == {}
