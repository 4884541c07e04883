"""TRL's DistillationTrainer: the reverse KL over the whole vocabulary (beta = 1), a chunk of logits at a time."""

from __future__ import annotations

from typing import Any

from bench.trainers import Clock, Job
from bench.trainers.trl_gkd import arguments, load_pair, run

PACKAGES = ("trl", "peft")


def train(job: Job, clock: Clock) -> None:
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    student, teacher, tokenizer = load_pair(job)
    config = DistillationConfig(beta=1.0, max_completion_length=job.new_tokens, **arguments(job))
    rows = Dataset.from_list([{"prompt": messages} for messages in job.messages()])
    trainer: Any = DistillationTrainer(
        student, teacher_model=teacher, args=config, train_dataset=rows, processing_class=tokenizer
    )
    trainer.eos_token_ids = [-1]
    trainer.generation_config.eos_token_id = None
    trainer.generation_kwargs["eos_token_id"] = None
    run(trainer, teacher, clock)
