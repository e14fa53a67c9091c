"""Bad input at scale: readers are fed with mutations of good files.

A reader may give a result or raise an error of `MosaicBertError`'s family. Anything else is a
fault: another exception, a crash of the interpreter, more than `MEMORY_BYTES` of new memory, or
more than `SECONDS` for one input. Each reader works in a process of its own.
"""

import gzip
import io
import json
import mmap
import os
import random
import resource
import signal
import struct
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from mosaicbert.errors import DataError, MosaicBertError

MEMORY_BYTES = 2 << 30
SECONDS = 20
"""A generous limit for a machine with other work; what is meant is a hang."""
FEW = 20
"""Faults of a reader that are noted; it goes on counting."""
NUMBERS = (0, 1, 2, 127, 128, 255, 256, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 60)
WORDS = (
    b"null", b"true", b"-1", b"1e999", b"NaN", b"[", b"]", b"{", b"}", b'"', b"'", b"\\",
    b"\\ud800",
    b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r", b"\n", b"\t", b",", b";", b":", b"${", b"}", b"&a ",
    b"*a", b"!!python/object/apply:os.system ", b"../", b"/", b"99999999999999999999", b"0.06dur",
    b"[" * 3000, b"{\"a\":" * 3000, b"x" * 5000, b"\xf0\x9f\x98\x80", b" ", b"- ", b"? ", b"|",
    b"%",
)  # fmt: skip


class TooLong(BaseException):
    """One input took more than `SECONDS`."""


@dataclass
class Row:
    """What one reader did."""

    inputs: int = 0
    read: int = 0
    refused: int = 0
    num_faults: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


def mutate(good: Sequence[bytes], dice: random.Random) -> bytes:
    """One of the good inputs with up to eight changes."""
    data = bytearray(dice.choice(good))
    for _ in range(dice.choice((1, 1, 1, 2, 2, 4, 8))):
        at = dice.randrange(len(data) + 1)
        size = min(dice.choice((1, 1, 2, 4, 8, 64)), len(data) - at)
        kind = dice.randrange(8)
        if kind == 0 and size:
            data[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            data[at:at] = dice.choice(WORDS)
        elif kind == 2:
            del data[at : at + size * dice.choice((1, 1, 16))]
        elif kind == 3:
            number = dice.choice(NUMBERS)
            packed = struct.pack("<Q", number)[: dice.choice((2, 4, 4, 8))]
            at -= at % 4 if dice.random() < 0.5 else 0
            data[at : at + len(packed)] = packed
        elif kind == 4:
            data[at:at] = data[at : at + 64] * dice.choice((1, 2, 20))
        elif kind == 5:
            del data[at:]
        elif kind == 6:
            other = dice.choice(good)
            data[at:] = other[dice.randrange(len(other) + 1) :]
        else:
            data[at : at + size] = dice.randbytes(size)
    return bytes(data)


# --- readers --------------------------------------------------------------------------------------

Reader = Callable[[bytes], Any]


def _yaml(folder: Path) -> tuple[list[bytes], Reader]:
    from mosaicbert.config import GlueConfig, PretrainConfig, load_config

    root = Path(__file__).parents[2] / "yamls"
    texts = [(root / "test" / name).read_bytes() for name in ("main.yaml", "glue.yaml")]
    short = b"model: {name: mosaic_bert}\nmax_duration: 10ba\nglobal_train_batch_size: 8\n"
    short += b"train_loader:\n  dataset:\n    local: ${a}\na: x\n"
    path = folder / "x.yaml"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        load_config(GlueConfig if b"\ntasks:" in data else PretrainConfig, path)

    return [*texts, *[short] * 30], read  # the short one is read ten times as fast


def _override(folder: Path) -> tuple[list[bytes], Reader]:
    from mosaicbert.config import PretrainConfig, load_config

    base = {"model": {}, "max_duration": "1ba", "global_train_batch_size": 8}
    base["train_loader"] = {"dataset": {"local": "x"}}
    good = [b"max_duration=3ba", b"model.name=hf_bert", b"optimizer.betas=[0.9,0.98]"]
    good += [
        b"train_loader.dataset.streams={a: {local: x}}",
        b"seed=17",
        b"run_name=${max_duration}",
    ]

    def read(data: bytes) -> None:
        load_config(PretrainConfig, base, [data.decode("utf-8", "surrogateescape")])

    return good, read


def _time(folder: Path) -> tuple[list[bytes], Reader]:
    from mosaicbert.duration import Duration

    good = [
        b"10ba",
        b"286720000sp",
        b"0.06dur",
        b"1h30m",
        b"3ep",
        b"1e6tok",
        b"600sec",
        b"1d2h3m4s",
    ]
    return good, lambda data: str(Duration.parse(data.decode("utf-8", "replace")))


def _sets(folder: Path, compression: str | None) -> list[Path]:
    from mosaicbert.data.mds import MDSWriter

    made = folder / f"set-{compression}"
    with MDSWriter(made, {"text": "str", "n": "int"}, hashes=(), compression=compression) as writer:
        for number in range(12):
            writer.write({"text": f"text {number} " * (number + 1), "n": number})
    return sorted(made.iterdir())


def _index(folder: Path) -> tuple[list[bytes], Reader]:
    from mosaicbert.data.mds_index import parse_index

    index = next(path for path in _sets(folder, "zstd") if path.name == "index.json")
    plain = next(path for path in _sets(folder, None) if path.name == "index.json")
    return [index.read_bytes(), plain.read_bytes()], lambda data: parse_index(data, "index.json")


def _shard(folder: Path) -> tuple[list[bytes], Reader]:
    from dataclasses import replace

    from mosaicbert.data.mds import Shard, read_index
    from mosaicbert.data.mds_index import parse_shard

    _, path = sorted(_sets(folder, None))
    (info,) = read_index(path.parent / "index.json")

    def read(data: bytes) -> None:
        path.write_bytes(data)
        try:  # as its index would be
            as_told = parse_shard(replace(info, raw_bytes=len(data)).to_json())
        except ValueError as error:
            raise DataError(str(error)) from error
        shard = Shard(path, as_told)
        for i in range(len(shard)):
            _ = shard[i]
            shard.raw(i, "text")
        shard.close()

    return [path.read_bytes()], read


def _packed_shard(folder: Path) -> tuple[list[bytes], Reader]:
    from dataclasses import replace

    from mosaicbert.data.mds import ensure_raw, read_index

    _, path = sorted(_sets(folder, "zstd"))
    (info,) = read_index(path.parent / "index.json")

    def read(data: bytes) -> None:
        path.write_bytes(data)
        (path.parent / info.raw_basename).unlink(missing_ok=True)
        ensure_raw(path.parent, replace(info, zip_bytes=len(data)))

    return [path.read_bytes()], read


def _table(name: str, good: list[bytes]) -> Callable[[Path], tuple[list[bytes], Reader]]:
    def make(folder: Path) -> tuple[list[bytes], Reader]:
        from mosaicbert.data.tables import read_table

        path = folder / name

        def read(data: bytes) -> None:
            path.write_bytes(data)
            read_table(path, ["text", "label"])

        return good, read

    return make


def _parquet(folder: Path) -> tuple[list[bytes], Reader]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": ["a", "bc", "d"], "label": [0, 1, 0]}), buffer)
    return _table("x.parquet", [buffer.getvalue()])(folder)


def _source(name: str, good: list[bytes]) -> Callable[[Path], tuple[list[bytes], Reader]]:
    """What `convert` reads."""

    def make(folder: Path) -> tuple[list[bytes], Reader]:
        from mosaicbert.data.documents import documents
        from mosaicbert.data.sources import cut_into_pieces, find_files

        path = folder / name

        def read(data: bytes) -> None:
            path.write_bytes(data)
            for parts in cut_into_pieces(find_files(path), 1 << 20, False):
                for part in parts:
                    for _ in documents(part, "text", False, lambda size: None):
                        pass

        return good, read

    return make


def _resume(folder: Path) -> tuple[list[bytes], Reader]:
    """A checkpoint of a run: any of its three files damaged, then the way a run takes it in."""
    import torch

    from mosaicbert.config.jobs import TrainerConfig
    from mosaicbert.train.distributed import Ranks
    from mosaicbert.train.optim import build_optimizer
    from mosaicbert.train.saving import Saving

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    values: dict[str, Any] = {"max_duration": "4ba", "global_train_batch_size": 4}
    values |= {"save_folder": str(folder / "save"), "autoresume": True}
    config = TrainerConfig(**values)
    ranks = Ranks(0, 1, 0, torch.device("cpu"))

    def saving() -> Saving:
        optimizer = build_optimizer(model, config.optimizer, ranks)
        return Saving(config, ranks, model, optimizer, torch.amp.GradScaler(enabled=False), None)

    from mosaicbert.duration import Progress

    first = saving()
    first.start()
    model(torch.ones(1, 3)).sum().backward()
    first.optimizer.step()
    first.save(Progress(batch=1, sample=4, token=9))
    first.close()
    made = folder / "save" / "ep0-ba1"
    names = [*(path.name for path in sorted(made.iterdir())), "../latest"]
    good = {name: (made / name).read_bytes() for name in names}

    def read(data: bytes) -> None:
        number, data = (data or b"x")[0] % len(names), data[1:]
        for name in names:
            (made / name).write_bytes(data if name == names[number] else good[name])
        again = saving()
        progress = again.start()
        again.watch([])
        again.optimizer.step()
        _ = progress.fraction_of(_total())

    return [bytes([n]) + good[name] for n, name in enumerate(names)], read


def _total() -> Any:
    from mosaicbert.duration import Duration

    return Duration.parse("4ba")


def _weights(folder: Path) -> tuple[list[bytes], Reader]:
    """`mosaicbert.load` on safetensors, torch's two formats, and the configuration beside them."""
    import torch
    from safetensors.torch import save

    from mosaicbert.config import ModelConfig
    from mosaicbert.models.build import build_model
    from mosaicbert.models.checkpoints import load

    shape = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    settings = ModelConfig(**{"model_config": {**shape, "intermediate_size": 4}})
    model: Any = build_model(settings, "mlm", max_seq_len=4, vocab_size=8)
    model.config.save_pretrained(folder)
    names = ["config.json", "model.safetensors", "new.pt", "old.pt"]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state.pop("cls.predictions.decoder.weight", None)
    good = {"config.json": (folder / "config.json").read_bytes(), "model.safetensors": save(state)}
    for name, zipped in (("new.pt", True), ("old.pt", False)):
        buffer = io.BytesIO()
        torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
        good[name] = buffer.getvalue()

    def read(data: bytes) -> None:
        name, data = names[(data or b"x")[0] % len(names)], data[1:]
        for path in folder.iterdir():
            path.unlink()
        (folder / name).write_bytes(data)
        if name == "config.json":
            (folder / "model.safetensors").write_bytes(good["model.safetensors"])
        load(folder)

    return [bytes([n]) + good[name] for n, name in enumerate(names)], read


def _tokenizer(folder: Path) -> tuple[list[bytes], Reader]:
    from transformers import BertTokenizerFast

    from mosaicbert.data.tokenizers import encode_truncated, load_tokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s"]
    (folder / "vocab.txt").write_text("\n".join(words))
    made = folder / "made"
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(made)
    names = ["tokenizer.json", "tokenizer_config.json"]
    good = {name: (made / name).read_bytes() for name in names}

    def read(data: bytes) -> None:
        name, data = names[(data or b"x")[0] % 2], data[1:]
        for other in names:
            (made / other).write_bytes(data if other == name else good[other])
        encode_truncated(load_tokenizer(str(made)), ["the cats"], 8)

    return [bytes([n]) + good[name] for n, name in enumerate(names)], read


CSV = b'text,label\n"a, b",0\nc,1\n'
JSONL = b'{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n'
READERS: dict[str, Callable[[Path], tuple[list[bytes], Reader]]] = {
    "yaml": _yaml,
    "override": _override,
    "time": _time,
    "index": _index,
    "shard": _shard,
    "packed-shard": _packed_shard,
    "csv": _table("x.csv", [CSV]),
    "tsv": _table("x.tsv", [b"text\tlabel\na\t0\nb\t1\n"]),
    "jsonl": _table("x.jsonl", [JSONL]),
    "jsonl-gz": _table("x.jsonl.gz", [gzip.compress(JSONL)]),
    "parquet": _parquet,
    "convert-json": _source("x.json", [JSONL, b'[{"text": "a"}, {"text": "b"}]']),
    "convert-txt": _source("x.txt", [b"one\ntwo\n\nthree\n"]),
    "resume": _resume,
    "weights": _weights,
    "tokenizer": _tokenizer,
}


# --- running --------------------------------------------------------------------------------------


def _give_up(number: int, frame: FrameType | None) -> None:
    raise TooLong


def _feed(name: str, seed: int, cases: int, until: float, row: Row, at: mmap.mmap) -> None:
    with tempfile.TemporaryDirectory(prefix="inputs-") as home:
        os.chdir(home)
        good, read = READERS[name](Path(home))
        for data in good:
            read(data)  # what is good is read
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.RLIM_INFINITY))
        signal.signal(signal.SIGALRM, _give_up)
        began = time.monotonic()
        for number in range(cases):
            if time.monotonic() > until:
                break
            data = mutate(good, random.Random(f"{seed} {name} {number}"))
            at[:8] = struct.pack("<q", number)
            row.inputs += 1
            signal.alarm(SECONDS)
            try:
                read(data)
                row.read += 1
            except MosaicBertError:
                row.refused += 1
            except BaseException as error:
                signal.alarm(0)
                row.num_faults += 1
                where = traceback.extract_tb(error.__traceback__)[-1]
                text = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}"
                if len(row.faults) < FEW and not any(text in fault for fault in row.faults):
                    row.faults.append(f"input {number}: {text}: {error!s:.200}; {data[:80]!r}")
            finally:
                signal.alarm(0)
        row.seconds = round(time.monotonic() - began, 1)


def feed(name: str, seed: int, cases: int, seconds: float) -> Row:
    """Feed one reader in a process of its own."""
    row = Row()
    at = mmap.mmap(-1, 8)
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            _feed(name, seed, cases, time.monotonic() + seconds, row, at)
        except BaseException:
            row.num_faults += 1
            row.faults.append(traceback.format_exc()[-1500:])
        finally:
            os.write(write_end, json.dumps(vars(row)).encode())
            os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        said = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if not said:
        (number,) = struct.unpack("<q", at[:8])
        return Row(number + 1, num_faults=1, faults=[f"input {number}: the process ended: {code}"])
    return Row(**json.loads(said))


def run(
    seed: int,
    cases: int,
    only: Sequence[str] | None,
    seconds: float,
    after_each: Callable[[dict[str, Row]], None] = lambda rows: None,
) -> dict[str, Row]:
    """Feed all readers, one after another; each has its share of the time."""
    rows: dict[str, Row] = {}
    names = list(only or READERS)
    began = time.monotonic()
    for place, name in enumerate(names):
        left = seconds - (time.monotonic() - began)
        rows[name] = feed(name, seed, cases, left / (len(names) - place))
        print(f"{name}: {vars(rows[name])}", flush=True)
        after_each(rows)
    return rows
