"""The diagnosis specialist: a DenseNet over slices with their neighbours, pooled to one answer per volume.

Lesions are small beside a volume, so that the network looks at slices of the preprocessing contract at full
resolution, takes the strongest response in each (maximum pooling), and the volume says what its most telling slices
say. Where boxes tell which slices show the diagnosis, these are taught slice by slice: without that, a hundred volumes
teach it nothing in minutes.
"""

# S slices of a volume, C neighbouring slices, K diagnoses, H W voxels

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.nets import DenseNet
from torch import Tensor, nn

from omnimri.models.preprocess import Preprocess
from omnimri.models.resample import pad_or_crop
from omnimri.models.scan import Scan
from omnimri.models.vocabulary import DIAGNOSES, NORMAL
from omnimri.platform.data.shards import RowRef, row_to_scan
from omnimri.platform.evaluation.cases import columns_of
from omnimri.platform.specialists.augment import augment_slices
from omnimri.platform.specialists.fit import FitConfig, Fitted, fit
from omnimri.platform.specialists.rows import Rows
from omnimri.platform.specialists.segmentation import with_neighbours

_NORM = ("group", {"num_groups": 1})


@dataclass(frozen=True, kw_only=True)
class DiagnosisConfig(FitConfig):
    """The classifier and its training."""

    init_features: int = 24
    growth_rate: int = 12
    blocks: tuple[int, ...] = (3, 4, 4)
    """Layers of each dense block."""
    neighbours: int = 1
    volumes_per_step: int = 4
    slices_per_volume: int = 8
    """Drawn of each volume, half of them among those that a box cuts."""
    slice_weight: float = 1.0
    """Of the loss on single slices, where boxes tell."""
    sharpness: float = 4.0
    """Of pooling over slices: 0 is their mean, large is their maximum."""


class SliceClassifier(nn.Module):
    """MONAI's 2D DenseNet with group norm and maximum pooling: logits `(S, K)` of slices `(S, C, H, W)`."""

    def __init__(self, config: DiagnosisConfig) -> None:
        super().__init__()
        self.sharpness = config.sharpness
        self.network = DenseNet(
            2, 2 * config.neighbours + 1, len(DIAGNOSES), init_features=config.init_features,
            growth_rate=config.growth_rate, block_config=config.blocks, norm=_NORM,
        )  # fmt: skip
        self.network.class_layers.pool = nn.AdaptiveMaxPool2d(1)

    def forward(self, slices: Tensor) -> Tensor:
        return self.network(slices)

    def pooled(self, logits: Tensor) -> Tensor:
        """Logits `(..., K)` of volumes from those of their slices `(..., S, K)`: log-mean-exp, the normal's inverted.

        A volume is normal if every slice is, and shows a disease if one slice does.
        """
        inverted = torch.ones(len(DIAGNOSES))
        inverted[DIAGNOSES.index(NORMAL)] = -1.0
        scaled = self.sharpness * inverted * logits
        mean = scaled.logsumexp(-2) - torch.log(torch.tensor(float(logits.shape[-2])))
        return inverted * mean / self.sharpness


@dataclass(frozen=True)
class DiagnosedSlices:
    """A volume as the classifier sees it."""

    slices: Tensor
    """`(S, C, H, W)`."""
    classes: Tensor
    """Float `(K,)`, several may be one."""
    cut: Tensor | None
    """Bool `(S,)`: slices that a box cuts; None without boxes."""


class Classifier:
    """A network that answers as a method of the evaluation."""

    def __init__(self, network: SliceClassifier, preprocess: Preprocess, neighbours: int) -> None:
        self.network = network.eval()
        self.preprocess = preprocess
        self.neighbours = neighbours

    @torch.inference_mode()
    def __call__(self, scan: Scan) -> np.ndarray:
        """Probabilities `(K,)` over DIAGNOSES, made to sum to one."""
        stacks = with_neighbours(_on_grid(self.preprocess.slices(scan).slices, self.preprocess), self.neighbours)
        probabilities = self.network.pooled(self.network(stacks)).sigmoid()
        return (probabilities / probabilities.sum()).double().numpy()


def train_diagnosis(
    train: Sequence[RowRef], validation: Sequence[RowRef], config: DiagnosisConfig, preprocess: Preprocess
) -> tuple[SliceClassifier, Fitted]:
    """Train on rows with diagnoses.

    Args:
        train: Rows with `has_classes`.
        validation: The same of the validation split; may be empty.
        config: Network and budget.
        preprocess: The contract that slices are made by.

    Returns:
        The network and its learning curve: the negative loss per volume on the validation split, since AUROC of a
        handful of patients moves in large steps.
    """
    torch.manual_seed(config.seed)
    network = SliceClassifier(config)
    columns = columns_of("diagnose")
    batches = _batches(Rows(train, columns, lambda row: diagnosed_slices(row, config, preprocess)), config)
    cases = list(Rows(validation, columns, lambda row: diagnosed_slices(row, config, preprocess)))

    def loss_of_batch() -> Tensor:
        slices, classes, cut, known = next(batches)
        changed, _ = augment_slices(slices)
        return diagnosis_loss(network, network(changed), classes, cut, known, config.slice_weight)

    def validate() -> float:
        losses = [
            F.binary_cross_entropy_with_logits(network.pooled(network(case.slices)), case.classes) for case in cases
        ]
        return -float(torch.stack(losses).mean()) if losses else float("nan")

    return network, fit(network, loss_of_batch, validate, config, name="classifier")


def diagnosis_loss(
    network: SliceClassifier, logits: Tensor, classes: Tensor, cut: Tensor, known: Tensor, slice_weight: float
) -> Tensor:
    """Cross-entropy per volume, and per slice where boxes tell what a slice shows.

    Args:
        network: It pools.
        logits: `(B S, K)`.
        classes: `(B, K)`.
        cut: Bool `(B, S)`.
        known: Bool `(B,)`: volumes with boxes.
        slice_weight: Of the second part.
    """
    by_volume = logits.unflatten(0, cut.shape)
    loss = F.binary_cross_entropy_with_logits(network.pooled(by_volume), classes)
    if not known.any() or not slice_weight:
        return loss
    healthy = F.one_hot(torch.tensor(DIAGNOSES.index(NORMAL)), len(DIAGNOSES)).float()
    wanted = torch.where(cut[..., None], classes[:, None], healthy)
    return loss + slice_weight * F.binary_cross_entropy_with_logits(by_volume[known], wanted[known])


def diagnosed_slices(row: dict[str, Any], config: DiagnosisConfig, preprocess: Preprocess) -> DiagnosedSlices | None:
    """A row as the network is trained on it; None where none of its classes is a diagnosis of the vocabulary."""
    classes = torch.tensor([float(name in row["classes"]) for name in DIAGNOSES])
    if not classes.any():
        return None
    scan = row_to_scan(row)
    source = preprocess.slices(scan)
    slices = with_neighbours(_on_grid(source.slices, preprocess), config.neighbours)
    if row["boxes"] is None:
        return DiagnosedSlices(slices, classes, None)
    inside = np.zeros(scan.image.shape, bool)
    for box in row["boxes"]:
        z1, y1, x1, z2, y2, x2 = box["box_voxel"]
        inside[z1:z2, y1:y2, x1:x2] = True
    cut = torch.from_numpy(preprocess.slice_labels(inside, scan, source.axis)).flatten(1).any(1)
    return DiagnosedSlices(slices, classes, cut)


def _on_grid(slices: Tensor, preprocess: Preprocess) -> Tensor:
    return pad_or_crop(slices, preprocess.inputs.slice_shape, float(slices.min()))


def _batches(rows: Rows[DiagnosedSlices], config: DiagnosisConfig) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Slices `(B S, C, H, W)`, classes, which slices are cut by a box, and whether that is known; without end."""
    rng = np.random.default_rng(config.seed)
    volumes = rows.endless(rng)
    while True:
        chosen = [next(volumes) for _ in range(config.volumes_per_step)]
        places = [_drawn(volume, rng, config.slices_per_volume) for volume in chosen]
        unknown = torch.zeros(config.slices_per_volume, dtype=torch.bool)
        yield (
            torch.cat([volume.slices[place] for volume, place in zip(chosen, places, strict=True)]),
            torch.stack([volume.classes for volume in chosen]),
            torch.stack([unknown if v.cut is None else v.cut[place] for v, place in zip(chosen, places, strict=True)]),
            torch.tensor([volume.cut is not None for volume in chosen]),
        )


def _drawn(volume: DiagnosedSlices, rng: np.random.Generator, count: int) -> np.ndarray:
    """Slices of a volume, half of them cut by a box where there is one."""
    everything = np.arange(len(volume.slices))
    cut = np.flatnonzero(volume.cut.numpy()) if volume.cut is not None else everything[:0]
    if not len(cut):
        return rng.choice(everything, count, replace=len(everything) < count)
    with_box = rng.choice(cut, count // 2, replace=len(cut) < count // 2)
    return np.concatenate([with_box, rng.choice(everything, count - count // 2)])
