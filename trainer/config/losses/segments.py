"""What a loss over segments needs: a teacher with its own tokenizer says nothing of one token of the student."""

from __future__ import annotations

from collections.abc import Mapping

from fastkl.trainer.config.environment import EnvironmentConfig
from fastkl.trainer.config.loss import LossConfig
from fastkl.trainer.config.losses.weights import weight_rule
from fastkl.trainer.config.rules import unchanged
from fastkl.trainer.config.teacher import TeacherConfig
from fastkl.trainer.errors import require


def check_own_tokenizers(
    teachers: Mapping[str, TeacherConfig], loss: LossConfig, environment: EnvironmentConfig
) -> None:
    """`teachers` are all of the run, by the names of their settings."""
    own = [name for name, teacher in teachers.items() if teacher.own_tokenizer]
    if not own:
        reason = "no teacher.tokenizer is own: every token is a segment; unset it"
        unchanged(loss, "loss.", reason, ["max_segment"])
        return
    setting = f"{own[0]}.tokenizer is {teachers[own[0]].tokenizer}"
    same = f"use a teacher of the student's family, and unset {own[0]}.tokenizer"
    require(
        loss.objective == "policy_gradient",
        f"loss.objective is {loss.objective}, but {setting}: the two have no vocabulary in common; set loss.objective to "
        f"policy_gradient, or {same}",
    )
    whole = f"{setting}: the two have no distribution over the same tokens"
    require(loss.baseline != "kl", f"loss.baseline is kl, but {whole}; set loss.baseline to mean, or {same}")
    require(
        loss.forward_kl_above is None,
        f"loss.forward_kl_above is {loss.forward_kl_above}, but {whole}; unset it, or {same}",
    )
    require(
        loss.control != "shuffled",
        f"loss.control is shuffled, but {setting}: a segment's score does not fit tokens elsewhere; set loss.control to "
        f"no_teacher, or {same}",
    )
    seen = [text for text in loss.weights if not weight_rule(text).is_blind]
    require(
        not seen,
        f"loss.weights has {' and '.join(seen)}, which compares single tokens with the teacher, but {setting}: it knows "
        f"segments alone; unset one of them",
    )
    require(
        environment.role is None,
        f"environment.role is {environment.role!r}, but {setting}: replies in turns of their own are in the student's "
        f"format; set environment.role to null, or {same}",
    )
