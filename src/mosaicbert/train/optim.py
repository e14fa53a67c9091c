"""Optimizers: AdamW in two notations of weight decay, StableAdamW, Muon.

All are `torch.optim.Optimizer`s whose groups carry a `name` and the peak `initial_lr` that the
schedule scales.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mosaicbert.config.sections import OptimizerConfig
from mosaicbert.train.distributed import Ranks

FUSED_MATRICES = {"Wqkv": 3, "gated_layers": 2}
"""Modules whose weight stacks several matrices of one shape along its rows."""
HIDDEN_LAYERS = re.compile(r"\.layers?\.\d+\.")
"""In the names of parameters of encoder layers, such as `bert.encoder.layer.0.mlp.wo.weight`."""


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, ranks: Ranks | None = None
) -> torch.optim.Optimizer:
    """The optimizer of `config.name` over all parameters of `model` that want a gradient.

    `decoupled_adamw` (Loshchilov & Hutter, 2019, as the original counts it) decays by
    `weight_decay * lr / initial_lr` a step; torch's AdamW decays by `weight_decay * lr`. So the one
    is the other with `weight_decay / initial_lr`, exactly. With `decay_norm_and_bias: false`,
    parameters of fewer than two dimensions are not decayed. `ranks` share Muon's work.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden = {name for name, p in named.items() if HIDDEN_LAYERS.search(name) and p.ndim == 2}
    if config.name != "muon":
        return _build_adam(_groups(named, config), config)
    if not hidden:  # a model without encoder layers has nothing for Muon
        hidden = {name for name, p in named.items() if p.ndim == 2}
    matrices = [
        _group(
            f"hidden_{parts}" if parts > 1 else "hidden",
            [named[name] for name in named if name in hidden and _num_matrices(name) == parts],
            config.muon_lr,
            config.weight_decay,
            momentum=config.muon_momentum,
            nesterov=config.muon_nesterov,
            cautious_decay=config.muon_cautious_decay,
            num_matrices=parts,
        )
        for parts in sorted({_num_matrices(name) for name in hidden})
    ]
    rest = {name: p for name, p in named.items() if name not in hidden}
    adam = _build_adam(_groups(rest, config), config) if rest else None
    return Muon(matrices, adam, ranks)


def _groups(named: dict[str, nn.Parameter], config: OptimizerConfig) -> list[dict[str, Any]]:
    decay = config.weight_decay
    if config.name == "decoupled_adamw":
        decay /= config.lr
    if config.decay_norm_and_bias:
        return [_group("all", list(named.values()), config.lr, decay)]
    groups = [
        _group("decayed", [p for p in named.values() if p.ndim >= 2], config.lr, decay),
        _group("not_decayed", [p for p in named.values() if p.ndim < 2], config.lr, 0.0),
    ]
    return [group for group in groups if group["params"]]


def _group(
    name: str, params: list[nn.Parameter], lr: float, weight_decay: float, **options: Any
) -> dict[str, Any]:
    return {
        "name": name,
        "params": params,
        "lr": lr,
        "initial_lr": lr,
        "weight_decay": weight_decay,
        **options,
    }


def _build_adam(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    if config.name == "stable_adamw":
        return StableAdamW(groups, betas=config.betas, eps=config.eps)
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)


def _num_matrices(name: str) -> int:
    return FUSED_MATRICES.get(name.split(".")[-2], 1) if "." in name else 1


class StableAdamW(torch.optim.Optimizer):
    """AdamW with AdaFactor's update clipping (Wortsman et al., 2023, arXiv:2304.13013, alg. 2).

    The learning rate of each tensor is divided by `max(1, RMS(g / sqrt(v)))`, so a gradient far
    above its running mean cannot throw the weights: no gradient clipping is needed.
    """

    def __init__(
        self, params: Iterable[Any], betas: tuple[float, float] = (0.9, 0.98), eps: float = 1e-6
    ) -> None:
        super().__init__(params, {"betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            states = [self._state(p) for p in params]
            means = [state["exp_avg"] for state in states]
            squares = [state["exp_avg_sq"] for state in states]
            torch._foreach_add_([state["step"] for state in states], 1)
            num_steps = float(states[0]["step"])  # stays on the host: no wait
            beta1, beta2 = group["betas"]

            torch._foreach_lerp_(means, grads, 1 - beta1)
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
            roots = torch._foreach_div(squares, 1 - beta2**num_steps)
            torch._foreach_sqrt_(roots)
            floored = torch._foreach_clamp_min(roots, group["eps"])
            ratios = torch._foreach_norm(torch._foreach_div(grads, floored))
            rms = [ratio / math.sqrt(p.numel()) for ratio, p in zip(ratios, params, strict=True)]
            rates = [-group["lr"] / value.clamp_min(1.0) for value in rms]

            updates = torch._foreach_div(means, 1 - beta1**num_steps)
            torch._foreach_add_(roots, group["eps"])
            torch._foreach_div_(updates, roots)
            torch._foreach_add_(updates, params, alpha=group["weight_decay"])
            torch._foreach_mul_(updates, rates)
            torch._foreach_add_(params, updates)

    def _state(self, p: nn.Parameter) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        return state


class _Matrix(NamedTuple):
    """A weight for Muon, or one of those stacked in it."""

    weight: Tensor  # (rows, cols), as the next two
    grad: Tensor
    mean: Tensor  # of the gradients
    share: float | None  # of the mean beside the gradient; None: the mean alone
    rate: float
    decay: float  # of the weights that the update makes smaller


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, for matrices; another optimizer for the rest.

    Jordan et al., 2024 (kellerjordan.github.io/posts/muon): each update is replaced by the nearest
    semi-orthogonal matrix and scaled by `sqrt(max(1, rows / cols))`; weight decay is decoupled and
    scaled by the learning rate, and with `cautious_decay` leaves out the weights that the update
    makes larger (Chen et al., 2025, arXiv:2510.12402). Matrices of one shape, of all layers and
    groups' parts, go through one batched iteration. A weight that stacks q, k and v (or the two
    halves of a gated unit) counts as that many matrices. With `ranks`, each iterates over its share
    of them.
    """

    def __init__(
        self,
        matrices: Sequence[dict[str, Any]],
        rest: torch.optim.Optimizer | None,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(matrices, {})
        self.rest = rest
        self.ranks = ranks
        if rest is not None:  # one state and one list of groups for both
            rest.state = self.state
            self.param_groups = [*self.param_groups, *rest.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        assert closure is None, "closures are not supported"
        by_shape: dict[torch.Size, list[_Matrix]] = {}
        for group in self.param_groups:
            if "num_matrices" in group:
                for matrix in self._matrices(group):
                    by_shape.setdefault(matrix.weight.shape, []).append(matrix)
        for members in by_shape.values():
            updates = self._orthogonalized(members)
            for (weight, *_, rate, decay), update in zip(members, updates, strict=True):
                if decay:
                    weight.sub_(weight * (update * weight > 0), alpha=decay)
                weight.add_(update, alpha=rate)  # cast in passing
        if self.rest is not None:
            self.rest.step()

    def _matrices(self, group: dict[str, Any]) -> Iterator[_Matrix]:
        """Those of a group, their momentum and, where it is not cautious, their decay done."""
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        grads = [p.grad for p in params if p.grad is not None]
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        means = [self.state[p]["momentum_buffer"] for p in params]
        momentum = group["momentum"]
        torch._foreach_lerp_(means, grads, 1 - momentum)
        decay = group["lr"] * group["weight_decay"]
        if not group.get("cautious_decay"):  # checkpoints of before have no such key
            torch._foreach_mul_(params, 1 - decay)
            decay = 0.0
        # Nesterov's momentum times a constant, which the iteration divides by the norm
        share = momentum / (1 - momentum) if group["nesterov"] else None
        for p, grad, mean in zip(params, grads, means, strict=True):
            rows, cols = p.shape[0] // group["num_matrices"], p.shape[1]
            rate = -group["lr"] * math.sqrt(max(1.0, rows / cols))
            parts = (torch.split(tensor, rows) for tensor in (p, grad, mean))
            for weight, own_grad, own_mean in zip(*parts, strict=True):
                yield _Matrix(weight, own_grad, own_mean, share, rate, decay)

    def _orthogonalized(self, members: list[_Matrix]) -> Tensor:
        """Each rank takes its share of the matrices; all get all."""
        world_size = self.ranks.world_size if self.ranks else 1
        if self.ranks is None or world_size == 1:
            return orthogonalize(_directions(members))
        share = -(-len(members) // world_size)
        first = min(self.ranks.rank * share, len(members) - 1)
        mine = orthogonalize(_directions(members[first : first + share]))
        if len(mine) < share:  # the last ranks may have less, or nothing of use
            mine = torch.cat([mine, mine.new_zeros(share - len(mine), *mine.shape[1:])])
        return self.ranks.gather_(mine)[: len(members)]


def _directions(members: Sequence[_Matrix]) -> Tensor:
    """The updates before they are made orthogonal: `(len(members), rows, cols)`.

    Written at once in the type of the iteration: memory traffic is what they cost.
    """
    weight = members[0].weight
    dtype = torch.float32 if weight.device.type == "cpu" else torch.bfloat16
    stacked = weight.new_empty(len(members), *weight.shape, dtype=dtype)
    for target, matrix in zip(stacked, members, strict=True):
        if matrix.share is None:
            target.copy_(matrix.mean)
        else:
            torch.add(matrix.grad, matrix.mean, alpha=matrix.share, out=target)
    return stacked


def orthogonalize(matrices: Tensor, num_iterations: int = 5) -> Tensor:
    """About `U V^T` of each matrix's singular value decomposition `U S V^T`.

    Quintic Newton-Schulz iteration with Jordan's coefficients: singular values end within about
    0.7 to 1.2. That needs no precision: bfloat16, but float32 on a CPU, which multiplies it faster.

    Args:
        matrices: `(batch, rows, cols)`.
        num_iterations: five suffice for the spectra of gradients.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.float() if matrices.device.type == "cpu" else matrices.bfloat16()
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    wide = x.shape[-2] < x.shape[-1]
    for _ in range(num_iterations):
        gram = x @ x.mT if wide else x.mT @ x  # of the smaller size
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factors = (polynomial, x) if wide else (x, polynomial)
        x = torch.baddbmm(x, *factors, beta=a)
    return x
