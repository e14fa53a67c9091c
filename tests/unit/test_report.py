import json
import math
import re
import time
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicbert.cli import main
from mosaicbert.errors import DataError
from mosaicbert.report import report_at_end, write_report
from mosaicbert.report.charts import MAX_POINTS, charts_of, thin
from mosaicbert.report.page import build_page
from mosaicbert.report.runs import read_run
from mosaicbert.report.svg import draw, labels, ticks


def write_run(folder, name="run", steps=30, **config):
    folder.mkdir(parents=True)
    rows = []
    for batch in range(1, steps + 1):
        place = {
            "epoch": 0, "batch": batch, "sample": batch * 4, "token": batch * 500,
            "seconds": batch * 60.0,
        }  # fmt: skip
        rows.append(
            place
            | {
                "loss/train/total": 10 / batch,
                "lr": 1e-4 * batch,
                "l2_norm/grad/global": 1.0,
                "mask_rate": 0.3,
                "throughput/tokens_per_sec": 1000.0 + batch,
                "throughput/device/mfu": 0.4,
                "throughput/data_wait_share": 0.01,
                "memory/peak_allocated_mem": 28.0,
            }
        )
        if batch % 10 == 0:
            rows.append(
                place | {"metrics/eval/loss": 9 / batch, "metrics/eval/accuracy": batch / 100}
            )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"run_name": name, "max_duration": f"{steps}ba", **config}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    environment = {
        "versions": {"torch": "2.11.0"}, "gpus": ["NVIDIA H100"] * 8, "commit": "abcdef",
    }  # fmt: skip
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def write_glue(folder):
    folder.mkdir(parents=True)
    scores = [
        {"task": "rte", "metric": "accuracy", "mean": 81.4, "std": 0.51, "n": 5, "counts": True},
        {"task": "stsb", "metric": "pearson", "mean": None, "std": None, "n": 1, "counts": False},
    ]
    content = {"glue": 84.3, "is_complete": True, "task_means": {"rte": 81.4, "stsb": None}}
    (folder / "glue.json").write_text(json.dumps(content | {"scores": scores}))
    return folder


class Tags(HTMLParser):
    """Every tag and attribute, and whether tags close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.faults = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)


def test_every_curve_the_run_has_is_on_the_page(tmp_path):
    run = read_run(str(write_run(tmp_path / "run")))
    names = [chart.name for chart in charts_of([run])]
    assert names == [
        "loss-steps", "loss-tokens", "loss-hours", "eval-accuracy", "lr", "grad-norm", "mask-rate",
        "tokens-per-second", "mfu", "data-wait", "memory",
    ]  # fmt: skip
    page = build_page([run])
    tags = Tags(page)
    assert not tags.open
    assert not tags.faults
    assert [tag for tag, _ in tags.seen].count("svg") == len(names)
    for word in ("30 steps, finished", "8 x NVIDIA H100", "abcdef", "torch 2.11.0"):
        assert word in page
    assert ">0.3000<" in page  # the last accuracy


def test_lines_hold_the_values_of_the_run(tmp_path):
    run = read_run(str(write_run(tmp_path / "run", steps=3)))
    by_name = {chart.name: chart for chart in charts_of([run])}
    assert by_name["loss-hours"].lines[0].points[2] == (3 / 60, pytest.approx(10 / 3))
    assert by_name["loss-tokens"].lines[0].points[0] == (500, 10)


def test_nothing_is_loaded_and_nothing_runs(tmp_path):
    page = build_page([read_run(str(write_run(tmp_path / "run")))])
    tags = Tags(page)
    assert not {tag for tag, _ in tags.seen} & {"script", "link", "img", "iframe", "object"}
    assert not re.search(r"https?:|url\(|@import|\bon\w+=", page)


def test_names_and_settings_are_text_never_markup(tmp_path):
    evil = "<script>alert('x')</script>"
    folder = write_run(tmp_path / "run", name=evil, note='"><img src=x onerror=alert(1)>')
    row = {"epoch": 0, "batch": 31, "sample": 1, "token": 1, "seconds": 1.0}
    row[f"metrics/{evil}/acc&uracy"] = 0.5
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    run = read_run(str(folder))
    page = build_page([run, run], title=evil)
    tags = Tags(page)
    assert not tags.open
    assert not tags.faults
    assert not {tag for tag, _ in tags.seen} & {"script", "img"}
    assert "&lt;script&gt;" in page


def test_secrets_are_blanked_out_even_where_the_file_has_them(tmp_path):
    loggers = {"wandb": {"api_key": "s3cret-1"}}
    folder = write_run(tmp_path / "run", loggers=loggers, load_path="s3://me:s3cret-2@host/x")
    (folder / "environment.json").write_text(json.dumps({"hub_token": "s3cret-3"}))
    page = build_page([read_run(str(folder))])
    assert "s3cret" not in page
    assert page.count("***") == 3


def test_several_runs_are_compared_by_figures_and_settings(tmp_path):
    one = write_run(tmp_path / "one", name="one", seed=1, optimizer={"lr": 1e-4})
    two = write_run(tmp_path / "two", name="two", seed=1, optimizer={"lr": 2e-4}, steps=20)
    runs = [read_run(str(one)), read_run(str(two))]
    page = build_page(runs)
    assert "2 runs compared" in page
    different = page[
        page.index("Where the configurations differ") : page.index("Configuration and")
    ]
    assert "optimizer.lr" in different
    assert "max_duration" in different
    assert "seed" not in different
    loss = charts_of(runs)[0]
    assert {line.run for line in loss.lines} == {0, 1}
    assert "c0" in draw(loss)
    assert "c1" in draw(loss)


def test_glue_results_are_a_table_and_bars(tmp_path):
    run = read_run(str(write_glue(tmp_path / "glue")))
    page = build_page([run])
    assert "81.40 ± 0.51 (5)" in page
    assert "(stsb pearson)" in page
    assert "84.30" in page
    (chart,) = charts_of([run])
    assert draw(chart).count("<rect") == 1  # the task without a score has no bar


def test_a_gap_where_a_value_was_not_finite(tmp_path):
    folder = write_run(tmp_path / "run", steps=5)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows[2]["loss/train/total"] = None
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    svg = draw(charts_of([read_run(str(folder))])[0])
    path = re.search(r'class="line c0" d="([^"]*)"', svg)[1]
    assert path.count("M") == 2
    assert "nan" not in svg


def test_long_runs_are_thinned_to_means():
    points = [(float(i), float(i % 2)) for i in range(100_000)]
    found = thin(points)
    assert len(found) <= MAX_POINTS
    assert all(y == 0.5 for _, y in found)
    assert thin(points[:10]) == points[:10]


finite = st.floats(-1e12, 1e12, allow_nan=False)


@settings(max_examples=200, deadline=None)
@given(finite, finite)
def test_ticks_enclose_the_values_and_labels_tell_them_apart(a, b):
    low, high = min(a, b), max(a, b)
    if high > low and high - low < 1e-6 * max(abs(low), abs(high)):
        return  # closer than a picture can show
    found = ticks(low, high, 5)
    tolerance = 1e-6 * (found[-1] - found[0])
    assert found[0] <= low + tolerance
    assert found[-1] >= high - tolerance
    assert 2 <= len(found) <= 8


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.0005, 0.001], ["0", "0.0005", "0.0010"]),
        ([0.0, 5e-6, 1e-5], ["0", "5e-06", "1e-05"]),
        ([0.0, 50_000.0, 100_000.0], ["0", "50k", "100k"]),
        ([0.0, 2.5e9, 5e9], ["0", "2.5G", "5.0G"]),
        ([7.0, 8.0], ["7", "8"]),
    ],
)
def test_labels_are_short_and_exact(values, expected):
    found = labels(values)
    assert [text.replace("0.0e+00", "0") for text in found] == expected


def test_values_next_to_each_other_are_drawn():
    value = 0.43276706790505337
    assert len(labels(ticks(value, math.nextafter(value, 2), 5))) >= 2


def test_each_chart_has_its_own_picture(tmp_path):
    row = {"epoch": 0, "batch": 1, "sample": 1, "token": 1, "seconds": 1.0}
    for name, metric in (("cpu", "peak_rss"), ("gpu", "peak_allocated_mem")):
        folder = write_run(tmp_path / name, name=name, steps=1)
        (folder / "metrics.jsonl").write_text(json.dumps(row | {f"memory/{metric}": 2.5}) + "\n")
    runs = [read_run(str(tmp_path / name)) for name in ("cpu", "gpu")]
    names = [chart.name for chart in charts_of(runs)]
    assert len(names) == len(set(names)) == 2


def test_svg_is_well_formed_xml(tmp_path):
    run = read_run(str(write_run(tmp_path / "run", name="a<b>&c")))
    for chart in charts_of([run]):
        ElementTree.fromstring(draw(chart))


def test_the_same_run_gives_the_same_bytes(tmp_path):
    folder = str(write_run(tmp_path / "run"))
    first = write_report([folder], tmp_path / "a.html")[0].read_bytes()
    assert first == write_report([folder], tmp_path / "b.html")[0].read_bytes()


def test_the_command_writes_page_and_pictures(tmp_path, capsys):
    folder = write_run(tmp_path / "run", name="_$x$<b>", steps=1)
    row = {"epoch": 0, "batch": 1, "sample": 1, "token": 1, "seconds": 1.0, "lr": 0.1}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["report", str(folder)]) == 0
    pictures = sorted(path.name for path in (folder / "report-png").iterdir())
    assert pictures == ["lr.png"]
    assert (folder / "report-png" / "lr.png").read_bytes().startswith(b"\x89PNG")
    assert "(1 PNG)" in capsys.readouterr().out


def test_the_page_is_written_on_this_machine_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(write_run(tmp_path / "run")), "--out", "s3://b/a.html"]) == 2
    assert "--out s3://b/a.html is not on this machine" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [write_run(tmp_path / name, name="same") for name in ("one", "two")]
    runs = [read_run(str(folder)) for folder in [*folders, write_run(tmp_path / "x", name="other")]]
    page = build_page(runs)
    assert page.count("same (one)</th>") == page.count("same (two)</th>") >= 1
    assert "other</th>" in page


def test_what_is_no_run_folder_is_told(tmp_path):
    with pytest.raises(DataError, match="neither metrics"):
        read_run(str(tmp_path))
    with pytest.raises(DataError, match="no run folder"):
        read_run(str(tmp_path / "missing"))
    write_run(tmp_path / "runs/first")
    with pytest.raises(DataError, match=r"Runs in it: first\. Name"):
        read_run(str(tmp_path / "runs"))
    with pytest.raises(DataError, match="no way to nosuch://"):
        read_run("nosuch://bucket/run")
    folder = write_run(tmp_path / "run")
    (folder / "environment.json").write_text("{")
    with pytest.raises(DataError, match=r"environment\.json is damaged"):
        read_run(str(folder))


def test_a_run_in_a_store_is_read(tmp_path):
    folder = write_run(tmp_path / "run")
    assert read_run(f"file://{folder}").rows == read_run(str(folder)).rows


def test_a_failing_report_never_stops_a_run(tmp_path, caplog):
    folder = write_run(tmp_path / "run")
    (folder / "config.yaml").write_text(": : {")
    report_at_end(folder)
    assert "No report of" in caplog.text
    report_at_end(None)
    report_at_end(tmp_path / "missing")


@pytest.mark.parametrize("pictures", [True, False])
def test_a_run_of_a_minute_leaves_pictures_too(tmp_path, monkeypatch, pictures):
    folder = write_run(tmp_path / "run", steps=1)  # its one step took a minute
    if not pictures:
        text = (folder / "metrics.jsonl").read_text()
        (folder / "metrics.jsonl").write_text(text.replace("60.0", "59.0"))
    monkeypatch.setattr("mosaicbert.report.png._draw", lambda chart, runs, path: path.touch())
    report_at_end(folder)
    assert (folder / "report.html").exists()
    assert (folder / "report-png" / "loss-steps.png").exists() == pictures


def test_a_long_run_is_reported_quickly(tmp_path):
    folder = write_run(tmp_path / "run", steps=5_000)
    began = time.process_time()
    (page,) = write_report([str(folder)], tmp_path / "report.html")
    assert time.process_time() - began < 2
    assert page.stat().st_size < 300_000
