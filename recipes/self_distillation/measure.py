"""What a model does with a context it learns to do without: a rule of its system prompt, or a task that examples show.

    python recipes/self_distillation/measure.py probe                       # which contexts it obeys at all
    python recipes/self_distillation/measure.py rule                        # all arms, seeds 0 and 1
    python recipes/self_distillation/measure.py examples distill --seeds 2  # one arm, one seed

recipes/smollm2/make.py says what to install. Everything is kept in runs/self_distillation: what is complete is not run
again, what was interrupted goes on. The results of a part are in PART/results.json there, the answers beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from rules import GRADED_ABOUT, LEARNED_ABOUT, RULES, obeys, questions
from tasks import TASKS, is_right, parts_of_kind

from fastkl.trainer.runs.files import read_jsonl, write_text

HERE, RUNS, BASE = Path(__file__).parent, Path("runs/self_distillation"), Path("runs/smollm2/teacher")
Row = dict[str, Any]
UNTRAINED = ("plain", "prompted")  # the model without and with the context
SAMPLED_TOKENS = {"objective": "policy_gradient", "top_k_direction": "reverse"}
ARMS: dict[str, Row] = {
    "distill": {},
    "shuffled": {"control": "shuffled"},
    "sampled": SAMPLED_TOKENS,
    "no_teacher": {**SAMPLED_TOKENS, "control": "no_teacher"},
    "sft": {},
}


@dataclass(frozen=True)
class Part:
    """A context, what is learned with it and how that is graded."""

    name: str
    learned: list[Row]
    graded: list[Row]
    examples: list[Row]
    does: Callable[[str, Row], bool]
    max_new_tokens: int  # in grading

    @property
    def folder(self) -> Path:
        return RUNS / self.name

    @cached_property
    def config(self) -> Any:
        from fastkl.trainer.commands.command_line import parse

        return parse(["distill", str(HERE / f"{self.name}.yaml")])[1]

    def chat(self, row: Row, *, prompted: bool) -> list[dict[str, str]]:
        """What the teacher reads where `prompted`, else what the student reads."""
        turns = []
        if prompted:
            system = self.config.teacher.context.system
            turns += [("system", system)] if system else []
            for example in self.examples:
                turns += [("user", example["prompt"]), ("assistant", example["completion"])]
        return chat_of([*turns, ("user", row["prompt"])])


def parts() -> dict[str, Part]:
    examples, learned, graded = parts_of_kind()
    rule = Part(
        "rule",
        list(questions(LEARNED_ABOUT)),
        list(questions(GRADED_ABOUT)),
        [],
        lambda text, _: obeys(text, "spanish"),
        16,
    )
    # A row's own completion is the right answer: nobody who learns may see it.
    unsolved = [{"prompt": row["prompt"], "answer": row["answer"]} for row in learned]
    task = Part("examples", unsolved, graded, examples, lambda text, row: is_right(text, row["answer"]), 6)
    return {part.name: part for part in (rule, task)}


def main() -> None:
    given = arguments()
    os.environ |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "HF_HUB_OFFLINE": "1"}
    if not (BASE / "config.json").exists():
        subprocess.run([sys.executable, HERE.parent / "smollm2" / "make.py"], check=True)
    if given.part == "probe":
        probe()
        return
    part = parts()[given.part]
    prepare(part)
    for name in UNTRAINED:
        grade(part, name, BASE, prompted=name == "prompted")
    for seed in given.seeds:
        for arm in given.arms or ARMS:
            train(part, arm, seed)
            grade(part, f"{arm}-{seed}", part.folder / f"{arm}-{seed}" / "student")
    print(table(json.loads((part.folder / "results.json").read_text())))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["probe", "rule", "examples"])
    parser.add_argument("arms", nargs="*", help=f"some of {', '.join(ARMS)}; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    given = parser.parse_args()
    if unknown := set(given.arms) - set(ARMS):
        parser.error(f"no such arm: {', '.join(sorted(unknown))}; take some of {', '.join(ARMS)}")
    return given


def prepare(part: Part) -> None:
    part.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", part.learned), ("examples", part.examples)):
        write_rows(part.folder / f"{name}.jsonl", rows)


def train(part: Part, arm: str, seed: int) -> None:
    """`fastkl distill` or `sft`, in a process of its own; one that is complete ends at once."""
    folder = part.folder / f"{arm}-{seed}"
    settings: Row = {"run": folder, "seed": seed}
    if arm == "sft":
        settings |= write_outputs(part, seed)
        fastkl("sft", HERE / "sft.yaml", settings)
    else:
        fastkl("distill", HERE / f"{part.name}.yaml", settings | {f"loss.{k}": v for k, v in ARMS[arm].items()})


def fastkl(command: str, config: Path, settings: Row) -> None:
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    subprocess.run([sys.executable, "-m", "fastkl.cli", command, str(config), *options], check=True)


def write_outputs(part: Part, seed: int) -> Row:
    """Lets the prompted model write what `sft` learns from; that and learning it costs the FLOPs of `distill`."""
    path, plan = part.folder / f"written-{seed}.jsonl", part.folder / f"written-{seed}.json"
    if not plan.exists():  # written last
        rows, writing, learning = written(part, seed, total_flops(part.folder / f"distill-{seed}"))
        write_rows(path, rows)
        per_step = sft_config().examples_per_step
        steps = len(rows) // per_step
        write_text(plan, json.dumps({"steps": steps, "writing": writing, "learning": learning}) + "\n")
    return {"data.path": path, "optim.steps": json.loads(plan.read_text())["steps"]}


def sft_config() -> Any:
    from fastkl.trainer.commands.command_line import parse

    return parse(["sft", str(HERE / "sft.yaml")])[1]


def total_flops(run: Path) -> float:
    rows = read_jsonl(run / "metrics.jsonl")
    if not rows:
        sys.exit(f"{run} is missing: run the arm distill with this seed first, whose FLOPs sft may spend")
    return sum(value for row in rows for name, value in row.items() if name.startswith("flops/"))


def written(part: Part, seed: int, budget: float) -> tuple[list[Row], float, float]:
    """Rows with outputs of the prompted model, and the FLOPs to write them and to learn them, together the budget."""
    import torch
    from evaluate import Model

    from fastkl.trainer.models.loading import outline_of_student
    from fastkl.trainer.models.pretrained import outline
    from fastkl.trainer.models.sizes.flops import cost_of, sampling_flops, training_flops

    torch.manual_seed(seed)
    student = sft_config().student
    model, writer, learner = Model(BASE), cost_of(outline(student)), cost_of(outline_of_student(student))
    rows: list[Row] = []
    writing = learning = 0.0
    while writing + learning < budget:
        asked = [part.learned[index] for index in torch.randperm(len(part.learned))[:16].tolist()]
        count = part.config.sampling.max_new_tokens
        texts = model.answers([part.chat(row, prompted=True) for row in asked], count, sampled=True)
        for row, text in zip(asked, texts, strict=True):
            if text.strip():
                rows.append({"prompt": row["prompt"], "completion": text})
                writing += sampling_flops(writer, [model.sample(part.chat(row, prompted=True), text)])
                learning += training_flops(learner, [model.sample(part.chat(row, prompted=False), text)])
    return rows, writing, learning


def grade(part: Part, name: str, path: Path, *, prompted: bool = False) -> None:
    """Adds a model to the results, once."""
    results = part.folder / "results.json"
    known = json.loads(results.read_text()) if results.exists() else {}
    if name in known:
        return
    from evaluate import Model

    model = Model(path)
    texts = model.answers([part.chat(row, prompted=prompted) for row in part.graded], part.max_new_tokens)
    rows = [{**row, "completion": text} for row, text in zip(part.graded, texts, strict=True)]
    write_rows(part.folder / f"answers-{name}.jsonl", rows)
    known[name] = {"does": fmean(part.does(row["completion"], row) for row in rows)}
    if not prompted:  # what is forgotten is asked without the context
        known[name] |= model.kept()
    if name not in UNTRAINED:
        known[name]["flops"] = total_flops(path.parent)
    if name.startswith("sft-"):
        plan = part.folder / f"written-{name.removeprefix('sft-')}.json"
        known[name]["flops"] += json.loads(plan.read_text())["writing"]
    write_text(results, json.dumps(known, indent=1) + "\n")
    print(name, json.dumps(known[name]), flush=True)


COLUMNS = {
    "does": ("does it", "{:.0%}"),
    "novel_perplexity": ("perplexity, novel", "{:.2f}"),
    "solutions_perplexity": ("perplexity, solutions", "{:.2f}"),
    "capitals": ("capitals", "{:.0%}"),
    "flops": ("FLOPs", "{:.1e}"),
}


def table(results: dict[str, Row]) -> str:
    """The results in Markdown."""
    lines = [["", *(title for title, _ in COLUMNS.values())], ["---"] * (len(COLUMNS) + 1)]
    for name, row in results.items():
        lines.append([name, *(form.format(row[key]) if key in row else "" for key, (_, form) in COLUMNS.items())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def probe() -> None:
    """How often the model obeys each context without being trained: greedy answers, and samples at temperature 1."""
    from evaluate import Model

    model, asked = Model(BASE), [row["prompt"] for row in questions(GRADED_ABOUT)][::4]
    for name, (system, _) in RULES.items():
        chats = [chat_of([("system", system), ("user", question)]) for question in asked]
        both = [model.answers(chats, 32, sampled=sampled) for sampled in (False, True)]
        print("rule", name, *(f"{fmean(obeys(text, name) for text in texts):.0%}" for texts in both), flush=True)
    for name, pairs in TASKS.items():
        shown, tried = list(pairs.items())[:8], list(pairs.items())[8:24]
        for count in (0, 4, 8):
            turns = [turn for word, answer in shown[:count] for turn in (("user", word), ("assistant", answer))]
            chats = [chat_of([*turns, ("user", word)]) for word, _ in tried]
            both = [model.answers(chats, 8, sampled=sampled) for sampled in (False, True)]
            right = [fmean(is_right(t, a.lower()) for t, (_, a) in zip(texts, tried, strict=True)) for texts in both]
            print("task", name, f"{count} examples", *(f"{share:.0%}" for share in right), flush=True)


def chat_of(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
