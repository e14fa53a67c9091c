"""What a checkpoint holds, and how it gets into and out of a model and an optimizer.

A checkpoint is a folder of
- `model.safetensors`: the weights under the model's own names, tied ones once. With the
  `config.json` and tokenizer files beside it, transformers' AutoModel loads the folder.
- `optimizer.safetensors`: the optimizer's state as `PARAMETER/KEY`, such as
  `bert.embeddings.LayerNorm.bias/exp_avg`.
- `state.json`: progress, identity of the run, loss scale, configuration.

There is no pickle. Nothing else is needed for an exact resume: the learning rate follows from the
progress, data order and masks from seed and position, and dropout is seeded anew each step by
(seed, step, rank).
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mosaicbert.duration import Progress
from mosaicbert.errors import CheckpointError

FORMAT = 1
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
"""Written (and uploaded) last: a folder that has it is whole."""


@dataclass(slots=True)
class Checkpoint:
    """All of a checkpoint, on the host."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]

    @property
    def progress(self) -> Progress:
        """Where the run stood."""
        return Progress(**self.state["progress"])

    @property
    def name(self) -> str:
        """Name of its folder: `ep{epoch}-ba{batch}`."""
        return f"ep{self.progress.epoch}-ba{self.progress.batch}"

    @property
    def state_text(self) -> str:
        """Content of `state.json`."""
        return json.dumps(self.state, indent=2, sort_keys=True) + "\n"


# --- from a run ----------------------------------------------------------------------------------


def take_snapshot(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    state: Mapping[str, Any],
) -> Checkpoint:
    """Copy everything to the host, so that training can go on while it is written.

    `state`: what else `state.json` is to hold.
    """
    seen: set[Any] = set()
    weights = {}
    for name, tensor in model.state_dict().items():
        if _identity(tensor) not in seen:
            weights[name] = tensor
        seen.add(_identity(tensor))
    moments = {
        f"{name}/{key}": value
        for name, p in model.named_parameters()
        for key, value in optimizer.state.get(p, {}).items()
    }
    whole_state = {"format": FORMAT, "progress": asdict(progress), **state}
    checkpoint = Checkpoint(_to_host(weights), _to_host(moments), whole_state)
    if any(tensor.is_cuda for tensor in weights.values()):
        torch.cuda.synchronize()
    return checkpoint


def _to_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    copies = {}
    for name, tensor in tensors.items():
        copy = torch.empty_like(
            tensor, device="cpu", pin_memory=tensor.is_cuda, memory_format=torch.contiguous_format
        )
        copies[name] = copy.copy_(tensor.detach(), non_blocking=True)
    return copies


def _identity(tensor: Tensor) -> Any:
    """The same for tensors that are one, as tied weights are."""
    if tensor.numel() == 0:
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


# --- into a run ----------------------------------------------------------------------------------


def load_model(model: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """Put the weights into `model`, all of them and nothing else.

    Raises:
        CheckpointError: names or shapes differ; lists them.
    """
    own = model.state_dict()
    given = {_identity(own[name]) for name in weights if name in own}
    missing = [name for name, tensor in own.items() if _identity(tensor) not in given]
    unknown = [name for name in weights if name not in own]
    other = [
        f"{name} {tuple(weights[name].shape)} (the model's: {tuple(tensor.shape)})"
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if missing or unknown or other:
        raise CheckpointError(
            f"{where} is not of this model's shape."
            f"{_listed('Missing', missing)}{_listed('Unknown', unknown)}"
            f"{_listed('Of another shape', other)} Use the `model` section it was trained with."
        )
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)


MOMENTS = ({"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"})
"""What the optimizers keep of a parameter: Adam's kind, Muon."""


def load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, moments: dict[str, Tensor], where: str
) -> None:
    """Put the state into `optimizer`, by parameter name.

    Raises:
        CheckpointError: it is the state of other parameters; lists them.
    """
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    params = {name: p for name, p in model.named_parameters() if id(p) in group_of}
    found: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in moments.items():
        name, _, key = full_name.rpartition("/")
        found.setdefault(name, {})[key] = tensor
    missing, unknown = params.keys() - found.keys(), found.keys() - params.keys()
    if found and (missing or unknown):
        raise CheckpointError(
            f"{where} holds the optimizer state of other parameters."
            f"{_listed('Missing', sorted(missing))}{_listed('Unknown', sorted(unknown))} "
            "Set load_weights_only: true to start with a fresh optimizer."
        )
    damaged = [
        n
        for n, v in found.items()
        if v.keys() not in MOMENTS
        or any(t.dim() and t.shape != params[n].shape for t in v.values())
    ]
    if damaged:
        raise CheckpointError(f"{where} is damaged.{_listed('Optimizer state of', damaged)}")
    optimizer.state.clear()
    for name, values in found.items():
        p = params[name]
        on_device = group_of[id(p)].get("fused", False)  # fused kernels count steps there
        for key, tensor in values.items():
            device = p.device if on_device or key != "step" else torch.device("cpu")
            optimizer.state[p][key] = tensor.to(device, copy=True)


def _listed(title: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f" {title}: {', '.join(names[:8])}{more}."


# --- files ---------------------------------------------------------------------------------------


def write_folder(
    checkpoint: Checkpoint, folder: Path, write_assets: Callable[[Path], None] | None = None
) -> None:
    """Write all files of a checkpoint into an empty folder and make the disk keep them."""
    save_file(checkpoint.model, folder / MODEL_FILE, metadata={"format": "pt"})
    save_file(checkpoint.optimizer, folder / OPTIMIZER_FILE)
    if write_assets is not None:
        write_assets(folder)
    (folder / STATE_FILE).write_text(checkpoint.state_text, encoding="utf-8")
    sync_to_disk([*(path for path in folder.rglob("*") if path.is_file()), folder])


def sync_to_disk(paths: Iterable[Path]) -> None:
    """Have the disk keep files and folders for certain (fsync)."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


STATE_KINDS = {"run_id": str, "optimizer": str, "scaler": dict, "config": dict}
"""What a resumed run asks of the state."""
DAMAGE = (
    OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError,
)  # fmt: skip


def read_folder(folder: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: a file is missing or damaged, or of another format.
    """
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise CheckpointError(
                f"{folder / STATE_FILE} is of format {state.get('format')}, this version reads "
                f"format {FORMAT}."
            )
        for key, kind in STATE_KINDS.items():
            if not isinstance(state.get(key), kind):
                raise ValueError(f"{STATE_FILE} has no {key}")
        Progress(**state["progress"])
        model = load_file(folder / MODEL_FILE)
        optimizer = load_file(folder / OPTIMIZER_FILE)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} is no checkpoint of a run: {Path(str(error.filename or '?')).name} is "
            "missing. To start from other weights, set model.pretrained_checkpoint."
        ) from None
    except DAMAGE as error:
        raise CheckpointError(
            f"{folder} is damaged ({error}). Load an older checkpoint of the run."
        ) from error
    return Checkpoint(model, optimizer, state)
