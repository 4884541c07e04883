"""Run folders as reports are made of, and the page that is made, taken apart."""

from __future__ import annotations

import json
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml
from tiny_data import write_jsonl

from fastkl.trainer.runs.report.page import write_report

SETTINGS: dict[str, Any] = {
    "seed": 0,
    "student": {"path": "models/small", "lora": {"rank": 0}},
    "teacher": {"path": "models/large"},
    "sampling": {"prompts_per_step": 4, "samples_per_prompt": 2},
    "optim": {"lr": 0.1, "steps": 3},
}


class Page(HTMLParser):
    """A page's elements, in order, and what its data block holds."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._contents: dict[int, str] = {}
        self._ended = False
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._ended = False

    def handle_endtag(self, tag: str) -> None:
        self._ended = True

    def handle_data(self, data: str) -> None:
        if not self._ended:
            self._contents[len(self.elements)] = self._contents.get(len(self.elements), "") + data

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in tags]

    def contents(self, wanted: str) -> list[str]:
        """The text right behind each start tag of a kind."""
        return [self._contents.get(n, "") for n, (tag, _) in enumerate(self.elements, start=1) if tag == wanted]

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.contents("script")[0])
        return found


def row(step: int, **values: float) -> dict[str, Any]:
    return {"step": step, "loss": 1 / (step + 1), "completions/mean_length": 3.0, "time/train": 0.5, **values}


def sample(step: int, tokens: Iterable[str] = ("a", "b", "c"), prompt: int = 1, **fields: Any) -> dict[str, Any]:
    tokens = list(tokens)
    counted = [place >= prompt for place in range(len(tokens))]
    return {
        "step": step,
        "text": "".join(tokens),
        "tokens": tokens,
        "ids": list(range(len(tokens))),
        "loss_mask": counted,
        "truncated": False,
        "sampler_logprobs": [-0.5 * bit for bit in counted],
        "teacher_logprobs": [-1.5 * bit for bit in counted],
        **fields,
    }


def make_run(
    folder: Path,
    rows: list[dict[str, Any]] | None = None,
    samples: list[dict[str, Any]] | None = None,
    settings: dict[str, Any] = SETTINGS,
) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    write_jsonl(
        folder / "metrics.jsonl", [row(step, teacher_kl=1 / step) for step in (1, 2, 3)] if rows is None else rows
    )
    write_jsonl(folder / "samples.jsonl", [sample(step) for step in (1, 2, 3)] if samples is None else samples)
    return folder


def page_of(*runs: Path, output: Path | None = None) -> Page:
    return Page(write_report(runs, output))


def only_run(run: Path) -> dict[str, Any]:
    (found,) = page_of(run).data["runs"]
    result: dict[str, Any] = found
    return result
