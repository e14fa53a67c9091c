"""The model card of an exported checkpoint, with the numbers of its run."""

import json
from pathlib import Path
from typing import Any

_PIPELINES = {
    "mlm": "fill-mask",
    "classification": "text-classification",
    "token-classification": "token-classification",
    "embedding": "feature-extraction",
}
_AUTO = {
    "mlm": "AutoModelForMaskedLM",
    "classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "embedding": "AutoModel",
}
_SETTINGS = (
    "max_duration",
    "global_train_batch_size",
    "max_seq_len",
    "mlm_probability",
    "precision",
    "seed",
)


def model_card(
    model: Any, task: str, folder: Path, name: str, to: str, run_folder: Path | None
) -> str:
    """Markdown with Hugging Face's header.

    The run's settings come from the checkpoint's `state.json`, its losses and metrics from
    `run_folder`, by default `runs/RUN_NAME`; what is not there is left out.
    """
    library = "sentence-transformers" if task == "embedding" and to == "hf" else "transformers"
    tags = ["mosaicbert", model.config.model_type.replace("_", "-"), *(["onnx"] * (to == "onnx"))]
    header = ["---", f"library_name: {library}", f"pipeline_tag: {_PIPELINES[task]}", "tags:"]
    header += [*(f"- {tag}" for tag in tags), "---", "", f"# {name}", ""]
    return "\n".join(
        header + _shape(model, task) + _usage(model, task, name, to) + _run(folder, run_folder)
    )


def _shape(model: Any, task: str) -> list[str]:
    config = model.config
    kind = {"mosaic_bert": "Mosaic BERT", "bert": "BERT", "hf_bert": "BERT, changed"}
    parameters = sum(p.numel() for p in model.parameters())
    return [
        f"A {kind[config.model_type]} of {parameters:,} parameters for {_PIPELINES[task]}: "
        f"{config.num_hidden_layers} layers, {config.hidden_size} wide, "
        f"{config.num_attention_heads} heads, {config.vocab_size} tokens.",
        "",
    ]


def _usage(model: Any, task: str, name: str, to: str) -> list[str]:
    if to == "onnx":
        lines = [
            "import onnxruntime",
            "",
            f'session = onnxruntime.InferenceSession("{name}/model.onnx")',
        ]
    else:
        ours = model.config.model_type != "bert"
        lines = ["import mosaicbert  # makes transformers know the model"] if ours else []
        lines += [f"from transformers import {_AUTO[task]}, AutoTokenizer", ""]
        lines += [
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
            f'model = {_AUTO[task]}.from_pretrained("{name}")',
        ]
    return ["## Use", "", "```python", *lines, "```", ""]


def _run(folder: Path, run_folder: Path | None) -> list[str]:
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        progress, config = dict(state["progress"]), dict(state["config"])
        optimizer = dict(config["optimizer"])
        name = Path(str(state["run_name"])).name  # a checkpoint must not lead elsewhere
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    rows: dict[str, Any] = {
        "run": state.get("run_name"),
        "batches": progress.get("batch"),
        "samples": progress.get("sample"),
        "tokens": progress.get("token"),
        "seconds": progress.get("seconds"),
        "optimizer": state.get("optimizer"),
        "learning rate": optimizer.get("lr"),
        **{key: config.get(key) for key in _SETTINGS},
        **_metrics(run_folder or Path("runs", name), progress),
    }
    lines = [f"| {key} | {_number(value)} |" for key, value in rows.items() if value is not None]
    return ["## Training", "", "| | |", "|---|---|", *lines, ""]


def _metrics(run_folder: Path, progress: dict[str, Any]) -> dict[str, Any]:
    """The last value of each loss and metric up to the checkpoint, from the run's own folder.

    Nothing where the folder is not here, or is another run's: that one would not have seen as
    many tokens at this batch.
    """
    batch, tokens = progress.get("batch"), progress.get("token")
    found: dict[str, Any] = {}
    same_run = False
    try:
        lines = (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        for row in map(json.loads, lines):
            if row["batch"] <= batch:
                found |= {k: v for k, v in row.items() if k.startswith(("loss/", "metrics/"))}
                same_run |= (row["batch"], row.get("token")) == (batch, tokens)
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if same_run else {}


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
