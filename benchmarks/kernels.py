"""Time of each Triton kernel against the time its bytes or its FLOPs need on this GPU.

    python benchmarks/kernels.py [--out benchmarks/records/NAME.json]

The shape of BERT base: 65,536 tokens, 12 heads of 64, intermediate 3,072, bfloat16; 70 % of the
sequences full, the rest uniform from an eighth of the length on. Each figure is the median over
replays of a CUDA graph, so launches on the host do not count. Ceilings are measured first: a
pass over 1 GiB (bytes read and written) and an 8,192 cubed matrix product.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from mosaicbert.models.kernels.attention import attention_backward, attention_forward
from mosaicbert.models.kernels.cross_entropy import CONFIG, linear_cross_entropy_forward
from mosaicbert.models.kernels.geglu import geglu_backward, geglu_forward
from mosaicbert.models.kernels.layernorm import layer_norm_backward, layer_norm_forward

TOKENS, HEADS, HEAD_DIM, INTERMEDIATE = 65_536, 12, 64, 3_072
HIDDEN = HEADS * HEAD_DIM
UNIT = TOKENS * HIDDEN * 2
"""Bytes of one bfloat16 activation."""


def microseconds(run: Callable[[], object], repeats: int = 15, calls: int = 2) -> float:
    """Median time of one call, from replays of a graph of `calls` of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / calls)
    return statistics.median(times)


def ceilings() -> tuple[float, float]:
    """Bytes and FLOPs a second."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / microseconds(lambda: torch.neg(source, out=target)) * 1e6
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    return bandwidth, 2 * 8192**3 / microseconds(lambda: a @ b) * 1e6


def lengths(max_seqlen: int) -> list[int]:
    """Lengths of sequences that fill `TOKENS` up."""
    generator = torch.Generator().manual_seed(17)
    found: list[int] = []
    while (left := TOKENS - sum(found)) > 0:
        full = float(torch.rand(1, generator=generator)) < 0.7
        length = int(torch.randint(max_seqlen // 8, max_seqlen, (1,), generator=generator))
        found.append(min(max_seqlen if full else length, left))
    return found


def attention_rows(max_seqlen: int, spread: float) -> list[tuple[str, float, float, float]]:
    """Name, time, bytes, FLOPs; `spread` scales q and k: the wider, the fewer tiles are skipped."""
    sizes = lengths(max_seqlen)
    cu_seqlens = torch.tensor([0, *sizes]).cumsum(0).int().cuda()
    slopes = 2.0 ** -torch.linspace(0.5, 8, HEADS, device="cuda")
    qkv = torch.randn(TOKENS, 3, HEADS, HEAD_DIM, device="cuda")
    qkv[:, :2] *= spread
    qkv = qkv.bfloat16()
    grad = torch.randn(TOKENS, HEADS, HEAD_DIM, device="cuda").bfloat16()
    args = (cu_seqlens, max_seqlen, slopes, -1)
    out, lse, reach, _ = attention_forward(qkv, *args)
    forward = microseconds(lambda: attention_forward(qkv, *args))
    backward = microseconds(lambda: attention_backward(grad, qkv, out, lse, reach, *args))
    flops = 4.0 * HIDDEN * sum(n * n for n in sizes)
    name = f"attention {max_seqlen}" + (f" q,k x{spread:g}" if spread != 1 else "")
    return [
        (f"{name} forward", forward, 4 * UNIT, flops),
        (f"{name} backward", backward, 7 * UNIT, 2.5 * flops),
    ]


def geglu_rows(dropout_p: float) -> list[tuple[str, float, float, float]]:
    """As `attention_rows`."""
    x = torch.randn(TOKENS, 2 * INTERMEDIATE, device="cuda").bfloat16()
    grad = torch.randn(TOKENS, INTERMEDIATE, device="cuda").bfloat16()
    seed = torch.tensor([17], device="cuda")
    unit = UNIT * INTERMEDIATE // HIDDEN
    name = f"GeGLU dropout {dropout_p:g}"

    def backward(recompute: bool) -> float:
        return microseconds(lambda: geglu_backward(grad, x, dropout_p, seed, recompute))

    return [
        (f"{name} forward", microseconds(lambda: geglu_forward(x, dropout_p, seed)), 3 * unit, 0),
        (f"{name} backward", backward(False), 5 * unit, 0),
        (f"{name} backward, output again", backward(True), 6 * unit, 0),
    ]


def norm_rows(dropout_p: float) -> list[tuple[str, float, float, float]]:
    """As `attention_rows`; the backward pass with both gradients."""
    x, residual, grad, other = torch.randn(4, TOKENS, HIDDEN, device="cuda").bfloat16()
    weight, bias, x_bias = torch.randn(3, HIDDEN, device="cuda")
    seed = torch.tensor([17], device="cuda")
    _, mean, rstd, _ = layer_norm_forward(x, residual, weight, bias, x_bias, 1e-12, dropout_p, seed)

    def forward() -> object:
        return layer_norm_forward(x, residual, weight, bias, x_bias, 1e-12, dropout_p, seed)

    def backward() -> object:
        return layer_norm_backward(
            grad, other, x, residual, weight, x_bias, mean, rstd, dropout_p, seed
        )

    name = f"LayerNorm dropout {dropout_p:g}"
    return [
        (f"{name} forward", microseconds(forward), 3 * UNIT, 0),
        (f"{name} backward", microseconds(backward), (6 if dropout_p else 5) * UNIT, 0),
    ]


def loss_rows() -> list[tuple[str, float, float, float]]:
    """The head's loss over 13,000 masked rows and 30,528 tokens; its matrix product timed apart."""
    x = torch.randn(13_000, HIDDEN, device="cuda").bfloat16()
    weight = (0.05 * torch.randn(30_528, HIDDEN, device="cuda")).bfloat16()
    bias = torch.randn(30_528, device="cuda").bfloat16()
    labels = torch.randint(30_522, (13_000,), device="cuda")
    product = microseconds(lambda: F.linear(x, weight, bias))
    rows = []
    for block, num_warps in ((2048, 4), (4096, 4), (4096, 8), (8192, 8), (8192, 16), (32768, 16)):
        CONFIG.update(BLOCK=block, num_warps=num_warps)
        whole = microseconds(
            lambda: linear_cross_entropy_forward(x, weight, bias, labels, 30_522, 0.0)
        )
        name = f"loss, blocks of {block}, {num_warps} warps"
        rows.append((name, whole - product, 2.0 * 2 * 13_000 * 30_528, 0.0))
    return rows


def compiled_norm_rows(dropout_p: float) -> list[tuple[str, float, float, float]]:
    """The same LayerNorm as torch.compile makes it, forward and backward, with one gradient."""
    leaves = [t.bfloat16() for t in torch.randn(2, TOKENS, HIDDEN, device="cuda")]
    leaves += list(torch.randn(3, HIDDEN, device="cuda"))
    leaves = [leaf.requires_grad_() for leaf in leaves]
    grad = torch.randn(TOKENS, HIDDEN, device="cuda").bfloat16()

    @torch.compile
    def norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> Tensor:
        summed = residual + F.dropout(x + x_bias.bfloat16(), dropout_p)
        return F.layer_norm(summed.float(), (HIDDEN,), weight, bias, 1e-12).bfloat16()

    def both() -> object:
        return torch.autograd.grad(norm(*leaves), leaves, grad)

    name = f"LayerNorm dropout {dropout_p:g}, compiled, both"
    return [(name, microseconds(both), (8 if dropout_p else 7) * UNIT, 0)]


def main() -> None:
    """Print the table; write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write the record")
    out = parser.parse_args().out
    bandwidth, peak = ceilings()
    rows = [row for n, s in ((64, 1), (128, 1), (512, 1), (2048, 1), (2048, 4)) for row in
            attention_rows(n, s)]  # fmt: skip
    for dropout_p in (0.0, 0.1):
        rows += geglu_rows(dropout_p) + norm_rows(dropout_p) + compiled_norm_rows(dropout_p)
    rows += loss_rows()
    print(f"pass {bandwidth / 1e12:.2f} TB/s, matrix product {peak / 1e12:.0f} TFLOP/s")
    print(f"{'kernel':42} {'us':>8} {'floor':>8} {'share':>6}  TB/s  TFLOP/s")
    table = []
    for name, time, num_bytes, flops in rows:
        floor = max(num_bytes / bandwidth, flops / peak) * 1e6
        rates = f"{num_bytes / time / 1e6:5.2f}  {flops / time / 1e6:7.0f}"
        print(f"{name:42} {time:8.1f} {floor:8.1f} {floor / time:6.2f} {rates}")
        table.append({"kernel": name, "us": round(time, 2), "floor_us": round(floor, 2)})
    if out is not None:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
        record = {
            "command": " ".join(["python", *sys.argv]),
            "hardware": torch.cuda.get_device_name(),
            "versions": {
                "torch": torch.__version__,
                "triton": triton.__version__,
                "python": platform.python_version(),
            },
            "commit": None if commit.returncode else commit.stdout.strip(),
            "bytes_per_second": bandwidth,
            "flops_per_second": peak,
            "rows": table,
        }
        out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
