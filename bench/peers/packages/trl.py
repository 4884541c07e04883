"""TRL's own kernels (`trl.kernels`), a chunk of rows and of the vocabulary at a time. On a CPU they are PyTorch.

log-probs and what is made of them    ChunkedLogProbFunction, as its policy-gradient trainers use it
divergences                           ChunkedDivergenceFunction, as its DistillationTrainer does
"""

from __future__ import annotations

from torch import Tensor

from bench.lib.cases import BETAS, ENTROPY_COEF, OF_LOGPROBS, Case
from bench.peers import Loss, Peer


def build(case: Case) -> Loss:
    return _divergence(case) if case.op in BETAS else _logprobs(case)


def _logprobs(case: Case) -> Loss:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    outputs = ("entropy",) if case.op == "entropy" else ()
    options = 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, outputs  # temperature, columns, soft-cap, scale

    def loss() -> Tensor:
        logprobs, entropy, *_ = ChunkedLogProbFunction.apply(case.hidden, case.weight, None, case.tokens, *options)
        value = case.objective(logprobs)
        return value - ENTROPY_COEF * entropy.mean() if outputs else value

    return loss


def _divergence(case: Case) -> Loss:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    teacher_hidden, teacher_weight = case.teacher
    heads = case.hidden, case.weight, None, teacher_hidden, teacher_weight, None
    return lambda: ChunkedDivergenceFunction.apply(*heads, BETAS[case.op])[0].mean()


AGAIN, LOGPROBS = "forms the logits again in backward", (*OF_LOGPROBS, "entropy")
PEER = Peer(
    build,
    ops=(*LOGPROBS, *BETAS),
    packages=("trl",),
    notes={
        **dict.fromkeys(LOGPROBS, f"{AGAIN}; its logits have the inputs' dtype"),
        **dict.fromkeys(BETAS, f"{AGAIN}; gives the student's entropy besides"),
    },
)
