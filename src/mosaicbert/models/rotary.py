"""Rotary position embedding (Su et al. 2021, "RoFormer"), over packed sequences."""

import torch
from torch import Tensor


def rotate(qk: Tensor, rotary: Tensor) -> Tensor:
    """The embedding of `qk (total_nnz, 2, heads, head_dim)`.

    `rotary (2, total_nnz, head_dim // 2)` holds cosines and sines.
    """
    cos, sin = rotary[:, :, None, None, :]  # each (total_nnz, 1, 1, head_dim // 2)
    left, right = qk.float().chunk(2, dim=-1)
    rotated = torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1)
    return rotated.to(qk.dtype)


def rotary_table(position: Tensor, head_dim: int, theta: float) -> Tensor:
    """Cosines and sines `(2, total_nnz, head_dim // 2)` float32 of `position (total_nnz,)`."""
    exponent = torch.arange(0, head_dim, 2, device=position.device) / head_dim
    angle = position[:, None] * theta**-exponent
    return torch.stack([angle.cos(), angle.sin()])
