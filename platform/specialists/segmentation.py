"""The segmentation specialist: a U-Net over slices with their neighbours, trained by cross-entropy and Dice.

nnU-Net's recipe at the size of the image decoder's trunk: MONAI's `BasicUNet`, instance norm, leaky ReLU, strong
augmentation, half of the slices with a lesion. The slices are those of the preprocessing contract.
"""

# S slices of a volume, B slices of a batch, C neighbouring slices, N structures, H W voxels, Z Y X native voxels

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnimri.models.preprocess import Preprocess
from omnimri.models.resample import pad_or_crop
from omnimri.models.scan import Scan
from omnimri.models.vocabulary import LESION, STRUCTURES
from omnimri.platform.data.shards import RowRef, row_to_scan
from omnimri.platform.evaluation.cases import columns_of
from omnimri.platform.evaluation.image_cases import reference_masks, segmentation_values
from omnimri.platform.specialists.augment import augment_slices
from omnimri.platform.specialists.fit import FitConfig, Fitted, fit
from omnimri.platform.specialists.networks import SliceUNet
from omnimri.platform.specialists.rows import Rows

SLICES_PER_PASS = 16


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig(FitConfig):
    """The segmentation network and its training."""

    channels: tuple[int, ...] = (16, 32, 48, 64, 96)
    neighbours: int = 1
    """Slices on each side that are shown with a slice."""
    volumes_per_step: int = 4
    slices_per_volume: int = 2
    lesion_share: float = 0.5
    """Of the slices, drawn among those that show a lesion where the volume has one."""
    validation_volumes: int = 8


@dataclass(frozen=True)
class LabelledSlices:
    """A volume as the network sees it, with its truth."""

    slices: Tensor
    """`(S, C, H, W)`."""
    masks: Tensor
    """Bool `(S, N, H, W)` in the order of STRUCTURES."""
    annotated: Tensor
    """Bool `(N,)`: structures that the row is labelled for."""


class Segmenter:
    """A network that answers as a method of the evaluation."""

    def __init__(self, network: nn.Module, preprocess: Preprocess, neighbours: int) -> None:
        self.network = network.eval()
        self.preprocess = preprocess
        self.neighbours = neighbours

    @torch.inference_mode()
    def probabilities(self, scan: Scan) -> dict[str, np.ndarray]:
        """Probability `(Z, Y, X)` of every structure."""
        source = self.preprocess.slices(scan)
        stacks = with_neighbours(source.slices, self.neighbours)
        parts = torch.cat([self.network(stack).sigmoid() for stack in stacks.split(SLICES_PER_PASS)])
        return {
            name: self.preprocess.to_native(part, source).astype(np.float32)
            for name, part in zip(STRUCTURES, parts.unbind(1), strict=True)
        }

    def __call__(self, scan: Scan, structures: Sequence[str]) -> dict[str, np.ndarray]:
        """Bool masks `(Z, Y, X)`."""
        found = self.probabilities(scan)
        return {name: found[name] >= 0.5 for name in structures}


def with_neighbours(slices: Tensor, neighbours: int) -> Tensor:
    """Slices `(S, H, W)` with those beside them as channels, `(S, 2 neighbours + 1, H, W)`; the ends are repeated."""
    index = torch.arange(len(slices))
    shifts = range(-neighbours, neighbours + 1)
    return torch.stack([slices[(index + shift).clamp(0, len(slices) - 1)] for shift in shifts], dim=1)


def segmentation_network(config: SegmentationConfig) -> SliceUNet:
    """A logit for each of STRUCTURES."""
    return SliceUNet(2 * config.neighbours + 1, len(STRUCTURES), config.channels)


def train_segmentation(
    train: Sequence[RowRef], validation: Sequence[RowRef], config: SegmentationConfig, preprocess: Preprocess
) -> tuple[nn.Module, Fitted]:
    """Train on labelled rows.

    Args:
        train: Rows with `has_labels`.
        validation: The same of the validation split; may be empty.
        config: Network and budget.
        preprocess: The contract that slices are made by.

    Returns:
        The network and its learning curve: mean of tissue and lesion Dice on the validation split.
    """
    torch.manual_seed(config.seed)
    network = segmentation_network(config)
    batches = _batches(train, config, preprocess)
    cases = list(Rows(list(validation)[: config.validation_volumes], columns_of("segment"), _case))
    segment = Segmenter(network, preprocess, config.neighbours)

    def loss_of_batch() -> Tensor:
        slices, masks, annotated = next(batches)
        slices, moved = augment_slices(slices, masks)
        assert moved is not None
        return segmentation_loss(network(slices), moved, annotated)

    def validate() -> float:
        return _mean_dice([segmentation_values(masks, segment(scan, list(masks))) for scan, masks in cases])

    return network, fit(network, loss_of_batch, validate, config, name="segment_unet")


def segmentation_loss(logits: Tensor, masks: Tensor, annotated: Tensor) -> Tensor:
    """Cross-entropy plus one minus Dice (nnU-Net), over the structures that each slice is annotated for.

    Args:
        logits: `(B, N, H, W)`.
        masks: Float, of the same shape.
        annotated: Bool `(B, N)`.
    """
    counted = annotated.float()[..., None, None]
    entropy = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    probability, masks = logits.sigmoid() * counted, masks * counted
    overlap = (probability * masks).sum(dim=(0, 2, 3))
    size = (probability + masks).sum(dim=(0, 2, 3))
    there = annotated.any(0)
    dice = ((2 * overlap + 1) / (size + 1))[there].mean()
    return (entropy * counted).mean() / counted.mean() + 1 - dice


def _mean_dice(scores: Sequence[Mapping[str, float]]) -> float:
    """Mean over volumes of each, then over the two that have a value."""
    if not scores:
        return float("nan")
    columns = [[score[name] for score in scores] for name in ("dice_tissues", "dice_lesion")]
    means = [np.nanmean(column) for column in columns if np.isfinite(column).any()]
    return float(np.mean(means)) if means else float("nan")


def _case(row: dict[str, Any]) -> tuple[Scan, dict[str, np.ndarray]] | None:
    masks = reference_masks(row)
    return (row_to_scan(row), masks) if masks else None


def labelled_slices(row: dict[str, Any], config: SegmentationConfig, preprocess: Preprocess) -> LabelledSlices | None:
    """A row as the network is trained on it; None where its label map names no structure of the vocabulary."""
    masks = reference_masks(row)
    if not masks:
        return None
    scan = row_to_scan(row)
    source = preprocess.slices(scan)
    empty = np.zeros(scan.image.shape, bool)
    on_slices = [preprocess.slice_labels(masks.get(name, empty), scan, source.axis) for name in STRUCTURES]
    shape, background = preprocess.inputs.slice_shape, float(source.slices.min())
    return LabelledSlices(
        with_neighbours(pad_or_crop(source.slices, shape, background), config.neighbours),
        pad_or_crop(torch.from_numpy(np.stack(on_slices, axis=1)), shape, False),
        torch.tensor([name in masks for name in STRUCTURES]),
    )


def _batches(
    refs: Sequence[RowRef], config: SegmentationConfig, preprocess: Preprocess
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Slices, masks and what is annotated, without end."""
    rng = np.random.default_rng(config.seed)
    rows = Rows(refs, columns_of("segment"), lambda row: labelled_slices(row, config, preprocess))
    volumes = rows.endless(rng)
    while True:
        chosen = [_drawn(next(volumes), rng, config) for _ in range(config.volumes_per_step)]
        slices, masks, annotated = zip(*chosen, strict=True)
        yield torch.cat(slices), torch.cat(masks).float(), torch.cat(annotated)


def _drawn(
    volume: LabelledSlices, rng: np.random.Generator, config: SegmentationConfig
) -> tuple[Tensor, Tensor, Tensor]:
    lesion = volume.masks[:, STRUCTURES.index(LESION)].flatten(1).any(1).numpy()
    anatomy = volume.masks.flatten(1).any(1).numpy()
    candidates = [
        np.flatnonzero(lesion if lesion.any() and rng.random() < config.lesion_share else anatomy)
        for _ in range(config.slices_per_volume)
    ]
    chosen = [int(rng.choice(places if len(places) else len(anatomy))) for places in candidates]
    return volume.slices[chosen], volume.masks[chosen], volume.annotated.expand(len(chosen), -1)
