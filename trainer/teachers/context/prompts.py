"""What the teachers of a run read in place of the student's prompts, and how samples get it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastkl.trainer.config.context import ContextConfig
from fastkl.trainer.config.teacher import TeacherConfig
from fastkl.trainer.config.training import DistillConfig
from fastkl.trainer.data.arrays import Array, Ragged
from fastkl.trainer.data.formats.packed import Packed
from fastkl.trainer.data.mixture import DataSet, all_prompts
from fastkl.trainer.data.prompts import EncodedPrompt, Given, Prompts, in_pieces
from fastkl.trainer.data.rows import Prompt
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.errors import ConfigError, RunError
from fastkl.trainer.models.loading import context_length, load_teacher_tokenizer
from fastkl.trainer.models.sizes.layers import rope_switch
from fastkl.trainer.runs import processes
from fastkl.trainer.runs.sharing.records import Record, by_first
from fastkl.trainer.teachers.alignment.common import CommonVocabulary
from fastkl.trainer.teachers.alignment.counts import Counts, sum_counts
from fastkl.trainer.teachers.alignment.own import OwnTokenizer
from fastkl.trainer.teachers.alignment.pair import TokenizerPair
from fastkl.trainer.teachers.alignment.reader import Reader
from fastkl.trainer.teachers.context.attempts import Attempt, Told
from fastkl.trainer.teachers.context.encoding import check_examples, encode_contents
from fastkl.trainer.teachers.context.functions import Written, context_function
from fastkl.trainer.teachers.context.siblings import MARKS, Siblings
from fastkl.trainer.teachers.context.turns import Content, read_examples, teacher_content


def fixed_prompts(
    prompts: Prompts,
    context: ContextConfig,
    function: Written | None,
    reader: Reader,
    setting: str,
) -> Prompts:
    """The teacher's prompts, as far as they depend on rows alone.

    Args:
        prompts: The student's.
        context: Whose name is `setting`.
        function: The one that it names; it reads rows.
        reader: Who reads what comes of it.

    Raises:
        ConfigError: Naming the row that cannot have such a prompt.
    """
    examples = [] if function is not None else read_examples(context.examples, f"{setting}.examples")

    def contents(piece: Sequence[EncodedPrompt]) -> list[Content]:
        if function is None:
            return [teacher_content(prompt, context, examples, setting) for prompt in piece]
        # By one process for all: it may be a matter of chance what it writes.
        return processes.on_main(lambda: [function.of_row(prompt) for prompt in piece])

    found = _packed(prompts, contents, reader, setting)
    check_examples(examples, found[0], f"{setting}.examples")
    return found


def _same(prompts: Sequence[EncodedPrompt]) -> list[Content]:
    return [prompt.row.prompt for prompt in prompts]


def _packed(
    prompts: Prompts, contents: Callable[[Sequence[EncodedPrompt]], list[Content]], reader: Reader, setting: str
) -> Prompts:
    """What a teacher reads in place of each prompt, a piece of them at a time."""
    rows = Packed[Prompt]()
    found = Prompts(rows, first=prompts.first, dataset=prompts.dataset)
    for piece in in_pieces(prompts, f"{setting} encoded"):
        for place, prompt in enumerate(encode_contents(piece, contents(piece), reader, setting), start=len(rows)):
            rows.append(prompt.row)
            found.add(place, prompt.tokens, prompt.chat)
    return found


class TeacherPrompts:
    """The prompts that `teacher.context` makes. Without one, a teacher reads what the student read.

    One with its own tokenizer reads both, and completions, in its own tokens.

    Args:
        data_sets: Those of the run.

    Raises:
        ConfigError: Naming the row that cannot have such a prompt.
    """

    def __init__(self, config: DistillConfig, data_sets: Sequence[DataSet], tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._prompts = all_prompts(data_sets)
        self.own: dict[str, OwnTokenizer] = {}  # of teachers that have one, by data set
        self.common: dict[str, CommonVocabulary] = {}  # of those and the student, where distributions are compared
        self._pairs: dict[str, TokenizerPair] = {}  # by the paths of teachers' tokenizers
        self._fixed: dict[str, Prompts] = {}  # by data set
        self._functions: dict[str, Written | Siblings] = {}  # of samples, by data set
        self._most: dict[str, float] = {}  # the most tokens that such a function may write
        self._limits: dict[str, float] = {}  # the most tokens that the teacher of a data set reads, where that is known
        self.data_sets: list[DataSet] = []  # as the teachers read them
        for data_set in data_sets:
            setting = config.teacher_setting(data_set.name)
            if config.has_teacher and data_set.teacher.own_tokenizer:
                pair, most, role = self._pair(data_set.teacher), config.loss.max_segment, config.environment.role
                distributions = config.loss.objective != "policy_gradient"
                self.own[data_set.name] = OwnTokenizer(data_set, pair, most, role, setting, distributions)
                if distributions:
                    self.common[data_set.name] = self._common_with(data_set, setting)
            fixed = self._fix(data_set, setting) if config.has_teacher else None
            if fixed is not None:
                self._fixed[data_set.name] = fixed
                given = None if data_set.given is None else self._given(data_set.given, fixed)
                data_set = dataclasses.replace(data_set, prompts=fixed, given=given)
            self.data_sets.append(data_set)

    def _fix(self, data_set: DataSet, teacher: str) -> Prompts | None:
        """The prompts that are known before the first step; None where the teacher reads the student's ids."""
        context, setting = data_set.context, f"{teacher}.context"
        if context != ContextConfig():
            function = context_function(context, setting)
            if isinstance(function, Siblings) or (function is not None and function.of_samples):
                self._add(data_set, function, setting)
            else:
                return fixed_prompts(data_set.prompts, context, function, self.reader(data_set.name), setting)
        if data_set.name not in self.own:
            return None
        return _packed(data_set.prompts, _same, self.reader(data_set.name), f"{teacher}.tokenizer")

    def _common_with(self, data_set: DataSet, setting: str) -> CommonVocabulary:
        common, path = self.own[data_set.name].common(), data_set.teacher.tokenizer_path
        if not len(common):
            raise ConfigError(
                f"{setting}.tokenizer is {data_set.teacher.tokenizer}, but the tokenizers of the student and of {path} "
                f"have no token in common: there are no distributions to compare. Set loss.objective to policy_gradient"
            )
        return common

    def _pair(self, teacher: TeacherConfig) -> TokenizerPair:
        """Both tokenizers; one and the same for all data sets of a teacher."""
        path = teacher.tokenizer_path
        if path not in self._pairs:
            theirs = load_teacher_tokenizer(teacher)
            assert theirs is not None  # `check_teacher` demands one
            self._pairs[path] = TokenizerPair(self._tokenizer, theirs)
        return self._pairs[path]

    def reader(self, data_set: str) -> Reader:
        """Who reads the prompts of a data set."""
        return self.own[data_set].reader if data_set in self.own else Reader(self._tokenizer)

    def _add(self, data_set: DataSet, function: Written | Siblings, setting: str) -> None:
        """A function whose prompts nobody knows yet."""
        if isinstance(function, Siblings):  # its template is known
            first = data_set.prompts[:1]
            reader = self.reader(data_set.name)
            encode_contents(first, [function.example(prompt) for prompt in first], reader, function.setting)
        most = data_set.context.max_tokens
        if data_set.teacher.server.url and most is None:
            raise ConfigError(
                f"{setting}.function is {data_set.context.function!r}, whose prompts are not known before a step, and "
                f"nobody knows how much the teacher's server can read; set {setting}.max_tokens"
            )
        self._functions[data_set.name] = function
        self._most[data_set.name] = math.inf if most is None else most

    def _given(self, given: Given, fixed: Prompts) -> Given:
        """The data's own completions as the teacher reads them, after its prompts."""
        if fixed.dataset not in self.own:
            return Given(fixed, given.completions)
        completions = Ragged()
        for samples in in_pieces(given, "completions encoded"):
            self.give_fixed(samples)
            self.encode(samples)
            for sample in samples:
                assert sample.teacher_completion is not None  # `encode` has written it
                completions.append(sample.teacher_completion.tolist())
        return Given(fixed, completions)

    def limit(self, data_set: DataSet, model: PreTrainedModel) -> None:
        """The teacher of a data set is this model: what functions write for it may not be longer than it reads."""
        shortest = data_set.prompts.ids.lengths.min()
        limit, switch = context_length(model), rope_switch(model.config.get_text_config())
        limits = [limit, switch if switch is not None and shortest <= switch else None]
        self._limits[data_set.name] = min((each for each in limits if each is not None), default=math.inf)

    def limit_served(self, data_set: DataSet, longest: int) -> None:
        """The teacher of a data set is a server that scores so many tokens."""
        if data_set.name in self.own:
            self._limits[data_set.name] = longest

    def give_fixed(self, samples: Iterable[Sample]) -> None:
        """Writes `teacher_prompt` of samples as far as it depends on their rows alone."""
        for sample in samples:
            fixed = self._fixed.get(sample.dataset)
            ids = None if fixed is None else fixed.ids[sample.prompt_index - fixed.first]
            sample.teacher_prompt = None if ids is None else np.array(ids)

    def encode(self, samples: Sequence[Sample]) -> Counts:
        """Writes what teachers with their own tokenizers read of the completions, after `teacher_prompt`; by any thread."""
        counts = []
        for name, own in self.own.items():
            found = [sample for sample in samples if sample.dataset == name]
            chats = [self._prompts[sample.prompt_index].chat for sample in found]
            counts.append(own.encode(found, chats, self._limits.get(name, math.inf)))
        return sum_counts(counts)

    def encode_together(self, samples: Sequence[Sample]) -> dict[str, float]:
        """`encode` of this process's samples of a step; metrics of all samples. All processes call it."""
        counts = processes.raise_together(lambda: self.encode(samples))
        return sum_counts(processes.gather([counts])).metrics()

    def end_with(self, tokens: Sequence[int]) -> None:
        """These tokens end the student's completions."""
        for own in self.own.values():
            own.also_end(tokens)

    def depends_on_samples(self, data_set: str) -> bool:
        """Whether a function writes the prompts of this data set's teacher when the samples of a step are graded."""
        return data_set in self._functions

    def give(self, samples: list[Sample]) -> tuple[list[Sample], dict[str, float]]:
        """Writes `teacher_prompt` of this process's samples of a step, which are graded.

        Returns those that no function masks, which the loss is to see, and metrics of the whole step. All processes call
        it. A function sees all samples of a row: what it is told of them goes to the first process, where it runs.

        Raises:
            RunError: Where a function of the user's fails.
        """
        self.give_fixed(samples)
        if not self._functions:
            return samples, {}
        written = [sample for sample in samples if sample.dataset in self._functions]
        attempts = [Record((sample.prompt_index, self._attempt(sample)), []) for sample in written]
        try:
            found = by_first(attempts, [sample.place for sample in written], self._written)
        except ConfigError as error:
            raise RunError(str(error)) from error
        told = [own.head for own in found]
        too_long = 0
        for sample, own in zip(written, found, strict=True):
            ids = next(iter(own.arrays), None)
            fits = ids is None or self._fits(sample, ids)
            if ids is not None and fits:
                sample.teacher_prompt = ids
            too_long += not fits
        plain = sum(not own.arrays for own in found)
        masked = {id(sample) for sample, own in zip(written, told, strict=True) if own.masked}
        metrics = _fractions({"plain": plain, "too_long": too_long}, len(found)) | _marked(told)
        return [sample for sample in samples if id(sample) not in masked], metrics

    def _fits(self, sample: Sample, ids: Array) -> bool:
        limit = self._limits.get(sample.dataset, math.inf)
        return len(ids) <= self._most[sample.dataset] and len(ids) + sample.completion_length <= limit

    def _written(self, attempts: list[Record]) -> list[Record]:
        """What functions write for attempts that may be at several rows: a call for all those at a row."""
        rows, found = [record.head[0] for record in attempts], dict[int, Record]()
        order = sorted(range(len(rows)), key=lambda place: rows[place])  # stable
        for row, group in itertools.groupby(order, key=lambda place: rows[place]):
            own = list(group)
            told = self._of_group(self._prompts[row], [attempts[place].head[1] for place in own])
            found |= dict(zip(own, told, strict=True))
        return [found[place] for place in range(len(rows))]

    def _of_group(self, prompt: EncodedPrompt, attempts: list[Attempt]) -> list[Record]:
        """What a function told of each: the ids of a prompt, if it wrote one, and all but its content."""
        function = self._functions[prompt.dataset]
        all_told = function.of_attempts(prompt, attempts)
        new = [told.content for told in all_told if told.content is not None]
        encoded = iter(encode_contents([prompt] * len(new), new, self.reader(prompt.dataset), function.setting))
        return [
            Record(
                told._replace(content=None),
                [] if told.content is None else [np.array(next(encoded).ids, np.int32)],
            )
            for told in all_told
        ]

    def _attempt(self, sample: Sample) -> Attempt:
        text = self._tokenizer.decode(sample.ids[sample.prompt_length :], skip_special_tokens=True)
        return Attempt(text, sample.reward, sample.truncated, sample.feedback)


def _marked(all_told: Iterable[Told]) -> dict[str, float]:
    """How many of the samples with marks, on all processes, have each of them; nothing where there are none."""
    marks = [told.marks for told in all_told if told.marks is not None]
    return _fractions({mark: sum(mark in own for own in marks) for mark in MARKS}, len(marks))


def _fractions(counts: dict[str, int], of: int) -> dict[str, float]:
    """Metrics of the counts of all processes; nothing where there is nothing to count."""
    sums = processes.add({**counts, "of": of})
    return {f"context/{name}_fraction": sums[name] / sums["of"] for name in counts} if sums["of"] else {}
