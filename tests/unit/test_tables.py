"""Reading tables: the same values from every format, and an error with its place for the rest."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicbert.data.tables import iter_table, read_table
from mosaicbert.errors import DataError

ROWS = [{"text": 'He said "no", twice', "label": "a"}, {"text": "naïve\nlines", "label": "b"}]
TABLE = {"text": [row["text"] for row in ROWS], "label": ["a", "b"]}
CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), min_size=1)


def write(path: Path, rows: list[dict[str, str]] = ROWS) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def fails(path: Path, *words: str, columns: list[str] | None = None) -> str:
    with pytest.raises(DataError) as caught:
        read_table(path, columns)
    message = str(caught.value)
    for word in (path.name, *words):
        assert word in message, message
    return message


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.json", "t.parquet"])
def test_every_format_gives_the_same_table(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name)
    assert read_table(path) == TABLE
    assert read_table(str(path), ["label", "text"]) == TABLE
    assert list(read_table(path, ["label", "text"])) == ["label", "text"]


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_gzip(tmp_path: Path, name: str) -> None:
    plain = write(tmp_path / name).read_bytes()
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(plain))
    assert read_table(packed) == TABLE
    packed.write_bytes(gzip.compress(plain)[:-12])
    fails(packed, "damaged")
    packed.write_bytes(plain)
    fails(packed, "damaged")


def test_tsv_takes_quotes_literally(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_bytes(b'text\tlabel\r\n"open\t1\r\nb "c" d\t0\r\n')
    assert read_table(path) == {"text": ['"open', 'b "c" d'], "label": ["1", "0"]}


def test_excel_byte_order_mark_is_no_part_of_the_header(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xef\xbb\xbftext,label\na,1\n")
    assert read_table(path, ["text"]) == {"text": ["a"]}


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=8))
def test_csv_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list) -> None:
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    write(path, [{"x": a, "y": b} for a, b in rows])
    assert read_table(path) == {"x": [a for a, _ in rows], "y": [b for _, b in rows]}


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
def test_parts_are_small_and_add_up(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [{"x": str(i)} for i in range(25)])
    parts = list(iter_table(path, batch_rows=10))
    assert [len(part["x"]) for part in parts] == [10, 10, 5]
    assert [x for part in parts for x in part["x"]] == [str(i) for i in range(25)]


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
def test_missing_column_names_those_there_are(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name)
    fails(path, '"lable"', 'Did you mean "label"?', '"text", "label"', columns=["text", "lable"])


def test_semicolons_are_guessed(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("text;label\na;1\n")
    fails(path, "semicolons", columns=["text"])


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl"])
def test_bad_bytes_name_their_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    line = b'{"text": "ok", "label": "1"}\n' if name.endswith("l") else b"ok\t1\n"
    path.write_bytes(line.replace(b"\t", b"," if name == "t.csv" else b"\t") * 2 + b"caf\xe9\n")
    fails(path, "line 3", "0xe9", "UTF-8")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", "a,b\n1,2\n3\n", ["line 3", "1 cells", "a, b"]),
        ("t.csv", 'a,b\n"x\ny",2\n3,4,5\n', ["line 4", "3 cells"]),
        ("t.csv", 'a,b\n1,2\n"open,3\n4,5\n', ["line 3", "malformed"]),
        ("t.csv", 'a,b\n"x"y,2\n', ["line 2", "malformed"]),
        ("t.csv", "a,a\n1,2\n", ["'a'", "more than once"]),
        ("t.csv", "\na,b\n", ["first line is empty"]),
        ("t.csv", "a,b\n1,2\n\n3,4\n", ["line 3", "empty"]),
        ("t.csv", "a,b\n", ["no rows"]),
        ("t.csv", "", ["no rows"]),
        ("t.tsv", "a\tb\n1\n", ["line 2", "1 cells"]),
        ("t.jsonl", '{"a": 1}\n{"a": \n', ["line 2", "not JSON"]),
        ("t.jsonl", '{"a": 1}\n[1]\n', ["line 2", "list"]),
        ("t.json", '[\n{"a": 1}\n]\n', ["line 1", "not JSON"]),
        ("t.jsonl", '{"a": 1}\n{"b": 1}\n', ["line 2", 'no column "a"']),
        ("t.jsonl", '{"a": 1}\n{"a": 1, "b": 2}\n', ["line 2", '"b"', "first line"]),
        ("t.jsonl", "", ["no rows"]),
        ("t.parquet", "PAR1 and no more", ["parquet"]),
        ("t.xlsx", "", [".csv"]),
    ],
)
def test_malformed_files(tmp_path: Path, name: str, content: str, words: list[str]) -> None:
    path = tmp_path / name
    path.write_text(content)
    fails(path, *words)


def test_blank_lines_may_end_a_file(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2\n\n\n")
    assert read_table(path) == {"a": ["1"], "b": ["2"]}


def test_empty_parquet_has_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), path)
    fails(path, "no rows")


def test_parquet_with_text_that_is_no_utf8(tmp_path):
    buffers = [None, pa.py_buffer(bytes([0, 0, 0, 0, 2, 0, 0, 0])), pa.py_buffer(b"\xff\xfe")]
    column = pa.Array.from_buffers(pa.string(), 1, buffers)
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="not a whole parquet file"):
        read_table(tmp_path / "a.parquet")


def test_missing_file_suggests_the_near_one(tmp_path: Path) -> None:
    write(tmp_path / "train.csv")
    fails(tmp_path / "trian.csv", "does not exist", 'Did you mean "train.csv"?')
    with pytest.raises(DataError, match="is a folder"):
        read_table(tmp_path)


def test_cells_may_be_long(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", [{"text": "x" * 300_000}])
    assert len(read_table(path)["text"][0]) == 300_000


def test_any_filesystem_that_fsspec_opens() -> None:
    import fsspec

    with fsspec.open("memory://folder/t.csv", "wb") as file:
        file.write(b"a\n1\n")
    assert read_table("memory://folder/t.csv") == {"a": ["1"]}
    with pytest.raises(DataError, match="cannot be opened"):
        read_table("memory://folder/none.csv")
