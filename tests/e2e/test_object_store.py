"""Streaming from S3 with its real client, through a proxy with faults.

The faults that a store in memory can have are in tests/unit/test_stream.py.
"""

import http.client
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from mosaicbert.config.sections import DatasetConfig, LoaderConfig
from mosaicbert.data import download as download_module
from mosaicbert.data.loader import build_text_loader
from mosaicbert.data.mds import MDSWriter
from mosaicbert.errors import DataError

s3fs = pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(120)]

SHARD = "shard.00001.mds"
NUM_SAMPLES = 40


class FaultyProxy(BaseHTTPRequestHandler):
    """Hands requests on to the store; the answers for some files go wrong, each fault once."""

    protocol_version = "HTTP/1.1"
    store: ClassVar[tuple[str, int]] = ("", 0)
    faults: ClassVar[dict[str, list[str]]] = {}
    answered: ClassVar[Counter[str]] = Counter()
    go_on: ClassVar[threading.Event] = threading.Event()
    """Ends all stalls."""

    def _answer(self) -> None:
        name = self.path.split("?")[0].rsplit("/", 1)[-1]
        length = int(self.headers.get("Content-Length") or 0)
        upstream = http.client.HTTPConnection(*self.store, timeout=30)
        upstream.request(self.command, self.path, self.rfile.read(length), dict(self.headers))
        response = upstream.getresponse()
        body, status = response.read(), response.status
        upstream.close()
        fault = ""
        if self.command == "GET":
            self.answered[name] += 1
            faults = self.faults.get(name, [])
            fault = faults.pop(0) if faults else ""
        if fault.isdecimal():
            status, body = int(fault), b"<Error><Code>SlowDown</Code></Error>"
        if fault == "stall":
            self.go_on.wait(30)
        if fault == "flip":
            body = bytes([body[0] ^ 1]) + body[1:]
        if fault == "short":
            body = body[: len(body) // 2]
        self.send_response(status)
        for key, value in response.getheaders():
            if key.lower() not in ("content-length", "transfer-encoding", "connection", "date"):
                self.send_header(key, value)
        size = response.getheader("Content-Length") if self.command == "HEAD" else len(body)
        self.send_header("Content-Length", str(size))
        with suppress(OSError):  # who asked has gone
            self.end_headers()
            if self.command == "GET" and fault == "slow":
                for byte in range(0, len(body), 100):
                    self.wfile.write(body[byte : byte + 100])
                    time.sleep(0.02)
            elif self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
        if fault == "cut":
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """No line for each request."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of five shards."""
    folder = tmp_path_factory.mktemp("made")
    with MDSWriter(folder / "train", {"text": "str"}, size_limit=900) as writer:
        for i in range(NUM_SAMPLES):
            writer.write({"text": f"text number {i:04d} " + "word " * 12})
    return folder


@pytest.fixture(scope="module")
def store(made: Path) -> Iterator[str]:
    """The data set in a bucket, which is reached through the proxy."""
    server = moto_server.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    FaultyProxy.store = server.get_host_and_port()
    reset = http.client.HTTPConnection(*FaultyProxy.store)
    reset.request("POST", "/moto-api/reset")  # servers of one process share their buckets
    reset.getresponse().read()
    reset.close()
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), FaultyProxy)
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")  # the client's own tries, so that ours are tested
        patch.setattr(s3fs.S3FileSystem, "retries", 1)
        s3fs.S3FileSystem.clear_instance_cache()
        client = s3fs.S3FileSystem()
        client.mkdir("texts")
        client.put(str(made / "train"), "texts/train", recursive=True)
        yield "s3://texts"
        s3fs.S3FileSystem.clear_instance_cache()
    proxy.shutdown()
    proxy.server_close()
    server.stop()


@pytest.fixture
def bucket(store: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The same, with no faults to begin with."""
    monkeypatch.setattr(FaultyProxy, "faults", {})
    monkeypatch.setattr(FaultyProxy, "go_on", threading.Event())
    monkeypatch.setattr(download_module, "BACKOFF_SECONDS", 0.01)
    FaultyProxy.answered.clear()
    yield store
    FaultyProxy.go_on.set()


def epoch(local: Path, remote: str | None, num_workers: int = 0, **patience: Any) -> list[Any]:
    """The token ids of an epoch, step by step."""
    dataset = DatasetConfig(
        local=str(local),
        remote=remote,
        split="train",
        shuffle=True,
        max_seq_len=32,
        tokenizer_name="bert-base-uncased",
        **patience,
    )
    loader = build_text_loader(
        LoaderConfig(dataset=dataset, num_workers=num_workers, drop_last=False, pin_memory=False),
        batch_size=8,
        microbatch_samples=8,
        rank=0,
        world_size=1,
        packed=True,
        grid=False,
        training=True,
        mlm_probability=0.15,
    )
    return [batch.input_ids for step in loader.steps(0) for batch in step.microbatches]


def assert_whole(made: Path, local: Path, remote: str, **settings: Any) -> None:
    """An epoch from the store is the one from the disk, and leaves the shards alone behind."""
    expected = epoch(made, None)
    found = epoch(local, remote, **settings)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not list(local.glob("train/.*"))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_from_s3(bucket: str, made: Path, tmp_path: Path, num_workers: int) -> None:
    assert_whole(made, tmp_path / "local", bucket, num_workers=num_workers)
    assert FaultyProxy.answered[SHARD] == 1


@pytest.mark.parametrize("fault", ["cut", "500", "503", "short", "flip", "stall"])
def test_a_passing_fault_is_overcome(bucket: str, made: Path, tmp_path: Path, fault: str) -> None:
    FaultyProxy.faults.update({SHARD: [fault, fault], "index.json": [fault]})
    patience = {"download_timeout": 1.0, "download_retry": 8} if fault == "stall" else {}
    assert_whole(made, tmp_path / "local", bucket, **patience)
    assert FaultyProxy.answered[SHARD] == 3


def test_a_slow_store_is_waited_for(bucket: str, made: Path, tmp_path: Path) -> None:
    FaultyProxy.faults.update({SHARD: ["slow"], "index.json": ["slow"]})
    assert_whole(made, tmp_path / "local", bucket)
    assert FaultyProxy.answered[SHARD] == 1


@pytest.mark.parametrize("fault", ["cut", "403", "404", "500", "503", "short", "flip", "stall"])
def test_a_lasting_fault_names_the_shard(bucket: str, tmp_path: Path, fault: str) -> None:
    FaultyProxy.faults.update({SHARD: [fault] * 1000})
    started = time.monotonic()
    timeout = 1.0 if fault == "stall" else 60.0
    with pytest.raises(DataError, match=SHARD):
        epoch(tmp_path / "local", bucket, download_retry=2, download_timeout=timeout)
    assert time.monotonic() - started < 60
    FaultyProxy.go_on.set()
    for thread in threading.enumerate():  # one that was given up tidies up when its answer comes
        if thread.name == "mosaicbert-download":
            thread.join(20)
    assert not list(tmp_path.glob("local/train/.*"))
    assert not (tmp_path / "local" / "train" / SHARD).exists()


READER = """
import sys
from pathlib import Path
from mosaicbert.config.sections import DatasetConfig
from mosaicbert.data.folders import open_folder, streams_of
from mosaicbert.data.stream import ShardSet

config = DatasetConfig(local=sys.argv[1], remote=sys.argv[2], split="train")
shards = ShardSet([open_folder(config, "dataset", streams_of(config)["dataset"])])
for number in range(len(shards.infos)):
    shards.open(number)
"""


def test_a_killed_reader_leaves_nothing_in_the_way(bucket: str, made: Path, tmp_path: Path) -> None:
    FaultyProxy.faults.update({SHARD: ["stall"]})
    words = [sys.executable, "-c", READER, str(tmp_path / "local"), bucket]
    reader = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    deadline = time.monotonic() + 60
    while not FaultyProxy.answered[SHARD]:
        assert reader.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    reader.kill()
    reader.wait()
    assert (tmp_path / "local" / "train" / f".{SHARD}.lock").exists()  # it was in the middle of it
    assert_whole(made, tmp_path / "local", bucket)
