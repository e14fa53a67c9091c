"""Streaming from S3 through a proxy with faults, with the real client; skipped without it.

`pip install s3fs 'moto[server]'` makes it run. Without them, the same faults are tested on a store
in memory (tests/unit/test_stream.py).
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
from typing import ClassVar

import pytest
import torch

from mosaicbert.config.sections import DatasetConfig, LoaderConfig
from mosaicbert.data import download as download_module
from mosaicbert.data.loader import build_text_loader
from mosaicbert.data.mds import MDSWriter
from mosaicbert.errors import DataError

s3fs = pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(180)]

SHARD = "shard.00001.mds"
NUM_SAMPLES = 40


class FaultyProxy(BaseHTTPRequestHandler):
    """Hands requests on to the store; the answers for some files go wrong, each fault once."""

    protocol_version = "HTTP/1.1"
    store: ClassVar[tuple[str, int]] = ("", 0)
    faults: ClassVar[dict[str, list[str]]] = {}
    answered: ClassVar[Counter[str]] = Counter()

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
            time.sleep(6)
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
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
        if fault == "cut":
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """No line for each request."""


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A data set of five shards in a bucket, which is reached through the proxy."""
    server = moto_server.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    FaultyProxy.store = server.get_host_and_port()
    reset = http.client.HTTPConnection(*FaultyProxy.store)
    reset.request("POST", "/moto-api/reset")  # servers of one process share their buckets
    reset.getresponse().read()
    reset.close()
    FaultyProxy.faults = {}
    FaultyProxy.answered.clear()
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), FaultyProxy)
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(download_module, "BACKOFF_SECONDS", 0.01)
    made = tmp_path / "made" / "train"
    with MDSWriter(made, {"text": "str"}, size_limit=900) as writer:
        for i in range(NUM_SAMPLES):
            writer.write({"text": f"text number {i:04d} " + "word " * 12})
    s3fs.S3FileSystem.clear_instance_cache()
    store = s3fs.S3FileSystem()
    store.mkdir("texts")
    store.put(str(made), "texts/train", recursive=True)
    yield "s3://texts"
    s3fs.S3FileSystem.clear_instance_cache()
    proxy.shutdown()
    proxy.server_close()
    server.stop()


def epoch(local: Path, remote: str | None, num_workers: int = 0) -> list[torch.Tensor]:
    """The token ids of an epoch, step by step."""
    dataset = DatasetConfig(
        local=str(local),
        remote=remote,
        split="train",
        shuffle=True,
        max_seq_len=32,
        tokenizer_name="bert-base-uncased",
        download_timeout=3.0,
        download_retry=3,
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


def assert_whole(local: Path, remote: str, tmp_path: Path, num_workers: int = 0) -> None:
    """An epoch from the store is the one from the disk, and leaves the shards alone behind."""
    expected = epoch(tmp_path / "made", None)
    found = epoch(local, remote, num_workers)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not list(local.glob("train/.*"))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_from_s3(bucket: str, tmp_path: Path, num_workers: int) -> None:
    assert_whole(tmp_path / "local", bucket, tmp_path, num_workers)
    assert FaultyProxy.answered[SHARD] == 1


@pytest.mark.parametrize("fault", ["cut", "500", "503", "short", "flip", "stall"])
def test_a_passing_fault_is_overcome(bucket: str, tmp_path: Path, fault: str) -> None:
    FaultyProxy.faults = {SHARD: [fault], "index.json": [fault]}
    assert_whole(tmp_path / "local", bucket, tmp_path)
    assert FaultyProxy.answered[SHARD] > 1


@pytest.mark.parametrize("fault", ["cut", "403", "404", "503", "short", "flip", "stall"])
def test_a_lasting_fault_names_the_shard(
    bucket: str, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    FaultyProxy.faults = {SHARD: [fault] * 1000}
    started = time.monotonic()
    with pytest.raises(DataError, match=SHARD):
        epoch(tmp_path / "local", bucket)
    assert time.monotonic() - started < 60
    deadline = time.monotonic() + 20
    while list(tmp_path.glob("local/train/.*tmp")) and time.monotonic() < deadline:
        time.sleep(0.1)  # a thread that was given up tidies up when its answer comes
    assert not list(tmp_path.glob("local/train/.*"))
    assert not (tmp_path / "local" / "train" / SHARD).exists()


def test_a_killed_reader_leaves_nothing_in_the_way(bucket: str, tmp_path: Path) -> None:
    FaultyProxy.faults = {SHARD: ["stall"]}
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from test_object_store import epoch; epoch(Path(sys.argv[2]), sys.argv[3])"
    )
    here = str(Path(__file__).parent)
    words = [sys.executable, "-c", code, here, str(tmp_path / "local"), bucket]
    reader = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    deadline = time.monotonic() + 60
    while not FaultyProxy.answered[SHARD]:
        assert reader.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    reader.kill()
    reader.wait()
    assert_whole(tmp_path / "local", bucket, tmp_path)
