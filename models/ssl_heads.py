"""Heads and losses of vision pretraining: pixels, neighbouring patches, whole volumes (paper, stage 1)."""

# B volumes per view, N tokens, V token width, D embedding width, A attributes

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class SSLHeads(nn.Module):
    """Pixel decoder and two projectors; dropped after stage 1."""

    def __init__(self, token_dim: int, token_stride: tuple[int, int, int], embedding_dim: int) -> None:
        super().__init__()
        self.token_stride = token_stride
        z, y, x = token_stride
        self.pixels = nn.Linear(token_dim, z * y * x)
        self.patch = _projector(token_dim, embedding_dim)
        self.volume = _projector(token_dim, embedding_dim)

    def predict_pixels(self, tokens: Tensor, grid: tuple[int, int, int], shape: tuple[int, int, int]) -> Tensor:
        """Tokens `(B, N, V)` on a grid to voxels `(B, 1, D, H, W)`; what stands over the edge is cut."""
        z, y, x = self.token_stride
        voxels = rearrange(self.pixels(tokens), "b (d h w) (z y x) -> b 1 (d z) (h y) (w x)",
                           d=grid[0], h=grid[1], w=grid[2], z=z, y=y, x=x)  # fmt: skip
        return voxels[..., : shape[0], : shape[1], : shape[2]]


def _projector(token_dim: int, embedding_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(token_dim, token_dim), nn.GELU(), nn.Linear(token_dim, embedding_dim))


def masked_image_loss(predicted: Tensor, target: Tensor, masked: Tensor, foreground: Tensor) -> Tensor:
    """Mean absolute error over masked foreground voxels (SimMIM, arXiv 2111.09886, eq. 2); all `(B, 1, D, H, W)`.

    Air is left out: it would be most of the loss and teaches nothing.
    """
    weight = (masked & foreground).to(predicted.dtype)
    return ((predicted - target).abs() * weight).sum() / weight.sum().clamp_min(1.0)


def neighbour_contrast_loss(
    anchors: Tensor, positives: Tensor, *, temperature: float = 0.2, valid: Tensor | None = None
) -> Tensor:
    """InfoNCE where the positive is a neighbouring patch and the negatives are patches of other volumes.

    Args:
        anchors: `(B, N, D)` projected tokens of one view.
        positives: `(B, N, D)` projected tokens at the neighbouring place in the other view.
        temperature: Softmax temperature.
        valid: Bool `(B, N)`, tokens that hold anatomy.

    Returns:
        Scalar; patches of the same volume are never negatives, being near-duplicates.
    """
    batch, num, _ = anchors.shape
    a = F.normalize(anchors, dim=-1).flatten(0, 1)
    p = F.normalize(positives, dim=-1).flatten(0, 1)
    volume = torch.arange(batch, device=a.device).repeat_interleave(num)
    logits = a @ p.T / temperature
    same_volume = volume[:, None] == volume[None]
    same_volume.fill_diagonal_(False)
    loss = F.cross_entropy(logits.masked_fill(same_volume, -torch.inf), torch.arange(len(a), device=a.device),
                           reduction="none")  # fmt: skip
    weight = torch.ones_like(loss) if valid is None else valid.flatten().to(loss.dtype)
    return (loss * weight).sum() / weight.sum().clamp_min(1.0)


def instance_loss(
    embeddings: Tensor, attributes: Tensor, *, temperature: float = 0.1, attribute_weight: float = 0.3
) -> Tensor:
    """Weighted supervised contrast over volumes (SupCon, arXiv 2004.11362, with graded positives).

    Another view of the same volume is a full positive; another volume counts `attribute_weight` times the share of
    its acquisition attributes (contrast, plane, anatomy) that agree.

    Args:
        embeddings: `(V B, D)`, the first view of every volume, then the second, and so on.
        attributes: Long `(B, A)`, negative where unknown.
        temperature: Softmax temperature.
        attribute_weight: Weight of a volume whose attributes all agree.
    """
    batch = attributes.shape[0]
    z = F.normalize(embeddings, dim=-1)
    num_views = len(z) // batch
    attributes = attributes.repeat(num_views, 1)
    known = (attributes[:, None] >= 0) & (attributes[None] >= 0)
    agree = ((attributes[:, None] == attributes[None]) & known).float().mean(-1)
    weight = attribute_weight * agree
    views = torch.arange(len(z), device=z.device) % batch
    weight[views[:, None] == views[None]] = 1.0
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    weight = weight.masked_fill(itself, 0.0)
    log_probability = (z @ z.T / temperature).masked_fill(itself, -torch.inf).log_softmax(-1).masked_fill(itself, 0.0)
    return -(weight * log_probability).sum(1).div(weight.sum(1).clamp_min(1e-6)).mean()
