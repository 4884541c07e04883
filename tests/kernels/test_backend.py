"""Which row functions run: the documented rule, and no silent fallback."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch

from fastkl.kernels.backend import BACKENDS, row_function, scorer
from fastkl.kernels.divergence import pytorch as divergence_pytorch
from fastkl.kernels.problem import HeadOptions, Inputs, Spec
from fastkl.kernels.rows import pytorch as rows_pytorch
from fastkl.loss import linear_logprobs

HIDDEN, WEIGHT, TOKENS = torch.randn(3, 4), torch.randn(7, 4), torch.tensor([1, 6, 0])


NLL = Spec("token_nll", HeadOptions())


def test_auto_is_pytorch_on_a_cpu() -> None:
    for backend in set(BACKENDS) - {"triton"}:
        assert row_function(NLL._replace(backend=backend), HIDDEN) is rows_pytorch.token_nll
        divergence = row_function(Spec("divergence", HeadOptions(), HeadOptions(), backend, None, "jsd", 0.5), HIDDEN)
        assert isinstance(divergence, partial)
        assert divergence.func is divergence_pytorch.divergence
        assert divergence.args == ("jsd", 0.5)
    assert torch.equal(
        linear_logprobs(HIDDEN, WEIGHT, TOKENS), linear_logprobs(HIDDEN, WEIGHT, TOKENS, backend="torch")
    )


def test_what_is_scored_without_logits() -> None:
    """Log-probs on a CPU, and of 16-bit heads where Triton runs; there the reverse KL of two heads alone, too."""
    half = Inputs(HIDDEN.half(), WEIGHT.half(), None, TOKENS, HIDDEN.half(), WEIGHT.half())
    kl = Spec("divergence", HeadOptions(), HeadOptions(), "triton", None, "reverse_kl")
    for spec in (NLL, NLL._replace(kind="token_nll_entropy"), kl):
        assert scorer(spec._replace(backend="triton"), half) is not None
        assert (scorer(spec._replace(backend="auto"), half) is None) == (spec is kl)
        assert scorer(spec._replace(backend="triton"), Inputs(HIDDEN, WEIGHT, None, TOKENS, HIDDEN, WEIGHT)) is None
    assert scorer(NLL._replace(backend="triton"), half._replace(hidden=HIDDEN[:, :0].half())) is None
    logits = half._replace(teacher_hidden=None, teacher_weight=None, teacher_logits=torch.zeros(3, 7))
    for spec, inputs in ((kl._replace(variant="jsd"), half), (kl._replace(extras=True), half), (kl, logits)):
        assert scorer(spec, inputs) is None


def test_triton_is_refused_on_a_cpu() -> None:
    with pytest.raises(ValueError, match='need a CUDA or HIP device and the chunk is on cpu: pass backend="torch"'):
        linear_logprobs(HIDDEN, WEIGHT, TOKENS, backend="triton")


def test_triton_that_cannot_be_imported_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastkl.kernels.rows.triton", None)
    with pytest.raises(RuntimeError, match=r'backend is "triton", which needs triton >= 3.6.*backend="torch"'):
        row_function(NLL._replace(backend="triton"), HIDDEN)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend is 'cuda'; use one of auto, triton, torch"):
        linear_logprobs(HIDDEN, WEIGHT, TOKENS, backend="cuda")  # type: ignore[arg-type]
