"""What one evaluation does; every number of it stands in the summary's header."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from omnimri.models.vocabulary import IMAGE_TASKS, TASKS
from omnimri.platform.evaluation.baselines import COMPRESSED_SENSING


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Settings of `evaluate`; the defaults are fastMRI's for reconstruction."""

    split: str = "test"
    """Split that is scored."""
    tasks: tuple[str, ...] = TASKS
    max_volumes: int | None = None
    """Volumes per task at most, spread over the patients; None takes all."""
    max_image_volumes: int | None = None
    """Further limit for reconstruction and segmentation, which cost most."""
    max_slices: int | None = None
    """Central slices of a volume that reconstruction is scored on; None takes all."""
    where: dict[str, Any] = field(default_factory=dict)
    """Fields of a row with the values to score, for example `{"vendor": "Philips"}` after training without it."""
    accelerations: tuple[int, ...] = (4, 8)
    center_fractions: tuple[float, ...] = (0.08, 0.04)
    """Share of fully sampled centre lines, one for each acceleration."""
    reference: Literal["combined", "rss"] = "combined"
    """What reconstructions are scored against (`baselines.reference_magnitude`): all lines combined by coil maps, or
    fastMRI's root sum of squares, which keeps a floor of noise."""
    mask_kind: str = "equispaced"
    """Undersampling: equispaced (fastMRI brain) or random (fastMRI knee)."""
    sens_maps: Literal["acs", "espirit"] = "acs"
    """Coil maps of the baselines, the ceiling and the data residual (`physics.SENS_MAPS`); the model makes those that
    it was trained with. `espirit` takes seconds to half a minute for a slice of a clinical matrix: set max_slices."""
    reconstruct_steps: int = 1
    """Network evaluations of the image decoder for one reconstruction."""
    uncertainty_samples: int = 4
    """Simulated acquisitions behind the uncertainty map that is held against the error; 0 leaves it out."""
    uncertainty_slices: int = 4
    """Central slices of a volume on which it is."""
    segment_steps: int = 1
    outline: bool = True
    """Before a text answer the image decoder draws lesions, and the prompt tells of them, as in serving."""
    max_new_tokens: int = 192
    """Longest text answer."""
    iou_threshold: float = 0.1
    """Overlap from which a predicted box has found a lesion."""
    box_samples: int = 16
    """Detection answers drawn beside the greedy one, whose boxes are the candidates of FROC and of the calibration."""
    mask_boxes: bool = True
    """Score detection from the image decoder too: boxes around the lesions that it draws, their edge at 0.5."""
    calibrate: bool = False
    """Fit the scores of boxes on `tuning_split` first, and keep the fit in the checkpoint folder (`detection.json`),
    with the labels of the training boxes, which boxes are then restricted to."""
    blank_tasks: tuple[str, ...] = ("segment", "detect", "diagnose", "report")
    """Tasks that are also run on a constant image, as the floor of what text and priors alone can do."""
    tuning_split: str = "val"
    """Split that CG-SENSE, compressed sensing and the scores of boxes are tuned on; never the scored one."""
    tuning_volumes: int = 3
    tuning_slices: int = 4
    """Central slices of each tuning volume."""
    cg_weights: tuple[float, ...] = (0.002, 0.01, 0.05, 0.2)
    """Tikhonov weights tried for CG-SENSE."""
    cg_steps: tuple[int, ...] = (5, 10, 20)
    """Numbers of conjugate-gradient iterations tried."""
    compressed_sensing: tuple[str, ...] = COMPRESSED_SENSING
    """Compressed sensing baselines, by SigPy and tuned likewise; `()` leaves them out. A slice of 112 x 96 with 4 coils
    takes 2 ms of one core for each iteration, one of 320 x 320 with 16 some 50 ms."""
    cs_weights: tuple[float, ...] = (0.0005, 0.002, 0.008, 0.03)
    """L1 weights tried, for slices whose zero-filled maximum is one."""
    cs_steps: tuple[int, ...] = (10, 60)
    """Numbers of iterations tried."""
    bootstrap_samples: int = 1000
    """Draws of patients for every interval; 0 gives no intervals."""
    cases_per_task: int = 3
    """Cases shown on the page for each task and condition: worst, median, best and evenly between."""
    num_workers: int = 2
    """Processes that hold a model each."""
    threads_per_worker: int = 1
    """CPU cores of each of them."""
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = sorted({*self.tasks, *self.blank_tasks} - set(TASKS))
        if unknown:
            raise ValueError(f"EvaluateConfig: tasks {', '.join(unknown)} are unknown; known: {', '.join(TASKS)}.")
        if len(self.accelerations) != len(self.center_fractions):
            raise ValueError(
                f"EvaluateConfig: {len(self.accelerations)} accelerations need as many center_fractions, found "
                f"{len(self.center_fractions)}. Set both, for example accelerations=4 and center_fractions=0.08."
            )
        if unknown := sorted(set(self.compressed_sensing) - set(COMPRESSED_SENSING)):
            raise ValueError(
                f"EvaluateConfig: compressed_sensing {', '.join(unknown)} is unknown; known: "
                f"{', '.join(COMPRESSED_SENSING)}."
            )
        if self.split == self.tuning_split:
            raise ValueError(
                f"EvaluateConfig: nothing may be tuned on the scored split ({self.split}). Set tuning_split."
            )
        if self.uncertainty_samples == 1 or self.uncertainty_samples < 0:
            raise ValueError(
                f"EvaluateConfig: uncertainty_samples must be 0 or at least 2, found {self.uncertainty_samples}."
            )
        if self.num_workers < 1 or self.threads_per_worker < 1:
            raise ValueError("EvaluateConfig: num_workers and threads_per_worker must be at least 1.")

    def volume_limit(self, task: str) -> int | None:
        """Volumes that may be scored on a task."""
        limits = (self.max_volumes, self.max_image_volumes if task in IMAGE_TASKS else None)
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def conditions(self) -> tuple[tuple[int, float], ...]:
        """`(acceleration, center_fraction)` pairs."""
        return tuple(zip(self.accelerations, self.center_fractions, strict=True))
