"""Pairs of models with different tokenizers, and segments as one would find them by hand."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from launches import give_samples, together
from run_cases import check_same
from run_settings import arguments, distillation
from tiny_data import sums, write_jsonl
from tiny_models import CHARACTERS, save_model, tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from fastkl.trainer.runs.report import samples_log

PAIRED = "0123456789abcdefgh"
OWN: dict[str, object] = {"teacher__tokenizer": "own"}
OF_OWN = ("teacher_prompt", "teacher_text", "teacher_tokens", *samples_log.OWN)


def words(kind: str) -> PreTrainedTokenizerFast:
    """characters: a token each. pairs: of digits and some letters, two that stand together are one token.

    Both can write all that is written in either, <unk> too.
    """
    return tokenizer(f"{CHARACTERS}<>", pairs_of=PAIRED if kind == "pairs" else "")


def strangers(folder: Path, student: str, teacher: str) -> Path:
    """A student, a teacher and a dozen sums; their tokenizers by kind."""
    save_model(folder / "student", words(student))
    save_model(folder / "teacher", words(teacher), seed=1, width=24, max_position_embeddings=96)
    write_jsonl(folder / "sums.jsonl", sums())
    return folder


class Segment(NamedTuple):
    ours: list[int]  # places among the tokens of the completion
    theirs: list[int]


def segments(ours: list[str], theirs: list[str]) -> list[Segment]:
    """Of two tokenizations of one text: token by token, the side that is behind goes on until both are at one place."""
    found, i, j = [], 0, 0
    while i < len(ours):
        part = Segment([], [])
        behind = 0  # how much more of the text the student has written
        while not part.ours or behind:
            if behind > 0 or (part.ours and not part.theirs):
                behind -= len(theirs[j].encode())
                part.theirs.append(j)
                j += 1
            else:
                behind += len(ours[i].encode())
                part.ours.append(i)
                i += 1
        found.append(part)
    assert j == len(theirs)
    return found


def completion(sample: dict[str, Any], field: str) -> list[Any]:
    """What a logged sample has of a field after its prompt."""
    return sample[field][len(sample["ids"]) - sample["completion_length"] :]


def gaps(sample: dict[str, Any]) -> list[float]:
    """d of each token of a logged sample's completion: its segment's, from the log-probs that are logged."""
    ours, theirs = completion(sample, "sampler_logprobs"), sample["teacher_completion_logprobs"]
    found = [0.0] * len(ours)
    for part in segments(completion(sample, "tokens"), sample["teacher_tokens"]):
        d = sum(ours[i] for i in part.ours) - sum(theirs[j] for j in part.theirs)
        for i in part.ours:
            found[i] = d
    return found


def answered(sample: dict[str, Any], teacher: Path) -> list[float]:
    """The same, and of earlier segments, as `with_earlier` has them."""
    return with_earlier(sample, gaps(sample), teacher)


def with_earlier(sample: dict[str, Any], of: list[float], teacher: Path) -> list[float]:
    """What tokens have `of` their segments, and of earlier ones that reach into what was not settled yet.

    Settled is what stands before two letters that no token of the teacher has side by side, and what is 8 letters away.
    """
    ours, joined, written, found = completion(sample, "tokens"), side_by_side(teacher), "", list[float]()
    parts = segments(ours, sample["teacher_tokens"])
    ends = [len("".join(ours[: part.ours[-1] + 1]).removesuffix("<eos>")) for part in parts]
    for number, place in [(number, place) for number, part in enumerate(parts) for place in part.ours]:
        splits = [i for i in range(1, len(written)) if written[i - 1 : i + 1] not in joined]
        since = max(len(written) - 8, 0, *splits)
        found.append(of[place] + sum(of[parts[k].ours[0]] for k in range(number) if ends[k] > since))
        written += ours[place]
    return found


@functools.cache
def side_by_side(folder: Path) -> set[str]:
    """The pairs of letters in tokens that a text may have."""
    known = AutoTokenizer.from_pretrained(folder)
    tokens = {*known.get_vocab()} - {*known.all_special_tokens}
    return {token[i : i + 2] for token in tokens for i in range(len(token) - 1)}


def teacher_logprobs(folder: Path, sample: dict[str, Any]) -> list[float]:
    """Of the completion in the teacher's tokens, by a plain forward pass in float64."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ids = torch.tensor([sample["teacher_prompt"] + sample["teacher_completion"]])
    with torch.no_grad():
        logprobs = torch.log_softmax(model(ids).logits[0, :-1], -1)
    start = len(sample["teacher_prompt"]) - 1
    return logprobs[range(start, ids.shape[1] - 1), ids[0, start + 1 :]].tolist()


def both_kinds_of_teachers(pair: Path, folder: Path) -> dict[str, object]:
    """Settings of a mixture: a teacher with its own tokenizer, the same with a context, and one with the student's."""
    save_model(folder / "kin", words("characters"), seed=2)
    data = {"path": str(pair / "sums.jsonl")}
    teachers: dict[str, dict[str, object]] = {
        "own": {"path": str(pair / "teacher"), "tokenizer": "own"},
        "told": {"path": str(pair / "teacher"), "tokenizer": "own", "context": {"system": "in words"}},
        "kin": {"path": str(folder / "kin")},
    }
    mixture = {name: {"data": data, "teacher": teacher} for name, teacher in teachers.items()}
    return {"teacher__path": "", "data__path": "null", "optim__steps": 2, "mixture": json.dumps(mixture)}


def alone_and_together(folder: Path, pair: Path, fsdp: bool, **options: object) -> list[Path]:
    """The run folders of one process and of two, which have learned the same."""
    runs = []
    for count in (1, 2):
        line = arguments("distill", distillation(folder / str(count), pair, **options))
        before = dict.fromkeys(range(count), give_samples)
        codes, said = together(line, folder / "said", count=count, fsdp=fsdp and count > 1, before=before)
        assert codes == [0] * count, said
        runs.append(folder / str(count))
    check_same(runs[1], runs[0])
    return runs
