"""Reconstruction specialists: an image-to-image U-Net, and a small E2E-VarNet.

Both learn the image that reconstructions are scored against, at every acceleration that OmniMRI is trained on, from the
same masks, coil maps and scaling.
"""

# B slices, C coils, H W voxels, X phase-encoding lines

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from monai.apps.reconstruction.networks.blocks.varnetblock import VarNetBlock
from torch import Tensor, nn

from omnimri.models import metrics
from omnimri.models.image_decoder import as_channels
from omnimri.models.objectives import magnitude_loss
from omnimri.models.physics import SenseOperator, ifft2c, root_sum_of_squares
from omnimri.models.preprocess import scale_kspace
from omnimri.models.scan import Scan
from omnimri.platform.data.shards import RowRef, row_to_scan
from omnimri.platform.data.undersampling import center_fraction_for, reconstruction_arrays, undersample
from omnimri.platform.evaluation import baselines
from omnimri.platform.evaluation.baselines import Acquisition
from omnimri.platform.specialists.fit import FitConfig, Fitted, fit
from omnimri.platform.specialists.networks import SliceUNet
from omnimri.platform.specialists.rows import Rows

_INPUT_SCALE, _RESIDUAL_SCALE = 3.0, 0.1
"""As in the image decoder: tissue lies near a third of the maximum, what is left to mend is a few hundredths."""
SLICES_PER_PASS = 16


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig(FitConfig):
    """One reconstruction network and its training."""

    channels: tuple[int, ...] = (16, 32, 48, 64, 96)
    """Widths of the U-Net, or of each cascade's."""
    cascades: int = 4
    """Of the VarNet."""
    volumes_per_step: int = 2
    slices_per_volume: int = 2
    accelerations: tuple[int, ...] = (4, 4, 8)
    """Drawn from with equal chance, as `ViewOptions` does."""
    reference: Literal["combined", "rss"] = "combined"
    """What is learnt: that which `EvaluateConfig.reference` scores against."""
    random_share: float = 0.3
    """Share of random masks; the others are equispaced."""
    validation_volumes: int = 4
    validation_slices: int = 4


class ReconstructionUNet(nn.Module):
    """From the zero-filled image to the image, without a look at the data (fastMRI's baseline, arXiv 1811.08839).

    It sees the zero-filled coil combination and the zero-filled root sum of squares, and mends the one that is learnt.
    """

    def __init__(self, config: ReconstructionConfig) -> None:
        super().__init__()
        self.reference = config.reference
        self.unet = SliceUNet(3, 1, config.channels, silent=True)

    def forward(self, kspace: Tensor, mask: Tensor, sens_maps: Tensor) -> Tensor:
        """Magnitude `(B, H, W)` of k-space `(B, C, H, W)`, mask `(B, X)` and coil maps."""
        magnitude = root_sum_of_squares(ifft2c(kspace))
        combined = SenseOperator(sens_maps, mask[:, None, None]).adjoint(kspace)
        shown = _INPUT_SCALE * torch.cat([as_channels(combined), magnitude[:, None]], dim=1)
        start = magnitude if self.reference == "rss" else combined.abs()
        return start + _RESIDUAL_SCALE * self.unet(shown)[:, 0]


class VarNet(nn.Module):
    """E2E-VarNet (Sriram et al., MICCAI 2020) of MONAI's blocks, with the coil maps that every method is given.

    A regulariser that adds nothing leaves the measured lines as they are.
    """

    def __init__(self, config: ReconstructionConfig) -> None:
        super().__init__()
        self.reference = config.reference
        self.cascades = nn.ModuleList(VarNetBlock(_Regulariser(config.channels)) for _ in range(config.cascades))

    def forward(self, kspace: Tensor, mask: Tensor, sens_maps: Tensor) -> Tensor:
        """As in `ReconstructionUNet`."""
        measured, maps = torch.view_as_real(kspace), torch.view_as_real(sens_maps)
        lines = mask[:, None, None, :, None]
        predicted = measured
        for cascade in self.cascades:
            predicted = cascade(predicted, measured, lines, maps)
        completed = torch.view_as_complex(predicted.contiguous())
        if self.reference == "rss":
            return root_sum_of_squares(ifft2c(completed))
        return SenseOperator(sens_maps, torch.ones_like(mask[:, None, None])).adjoint(completed).abs()


class _Regulariser(nn.Module):
    """What a cascade takes from the image, `(B, 1, H, W, 2)` to the same."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.unet = SliceUNet(2, 2, channels, silent=True)

    def forward(self, image: Tensor) -> Tensor:
        shown = _INPUT_SCALE * image[:, 0].permute(0, 3, 1, 2)
        return _RESIDUAL_SCALE * self.unet(shown).permute(0, 2, 3, 1)[:, None]


NETWORKS: dict[str, type[ReconstructionUNet] | type[VarNet]] = {"recon_unet": ReconstructionUNet, "varnet": VarNet}


class Reconstructor:
    """A network that answers as a method of the evaluation."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval()

    @torch.inference_mode()
    def __call__(self, acquisition: Acquisition) -> Tensor:
        """Magnitude `(Z, Y, X)` in the units of the k-space."""
        maps, mask = acquisition.operator.sens_maps, torch.as_tensor(acquisition.mask)
        parts = []
        for chunk in torch.arange(len(acquisition.kspace)).split(SLICES_PER_PASS):
            scaled, scale = scale_kspace(acquisition.kspace[chunk], SenseOperator(maps[chunk], mask))
            answer = self.network(scaled, mask.expand(len(chunk), -1), maps[chunk])
            parts.append(answer * scale[:, None, None])
        return torch.cat(parts)


def train_reconstruction(
    method: Literal["recon_unet", "varnet"],
    train: Sequence[RowRef],
    validation: Sequence[RowRef],
    config: ReconstructionConfig,
    *,
    sens_maps: str,
) -> tuple[nn.Module, Fitted]:
    """Train one of NETWORKS on fully sampled rows.

    Args:
        method: Which.
        train: Rows with `fully_sampled`.
        validation: The same of the validation split; may be empty.
        config: Network and budget.
        sens_maps: How coil maps are made (`InputConfig.sens_maps`).

    Returns:
        The network and its learning curve: PSNR on the validation split.
    """
    torch.manual_seed(config.seed)
    network = NETWORKS[method](config)
    batches = _batches(train, config, sens_maps)
    cases = list(_validation_cases(validation, config, sens_maps))
    reconstruct = Reconstructor(network)

    def loss_of_batch() -> Tensor:
        batch = next(batches)
        predicted = network(batch["kspace"], batch["mask"], batch["sens_maps"])
        return magnitude_loss(predicted, batch["target"])

    def validate() -> float:
        scores = [metrics.psnr(target, reconstruct(acquisition).numpy()) for target, acquisition in cases]
        return float(np.mean(scores)) if scores else float("nan")

    return network, fit(network, loss_of_batch, validate, config, name=method)


_COLUMNS = ("image", "affine", "kspace", "mask")


def _usable(row: dict[str, Any]) -> Scan | None:
    return row_to_scan(row) if row["mask"] is None or row["mask"].all() else None


def _batches(refs: Sequence[RowRef], config: ReconstructionConfig, sens_maps: str) -> Iterator[dict[str, Tensor]]:
    """Slices of several volumes without end; volumes of one matrix and coil count share a batch."""
    rng = np.random.default_rng(config.seed)
    waiting: dict[tuple[int, ...], list[dict[str, np.ndarray]]] = {}
    for scan in Rows(refs, _COLUMNS, _usable).endless(rng):
        arrays = _drawn_slices(scan, rng, config, sens_maps)
        alike = waiting.setdefault(arrays["kspace"].shape[1:], [])
        alike.append(arrays)
        if len(alike) == config.volumes_per_step:
            yield {name: torch.from_numpy(np.concatenate([one[name] for one in alike])) for name in arrays}
            alike.clear()


def _drawn_slices(
    scan: Scan, rng: np.random.Generator, config: ReconstructionConfig, sens_maps: str
) -> dict[str, np.ndarray]:
    """Undersampled slices of one volume and their truth, scaled as the image decoder gets them; mirrored at random."""
    assert scan.kspace is not None
    signal = scan.image.max(axis=(1, 2))
    candidates = np.flatnonzero(signal > 0.1 * signal.max())
    chosen = np.sort(
        rng.choice(candidates, config.slices_per_volume, replace=len(candidates) < config.slices_per_volume)
    )
    kspace = scan.kspace[chosen]
    if rng.random() < 0.5:
        kspace = np.ascontiguousarray(np.roll(kspace[:, :, ::-1], 1 - kspace.shape[2] % 2, axis=2))
    acceleration = int(rng.choice(config.accelerations))
    part = Scan(image=scan.image[chosen], affine=scan.affine, kspace=kspace)
    kind = "random" if rng.random() < config.random_share else "equispaced"
    undersampled = undersample(part, acceleration=acceleration, kind=kind, seed=int(rng.integers(2**31)))
    arrays = reconstruction_arrays(undersampled, np.arange(len(chosen)), sens_maps)
    target = baselines.reference_magnitude(part, config.reference) / arrays.pop("scale")[:, None, None]
    return arrays | {"target": target.astype(np.float32)}


def _validation_cases(
    refs: Sequence[RowRef], config: ReconstructionConfig, sens_maps: str
) -> Iterator[tuple[np.ndarray, Acquisition]]:
    """Targets and acquisitions at every acceleration, made as the evaluation makes them."""
    chosen = list(refs)[: config.validation_volumes]
    for ref, scan in zip(chosen, Rows(chosen, _COLUMNS, _usable), strict=False):
        part = baselines.central_slices(scan, config.validation_slices)
        for acceleration in sorted(set(config.accelerations)):
            mask = baselines.case_mask(
                part, ref.row_id, acceleration=acceleration, center_fraction=center_fraction_for(acceleration),
                kind="equispaced", seed=config.seed,
            )  # fmt: skip
            yield (
                baselines.reference_magnitude(part, config.reference),
                baselines.acquire(part, mask, sens_maps),
            )
