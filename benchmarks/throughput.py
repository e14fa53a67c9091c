"""Training steps of Mosaic BERT and its peers, side by side on one GPU.

    python benchmarks/throughput.py [--rows REGEX] [--repeats 3] [--batch 4096] [--profile NAME]
        [--commit HASH] [--out benchmarks/records/NAME.json] [--picture NAME.png]
        [--device cpu --tiny]

One process. Every row is a model with its optimizer (AdamW); a step is forward, backward and update
through the trainer's own classes (compiled rows as CUDA graphs, as the trainer runs them), over
`--batch` samples (fewer of longer ones, so that tokens stay about the same) in microbatches: the
same made-up samples for all rows, 70 % of them full and the rest evenly from an eighth of the
length on, packed for Mosaic BERT and padded for the others. Each row is warmed up and timed
`--repeats` times, figures are medians; the first row comes once more at the end, which shows how
far the machine drifted. (Rows cannot take turns: graphs hold their memory.)
Tokens are real ones. MFU: 6 FLOPs for each real token and weight of a matrix (MLM head, and what
runs on masked tokens only: for these), plus 12 * width * layers * mean length for attention, over
the dense bf16 peak (H100: 989 TFLOP/s), for fp8 too.
`--profile` names the row whose kernels are set against what their bytes or FLOPs need.
"""

import argparse
import gc
import json
import logging
import platform
import re
import statistics
import sys
import time
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mosaicbert.batch import Batch, LossOutput
from mosaicbert.bench import Bench, kernel_times, made_up_samples, made_up_step
from mosaicbert.config import PretrainConfig
from mosaicbert.models.build import SHAPES, build_model, compile_model, is_packed, use_fp8
from mosaicbert.models.heads import cross_entropy_sum, training_flops
from mosaicbert.train.distributed import Ranks

VOCAB_SIZE = 30_522


@dataclass(frozen=True)
class Row:
    """What to time."""

    model: str  # hf_bert, modernbert, mosaic_bert, mosaic_bert_v2
    microbatch: int  # samples of full length
    compile: bool = True
    whole: bool = False  # the last layer on all tokens, not on the masked ones alone
    seq: int = 128
    mlm: float = 0.3
    shape: str = "bert-base-uncased"
    precision: str = "amp_bf16"
    changes: dict[str, Any] = field(default_factory=dict)


PLAIN = {"hidden_dropout_prob": 0.0}
GATE, ANEW = {"fp8_gate": True}, {"recompute_geglu": True}
ROWS = {
    "hf eager 128": Row("hf_bert", 128, compile=False, mlm=0.15),
    "hf eager 512": Row("hf_bert", 512, compile=False, mlm=0.15),
    "hf compiled 256": Row("hf_bert", 256, mlm=0.15),
    "hf compiled 512": Row("hf_bert", 512, mlm=0.15),
    "modernbert eager 128": Row("modernbert", 128, compile=False),
    "modernbert compiled 128": Row("modernbert", 128),
    "mosaic 128": Row("mosaic_bert", 128),
    "mosaic 256": Row("mosaic_bert", 256),
    "mosaic 512": Row("mosaic_bert", 512),
    "mosaic 512 whole": Row("mosaic_bert", 512, whole=True),
    "mosaic 1024": Row("mosaic_bert", 1024),
    "mosaic 512 eager": Row("mosaic_bert", 512, compile=False),
    "mosaic 512 no dropout": Row("mosaic_bert", 512, changes=PLAIN),
    "mosaic 512 masks 15 %": Row("mosaic_bert", 512, mlm=0.15),
    "mosaic 512 flex": Row("mosaic_bert", 512, changes={"attention_backend": "flex"}),
    "mosaic 512 sdpa": Row("mosaic_bert", 512, changes={"attention_backend": "sdpa"}),
    "mosaic 512 fp8": Row("mosaic_bert", 512, precision="fp8"),
    "mosaic 512 fp8 gate": Row("mosaic_bert", 512, precision="fp8", changes=GATE),
    "mosaic 512 fp8 anew": Row("mosaic_bert", 512, precision="fp8", changes=ANEW),
    "mosaic 512 fp8 gate anew": Row("mosaic_bert", 512, precision="fp8", changes=GATE | ANEW),
    "mosaic 512 anew": Row("mosaic_bert", 512, changes=ANEW),
    "mosaic 1024 fp8": Row("mosaic_bert", 1024, precision="fp8"),
    "v2 512": Row("mosaic_bert_v2", 512),
    "v2 512 fp8": Row("mosaic_bert_v2", 512, precision="fp8"),
    "large 256": Row("mosaic_bert", 256, shape="bert-large-uncased"),
    "large 512": Row("mosaic_bert", 512, shape="bert-large-uncased"),
    "large 256 fp8": Row("mosaic_bert", 256, shape="bert-large-uncased", precision="fp8"),
    "mosaic seq 512": Row("mosaic_bert", 128, seq=512),
    "mosaic seq 512 fp8": Row("mosaic_bert", 128, seq=512, precision="fp8"),
    "mosaic seq 2048": Row("mosaic_bert", 32, seq=2048),
    "mosaic seq 2048 fp8": Row("mosaic_bert", 32, seq=2048, precision="fp8"),
    "hf compiled seq 512": Row("hf_bert", 64, seq=512, mlm=0.15),
    # For CPUs: `--device cpu --batch 32 --rows '^cpu'`
    **{
        f"cpu {name} {run} {microbatch}{suffix}": Row(
            model, microbatch, compile=run == "compiled", mlm=mlm, precision=precision
        )
        for precision, suffix, microbatch in (
            ("fp32", "", 8),
            ("amp_bf16", " bf16", 8),
            ("amp_bf16", " bf16", 32),
        )
        for name, model, mlm in (
            ("hf", "hf_bert", 0.15),
            ("mosaic", "mosaic_bert", 0.15),
            ("v2", "mosaic_bert_v2", 0.3),
        )
        for run in ("eager", "compiled")
    },
}
CONFIG = {
    "max_duration": "1ba",
    "train_loader": {"dataset": {}},
    "model": {"name": "mosaic_bert"},
    "optimizer": {"name": "decoupled_adamw", "lr": 1e-5},
    "device_train_microbatch_size": 1,  # fixed: too little memory is an error
}


class ModernBert(nn.Module):
    """transformers' ModernBERT, padded, its head on the masked rows only, as it was trained."""

    mlm_share = 0.3

    def __init__(self, **shape: Any) -> None:
        super().__init__()
        from transformers import ModernBertConfig, ModernBertForMaskedLM

        config = ModernBertConfig(attn_implementation="sdpa", **shape)
        self.inner = ModernBertForMaskedLM(config)

    def loss(self, batch: Batch, return_logits: bool = False) -> LossOutput:
        """The summed loss."""
        x = self.inner.model(batch.input_ids, batch.attention_mask).last_hidden_state
        rows = x.flatten(0, 1)[batch.target_positions]
        logits = self.inner.decoder(self.inner.head(rows))
        return LossOutput(cross_entropy_sum(logits, batch.labels))

    def flops_per_token(self, seq_len: float) -> float:
        """As the other models count."""
        config = self.inner.config
        linear = sum(p.numel() for p in self.inner.model.layers.parameters() if p.ndim == 2)
        head = sum(p.numel() for p in self.inner.head.parameters() if p.ndim == 2)
        head += self.inner.decoder.weight.numel()
        width = config.hidden_size * config.num_hidden_layers
        return training_flops(linear + self.mlm_share * head, width, seq_len)

    def compiled(self) -> None:
        """Compile the whole."""
        self.inner.model.compile(dynamic=False)


def build(row: Row, args: argparse.Namespace, ranks: Ranks) -> Bench:
    """The row's model, compiled if it is to be, and its step."""
    torch.manual_seed(17)
    seq = 32 if args.tiny else row.seq
    microbatch = 4 if args.tiny else row.microbatch
    shape = SHAPES["prajjwal1/bert-tiny"] if args.tiny else {}
    model: Any
    if row.model == "modernbert":
        tiny = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = ModernBert(**(tiny if args.tiny else {}))
    else:
        settings = {
            "name": row.model,
            "pretrained_model_name": row.shape,
            "model_config": shape | row.changes,
        }
        config = PretrainConfig.model_validate(
            CONFIG | {"global_train_batch_size": 1} | {"model": settings}
        )
        model = build_model(config.model, "mlm", max_seq_len=seq, vocab_size=VOCAB_SIZE)
    if row.precision == "fp8":
        use_fp8(model, ranks.device)
    if row.whole:
        model.loss = types.MethodType(whole_loss, model)
    if row.compile:
        model.compiled() if row.model == "modernbert" else compile_model(model)
    num_samples = max(1, args.batch * 128 // seq) if not args.tiny else 8
    samples = made_up_samples(num_samples, seq, vocab_size=VOCAB_SIZE, mlm_probability=row.mlm)
    step = made_up_step(
        samples,
        microbatch_samples=microbatch,
        max_seq_len=seq,
        packed=is_packed(model),
        grid=row.compile,
    )
    settings = {"global_train_batch_size": num_samples, "compile": row.compile}
    settings["precision"] = "fp32" if args.tiny else row.precision
    config = PretrainConfig.model_validate(CONFIG | settings)
    return Bench(model, step, config, ranks)


def whole_loss(model: Any, batch: Batch, return_logits: bool = False) -> LossOutput:
    """Mosaic BERT's loss with all layers on all tokens."""
    x = model._encode(batch)[batch.target_positions]
    return LossOutput(model.cls.predictions.loss(x, batch.labels, fused=True))


def warm_up(bench: Bench) -> dict[str, Any]:
    """Compile and warm up; what that took and left."""
    counters = torch._dynamo.utils.counters
    before = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    began = time.perf_counter()
    bench.seconds(2)
    return {
        "warm_up_seconds": round(time.perf_counter() - began, 2),
        "graphs": counters["stats"]["unique_graphs"] - before[0],
        "graph_breaks": sum(counters["graph_break"].values()) - before[1],
        "peak_bytes": bench.peak_bytes(),
    }


def measure(
    args: argparse.Namespace, ranks: Ranks, write: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """All rows: what they are, their times, and what these come to; `write` has them after each."""
    names = [name for name in ROWS if re.search(args.rows, name)]
    rows: list[dict[str, Any]] = []
    began = time.monotonic()
    for number, name in enumerate([*names, *names[:1]]):
        if args.limit and time.monotonic() - began > args.limit:
            log(f"{name}: left out, no time")
            continue
        row: dict[str, Any] = {"name": name, **asdict(ROWS[name])}
        if number == len(names):
            row["name"] = f"{name} again"
        try:
            row |= measure_one(name, args, ranks)
            log(f"{row['name']}: {row['tokens_per_second']:,.0f} tok/s")
        except Exception as error:  # a row that cannot be does not end the others
            row["error"] = f"{type(error).__name__}: {str(error)[:500]}"
            log(f"{row['name']}: {row['error']}")
        rows.append(row)
        write(rows)
        release()
    return rows


def measure_one(name: str, args: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """One row: compiled and warm, then timed."""
    bench = build(ROWS[name], args, ranks)
    row: dict[str, Any] = {"tokens": bench.num_tokens, "microbatches": len(bench.microbatches)}
    row |= warm_up(bench)
    times = [bench.seconds(args.steps) for _ in range(args.repeats)]
    row |= {"step_seconds": times, **bench.rates(statistics.median(times))}
    row["cuda_graphs"] = bench.num_graphs
    if name in args.profile and args.device != "cpu":
        row["profile"] = profile(name, bench)
    return row


def release() -> None:
    """Give cached memory back, so that rows do not pay for one another's."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- where the time goes --------------------------------------------------------------------------

CLASSES = {
    "matrix products": r"gemm|nvjet|cutlass|cublas|xmma|wgmma",
    "attention": r"^(forward|backward|reach|dq|dkv)_kernel|attention|flash|fmha|flex",
    "GeGLU": r"^_geglu",
    "LayerNorm": r"^_?norm_(forward|backward)",
    "optimizer": r"adam|multi_tensor",
    "copies from the host": r"memcpy htod",
}
"""Kernels by name, first match counts; what matches none is `the rest`."""


def by_class(kernels: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Time and number of kernels of each class."""
    found: dict[str, dict[str, float]] = {}
    for kernel in kernels:
        matches = (
            c for c, pattern in CLASSES.items() if re.search(pattern, kernel["name"].lower())
        )
        row = found.setdefault(next(matches, "the rest"), {"us": 0.0, "count": 0})
        row["us"] += kernel["us"]
        row["count"] += kernel["count"]
    return found


def ceilings() -> tuple[float, float, float]:
    """Bytes and FLOPs a second: a pass over memory; products of 8192 in bf16 and (or 0) in fp8."""

    def best(run: Any) -> float:
        times = []
        for _ in range(8):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times[3:])

    def eight(x: torch.Tensor) -> torch.Tensor:
        return (x * 8).to(torch.float8_e4m3fn)

    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / best(lambda: torch.neg(source, out=target))
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    flops = 2 * 8192**3 / best(lambda: F.linear(a, b))
    if torch.cuda.get_device_capability() < (8, 9):
        return bandwidth, flops, 0.0
    one = torch.ones((), device="cuda")
    a8, b8 = eight(a), eight(b).t()
    kwargs = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16, "use_fast_accum": True}
    return bandwidth, flops, 2 * 8192**3 / best(lambda: torch._scaled_mm(a8, b8, **kwargs))


def needs(bench: Bench) -> dict[str, tuple[float, float]]:
    """Least bytes and FLOPs of each class in one step of a Mosaic BERT.

    Bytes: each activation in bf16 read or written once where the kernel must; weights and moments
    in float32 once. Attention 4 + 7 units of (tokens, hidden), LayerNorm 3 + 6 twice a layer, GeGLU
    3 + 5 of (tokens, intermediate); AdamW reads four and writes three numbers for each weight.
    """
    config = bench.model.config
    tokens = sum(batch.input_ids.numel() for batch in bench.microbatches)
    unit = 2.0 * tokens * config.hidden_size * config.num_hidden_layers
    wide = unit * config.intermediate_size / config.hidden_size
    flops = bench.model.flops_per_token(0.0) * bench.num_tokens
    mean_square = sum(
        float((batch.cu_seqlens.diff().double() ** 2).sum()) for batch in bench.microbatches
    )
    attention = 14.0 * config.hidden_size * config.num_hidden_layers * mean_square
    weights = sum(p.numel() for p in bench.model.parameters())
    return {
        "matrix products": (0.0, flops),
        "attention": (11 * unit, attention),
        "GeGLU": (8 * wide, 0.0),
        "LayerNorm": (18 * unit, 0.0),
        "optimizer": (28.0 * weights, 0.0),
    }


def profile(name: str, bench: Bench) -> dict[str, Any]:
    """The row's kernels, by themselves and by class, against their floors; prints a table."""
    kernels = kernel_times(bench)
    seconds = bench.seconds(2)
    busy = sum(kernel["us"] for kernel in kernels) / 1e6
    bandwidth, peak, peak8 = ceilings()
    classes = by_class(kernels)
    for key, (num_bytes, flops) in needs(bench).items():
        if key in classes:
            least = flops / peak
            if key == "matrix products" and ROWS[name].precision == "fp8":
                least = flops / 3 / peak + flops * 2 / 3 / peak8  # gradients of weights in bf16
            classes[key]["floor_us"] = max(num_bytes / bandwidth, least) * 1e6
    log(
        f"\n{name}: step {seconds * 1e3:.1f} ms, kernels {busy * 1e3:.1f} ms; "
        f"{bandwidth / 1e12:.2f} TB/s, {peak / 1e12:.0f} TFLOP/s, fp8 {peak8 / 1e12:.0f}"
    )
    for key, row in sorted(classes.items(), key=lambda item: -item[1]["us"]):
        floor = f"{row['floor_us'] / 1e3:8.2f}" if "floor_us" in row else "       -"
        log(f"{key:22} {row['us'] / 1e3:9.2f} ms  floor {floor} ms  {row['count']:6.0f} kernels")
    for row in kernels[:45]:
        log(f"{row['us'] / 1e3:9.2f} ms {row['count']:5} {row['name'][:90]}")
    return {
        "row": name,
        "step_seconds": seconds,
        "kernel_seconds": busy,
        "bytes_per_second": bandwidth,
        "flops_per_second": peak,
        "fp8_flops_per_second": peak8,
        "classes": classes,
        "kernels": kernels[:80],
    }


def draw(found: dict[str, Any], path: Path) -> None:
    """Time of each class of kernels, beside its floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = sorted(found["classes"].items(), key=lambda item: item[1]["us"])
    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(rows) + 1.5), layout="constrained")
    names = [name for name, _ in rows]
    axes.barh(names, [row["us"] / 1e3 for _, row in rows], color="#9ecae1", label="measured")
    floors = [row.get("floor_us", 0.0) / 1e3 for _, row in rows]
    axes.barh(names, floors, height=0.35, color="#08519c", label="floor: bytes or FLOPs")
    axes.set_xlabel("ms a step")
    axes.set_title(f"{found['row']}: {found['step_seconds'] * 1e3:.0f} ms a step")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


# --- output ---------------------------------------------------------------------------------------


def log(text: str) -> None:
    """Print at once: the run may be cut off."""
    print(text, flush=True)


def table(rows: list[dict[str, Any]]) -> None:
    """Print the medians."""
    log(
        f"\n{'row':26} {'tok/s':>9} {'MFU':>6} {'GB':>6} {'ms/step':>8} {'spread':>7} graphs "
        "warm-up"
    )
    for row in rows:
        if "error" in row:
            log(f"{row['name']:26} {row['error'][:80]}")
            continue
        seconds = statistics.median(row["step_seconds"])
        spread = (max(row["step_seconds"]) - min(row["step_seconds"])) / seconds
        mfu, peak = row["mfu"] or 0.0, row["peak_bytes"] or 0
        log(
            f"{row['name']:26} {row['tokens_per_second']:9,.0f} {mfu:6.3f} {peak / 1e9:6.1f} "
            f"{seconds * 1e3:8.1f} {spread:7.1%} {row['graphs']:6} {row['warm_up_seconds']:7.1f}"
        )


def main() -> int:
    """Time, print, and write the record where one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="", help="regular expression: which rows")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help="steps of one timing")
    parser.add_argument("--batch", type=int, default=4096, help="samples of 128 tokens in a step")
    parser.add_argument("--limit", type=float, help="begin no row after so many seconds")
    parser.add_argument("--profile", action="append", default=[], help="rows to look into")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to rehearse")
    parser.add_argument("--commit", help="commit that is measured")
    parser.add_argument("--out", type=Path, help="where to write the record")
    parser.add_argument("--picture", type=Path, help="where to draw the first profile")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    ranks = Ranks(0, 1, 0, torch.device(args.device))
    record: dict[str, Any] = {
        "claim": "tokens a second of a training step: forward, backward and update",
        "command": " ".join(["python", *sys.argv]),
        "hardware": "CPU" if args.device == "cpu" else torch.cuda.get_device_name(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers")},
        },
        "commit": args.commit,
        "samples_per_step": args.batch,
    }

    def write(rows: list[dict[str, Any]]) -> None:
        if args.out:
            args.out.write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")

    rows = measure(args, ranks, write)
    table(rows)
    profiles = [row["profile"] for row in rows if "profile" in row]
    if args.picture and profiles:
        draw(profiles[0], args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
