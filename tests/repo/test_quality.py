"""Lint, types, and documentation that says what is true."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from documents import blocks
from launches import REPOSITORY
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import causal_lm
from transformers import PreTrainedModel

from fastkl.trainer.commands.command_line import parse

README = REPOSITORY / "README.md"
DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md"), *REPOSITORY.glob("recipes/**/*.md")])

PROSE = 124  # characters in a line, as `max-line-length` of pyproject.toml


@pytest.mark.parametrize(
    "arguments", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=["lint", "format", "types"]
)
def test_tools(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("room", ["kernels", "trainer", "tests"])
def test_rooms_are_no_packages(room: str) -> None:
    """A regular top-level package `kernels` hides the distribution of that name; tests/ would put the root on sys.path."""
    assert list((REPOSITORY / room).rglob("__init__.py")) == []


@pytest.mark.parametrize("name", ["kernels", "trainer"])
def test_the_rooms_are_links_in_the_package(name: str) -> None:
    assert (REPOSITORY / "fastkl" / name).is_symlink()
    assert (REPOSITORY / "fastkl" / name).resolve() == REPOSITORY / name


def code_of_documents() -> Iterator[Any]:
    for document in DOCUMENTS:
        for number, code in enumerate(blocks(document)):
            yield pytest.param(code, id=f"{document.relative_to(REPOSITORY)}-{number}")


@pytest.mark.parametrize("code", list(code_of_documents()))
def test_code_in_documents_compiles_and_imports_what_exists(code: str) -> None:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastkl"):
            try:
                module = importlib.import_module(node.module or "")
            except ImportError:  # of a package that is not here
                assert (node.module or "").startswith("fastkl.integrations.")
                assert importlib.util.find_spec(node.module or "") is not None
                continue
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_in_documents_lead_somewhere(document: Path) -> None:
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    local = [target for target in targets if target and "://" not in target]
    assert [target for target in local if not (document.parent / target).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_lines_of_prose_in_documents_are_no_longer_than_those_in_code(document: Path) -> None:
    """Code and tables cannot be wrapped, and neither can what has no spaces, as a URL."""
    text = re.sub(r"^ *```.*?^ *```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    prose = [line for line in text.splitlines() if not line.lstrip().startswith("|")]
    assert [line for line in prose if len(line) > PROSE and max(map(len, line.split())) <= PROSE / 2] == []


def some_model(kind: str) -> PreTrainedModel | PeftModel:
    """Gemma 2 transforms its logits; under peft the model's parts have other names."""
    model = causal_lm("gemma2" if kind == "gemma2" else "llama", "eager", initializer_range=0.1)
    if kind != "peft":
        return model
    lora = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:  # 0 at first: nothing of A would have a gradient
            torch.nn.init.normal_(parameter, std=0.1)
    return lora


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "peft"])
def test_the_two_halves_of_the_readmes_first_example_agree(kind: str, padding: str) -> None:
    """The code before and after: with the same model and samples, the same loss and the same gradients."""
    before, after = blocks(README)[:2]
    model = some_model(kind)
    torch.manual_seed(0)
    ids = torch.randint(3, 64, (2, 9))
    attention_mask = torch.ones_like(ids)
    attention_mask[1, {"none": slice(0), "left": slice(3), "right": slice(-3, None)}[padding]] = 0
    given = {
        "model": model,
        "ids": ids.where(attention_mask == 1, 0),
        "attention_mask": attention_mask,
        "mask": (torch.arange(8) > 2) & (attention_mask[:, 1:] == 1),
        "temperature": 0.7,
        "teacher_logprobs": -torch.rand(2, 8) * 5,
        "sampler_logprobs": -torch.rand(2, 8) * 5,
    }
    results = []
    for code in (before, after):
        model.zero_grad()
        names: dict[str, Any] = dict(given)
        exec(compile(code, "README.md", "exec"), names)
        names["loss"].backward()
        results.append((names["loss"].item(), [p.grad.clone() for p in model.parameters() if p.requires_grad]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    for plain, fused in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(fused, plain, atol=1e-4 * float(plain.abs().max()), rtol=1e-3)


def test_the_readmes_quick_start_is_the_recipe() -> None:
    (shown,) = re.findall(r"^```yaml\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert shown == (REPOSITORY / "recipes/quickstart/distill.yaml").read_text(encoding="utf-8")


def test_the_ten_lines_for_own_models_are_a_config(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs/start/own-models.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^```yaml\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    assert len(shown.splitlines()) == 10
    (tmp_path / "run.yaml").write_text(shown, encoding="utf-8")
    command, _ = parse(["distill", str(tmp_path / "run.yaml")])
    assert command == "distill"
