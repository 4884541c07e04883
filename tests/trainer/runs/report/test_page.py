"""The report's page: nothing gets into it that is not its own, and it is fit for keyboards, screen readers and phones."""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from report_cases import SETTINGS, make_run, page_of, row, sample

from fastkl.trainer.runs.report.page import MARK, PAGE, SCRIPTS, write_report

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


def test_nothing_that_a_run_holds_becomes_markup(tmp_path: Path) -> None:
    name = "<b onclick=alert(1)>&"
    run = make_run(
        tmp_path / name,
        rows=[row(1, **{"</script><i>": 1.0})],
        samples=[sample(1, HOSTILE)],
        settings=SETTINGS | {"note": "</script><u>"},
    )
    change = {"step": 1, "setting": "</script><s>", "was": "<u>", "is": ["<i>"]}
    (run / "changes.jsonl").write_text(json.dumps(change) + "\n")
    page = page_of(run)
    assert len(page.all("script")) == 2
    assert not page.all("img", "b", "i", "u", "s", "iframe")
    assert html.unescape(re.findall("<h1>(.*?)</h1>", page.text)[0]) == name
    (found,) = page.data["runs"]
    assert found["samples"]["shown"][0]["tokens"] == HOSTILE
    assert found["settings"]["note"] == "</script><u>"
    assert found["changes"][0]["texts"] == ['</script><s>: <u> → ["<i>"]']


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
    changes: text("#changes li"),
    tooltips: text("#learning figure:first-child .change title"),
  }};
  page.querySelector("#worst button").click();
  result.ranked = all(".scored").map((node) => node.getAttribute("aria-label").split("rank: ")[1] ?? "");
  result.first = page.querySelector("#token").textContent;
  const folded = page.querySelector("#token details");
  result.folded = folded.open;
  folded.open = true;
  press("Home");
  press("ArrowLeft");
  result.home = page.activeElement.textContent;
  press("ArrowRight");
  result.next = page.activeElement.getAttribute("aria-label");
  result.detail = text("#token summary, #token details .text");
  result.unfolded = page.querySelector("#token details").open;
  const cursor = page.querySelector("#cursor");
  cursor.value = 0;
  cursor.dispatchEvent(new Event("input"));
  result.position = cursor.getAttribute("aria-valuetext");
  result.moved = text("#learning .readout");
  frame.style.width = "1200px";
  page.querySelector("#worst button").click();
  result.lines = new Set(all("#token dl > div").map((cell) => cell.offsetTop)).size;
  result.high = Math.max(...all("#token dl > div").slice(1).map((cell) => cell.offsetHeight));
  document.querySelector("pre").textContent = JSON.stringify(result);
}}, 300));
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_in_a_browser_as_wide_as_a_phone(tmp_path: Path) -> None:
    hostile = sample(3, ["<u>", *HOSTILE], teacher_logprobs=[0.0, *(-0.5 - n for n in range(len(HOSTILE)))])
    hostile |= {"dataset": HOSTILE[0], "reward": 0.5}
    hostile["student_ranks"] = [0, *range(1, len(HOSTILE)), 0]
    hostile["teacher_ranks"] = [0, 12345, *[7] * (len(HOSTILE) - 2), 150321]
    hostile["student_ranks"][-1] = 150322
    hostile |= {"teacher_text": HOSTILE[0], "teacher_prompt": [1, 2]}
    hostile["plain_logprobs"] = [0.0, *[-2.0] * len(HOSTILE)]
    rows = [row(1, teacher_kl=3.0), row(2, teacher_kl=float("nan")), row(3, teacher_kl=1.0), row(4, teacher_kl=0.5)]
    run = make_run(tmp_path / "run", rows=rows, samples=[sample(1), hostile])
    change = {"step": 2, "setting": HOSTILE[0], "was": None, "is": 2e-5}
    (run / "changes.jsonl").write_text(json.dumps(change) + "\n")
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
    assert found["ranked"][1] == "student 2, teacher 7"
    assert "rank (1: the likeliest)student 150,322, teacher 150,321" in found["first"]
    assert found["folded"] is False
    assert found["unfolded"] is True  # and stays so from token to token
    read = "What the teacher had read, 2 tokens; without it the log-prob is -2.000, 0.500 nats lower"
    assert found["detail"] == [read, HOSTILE[0]]
    assert [text.strip() for text in found["changes"]] == [f"run, after step 2: {HOSTILE[0]}: null → 2e-05"]
    assert found["tooltips"] == [f"after step 2: {HOSTILE[0]}: null → 2e-05"]
    assert found["lines"] == 1
    assert found["high"] < 50  # a line of words, a line of numbers
    assert found["position"] == "step 1"
    assert found["moved"][0].startswith("run3")
    assert found["readouts"][0].startswith("run0.5")
