"""The command line: what is understood, what is refused and in which words, and that help and refusals need no torch."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from launches import run_python
from run_settings import MINIMAL, arguments, config

from fastkl import __version__, cli
from fastkl.trainer.commands.command_line import COMMANDS, parse
from fastkl.trainer.commands.schema import full_names, in_words
from fastkl.trainer.commands.values import Misfit, node_of, read
from fastkl.trainer.config.training import DistillConfig, as_dict

YAML = """
run: runs/a
student:
  path: s
  lora: {rank: 8}
teacher: {path: t}
data: {path: d.jsonl}
optim:
  lr: 1e-4        # a number, though YAML 1.1 reads it as text
  betas: [0.8, 0.9]
"""


@pytest.mark.parametrize("flag", [[], ["--config"]], ids=["positional", "--config"])
def test_yaml_and_overrides(flag: list[str], empty_folder: Path) -> None:
    Path("run.yaml").write_text(YAML)
    command, parsed = parse(["distill", *flag, "run.yaml", "--optim.steps", "7", "--student.lora.rank=4"])
    assert command == "distill"
    assert isinstance(parsed, DistillConfig)
    assert parsed.optim.lr == 1e-4
    assert parsed.optim.betas == [0.8, 0.9]
    assert (parsed.optim.steps, parsed.student.lora.rank) == (7, 4)
    given = {name: getattr(parsed, name) for name in ("run", "student", "teacher", "data")}
    assert parsed.sampling == DistillConfig(**given).sampling  # what is not named has its default


def test_every_setting_goes_through_a_file(empty_folder: Path) -> None:
    """What config.yaml holds is read back as the same config, and so is each of its settings as a word."""
    settings: dict[str, object] = {
        "mixture": "{a: {data: {path: d, template_kwargs: {t: false, n: null, l: [{k: 1}]}}, weight: 2}, "
        "b: {data: {path: e}, teacher: {path: u}}}",
        "data.path": "null",
        "student.lora": "{rank: 4, target_modules: [q_proj, v_proj]}",
        "trackers": "[]",
        "optim": "{betas: [0.5, 0.75]}",
    }
    wanted = config("distill", MINIMAL["distill"] | settings)
    Path("run.yaml").write_text(yaml.safe_dump(as_dict(wanted)))
    assert parse(["distill", "run.yaml"]) == ("distill", wanted)


@pytest.mark.parametrize(
    ("text", "words", "wanted"),
    [
        ("mixed_precision: no", [], {"mixed_precision": "no"}),
        ("mixed_precision: false", [], {"mixed_precision": "no"}),
        ("student: {path: s, trust_remote_code: yes}", [], {"student.trust_remote_code": True}),
        ("student: {path: s, trust_remote_code: off}", [], {"student.trust_remote_code": False}),
        ("run: 2024", [], {"run": "2024"}),
        ("run: no", [], {"run": "no"}),
        ("run: 'null'", [], {"run": "null"}),
        ("data: {split: 1e3, path: x}", [], {"data.split": "1e3"}),
        ("optim: {steps: 1e3}", [], {"optim.steps": 1000}),
        ("optim: {steps: 1_000}", [], {"optim.steps": 1000}),
        ("optim.steps: 9", [], {"optim.steps": 9}),
        ("optim: # {lr: 1}", [], {"optim.lr": 1e-4}),
        ("data: &d {path: x, limit: 3}\neval: {data: {<<: *d, limit: 4}}", [], {"data.limit": 3, "eval.data.limit": 4}),
        ("", ["--eval.grader", "regex:a: [b"], {"eval.grader": "regex:a: [b"}),
        ("", ["--student.lora", "{rank: 3, alpha: 1}"], {"student.lora.rank": 3, "student.lora.alpha": 1.0}),
        (
            "",
            ["--student.lora.rank=3", "--student.lora.target_modules=[a, b]"],
            {"student.lora.target_modules": ["a", "b"]},
        ),
        ("", ["--trackers", "[]"], {"trackers": []}),
        (
            "data: {path: d, columns: {prompt: q, answer: a}, template_kwargs: {think: no, on: 'no'}}",
            ["--data.columns.prompt=1", "--data.template_kwargs.think=[1, x]"],
            {
                "data.columns": {"answer": "a", "prompt": "1"},
                "data.template_kwargs": {"on": "no", "think": [1, "x"]},
            },
        ),
        ("", ["--optim.max_grad_norm", "null"], {"optim.max_grad_norm": None}),
        ("optim: {lr: 1}", ["--optim.lr=2", "--optim.lr=3"], {"optim.lr": 3.0}),
    ],
)
def test_values_are_read_as_their_type(
    text: str, words: list[str], wanted: dict[str, object], empty_folder: Path
) -> None:
    """A word is what the setting is, whatever YAML 1.1 takes it for."""
    given = yaml.safe_load(text) or {}
    rest = {name: value for name, value in MINIMAL["distill"].items() if name.partition(".")[0] not in given}
    Path("run.yaml").write_text(text)
    _, parsed = parse(["distill", "run.yaml", *arguments("", rest)[1:], *words])
    for name, value in wanted.items():
        found: Any = parsed
        for part in name.split("."):
            found = getattr(found, part)
        assert found == value, name
        assert type(found) is type(value), name


def test_home_and_variables_in_paths(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    Path("run.yaml").write_text(
        "run: $SCRATCH/a\nstudent: {path: ~/s}\ndata: {path: '${SCRATCH}/d'}\nteacher: {path: t}"
    )
    _, parsed = parse(["distill", "run.yaml", "--eval.data.path", "$SCRATCH/e", "--eval.grader", "regex:^$HOME"])
    assert (parsed.run, parsed.student.path, parsed.data.path) == ("/scratch/a", "/home/me/s", "/scratch/d")
    assert (parsed.eval.data.path, parsed.eval.grader) == ("/scratch/e", "regex:^$HOME")
    served = ["--teacher.path", "", "--teacher.server.url", "http://a/v1", "--teacher.server.model", "m"]
    _, parsed = parse(["distill", "run.yaml", *served, "--teacher.tokenizer", "own:~/t"])
    assert parsed.teacher.tokenizer_path == "/home/me/t"


def test_home_and_variables_in_arguments(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In those that stand without a setting's name too."""
    monkeypatch.setenv("HOME", str(empty_folder))
    Path("run.yaml").write_text(YAML)
    for word in ("~/run.yaml", "$HOME/run.yaml"):
        assert parse(["distill", word]) == parse(["distill", "run.yaml"])
    report = parse(["report", "~/a", "${HOME}/b", "--output", "~/c.html"])[1]
    assert (report.runs, report.output) == ([f"{empty_folder}/a", f"{empty_folder}/b"], f"{empty_folder}/c.html")


@pytest.mark.parametrize(("steps", "logged", "said"), [(4, 4, False), (6, 5, True), (6, 0, False)])
def test_a_student_of_an_earlier_end_is_noted(
    steps: int, logged: int, said: bool, empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = Path("r/student")
    student.mkdir(parents=True)
    (student / "config.json").write_text("{}")
    Path("r/config.yaml").write_text(YAML + f"  steps: {steps}\neval: {{data: {{path: e}}}}\n")
    Path("r/metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, logged + 1)))
    Path("run.yaml").write_text(YAML)
    for line in (["eval", "r"], ["distill", "run.yaml", "--student.path", "r/student"]):
        parse(line)
        expected = [
            f"fastkl: r is at step {logged} of {steps}: it is not finished, and its student is that of an earlier end"
        ]
        assert capsys.readouterr().err.splitlines() == expected * said


# a file, more words, what is said
REFUSED: list[tuple[str, list[str], list[str]]] = [
    (YAML + "  lrr: 1\n", [], ["run.yaml:11: optim.lrr is no setting", "did you mean optim.lr?"]),
    (YAML + "optimizer: {lr: 1}\n", [], ["run.yaml:11: optimizer is no setting", "did you mean optim?"]),
    (YAML + "  steps: many\n", [], ["run.yaml:11: optim.steps is 'many'", "it must be a whole number"]),
    (YAML + "seed: 1.5\n", [], ["run.yaml:11: seed is 1.5", "a whole number"]),
    (YAML + "seed: [1]\n", [], ["run.yaml:11: seed is a list", "a whole number"]),
    (YAML + "seed:\n", [], ["run.yaml:11: seed is null", "a whole number"]),
    (YAML + "  warmup_steps: 500\n", [], ["run.yaml:11: optim.warmup_steps is 500"]),
    (YAML + "run: runs/b\n", [], ["run.yaml:11: run stands here twice"]),
    (YAML, ["--student.lora.rank=-4"], ["fastkl: student.lora.rank is -4"]),
    (YAML, ["--optim.lr", "fast"], ["--optim.lr is 'fast'", "it must be a number"]),
    (YAML, ["--optim.lr"], ["--optim.lr has no value"]),
    (YAML, ["--optim.lr", "--seed", "1"], ["--optim.lr has no value"]),
    (YAML, ["again.yaml"], ["'again.yaml' is no setting"]),
    (YAML, ["--optm.lr", "3"], ["--optm.lr is no setting", "did you mean optim.lr?"]),
    (YAML, ["--lr=3"], ["--lr is no setting", "did you mean optim.lr?"]),
    (YAML, ["--student.pth", "x"], ["--student.pth is no setting", "did you mean student.path?"]),
    (YAML, ["--sampler.top_p", "1"], ["--sampler.top_p is no setting", "sampling.top_p"]),
    (YAML, ["--optim.lr.peak", "1"], ["--optim.lr.peak is no setting"]),
    (YAML, ["--loss.objective", "rkl"], ["--loss.objective is 'rkl'", "one of policy_gradient, top_k, reverse_kl"]),
    (YAML, ["--loss.method", "dpo"], ["--loss.method is 'dpo'", "one of importance_sampling"]),
    (YAML, ["--trackers", "wandb"], ["--trackers is 'wandb'", "a list of texts, for example [wandb]"]),
    (YAML, ["--optim.betas", "0.9"], ["--optim.betas is 0.9", "a list of numbers, for example [0.9]"]),
    (YAML, ["--optim.betas", "[0.9,x]"], ["--optim.betas is a list; its entry 2 is 'x', and must be a number"]),
    (YAML, ["--learning_rate", "1"], ["--learning_rate is no setting; did you mean optim.lr?"]),
    (YAML, ["--optim.learning_rate", "1"], ["did you mean optim.lr?"]),
    (YAML, ["--mixture.a.weigth", "1"], ["--mixture.a.weigth is no setting; did you mean mixture.a.weight?"]),
    (YAML, ["--mixture.a.data.pth", "d"], ["did you mean mixture.a.data.path?"]),
    (YAML, ["--dry_run"], ["--dry_run is no setting; did you mean --dry-run?"]),
    (YAML, ["--run", " "], ["run is empty", "runs/first"]),
    (YAML, ["--optim.max_grad_norm", "x"], ["--optim.max_grad_norm is 'x'", "a number or null"]),
    (YAML, ["--teacher.quantization", "2bit"], ["--teacher.quantization is '2bit'", "one of 8bit, 4bit or null"]),
    (YAML, ["--student.trust_remote_code", "maybe"], ["--student.trust_remote_code is 'maybe'", "true or false"]),
    (YAML, ["--student", "tiny"], ["--student is 'tiny'", "write student: {path: tiny}"]),
    (YAML, ["--eval", "e.jsonl"], ["--eval is 'e.jsonl'", "write eval: {data: {path: e.jsonl}}"]),
    (YAML, ["--loss", "jsd"], ["--loss is 'jsd'", "write loss: {objective: jsd}"]),
    (YAML, ["--optim", "3"], ["--optim is 3", "it is a group of settings: lr, steps"]),
    (YAML, ["--mixture", "3"], ["--mixture is 3", "entries with names of your own"]),
    (YAML, ["--data.columns", "q"], ["--data.columns is 'q'", "entries with names of your own, each a value"]),
    (YAML, ["--teacher.server.url", "http://h/v1"], ["teacher.server.model is empty"]),
    (YAML, ["--data.path", "$NOWHERE/d"], ["--data.path is '$NOWHERE/d'", "$NOWHERE is not set"]),
    ("run: runs/a\nstudent: tiny\n", [], ["run.yaml:2: student is 'tiny'", "write student: {path: tiny}"]),
    ("student: {path: s}\n", [], ["run is not set"]),
    ("- run\n", [], ["run.yaml is no config", "name: value"]),
    ("just words\n", [], ["run.yaml is no config", "name: value"]),
    ("run: [", [], ["run.yaml:1 is not YAML"]),
    ("run: a\nstudent: {path: s\ndata: 1\n", [], ["run.yaml:3 is not YAML"]),
    ("run: a\n\tseed: 1\n", [], ["run.yaml:2 is not YAML"]),
    ("run: a\x00", [], ["run.yaml", "not YAML"]),
    ("? [a, b]\n: 1\n", [], ["run.yaml:1: a setting's name must be a word"]),
    ("student: &s {path: s, lora: *s}\n", [], ["student.lora.path is no setting"]),
]


@pytest.mark.parametrize(("text", "words", "parts"), REFUSED)
def test_refusals_name_line_setting_and_remedy(
    text: str, words: list[str], parts: list[str], empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("run.yaml").write_text(text)
    assert cli.main(["distill", "run.yaml", *words]) == 2
    error = capsys.readouterr().err
    assert [part for part in parts if part not in error] == [], error
    assert error.startswith("fastkl: ")
    assert error.count("\n") == 1
    assert [path.name for path in empty_folder.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (["distill"], ["name a config: fastkl distill CONFIG.yaml", "fastkl init"]),
        (["distill", "missing.yaml"], ["missing.yaml does not exist"]),
        (["distill", "."], ["without a config.yaml"]),
        (
            ["eval", "run.yaml"],
            ["run.yaml:2: run is no setting", "belongs to fastkl distill and sft", "takes model, eval"],
        ),
        (
            ["score", "run.yaml"],
            ["belongs to fastkl distill and sft", "CONFIG.yaml | RUN", "takes output, model, data"],
        ),
        (["eval", "run.yaml", "--dry-run"], ["fastkl distill and fastkl sft have --dry-run, fastkl eval has not"]),
        (["score", "--dry_run"], ["fastkl distill and fastkl sft have --dry-run, fastkl score has not"]),
        (["eval", "$NOWHERE/run"], ["config is '$NOWHERE/run', but $NOWHERE is not set"]),
        (["report", "$NOWHERE/run"], ["RUN is '$NOWHERE/run', but $NOWHERE is not set"]),
        (["report", " "], ["RUN is empty"]),
        (["sft", "run.yaml"], ["run.yaml:6: teacher is no setting", "belongs to fastkl distill"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_what_is_no_config_of_a_command(
    line: list[str], parts: list[str], empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("run.yaml").write_text(YAML)
    assert cli.main(line) == 2
    error = capsys.readouterr().err
    assert [part for part in parts if part not in error] == [], error
    assert error.count("\n") == 1


@pytest.mark.parametrize("line", [[], ["train"], ["report"], ["init", "s"]], ids=" ".join)
def test_command_lines_that_are_none(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(line)
    assert stop.value.code == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [bool, int, float, str, list[str], list[float], str | None, float | None])
@pytest.mark.parametrize(
    "text", ["", "null", "~", "no", "1", "1.5", "1e-4", ".inf", "x", "[a]", "{a: 1}", "*x", "'", "1:30"]
)
def test_a_value_is_of_its_type_or_refused(kind: Any, text: str) -> None:
    try:
        found = read(node_of(text, kind), kind)
    except Misfit:
        assert kind is not str
        assert in_words(kind)
        return
    bare = getattr(kind, "__origin__", kind)
    assert isinstance(found, bare)


def shown(line: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(line)
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(["--version"], capsys) == f"fastkl {__version__}\n"


@pytest.mark.parametrize("command", MINIMAL)
def test_help_explains_every_setting(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(shown([command, "--help"], capsys).split())
    assert f"fastkl {command} CONFIG.yaml" in text
    for setting in full_names(COMMANDS[command].config):
        assert text.count(f" --{setting} ") == 1, setting
        # From the name to the type: the value's placeholder, and the explanation.
        after = text.split(f"--{setting} ", 1)[1].split("(type", 1)[0]
        assert len(after.split()) > 2, f"--{setting} has no explanation"


def test_help_begins_with_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    names = re.findall(r"^  --([\w.]+) ", shown(["distill", "--help"], capsys), flags=re.MULTILINE)
    assert names[:4] == ["run", "student.path", "teacher.path", "data.path"]
    groups = list(dict.fromkeys(name.partition(".")[0] for name in names[4:] if "." in name))
    assert groups[:6] == ["student", "teacher", "data", "optim", "sampling", "loss"]


WITHOUT_TORCH = """
import sys
from fastkl.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as stop:
    status = stop.code
assert not {"torch", "transformers", "accelerate"} & sys.modules.keys()
sys.exit(status)
"""


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (["--help"], 0),
        (["distill", "--help"], 0),
        (["--version"], 0),
        (["init", "s", "t", "d.jsonl"], 0),
        (["distill", "--optim.lr=fast"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_without_torch(line: list[str], status: int) -> None:
    done = run_python(WITHOUT_TORCH, *line)
    assert done.returncode == status, done.stderr


def test_installed_command() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("fastkl"), "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize(
    ("missing", "line"), [("yaml", ["--help"]), ("transformers", arguments("sft", MINIMAL["sft"]))]
)
def test_missing_packages_are_named_with_what_installs_them(missing: str, line: list[str]) -> None:
    done = run_python(
        f"import sys; sys.modules[{missing!r}] = None; from fastkl.cli import main; sys.exit(main({line}))"
    )
    assert done.returncode == 2
    assert f"({missing})" in done.stderr
    assert re.search(r"pip install 'transformers>=[\d.]+' .* 'pyyaml>=\d+'", done.stderr)


def test_interruption_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastkl.trainer.commands.command_line.load", lambda name, dry: interrupted)
    assert cli.main(arguments("distill", MINIMAL["distill"])) == 130
    assert "goes on from its last checkpoint" in capsys.readouterr().err


SLOW_IMPORT = """
import sys, time, types
from fastkl import cli
from fastkl.trainer.commands import command_line

def load(name, dry):
    print("importing", flush=True)
    time.sleep(60)

command_line.load = load
sys.exit(cli.main(sys.argv[1:]))
"""


def test_interruption_of_the_imports_is_one_line() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_IMPORT, *arguments("distill", MINIMAL["distill"])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.startswith("fastkl: interrupted")
    assert error.count("\n") == 1
