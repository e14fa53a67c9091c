"""Looks at what a YAML needs: attention, folders, data, stores, tokenizer."""

import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import torch
from pydantic import BaseModel

from mosaicbert.doctor.check import GB, SECONDS, Check, within
from mosaicbert.errors import ConfigError, MosaicBertError
from mosaicbert.models.attention import explain_backend
from mosaicbert.models.build import SHAPES


def check_attention(config: BaseModel | None) -> Iterator[Check]:
    """Which attention will run, and why."""
    device_name = getattr(config, "device", None)
    gpu = torch.cuda.is_available() and device_name != "cpu"
    if device_name in ("gpu", "cuda") and not gpu:
        yield Check("device", "problem", f"device: {device_name}, but torch sees no GPU",
                    "see gpu above, or set device: cpu")  # fmt: skip
    precision = getattr(config, "precision", None) or ("amp_bf16" if gpu else "fp32")
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    if precision == "amp_fp16":
        dtype = torch.float16
    model = getattr(config, "model", None)
    if model is not None and model.name == "hf_bert":
        yield Check("attention", "ok", "HF BERT: torch's scaled_dot_product_attention, padded")
        return
    changes = {} if model is None else SHAPES.get(model.pretrained_model_name, {}) | model.overrides
    heads, width = changes.get("num_attention_heads", 12), changes.get("hidden_size", 768)
    dropout = changes.get("attention_probs_dropout_prob", 0.0)
    device = torch.device("cuda" if gpu else "cpu")
    try:
        asked = changes.get("attention_backend")
        backend, why = explain_backend(device, width // heads, dtype, dropout, asked)
    except (ConfigError, TypeError, ZeroDivisionError) as error:
        yield Check("attention", "problem", str(error), "correct model.model_config")
        return
    text = f"{backend} on {device.type}: {why}"
    if gpu and backend == "sdpa":
        yield Check("attention", "warning", text, "this is the slow path on a GPU")
    else:
        yield Check("attention", "ok", text)


def check_folders(config: BaseModel | None) -> Iterator[Check]:
    """Free space and the right to write, where the run will."""
    folders = {"here": "."}
    for key in ("run_folder", "save_folder"):
        if (folder := getattr(config, key, None)) and "://" not in folder:
            folders[key] = folder.replace("{run_name}", getattr(config, "run_name", ""))
    for _, dataset in _datasets(config):
        if dataset.local:
            folders["data"] = dataset.local
    for name, folder in folders.items():
        path = Path(folder).absolute()
        while not path.exists():
            path = path.parent
        free = shutil.disk_usage(path).free
        text = f"{folder}: {free / GB:.1f} GB free"
        if not os.access(path, os.W_OK):
            yield Check("disk", "problem", f"{folder} cannot be written", f"name another {name}")
        elif free < 0.5 * GB:
            yield Check("disk", "problem", text, "make room, or name another folder")
        elif free < 5 * GB:
            yield Check("disk", "warning", text, "a checkpoint of BERT base takes 1.6 GB")
        else:
            yield Check("disk", "ok", text)


def check_data(config: BaseModel) -> Iterator[Check]:
    """Whether each data set's index is there, locally or remotely."""
    for name, dataset in _datasets(config):
        streams = list((dataset.streams or {}).values()) or [dataset]
        for stream in streams:
            split = stream.split or dataset.split
            places = [stream.local or dataset.local, stream.remote or dataset.remote]
            indexes = ["/".join(filter(None, [p, split, "index.json"])) for p in places if p]
            if indexes and Path(indexes[0]).is_file():
                yield Check(name, "ok", indexes[0])
                continue
            remote = places[1] and indexes[-1]
            if not remote:
                where = indexes[0] if indexes else "no local and no remote folder"
                yield Check(name, "problem", f"{where}: not there",
                            "make it with mosaicbert convert, or set remote")  # fmt: skip
            elif "://" not in remote and not Path(remote).is_file():
                yield Check(name, "problem", f"{remote}: not there", "check data_remote and split")
            else:
                yield _reach(name, remote)


def check_files(config: BaseModel) -> Iterator[Check]:
    """Whether the files of fine-tuning are there: own data, or GLUE's folder."""
    data = getattr(config, "data", None)
    for key in ("train", "validation"):
        path = getattr(data, key, None)
        if path not in (None, "sample"):
            yield _check_file(f"data.{key}", path)
    if not hasattr(config, "data_dir"):
        return
    folder = config.data_dir
    if folder is None and find_spec("datasets") is None:
        yield Check("data_dir", "problem", "not set, and GLUE from the hub needs the package "
                    "datasets", "pip install 'mosaicbert[hub]', or set data_dir")  # fmt: skip
    elif folder not in (None, "sample"):
        for task in getattr(config, "tasks", {}):
            yield _check_file("data_dir", f"{folder}/{task}")


def _check_file(name: str, path: str) -> Check:
    if "://" in path:
        return _reach(name, path)
    if Path(path).exists():
        return Check(name, "ok", path)
    return Check(name, "problem", f"{path}: not there", f"check {name}")


def check_stores(config: BaseModel) -> Iterator[Check]:
    """Stores that checkpoints are written to or read from."""
    for key in ("save_folder", "load_path", "starting_checkpoint_load_path"):
        uri = getattr(config, key, None)
        if uri and "://" in uri:
            yield _reach(key, uri, must_exist=key != "save_folder")
        elif uri and key != "save_folder" and not Path(uri).exists():
            yield Check(key, "problem", f"{uri}: not there", "check the path")


def check_tokenizer(config: BaseModel) -> Iterator[Check]:
    """Whether the tokenizer can be loaded."""
    from mosaicbert.data.tokenizers import load_tokenizer

    name = getattr(config, "tokenizer_name", None)
    if name is None:
        return
    try:
        tokens = within(20.0, lambda: len(load_tokenizer(name)))
        yield Check("tokenizer", "ok", f"{name}: {tokens:,} tokens")
    except (MosaicBertError, TimeoutError) as error:
        yield Check("tokenizer", "problem", f"{name}: {error}", "name one that is here")


def _datasets(config: BaseModel | None) -> Iterator[tuple[str, Any]]:
    for name in ("train_loader", "eval_loader"):
        dataset = getattr(getattr(config, name, None), "dataset", None)
        if dataset is not None:
            yield name, dataset


def _reach(name: str, uri: str, must_exist: bool = True) -> Check:
    try:
        store, path = fsspec.url_to_fs(uri)
        there = within(SECONDS, lambda: bool(store.exists(path)))
    except Exception as error:  # each store's client has its own kinds
        fault = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Check(name, "problem", f"{uri} cannot be reached: {fault}",
                     "check the network, the credentials, and that the store's extra "
                     "(s3, gcs, azure) is installed")  # fmt: skip
    if must_exist and not there:
        return Check(name, "problem", f"{uri}: not there", "check the path")
    return Check(name, "ok", uri if there else f"{uri}: answers; will be made")
