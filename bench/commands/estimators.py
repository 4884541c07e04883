"""Estimators of the reverse KL's gradient on rows of real models: bias, variance, and what both do to the head's gradient.

    python -m bench estimators --drop 8,10,12,14,16,18 --json pruned.json                SmolLM2 and itself less six layers
    python -m bench estimators --teacher T --student S --prompts FILE --json mine.json    any pair of one vocabulary

The student samples a completion of each prompt. Both models then say their log-probs of the whole vocabulary at all its
tokens. The rest is in closed form: nothing but the completions is random. `bench/estimators/study.py` says what the keys of
the report mean. `python -m bench plot` draws reports as estimators.png, and docs/objectives/objectives.md shows them.

The models are on the CPU. What both say of all tokens is held in memory: 24 V bytes for each position.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from bench.estimators.rollouts import Pair, Samples, load_model, read_questions, sample, spoiled
from bench.estimators.study import Study
from bench.lib import arguments as checked
from bench.lib.pair import Size, make_pair
from bench.lib.real_rows import MODELS, chats, in_template
from bench.lib.report import circumstances
from fastkl._check.json_file import write_json

SMALL = Size(300, 64, 2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--teacher",
        default="smollm2",
        metavar="MODEL",
        help=f"take {' or '.join(MODELS)}, which are inside packages, or a folder or Hub id (default: smollm2)",
    )
    parser.add_argument(
        "--student", metavar="MODEL", help="take this one, or make one of the teacher by --drop and --bits"
    )
    parser.add_argument("--drop", type=checked.indices, default=[], metavar="A,B", help="leave these layers out")
    parser.add_argument("--bits", type=checked.positive, help="round the layers' weights to so many bits, row by row")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="read JSON lines with a prompt; 32 questions by default"
    )
    parser.add_argument("--completions", type=checked.positive, default=32, help="sample so many (default: 32)")
    parser.add_argument("--new-tokens", type=checked.positive, default=48, help="limit each to so many (default: 48)")
    parser.add_argument("--temperature", type=float, default=1.0, help="sample and compare at this (default: 1)")
    parser.add_argument(
        "--k", type=checked.sizes, default=[1, 5, 20, 100], metavar="A,B", help="list so many likeliest tokens"
    )
    parser.add_argument("--label", help="call the pair so in figures and tables")
    parser.add_argument("--small", action="store_true", help="make a tiny pair, for a dry run")
    checked.add_json(parser)


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    _check(arguments, parser)
    try:
        samples = _small(arguments) if arguments.small else _sample(arguments)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    largest = samples.log_p.shape[1] // 2 - 1
    if max(arguments.k) > largest:
        parser.error(f"argument --k: {max(arguments.k)}; two lists of this vocabulary hold at most {largest} each")
    study = Study(samples, arguments.k)
    report: dict[str, Any] = {
        "rows": [],
        "lists": list(study.lists()),
        "conditions": {**_pair(arguments), **study.conditions()},
        **circumstances("cpu", "transformers"),
    }
    print("  ".join(f"{name} {value:.4g}" for name, value in study.conditions().items()))
    print(f"{'':44} {'bias':>7} {'variance':>9} {'head':>7} {'cosine':>7} {'tokens':>9}")
    for row in study.estimators():
        report["rows"].append(row)
        print(_line(row), flush=True)
        write_json(arguments.json, report)


def _check(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    made = bool(arguments.drop) or arguments.bits is not None
    if not arguments.small and made == (arguments.student is not None):
        parser.error("argument --student: give one, or make one by --drop and --bits; not both")
    if arguments.bits is not None and not 2 <= arguments.bits <= 16:
        parser.error(f"argument --bits: {arguments.bits}; it must be from 2 to 16")
    if not arguments.temperature > 0:
        parser.error(f"argument --temperature: {arguments.temperature}; it must be > 0")


def _small(arguments: argparse.Namespace) -> Samples:
    with tempfile.TemporaryDirectory() as folder:
        make_pair(Path(folder), SMALL)
        (teacher, tokenizer), (student, _) = (load_model(f"{folder}/{name}") for name in ("teacher", "student"))
        texts = in_template(tokenizer, read_questions(Path(folder, "prompts.jsonl")))
    return _of_pair(arguments, Pair(teacher, student, tokenizer), texts)


def _sample(arguments: argparse.Namespace) -> Samples:
    teacher, tokenizer = load_model(arguments.teacher)
    if arguments.student is None:
        student = spoiled(teacher, arguments.drop, arguments.bits)
    else:
        student, _ = load_model(arguments.student)
    texts = chats(tokenizer) if arguments.prompts is None else in_template(tokenizer, read_questions(arguments.prompts))
    return _of_pair(arguments, Pair(teacher, student, tokenizer), texts)


def _of_pair(arguments: argparse.Namespace, pair: Pair, texts: list[str]) -> Samples:
    if len(texts) < arguments.completions:
        raise ValueError(f"argument --completions: {arguments.completions}, but there are {len(texts)} prompts")
    return sample(pair, texts[: arguments.completions], arguments.new_tokens, arguments.temperature)


def _pair(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.small:
        return {"label": arguments.label or "generated", "temperature": arguments.temperature}
    made = [f"less layers {', '.join(map(str, arguments.drop))}"] if arguments.drop else []
    made += [f"in {arguments.bits} bits"] if arguments.bits else []
    label = arguments.label or f"{arguments.teacher} → {arguments.student or ' '.join(made)}"
    names = ("teacher", "student", "drop", "bits", "temperature")
    return {"label": label, **{name: getattr(arguments, name) for name in names}}


def _line(row: dict[str, Any]) -> str:
    name = " ".join(
        str(row[key]) for key in ("estimator", "of", "k", "baseline", "parameter") if row[key] not in (None, "none")
    )
    tokens = "" if row["tokens"] is None else f"{row['tokens']:,.0f}"
    figures = f"{row['bias']:>7.3f} {row['variance']:>9.3g} {row['head_bias']:>7.3f} {row['cosine']:>7.3f}"
    return f"{name:>44} {figures} {tokens:>9}"
