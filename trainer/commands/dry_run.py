"""`--dry-run`: everything is checked, the data are encoded, one step is counted; no weights are loaded or written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from accelerate import Accelerator

from fastkl.trainer.commands.plan.growth import growths, lines_of
from fastkl.trainer.commands.plan.run import Processes, Run, scorers_of
from fastkl.trainer.commands.plan.table import lines
from fastkl.trainer.config.training import DistillConfig, SftConfig
from fastkl.trainer.data.mixture import prompt_lengths, read_data_sets, sampled_lengths, step_prompts
from fastkl.trainer.data.samples import make_sample
from fastkl.trainer.data.text import encode
from fastkl.trainer.distill import Prepared, prepare
from fastkl.trainer.models import checks
from fastkl.trainer.models.ends import tokenizer_ends
from fastkl.trainer.models.loading import outline_of_student
from fastkl.trainer.models.pretrained import load_tokenizer
from fastkl.trainer.notes import printable
from fastkl.trainer.rollouts.evaluation import check_eval_room, load_evaluations
from fastkl.trainer.runs import processes
from fastkl.trainer.runs.folder import RunFolder
from fastkl.trainer.runs.start import start_run
from fastkl.trainer.sft import completions_of, step_examples
from fastkl.trainer.teachers.open import check_fit, remedy

ALIGNED, WIDTH = 10, 300  # so many texts, and characters of each, are shown as they are aligned


def dry_distill(config: DistillConfig) -> None:
    """Prints what a step of `fastkl distill` would be.

    Raises:
        ConfigError: Where the run would be refused, as far as that shows without weights.
    """
    accelerator = start_run(config, config.sampling.samples_per_step, "sampling.prompts_per_step")
    with RunFolder(config):  # it can be written, and holds no other run; what was made for this goes away again
        found = prepare(config)
    student = outline_of_student(config.student)
    scorers = list(scorers_of(config, student))
    loaded = [scorer for scorer in scorers if scorer.config.path]
    checks.check_vocabulary(found.tokenizer, {"student": student})
    new = config.sampling.max_new_tokens
    checks.check_one_rope(sampled_lengths(found.data_sets), new, {"student": student})
    for data_set, own in zip(found.data_sets, found.teacher_prompts.data_sets, strict=True):
        scoring = [scorer for scorer in loaded if data_set.name in scorer.data_sets]
        teachers, references = (
            {scorer.name: scorer.model for scorer in scoring if scorer.role == role}
            for role in ("teacher", "reference")
        )
        checks.check_vocabulary(found.tokenizer, references)
        checks.check_vocabulary(found.teacher_prompts.reader(data_set.name).tokenizer, teachers)
        same = {"student": student, **references}
        check_fit(config, data_set, same, checks.SHORTER.format("sampling", data_set.setting))
        check_fit(config, own, teachers, remedy(config, own))
    check_eval_room(found.evaluations, "student", student)
    prompts = step_prompts(found.data_sets, config.sampling.prompts_per_step, 0, config.seed)
    samples = [
        make_sample(prompt.ids, [0] * new, prompt.index, dataset=prompt.dataset)
        for prompt in prompts
        for _ in range(config.sampling.samples_per_prompt)
    ]
    found.teacher_prompts.give_fixed(samples)
    grown = growths(found.data_sets, found.teacher_prompts, found.tokenizer)
    for sample in samples:
        if sample.dataset in grown:
            grown[sample.dataset].write(sample)
    lengths = prompt_lengths(found.data_sets).tolist()
    more = [*lines_of(grown), *_contexts(found), *_alignments(found)]
    _print(Run(config, _started(accelerator), student, scorers, lengths, samples, samples), more)


def dry_sft(config: SftConfig) -> None:
    """Prints what a step of `fastkl sft` would be.

    Raises:
        ConfigError: Where the run would be refused, as far as that shows without weights.
    """
    accelerator = start_run(config, config.examples_per_step, "examples_per_step")
    with RunFolder(config):
        tokenizer = load_tokenizer(config.student)
        data_sets = read_data_sets(config.data_sets(), tokenizer, with_given=True)
        evaluations = load_evaluations(config.eval, tokenizer)
    student = outline_of_student(config.student)
    checks.check_vocabulary(tokenizer, {"student": student})
    for given in completions_of(data_sets):
        checks.check_given(given, {"student": student})
    check_eval_room(evaluations, "student", student)
    step = step_examples(data_sets, config, 0)
    lengths = prompt_lengths(data_sets).tolist()
    _print(Run(config, _started(accelerator), student, [], lengths, step, step))


def _contexts(found: Prepared) -> Iterator[str]:
    """What teachers read in place of the student's prompts: of each data set, the first."""
    for data_set, own in zip(found.data_sets, found.teacher_prompts.data_sets, strict=True):
        student, teacher = data_set.prompts[0], own.prompts[0]
        if own is not data_set:
            yield (
                f"{'the teacher':12}of {own.setting} reads {len(teacher.tokens):,} tokens where the student reads "
                f"{len(student.tokens):,}; {student.row.source}:"
            )
            yield printable(found.teacher_prompts.reader(data_set.name).tokenizer.decode(teacher.ids))
        elif data_set.context.function is not None:
            yield (
                f"{'the teacher':12}of {own.setting} reads what {data_set.context.function} writes in each step, which is "
                f"not counted here"
            )


def _alignments(found: Prepared) -> Iterator[str]:
    """What teachers with their own tokenizers make of some texts of the data: the answers, where rows have some."""
    for data_set in found.data_sets:
        own = found.teacher_prompts.own.get(data_set.name)
        if own is None:
            continue
        prompts = data_set.prompts[:ALIGNED]
        texts = [str(p.row.completion or p.row.answer or p.row.turns[-1]["content"]) for p in prompts]
        end = tokenizer_ends(found.tokenizer)[-1:]
        samples = [
            make_sample(prompt.ids, ids + end, prompt.index, dataset=prompt.dataset)
            for prompt, ids in zip(prompts, encode(found.tokenizer, texts), strict=True)
        ]
        found.teacher_prompts.give_fixed(samples)
        yield f"{'alignment':12}of {len(samples)} texts of {data_set.setting}: {found.teacher_prompts.encode(samples)}"
        if (common := found.teacher_prompts.common.get(data_set.name)) is not None:
            compared = sum(int(sample.compared.sum()) for sample in samples)
            counted = sum(sample.loss_tokens for sample in samples)
            yield (
                f"{'in common':12}{len(common):,} tokens; distributions are compared at {compared} of {counted} tokens, "
                f"where the teacher begins one too"
            )
        for prompt, sample in zip(prompts, samples, strict=True):
            yield printable(prompt.row.source)
            yield from (
                f"  {who:8}{printable(text[:WIDTH])}"
                for who, text in zip(("student", "teacher"), own.lines(sample), strict=True)
            )


def _started(accelerator: Accelerator) -> Processes:
    return Processes(processes.count(), accelerator.is_fsdp2, str(accelerator.device))


def _print(run: Run, more: Iterable[str] = ()) -> None:
    if processes.rank() == 0:
        print("\n".join([*lines(run), *more]), flush=True)
