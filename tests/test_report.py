"""`fastkl report`: what is on the page, what cannot get into it, and which folders and files it refuses."""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState
from tiny import config, distillation, model_and_sums, save_model, tokenizer, training, write_jsonl

from fastkl import cli
from fastkl.trainer.config.errors import ConfigError
from fastkl.trainer.distill import distill
from fastkl.trainer.report import page as report
from fastkl.trainer.report.data import names, spread, thin
from fastkl.trainer.report.page import MARK, PAGE, SAMPLE_BYTES, SCRIPTS, write_report
from fastkl.trainer.sft import sft

HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>",
    "שלום",
    "\u202e",
    "👩🏽",
    "\ufffd",
    "&amp;",
    "\u2028\n",
    "",
]
SETTINGS: dict[str, Any] = {
    "seed": 0,
    "student": {"path": "models/small", "lora": {"rank": 0}},
    "teacher": {"path": "models/large"},
    "sampling": {"prompts_per_step": 4, "samples_per_prompt": 2},
    "optim": {"lr": 0.1, "steps": 3},
}


class Page(HTMLParser):
    """A page's elements, in order, and what its data block holds."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._contents: dict[int, str] = {}
        self._ended = False
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._ended = False

    def handle_endtag(self, tag: str) -> None:
        self._ended = True

    def handle_data(self, data: str) -> None:
        if not self._ended:
            self._contents[len(self.elements)] = self._contents.get(len(self.elements), "") + data

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in tags]

    def contents(self, wanted: str) -> list[str]:
        """The text right behind each start tag of a kind."""
        return [self._contents.get(n, "") for n, (tag, _) in enumerate(self.elements, start=1) if tag == wanted]

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.contents("script")[0])
        return found


def row(step: int, **values: float) -> dict[str, Any]:
    return {"step": step, "loss": 1 / (step + 1), "completions/mean_length": 3.0, "time/train": 0.5, **values}


def sample(step: int, tokens: Iterable[str] = ("a", "b", "c"), prompt: int = 1, **fields: Any) -> dict[str, Any]:
    tokens = list(tokens)
    counted = [place >= prompt for place in range(len(tokens))]
    return {
        "step": step,
        "text": "".join(tokens),
        "tokens": tokens,
        "ids": list(range(len(tokens))),
        "loss_mask": counted,
        "truncated": False,
        "sampler_logprobs": [-0.5 * bit for bit in counted],
        "teacher_logprobs": [-1.5 * bit for bit in counted],
        **fields,
    }


def make_run(
    folder: Path,
    rows: list[dict[str, Any]] | None = None,
    samples: list[dict[str, Any]] | None = None,
    settings: dict[str, Any] = SETTINGS,
) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    write_jsonl(
        folder / "metrics.jsonl", [row(step, teacher_kl=1 / step) for step in (1, 2, 3)] if rows is None else rows
    )
    write_jsonl(folder / "samples.jsonl", [sample(step) for step in (1, 2, 3)] if samples is None else samples)
    return folder


def page_of(*runs: Path, output: Path | None = None) -> Page:
    return Page(write_report(runs, output))


def only_run(run: Path) -> dict[str, Any]:
    (found,) = page_of(run).data["runs"]
    result: dict[str, Any] = found
    return result


def test_training_writes_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    model_and_sums(tmp_path, "small")
    save_model(tmp_path / "large", seed=1)
    small, data = tmp_path / "small", tmp_path / "sums.jsonl"
    distilled = distill(config("distill", distillation(tmp_path / "a", small, tmp_path / "large", data))).path
    tuned = sft(config("sft", training(tmp_path / "b", small, data))).path
    error = capsys.readouterr().err
    assert f"report in {distilled / 'report.html'}" in error
    assert f"report in {tuned / 'report.html'}" in error

    (run,) = Page(distilled / "report.html").data["runs"]
    assert (run["kind"], run["steps_done"], run["steps_planned"]) == ("distill", 3, 3)
    assert {"teacher_kl", "entropy", "loss", "sampler_mismatch/mean_abs", "time/sample"} <= run["series"].keys()
    assert run["seconds"].keys() == {"sample", "teacher", "old_logprobs", "ranks", "train"}
    assert run["x"].keys() == {"step", "tokens", "flops"}
    assert run["settings"]["optim.lr"] == "0.01"
    records = [json.loads(line) for line in (distilled / "samples.jsonl").read_text().splitlines()]
    assert run["x"]["tokens"][-1] == sum(sum(record["loss_mask"]) for record in records)
    assert run["samples"]["count"] == len(records) == 18
    first, record = run["samples"]["shown"][0], records[0]
    assert first["tokens"] == record["tokens"]
    assert len(first["sampler"]) == len(first["teacher"]) == first["mask"].count("1") == sum(record["loss_mask"])
    for field in ("student_ranks", "teacher_ranks"):
        assert first[field] == [
            rank for rank, counted in zip(record[field], record["loss_mask"], strict=True) if counted
        ]
        assert min(first[field]) >= 1
    assert first["teacher"][0] == pytest.approx(record["teacher_logprobs"][record["loss_mask"].index(True)], abs=1e-3)

    (run,) = Page(tuned / "report.html").data["runs"]
    assert run["kind"] == "sft"
    assert "teacher_kl" not in run["series"]
    assert all(shown["sampler"] == shown["teacher"] == [] for shown in run["samples"]["shown"])


def test_a_report_that_fails_does_not_fail_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(report, "write_report", broken)
    AcceleratorState._reset_state(reset_partial_state=True)
    model_and_sums(tmp_path, "small")
    done = sft(config("sft", training(tmp_path / "run", tmp_path / "small", tmp_path / "sums.jsonl", optim__steps=1)))
    assert (done.student / "config.json").is_file()
    assert "no report was written (MemoryError: no room); `fastkl report" in capsys.readouterr().err


def test_nothing_that_a_run_holds_becomes_markup(tmp_path: Path) -> None:
    name = "<b onclick=alert(1)>&"
    run = make_run(
        tmp_path / name,
        rows=[row(1, **{"</script><i>": 1.0})],
        samples=[sample(1, HOSTILE)],
        settings=SETTINGS | {"note": "</script><u>"},
    )
    page = page_of(run)
    assert len(page.all("script")) == 2
    assert not page.all("img", "b", "i", "u", "iframe")
    assert html.unescape(re.findall("<h1>(.*?)</h1>", page.text)[0]) == name
    (found,) = page.data["runs"]
    assert found["samples"]["shown"][0]["tokens"] == HOSTILE
    assert found["settings"]["note"] == "</script><u>"


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run"))
    addresses = set(re.findall(r"[a-z]+://[^\s\"'`]*", page.text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, which nothing fetches
    for attributes in page.all("a", "script", "link", "img", "form", "style"):
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
        assert "action" not in attributes
    assert "url(" not in page.text
    assert "@import" not in page.text


def test_only_the_pages_own_script_may_run(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run"))
    script = page.contents("script")[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert {file.name for file in PAGE.iterdir()} == {"page.html", "page.css", *SCRIPTS}
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|</script", script)


def test_structure_for_keyboards_and_screen_readers(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run"))
    assert page.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert MARK in page.text
    headings = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == headings.count(1) == 1
    assert all(next_ <= level + 1 for level, next_ in itertools.pairwise(headings))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    pointed = ("aria-labelledby", "aria-controls", "for")
    for _, attributes in page.elements:
        assert {attributes[name] for name in pointed if name in attributes} <= set(ids)
    for place, (tag, attributes) in enumerate(page.elements):
        assert int(attributes.get("tabindex") or 0) <= 0  # the order of focus is that of the text
        assert not any(name.startswith("on") for name in attributes)
        if tag in ("select", "input"):
            assert "label" in [before for before, _ in page.elements[place - 2 : place]]
        if tag == "section":
            assert attributes["aria-labelledby"]
    assert page.elements[[tag for tag, _ in page.elements].index("body") + 1][1]["href"] == "#completions"
    assert set(re.findall(r'byId\("([a-z-]+)"\)', page.contents("script")[1])) <= set(ids)


def test_several_runs_and_their_differences(tmp_path: Path) -> None:
    other = SETTINGS | {"optim": {"lr": 0.2, "steps": 3}, "student": {"path": "models/small", "lora": {"rank": 8}}}
    supervised = {"seed": 0, "student": SETTINGS["student"], "optim": SETTINGS["optim"], "examples_per_step": 5}
    runs = [
        make_run(tmp_path / "one" / "distill"),
        make_run(tmp_path / "two" / "distill", settings=other),
        make_run(tmp_path / "sft", rows=[row(1), row(2)], samples=[], settings=supervised),
    ]
    page = page_of(*runs[:2], output=tmp_path / "pages" / "two.html")
    assert [run["name"] for run in page.data["runs"]] == ["one/distill", "two/distill"]
    assert page.data["differences"] == ["optim.lr", "student.lora.rank"]
    page = page_of(*runs, output=tmp_path / "three.html")
    assert [run["name"] for run in page.data["runs"]] == ["one/distill", "two/distill", f"{tmp_path.name}/sft"]
    assert {"examples_per_step", "teacher.path"} <= set(page.data["differences"])
    assert page.data["runs"][2]["x"] == {"step": [1, 2], "tokens": [15, 30]}


def test_axes(tmp_path: Path) -> None:
    flops = {"flops/sampling": 1e12, "flops/teacher": 2e12, "flops/student": 3e12}
    start = {"step": 0, "eval/accuracy": 0.25}
    found = only_run(make_run(tmp_path / "run", rows=[start, row(1, **flops), row(2, **flops)]))
    assert found["x"] == {"step": [0, 1, 2], "tokens": [0, 24, 48], "flops": [0, 6e12, 12e12]}
    del flops["flops/teacher"]  # a served one: a total without it would flatter the run
    assert "flops" not in only_run(make_run(tmp_path / "served", rows=[start, row(1, **flops)]))["x"]
    assert found["series"]["eval/accuracy"] == {"at": [0], "values": [0.25]}
    assert found["series"]["loss"]["at"] == [1, 2]
    assert found["seconds"] == {"train": 1.0}


def test_an_interrupted_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", settings=SETTINGS | {"optim": {"steps": 100}})
    for file in ("metrics.jsonl", "samples.jsonl"):
        text = (run / file).read_text()
        (run / file).write_text(text[: -len(text.splitlines()[-1]) // 2 - 1])
    found = only_run(run)
    assert (found["steps_done"], found["steps_planned"]) == (2, 100)
    assert [shown["step"] for shown in found["samples"]["shown"]] == [1, 2]


def test_ranks_where_a_run_has_them(tmp_path: Path) -> None:
    ranked = sample(2, student_ranks=[0, 1, 3], teacher_ranks=[0, 250, 0])
    served = sample(3, student_ranks=[0, 1, 3], teacher_ranks=[])
    found = only_run(make_run(tmp_path / "run", samples=[sample(1), ranked, served]))["samples"]["shown"]
    assert [shown["student_ranks"] for shown in found] == [[], [1, 3], [1, 3]]
    assert [shown["teacher_ranks"] for shown in found] == [[], [250, 0], []]


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    rows = [row(1, teacher_kl=float("nan")), row(2, teacher_kl=float("inf")), row(3, teacher_kl=0.5)]
    strange = sample(1, teacher_logprobs=[0.0, float("nan"), float("-inf")])
    found = only_run(make_run(tmp_path / "run", rows=rows, samples=[strange]))
    assert found["series"]["teacher_kl"]["values"] == ["nan", "inf", 0.5]
    assert found["samples"]["shown"][0]["teacher"] == ["nan", "-inf"]


def test_size_is_bounded_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    rows = [
        row(step, teacher_kl=(step * 7919) % 1000, **{f"m/{n}": n * step / 7 for n in range(20)})
        for step in range(4000)
    ]
    rows[1234]["teacher_kl"], rows[2345]["teacher_kl"] = 1e6, float("nan")
    samples = [sample(step, ["word "] * 1500) for step in range(100) for _ in range(10)]
    run = make_run(tmp_path / "run", rows=rows, samples=samples)
    page = page_of(run)
    (found,) = page.data["runs"]
    assert len(page.text) < SAMPLE_BYTES + 2_000_000
    assert {1e6, "nan"} <= set(found["series"]["teacher_kl"]["values"])
    shown = found["samples"]["shown"]
    assert (found["samples"]["count"], found["samples"]["steps"]) == (1000, 100)
    assert 10 < len(shown) < 320
    assert {0, 99} <= {one["step"] for one in shown}
    assert [(one["step"], one["number"]) for one in shown] == sorted((one["step"], one["number"]) for one in shown)


def test_points_and_steps_are_thinned_evenly() -> None:
    points = [(place, float(place % 10)) for place in range(10_000)]
    kept = thin(points, 600)
    assert len(kept) <= 602
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert max(after[0] - before[0] for before, after in itertools.pairwise(kept)) <= 100
    assert thin(points[:600], 600) == points[:600]
    assert spread(3, 5) == [0, 1, 2]
    assert spread(101, 5) == [0, 100, 50, 25, 75]
    assert len(set(spread(1000, 40))) == 40


def test_names_are_as_short_as_they_can_be() -> None:
    assert names([Path("runs/a"), Path("runs/b")]) == ["a", "b"]
    assert names([Path("x/a"), Path("y/a")]) == ["x/a", "y/a"]
    with pytest.raises(ConfigError, match="named twice"):
        names([Path("runs/a"), Path("runs/../runs/a")])


def test_texts_of_tokens_without_a_record(tmp_path: Path) -> None:
    """From tokenizer.json alone: what else a folder wants to have run is not run."""
    words = tokenizer()
    ids = words("1+2")["input_ids"]
    bare = sample(1, "1+2")
    del bare["tokens"]
    known = make_run(tmp_path / "known", samples=[{**bare, "ids": ids}])
    words.save_pretrained(known / "student")
    trap = {"auto_map": {"AutoTokenizer": ["trap.Trap", None]}, "tokenizer_class": "Trap"}
    (known / "student" / "tokenizer_config.json").write_text(json.dumps(trap))
    (known / "student" / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass Trap: pass\n")
    assert only_run(known)["samples"]["shown"][0]["tokens"] == ["1", "+", "2"]
    assert not (tmp_path / "sprung").exists()
    unknown = make_run(tmp_path / "unknown", samples=[{**bare, "ids": ids}])
    assert only_run(unknown)["samples"]["shown"][0]["tokens"] == [f"⟨{token}⟩" for token in ids]


def test_its_own_older_page_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    first = write_report([run]).read_bytes()
    assert write_report([run]).read_bytes() == first
    (run / "report.html").write_text("my notes")
    with pytest.raises(ConfigError, match="no report of fastkl's; move it away or choose another name"):
        write_report([run])
    assert (run / "report.html").read_text() == "my notes"


def empty_run(folder: Path) -> None:
    make_run(folder, rows=[])


def no_run(folder: Path) -> None:
    folder.mkdir()


def bad_settings(folder: Path) -> None:
    make_run(folder)
    (folder / "config.yaml").write_text("optim: [")


def no_settings(folder: Path) -> None:
    make_run(folder)
    (folder / "config.yaml").write_text("nothing")


@pytest.mark.parametrize(
    ("prepare", "line", "parts"),
    [
        (no_run, ["run"], ["run/config.yaml does not exist", "name a run folder"]),
        (no_run, ["missing"], ["missing/config.yaml does not exist", "name a run folder"]),
        (empty_run, ["run"], ["run/metrics.jsonl has no complete row yet", "report again"]),
        (bad_settings, ["run"], ["run/config.yaml cannot be read as YAML"]),
        (no_settings, ["run"], ["run/config.yaml holds no settings", "name a run folder"]),
        (make_run, ["run", "other"], ["output is not set", "2 runs", "--output FILE"]),
        (make_run, ["run", "run", "--output", "o.html"], ["named twice", "name each once"]),
        (make_run, ["run", "--output", "run"], ["output run is a folder", "run/report.html"]),
        (make_run, ["run", "--output", "run/config.yaml"], ["run/config.yaml exists already", "another name"]),
        (make_run, ["run", "--output", "run/config.yaml/o.html"], ["cannot be written", "choose another"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else getattr(value, "__name__", None),
)
def test_refused_command_lines(
    prepare: Any,
    line: list[str],
    parts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    prepare(Path("run"))
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["report", *line]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastkl: ")
    assert error.count("\n") == 1
    assert [part for part in parts if part not in error] == [], error
    assert sorted(tmp_path.rglob("*")) == before


def test_command_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [make_run(Path(name)) for name in ("a", "b")]
    assert cli.main(["report", "a"]) == 0
    assert cli.main(["report", "a", "b", "--output", "pages/both.html"]) == 0
    assert capsys.readouterr().out == "report written to a/report.html\nreport written to pages/both.html\n"
    assert len(Page(Path("pages/both.html")).data["runs"]) == len(runs)
    for line, status in ((["report"], 2), (["report", "--help"], 0)):
        with pytest.raises(SystemExit) as stop:
            cli.main(line)
        assert stop.value.code == status
    assert "fastkl report RUN [RUN ...] [--output FILE]" in capsys.readouterr().out


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Drives the page as a keyboard would, from around it: the page itself lets no other script run.
DRIVER = """<!doctype html>
<iframe style="width: 360px; height: 700px; border: 0" srcdoc="{page}"></iframe>
<pre></pre>
<script>
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => setTimeout(() => {{
  const page = frame.contentDocument;
  const all = (selector) => [...page.querySelectorAll(selector)];
  const text = (selector) => all(selector).map((node) => node.textContent);
  const press = (key) => {{
    const event = new frame.contentWindow.KeyboardEvent("keydown", {{key, bubbles: true}});
    page.activeElement.dispatchEvent(event);
  }};
  const result = {{
    width: page.documentElement.scrollWidth,
    figures: text("figcaption"),
    readouts: text("#learning .readout"),
    axes: text("#axes label"),
    warnings: text(".warning"),
    rows: text("#settings tbody th"),
    scored: text(".scored"),
    worst: text("#worst li strong"),
    stops: all(".scored[tabindex='0']").length,
    images: page.images.length,
    origin: page.querySelector("#origin").textContent,
    curves: all("#learning .line").filter((line) => /\\dL\\d/.test(line.getAttribute("d"))).length,
  }};
  page.querySelector("#worst button").click();
  result.ranked = all(".scored").map((node) => node.getAttribute("aria-label").split("rank: ")[1] ?? "");
  result.first = page.querySelector("#token").textContent;
  press("Home");
  press("ArrowLeft");
  result.home = page.activeElement.textContent;
  press("ArrowRight");
  result.next = page.activeElement.getAttribute("aria-label");
  const cursor = page.querySelector("#cursor");
  cursor.value = 0;
  cursor.dispatchEvent(new Event("input"));
  result.position = cursor.getAttribute("aria-valuetext");
  result.moved = text("#learning .readout");
  document.querySelector("pre").textContent = JSON.stringify(result);
}}, 300));
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_in_a_browser_as_wide_as_a_phone(tmp_path: Path) -> None:
    hostile = sample(3, ["<u>", *HOSTILE], teacher_logprobs=[0.0, *(-0.5 - n for n in range(len(HOSTILE)))])
    hostile |= {"dataset": HOSTILE[0], "reward": 0.5}
    hostile["student_ranks"] = [0, *range(1, len(HOSTILE)), 0]
    hostile["teacher_ranks"] = [0, 12345, *[7] * (len(HOSTILE) - 1)]
    rows = [row(1, teacher_kl=3.0), row(2, teacher_kl=float("nan")), row(3, teacher_kl=1.0), row(4, teacher_kl=0.5)]
    run = make_run(tmp_path / "run", rows=rows, samples=[sample(1), hostile])
    other = make_run(tmp_path / "other", settings=SETTINGS | {"optim": {"lr": 1e-5, "steps": 3}})
    page = write_report([run, other], tmp_path / "both.html").read_text(encoding="utf-8")
    driver = tmp_path / "driver.html"
    driver.write_text(DRIVER.format(page=html.escape(page)), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run(
        [str(BROWSER), *options, f"--user-data-dir={tmp_path / 'profile'}", driver.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    found = json.loads(html.unescape(re.findall("<pre>(.*?)</pre>", done.stdout, flags=re.DOTALL)[0]))
    assert found["width"] <= 360
    assert found["figures"][:2] == ["teacher_kl, nats per token", "loss"]
    assert found["axes"] == ["steps", "completion tokens"]
    assert found["warnings"] == ["run: not a finite number at step 2"]
    assert found["rows"] == ["optim.lr"]
    assert found["curves"] == 4
    assert found["images"] == 0
    assert found["origin"] == f"data set {HOSTILE[0]}, reward 0.5"
    assert [text.replace("↵", "") for text in found["scored"]] == [*HOSTILE[:-1], "∅"]
    assert found["worst"][0] == "∅"
    assert len(found["worst"]) == len(HOSTILE) - 1  # the first has the teacher's own log-prob
    assert found["stops"] == 1
    assert found["first"].startswith('token""id9')
    assert found["home"] == HOSTILE[0]
    assert found["next"] == f"{json.dumps(HOSTILE[1])}, reverse KL 1.00, rank: student 2, teacher 7"
    assert found["ranked"][0] == "student 1, teacher 12,345"
    assert found["ranked"][-1] == "teacher 7"
    assert found["first"].endswith("rank (1: the likeliest)teacher 7")
    assert found["position"] == "step 1"
    assert found["moved"][0].startswith("run3")
    assert found["readouts"][0].startswith("run0.5")
