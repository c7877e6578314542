"""The specialists as a table: what each is trained on, how, and what it answers; and the folder that they lie in.

A folder holds one sub-folder per trained network: `model.safetensors`, and `specialist.json` with its settings, the
digest of its data and its learning curve. A network whose settings and data are the same is not trained again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model
from torch import nn

from omnimri.models.config import InputConfig
from omnimri.models.preprocess import Preprocess
from omnimri.platform.data.shards import RowRef, Shards, load_row, row_to_scan
from omnimri.platform.evaluation.cases import RIVALS, Rivals, columns_of
from omnimri.platform.evaluation.evaluate import spread_over_patients
from omnimri.platform.evaluation.text_cases import reference_boxes
from omnimri.platform.specialists.diagnosis import Classifier, DiagnosisConfig, SliceClassifier, train_diagnosis
from omnimri.platform.specialists.findings import Detector, Reporter, best_threshold
from omnimri.platform.specialists.fit import FitConfig, Fitted
from omnimri.platform.specialists.networks import num_parameters
from omnimri.platform.specialists.reconstruction import (
    NETWORKS,
    ReconstructionConfig,
    Reconstructor,
    train_reconstruction,
)
from omnimri.platform.specialists.segmentation import (
    SegmentationConfig,
    Segmenter,
    segmentation_network,
    train_segmentation,
)
from omnimri.platform.training.config import DEFAULT_EXCLUDED

logger = logging.getLogger(__name__)

CARD, WEIGHTS = "specialist.json", "model.safetensors"
_CARD_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class SpecialistsConfig:
    """Every network that may be trained; budgets are set by `with_budget`."""

    recon_unet: ReconstructionConfig = field(default_factory=lambda: ReconstructionConfig(seconds=180))
    varnet: ReconstructionConfig = field(
        default_factory=lambda: ReconstructionConfig(seconds=180, channels=(12, 24, 32, 48, 64), cascades=4)
    )
    segment_unet: SegmentationConfig = field(default_factory=lambda: SegmentationConfig(seconds=180))
    classifier: DiagnosisConfig = field(default_factory=lambda: DiagnosisConfig(seconds=180))
    iou_threshold: float = 0.1
    """Overlap at which the edge of a lesion is chosen on the validation split, for boxes."""
    exclude_flags: tuple[str, ...] = DEFAULT_EXCLUDED
    """Rows that are not trained on, as `RunConfig.exclude_flags` says of OmniMRI's."""

    def with_budget(self, *, seconds: float | None = None, steps: int | None = None) -> SpecialistsConfig:
        """The same with one budget for every network."""
        budgets = {name: replace(getattr(self, name), seconds=seconds, steps=steps) for name in TRAINED}
        return replace(self, **budgets)

    def with_reference(self, reference: str) -> SpecialistsConfig:
        """The same with reconstructions that learn what they are scored against (`EvaluateConfig.reference`)."""
        return replace(self, **{name: replace(getattr(self, name), reference=reference) for name in NETWORKS})


@dataclass(frozen=True)
class Trained:
    """One network of the table."""

    needs: str
    """What the manifest must say of a row."""
    metric: str
    """What its learning curve shows."""
    network: Callable[[Any], nn.Module]
    train: Callable[..., tuple[nn.Module, Fitted]]
    """Takes rows for training and validation, the network's config, and the preprocessing contract."""


def _reconstruction(method: Any) -> Trained:
    def train(
        train: Sequence[RowRef], validation: Sequence[RowRef], config: ReconstructionConfig, preprocess: Preprocess
    ) -> tuple[nn.Module, Fitted]:
        return train_reconstruction(method, train, validation, config, sens_maps=preprocess.inputs.sens_maps)

    return Trained("fully_sampled", "PSNR in dB", NETWORKS[method], train)


TRAINED: dict[str, Trained] = {
    "recon_unet": _reconstruction("recon_unet"),
    "varnet": _reconstruction("varnet"),
    "segment_unet": Trained("has_labels", "mean of tissue and lesion Dice", segmentation_network, train_segmentation),
    "classifier": Trained("has_classes", "minus cross-entropy per volume", SliceClassifier, train_diagnosis),
}
"""By method of the evaluation. Boxes and the template report follow from these without training."""


def train_missing(
    shards: Shards, out: Path, config: SpecialistsConfig, inputs: InputConfig, *, validation_split: str = "val"
) -> list[dict[str, Any]]:
    """Train every network that `out` does not hold yet and that the corpus has rows for.

    Args:
        shards: The corpus, all splits; only `train` is trained on.
        out: Folder of the specialists.
        config: Networks and budgets.
        inputs: Grids and coil maps, those of OmniMRI.
        validation_split: Split that chooses among the weights of a run.

    Returns:
        The card of every network that is there now.
    """
    preprocess = Preprocess(inputs)
    usable = shards.without_flags(config.exclude_flags)
    cards = []
    for name, trained in TRAINED.items():
        settings = _settings(getattr(config, name), shards, preprocess, config.exclude_flags)
        card = read_card(out / name)
        if card and card["settings"] == settings:
            logger.info("%s is trained already: %s", name, out / name)
        else:
            rows = usable.select(split="train", **{trained.needs: True}).rows
            if not rows:
                (out / name / CARD).unlink(missing_ok=True)
                logger.warning("%s not trained: no row of split 'train' has %s.", name, trained.needs)
                continue
            validation = spread_over_patients(usable.select(split=validation_split, **{trained.needs: True}).rows, None)
            network, fitted = trained.train(rows, validation, getattr(config, name), preprocess)
            card = _card(name, trained, network, fitted, rows, settings)
            _save(network, card, out / name)
        cards.append(card)
    _choose_threshold(usable, out, config, preprocess, validation_split)
    return cards


def _settings(config: FitConfig, shards: Shards, preprocess: Preprocess, flags: Sequence[str]) -> dict[str, Any]:
    """What must be the same for a network to be the same; as JSON gives it back."""
    settings = {
        "version": _CARD_VERSION, "config": asdict(config), "data_digest": shards.digest,
        "preprocessing": preprocess.version, "exclude_flags": list(flags),
    }  # fmt: skip
    return dict(json.loads(json.dumps(settings)))


def _card(
    name: str, trained: Trained, network: nn.Module, fitted: Fitted, rows: Sequence[RowRef], settings: dict[str, Any]
) -> dict[str, Any]:
    return {
        "name": name,
        "label": RIVALS[name],
        "metric": trained.metric,
        "parameters": num_parameters(network),
        "patients": len({row.patient_id for row in rows}),
        "volumes": len(rows),
        **fitted.as_json(),
        "settings": settings,
    }


def _save(network: nn.Module, card: dict[str, Any], folder: Path) -> None:
    """The card last: a folder without one counts as not trained."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CARD).unlink(missing_ok=True)
    save_model(network, str(folder / WEIGHTS))
    (folder / CARD).write_text(json.dumps(card, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_card(folder: Path) -> dict[str, Any] | None:
    """What a trained network says of itself; None where there is none."""
    path = folder / CARD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def load_network(name: str, folder: Path, config: SpecialistsConfig) -> nn.Module:
    """A trained network in evaluation mode."""
    network = TRAINED[name].network(getattr(config, name))
    load_model(network, str(folder / name / WEIGHTS))
    return network.eval()


THRESHOLD = "threshold.json"


def _choose_threshold(
    shards: Shards, out: Path, config: SpecialistsConfig, preprocess: Preprocess, validation_split: str
) -> None:
    """Write the probability from which a voxel is lesion when boxes are made, by the validation split."""
    if not (out / "segment_unet" / CARD).is_file():
        return
    segmenter = Segmenter(load_network("segment_unet", out, config), preprocess, config.segment_unet.neighbours)
    cases = []
    refs = shards.select(split=validation_split, has_boxes=True).rows
    for ref in spread_over_patients(refs, config.segment_unet.validation_volumes):
        row = load_row(ref, columns_of("detect"))
        scan = row_to_scan(row)
        cases.append((scan, segmenter.probabilities(scan), reference_boxes(row)))
    threshold = best_threshold(cases, config.iou_threshold)
    (out / THRESHOLD).write_text(json.dumps({"lesion_probability": threshold}) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class RivalsLoader:
    """Makes the answers of the specialists in a folder, inside each worker of an evaluation."""

    folder: Path
    config: SpecialistsConfig
    inputs: InputConfig

    def __call__(self) -> Rivals:
        preprocess = Preprocess(self.inputs)
        networks = {
            name: load_network(name, self.folder, self.config)
            for name in TRAINED
            if (self.folder / name / CARD).is_file()
        }
        reconstruct = {name: Reconstructor(networks[name]) for name in NETWORKS if name in networks}
        rivals: dict[str, dict[str, Callable[..., Any]]] = {"reconstruct": dict(reconstruct)} if reconstruct else {}
        diagnose = segment = None
        if "classifier" in networks:
            classifier = networks["classifier"]
            assert isinstance(classifier, SliceClassifier)
            diagnose = Classifier(classifier, preprocess, self.config.classifier.neighbours)
            rivals["diagnose"] = {"classifier": diagnose}
        if "segment_unet" in networks:
            segment = Segmenter(networks["segment_unet"], preprocess, self.config.segment_unet.neighbours)
            threshold = json.loads((self.folder / THRESHOLD).read_text(encoding="utf-8"))["lesion_probability"]
            rivals["segment"] = {"segment_unet": segment}
            rivals["detect"] = {"segment_boxes": Detector(segment.probabilities, diagnose, threshold)}
            if diagnose is not None:
                rivals["report"] = {"template": Reporter(segment.probabilities, diagnose, threshold)}
        return rivals
