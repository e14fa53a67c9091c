"""Checkpoints in a real S3 client's hands, against a local server; skipped without the extras."""

import urllib.request

import pytest
from tiny_run import assert_same, make_trainer, moments, weights

from mosaicbert import retrying
from mosaicbert.errors import CheckpointError
from mosaicbert.train.store import SaveFolder

pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")

pytestmark = pytest.mark.filterwarnings("default")  # the clients' own deprecations


@pytest.fixture
def bucket(monkeypatch):
    import s3fs

    server = moto_server.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    fs = s3fs.S3FileSystem(use_listings_cache=False)
    urllib.request.urlopen(
        urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")
    ).close()
    fs.mkdir("models")
    yield fs
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_resume_from_s3(bucket):
    uri = "s3://models/{run_name}/ckpt"
    changes = {
        "save_folder": uri,
        "run_name": "mine",
        "scheduler": {"name": "constant_with_warmup", "t_warmup": "2ba"},
        "save_num_checkpoints_to_keep": 1,
        "autoresume": True,
    }
    whole, full = make_trainer(max_duration="12ba", scheduler=changes["scheduler"])
    whole.fit()
    first, before = make_trainer(max_duration="8ba", **changes)
    assert first.fit().checkpoint == "s3://models/mine/ckpt/ep1-ba8"
    assert SaveFolder("s3://models/mine/ckpt").names() == ["ep1-ba8"]
    assert bucket.cat("models/mine/ckpt/latest") == b"ep1-ba8"
    second, after = make_trainer(max_duration="12ba", **changes)
    second.fit()
    assert before.losses | after.losses == full.losses
    assert_same(weights(whole), weights(second))
    assert_same(moments(whole), moments(second))
    assert SaveFolder("s3://models/mine/ckpt").names() == ["ep2-ba12"]


def test_an_upload_that_breaks_off_does_not_count(bucket, monkeypatch):
    monkeypatch.setattr(retrying, "WAITS", (0.0,))
    uri = "s3://models/broken"
    make_trainer(max_duration="4ba", save_folder=uri)[0].fit()
    fs = SaveFolder(uri).fs  # one object for all of its kind
    put_file = fs.put_file

    def broken(local, remote, **kwargs):
        if remote.endswith("state.json"):
            raise ConnectionError("reset by peer")
        return put_file(local, remote, **kwargs)

    monkeypatch.setattr(fs, "put_file", broken)
    trainer, _ = make_trainer(max_duration="8ba", save_folder=uri, autoresume=True)
    with pytest.raises(CheckpointError, match="reset by peer"):
        trainer.fit()
    assert SaveFolder(uri).newest() == "ep0-ba4"


def test_a_bucket_that_is_not_there(bucket, monkeypatch):
    monkeypatch.setattr(retrying, "WAITS", ())
    trainer, _ = make_trainer(save_folder="s3://nothing/here")
    with pytest.raises(CheckpointError, match="cannot be"):
        trainer.fit()
