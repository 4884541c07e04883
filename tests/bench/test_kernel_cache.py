"""Kernels that were compiled without a device are those that Triton's own driver for CUDA looks for in front of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import triton
from fake_cuda import Machine
from stub_cuda import StubCuda, compiler, load_stub, use_driver

from bench.lib import kernel_cache
from bench.variants.fake_cuda import fake_tensors

ARCHS = (90,)


def few() -> Iterator[Callable[[], object]]:
    """Kernels of rows, and scoring, with tensor descriptors."""
    problem = kernel_cache.make_problem(kernel_cache.SIZES["cuda"])
    for check in kernel_cache.kernels.checks(problem, torch.bfloat16, "cuda", "triton"):
        if check.kernels[0] in ("rows.token_nll", "score.token_nll"):
            yield check.run


def main(name: str, folder: str) -> None:
    """In a process of its own: compiles without a device, moves the folder, launches in front of the stub."""
    made, moved, place = (Path(folder, part) for part in ("made", "moved", "place"))
    found: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        if name == "few":
            patch.setattr(kernel_cache, "launches", few)
        count = kernel_cache.make(made, "sm_90")
        made.rename(moved)
        patch.setattr(kernel_cache, "chip_here", lambda: "sm_90")
        line = kernel_cache.install(moved, place)
        patch.setenv("TRITON_CACHE_DIR", str(place))
        patch.setenv("TRITON_LIBCUDA_PATH", folder)
        library, stub = load_stub(Path(folder)), StubCuda(ARCHS)
        library.listen(stub.listener)
        Machine(patch, *ARCHS)
        use_driver(patch, ARCHS, lambda: 0, 1)
        stub.context = 1
        triton.knobs.compilation.listener = lambda cache_hit, **_: found.update([str(cache_hit)])
        with fake_tensors():
            for call in kernel_cache.launches():
                call()
    assert not stub.errors
    print(json.dumps({"count": count, "line": line, "launches": len(stub.launches), **found}))


@pytest.mark.skipif(compiler() is None, reason="no C compiler, or no Python.h, with which Triton builds its launcher")
@pytest.mark.skipif(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7), reason="the stub is for Triton's 3.7")
@pytest.mark.parametrize("name", ["few", pytest.param("all", marks=pytest.mark.slow)])
def test_nothing_is_compiled_again(name: str, tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", "import sys, test_kernel_cache as t; t.main(*sys.argv[1:])", name, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.get("False", 0) == 0, found
    assert found["True"] == found["count"] >= (3 if name == "few" else 80)
    assert found["launches"] >= found["count"]
    assert found["line"] == f"{found['count']} kernels for sm_90 from {tmp_path / 'moved'}: as compiled here"


def folder_of(tmp_path: Path, **other: str) -> Path:
    """As made elsewhere, with one kernel; `other` differs from here."""
    made = tmp_path / "made"
    kernel = made / "KEY"
    kernel.mkdir(parents=True)
    (kernel / "one.cubin").write_bytes(b"binary")
    (kernel / "__grp__one.json").write_text(json.dumps({"child_paths": {"one.cubin": "/elsewhere/KEY/one.cubin"}}))
    record = {**kernel_cache._circumstances(), "chip": "sm_90", "kernels": 1, **other}
    (made / kernel_cache.RECORD).write_text(json.dumps(record))
    return made


def test_the_files_are_named_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cache, "chip_here", lambda: "sm_90")
    made, place = folder_of(tmp_path), tmp_path / "place"
    assert kernel_cache.install(made, place) == f"1 kernels for sm_90 from {made}: as compiled here"
    group = json.loads((place / "KEY" / "__grp__one.json").read_text())
    assert group["child_paths"] == {"one.cubin": str(place / "KEY" / "one.cubin")}
    assert "/elsewhere/" in (made / "KEY" / "__grp__one.json").read_text()  # untouched


@pytest.mark.parametrize("what", ["triton", "build", "sources", "chip"])
def test_stale_kernels_are_said_to_be(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cache, "chip_here", lambda: "sm_90")
    line = kernel_cache.install(folder_of(tmp_path, **{what: "another"}), tmp_path / "place")
    assert f": stale, to be compiled again ({what} another there, " in line
    assert line.count(" there, ") == 1
