"""The teacher of a divergence: a head or logits, checked and cut to the vocabulary that it shares with the student."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkl._loss import arguments as check
from fastkl._loss.heads.operands import operands
from fastkl._loss.heads.shares import Piece
from fastkl.kernels.gemm import compute_dtype
from fastkl.kernels.problem import Inputs, TeacherChunks


class Teacher(NamedTuple):
    """Hidden states [..., D_t] with a head, or logits [..., V], or a function that gives some rows of them."""

    hidden: Tensor | None
    weight: Tensor | None  # [V, D_t]
    bias: Tensor | None  # [V]
    logits: Tensor | TeacherChunks | None

    def join(self, inputs: Inputs, vocab_size: int | None, piece: Piece | None) -> Inputs:
        """The inputs of a student with this teacher, flat and cut to the student's vocabulary, of which it has a `piece`.

        The results of a function are checked against that vocabulary; with a `vocab_size` a larger one is taken.
        """
        vocabulary, logits = inputs.weight.shape[0], self.logits
        count = vocabulary if piece is None else vocab_size
        if self.hidden is not None and self.weight is not None:
            bias = None if self.bias is None else self.bias.detach()
            hidden, weight, bias = operands(self.hidden.detach(), self.weight.detach(), bias, count, piece)
            hidden = hidden.reshape(-1, hidden.shape[-1])
            return inputs._replace(teacher_hidden=hidden, teacher_weight=weight, teacher_bias=bias)
        if isinstance(logits, Tensor):
            own = logits[..., :vocabulary] if piece is None else piece.own_logits(logits, vocab_size)
            return inputs._replace(teacher_logits=_flat_logits(own))
        assert logits is not None
        return inputs._replace(teacher_logits=_checked(logits, vocabulary, exactly=vocab_size is None))


def check_teacher(teacher: Teacher, hidden: Tensor, weight: Tensor, vocab_size: int | None, part: bool = False) -> None:
    """Shapes, dtypes and devices against the student's; which forms go together.

    `part`: both have the ids of one process, which `find_piece` compares.
    """
    _check_form(teacher, weight.shape[0])
    if torch.is_grad_enabled() and any(_wants_gradient(name, t) for name, t in teacher._asdict().items()):
        raise ValueError(
            "the teacher requires a gradient, and a divergence has none for it: run the teacher under torch.no_grad() "
            "or pass detached tensors (teacher_weight.detach())"
        )
    vocabularies = {"student_weight": weight.shape[0]}
    if teacher.hidden is not None and teacher.weight is not None:
        check.check_head(teacher.hidden, teacher.weight, teacher.bias, "teacher_", part=part)
        _check_rows("teacher_hidden", teacher.hidden, hidden)
        vocabularies["teacher_weight"] = teacher.weight.shape[0]
    if isinstance(teacher.logits, Tensor):
        _check_rows("teacher_logits", teacher.logits, hidden)
        vocabularies["teacher_logits"] = teacher.logits.shape[-1]
    if callable(teacher.logits) and torch.compiler.is_compiling():
        raise ValueError("teacher_logits is a function, which torch.compile does not take: give a tensor or a head")
    if not part:
        _check_vocabularies(vocabularies, vocab_size)


def _wants_gradient(name: str, tensor: Any) -> bool:
    """In a graph; a Parameter alone only says that somebody trains it. Logits are nobody's Parameter."""
    return isinstance(tensor, Tensor) and tensor.requires_grad and (name == "logits" or not tensor.is_leaf)


def _check_form(teacher: Teacher, vocabulary: int) -> None:
    head = teacher.hidden is not None, teacher.weight is not None
    if (teacher.logits is not None and (any(head) or teacher.bias is not None)) or (
        teacher.logits is None and not all(head)
    ):
        given = [name for name, value in zip(Teacher._fields, teacher, strict=True) if value is not None]
        raise ValueError(
            f"the teacher is given as {', '.join(f'teacher_{name}' for name in given) or 'nothing'}; give teacher_hidden "
            f"and teacher_weight, or teacher_logits alone{_meant_logits(teacher.hidden, given, vocabulary)}"
        )
    if teacher.logits is not None and not isinstance(teacher.logits, Tensor) and not callable(teacher.logits):
        raise TypeError(
            f"teacher_logits must be a tensor [..., V] or a function from rows [n] to logits [n, V], not "
            f"{type(teacher.logits).__name__}"
        )


def _meant_logits(hidden: Any, given: list[str], vocabulary: int) -> str:
    """A hint for logits that took the place of hidden states; the teacher's vocabulary may be padded to another size."""
    if given != ["hidden"] or not isinstance(hidden, Tensor) or 2 * hidden.shape[-1] < vocabulary:
        return ""
    return f": teacher_hidden is {list(hidden.shape)}; did you mean teacher_logits=?"


def _check_rows(name: str, tensor: Tensor, hidden: Tensor) -> None:
    if tensor.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"{name} is {list(tensor.shape)} but student_hidden is {list(hidden.shape)}: expected the same tokens, "
            f"{list(hidden.shape[:-1])}"
        )
    check.check_device(name, tensor, hidden, "student_hidden")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} is {tensor.dtype}; use float32, bfloat16, float16 or float64")
    if compute_dtype(tensor.dtype) != compute_dtype(hidden.dtype):
        raise TypeError(
            f"{name} is {tensor.dtype} but student_hidden is {hidden.dtype}; float64 goes with float64 only"
        )


def _check_vocabularies(sizes: dict[str, int], vocab_size: int | None) -> None:
    if vocab_size is not None:
        check.check_vocab_size(vocab_size, sizes)
    elif len(set(sizes.values())) > 1:
        (_, ours), (name, theirs) = sizes.items()
        raise ValueError(
            f"{name} has a vocabulary of {theirs} but student_weight one of {ours}; if both are one tokenizer's, padded to "
            f"different sizes, pass vocab_size=len(tokenizer): the ids beyond it are left out on both sides; never pad "
            f"with zeros, which is a logit of 0 and takes probability"
        )


def _flat_logits(logits: Tensor) -> Tensor | TeacherChunks:
    """[..., V] as [N, V] where that is a view, else as a function: a copy would be of size N × V."""
    try:
        return logits.view(-1, logits.shape[-1])
    except RuntimeError:
        if torch.compiler.is_compiling():
            return logits.reshape(-1, logits.shape[-1])
        return lambda rows: logits[torch.unravel_index(rows, logits.shape[:-1])]


def _checked(chunks: TeacherChunks, vocabulary: int, exactly: bool) -> TeacherChunks:
    """The user's function under the autocast of the call, with its results checked."""
    device = "cuda" if torch.is_autocast_enabled("cuda") else "cpu"
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def checked(rows: Tensor) -> Tensor:
        with torch.autocast(device, dtype, enabled=enabled):
            found = chunks(rows)
        if not isinstance(found, Tensor) or not found.is_floating_point():
            kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
            raise TypeError(f"teacher_logits gave {kind} for {len(rows)} rows; expected floating-point logits [n, V]")
        wide = found.dim() == 2 and (found.shape[1] == vocabulary or (not exactly and found.shape[1] > vocabulary))
        if not wide or found.shape[0] != len(rows):
            raise ValueError(
                f"teacher_logits gave {list(found.shape)} for {len(rows)} rows; expected [{len(rows)}, {vocabulary}], one "
                f"row of logits for each index that it was asked for"
            )
        check.check_device("what teacher_logits gave", found, rows, "student_hidden")
        return found

    return checked
