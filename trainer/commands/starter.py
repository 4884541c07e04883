"""`fastkl init`: a first config, which runs as it is printed."""

from __future__ import annotations

import json
import os
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastkl.trainer.config.offline import InitConfig
from fastkl.trainer.notes import note

WIDTH = 46  # where comments begin


def print_starter(config: InitConfig) -> None:
    """Prints the config, and says on stderr what it names that is not here."""
    print(starter(config), end="")
    for name, model in (("STUDENT", config.student), ("TEACHER", config.teacher)):
        if _is_path(model) and not _here(model).exists():
            note(f"{name} {model} does not exist (looked in {Path.cwd()})")
    if not _is_hub_id(config.data) and not _here(config.data).exists():
        note(f"DATA {config.data} does not exist (looked in {Path.cwd()})")
    if not config.chat and not _holds_chats(config.data) and _has_template(config.student):
        note(f"STUDENT {config.student} has a chat template; with --chat prompts become a user's turn of it")


def starter(config: InitConfig) -> str:
    """The config as text. Files that are here, and a server, are asked what fits them; nothing is loaded."""
    return "".join(f"{_line(setting, comment)}\n" for setting, comment in _lines(config))


def _line(setting: str, comment: str) -> str:
    if not comment:
        return setting
    return f"{setting:{WIDTH}}  # {comment}" if setting else f"# {comment}"


def _lines(config: InitConfig) -> Iterator[tuple[str, str]]:
    prompts, new = min(64, _rows(config.data)), min(256, _context(config.student) // 2)
    yield "", "fastkl distill run.yaml   runs this, and resumes it. With --dry-run it only checks and estimates."
    yield "run: runs/first", "metrics.jsonl, report.html, student/, checkpoints/"
    yield f"student: {{path: {_word(_model(config.student))}}}", "add lora: {rank: 32} to train an adapter"
    yield _teacher(config.teacher)
    yield f"data: {{{_data(config.data)}, chat_template: {'true' if config.chat else 'false'}}}", _means(config)
    yield f"sampling: {{prompts_per_step: {prompts}, max_new_tokens: {new}}}", "what the student writes in a step"
    yield "optim: {lr: 1.0e-5, steps: 100, warmup_steps: 5}", "a higher one with LoRA"
    yield "batch: {max_tokens: 16384}", "of a forward pass; lower it if memory runs out"
    yield "checkpoint: {every: 25}", ""
    yield "", "mixed_precision: bf16                      # on a GPU"
    room = f", max_new_tokens: {new}" if new < 256 else ""
    yield "", f"eval: {{data: {{path: heldout.jsonl}}, every: 25{room}}}   # rows with an answer; see eval.grader"


def _means(config: InitConfig) -> str:
    """What becomes of the prompts."""
    if _holds_chats(config.data):
        return "messages go through the chat template"
    return "prompts become a user's turn of the chat template" if config.chat else "prompts are continued as they are"


def _teacher(teacher: str) -> tuple[str, str]:
    if urlsplit(teacher).scheme not in ("http", "https"):
        return f"teacher: {{path: {_word(_model(teacher))}}}", "it scores every token of the student"
    name = _served(teacher)
    comment = "model: the name under which it serves the teacher"
    return f"teacher: {{server: {{url: {_word(teacher)}, model: {_word(name or 'MODEL')}}}}}", comment


def _data(data: str) -> str:
    """A file, or a data set by its Hub id."""
    return f"dataset: {_word(data)}" if _is_hub_id(data) else f"path: {_word(data)}"


def _is_hub_id(data: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", data)) and not Path(data).suffix and not _here(data).exists()


def _is_path(model: str) -> bool:
    """Whether a model's name can be no Hub id, nor a server's address."""
    address = urlsplit(model).scheme in ("http", "https")
    return not address and (model.startswith((".", "/", "~", "$")) or model.endswith("/") or model.count("/") > 1)


def _here(path: str) -> Path:
    return Path(os.path.expandvars(os.path.expanduser(path)))


def _model(path: str) -> str:
    """A model's folder; of a run's folder, that of its student."""
    folder = _here(path)
    is_run = (folder / "config.yaml").is_file() and not (folder / "config.json").exists()
    return f"{path.rstrip('/')}/student" if is_run else path


def _word(text: str) -> str:
    """A word in YAML, in quotes where it needs them."""
    plain = re.fullmatch(r"[A-Za-z/.~][\w./~$-]*", text, re.ASCII) and any(mark in text for mark in "/.")
    return text if plain else json.dumps(text, ensure_ascii=False)


def _context(student: str) -> int:
    """How long a text of the student may be, if its config is here."""
    found = _json(_here(_model(student)) / "config.json").get("max_position_embeddings")
    return found if isinstance(found, int) else 512


def _has_template(student: str) -> bool:
    """Whether a student that is here has a chat template."""
    folder = _here(_model(student))
    return (folder / "chat_template.jinja").exists() or "chat_template" in _json(folder / "tokenizer_config.json")


def _rows(data: str) -> int:
    try:
        return max(1, sum(bool(line.strip()) for line in _here(data).read_bytes().splitlines()))
    except OSError:
        return 64


def _holds_chats(data: str) -> bool:
    """Whether the first row of a JSONL file is a chat."""
    try:
        with open(_here(data), "rb") as file:
            row = json.loads(file.readline())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(row, dict) and (bool(row.get("messages")) or isinstance(row.get("prompt"), list))


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _served(url: str) -> str:
    """The name of the first model that a server lists; empty where it cannot be asked now."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/models", timeout=3) as answer:
            return str(json.loads(answer.read(1_000_000))["data"][0]["id"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""
