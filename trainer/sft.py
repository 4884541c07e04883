"""Supervised fine-tuning: the off-policy stage, on given completions, through the same loop and the same fused head.

Cross-entropy is the policy gradient of tokens that all have the advantage 1: −ℓ per token, mean over the tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from accelerate import Accelerator

from fastkl.trainer.config.loss import LossConfig
from fastkl.trainer.config.sampling import SamplingConfig
from fastkl.trainer.config.training import SftConfig
from fastkl.trainer.data.formats.packed import EndToEnd
from fastkl.trainer.data.mixture import DataSet, read_data_sets, step_prompts
from fastkl.trainer.data.prompts import Given
from fastkl.trainer.data.remarks import remark_on_data_sets, remark_on_length
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.loop import Source, fit
from fastkl.trainer.models import checks
from fastkl.trainer.models.ends import end_of_sequence
from fastkl.trainer.models.loading import context_length
from fastkl.trainer.models.pretrained import load_tokenizer, positions
from fastkl.trainer.models.sizes.flops import Cost, work
from fastkl.trainer.models.withheld import withholds_routers
from fastkl.trainer.notes import note
from fastkl.trainer.objectives.policy_gradient import PolicyGradient
from fastkl.trainer.rollouts.evaluation import check_eval_length, check_eval_room, eval_rows, load_evaluations
from fastkl.trainer.rollouts.samplers.local import local_sampler
from fastkl.trainer.rollouts.single_turn import SingleTurn
from fastkl.trainer.runs import processes
from fastkl.trainer.runs.folder import RunFolder
from fastkl.trainer.runs.identity import Identity, rows_of
from fastkl.trainer.runs.listener import SILENT, Clock, Listener
from fastkl.trainer.runs.report.hub import check_repository
from fastkl.trainer.runs.sharing.shares import shares
from fastkl.trainer.runs.start import start_run
from fastkl.trainer.student import Student


class Examples(Source):
    """The given completions, each token with advantage 1."""

    def __init__(self, data_sets: list[DataSet], config: SftConfig, cost: Cost) -> None:
        self._data_sets, self._config, self._cost = data_sets, config, cost

    def samples(self, step: int, clock: Clock) -> tuple[list[Sample], dict[str, float]]:
        everyones = step_examples(self._data_sets, self._config, step)
        owners = shares(
            work(self._cost, everyones), [0] * len(everyones), processes.count(), self._config.optim.substeps
        )
        mine = [
            dataclasses.replace(sample, advantages=sample.loss_mask, place=place)
            for place, (sample, owner) in enumerate(zip(everyones, owners, strict=True))
            if owner == processes.rank()
        ]
        return mine, {"completions/mean_length": sum(sample.loss_tokens for sample in everyones) / len(everyones)}


def completions_of(data_sets: Iterable[DataSet]) -> list[Given]:
    """Those of each data set of a supervised stage."""
    return [data_set.given for data_set in data_sets if data_set.given is not None]


def step_examples(data_sets: list[DataSet], config: SftConfig, step: int) -> list[Sample]:
    """The completions of a step, on all processes."""
    given = EndToEnd(completions_of(data_sets))
    return [given[prompt.index] for prompt in step_prompts(data_sets, config.examples_per_step, step, config.seed)]


def sft(config: SftConfig, *, listener: Listener = SILENT) -> RunFolder:
    """Runs (or resumes) a supervised stage.

    Args:
        config: All settings of the run.
        listener: Callbacks: see `Listener`.

    Raises:
        ConfigError: If the run cannot work; before anything expensive.
    """
    accelerator = start_run(config, config.examples_per_step, "examples_per_step")
    processes.on_main(lambda: check_repository(config))
    with RunFolder(config) as folder:
        _sft(config, accelerator, folder, listener)
    return folder


def _sft(config: SftConfig, accelerator: Accelerator, folder: RunFolder, listener: Listener) -> None:
    tokenizer = load_tokenizer(config.student)
    data_sets = read_data_sets(config.data_sets(), tokenizer, with_given=True)
    examples = completions_of(data_sets)
    note(f"{sum(map(len, examples))} examples read and encoded")
    remark_on_data_sets(data_sets, config.examples_per_step, "examples_per_step")
    remark_on_length(max(int(given.lengths.max()) for given in examples), config.batch.max_tokens)
    evaluations = load_evaluations(config.eval, tokenizer)
    check_eval_length(evaluations, {"student": positions(config.student)})

    student = Student(config, accelerator)
    if withholds_routers(student.model):
        raise ConfigError(
            f"the config of {config.student.path} has output_router_logits: true, which asks for the routers' auxiliary "
            f"loss; sft does not add it. Set it to false in that config.json to train without"
        )
    checks.check_vocabulary(tokenizer, {"student": student.model})
    for given in examples:
        checks.check_given(given, {"student": student.model})
    check_eval_room(evaluations, "student", student.model)
    ends = end_of_sequence(student.model, tokenizer)
    with student.gathered():
        sampler = local_sampler(student.model, eos_token_ids=ends) if evaluations else None
    source = Examples(data_sets, config, student.cost)
    responder = None if sampler is None else SingleTurn(sampler, context_length(student.model))
    objective = PolicyGradient(LossConfig(method="reinforce", old_logprobs="current"), SamplingConfig())
    prints = rows_of(data_sets, eval_rows(evaluations)) | {"the student's weights": student.fingerprint}
    student.also_checkpoint("identity", Identity(prints))
    fit(student, objective, source, responder, tokenizer, evaluations, folder, listener)
