"""TRL's trainers on tiny models: with fastkl under them they log what they log without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from peft import LoraConfig
from tiny_data import sums
from tiny_models import causal_lm, save_model, tokenizer

trl = pytest.importorskip("trl", minversion="1.16")
from fastkl.integrations import trl as integration  # noqa: E402

Log = list[dict[str, Any]]
# What a trainer logs of time, and of how many steps it took.
UNRELATED = ("time", "per_second", "runtime", "flos")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Students and a teacher, in folders: a trainer loads its reference model from where the model came from."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "student", tie_word_embeddings=False)
    save_model(folder / "teacher", seed=1, width=24)
    words = tokenizer()
    sizes = {
        "vocab_size": len(words),
        "hidden_size": 16,
        "num_attention_heads": 2,
        "eos_token_id": 0,
        "bos_token_id": None,
    }
    causal_lm("gemma2", "eager", final_logit_softcapping=5.0, **sizes).save_pretrained(folder / "gemma2")
    words.save_pretrained(folder / "gemma2")
    return folder


def rows(kind: str) -> Any:
    """The dataset of a trainer."""
    from datasets import Dataset

    pairs = [(str(row["prompt"]), str(row["completion"])) for row in sums(8)]
    make: dict[str, Callable[[str, str], list[dict[str, Any]]]] = {
        "sft": lambda p, c: [{"prompt": p, "completion": c}],
        "dpo": lambda p, c: [{"prompt": p, "chosen": c, "rejected": c[::-1] + "0"}],
        "kto": lambda p, c: [{"prompt": p, "completion": c + end, "label": end == ""} for end in ("", "7")],
    }
    return Dataset.from_list([row for pair in pairs for row in make.get(kind, lambda p, _: [{"prompt": p}])(*pair)])


def distinct(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(completion))) for completion in completions]


class Run(NamedTuple):
    """A trainer of TRL."""

    name: str
    settings: Mapping[str, Any] = MappingProxyType({})
    student: str = "student"
    lora: bool = False


SAMPLED = {"num_generations": 2, "max_completion_length": 8}
RUNS = {
    "sft": Run("SFT"),
    "sft-dft": Run("SFT", {"loss_type": "dft"}),
    "sft-lora": Run("SFT", lora=True),
    "sft-gemma2": Run("SFT", student="gemma2"),
    "dpo": Run("DPO"),
    "dpo-wpo": Run("DPO", {"use_weighting": True}),
    "dpo-lora": Run("DPO", lora=True),
    "dpo-gemma2": Run("DPO", student="gemma2"),
    "kto": Run("KTO"),
    "grpo": Run("GRPO", {"beta": 0.1, **SAMPLED}),
    "grpo-entropy": Run("GRPO", {"top_entropy_quantile": 0.5, "temperature": 0.7, **SAMPLED}),
    "grpo-bonus": Run("GRPO", {"entropy_coef": 0.1, **SAMPLED}),
    "grpo-bonus-lora": Run("GRPO", {"entropy_coef": 0.1, **SAMPLED}, lora=True),
    "rloo": Run("RLOO", SAMPLED),
    "distillation": Run("Distillation", {"beta": 0.5, "max_completion_length": 8}),
    "distillation-reverse": Run("Distillation", {"beta": 1.0, "temperature": 0.8, "max_completion_length": 8}),
    "distillation-gemma2": Run("Distillation", {"beta": 0.0, "max_completion_length": 8}, student="gemma2"),
}
FAST = ("sft", "grpo", "distillation")


def train(models: Path, out: Path, run: Run) -> Log:
    """What a trainer logs in three steps. The same seed, the same samples."""
    config = getattr(trl, f"{run.name}Config")(
        output_dir=str(out),
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        max_steps=3,
        logging_steps=1,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        **run.settings,
    )
    arguments: dict[str, Any] = {
        "Distillation": {"teacher_model": str(models / "teacher")},
        "GRPO": {"reward_funcs": distinct},
        "RLOO": {"reward_funcs": distinct},
    }.get(run.name, {})
    if run.lora:
        arguments = {**arguments, "peft_config": LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")}
    data = rows(run.name.lower())
    make = getattr(trl, f"{run.name}Trainer")
    trainer = make(model=str(models / run.student), args=config, train_dataset=data, **arguments)
    trainer.train()
    return list(trainer.state.log_history)


def numbers(log: Log) -> list[dict[str, float]]:
    """The entries of a log that have a meaning, step by step."""

    def means_something(entry: dict[str, Any], key: str) -> bool:
        # Before the first step policy and reference agree: which of two rewards is greater is a matter of rounding.
        rounding = key == "rewards/accuracies" and abs(entry["rewards/margins"]) < 1e-5
        return isinstance(entry[key], float) and not rounding and not any(word in key for word in UNRELATED)

    return [{key: value for key, value in entry.items() if means_something(entry, key)} for entry in log]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the losses of fastkl, one for each call that the integration makes."""
    made: list[str] = []
    for name in ("jsd_loss", "linear_logprobs", "linear_token_stats"):

        def counted(function: Callable[..., Any], name: str, *arguments: Any, **options: Any) -> Any:
            made.append(name)
            return function(*arguments, **options)

        monkeypatch.setattr(integration, name, partial(counted, getattr(integration, name), name))
    return made


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=() if kind in FAST else pytest.mark.slow) for kind in RUNS])
def test_a_trainer_logs_the_same(kind: str, models: Path, tmp_path: Path, calls: list[str]) -> None:
    theirs = train(models, tmp_path, RUNS[kind])
    assert not calls
    with integration.use():
        ours = train(models, tmp_path, RUNS[kind])
    assert calls
    assert len(ours) == len(theirs) >= 4
    for found, expected in zip(numbers(ours), numbers(theirs), strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6), (kind, found, expected)
