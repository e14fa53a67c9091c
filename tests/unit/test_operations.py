"""Dropout of eager layers on a CPU: its share, its scale, its gradient, its seed."""

import torch

from mosaicbert.models.operations import dropout


def test_dropout_drops_its_share_and_keeps_the_mean():
    torch.manual_seed(3)
    x = torch.ones(1001, 333, requires_grad=True)
    for p in (0.1, 0.5, 0.9):
        out = dropout(x, p)
        kept = out != 0
        assert abs(kept.float().mean().item() - (1 - p)) < 0.005
        torch.testing.assert_close(out[kept].mean().item(), 1 / (1 - p), rtol=1e-3, atol=0)
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert torch.equal(grad, out.detach())
        for rows in (kept.float().mean(0), kept.float().mean(1)):  # no stripes
            assert (rows - (1 - p)).abs().max() < 0.15


def test_dropout_follows_the_seed_and_keeps_the_dtype():
    x = torch.randn(77, 3).bfloat16()
    torch.manual_seed(1)
    first, second = dropout(x, 0.3), dropout(x, 0.3)
    torch.manual_seed(1)
    assert torch.equal(dropout(x, 0.3), first)
    assert not torch.equal(first, second)
    assert first.dtype == x.dtype


def test_no_dropout_leaves_everything_as_it_is():
    x = torch.randn(5)
    assert dropout(x, 0.0) is x or torch.equal(dropout(x, 0.0), x)
    assert torch.equal(dropout(x, 0.4, training=False), x)
