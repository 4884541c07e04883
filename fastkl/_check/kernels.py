"""One variant of each kernel and dtype, against `fastkl.reference` in float64: what a backend makes of given logits.

`run` only launches, so that it can be compiled in advance; `measure` compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkl import reference
from fastkl._check.errors import GRADIENTS, ROUNDING, SCORES, VALUES, Check, Measured, of_entries, of_rows, of_values
from fastkl._check.problem import NAMES, Problem, copied
from fastkl.kernels import backend
from fastkl.kernels.divergence.formula import DIVERGENCES, Divergence
from fastkl.kernels.gemm import gradient_dtype, row_length
from fastkl.kernels.options import CrossEntropy, Sparse
from fastkl.kernels.problem import Backend, HeadOptions, Inputs, Kind, RowLoss, Spec
from fastkl.kernels.rows.interface import Logits
from fastkl.kernels.sparse.estimator import ColumnSample, centre
from fastkl.kernels.sparse.probabilities import row_weights, solve

PARAMETERS = {"jsd": 0.4, "skewed_forward_kl": 0.2, "skewed_reverse_kl": 0.2, "density_power": 0.5}
TOP_K_VARIANT = "reverse-bucket"
MIXTURE = (1.0, -0.3, 0.1)  # of −log p[y], entropy and lse, whose gradient is checked
TERMS = CrossEntropy(label_smoothing=0.1, z_loss=0.01)
WITH_BIAS = torch.float16  # the dtype in which logits have a bias, for row functions to add where they do
SAMPLED_ERROR = 0.3  # of the sparse backward: most columns are left out
DEVIATIONS = 6.0  # standard ones, that the number of columns may be away from the one expected
START = 2.0**-8  # what the weight's gradient holds before it is added to
TIED = 1e-4  # nats: where |log p − log q| is less, float32 may have the other sign


class Setting(NamedTuple):
    """What is tested, in one dtype."""

    problem: Problem  # on the device
    chunk: Tensor  # [N, V] float32, the student's logits, on the CPU, without a bias
    teacher_chunk: Tensor  # [N, V]
    biases: Tensor | None  # [2, V] float32, of both, on the CPU
    backend: Backend

    @property
    def inputs(self) -> Inputs:
        p = self.problem
        return Inputs(p.hidden, p.weight, None, p.tokens, p.teacher_hidden, p.teacher_weight)

    @property
    def tokens(self) -> Tensor:
        return self.problem.tokens.cpu()

    def spec(self, kind: Kind, variant: str = "", sparse: Sparse | None = None) -> Spec:
        """Of `kind`, on logits as they are."""
        teacher = HeadOptions() if kind == "divergence" else None
        return Spec(
            kind,
            HeadOptions(),
            teacher,
            self.backend,
            variant=variant,
            parameter=PARAMETERS.get(variant, 0.0),
            sparse=sparse,
        )

    def logits(self) -> Logits:
        """A copy, which a row function may overwrite."""
        p, device = self.problem, self.problem.hidden.device
        apart = self.biases is not None and backend.adds_bias(self.spec("token_nll"), p.hidden)
        chunks = (self.chunk, self.teacher_chunk) if apart else self.whole()
        student, teacher = (copied(chunk, device) for chunk in chunks)
        logits = Logits(student, None, teacher, None, top_ids=p.top_ids, top_logprobs=p.top_logprobs)
        if self.biases is None or not apart:
            return logits
        bias, teacher_bias = (copied(bias, device) for bias in self.biases)
        return logits._replace(student_bias=bias, teacher_bias=teacher_bias)

    def whole(self) -> tuple[Tensor, Tensor]:
        """The logits of student and teacher, with their biases."""
        if self.biases is None:
            return self.chunk, self.teacher_chunk
        return self.chunk + self.biases[0], self.teacher_chunk + self.biases[1]

    def place(self, logits: Logits) -> Tensor:
        """Where the driver would have the gradient written."""
        dtype = gradient_dtype(self.problem.hidden)
        return logits.student if dtype == logits.student.dtype else torch.empty_like(logits.student, dtype=dtype)

    def values(self, count: int) -> Tensor:
        return torch.empty(count, self.chunk.shape[0], device=self.problem.hidden.device)

    def exact(self) -> tuple[Tensor, Tensor]:
        """Logits of student and teacher in float64, of which the first is a leaf."""
        student, teacher = self.whole()
        return student.double().requires_grad_(), teacher.double()


def checks(problem: Problem, dtype: torch.dtype, device: str, backend: Backend) -> Iterator[Check]:
    """All that the backend has for a dtype."""
    rounded = problem.to(dtype, "cpu")
    chunk = rounded.hidden.float() @ rounded.weight.float().t()
    teacher_chunk = rounded.teacher_hidden.float() @ rounded.teacher_weight.float().t()
    biases = rounded.biases if dtype == WITH_BIAS else None
    setting = Setting(rounded.to(dtype, device), chunk, teacher_chunk, biases, backend)
    for check in (
        _token_nll,
        _entropy,
        _cross_entropy,
        _top_k,
        *map(_divergence, DIVERGENCES),
        _score,
        _reverse_kl_score,
        _epilogue,
        _sparse,
    ):
        if (found := check(setting)) is not None:
            kernels, run, measure = found
            yield Check(kernels, NAMES[dtype], run, measure)


_Parts = tuple[tuple[str, ...], Callable[[], Any], Callable[[Any], list[Measured]]]


def _rounded(dtype: torch.dtype) -> float:
    """The bound of gradients that were made in float32 and rounded to a dtype."""
    return GRADIENTS + ROUNDING[dtype]


def _compared(kernel: str, value: Tensor, exact: Tensor) -> Measured:
    return Measured(kernel, "values", of_values(value, exact), VALUES)


def _gradient(kernel: str, found: Tensor, exact: Tensor, *logits: Tensor, factor: Tensor | None = None) -> Measured:
    """Of a gradient by logits, whose rows `factor` multiplies; in an entry the probabilities of all `logits` may cancel."""
    scale = sum(z.detach().softmax(-1) for z in logits)
    whole = found if factor is None else found.double() * factor[:, None].double()
    return Measured(kernel, "gradient", of_entries(whole, exact, scale, found.dtype), _rounded(found.dtype))


def _autograd(value: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(value.sum(), leaf)[0]


class _Rows(NamedTuple):
    """What a row function gives."""

    out: Tensor  # [K, N]
    gradient: Tensor  # [N, V]
    factor: Tensor | None  # [N], of the gradient's rows


def _rows(s: Setting, spec: Spec, outputs: int) -> _Rows:
    logits, out = s.logits(), s.values(outputs)
    gradient = s.place(logits)
    factor = backend.row_function(spec, s.problem.hidden)(logits, s.problem.tokens, out, gradient)
    return _Rows(out, gradient, factor)


def _token_nll(s: Setting) -> _Parts:
    """With the rows of zero advantage cleared, as the driver does."""
    spec = s.spec("token_nll")
    slope = s.problem.advantages

    def run() -> tuple[_Rows, Tensor]:
        rows = _rows(s, spec, 1)
        cleared = rows.gradient.clone()
        backend.clear_rows(spec, s.problem.hidden)(cleared, slope)
        return rows, cleared

    def measure(found: tuple[_Rows, Tensor]) -> list[Measured]:
        (out, gradient, factor), cleared = found
        z, _ = s.exact()
        value = -reference.logprobs(z, s.tokens)
        expected = torch.where(slope.cpu()[:, None] == 0, 0.0, gradient.cpu())
        return [
            _compared("rows.token_nll", out[0], value.detach()),
            _gradient("rows.token_nll", gradient, _autograd(value, z), z, factor=factor),
            Measured("rows.clear_rows", "gradient", of_values(cleared, expected), 0.0),
        ]

    return ("rows.token_nll", "rows.clear_rows"), run, measure


def _cross_entropy(s: Setting) -> _Parts:
    """Smoothed and regularised."""
    spec = s.spec("cross_entropy")._replace(cross_entropy=TERMS)

    def measure(found: _Rows) -> list[Measured]:
        (out, gradient, factor), (z, _) = found, s.exact()
        value = reference.cross_entropy(z, s.tokens, TERMS.label_smoothing, TERMS.z_loss)
        nll = -reference.logprobs(z, s.tokens)
        exact = torch.stack([value, nll, z.logsumexp(-1)]).detach()
        return [
            _compared("cross_entropy.cross_entropy", out[:3], exact),
            _gradient("cross_entropy.cross_entropy", gradient, _autograd(value, z), z, factor=factor),
        ]

    return ("cross_entropy.cross_entropy",), lambda: _rows(s, spec, spec.outputs), measure


def _entropy(s: Setting) -> _Parts:
    """−log p[y], the entropy and lse, and the gradient of a mixture of the three."""
    spec = s.spec("token_nll_entropy")

    def run() -> tuple[Tensor, Tensor]:
        logits, out = s.logits(), s.values(spec.outputs)
        weights = out.new_tensor(MIXTURE)[:, None].expand(-1, out.shape[1]).contiguous()
        gradient = s.place(logits)
        backend.row_function(spec, s.problem.hidden)(logits, s.problem.tokens, out, None)
        backend.entropy_gradient(spec, s.problem.hidden)(logits, s.problem.tokens, out, weights, gradient)
        return out, gradient

    def measure(found: tuple[Tensor, Tensor]) -> list[Measured]:
        out, gradient = found
        z, _ = s.exact()
        values = torch.stack([-reference.logprobs(z, s.tokens), reference.entropy(z), z.logsumexp(-1)])
        exact = _autograd(values.new_tensor(MIXTURE) @ values, z)
        lse = out[2] + out[3]
        return [
            _compared("rows.token_nll_entropy", torch.cat([out[:2], lse[None]]), values.detach()),
            _gradient("rows.entropy_gradient", gradient, exact, z),
        ]

    return ("rows.token_nll_entropy", "rows.entropy_gradient"), run, measure


def _top_k(s: Setting) -> _Parts:
    def measure(found: _Rows) -> list[Measured]:
        (out, gradient, factor), (z, _) = found, s.exact()
        value = reference.top_k_kl(z, s.problem.top_ids.cpu(), s.problem.top_logprobs.cpu().double())
        return [
            _compared("top_k.tail_sums", out[0], value.detach()),
            _gradient("top_k.tail_gradient", gradient, _autograd(value, z), z, factor=factor),
        ]

    spec = s.spec("top_k", TOP_K_VARIANT)
    return ("top_k.tail_sums", "top_k.tail_gradient"), lambda: _rows(s, spec, 2), measure


def _divergence(name: Divergence) -> Callable[[Setting], _Parts]:
    kernel = f"divergence.{name}"

    def parts(s: Setting) -> _Parts:
        spec = s.spec("divergence", name)

        def measure(found: _Rows) -> list[Measured]:
            (out, gradient, factor), (z, z_teacher) = found, s.exact()
            options = (PARAMETERS[name],) if name in PARAMETERS else ()
            value = getattr(reference, name)(z, z_teacher, *options)
            exact, nll = _autograd(value, z), -reference.logprobs(z, s.tokens)
            if name == "total_variation":  # its gradient jumps where p = q
                tied = (z.log_softmax(-1) - z_teacher.log_softmax(-1)).abs() < TIED
                gradient, exact = gradient.cpu().masked_fill(tied, 0.0), exact.masked_fill(tied, 0.0)
            return [
                _compared(kernel, out[:2], torch.stack([value, nll]).detach()),
                _gradient(kernel, gradient, exact, z, z_teacher, factor=factor),
            ]

        return (kernel,), lambda: _rows(s, spec, spec.outputs), measure

    return parts


def _score(s: Setting) -> _Parts | None:
    """Log-probs, with the entropy and without, from hidden states."""
    plain, full = s.spec("token_nll"), s.spec("token_nll_entropy")
    scorers = backend.scorer(plain, s.inputs), backend.scorer(full, s.inputs)
    if None in scorers:
        return None

    def run() -> tuple[Tensor, Tensor]:
        outs = s.values(plain.outputs), s.values(full.outputs)
        for scorer, out in zip(scorers, outs, strict=True):
            assert scorer is not None
            scorer(out)
        return outs

    def measure(found: tuple[Tensor, Tensor]) -> list[Measured]:
        nll, both = found
        z = _logits(s.problem.hidden, s.problem.weight)
        exact = torch.stack([-reference.logprobs(z, s.tokens), reference.entropy(z)])
        error = max(of_values(nll[0], exact[0]), of_values(both[:2], exact))
        return [Measured("score.token_nll", "values", error, SCORES)]

    return ("score.token_nll",), run, measure


def _epilogue(s: Setting) -> _Parts | None:
    """Values and gradient without logits, from the sampler's log-probs; only the Triton kernels have it, for 16 bits."""
    if s.backend != "triton" or s.problem.hidden.element_size() != 2:
        return None
    spec = s.spec("token_nll")._replace(backend="epilogue")
    token_nll = backend.epilogue(spec, s.inputs)
    assert token_nll is not None

    def run() -> _Rows:
        n, vocabulary = s.chunk.shape
        out, wide = s.values(1), row_length(vocabulary, torch.device("cuda"))  # under an interpreter too
        gradient = s.problem.hidden.new_empty(n, wide)[:, :vocabulary]
        return _Rows(out, gradient, token_nll(slice(0, n), s.problem.old_logprobs, out, gradient))

    def measure(found: _Rows) -> list[Measured]:
        out, gradient, factor = found
        z = _logits(s.problem.hidden, s.problem.weight).requires_grad_()
        value, kernel = -reference.logprobs(z, s.tokens), "epilogue.token_nll"
        return [
            Measured(kernel, "values", of_values(out[0], value.detach()), SCORES),
            _gradient(kernel, gradient, _autograd(value, z), z, factor=factor),
        ]

    return ("epilogue.token_nll",), run, measure


def _reverse_kl_score(s: Setting) -> _Parts | None:
    spec = s.spec("divergence", "reverse_kl")
    scorer = backend.scorer(spec, s.inputs)
    if scorer is None:
        return None

    def run() -> Tensor:
        out = s.values(spec.outputs)
        scorer(out)
        return out

    def measure(out: Tensor) -> list[Measured]:
        p = s.problem
        z, z_teacher = _logits(p.hidden, p.weight), _logits(p.teacher_hidden, p.teacher_weight)
        exact = torch.stack([reference.reverse_kl(z, z_teacher), -reference.logprobs(z, s.tokens)])
        return [Measured("score.reverse_kl", "values", of_values(out[:2], exact), SCORES)]

    return ("score.reverse_kl",), run, measure


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return reference.logits(hidden.cpu().double(), weight.cpu().double())


def _sparse(s: Setting) -> _Parts:
    """The sample of columns, and the products that are made from it."""
    sparse = Sparse(seed=1, error=SAMPLED_ERROR)
    spec, p = s.spec("token_nll", sparse=sparse), s.problem
    u, _ = s.exact()
    u = _autograd(-reference.logprobs(u, s.tokens), u).to(gradient_dtype(p.hidden))
    slope = p.advantages

    def run() -> tuple[ColumnSample, Tensor, Tensor]:
        sampler = backend.column_sampler(spec, s.inputs, RowLoss())
        assert sampler is not None
        sample = sampler.sample(copied(u, p.hidden.device), slope, [p.tokens])
        hidden_gradient = sample.hidden_gradient()
        accumulator = torch.full_like(p.weight, START, dtype=torch.float32)
        sample.add_to_weight_gradient(accumulator, p.hidden)
        return sample, hidden_gradient, accumulator

    def measure(found: tuple[ColumnSample, Tensor, Tensor]) -> list[Measured]:
        sample, hidden_gradient, accumulator = found
        estimate = sample.estimate(slice(0, u.shape[0]))
        if estimate is None:
            return [Measured("sparse.sample", "columns", torch.inf, 0.0, "all columns were kept")]
        ids, kept, weights = estimate.ids.cpu(), estimate.gradient.cpu(), slope.double().cpu()
        squares = u.double().square().t() @ row_weights(weights.clone())
        w, tau, *_ = solve(sparse, squares, [s.tokens])
        chances = (w / tau).clamp(max=1.0)
        expected, deviation = chances.sum().item(), (chances * (1 - chances)).sum().sqrt().item()
        exact = kept.double()
        centred = exact @ p.weight.cpu()[ids].double() - torch.outer(exact.sum(1), centre(p.weight.cpu().double()))
        rows = torch.zeros(p.weight.shape, dtype=torch.float64)
        rows[ids] = exact.t() @ (weights[:, None] * p.hidden.cpu().double())
        bound = _rounded(p.hidden.dtype)
        return [
            Measured("sparse.sample", "columns", abs(len(ids) / expected - 1), DEVIATIONS * deviation / expected),
            _gradient("sparse.sample", kept, u[:, ids].double() / chances[ids]),
            Measured("sparse.hidden_gradient", "gradient", of_rows(hidden_gradient, weights[:, None] * centred), bound),
            Measured("sparse.weight_gradient", "gradient", of_rows(accumulator.double() - START, rows), bound),
        ]

    return ("sparse.sample", "sparse.hidden_gradient", "sparse.weight_gradient"), run, measure
