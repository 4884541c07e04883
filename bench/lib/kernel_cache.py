"""A folder of Triton kernels compiled for a chip that need not be there, to be used on a machine that has it.

Triton looks kernels up by a key of its own sources and binaries, the kernel's source, the options and the chip: no device
takes part in it. What was compiled elsewhere is found where all of these are equal, and compiled again where not. The
folder may be moved. The C code that launches kernels is not in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from triton.runtime.cache import triton_key

from bench.variants.aot import ChipDriver
from bench.variants.fake_cuda import fake_tensors
from fastkl._check import kernels
from fastkl._check.compiling import compile_launches
from fastkl._check.json_file import write_json
from fastkl._check.problem import NAMES, SIZES, Problem, make_problem
from fastkl.kernels import driver, launch
from fastkl.kernels.divergence.formula import DIVERGENCES
from fastkl.kernels.options import CrossEntropy
from fastkl.kernels.problem import HeadOptions, Inputs, Needs, RowLoss, Spec

RECORD = "kernels.json"
PROCESSORS = 132  # any number: no kernel depends on it


def make(folder: Path, chip: str) -> int:
    """Compiles into a new folder what `fastkl.check` and the losses ask for; returns the number of kernels."""
    with _cached_in(folder), fake_tensors(), _in_place_of(chip):
        count = compile_launches(launches())
    write_json(folder / RECORD, {**_circumstances(), "chip": chip, "kernels": count})
    return count


def install(folder: Path, place: Path) -> str:
    """Copies the kernels to where TRITON_CACHE_DIR will be, and says in a line what they are worth there."""
    record = folder / RECORD
    if not record.is_file():
        return f"{folder} holds no kernels: {RECORD} is missing; make it with `python -m bench gpu --make-cache`"
    made = json.loads(record.read_text())
    shutil.copytree(folder, place, dirs_exist_ok=True)
    for group in place.glob("*/__grp__*"):  # they name their files by absolute paths
        names = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {name: str(group.parent / name) for name in names}}))
    here = _circumstances() | {"chip": chip_here()}
    stale = [f"{name} {made[name]} there, {here[name]} here" for name in here if made[name] != here[name]]
    count = f"{made['kernels']} kernels for {made['chip']} from {folder}"
    return f"{count}: stale, to be compiled again ({'; '.join(stale)})" if stale else f"{count}: as compiled here"


def chip_here() -> str | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    if torch.version.hip is not None:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def launches() -> Iterator[Callable[[], object]]:
    """All that the checks and the losses launch, in each dtype, on the current device."""
    problem = make_problem(SIZES["cuda"])
    for dtype in NAMES:
        for check in kernels.checks(problem, dtype, "cuda", "triton"):
            yield check.run
        yield from _losses(problem.to(dtype, "cuda"))


def _losses(p: Problem) -> Iterator[Callable[[], object]]:
    """Values and gradients of every kind, for a divergence with tokens and without."""
    head = HeadOptions()
    plain = Inputs(p.hidden, p.weight, tokens=p.tokens)
    taught = plain._replace(teacher_hidden=p.teacher_hidden, teacher_weight=p.teacher_weight)
    of_list = plain._replace(top_ids=p.top_ids, top_logprobs=p.top_logprobs)
    problems = [(Spec(kind, head), plain) for kind in ("token_nll", "token_nll_entropy")]
    problems += [(Spec("cross_entropy", head, cross_entropy=CrossEntropy()), plain)]
    problems += [(Spec("top_k", head, variant="reverse-bucket"), of_list)]
    for name in DIVERGENCES:
        spec = Spec("divergence", head, head, variant=name, parameter=0.5)
        problems += [(spec, taught), (spec, taught._replace(tokens=None))]
    for spec, inputs in problems:
        yield partial(driver.evaluate, spec, inputs)
        yield partial(driver.evaluate_with_gradients, spec, inputs, RowLoss(), Needs(True, True, False))


@contextmanager
def _cached_in(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    own = {"TRITON_CACHE_DIR": str(folder.absolute()), "TRITON_STORE_BINARY_ONLY": "1"}
    with mock.patch.dict(os.environ, own):
        yield


@contextmanager
def _in_place_of(chip: str) -> Iterator[None]:
    """Triton compiles for the chip; torch has devices that do nothing."""
    properties = SimpleNamespace(multi_processor_count=PROCESSORS)
    with (
        mock.patch.object(triton.runtime.driver, "_active", ChipDriver(chip)),
        mock.patch.object(torch.cuda, "device", return_value=nullcontext()),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
    ):
        yield


def _circumstances() -> dict[str, str]:
    """What a kernel's key depends on, beside the chip."""
    room = Path(launch.__file__).parent
    sources = "".join(file.read_text(encoding="utf-8") for file in sorted(room.rglob("*.py")))
    return {
        "triton": triton.__version__,
        "build": _digest(triton_key()),
        "sources": _digest(sources),
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
