"""A teacher with another vocabulary as logits over the student's: the tokens that both have, and one outcome for the rest.

With p and q the distributions of student and teacher, C the tokens that both have, and p_R and q_R the masses that each has
outside of C:

    q̃_v = q_v              for v in C
    q̃_v = q_R · p_v / p_R   for the student's other tokens

A divergence that is Σ q f(p/q) sees one ratio outside of C, p_R / q_R. So D(p ‖ q̃) is D over the |C| + 1 outcomes. Its
gradient is theirs too, with q̃ held fixed: outside of C the derivative by p_v is that by p_R. By the data-processing
inequality no teacher over the student's tokens that has these q_v and q_R has a smaller D.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastkl._loss import arguments as check
from fastkl._loss.heads.operands import operands
from fastkl._loss.numbers import visible
from fastkl._loss.options import CommonOptions, record, takes
from fastkl.kernels.gemm import compute_dtype, new_scores, project
from fastkl.kernels.problem import HeadOptions
from fastkl.kernels.rows.pytorch import apply_cap

LEAST = 16  # eps: a rest of the teacher that is none may be rounding, as in `top_k_kl_loss`


class CommonLogits:
    """What a divergence takes as `teacher_logits`: see `common_vocabulary_logits`.

    Attributes:
        rests: [2, N], the masses of student and teacher outside of the common tokens, float32 (float64 for float64). NaN
            for tokens that no loss has asked for yet.
    """

    def __init__(self, student: _Head, teacher: _Head, student_ids: Tensor, teacher_ids: Tensor) -> None:
        self._student, self._teacher = student, teacher
        self._student_ids, self._teacher_ids = student_ids, teacher_ids
        self._others = len(student.weight) - len(student_ids)
        self._teacher_has_all = len(teacher.weight) == len(teacher_ids)
        count, dtype = len(student.hidden), compute_dtype(student.hidden.dtype)
        self.rests = student.hidden.new_full((2, count), torch.nan, dtype=dtype)

    @torch.no_grad()
    def __call__(self, rows: Tensor) -> Tensor:
        """[n, V] for rows [n] of the N tokens."""
        z, p_rest = self._student.parts(rows, self._student_ids)[::2]
        _, log_q, q_rest = self._teacher.parts(rows, self._teacher_ids)
        self.rests[:, rows] = torch.stack([p_rest.log_mass, q_rest.log_mass]).exp()
        log_q_rest = q_rest.log_mass
        if self._teacher_has_all:
            log_q_rest = torch.full_like(log_q_rest, LEAST * torch.finfo(log_q_rest.dtype).eps).log()
        nobody = (p_rest.lse == -torch.inf)[:, None]  # the student forbids all others: any of them stand for the rest
        z.sub_(p_rest.lse[:, None]).masked_fill_(nobody, -math.log(max(1, self._others)))
        z.add_(log_q_rest[:, None]).index_copy_(1, self._student_ids, log_q)
        return z.mul_(self._student.options.temperature)


class _Rest(NamedTuple):
    lse: Tensor  # [n], of the logits
    log_mass: Tensor  # [n]


class _Head(NamedTuple):
    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    options: HeadOptions

    def parts(self, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, _Rest]:
        """The logits z [n, V] without those of the ids, which are −inf there; the log-probs [n, C] of the ids; the rest."""
        hidden = self.hidden[rows]
        z = new_scores(hidden, len(rows), len(self.weight), compute_dtype(hidden.dtype))
        with torch.autocast(hidden.device.type, enabled=False):
            project(hidden, self.weight, self.bias, self.options.alpha, z)
        apply_cap(z, self.options.cap, keep=False)
        lse = z.logsumexp(1)
        listed = z[:, ids] - lse[:, None]
        rest = z.index_fill_(1, ids, -torch.inf).logsumexp(1)
        return z, listed, _Rest(rest, rest - lse)


@takes(CommonOptions)
def common_vocabulary_logits(
    student_hidden: Tensor,  # [..., D]
    student_weight: Tensor,  # [V, D]
    teacher_hidden: Tensor,  # [..., D_t]
    teacher_weight: Tensor,  # [V_t, D_t]
    student_ids: Tensor,  # [C] int64
    teacher_ids: Tensor,  # [C] int64
    **options: Unpack[CommonOptions],
) -> CommonLogits:
    """A teacher with another vocabulary, for the `teacher_logits` of a divergence: over C common tokens and one rest.

    student_ids[i] and teacher_ids[i] are the same token. All other ids of a side are one outcome, its rest. The
    divergence is that of `fastkl.reference.common_vocabulary`, value and gradient:

        teacher = common_vocabulary_logits(h, W, h_t, W_t, ids, ids_t, temperature=T)
        loss = reverse_kl_loss(h, W, teacher_logits=teacher, temperature=T).loss

    If all ids of the student are common, it has no rest: the teacher's probabilities of them are then renormalised. If all
    of the teacher are, its rest has the mass 16 eps.

    It is for all divergences but density_power_loss, which is not made of the ratio p/q alone. The loss gets the student's
    own options, `temperature` too, and none of the teacher's: teacher_temperature (default: the student's), teacher_bias,
    teacher_logit_scale and teacher_softcap are given here. So are the student's bias, logit_scale and softcap.

    The by-products of a divergence: reverse_kl and forward_kl are those over the C + 1 outcomes, teacher_logprobs are the
    teacher's where the token is common, and teacher_entropy says nothing. `rests` has the masses outside.

    No logits outlive a chunk. It costs one product of each head, and room for twice a chunk's logits of both vocabularies.
    Not under torch.compile, and not with `group`.

    Raises TypeError or ValueError for shapes, dtypes, devices or ids that do not fit, before anything is computed.
    """
    student = _head(student_hidden, student_weight, options["bias"], record(HeadOptions, options), "student_")
    if options["teacher_temperature"] is None:
        options = {**options, "teacher_temperature": options["temperature"]}
    settings = record(HeadOptions, options, "teacher_")
    teacher = _head(teacher_hidden, teacher_weight, options["teacher_bias"], settings, "teacher_")
    if teacher_hidden.shape[:-1] != student_hidden.shape[:-1]:
        raise ValueError(
            f"teacher_hidden is {list(teacher_hidden.shape)} but student_hidden is {list(student_hidden.shape)}: expected "
            f"the same tokens, {list(student_hidden.shape[:-1])}"
        )
    check.check_device("teacher_hidden", teacher_hidden, student_hidden, "student_hidden")
    if len({compute_dtype(head.hidden.dtype) for head in (student, teacher)}) > 1:
        raise TypeError(
            f"teacher_hidden is {teacher_hidden.dtype} but student_hidden is {student_hidden.dtype}; float64 goes with "
            f"float64 only"
        )
    ids = _ids("student_ids", student_ids, student), _ids("teacher_ids", teacher_ids, teacher)
    if len(ids[0]) != len(ids[1]):
        raise ValueError(
            f"student_ids has {len(ids[0])} ids and teacher_ids {len(ids[1])}; they are pairs of one token"
        )
    return CommonLogits(student, teacher, *ids)


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None, options: HeadOptions, who: str) -> _Head:
    check.check_head(hidden, weight, bias, who)
    bias = None if bias is None else bias.detach()
    hidden, weight, bias = operands(hidden.detach(), weight.detach(), bias)
    return _Head(hidden.reshape(-1, hidden.shape[-1]), weight, bias, options)


def _ids(name: str, value: Any, head: _Head) -> Tensor:
    ids = check.check_tensor(name, value)
    check.check_integers(name, ids)
    if ids.dim() != 1:
        raise ValueError(f"{name} is {list(ids.shape)}; expected [C], one id for each common token")
    check.check_device(name, ids, head.hidden, "student_hidden")
    ids = ids.to(torch.int64)
    if visible(ids):
        wrong = (ids < 0) | (ids >= len(head.weight))
        if bool(wrong.any()):
            raise ValueError(f"{name} holds {int(ids[wrong][0])}, outside the vocabulary (0 … {len(head.weight) - 1})")
        if len(ids.unique()) < len(ids):
            raise ValueError(f"{name} holds an id twice; each token is in one pair at most")
    return ids
