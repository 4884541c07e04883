"""TRL's trainers on tiny models: with fastkl under them they log what they log without."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tiny_data import sums
from tiny_models import save_model

trl = pytest.importorskip("trl", minversion="1.16")
from fastkl.integrations import trl as integration  # noqa: E402

Log = list[dict[str, Any]]
# What a trainer logs of time, and of how many steps it took.
UNRELATED = ("time", "per_second", "runtime", "flos")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student and a teacher, in folders: a trainer loads its reference model from where the model came from."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "student", tie_word_embeddings=False)
    save_model(folder / "teacher", seed=1, width=24)
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


REWARD = {"reward_funcs": distinct}
TRAINERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # the data and the class, its own settings, its other arguments
    "sft": ("SFT", {}, {}),
    "sft-dft": ("SFT", {"loss_type": "dft"}, {}),
    "dpo": ("DPO", {}, {}),
    "dpo-wpo": ("DPO", {"use_weighting": True}, {}),
    "kto": ("KTO", {}, {}),
    "grpo": ("GRPO", {"beta": 0.1, "num_generations": 2}, REWARD),
    "grpo-entropy": ("GRPO", {"top_entropy_quantile": 0.5, "num_generations": 2, "temperature": 0.7}, REWARD),
    "grpo-bonus": ("GRPO", {"entropy_coef": 0.1, "num_generations": 2}, REWARD),
    "rloo": ("RLOO", {"num_generations": 2}, REWARD),
    "distillation": ("Distillation", {"beta": 0.5}, {"teacher_model": "teacher"}),
    "distillation-reverse": ("Distillation", {"beta": 1.0, "temperature": 0.8}, {"teacher_model": "teacher"}),
}


def train(models: Path, out: Path, kind: str, **more: Any) -> Log:
    """What a trainer logs in three steps. The same seed, the same samples."""
    name, settings, arguments = TRAINERS[kind]
    if name in ("GRPO", "RLOO", "Distillation"):
        settings = {"max_completion_length": 8, **settings}
    config = getattr(trl, f"{name}Config")(
        output_dir=str(out),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        max_steps=3,
        logging_steps=1,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        **{"bf16": False, "gradient_checkpointing": False, **settings, **more},
    )
    if "teacher_model" in arguments:
        arguments = {"teacher_model": str(models / "teacher")}
    trainer = getattr(trl, f"{name}Trainer")(
        model=str(models / "student"), args=config, train_dataset=rows(name.lower()), **arguments
    )
    trainer.train()
    return list(trainer.state.log_history)


def numbers(log: Log) -> list[dict[str, float]]:
    """The entries of a log that have a meaning, step by step."""
    return [
        {
            key: value
            for key, value in entry.items()
            if isinstance(value, float) and not any(u in key for u in UNRELATED)
        }
        for entry in log
    ]


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


slow = pytest.mark.slow
FAST = ("sft", "grpo", "distillation")


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=() if kind in FAST else slow) for kind in TRAINERS])
def test_a_trainer_logs_the_same(kind: str, models: Path, tmp_path: Path, calls: list[str]) -> None:
    theirs = train(models, tmp_path, kind)
    assert not calls
    with integration.use():
        ours = train(models, tmp_path, kind)
    assert calls
    assert len(ours) == len(theirs) >= 4
    for found, expected in zip(numbers(ours), numbers(theirs), strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6), (kind, found, expected)
