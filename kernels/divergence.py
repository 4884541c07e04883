"""placeholder"""

from typing import Literal, NamedTuple
from torch import Tensor

Divergence = Literal["reverse_kl", "forward_kl", "jsd", "skewed_forward_kl", "skewed_reverse_kl", "total_variation"]


class DivergenceValues(NamedTuple):
    value: Tensor
    student_nll: Tensor
    teacher_nll: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    reverse_kl: Tensor
    forward_kl: Tensor
    agreement: Tensor
