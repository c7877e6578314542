"""Smooth random fields on a regular grid, cheap enough to draw several for every patient."""

from __future__ import annotations

import math

import numpy as np


def smooth_field(
    rng: np.random.Generator, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], scale_mm: float
) -> np.ndarray:
    """Gaussian random field with mean 0 and standard deviation 1, without structure finer than a scale.

    Values at the nodes of a coarse lattice are joined by cubic B-splines, one axis at a time.

    Args:
        rng: Source of the node values.
        shape: Voxels `(Z, Y, X)`.
        spacing_mm: Voxel edges `(z, y, x)`.
        scale_mm: Distance of the nodes; neighbouring bumps are about twice as far apart.

    Returns:
        Float32 `(Z, Y, X)`.
    """
    z, y, x = (_spline_matrix(size, step / scale_mm) for size, step in zip(shape, spacing_mm, strict=True))
    nodes = rng.standard_normal((z.shape[1], y.shape[1], x.shape[1]), dtype=np.float32)
    return np.einsum("zc,yd,xe,cde->zyx", z, y, x, nodes, optimize=True)


def _spline_matrix(size: int, step: float) -> np.ndarray:
    """Cubic B-spline weights `(size, nodes)` at positions 0, step, 2 step...; rows of norm one keep the variance."""
    position = np.arange(size) * step
    num_nodes = math.ceil(position[-1]) + 4
    distance = np.abs(position[:, None] + 1 - np.arange(num_nodes))
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    weights = np.where(distance < 1, near, far)
    return (weights / np.linalg.norm(weights, axis=1, keepdims=True)).astype(np.float32)


def ramp(depth_mm: np.ndarray, width_mm: float = 2.0) -> np.ndarray:
    """Share of a voxel that lies inside a surface: 0 outside, 1 inside, linear over `width_mm` around depth 0."""
    return np.clip(depth_mm / width_mm + 0.5, 0.0, 1.0)
