"""Which row functions run: the documented rule, and no silent fallback."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from torch import Tensor

from fastkl.kernels.backend import BACKENDS, adds_bias, planned, row_function, scorer
from fastkl.kernels.divergence import pytorch as divergence_pytorch
from fastkl.kernels.epilogue import rule
from fastkl.kernels.options import CrossEntropy, Sparse, Surrogate
from fastkl.kernels.problem import HeadOptions, Inputs, RowLoss, Spec
from fastkl.kernels.rows import pytorch as rows_pytorch
from fastkl.kernels.rows.parallel.share import Share
from fastkl.kernels.top_k.formula import top_k
from fastkl.loss import linear_logprobs

HIDDEN, WEIGHT, TOKENS = torch.randn(3, 4), torch.randn(7, 4), torch.tensor([1, 6, 0])


NLL = Spec("token_nll", HeadOptions())


def test_auto_is_pytorch_on_a_cpu() -> None:
    for backend in set(BACKENDS) - {"triton", "epilogue"}:
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


class Device(Tensor):
    """Says that it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("spec", "triton"),
    [
        (NLL, True),
        (NLL._replace(kind="token_nll_entropy"), True),
        (NLL._replace(kind="top_k", variant="reverse-bucket"), True),
        (NLL._replace(kind="cross_entropy", cross_entropy=CrossEntropy(z_loss=0.1)), True),
        (NLL._replace(kind="cross_entropy", cross_entropy=CrossEntropy(label_smoothing=0.1)), False),
        (NLL._replace(kind="cross_entropy", cross_entropy=CrossEntropy(), extras=True), False),
        (NLL._replace(kind="divergence", teacher=HeadOptions(), variant="jsd", parameter=0.5), False),
    ],
)
def test_what_triton_has_of_a_vocabulary_in_pieces(spec: Spec, triton: bool) -> None:
    """Of a whole one all on a GPU. The head's bias goes with the row function."""
    hidden, share = HIDDEN.as_subclass(Device), Share("group", 0, 14, 7)
    assert adds_bias(spec, hidden)
    assert adds_bias(spec._replace(share=share), hidden) == triton
    found = row_function(spec._replace(share=share), hidden)
    function = found.func if isinstance(found, partial) else found
    assert function is top_k or function.__module__.endswith(".triton") == triton


def test_the_epilogue_is_off_until_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for, it is what it can be. By itself it is chosen where the table says so."""
    row_loss = RowLoss(None, torch.ones(3), torch.zeros(3), Surrogate())
    half = Inputs(HIDDEN.half().as_subclass(Device), WEIGHT.half(), None, TOKENS)
    asked = NLL._replace(backend="epilogue")
    assert rule.MEASURED == ()
    assert planned(NLL, half, row_loss).backend == "auto"
    assert planned(asked, half, row_loss).backend == "epilogue"
    impossible = [
        (asked._replace(kind="token_nll_entropy"), half, row_loss),
        (asked._replace(sparse=Sparse(0)), half, row_loss),
        (asked, half, row_loss._replace(old_logprobs=None)),
        (asked, half._replace(hidden=HIDDEN), row_loss),
    ]
    assert [planned(*one).backend for one in impossible] == ["triton"] * len(impossible)

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a chip")
    entry = rule.Entry("a chip", torch.float16, range(1, 5), range(1, 8))
    monkeypatch.setattr(rule, "MEASURED", (entry,))
    assert planned(NLL, half, row_loss).backend == "epilogue"
    assert planned(NLL._replace(backend="triton"), half, row_loss).backend == "triton"
    assert [planned(one[0]._replace(backend="auto"), *one[1:]).backend for one in impossible] == ["auto"] * len(
        impossible
    )
    for other in (entry._replace(chip="another"), entry._replace(vocabularies=range(1, 7))):
        monkeypatch.setattr(rule, "MEASURED", (other,))
        assert planned(NLL, half, row_loss).backend == "auto"


def test_triton_is_refused_on_a_cpu() -> None:
    with pytest.raises(ValueError, match='need a CUDA or HIP device and the chunk is on cpu: pass backend="torch"'):
        linear_logprobs(HIDDEN, WEIGHT, TOKENS, backend="triton")


def test_triton_that_cannot_be_imported_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastkl.kernels.rows.triton", None)
    with pytest.raises(RuntimeError, match=r'backend is "triton", which needs triton >= 3.6.*backend="torch"'):
        row_function(NLL._replace(backend="triton"), HIDDEN)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend is 'cuda'; use one of auto, triton, torch, epilogue"):
        linear_logprobs(HIDDEN, WEIGHT, TOKENS, backend="cuda")  # type: ignore[arg-type]
