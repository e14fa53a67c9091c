"""A checkpoint for others: a Hugging Face folder with a model card, or ONNX."""

import argparse
import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer

from mosaicbert.errors import CheckpointError, ConfigError
from mosaicbert.models.card import model_card
from mosaicbert.models.checkpoints import load, read_state_dict, task_of
from mosaicbert.models.register import TASKS, Task
from mosaicbert.models.weights import checkpoint_folder, local_copy

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
)
ONNX_TOLERANCE = 1e-4
_BUNDLED = Path(__file__).parents[1] / "data" / "bundled"


def export_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    to: Literal["hf", "onnx"] = "hf",
    *,
    task: Task | None = None,
    tokenizer: str | None = None,
    run_folder: str | Path | None = None,
    **config: Any,
) -> Path:
    """Write a checkpoint in another form; gives the folder.

    Args:
        checkpoint: anything `mosaicbert.load` reads.
        out: a folder that is not there yet, or empty.
        to: `hf`: configuration, safetensors, tokenizer and model card, which transformers loads
            (and sentence-transformers, for `task="embedding"`); `onnx`: `model.onnx` with dynamic
            batch and length, checked against the model where onnxruntime is installed.
        task: which head. Default: the checkpoint's.
        tokenizer: folder or name. Default: the files in the checkpoint's folder.
        run_folder: the run's own folder, whose losses and metrics the card shall tell.
            Default: `runs/RUN_NAME`.
        config: changes of the configuration, for checkpoints that have none.

    Raises:
        CheckpointError: the checkpoint cannot be read, or no tokenizer lies beside it.
        ConfigError: the folder is not empty, an unknown form, or a package is missing.
    """
    if to not in ("hf", "onnx"):
        raise ConfigError(f"--to {to}: choose hf or onnx.")
    with local_copy(checkpoint) as local:
        folder = checkpoint_folder(local)
        task = task or task_of(*read_state_dict(local)) or "embedding"
        model: Any = load(local, task, **config)
        with _whole_folder(Path(out)) as target:
            if to == "onnx":
                write_onnx(model, target / "model.onnx")
                model.config.save_pretrained(target)
            else:
                model.save_pretrained(target)
                if task == "embedding":
                    _write_sentence_transformer(model, target)
            _write_tokenizer(folder, tokenizer, target)
            measured = None if run_folder is None else Path(run_folder)
            card = model_card(model, task, folder, Path(out).name, to, measured)
            (target / "README.md").write_text(card, encoding="utf-8")
    return Path(out)


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that becomes `out` once all is written; a killed call's is replaced."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty: choose another folder, or remove it.")
    temporary = out.parent / f".{out.name}.part"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{out} cannot be written: {error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_tokenizer(folder: Path, name: str | None, target: Path) -> None:
    if name is None:
        found = [folder / file for file in TOKENIZER_FILES if (folder / file).is_file()]
        if not found:
            raise CheckpointError(
                f"{folder} holds no tokenizer ({', '.join(TOKENIZER_FILES)}): name one with "
                "--tokenizer, such as bert-base-uncased."
            )
        for file in found:
            shutil.copy(file, target / file.name)
        return
    bundled = _BUNDLED / name.rpartition("/")[2]
    source = str(bundled) if bundled.is_dir() and not Path(name).is_dir() else name
    try:
        loaded = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        loaded.save_pretrained(target)
    except Exception as error:  # transformers and the hub's client raise every kind
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"--tokenizer {name} cannot be loaded: {reason}") from error


def _write_sentence_transformer(model: Any, target: Path) -> None:
    """The files by which sentence-transformers knows: this encoder, then the mean over tokens."""
    pooling = {
        "word_embedding_dimension": model.config.hidden_size,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
    }
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {
            "idx": 1,
            "name": "1",
            "path": "1_Pooling",
            "type": "sentence_transformers.models.Pooling",
        },
    ]
    length = getattr(model.config, "alibi_starting_size", model.config.max_position_embeddings)
    (target / "1_Pooling").mkdir()
    for name, content in (
        ("modules.json", modules),
        ("1_Pooling/config.json", pooling),
        ("sentence_bert_config.json", {"max_seq_length": length, "do_lower_case": False}),
    ):
        (target / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# --- ONNX -----------------------------------------------------------------------------------------


def write_onnx(model: nn.Module, path: Path) -> None:
    """`model.onnx`: `input_ids`, `attention_mask`, `token_type_ids` `(batch, seq)` in, int64.

    Out: `logits`, or `last_hidden_state` and `sentence_embedding`. Batch and length are dynamic.
    """
    if find_spec("onnx") is None or find_spec("onnxscript") is None:
        raise ConfigError(
            "ONNX needs packages that are not installed: pip install 'mosaicbert[onnx]'."
        )
    from mosaicbert.models.padded import PaddedModel

    padded = PaddedModel(model).eval()
    inputs = example_inputs(model, batch=3, seq=11)
    axes = {0: "batch", 1: "seq"}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses packages nobody needs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations
        torch.onnx.export(
            padded,
            inputs,
            str(path),
            dynamo=True,
            input_names=["input_ids", "attention_mask", "token_type_ids"],
            output_names=list(padded.output_names),
            dynamic_shapes=(axes, axes, axes),
            external_data=False,
            verbose=False,
        )
    _check_onnx(padded, model, path)


def example_inputs(model: Any, batch: int, seq: int) -> tuple[torch.Tensor, ...]:
    """Random ids, a mask with padding at the end of each row but the first, and segments."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (batch, seq), generator=generator)
    lengths = torch.arange(seq, seq - batch, -1).clamp(min=1)
    mask = (torch.arange(seq) < lengths[:, None]).long()
    return ids, mask, (torch.arange(seq) > seq // 2).long().expand(batch, seq).contiguous()


def _check_onnx(padded: nn.Module, model: nn.Module, path: Path) -> None:
    try:
        import onnxruntime
    except ImportError:
        return
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch, seq in ((1, 1), (3, 11), (2, 64)):
        inputs = example_inputs(model, batch, seq)
        names = [item.name for item in session.get_inputs()]
        named = dict(zip(("input_ids", "attention_mask", "token_type_ids"), inputs, strict=True))
        got = session.run(None, {name: named[name].numpy() for name in names})
        with torch.no_grad():
            want = padded(*inputs)
        for ours, theirs in zip(want, got, strict=True):
            error = (ours - torch.from_numpy(theirs)).abs().max().item()
            if not error <= ONNX_TOLERANCE:
                raise CheckpointError(
                    f"onnxruntime differs from the model by {error:.1e} at ({batch}, {seq}); "
                    "nothing was written. Try other versions of torch and onnxruntime."
                )


# --- command --------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("checkpoint", help="file, folder or URI of a checkpoint")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--to", default="hf", choices=["hf", "onnx"], help="form (default: hf)")
    parser.add_argument("--task", choices=TASKS, help="head (default: the checkpoint's)")
    parser.add_argument("--tokenizer", help="folder or name (default: the checkpoint's)")
    parser.add_argument("--run_folder", help="the run's folder (default: runs/RUN_NAME)")
    parser.add_argument("--num_attention_heads", type=int, help="for a bare state dict")


def main(args: argparse.Namespace) -> int:
    """Export and say where it lies."""
    changes = {}
    if args.num_attention_heads is not None:
        changes["num_attention_heads"] = args.num_attention_heads
    out = export_checkpoint(
        args.checkpoint,
        args.out,
        args.to,
        task=args.task,
        tokenizer=args.tokenizer,
        run_folder=args.run_folder,
        **changes,
    )
    for file in sorted(path for path in out.rglob("*") if path.is_file()):
        print(f"  {file}  {file.stat().st_size:,} bytes")
    return 0
