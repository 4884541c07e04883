"""Liger-Kernel's fused losses by `fastkl.loss`: for code that was written for them, another import is all.

    from fastkl.integrations.liger import LigerFusedLinearCrossEntropyLoss

The constructors, the calls and the results are those of Liger-Kernel 0.8.5, which need not be installed. Gradients are
summed in float32, whatever the dtype. docs/integrations.md says what is refused.
"""

from fastkl.integrations.liger_cross_entropy import CrossEntropyOutput, LigerFusedLinearCrossEntropyLoss
from fastkl.integrations.liger_grpo import LigerFusedLinearGRPOLoss
from fastkl.integrations.liger_jsd import LigerFusedLinearJSDLoss

__all__ = [
    "CrossEntropyOutput",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearJSDLoss",
]
