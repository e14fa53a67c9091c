import io
import json
import os
import time

import pytest
import yaml
from rich.console import Console

from mosaicbert.cli import main
from mosaicbert.errors import DataError
from mosaicbert.watch import QUIET_SECONDS, Tail, View, watch


def row(batch, epoch=0, **metrics):
    place = {"epoch": epoch, "batch": batch, "sample": batch * 4, "token": batch * 9}
    return place | {"seconds": batch * 10.0} | metrics


def step(batch, epoch=0):
    return row(batch, epoch, **{"loss/train/total": 10 / batch, "lr": 1e-4})


def text_of(rows):
    return "".join(json.dumps(r) + "\n" for r in rows)


@pytest.fixture
def folder(tmp_path):
    config = {"run_name": "run", "max_duration": "10ba", "console_log_interval": "1ba"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def add(folder, rows):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(text_of(rows))


def pipe():
    return Console(file=io.StringIO(), width=80, highlight=False)


def terminal():
    return Console(file=io.StringIO(), width=80, force_terminal=True, highlight=False)


def lines(console):
    return console.file.getvalue().splitlines()


def test_rows_are_given_out_once_and_only_whole_lines(folder):
    tail = Tail(str(folder))
    assert tail.new_rows() == ([], False)
    add(folder, [step(1)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 0, "ba')
    assert [r["batch"] for r in tail.new_rows()[0]] == [1]
    assert tail.new_rows() == ([], False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(text_of([step(2)])[len('{"epoch": 0, "ba') :])
    assert [r["batch"] for r in tail.new_rows()[0]] == [2]


@pytest.mark.parametrize("num_rows", [1, 7, 8])
def test_a_resumed_run_that_rewrote_the_file_is_read_anew(folder, num_rows):
    add(folder, [step(batch) for batch in range(1, 6)])
    tail = Tail(str(folder))
    assert len(tail.new_rows()[0]) == 5
    rows = [row(batch, **{"loss/train/total": 1.0, "other": 2}) for batch in range(1, num_rows + 1)]
    (folder / "metrics.jsonl").write_text(text_of(rows))
    found, again = tail.new_rows()
    assert again
    assert [r["batch"] for r in found] == list(range(1, num_rows + 1))


def test_a_run_is_followed_to_its_end(folder):
    add(folder, [step(1), row(1, **{"metrics/eval/loss": 2.5}), step(2)])
    rest = iter(
        [[step(3)], [], [step(b) for b in range(4, 11)], [row(10, **{"checkpoint/batch": 10})]]
    )
    console = pipe()
    watch(str(folder), console=console, sleep=lambda _: add(folder, next(rest, [])))
    shown = lines(console)
    assert shown[0] == "eval at ba 1: loss 2.5000"
    assert shown[1].startswith("ba 2/10  loss 5.0000  lr 1.00e-04")
    assert [line.split()[1] for line in shown if line.startswith("ba ")] == [
        f"{batch}/10" for batch in range(2, 11)
    ]
    assert shown[-2:] == ["checkpoint at ba 10", "The run is finished."]


def test_the_time_left_is_the_runs_own_clock(folder):
    add(folder, [step(batch) for batch in range(1, 6)])
    console = pipe()
    watch(str(folder), console=console, once=True)
    assert lines(console)[-1].endswith("50s left")


def test_a_dead_run_shows_its_last_state_and_how_old_it_is(folder):
    add(folder, [step(1), step(2)])
    old = time.time() - 3 * QUIET_SECONDS
    os.utime(folder / "metrics.jsonl", (old, old))
    console = pipe()
    watch(str(folder), console=console, once=True)
    assert lines(console)[0].startswith("ba 2/10")
    assert lines(console)[1].startswith("No news for 3m0")


def test_a_terminal_gets_the_display_of_the_run_itself(folder):
    add(folder, [step(1), row(1, **{"metrics/eval/loss": 2.5}), *(step(b) for b in range(2, 11))])
    console = terminal()
    watch(str(folder), console=console, sleep=lambda _: None)
    text = console.file.getvalue()
    assert "ba 10/10" in text
    assert "100%" in text
    assert "last eval at ba 1" in text


def test_the_length_of_an_epoch_is_learnt(folder):
    view = View(pipe(), {"max_duration": "2ep"})
    view.catch_up([step(b, epoch=0) for b in range(1, 4)])
    assert view.course.batches_per_epoch is None
    view.show(step(4, epoch=1))
    view.show(step(6, epoch=1))
    assert view.course.batches_per_epoch == 4
    assert not view.is_done
    view.show(step(8, epoch=2))
    assert view.is_done


def test_values_that_were_not_finite_are_shown(folder):
    add(folder, [row(1, **{"loss/train/total": None})])
    console = pipe()
    watch(str(folder), console=console, once=True)
    assert "loss nan" in lines(console)[0]


def test_a_run_in_a_store_is_followed(folder):
    add(folder, [step(10)])
    console = pipe()
    watch(f"file://{folder}", console=console, sleep=lambda _: None)
    assert lines(console)[-1] == "The run is finished."


def test_what_is_no_run_is_told(folder, tmp_path, capsys):
    assert main(["watch", str(tmp_path / "missing")]) == 2
    assert "no run folder" in capsys.readouterr().err
    glue = tmp_path / "glue"
    (glue / "jobs" / "rte-19").mkdir(parents=True)
    with pytest.raises(DataError, match=r"one of its jobs, such as .*/jobs/rte-19"):
        watch(str(glue))
    console = pipe()
    watch(str(folder), console=console, once=True)
    assert "no step yet" in lines(console)[0]
