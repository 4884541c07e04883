"""The implementations that the benches compare: what each one says, what it does where it runs, how one is added."""

import importlib.util
import sys
import textwrap
from importlib.machinery import ModuleSpec

import pytest
import torch
from bench_cases import bench_loss, case_of

from bench import peers
from bench.lib import measure
from bench.lib.cases import HEADS, OF_LOGPROBS, OPS
from bench.peers import Unsupported, eager
from bench.peers.packages import liger, quack, unsloth

GPU_ONLY = ("cce", "cce_exact", "quack", "quack_full", "liger_triton", "trl_logits")


@pytest.fixture
def add_peer(tmp_path, monkeypatch):
    """Adds an implementation the way anybody does: as a file."""
    folder = tmp_path / "more_peers"
    folder.mkdir()
    monkeypatch.setattr(peers, "__path__", [*peers.__path__, str(folder)])
    before = set(sys.modules)

    def add(name: str, code: str) -> None:
        header = "import dataclasses, torch\nfrom bench.peers import Peer, eager\n"
        (folder / f"{name}.py").write_text(header + textwrap.dedent(code))

    yield add
    for module in set(sys.modules) - before:
        if module.startswith("bench.peers."):
            del sys.modules[module]


class TestAddedPeer:
    def test_is_measured_and_says_what_it_does(self, tmp_path, capsys, add_peer):
        add_peer(
            "rounded",
            """
            def build(case):
                return lambda: eager.loss(case) * 1.5

            PEER = Peer(build, backward="rounded up", notes={"logprobs": "half as much again"}, packages=("torch", "nope"))
            """,
        )
        report = bench_loss(tmp_path, "--op", "logprobs", "--impl", "rounded")
        (row,) = report["rows"]
        assert row["grad_error"] == pytest.approx(0.5, abs=1e-3)
        assert (row["backward"], row["note"]) == ("rounded up", "half as much again")
        assert report["versions"]["nope"] is None
        printed = capsys.readouterr().out
        assert "rounded: backward rounded up\nrounded: half as much again\n" in printed

    def test_of_another_problem_is_compared_with_that_problem(self, tmp_path, add_peer):
        add_peer(
            "unweighted",
            """
            def build(case):
                assert case.advantages.eq(1).all()
                return lambda: eager.loss(case)

            PEER = Peer(build, solves=lambda case: dataclasses.replace(case, advantages=torch.ones_like(case.advantages)))
            """,
        )
        report = bench_loss(tmp_path, "--op", "logprobs", "--head", "trainable", "--impl", "unweighted,eager")
        assert [row["impl"] for row in report["rows"]] == ["unweighted", "eager"]
        assert all(row["grad_error"] < 1e-4 for row in report["rows"])

    @pytest.mark.parametrize(
        ("code", "reason"),
        [
            ("PEER = Peer(eager.build, ops=('logprobs',))", "the op is policy_gradient; it can do logprobs"),
            ("PEER = Peer(eager.build, devices=('cuda',))", "the device is cpu; it can do cuda"),
            (
                "PEER = Peer(eager.build, dtypes=(torch.bfloat16,))",
                "the dtype is torch.float32; it can do torch.bfloat16",
            ),
            (
                "def build(case): import no_such_package\nPEER = Peer(build)",
                "cannot be imported: No module named 'no_such",
            ),
            (
                "PEER = Peer(lambda case: case.no_such, packages=('nope',))",
                "fails: AttributeError: 'Case' object has no",
            ),
        ],
    )
    def test_is_skipped_with_its_reason(self, tmp_path, capsys, add_peer, code, reason):
        add_peer("stranger", code)
        report = bench_loss(tmp_path, "--impl", "stranger,eager")
        assert [row["impl"] for row in report["rows"]] == ["eager"]
        (skipped,) = report["skipped"]
        assert (skipped["impl"], skipped["shape"]) == ("stranger", [12, 8, 70])
        assert skipped["reason"].startswith(reason)
        assert f"stranger          skipped: {reason}" in capsys.readouterr().out

    def test_own_errors_are_errors(self, tmp_path, add_peer):
        add_peer("ours", "PEER = Peer(lambda case: case.no_such)")
        with pytest.raises(AttributeError, match="no_such"):
            bench_loss(tmp_path, "--impl", "ours")

    def test_out_of_memory_is_a_reason(self, tmp_path, add_peer):
        add_peer("hungry", "def build(case): raise torch.OutOfMemoryError\nPEER = Peer(build)")
        report = bench_loss(tmp_path, "--impl", "hungry")
        assert report["rows"] == []
        assert report["skipped"][0]["reason"] == "out of memory"


def test_all_declare_what_they_can_do():
    for name in peers.names():
        peer = peers.load(name)
        assert set(peer.ops) <= set(OPS), name
        assert set(peer.notes) <= set(peer.ops), name
        assert set(peer.devices) <= {"cpu", "cuda"}, name


@pytest.mark.parametrize("name", GPU_ONLY)
def test_needs_a_gpu(name):
    with pytest.raises(Unsupported, match=r"can do cuda|need a GPU"):
        peers.build(name, case_of("logprobs", dtype=torch.bfloat16))


def test_the_epilogue_needs_a_gpu():
    with pytest.raises(Unsupported, match="the device is cpu; it can do cuda"):
        peers.build("fastkl_epilogue", case_of(dtype=torch.bfloat16))


def test_quack_wants_aligned_shapes():
    with pytest.raises(Unsupported, match="N,D,V = 40,16,300; it needs multiples of 8"):
        quack.check_alignment(case_of())
    quack.check_alignment(case_of(shape=(40, 16, 304)))


def test_missing_compiler_is_skipped(monkeypatch):
    def no_compiler(function):
        raise RuntimeError("\nno C++ compiler found\nmore")

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(Unsupported, match=r"does not work here: no C\+\+ compiler found$"):
        peers.build("compile", case_of())


@pytest.mark.parametrize("op", OF_LOGPROBS)
def test_agree(op):
    case = case_of(op)
    names = ["fastkl", "fastkl_composed", "eager"]
    names += ["torch_lce", "torch_lce_chunked"] if hasattr(torch.nn, "LinearCrossEntropyOptions") else []
    exact, value = measure.reference_gradients(case), eager.loss(case).item()
    for name in names:
        loss = peers.build(name, case)
        assert measure.gradient_error(case, loss, exact) < 1e-4, name
        assert loss().item() == pytest.approx(value, rel=1e-4), name


class TestLiger:
    @pytest.mark.parametrize("head", HEADS)
    @pytest.mark.parametrize("op", [*liger.GRPO, "jsd", "reverse_kl"])
    def test_equals_eager_on_a_cpu(self, op, head):
        case = case_of(op, head)
        loss = liger.build(case, compiled=False)
        assert loss().item() == pytest.approx(eager.loss(case).item(), rel=1e-5)
        assert measure.gradient_error(case, loss, measure.reference_gradients(case)) < 1e-5

    @pytest.mark.parametrize("op", peers.load("fastkl_for_liger").ops)
    def test_our_classes_equal_eager(self, op):
        case = case_of(op)
        loss = peers.build("fastkl_for_liger", case)
        assert loss().item() == pytest.approx(eager.loss(case).item(), rel=1e-5)
        assert measure.gradient_error(case, loss, measure.reference_gradients(case)) < 1e-5

    @pytest.mark.parametrize("op", ["grpo", "grpo_kl"])
    def test_ratios_are_clipped(self, op):
        case = case_of(op)
        case.sampler_logprobs.sub_(2.0)  # ratios around 7
        assert liger.build(case, compiled=False)().item() == pytest.approx(eager.loss(case).item(), rel=1e-5)

    def test_ratios_are_not_clipped(self):
        case = case_of()
        case.sampler_logprobs.sub_(2.0)  # ratios around 7
        assert liger.build(case, compiled=False)().item() == pytest.approx(eager.loss(case).item(), rel=1e-5)

    def test_cross_entropy_needs_a_gpu(self):
        with pytest.raises(Unsupported, match="Triton kernels need a GPU"):
            peers.build("liger", case_of("logprobs"))


class TestChunkedInBoth:
    """TRL's kernels and Unsloth's, where they are installed: on a CPU they are PyTorch."""

    def build(self, name, case):
        if importlib.util.find_spec({"trl": "trl", "unsloth": "unsloth_zoo"}[name]) is None:
            pytest.skip(f"the package of {name} is not installed")
        return peers.build(name, case)

    @pytest.mark.parametrize("head", HEADS)
    @pytest.mark.parametrize("op", [op for op in OPS if op != "top_k"])
    @pytest.mark.parametrize("name", ["trl", "unsloth"])
    def test_equals_eager_on_a_cpu(self, name, op, head):
        case = case_of(op, head)
        loss = self.build(name, case)
        assert loss().item() == pytest.approx(eager.loss(case).item(), rel=1e-5, abs=1e-6)
        assert measure.gradient_error(case, loss, measure.reference_gradients(case)) < 1e-5

    @pytest.mark.parametrize("name", ["trl", "unsloth"])
    def test_has_an_equal_for_every_op_but_the_list(self, name):
        assert set(peers.load(name).ops) == set(OPS) - {"top_k"}

    def test_unsloth_changes_nothing_else(self):
        self.build("unsloth", case_of("logprobs"))
        assert "unsloth_zoo" not in sys.modules

    @pytest.mark.parametrize("package", [None, "elsewhere"])
    def test_unsloth_that_is_not_there_or_another_one_is_a_reason(self, package, monkeypatch, tmp_path):
        found = None if package is None else ModuleSpec("unsloth_zoo", None, is_package=True)
        if found is not None:
            found.submodule_search_locations.append(str(tmp_path))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
        unsloth.fused_linear.cache_clear()
        reason = "No module named" if package is None else "has no fused_losses/fused_linear.py"
        with pytest.raises(Unsupported, match=f"cannot be imported: .*{reason}"):
            peers.build("unsloth", case_of("logprobs"))
