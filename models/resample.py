"""Resizing and padding of tensors whose last axes are space."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def resize(array: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Resize the last axes to `shape`: averaging where it shrinks, linear where it grows; `(B, C, *spatial)`."""
    current = tuple(array.shape[2:])
    shrunk = tuple(min(a, b) for a, b in zip(current, shape, strict=True))
    if shrunk != current:
        array = F.interpolate(array, size=shrunk, mode="area")
    if shape != shrunk:
        mode = "trilinear" if len(shape) == 3 else "bilinear"
        array = F.interpolate(array, size=shape, mode=mode, align_corners=False)
    return array


def pad_or_crop(array: torch.Tensor, shape: tuple[int, ...], value: float = 0.0) -> torch.Tensor:
    """Centre the last axes of an array in `shape`, padding with `value` or cropping."""
    padding: list[int] = []
    for size, target in zip(reversed(array.shape[-len(shape) :]), reversed(shape), strict=True):
        before = (target - size) // 2
        padding += [before, target - size - before]
    return F.pad(array, padding, value=value)
