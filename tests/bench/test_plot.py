"""The figures of the benches: what is drawn, from which rows."""

import json
from pathlib import Path

import pytest
from bench_cases import bench_refusal
from matplotlib.image import imread

from bench.__main__ import main
from bench.commands.plot import draw, measured, read, sweep


def row(n, d, v, impl="fastkl", ms=1.0, op="logprobs"):
    return {
        **{"impl": impl, "op": op, "head": "frozen", "dtype": "fp32", "device": "cpu", "shape": [n, d, v]},
        **{"forward_backward_ms": ms, "peak_extra_mb": 2 * ms},
    }


def write(file, rows, date="2026-01-01T00:00:00+00:00", **machine):
    machine = {"cpu": "EPYC", "threads": 2, **machine}
    file.write_text(json.dumps({"rows": rows, "conditions": {}, "machine": machine, "date": date}))
    return str(file)


def test_draws_a_figure_for_each_sweep(tmp_path, capsys):
    rows = [row(n, 8, 64, impl) for n in (4, 8, 16) for impl in ("fastkl", "eager")]
    rows += [row(4, 8, v, op="reverse_kl") for v in (64, 128)] + [row(4, 8, 64, op="policy_gradient")]
    main(["plot", write(tmp_path / "a.json", rows), "--out", str(tmp_path / "figures")])
    drawn = sorted(file.name for file in (tmp_path / "figures").iterdir())
    assert drawn == [f"{op}-frozen-fp32-peaked-epyc-2-threads.png" for op in ("logprobs", "reverse_kl")]
    assert capsys.readouterr().out.count(".png\n") == 2
    assert imread(tmp_path / "figures" / drawn[0])[..., :3].mean() > 0.8  # a light background


def test_the_later_measurement_counts(tmp_path):
    old = write(tmp_path / "z.json", [row(4, 8, 64, ms=9.0), row(8, 8, 64, ms=9.0)])
    new = write(tmp_path / "a.json", [row(4, 8, 64, ms=1.0)], date="2026-01-02T00:00:00+00:00")
    (rows,) = measured(read([tmp_path / name for name in (new, old)])).values()
    assert [r["forward_backward_ms"] for r in rows] == [1.0, 9.0]


def test_reads_files_of_several_reports(tmp_path):
    reports = [json.loads(Path(write(tmp_path / "a.json", [row(n, 8, 64)])).read_text()) for n in (4, 8)]
    (tmp_path / "both.json").write_text(json.dumps({"reports": reports, "missing": []}))
    (rows,) = measured(read([tmp_path / "both.json"])).values()
    assert [r["shape"][0] for r in rows] == [4, 8]


def test_machines_share_no_line(tmp_path):
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    write(files[0], [row(4, 8, 64)])
    write(files[1], [row(8, 8, 64)], gpu="H200")
    assert [key[-1] for key in measured(read(files))] == ["EPYC, 2 threads", "H200"]


def test_sweep_is_the_longest_series_along_one_axis():
    rows = [row(4, 8, 64), row(8, 8, 64), row(16, 8, 64), row(4, 8, 128), row(8, 8, 128)]
    assert [r["shape"] for r in sweep(rows, "N")] == [[4, 8, 64], [8, 8, 64], [16, 8, 64]]
    assert [r["shape"] for r in sweep(rows, "V")] == [[4, 8, 64], [4, 8, 128]]
    assert sweep(rows, "D") == []


def test_what_the_bench_writes_can_be_drawn(tmp_path):
    file = tmp_path / "sweep.json"
    shape = ["--shape", "4,8,70", "--sweep", "N=4,8", "--repeats", "1"]
    main(["loss", *shape, "--impl", "eager", "--json", str(file)])
    ((key, rows),) = measured(read([file])).items()
    assert draw(key, rows, tmp_path).exists()


def test_what_bench_sparse_writes_can_be_drawn(tmp_path, capsys):
    file = tmp_path / "sparse.json"
    shape = ["--shape", "32,16,400", "--blocks", "8,16", "--seeds", "1"]
    main(["sparse", *shape, "--data", "peaked", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert {row["block"] for row in rows} == {8, 16}
    for row in rows:
        assert 0 < row["kept"] <= 1
        assert row["kept"] == 1 or row["hidden"] > 0
    main(["plot", str(file), "--out", str(tmp_path)])
    assert (tmp_path / "sparse.png").exists()
    assert "columns kept" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps({"rows": [], "conditions": {}, "machine": {"gpu": "H200"}, "date": "2026"}), "no sweep in there"),
        ("{}", "no sweep in there"),
        ('{"rows": [1]}', "cannot be read as a report of the bench: KeyError: 'date'"),
        ("no json", "cannot be read as a report of the bench: JSONDecodeError"),
    ],
)
def test_files_without_a_sweep_are_refused(tmp_path, capsys, text, message):
    (tmp_path / "a.json").write_text(text)
    assert message in bench_refusal(capsys, "plot", str(tmp_path / "a.json"), "--out", str(tmp_path / "figures"))
    assert not (tmp_path / "figures").exists()
