"""Optimizers against their definitions."""

import math

import pytest
import torch
from tiny_run import TinyModel
from torch import nn

from mosaicbert.config.sections import OptimizerConfig
from mosaicbert.train.optim import StableAdamW, build_optimizer, orthogonalize


def run(optimizer, params, schedule, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for factor in schedule:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def test_decoupled_adamw_is_adamw_with_the_decay_over_the_peak_rate():
    lr, decay, schedule = 5e-4, 1e-5, (0.0, 0.5, 1.0, 0.3)
    model, twin = TinyModel(seed=3), TinyModel(seed=3)
    ours = build_optimizer(model, OptimizerConfig(lr=lr, weight_decay=decay))
    theirs = torch.optim.AdamW(
        twin.parameters(), lr=lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.02
    )
    for group in theirs.param_groups:
        group["initial_lr"] = lr
    run(ours, list(model.parameters()), schedule)
    run(theirs, list(twin.parameters()), schedule)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("name", ["adamw", "decoupled_adamw"])
def test_adamw_follows_the_formula(name):
    """Loshchilov and Hutter, 2019, algorithm 2; the decay scaled by lr, or by lr / peak."""
    model = nn.Linear(5, 4, bias=False).double()
    config = OptimizerConfig(name=name, lr=1e-2, weight_decay=0.3)
    factors = [0.1, 1.0, 0.5, 0.2]
    p, optimizer = model.weight.detach().clone(), build_optimizer(model, config)
    run(optimizer, [model.weight], factors)
    generator = torch.Generator().manual_seed(0)
    mean = square = torch.zeros_like(p)
    for step, factor in enumerate(factors, start=1):
        g = torch.randn(p.shape, generator=generator).double()
        mean = config.betas[0] * mean + (1 - config.betas[0]) * g
        square = config.betas[1] * square + (1 - config.betas[1]) * g * g
        m_hat, v_hat = mean / (1 - config.betas[0] ** step), square / (1 - config.betas[1] ** step)
        decay = factor * config.weight_decay * (config.lr if name == "adamw" else 1.0)
        p = (1 - decay) * p - config.lr * factor * m_hat / (v_hat.sqrt() + config.eps)
    torch.testing.assert_close(model.weight.detach(), p)


def test_decay_alone_scales_with_the_rate():
    model = nn.Linear(2, 2)
    before = model.weight.clone()
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-2, weight_decay=0.1))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.5e-2
    optimizer.step()
    torch.testing.assert_close(model.weight, before * (1 - 0.1 * 0.5))


@pytest.mark.parametrize("name", ["decoupled_adamw", "adamw", "stable_adamw", "muon"])
def test_norms_and_biases_can_be_left_undecayed(name):
    model = TinyModel()
    config = OptimizerConfig(name=name, weight_decay=0.5, decay_norm_and_bias=False)
    optimizer = build_optimizer(model, config)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(groups) == len(list(model.parameters()))
    for p in model.parameters():
        assert (groups[id(p)]["weight_decay"] == 0) == (p.ndim < 2)


def reference_stable_adamw(p, grads, lr, betas, eps, decay):
    """Algorithm 2 of the paper, in plain steps."""
    mean = square = torch.zeros_like(p)
    for step, g in enumerate(grads, start=1):
        mean = betas[0] * mean + (1 - betas[0]) * g
        square = betas[1] * square + (1 - betas[1]) * g * g
        m_hat, v_hat = mean / (1 - betas[0] ** step), square / (1 - betas[1] ** step)
        rms = (g * g / v_hat.clamp_min(eps**2)).mean().sqrt()
        rate = lr / max(1.0, float(rms))
        p = p - rate * decay * p - rate * m_hat / (v_hat.sqrt() + eps)
    return p


def test_stable_adamw_follows_the_paper():
    torch.manual_seed(0)
    start = torch.randn(4, 3)
    grads = [torch.randn(4, 3) * scale for scale in (1.0, 0.1, 30.0, 1.0)]
    p = nn.Parameter(start.clone())
    group = {"params": [p], "lr": 0.1, "weight_decay": 0.05}
    optimizer = StableAdamW([group], betas=(0.9, 0.98), eps=1e-6)
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    expected = reference_stable_adamw(start, grads, 0.1, (0.9, 0.98), 1e-6, 0.05)
    torch.testing.assert_close(p.detach(), expected)


@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 128, 32)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    result = orthogonalize(matrices).float()
    values = torch.linalg.svdvals(result)
    assert values.flatten().quantile(0.1) > 0.5  # the smallest ones lag behind
    assert values.max() < 1.4
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    exact = u @ v
    cosine = (result * exact).sum((-2, -1)) / result.norm(dim=(-2, -1)) / exact.norm(dim=(-2, -1))
    assert cosine.min() > 0.9


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.ModuleList([nn.Module() for _ in range(2)])
        for block in self.layer:
            block.Wqkv = nn.Linear(16, 48)
            block.wo = nn.Linear(32, 16)
        self.embeddings = nn.Embedding(8, 16)


def model_of_layers():
    torch.manual_seed(0)
    model = nn.Module()
    model.encoder = Fused()
    return model


def test_muon_takes_hidden_matrices_and_each_stacked_one_for_itself():
    model = model_of_layers()
    config = OptimizerConfig(name="muon", muon_momentum=0.9, muon_nesterov=False, weight_decay=0.0)
    optimizer = build_optimizer(model, config)
    run(optimizer, list(model.parameters()), [0.0])
    weight = model.encoder.layer[1].Wqkv.weight
    assert "momentum_buffer" in optimizer.state[weight]
    assert "exp_avg" in optimizer.state[model.encoder.embeddings.weight]
    assert "exp_avg" in optimizer.state[model.encoder.layer[0].wo.bias]

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = {}
    for name, p in model.named_parameters():
        p.grad = grads[name] = torch.randn(p.shape)
        if p.ndim == 2:
            optimizer.state[p].pop("momentum_buffer", None)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    optimizer.step()
    for name in ("encoder.layer.0.Wqkv.weight", "encoder.layer.0.wo.weight"):
        moved = dict(model.named_parameters())[name] - before[name]
        parts = 3 if "Wqkv" in name else 1
        for part, grad in zip(moved.chunk(parts), grads[name].chunk(parts), strict=True):
            wide = part.shape[0] < part.shape[1]
            expected = orthogonalize((grad.mT if wide else grad)[None])[0].float()
            expected = expected.mT if wide else expected
            scale = math.sqrt(max(1, part.shape[0] / part.shape[1]))
            torch.testing.assert_close(part, -0.02 * scale * expected, rtol=0.05, atol=1e-3)


def test_muon_uses_momentum_and_decay():
    model = model_of_layers()
    config = OptimizerConfig(name="muon", muon_lr=0.1, weight_decay=0.5)
    optimizer = build_optimizer(model, config)
    p = model.encoder.layer[0].wo.weight
    p.grad = torch.full_like(p, 2.0)
    before = p.detach().clone()
    optimizer.step()
    buffer = optimizer.state[p]["momentum_buffer"]
    torch.testing.assert_close(buffer, torch.full_like(p, 2.0 * 0.05))
    update = orthogonalize(p.grad.mT[None])[0].mT.float()
    torch.testing.assert_close(p.detach(), before * 0.95 - 0.1 * update, rtol=0.05, atol=1e-3)


def test_muon_can_decay_only_what_its_update_makes_smaller():
    moved, starts = [], []
    for decay, cautious in ((0.5, True), (0.0, True), (0.5, False)):
        model = model_of_layers()
        options = {"muon_lr": 0.1, "weight_decay": decay, "muon_cautious_decay": cautious}
        optimizer = build_optimizer(model, OptimizerConfig(name="muon", **options))
        params = [layer.Wqkv.weight for layer in model.encoder.layer]
        params += [layer.wo.weight for layer in model.encoder.layer]
        starts.append(torch.cat([p.detach().flatten().clone() for p in params]))
        run(optimizer, list(model.parameters()), [1.0])
        moved.append(torch.cat([p.detach().flatten() for p in params]))
    start = starts[0]
    assert torch.equal(start, starts[1])
    cautious, without, with_decay = moved
    shrinks = (without - start) * start < 0
    assert 0.3 < shrinks.float().mean() < 0.7
    torch.testing.assert_close(cautious[shrinks], with_decay[shrinks])
    torch.testing.assert_close(cautious[~shrinks], without[~shrinks])
    assert (with_decay - without)[~shrinks].abs().max() > 1e-4  # the decay is there to be seen


def test_groups_have_names_and_peak_rates():
    groups = build_optimizer(
        TinyModel(), OptimizerConfig(name="muon", lr=1e-3, muon_lr=0.02)
    ).param_groups
    assert [group["name"] for group in groups] == ["hidden", "hidden_2", "all"]
    assert [group["initial_lr"] for group in groups] == [0.02, 0.02, 1e-3]
