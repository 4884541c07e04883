"""What is compared: four settings, which differ in what the student lacks, and the arms that go on from each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from series import Row

HERE, RUNS = Path(__file__).parent, Path("runs/reasoning")
MODELS = RUNS / "models"
ALL = 3169  # problems that are learned from


@dataclass(frozen=True)
class Setting:
    """A teacher and a student, and how many prompts there are."""

    title: str
    teacher: str  # plain: one style, the student's own; styled: three
    few: int
    more: tuple[int, ...]  # numbers of transcripts that more SFT reads besides
    careless: bool  # the student is the demo's careless one, else untrained
    long: int  # steps of `sft` on the transcripts of all prompts
    wide: bool = False  # two of the on-policy arms read all prompts too
    first: Row | None = None  # how it then learns from the few transcripts


@dataclass(frozen=True)
class Arm:
    """A way to go on, and the learning rates that are tried."""

    label: str
    config: str
    rates: tuple[float, float, float]
    settings: Row = field(default_factory=dict)

    @property
    def command(self) -> str:
        return "sft" if self.config == "sft" else "distill"


@dataclass(frozen=True)
class Run:
    """One run of an arm."""

    setting: str
    arm: str
    prompts: int
    rate: float
    seed: int

    @property
    def folder(self) -> Path:
        return RUNS / self.setting / f"{self.arm}-{self.prompts}-{self.rate:g}-{self.seed}"


SETTINGS = {
    "K": Setting(
        "facts are missing",
        "plain",
        300,
        (1200, ALL),
        careless=False,
        long=400,
        wide=True,
        first={"optim.steps": 250, "optim.lr": 4e-3, "optim.warmup_steps": 20},
    ),
    "P": Setting("a habit; the teacher writes as the student does", "plain", 100, (400, ALL), careless=True, long=400),
    "Z": Setting("a habit; the teacher writes in other ways", "styled", 100, (800, ALL), careless=True, long=800),
    "H": Setting(
        "half-trained on the teacher's transcripts",
        "styled",
        400,
        (ALL,),
        careless=True,
        long=400,
        first={"optim.steps": 100, "optim.lr": 1e-3},
    ),
}
TOP_K = {"loss.objective": "top_k", "loss.top_k": 3, "loss.top_k_tail": "sampled"}
ARMS = {
    "sft": Arm("more SFT", "sft", (3e-4, 1e-3, 3e-3)),
    "sampled": Arm("policy gradient", "distill", (2e-4, 5e-4, 1.25e-3)),
    "whole": Arm("reverse KL", "distill", (3e-4, 1e-3, 3e-3), {"loss.objective": "reverse_kl"}),
    "tail": Arm("top-k, sampled tail", "distill", (3e-4, 1e-3, 3e-3), TOP_K),
    "rl": Arm("RL", "rl", (5e-5, 1.5e-4, 5e-4)),
}
# Of the policy gradient at the rate that was chosen, each with one seed: not tuned themselves.
VARIANTS: dict[str, Row] = {
    "shuffled": {"loss.control": "shuffled"},
    "no_teacher": {"loss.control": "no_teacher"},
    "batch_16": {"sampling.prompts_per_step": 16},
    "batch_256": {"sampling.prompts_per_step": 256},
    "substeps_4": {"optim.substeps": 4},
}
CONTROLS = ("shuffled", "no_teacher")
LOWER = {"sft": (1e-4, 3e-4, 1e-3)}  # rates where the prompts are few
SHORT, MIDDLE = 100, 300  # steps of `sft` on the transcripts of few prompts, and of some
POINTS = 10  # evaluations of a run


def amounts(setting: str, arm: str) -> list[int]:
    """How many prompts an arm is given, one run after another."""
    given = SETTINGS[setting]
    if arm == "sft":
        return [given.few, *given.more]
    return [given.few, ALL] if given.wide and arm in ("sampled", "whole") else [given.few]


def rates(setting: str, arm: str, prompts: int) -> tuple[float, float, float]:
    return LOWER.get(arm, ARMS[arm].rates) if prompts == SETTINGS[setting].few else ARMS[arm].rates


def start(setting: str, seed: int) -> Path:
    """The student that all arms of a seed go on from."""
    return RUNS / setting / f"start-{seed}" / "student" if SETTINGS[setting].first else MODELS / "careless" / "student"


def rows_of(setting: str, seed: int) -> Path:
    """Prompts, answers and the teacher's transcripts, in an order of the seed's own."""
    return RUNS / f"{SETTINGS[setting].teacher}-{seed}.jsonl"


def first_stage(setting: str, seed: int) -> Row:
    """The settings of the run that makes the student."""
    given = SETTINGS[setting]
    begin = MODELS / "careless" / "student" if given.careless else MODELS / "student"
    common = {"student.path": begin, "data.path": rows_of(setting, seed), "data.limit": given.few, "seed": seed}
    return {**common, **(given.first or {}), "checkpoint.every": 0}


def settings_of(run: Run) -> Row:
    """What differs from the arm's config."""
    given = SETTINGS[run.setting]
    common = {
        "seed": run.seed,
        "student.path": start(run.setting, run.seed),
        "data.path": rows_of(run.setting, run.seed),
        "data.limit": run.prompts,
        "optim.lr": run.rate,
    }
    if run.arm == "sft":
        steps = {given.few: SHORT, ALL: given.long}.get(run.prompts, MIDDLE)
        return {**common, "optim.steps": steps, "checkpoint.every": steps // POINTS}
    if run.arm == "rl":
        return common
    settings = VARIANTS[run.arm] if run.arm in VARIANTS else ARMS[run.arm].settings
    return {**common, "teacher.path": MODELS / given.teacher / "student", **settings}
