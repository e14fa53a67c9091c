"""Tables out: what was written is read again, whole or not at all."""

import csv
import json
from datetime import date
from decimal import Decimal

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicbert.data.table_writer import open_table
from mosaicbert.data.tables import read_table
from mosaicbert.errors import ConfigError, DataError

TEXT = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0\r"))
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "text": TEXT,
            "p": st.floats(allow_nan=False, allow_infinity=False) | st.none(),
            "tags": st.lists(TEXT),
        }
    ),
    min_size=1,
)


def write(path, rows, cut=2):
    with open_table(path) as append:
        for start in range(0, len(rows), cut):
            part = rows[start : start + cut]
            append({name: [row[name] for row in part] for name in rows[0]})


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@given(rows=ROWS)
def test_rows_survive(tmp_path_factory, suffix, rows):
    path = tmp_path_factory.mktemp("t") / f"a{suffix}"
    write(path, rows)
    if suffix == ".jsonl":
        found = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    else:
        with path.open(newline="") as file:
            found = list(csv.DictReader(file))
        for row in found:
            row["p"] = float(row["p"]) if row["p"] else None
            row["tags"] = json.loads(row["tags"])
    assert found == rows


def test_parquet(tmp_path):
    rows = [{"a": "x", "p": [0.5]}, {"a": None, "p": []}, {"a": "z", "p": None}]
    write(tmp_path / "sub/a.parquet", rows)
    assert pq.read_table(tmp_path / "sub/a.parquet").to_pylist() == rows
    assert read_table(tmp_path / "sub/a.parquet")["a"] == ["x", None, "z"]


def test_parquet_keeps_its_types(tmp_path):
    with pytest.raises(DataError, match="changes its type"):
        write(tmp_path / "a.parquet", [{"a": 1}, {"a": 2}, {"a": "x"}])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "values",
    [
        [3, 3, 2.75, 4],
        [None, None, "late", None],
        [[], [], ["toxic"], []],
        [None, None, [[0.5]], []],
        [0.5, 0.25, None, 2],
        [{"a": None}, {"a": None}, {"a": 1}, None],
        [Decimal("1.5"), None, Decimal("1234.125"), Decimal("0.1")],
        [date(2026, 1, 2), None, date(2026, 1, 3), None],
        [None, None, None, None],
    ],
)
def test_parquet_alters_no_value(tmp_path, values):
    rows = [{"id": i, "kept": value} for i, value in enumerate(values)]
    write(tmp_path / "a.parquet", rows)
    assert pq.read_table(tmp_path / "a.parquet").to_pylist() == rows
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_lists_of_dates_in_csv(tmp_path):
    write(tmp_path / "a.csv", [{"a": [date(2026, 1, 2)]}])
    assert (tmp_path / "a.csv").read_text() == 'a\n"[""2026-01-02""]"\n'


@pytest.mark.parametrize("values", [[2**53 + 1, 1, 0.5], [0.5, 1.5, 2**53 + 1], [1, 1, 2**70]])
def test_what_parquet_would_alter_is_told(tmp_path, values):
    with pytest.raises(DataError, match=r"Write \.jsonl"):
        write(tmp_path / "a.parquet", [{"a": value} for value in values])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_an_error_leaves_the_old_file(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_text("old")

    def fail():
        with open_table(path) as append:
            append({"a": [1]})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "old"


def test_where_nothing_can_be_written(tmp_path):
    with (
        pytest.raises(ConfigError, match=r"\.jsonl, \.csv, \.parquet"),
        open_table(tmp_path / "a.x"),
    ):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"), open_table(tmp_path / "file/a.csv"):
        pass
