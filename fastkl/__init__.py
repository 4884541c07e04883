"""fastkl: on-policy distillation without the logits. Start at `fastkl.loss`."""

__version__ = "0.1.0"
