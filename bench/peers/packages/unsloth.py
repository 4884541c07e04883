"""Unsloth's fused losses (`unsloth_zoo.fused_losses.fused_linear`), a chunk of rows at a time.

log-probs and what is made of them    fused_linear_logprobs
divergences                           fused_linear_jsd

Of the installed package that module alone is loaded. Importing the package would change transformers and torch for the
whole process, and with them the other implementations.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from types import ModuleType

from torch import Tensor

from bench.lib.cases import BETAS, ENTROPY_COEF, OF_LOGPROBS, Case
from bench.peers import Loss, Peer

MODULE = "fused_losses/fused_linear.py"


@functools.cache
def fused_linear() -> ModuleType:
    package = importlib.util.find_spec("unsloth_zoo")
    if package is None or not package.submodule_search_locations:
        raise ImportError("No module named 'unsloth_zoo'")
    file = Path(package.submodule_search_locations[0], MODULE)
    spec = importlib.util.spec_from_file_location("unsloth_fused_linear", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise ImportError(f"this unsloth_zoo has no {MODULE}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(case: Case) -> Loss:
    module = fused_linear()
    head = case.hidden, case.weight
    if case.op in BETAS:
        return lambda: module.fused_linear_jsd(*head, *case.teacher, beta=BETAS[case.op])
    if case.op != "entropy":
        return lambda: case.objective(module.fused_linear_logprobs(*head, case.tokens))

    def loss() -> Tensor:
        logprobs, entropy = module.fused_linear_logprobs(*head, case.tokens, return_entropy=True)
        return case.objective(logprobs) - ENTROPY_COEF * entropy.mean()

    return loss


LOGPROBS = (*OF_LOGPROBS, "entropy")
PEER = Peer(
    build,
    ops=(*LOGPROBS, *BETAS),
    packages=("unsloth_zoo",),
    notes=dict.fromkeys(LOGPROBS, "with a trainable head it forms the logits again in backward"),
)
