"""TRL's GKDTrainer, always on-policy (lmbda = 1): reverse KL over the whole vocabulary (beta = 1), all logits at once."""

from __future__ import annotations

from typing import Any

import torch

from bench.trainers import Clock, Job

PACKAGES = ("trl", "peft")


def train(job: Job, clock: Clock) -> None:
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    student, teacher, tokenizer = load_pair(job)
    config = GKDConfig(lmbda=1.0, beta=1.0, temperature=1.0, max_new_tokens=job.new_tokens, **arguments(job))
    answer = [{"role": "assistant", "content": "."}]  # the collator wants one; the student writes its own
    rows = Dataset.from_list([{"messages": messages + answer} for messages in job.messages()])
    trainer: Any = GKDTrainer(
        model=student, teacher_model=teacher, args=config, train_dataset=rows, processing_class=tokenizer
    )
    trainer.generation_config.eos_token_id = None
    trainer.generation_kwargs["eos_token_id"] = None
    run(trainer, teacher, clock)


def load_pair(job: Job) -> tuple[Any, Any, Any]:
    """Student, teacher and tokenizer; nothing ends a completion."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    models = [
        AutoModelForCausalLM.from_pretrained(f"{job.pair}/{name}", dtype=torch.float32)
        for name in ("student", "teacher")
    ]
    for model in models:
        model.generation_config.eos_token_id = None
        model.to(job.device)
    return models[0], models[1].eval(), AutoTokenizer.from_pretrained(f"{job.pair}/student")


def arguments(job: Job) -> dict[str, Any]:
    """Of transformers' Trainer: one step takes all prompts in one forward pass."""
    return {
        "output_dir": f"{job.folder}/trl",
        "per_device_train_batch_size": job.prompts,
        "gradient_accumulation_steps": 1,
        "max_steps": job.steps,
        "learning_rate": job.lr,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "bf16": job.device == "cuda",
        "use_cpu": job.device == "cpu",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
    }


def run(trainer: Any, teacher: Any, clock: Clock) -> None:
    """Trains; the student's `generate` and the teacher's forward are timed where TRL calls them."""
    from transformers import TrainerCallback

    class EndOfStep(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end_step()

    trainer.model.generate = timed(trainer.model.generate, clock, "sample")
    body = teacher.get_decoder()
    body.forward = timed(body.forward, clock, "teacher")
    trainer.add_callback(EndOfStep())
    trainer.train()


def timed(function: Any, clock: Clock, phase: str) -> Any:
    def wrapper(*args: Any, **options: Any) -> Any:
        with clock(phase):
            return function(*args, **options)

    return wrapper
