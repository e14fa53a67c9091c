"""Files from strangers: nothing in them runs, and no path in them leads elsewhere.

What is tested nearer to the code is not repeated here: pickles among the weights
(test_checkpoints_models.py), names of shards and pickled columns (test_mds.py).
"""

import io
import json
import logging
import os
import pickle
import stat
import sys
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml

from mosaicbert.cli import main
from mosaicbert.config import ClassifyConfig, GlueConfig, ModelConfig, PretrainConfig, load_config
from mosaicbert.data.tokenizers import load_tokenizer
from mosaicbert.duration import Progress
from mosaicbert.errors import CheckpointError, ConfigError, DataError, MosaicBertError
from mosaicbert.models.build import build_model
from mosaicbert.models.card import model_card
from mosaicbert.models.checkpoints import load, read_state_dict
from mosaicbert.pretraining import pretrain
from mosaicbert.redaction import RedactingFormatter, redact, redact_text
from mosaicbert.train.checkpoint import read_folder
from mosaicbert.train.loggers import build_loggers

ROOT = Path(__file__).parents[2]
SECRET = "s3cr3t-value-0123456789"


class Calls:
    """A pickle that calls `function(*arguments)` when it is read without care."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.fixture(autouse=True)
def attacked(tmp_path, monkeypatch):
    """Nobody may make this folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "attacked"
    yield path
    assert not path.exists(), "code from a file has run"


# --- pickles --------------------------------------------------------------------------------------

GADGETS = {
    "os": Calls(os.mkdir, "attacked"),
    "eval": Calls(eval, "__import__('os').mkdir('attacked')"),
    "exec": Calls(exec, "import os; os.mkdir('attacked')"),
    "import": Calls(__import__, "antigravity"),
    "partial": Calls(__import__("functools").partial, os.mkdir, "attacked"),
    # among the modules whose objects a trainer's state may hold:
    "torch": Calls(torch.load, "weights.pt"),
    "numpy": Calls(__import__("numpy").save, "attacked", [1]),
    "collections": Calls(__import__("collections").namedtuple, "A", "b"),
}  # fmt: skip


@pytest.mark.parametrize("gadget", GADGETS)
@pytest.mark.parametrize("place", ["weights", "optimizers", "timestamp", "rng"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_composer_checkpoint_runs_nothing(gadget, place, legacy, tmp_path):
    """In the weights or in what a trainer notes beside them, in both of torch's file formats."""
    weights = OrderedDict({"model.bert.embeddings.LayerNorm.bias": torch.zeros(2)})
    state = {"model": weights, "optimizers": {}, "timestamp": {}, "run_name": "x"}
    content = {"state": state, "rng": []}
    if place == "rng":
        content["rng"].append(GADGETS[gadget])
    elif place == "weights":
        weights["more"] = GADGETS[gadget]
    else:
        state[place]["more"] = GADGETS[gadget]
    torch.save(content, tmp_path / "ep0-ba1-rank0.pt", _use_new_zipfile_serialization=not legacy)
    try:
        found, _ = read_state_dict(tmp_path / "ep0-ba1-rank0.pt")
    except CheckpointError:
        return
    assert place != "weights"
    assert list(found) == ["bert.embeddings.LayerNorm.bias"]  # the rest was left out, inert
    assert not (tmp_path / "attacked.npy").exists()


def test_our_own_checkpoints_are_no_pickles(tmp_path):
    for name in ("model.safetensors", "optimizer.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(GADGETS["os"]))
    state = {"format": 1, "progress": {}, "run_id": "x"}
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="damaged"):
        read_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="damaged"):
        load(tmp_path)


# --- paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../elsewhere/x.bin", "/etc/passwd", "", ".", "..", "x/../../y", 3, None, ["a"]]
)
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_of_weights_stays_in_its_folder(name, index, tmp_path):
    folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    torch.save({"a": torch.zeros(1)}, elsewhere / "x.bin")
    (folder / index).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="no file beside it"):
        load(folder)


@pytest.mark.parametrize("content", ["{}", "[]", '{"weight_map": 3}', "[" * 100_000])
def test_an_index_that_is_none(content, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError):
        load(tmp_path)


@pytest.mark.parametrize("named", ["..", "../elsewhere", ".", "", "a/b", "x" * 300])
def test_the_pointer_of_a_remote_folder_stays_in_it(named, tmp_path):
    (tmp_path / "save").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/config.json").write_text("{}")
    (tmp_path / "save/latest").write_text(named)
    with pytest.raises(CheckpointError):
        load(f"file://{tmp_path}/save")
    with pytest.raises(CheckpointError):
        load(tmp_path / "save")


@pytest.mark.parametrize(
    "name", ["../../etc/x", "/etc/x", "a/../../b", "..", ".", "", " ", "a\x00b", "a\nb", "a\\b"]
)
def test_a_run_name_stays_in_its_folder(name):
    values = {"model": {}, "max_duration": "1ba", "global_train_batch_size": 1}
    loader = {"dataset": {"local": "x"}}
    with pytest.raises(ConfigError, match=r"run_name: .* is not allowed: must be a name for a"):
        load_config(PretrainConfig, {**values, "train_loader": loader, "run_name": name})
    task = {"train_loader": {"split": "a"}, "eval_loader": {"split": "b"}}
    with pytest.raises(ConfigError, match=r"run_name: .* is not allowed"):
        load_config(ClassifyConfig, {**values, **task, "run_name": name})
    with pytest.raises(ConfigError, match=r"base_run_name: .* is not allowed"):
        load_config(GlueConfig, {"model": {}, "tasks": {}, "base_run_name": name})


def test_a_checkpoints_run_name_leads_the_card_nowhere(tmp_path):
    """The card looks for the run's metrics; a checkpoint's name must not choose the folder."""
    (tmp_path / "elsewhere").mkdir()
    row = {"batch": 1, "token": 1, "loss/private": 0.125}
    (tmp_path / "elsewhere/metrics.jsonl").write_text(json.dumps(row) + "\n")
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    settings = ModelConfig(model_config={**shape, "intermediate_size": 8})
    model = build_model(settings, "mlm", max_seq_len=8, vocab_size=16)
    for run_name in ("../elsewhere", str(tmp_path / "elsewhere")):
        progress = {"batch": 1, "token": 1}
        config = {"optimizer": {}}
        state = {"run_name": run_name, "progress": progress, "config": config}
        (tmp_path / "state.json").write_text(json.dumps(state))
        card = model_card(model, "mlm", tmp_path, "x", "hf", None)
        assert "elsewhere" in card
        assert "private" not in card


def test_archives_are_not_unpacked(tmp_path):
    """Nothing here reads archives of files: there is nothing for `../` and links to lead to."""
    text = b'{"text": "x"}\n'
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.writestr("../attacked/train.jsonl", text)
    with tarfile.open(tmp_path / "train.tar.gz", "w:gz") as archive:
        link = tarfile.TarInfo("out")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        archive.addfile(link)
        member = tarfile.TarInfo("out/attacked")
        member.size = len(text)
        archive.addfile(member, io.BytesIO(text))
    for name in ("train.zip", "train.tar.gz"):
        words = ["convert", "--dataset", str(tmp_path / name), "--out_root", "o", "--quiet"]
        assert main([*words, "--num_workers", "1"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.tar.gz", "train.zip"]


# --- YAML and code beside models ------------------------------------------------------------------

TAGS = [
    "!!python/object/apply:os.mkdir [attacked]",
    "!!python/object/new:os.mkdir [attacked]",
    "!!python/name:os.system",
    "!!python/module:antigravity",
    "!!python/object:os._wrap_close {}",
]


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("command", ["pretrain", "classify", "glue", "config"])
def test_tags_of_a_yaml_make_no_objects(tag, command, tmp_path, capfd):
    (tmp_path / "x.yaml").write_text(f"run_name: a\nseed: {tag}\n")
    words = [command, "check", "x.yaml"] if command == "config" else [command, "x.yaml"]
    assert main(words) == 2
    assert "this is not YAML" in capfd.readouterr().err
    assert main([*words[:-1], str(ROOT / "yamls/test/main.yaml"), f"seed={tag}"]) == 2


def test_a_yaml_whose_aliases_multiply(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (tmp_path / "x.yaml").write_text("\n".join(lines))
    with pytest.raises(ConfigError):
        load_config(PretrainConfig, tmp_path / "x.yaml")


def write_code(folder, kind):
    folder.mkdir()
    (folder / "own.py").write_text("import os\nos.mkdir('attacked')\nclass Own: ...\n")
    auto_map = {"AutoConfig": "own.Own", "AutoModel": "own.Own", "AutoTokenizer": [None, "own.Own"]}
    config = {"model_type": "own", "auto_map": auto_map, "tokenizer_class": "Own"}
    for name in ("config.json", "tokenizer_config.json") if kind == "both" else (kind,):
        (folder / name).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", ["config.json", "tokenizer_config.json", "both"])
def test_code_beside_a_model_does_not_run_and_nobody_is_asked(kind, tmp_path, monkeypatch):
    """transformers would ask on the terminal whether to trust it."""
    folder = write_code(tmp_path / "model", kind)
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("the user is asked"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 10))
    with pytest.raises(DataError):
        load_tokenizer(str(folder))
    with pytest.raises(CheckpointError):
        load(folder)
    values = {"name": "mosaic_bert", "pretrained_model_name": str(folder)}
    config = {"model": values, "max_duration": "1ba", "global_train_batch_size": 1}
    with pytest.raises(MosaicBertError):
        pretrain({**config, "device": "cpu", "train_loader": {"dataset": {"local": "gone"}}})


# --- secrets --------------------------------------------------------------------------------------


def test_texts_lose_their_secrets(monkeypatch):
    monkeypatch.setenv("MY_HUB_TOKEN", SECRET)
    monkeypatch.setenv("HARMLESS", "ordinary-value")
    assert SECRET not in redact_text(f"a {SECRET} b")
    assert redact_text("ordinary-value") == "ordinary-value"
    for text in (
        f"https://store/x?sig={SECRET}&b=1",
        f"https://store/x?X-Amz-Signature={SECRET}",
        f"s3://me:{SECRET}@bucket",
    ):
        monkeypatch.delenv("MY_HUB_TOKEN", raising=False)
        assert SECRET not in redact_text(text)
    assert redact({"a": [{"token": SECRET}], "max_tokens": 5}) == {
        "a": [{"token": "***"}],
        "max_tokens": 5,
    }


def test_log_lines_and_messages_lose_them_too(monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    line = RedactingFormatter("%(message)s").format(
        logging.LogRecord("x", 20, "x", 1, "from %s", (f"s3://a:{SECRET}@b",), None)
    )
    assert line == "from s3://a:***@b"
    assert main(["pretrain", f"gone-{SECRET}.yaml"]) == 2
    assert SECRET not in capfd.readouterr().err


class _Tracker(ModuleType):
    """Stands for every tracker's package and remembers all it is given."""

    def __init__(self, name):
        super().__init__(name)
        self.given = []

    def _take(self, *args, **kwargs):
        self.given.append(repr((args, kwargs)))
        return self

    def init(self, project=None, name=None, config=None, **more):
        return self._take(project, name, config, more)

    def start(self, api_key=None, project_name=None, experiment_key=None, experiment_config=None):
        return self._take(project_name, experiment_key)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._take


@pytest.mark.parametrize("name", ["wandb", "comet_ml", "mlflow", "trackio"])
def test_trackers_are_told_no_secrets(name, tmp_path, monkeypatch):
    monkeypatch.setenv("SERVICE_PASSWORD", SECRET)
    module = _Tracker(name)
    module.info = SimpleNamespace(run_id="x")
    monkeypatch.setitem(sys.modules, name, module)
    config = {
        "data_remote": f"s3://me:{SECRET}@bucket/x",
        "run_name": f"with-{SECRET}",
        "loggers": {name: {"api_key": SECRET}},
        "seed": 17,
    }
    from mosaicbert.config.sections import LoggersConfig

    loggers = build_loggers(LoggersConfig(**{name: {}}), tmp_path, "run", config, rank=0)
    for logger in loggers:
        logger.log({"loss": 1.0}, Progress(batch=1))
        logger.close()
    told = " ".join(module.given)
    assert "data_remote" in told
    assert SECRET not in told


@pytest.fixture(scope="module")
def run_with_secrets(tmp_path_factory):
    """A whole run whose YAML brings secrets in by every way there is."""
    home = tmp_path_factory.mktemp("run")
    mask = os.umask(0o022)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("HF_TOKEN", SECRET)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET + "-aws")
        patch.setattr(sys, "argv", ["mosaicbert", "pretrain", f"loggers.wandb.api_key={SECRET}"])
        words = ["convert", "--dataset", "sample", "--splits", "val", "--out_root", "data"]
        assert main([*words, "--quiet", "--num_workers", "1"]) == 0
        data = {"local": "data", "split": "val", "max_seq_len": 16}
        shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        values = {
            "own_token": "${oc.env:HF_TOKEN}",
            "run_name": "r",
            "data_remote": f"s3://me:{SECRET}@bucket/x",
            "data_local": "${own_token}",
            "model": {"model_config": {**shape, "intermediate_size": 8}},
            "train_loader": {"dataset": data, "num_workers": 0},
            "global_train_batch_size": 2,
            "device": "cpu",
            "max_duration": "2ba",
            "save_interval": "1ba",
            "save_folder": "ckpt",
            "progress_bar": False,
        }
        (home / "x.yaml").write_text(yaml.safe_dump(values))
        patch.setattr(sys, "stdout", io.StringIO())
        assert main(["pretrain", "x.yaml"]) == 0
        assert main(["export", "ckpt", "exported"]) == 0
        (home / "said.txt").write_text(sys.stdout.getvalue())
    os.umask(mask)
    (home / "x.yaml").unlink()
    return home


def test_no_file_of_a_run_holds_a_secret(run_with_secrets):
    files = [path for path in run_with_secrets.rglob("*") if path.is_file()]
    assert {"config.yaml", "environment.json", "state.json", "README.md"} <= {f.name for f in files}
    assert "***" in (run_with_secrets / "runs/r/config.yaml").read_text()
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path


def test_files_have_sane_modes(run_with_secrets):
    """With the usual umask: only the owner writes, and nothing but folders is executable."""
    for path in run_with_secrets.rglob("*"):
        mode = stat.S_IMODE(path.lstat().st_mode)
        if not path.is_symlink():
            assert not mode & 0o022, (path, oct(mode))
        if path.is_file() and not path.is_symlink():
            assert not mode & 0o111, (path, oct(mode))
