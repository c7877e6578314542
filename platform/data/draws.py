"""What a sample takes of a row by chance: options, and draws of slices, patches and structures."""

# S slices per sample, H W in-plane pixels

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from omnimri.models.instructions import FOREIGN_STRUCTURES, NEAR
from omnimri.models.preprocess import Preprocess
from omnimri.models.resample import pad_or_crop
from omnimri.platform.data.patches import cut_patches, draw_corners
from omnimri.platform.language.instruct import segmentable


@dataclass(frozen=True, kw_only=True)
class ViewOptions:
    """How samples are drawn from rows."""

    preprocess: Preprocess
    slices_per_sample: int = 4
    """Slices that an image sample takes of one volume."""
    patch_shape: tuple[int, int, int] | None = None
    """Slices and pixels of the patches that a segmentation sample takes in the place of slices, for an image decoder
    of three dimensions; None takes slices."""
    patches_per_sample: int = 4
    """Patches that it, or a labelled image sample, takes of one volume."""
    accelerations: tuple[int, ...] = (4, 4, 8)
    """Drawn from with equal chance; repeat one to weigh it."""
    random_mask_share: float = 0.3
    """Share of undersampled acquisitions whose outer lines are drawn independently (fastMRI knee); those of the others
    are equispaced (fastMRI brain)."""
    volumes_per_sequence: int = 4
    """Contrasts of a study that an interleaved sequence shows, at most; each shows two at least."""
    structures_per_sample: int = 4
    """Structures that a segmentation sample asks for, each by an instruction of its own."""
    foreign_share: float = 0.1
    """Share of them that another part of the body has, where the row says which part it shows: their mask is empty."""
    text_tasks: Mapping[str, float] = field(
        default_factory=lambda: {"detect": 0.24, "diagnose": 0.43, "report": 0.28, "describe": 0.05}
    )
    """Chance of each text task where a row has labels for all. A description is several times as long as the other
    answers, and most of it is keys: little of it is enough."""
    question_share: float = 0.2
    """Share of text samples that ask a question (yes or no, a choice, one kind of finding, a differential, or one that
    does not fit the image) instead of a whole task."""
    outlined_share: float = 0.9
    """Share of text samples, of rows with labelled lesions, that are told what a segmentation would draw."""

    def __post_init__(self) -> None:
        if self.patches_per_sample < 1:
            raise ValueError(f"ViewOptions.patches_per_sample must be at least 1, found {self.patches_per_sample}.")
        for name in ("question_share", "random_mask_share", "foreign_share", "outlined_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"ViewOptions.{name} must be between 0 and 1, found {getattr(self, name)}.")


def drawn_slices(
    lesion: torch.Tensor, anatomy: torch.Tensor, rng: np.random.Generator, options: ViewOptions
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Takes the drawn slices, half of them with a lesion where there is one, of a stack."""
    with_lesion, with_anatomy = (mask.flatten(1).any(1).numpy() for mask in (lesion, anatomy))
    num_lesion = options.slices_per_sample // 2 if with_lesion.any() else 0
    chosen = np.concatenate(
        [
            draw_indices(with_lesion, num_lesion, rng),
            draw_indices(with_anatomy, options.slices_per_sample - num_lesion, rng),
        ]
    )
    return lambda stack: to_slice_grid(stack[chosen], options)


def drawn_patches(
    foreground: torch.Tensor, rng: np.random.Generator, options: ViewOptions
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Takes the drawn patches, half of them about a place of the foreground, of a stack."""
    assert options.patch_shape is not None
    shape = options.patch_shape
    corners = draw_corners(foreground.numpy(), shape, options.patches_per_sample, rng)
    return lambda stack: cut_patches(stack, corners, shape, _background(stack))


def drawn_structures(names: Mapping[int, str], count: int, rng: np.random.Generator) -> list[str]:
    """Structures to ask for: those that the row's labels know, and lesions, which it may or may not have."""
    known = segmentable(names)
    order = rng.permutation(len(known))
    return [known[order[i % len(known)]] for i in range(count)]


def foreign_structures(body_part: str | None) -> list[str]:
    """Structures that an image of a body part cannot show; none where the part is unknown."""
    if body_part not in NEAR:
        return []
    return [
        structure
        for other, structures in FOREIGN_STRUCTURES.items()
        for structure in structures
        if other != body_part and other not in NEAR[body_part]
    ]


def to_slice_grid(slices: torch.Tensor, options: ViewOptions) -> torch.Tensor:
    """Slices `(S, H, W)` padded or cropped about their centre, so that rows of any matrix share a batch."""
    return pad_or_crop(slices, options.preprocess.inputs.slice_shape, _background(slices))


def _background(slices: torch.Tensor) -> float:
    """The darkest value, or no label."""
    return False if slices.dtype == torch.bool else float(slices.min())


def draw_indices(allowed: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` indices where `allowed`, drawn with repetition only if there are too few; any index if there is none."""
    candidates = np.flatnonzero(allowed) if allowed.any() else np.arange(len(allowed))
    return np.sort(rng.choice(candidates, count, replace=len(candidates) < count))
