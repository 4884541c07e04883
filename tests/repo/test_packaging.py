"""What is built and installed: one top-level package, whole, and a core that needs nothing but PyTorch."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from launches import REPOSITORY, run_python

import fastkl

ROOMS = {"fastkl": "", "kernels": "fastkl/", "trainer": "fastkl/"}  # and where the wheel has them
MODULES = {
    inside + str(file.relative_to(REPOSITORY))
    for room, inside in ROOMS.items()
    for file in (REPOSITORY / room).rglob("*.py")
    if not {"kernels", "trainer"} & {*file.relative_to(REPOSITORY / room).parts[:1]}
    or room != "fastkl"  # not through the symlinks
}
HTML = {
    f"fastkl/trainer/runs/report/html/{file.name}"
    for file in (REPOSITORY / "trainer" / "runs" / "report" / "html").iterdir()
}


def python(*arguments: object, cwd: Path) -> None:
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a clone holds: building writes into the tree."""
    folder = tmp_path_factory.mktemp("source") / "fastkl"
    folder.mkdir()
    for name in ("fastkl", "kernels", "trainer"):
        shutil.copytree(REPOSITORY / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        shutil.copy(REPOSITORY / name, folder)
    return folder


@pytest.fixture(scope="module", params=["from-the-tree", "from-the-sdist"])
def wheel(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    # Without an option, `build` makes the sdist and then the wheel from it; --no-isolation needs no network.
    only_wheel = ["--wheel"] if request.param == "from-the-tree" else []
    python("-m", "build", "--no-isolation", *only_wheel, "--outdir", out, source, cwd=out)
    (built,) = out.glob("*.whl")
    return built


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read(f"fastkl-{fastkl.__version__}.dist-info/METADATA").decode())


def requirements(found: Message, extra: str = "") -> set[str]:
    """The names of the distributions that pip installs, without their versions."""
    lines = [row for row in found.get_all("Requires-Dist", []) if "extra ==" not in row or f'extra == "{extra}"' in row]
    return {re.split(r"[\s<>=;\[]", row)[0].lower() for row in lines}


def test_the_wheel_holds_one_package_and_all_of_it(wheel: Path) -> None:
    """`kernels` is a distribution of Hugging Face's, `trainer` could be anybody's: neither may be a top-level name."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        info = {name.split("/", 1)[1] for name in archive.namelist() if ".dist-info/" in name}
    assert {name.split("/")[0] for name in names} == {"fastkl"}
    assert HTML
    assert names == MODULES | HTML | {"fastkl/py.typed"}
    assert "licenses/LICENSE" in info


def test_metadata(wheel: Path) -> None:
    found = metadata(wheel)
    assert (found["Name"], found["Version"]) == ("fastkl", fastkl.__version__)
    assert requirements(found) == {"torch", "triton", "typing-extensions"}
    assert {"trainer", "docs", "dev"} <= set(found.get_all("Provides-Extra", []))
    links = re.findall(r"\]\(([^)\s]+)\)", found.get_payload())
    assert [link for link in links if not link.startswith("https://")] == []
    assert len(links) > 10
    assert {line.split(", ")[0] for line in found.get_all("Project-URL", [])} >= {"Repository", "Documentation"}


@pytest.mark.slow
def test_what_would_be_uploaded_is_well_formed(source: Path, tmp_path: Path) -> None:
    for name in ("build", "twine"):
        pytest.importorskip(name)
    python("-m", "build", "--no-isolation", "--outdir", tmp_path, source, cwd=tmp_path)
    python("-m", "twine", "check", "--strict", *sorted(tmp_path.iterdir()), cwd=tmp_path)


def test_no_message_installs_fastkl_from_an_index() -> None:
    """It is on none. What extras need is named (`install_command`)."""
    files = [file for room in ("fastkl", "kernels", "trainer") for file in (REPOSITORY / room).rglob("*.py")]
    named = [str(file) for file in files if re.search(r"pip install [^\n]*fastkl", file.read_text(encoding="utf-8"))]
    assert named == []


def test_the_installed_wheel_is_what_is_imported(wheel: Path, tmp_path: Path) -> None:
    """In a process of its own, in another folder, without the trainer's packages: the core needs PyTorch alone."""
    target = tmp_path / "site"
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target", target, wheel)
    python(*install, cwd=tmp_path)
    code = """
import sys
from pathlib import Path
target = Path(sys.argv[1])
sys.path.insert(0, sys.argv[1])
for name in ("transformers", "accelerate", "peft", "safetensors", "rich", "yaml"):
    sys.modules[name] = None  # any import of it fails
import fastkl.head, fastkl.kernels.driver, fastkl.loss, fastkl.reference, fastkl.trainer.config.training
for name, module in list(sys.modules.items()):
    if name.split(".")[0] == "fastkl" and getattr(module, "__file__", None):
        assert target in Path(module.__file__).parents, (name, module.__file__)
import importlib.util
for name in ("kernels", "trainer"):
    assert importlib.util.find_spec(name) is None, name
import fastkl.check
from fastkl._check import problem, times
problem.SIZES["cpu"] = times.SIZES["cpu"] = problem.Sizes(8, 16, 4112)
assert fastkl.check.main(["--device", "cpu"]) == 0
from fastkl.cli import main
assert main(["--help"]) == 2  # the trainer is the one that says what to install
"""
    done = run_python(code, target, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"pip install 'transformers>=[\d.]+' .* 'pyyaml>=\d+'", done.stderr)


def test_importing_the_package_imports_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import fastkl; print(sorted(set(sys.modules) - before))"
    assert run_python(code).stdout.strip() == "['fastkl']"


@pytest.mark.parametrize("room", ROOMS)
def test_imports_are_declared_and_point_one_way(room: str, wheel: Path) -> None:
    """trainer → fastkl → kernels; and every distribution imported at the top of a module is one that pip was told of."""
    names = {name.replace("-", "_") for name in requirements(metadata(wheel), "trainer" if room == "trainer" else "")}
    names |= {"yaml"} if "pyyaml" in names else set()
    forbidden = {
        "kernels": ("fastkl.trainer", "fastkl.loss", "fastkl.head", "fastkl.cli", "fastkl._loss.arguments"),
        "fastkl": ("fastkl.trainer",),
        "trainer": ("fastkl.cli",),
    }[room]
    for path in sorted((REPOSITORY / room).glob("*.py" if room == "fastkl" else "**/*.py")):
        for node in ast.parse(path.read_text()).body:
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                top = module.split(".")[0]
                assert top in sys.stdlib_module_names or top == "fastkl" or top in names, f"{path.name}: {module}"
                assert not module.startswith(forbidden), f"{path.name}: {module}"
