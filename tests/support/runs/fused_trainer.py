"""Transformers' Trainer with the code of the documents, and with all the logits beside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from documents import blocks
from fused_training import lora, whole
from launches import REPOSITORY
from peft import PeftModel
from tiny_models import causal_lm
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

LOCAL, SCORED = blocks(REPOSITORY / "docs/integrations.md", "Transformers' Trainer")
STEPS, PER_STEP, EVALUATED = 3, 8, 4


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Padded rows, the first tokens of which are the prompt; `unused` is a column that no one wants."""

    def __init__(self, count: int) -> None:
        draw = torch.Generator().manual_seed(0)
        self.rows = []
        for index in range(count):
            ids = torch.randint(3, 64, (12,), generator=draw)
            mask = torch.arange(12) < 12 - index % 4
            labels = ids.where(mask & (torch.arange(12) > 1 + index % 3), -100)
            scores = {name: -5 * torch.rand(12, generator=draw) for name in ("teacher_logprobs", "sampler_logprobs")}
            self.rows.append(
                {"input_ids": ids, "attention_mask": mask.long(), "labels": labels, **scores, "unused": ids}
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: value for name, value in self.rows[index].items() if name != "unused"} | {"unused": index}


class Plain(Trainer):
    """Both losses as everyone writes them."""

    teacher: Any = None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")[:, 1:]
        scores = [inputs.pop(name)[:, 1:] for name in ("teacher_logprobs", "sampler_logprobs") if name in inputs]
        inputs.pop("unused", None)
        logprobs = model(**inputs).logits[:, :-1].float().log_softmax(-1)
        per_token = self._kl(logprobs, inputs) if self.teacher is not None else self._policy(logprobs, labels, *scores)
        loss = (per_token * (labels != -100)).sum() / num_items_in_batch * self.accelerator.num_processes
        return (loss, {"loss": loss}) if return_outputs else loss

    def _kl(self, logprobs: Tensor, inputs: Any) -> Tensor:
        with torch.no_grad():
            theirs = self.teacher(**inputs).logits[:, :-1].float().log_softmax(-1)
        return (logprobs.exp() * (logprobs - theirs)).sum(-1)

    def _policy(self, logprobs: Tensor, labels: Tensor, teacher: Tensor, sampler: Tensor) -> Tensor:
        own = logprobs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return -(own - sampler).exp() * (teacher - sampler)


def arguments(folder: Path, batch: int, **options: Any) -> TrainingArguments:
    values = {"per_device_train_batch_size": batch, "max_steps": STEPS, "optim": "sgd"}
    values |= {"learning_rate": 0.05, "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": "none"}
    values |= {
        "use_cpu": True,
        "eval_strategy": "steps",
        "eval_steps": STEPS,
        "save_steps": STEPS,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **(values | options))


def model_of(kind: str, folder: Path | None = None) -> Any:
    """From a folder, if one is given: FSDP's other processes then have no weights yet."""
    model: Any = causal_lm("qwen3", tie_word_embeddings=False)
    if folder is not None:
        if torch.distributed.get_rank() == 0:
            model.save_pretrained(folder)
        torch.distributed.barrier()
        model = AutoModelForCausalLM.from_pretrained(folder)
    return lora(model) if kind == "lora" else model


def run(folder: Path, example: str, kind: str, batch: int, plain: bool = False, **options: Any) -> dict[str, Any]:
    """Weights, losses and evaluations after training with an example's code, or with what `Plain` makes of it."""
    args = arguments(folder, batch, **options)  # before the model: that is how Transformers knows of FSDP
    data = {"train_dataset": Rows(STEPS * PER_STEP), "eval_dataset": Rows(EVALUATED)}
    model = model_of(kind, folder / "start" if "FSDP_VERSION" in os.environ else None)
    teacher = causal_lm("gemma2", "eager", seed=1, final_logit_softcapping=5.0)
    if plain:
        args.remove_unused_columns = example == LOCAL
        trainer: Any = Plain(model=model, args=args, **data)
        trainer.teacher = teacher.eval() if example == LOCAL else None
        trainer.train()
    else:
        names = {"model": model, "teacher": teacher, "args": args, **data}
        exec(compile(example, "integrations.md", "exec"), names)
        trainer = names["trainer"]
    history = [*trainer.state.log_history]
    return {
        "predictions": trainer.predict(data["eval_dataset"]).predictions,
        "weights": whole(trainer.model),
        "losses": [row["loss"] for row in history if "loss" in row],
        "evaluations": [row["eval_loss"] for row in history if "eval_loss" in row],
    }


def in_process(rank: int, count: int, folder: Path, example: str, kind: str, options: dict[str, Any]) -> dict[str, Any]:
    batch = PER_STEP // count // options.get("gradient_accumulation_steps", 1)
    return run(folder, example, kind, batch, **options, per_device_eval_batch_size=EVALUATED // count)


def saved_loss(folder: Path, kind: str) -> float:
    """Of the last checkpoint, loaded as an ordinary model."""
    path = folder / f"checkpoint-{STEPS}"
    base: Any = model_of("full") if kind == "lora" else AutoModelForCausalLM.from_pretrained(path)
    model = PeftModel.from_pretrained(base, path) if kind == "lora" else base
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        return float(model.eval()(input_ids=ids, labels=ids).loss)
