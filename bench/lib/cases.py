"""What is measured: the tensors of one problem, shaped like a language model's, and the loss built on them.

The kinds of rows (`DATA`):

    peaked          like a language model's. A row of hidden states points at one token by a margin m_i and is otherwise
                    noise: a peak of probability sigmoid(m_i) and a long tail. Margins are normal; their mean is solved
                    for the mean entropy that is asked for. Rows share their tails: SHARED of the noise's variance is in
                    one common direction, whose logits act as unigram frequencies
    unshared        the same, but each row has a tail of its own. No language model is like that
    flat            a model at its initialisation: normal logits of deviation 1, entropy about log V − 1/2
    smollm2, qwen   real (`real_rows.py`)

Tokens are sampled from the model. The sampler's log-probs are the model's plus a little noise (another kernel, an older
step), those of the reference model have more, advantages are normal, the teacher is a perturbed copy of the student. A
wider teacher has further columns, of noise.

The ops grpo and grpo_kl are the clipped policy gradient, without and with the KL (k3) to the reference model.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from bench.lib.real_rows import MODELS, real_rows
from fastkl import reference

BETAS = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}  # as members of the generalised JSD
# The policy gradients, by the options that `fastkl.loss` and `fastkl.reference` have for them.
SURROGATES: dict[str, dict[str, Any]] = {
    "policy_gradient": {},
    "entropy": {},
    "grpo": {"method": "ppo"},
    "grpo_kl": {"method": "ppo", "ref_kl_coef": 0.04},
}
OF_LOGPROBS = ("logprobs", "policy_gradient", "grpo", "grpo_kl", "cross_entropy")  # nothing else of the model is needed
OPS = (*OF_LOGPROBS, "entropy", "top_k", *BETAS)
HEADS = ("frozen", "trainable")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

DATA = ("peaked", "unshared", "flat", *MODELS)
ENTROPY = 0.57  # nats: what Qwen2.5-Coder-1.5B-Instruct's own samples have at temperature 1
TAIL_SHARE = 0.45  # the tail's entropy as a share of log V: about 4.9 nats at V = 49152
# More columns are kept than with Qwen's rows, fewer than with SmolLM2's (docs/losses/sparse-backward.md).
SHARED = 0.95
MARGIN_STD = 3.0  # nats; from rows that are certain to rows that are flat
TOP_K = 64  # tokens that op top_k knows of the teacher
ENTROPY_COEF = 0.01  # of op entropy, the policy gradient with an entropy term
SAMPLER_STD = 0.05  # nats between the sampler's and the trainer's log-probs
REFERENCE_STD = 0.3  # nats between the reference model's and the trainer's
TEACHER_STD = 0.3  # of the noise in the student's rows
_ROWS_AT_A_TIME = 256


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem. `hidden` wants a gradient, `weight` does if the head is trainable."""

    op: str
    head: str
    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    tokens: Tensor  # [N] int64
    advantages: Tensor  # [N] float32; of op logprobs: the upstream gradient
    sampler_logprobs: Tensor  # [N] float32
    teacher_hidden: Tensor | None = None  # [N, D_t], of the divergences
    teacher_weight: Tensor | None = None  # [V, D_t]
    teacher_ids: Tensor | None = None  # [N, TOP_K] int64, of op top_k
    teacher_logprobs: Tensor | None = None  # [N, TOP_K] float32
    ref_logprobs: Tensor | None = None  # [N] float32, of op grpo_kl

    @property
    def gradient_inputs(self) -> tuple[Tensor, ...]:
        """The leaves whose gradients are asked for."""
        return (self.hidden, self.weight) if self.head == "trainable" else (self.hidden,)

    @property
    def teacher(self) -> tuple[Tensor, Tensor]:
        """Hidden states and weight of the teacher of a divergence."""
        assert self.teacher_hidden is not None
        assert self.teacher_weight is not None
        return self.teacher_hidden, self.teacher_weight

    @property
    def teacher_list(self) -> tuple[Tensor, Tensor]:
        """Ids and log-probs of the teacher's likeliest tokens."""
        assert self.teacher_ids is not None
        assert self.teacher_logprobs is not None
        return self.teacher_ids, self.teacher_logprobs

    def objective(self, logprobs: Tensor) -> Tensor:
        """The scalar loss of the ops that are built on the tokens' log-probs [N]."""
        if self.op == "logprobs":
            return -(logprobs * self.advantages).mean()
        if self.op == "cross_entropy":
            return -logprobs.mean()
        terms = self.advantages, self.sampler_logprobs
        options = SURROGATES[self.op]
        return reference.policy_gradient(logprobs, *terms, ref_logprobs=self.ref_logprobs, **options).mean()

    def clear_gradients(self) -> None:
        for leaf in self.gradient_inputs:
            leaf.grad = None

    def gradients(self) -> list[Tensor]:
        """What the last backward pass left in the leaves, in the order of `gradient_inputs`."""
        gradients = [leaf.grad for leaf in self.gradient_inputs]
        assert all(g is not None for g in gradients), "no backward pass has run"
        return [g for g in gradients if g is not None]

    def rows(self, rows: slice | Tensor) -> Case:
        """The same problem on some of its rows. The weight, and so its gradient, is shared with this one."""
        optional = ("teacher_hidden", "teacher_ids", "teacher_logprobs", "ref_logprobs")
        taken: dict[str, Any] = {name: None if (t := getattr(self, name)) is None else t[rows] for name in optional}
        return dataclasses.replace(
            self,
            hidden=self.hidden.detach()[rows].clone().requires_grad_(),
            tokens=self.tokens[rows],
            advantages=self.advantages[rows],
            sampler_logprobs=self.sampler_logprobs[rows],
            **taken,
        )

    def in_float64(self) -> Case:
        """The same numbers in float64: what the references are computed from."""

        def cast(tensor: Tensor) -> Tensor:
            return tensor.detach().double() if tensor.is_floating_point() else tensor

        tensors: dict[str, Any] = {
            field.name: cast(value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        case = dataclasses.replace(self, **tensors)
        for leaf in case.gradient_inputs:
            leaf.requires_grad_()
        return case


def make_case(
    op: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    head: str,
    device: str,
    data: str,
    entropy: float | None,
    seed: int,
    temperature: float = 1.0,
    teacher_width: int | None = None,
) -> Case:
    """Rows of a kind: peaked ones have `entropy` nats on average, real ones the temperature they were sampled at.

    The teacher's hidden states are as wide as the student's, or `teacher_width`, which is no less. Equal seeds give equal
    tensors on a kind of device.
    """
    generator = torch.Generator(device).manual_seed(seed)
    if data in MODELS:
        rows = real_rows(data, temperature)
        hidden, weight = rows.hidden[: shape[0]].to(device), rows.weight.to(device)
        noise = hidden.norm(dim=-1).mean().item() / math.sqrt(shape[1])
    else:
        hidden, weight, noise = _synthetic(shape, None if data == "flat" else entropy, data == "peaked", generator)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    teacher_hidden = teacher_weight = None
    if op in BETAS or op == "top_k":
        length, further = weight.norm(dim=-1).mean().item(), (teacher_width or shape[1]) - shape[1]
        wide_hidden, wide_weight = (torch.nn.functional.pad(tensor, (0, further)) for tensor in (hidden, weight))
        teacher_hidden = (wide_hidden + TEACHER_STD * noise * normal(*wide_hidden.shape)).to(dtype)
        deviation = TEACHER_STD * 0.1 * length / math.sqrt(shape[1])
        teacher_weight = (wide_weight + deviation * normal(*wide_weight.shape)).to(dtype)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    if data in MODELS:
        tokens, logprobs = rows.tokens[: shape[0]].to(device), rows.logprobs[: shape[0]].to(device)
    else:
        tokens, logprobs = _sample(hidden, weight, generator)
    n = hidden.shape[0]
    case = Case(
        op,
        head,
        hidden.requires_grad_(),
        weight.requires_grad_(head == "trainable"),
        tokens,
        normal(n),
        (logprobs + SAMPLER_STD * normal(n)).clamp(max=0.0),
        teacher_hidden,
        teacher_weight,
    )
    if op == "grpo_kl":
        return dataclasses.replace(case, ref_logprobs=(logprobs + REFERENCE_STD * normal(n)).clamp(max=0.0))
    return _with_list(case) if op == "top_k" else case


def _synthetic(
    shape: tuple[int, int, int], entropy: float | None, shared: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor, float]:
    """Hidden states [N, D], weight [V, D], and the deviation of the noise in the hidden states' entries."""
    n, d, vocabulary = shape

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=generator.device)

    # Rows of W have norm 1, so h = c W[v] + s noise has a logit of c at v and normal ones of deviation s elsewhere. Their
    # log-sum-exp is log V + s²/2 and their entropy log V − s²/2.
    log_v = math.log(vocabulary)
    noise = 1.0 if entropy is None else math.sqrt(2 * (1 - TAIL_SHARE) * log_v)
    spread = MARGIN_STD * normal(n, 1)
    weight = torch.nn.functional.normalize(normal(vocabulary, d), dim=-1)
    peak = torch.randint(vocabulary, (n,), generator=generator, device=generator.device)
    direction = normal(n, d)
    if shared:
        direction = math.sqrt(SHARED) * normal(1, d) + math.sqrt(1 - SHARED) * direction
    hidden = noise * direction
    if entropy is not None:
        peaks = weight[peak]
        by_chance = (hidden * peaks).sum(-1, keepdim=True)
        margin = _mean_margin(entropy, TAIL_SHARE * log_v) + spread
        hidden += (log_v + noise**2 / 2 + margin - by_chance) * peaks
    return hidden, weight, noise


def max_entropy(vocabulary: int) -> float:
    """The largest mean entropy that `make_case` can be asked for."""
    return 0.9 * TAIL_SHARE * math.log(vocabulary)


@torch.no_grad()
def mean_entropy(case: Case) -> float:
    """Nats per row, over the first rows of the case."""
    z = torch.nn.functional.linear(case.hidden[:_ROWS_AT_A_TIME], case.weight).float()
    return torch.distributions.Categorical(logits=z, validate_args=False).entropy().mean().item()


def _mean_margin(entropy: float, tail: float) -> float:
    """The mean of normal margins m for which E[binary entropy of p + (1 − p) tail] = entropy, p = sigmoid(m)."""
    spread = MARGIN_STD * torch.linspace(-3, 3, 121, dtype=torch.float64)
    density = torch.exp(-((spread / MARGIN_STD) ** 2) / 2)
    low, high = -40.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        p = torch.sigmoid(middle + spread)
        rows = torch.special.entr(p) + torch.special.entr(1 - p) + (1 - p) * tail
        low, high = (middle, high) if (rows * density).sum() / density.sum() > entropy else (low, middle)
    return low


@torch.no_grad()
def _with_list(case: Case) -> Case:
    """The same with the teacher's likeliest tokens instead of the teacher."""
    hidden, weight = case.teacher
    k = min(TOP_K, weight.shape[0])
    parts = [
        torch.log_softmax(torch.nn.functional.linear(rows, weight).float(), -1).topk(k)
        for rows in hidden.split(_ROWS_AT_A_TIME)
    ]
    logprobs, ids = (torch.cat(lists) for lists in zip(*parts, strict=True))
    return dataclasses.replace(
        case, teacher_hidden=None, teacher_weight=None, teacher_ids=ids, teacher_logprobs=logprobs
    )


@torch.no_grad()
def _sample(hidden: Tensor, weight: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens [N] from the model, and their log-probs [N] float32."""
    tokens, logprobs = [], []
    for rows in hidden.detach().split(_ROWS_AT_A_TIME):
        row_logprobs = torch.log_softmax(torch.nn.functional.linear(rows, weight).float(), -1)
        token = torch.multinomial(row_logprobs.exp(), 1, generator=generator)
        tokens.append(token.squeeze(1))
        logprobs.append(row_logprobs.gather(1, token).squeeze(1))
    return torch.cat(tokens), torch.cat(logprobs)
