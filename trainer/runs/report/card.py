"""The model card of a student: `README.md` of the folder, as the Hub reads it.

It says nothing that only this machine knows: of a model or a file that is here, the card has the name without its folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from fastkl import __version__
from fastkl.trainer.config.data import DataConfig
from fastkl.trainer.config.teacher import TeacherConfig
from fastkl.trainer.config.training import DistillConfig, RunConfig, SftConfig
from fastkl.trainer.runs.files import write_text

METHOD = "https://thinkingmachines.ai/blog/on-policy-distillation/"
# Metrics that a reader looks for, if the run has them; what they are called in the card.
FIGURES = {
    "eval/accuracy": "accuracy on held-out prompts",
    "teacher_kl": "teacher_kl, nats per token",
    "entropy": "entropy, nats per token",
    "loss": "loss",
    "reward/mean": "mean reward",
    "completions/mean_length": "mean length of the completions, tokens",
}
_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")


def write_cards(
    folder: Path,
    config: RunConfig,
    fingerprints: Mapping[str, str],
    rows: list[dict[str, Any]],
    kept: int | None = None,
) -> None:
    """Writes the card of a saved student, and that of its adapter where it has one.

    Args:
        folder: What the student was saved in.
        config: The run's settings.
        fingerprints: Of the rows that were read, by the name of their setting (`rows_of`).
        rows: Those of metrics.jsonl.
        kept: After which step the student has its weights. None: after the last.
    """
    write_text(folder / "README.md", student_card(config, fingerprints, rows, kept))
    if (folder / "adapter").is_dir():
        write_text(folder / "adapter" / "README.md", adapter_card(config))


def student_card(
    config: RunConfig, fingerprints: Mapping[str, str], rows: list[dict[str, Any]], kept: int | None = None
) -> str:
    name, end = _title(config), "last" if kept is None else "kept"
    parts = [
        _front_matter(config, "transformers"),
        f"# {name}\n\n{_what(config)}",
        _table(("", ""), _facts(config, fingerprints, kept)),
        "## Figures\n\n" + _table(("", "first", end), _figures(rows, kept)),
        f"## Load it\n\n```python\n{_loading(config)}\n```",
        f"Trained with fastkl {__version__}, torch {version('torch')}, transformers {version('transformers')}.",
    ]
    return "\n\n".join(parts) + "\n"


def adapter_card(config: RunConfig) -> str:
    repository, path = config.push_to_hub or "student", config.student.path
    named = path if is_hub_id(path) else f"path/to/{public(path)}"
    code = f"""from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{named}")
model = PeftModel.from_pretrained(base, "{repository}", subfolder="adapter")"""
    lora = config.student.lora
    text = f"A LoRA adapter of rank {lora.rank}, alpha {lora.alpha:g}. The folder above holds it merged into its base."
    return f"{_front_matter(config, 'peft')}\n\n# {_title(config)}: the adapter\n\n{text}\n\n```python\n{code}\n```\n"


def public(path: str) -> str:
    """A Hub id as it is; of a folder or file that is here, the last name."""
    return path if is_hub_id(path) else Path(path).expanduser().resolve().name


def is_hub_id(path: str) -> bool:
    """Whether it can only be one: nothing here has the name, and no folder `owner` may have held it before it was moved."""
    owner = Path(path).parent
    is_here = Path(path).exists() or (owner != Path() and owner.is_dir())
    return _HUB.fullmatch(path) is not None and not is_here


def _title(config: RunConfig) -> str:
    return (config.push_to_hub or Path(config.run).resolve().name).rpartition("/")[2]


def _front_matter(config: RunConfig, library: str) -> str:
    tags = ["fastkl", "sft" if isinstance(config, SftConfig) else "on-policy-distillation"]
    tags += ["lora"] if config.student.lora.rank else []
    data: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation", "tags": tags}
    if (base := _base(config.student.path)) is not None:
        data["base_model"] = base
    # The Hub shows them as what it was trained on: not what it was evaluated on.
    names = sorted({source.dataset for _, source in _learned(config) if source.dataset and is_hub_id(source.dataset)})
    data |= {"datasets": names} if names else {}
    return f"---\n{yaml.safe_dump(data, sort_keys=False)}---"


def _base(path: str) -> str | None:
    """The Hub id of a student, or of what a student that is here was trained from, if its own card says so."""
    if is_hub_id(path):
        return path
    try:
        front = (Path(path).expanduser() / "README.md").read_text(encoding="utf-8").split("---\n")
        base = yaml.safe_load(front[1]).get("base_model") if len(front) > 2 and not front[0] else None
    except (OSError, ValueError, yaml.YAMLError, AttributeError):  # no such file; no UTF-8, or a date that there is not
        return None
    return base if isinstance(base, str) and is_hub_id(base) else None


def _what(config: RunConfig) -> str:
    base = f"`{public(config.student.path)}`"
    if isinstance(config, DistillConfig) and config.has_teacher:
        learned = f"learned from {_teachers(config)} by [on-policy distillation]({METHOD})"
        return f"{base} {learned}: it wrote completions itself, and the teacher scored every token."
    if isinstance(config, DistillConfig):
        return f"{base} learned from rewards of its own completions."
    return f"{base} was fine-tuned on given completions."


def _facts(config: RunConfig, fingerprints: Mapping[str, str], kept: int | None) -> Iterator[tuple[str, ...]]:
    yield "base", f"`{public(config.student.path)}`"
    if isinstance(config, DistillConfig):
        if config.has_teacher:
            yield "teacher", _teachers(config)
        yield "objective", f"`{config.loss.objective}`"
        if config.loss.control is not None:
            yield "control", f"`{config.loss.control}`: no model to be used"
        yield "temperature of the samples", f"{config.sampling.temperature:g}"
        yield (
            "samples per step",
            f"{config.sampling.samples_per_step}, at most {config.sampling.max_new_tokens} new tokens",
        )
    if isinstance(config, SftConfig):
        yield "examples per step", str(config.examples_per_step)
    for name, source in _sources(config):
        rows = fingerprints.get(f"the rows of {name}", "")
        named = Path(source.path).expanduser().resolve().name if source.path else public(source.dataset or "")
        yield name, f"`{named}`, SHA-256 of the rows as read: `{rows[:16]}`"
    yield "steps", f"{config.optim.steps}, of {config.optim.substeps} optimizer steps each"
    if kept is not None:
        yield "kept", f"the student after step {kept}, with the best accuracy on held-out prompts"
    yield "learning rate", f"{config.optim.lr:g}"
    if config.student.lora.rank:
        yield (
            "LoRA",
            f"rank {config.student.lora.rank}, alpha {config.student.lora.alpha:g}, merged; also in `adapter/`",
        )
    yield "precision", f"{config.student.dtype} weights, mixed precision {config.mixed_precision}"
    yield "seed", str(config.seed)


def _learned(config: RunConfig) -> Iterator[tuple[str, DataConfig]]:
    """What it was trained on, by the names of the settings."""
    if isinstance(config, (DistillConfig, SftConfig)):
        for name, entry in config.data_sets().items():
            yield f"mixture.{name}.data" if name else "data", entry.data


def _sources(config: RunConfig) -> Iterator[tuple[str, DataConfig]]:
    """Also what it was evaluated on."""
    yield from _learned(config)
    for name, one in config.eval.sets().items():
        yield f"eval.more.{name}.data" if name else "eval.data", one.data


def _teachers(config: DistillConfig) -> str:
    return ", ".join(dict.fromkeys(f"`{_teacher(teacher)}`" for teacher in config.teachers().values()))


def _teacher(teacher: TeacherConfig) -> str:
    if teacher.self is not None:
        return f"itself ({teacher.self})"
    return public(teacher.path or teacher.server.model)


def _figures(rows: list[dict[str, Any]], kept: int | None) -> Iterator[tuple[str, ...]]:
    """Of the student that is saved; FLOPs are those of the whole run."""
    for metric, name in FIGURES.items():
        values = [(row["step"], row[metric]) for row in rows if metric in row and (kept is None or row["step"] <= kept)]
        if values:
            yield name, *(f"{value:.4g} (step {step})" for step, value in (values[0], values[-1]))
    flops = sum(value for row in rows for metric, value in row.items() if metric.startswith("flops/"))
    if flops:
        yield "FLOPs", "", f"{flops:.3g}"


def _table(heads: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _loading(config: RunConfig) -> str:
    name = config.push_to_hub or "student"
    return f"""from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}")"""
