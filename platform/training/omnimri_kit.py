"""OmniMRI's own model, views and tokenizer behind the seam of `kit`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from omnimri.models.backbone import add_adapters
from omnimri.models.collate import collate
from omnimri.models.config import OmniMRIConfig
from omnimri.models.engine import sequence_builder
from omnimri.models.instructions import INSTRUCTIONS, question_texts
from omnimri.models.objectives import build_objective
from omnimri.models.omnimri import OmniMRI, read_index
from omnimri.models.preprocess import Preprocess, read_preprocess
from omnimri.models.prompts import diagnosis_choices
from omnimri.models.tokenizer import adopt_tokenizer, load_tokenizer, train_tokenizer
from omnimri.models.upcycling import check_shape, load_backbone
from omnimri.models.vision import load_swin_weights
from omnimri.models.vocabulary import STRUCTURES
from omnimri.platform.data.draws import ViewOptions
from omnimri.platform.data.licences import ANY, count_licences, licensed
from omnimri.platform.data.shards import RowRef, Shards, StudyRef, load_row, studies
from omnimri.platform.data.stream import SourceRows
from omnimri.platform.data.views import SOURCES, description_text
from omnimri.platform.language.description import Description

logger = logging.getLogger(__name__)

TEXT_ROWS = 2000
"""Rows whose texts the tokenizer is trained on, at most."""


@dataclass(frozen=True)
class _Load:
    columns: tuple[str, ...]

    def __call__(self, ref: RowRef | StudyRef) -> Any:
        """The row; of a study a reader for each of its rows, since a sample does not show all."""
        if isinstance(ref, StudyRef):
            return [partial(load_row, row, self.columns) for row in ref.rows]
        return load_row(ref, self.columns)


@dataclass(frozen=True)
class _Make:
    source: str
    options: ViewOptions

    def __call__(self, row: Any, rng: np.random.Generator) -> dict[str, Any]:
        return SOURCES[self.source].make(row, rng, self.options)


@dataclass(frozen=True, kw_only=True)
class OmniMRIKit:
    """See `omnimri.platform.training.kit.Kit`."""

    view: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `ViewOptions` that differ from their defaults."""
    licences: str = ANY
    """Policy of `omnimri.platform.data.licences`: which rows may be used."""
    hold_out: Mapping[str, Any] = field(default_factory=dict)
    """Fields of a row with values that no patient in training may have."""
    exclude_flags: tuple[str, ...] = ()
    """Volumes that intake flagged so are left out."""
    exclude_generated: bool = False
    """Leave out what a model wrote about the volumes."""
    tokenizer: str | None = None
    """Folder of a Qwen2.5 checkpoint whose tokenizer is taken; None trains one on the texts of the rows."""
    backbone: str | None = None
    """Folder of a mixture of experts that a new model begins with, its tokenizer too (`omnimri.models.upcycling`)."""
    vision_weights: str | None = None
    """File of a published Swin encoder; see `omnimri.models.vision.load_swin_weights`."""
    pack_length: int | None = None
    """See `omnimri.models.collate.collate`."""

    def kinds(self) -> Mapping[str, str]:
        """See `Kit`."""
        return {name: source.kind for name, source in SOURCES.items()}

    def data_digest(self, data: Sequence[str]) -> str:
        """See `Kit`."""
        shards = Shards.open(data)
        kept = self._admitted(shards)
        if len(kept) < len(shards):
            used, all_ = count_licences(kept), count_licences(shards)
            logger.info("licences %r, hold_out %s: %s of %s", self.licences, dict(self.hold_out), used, all_)
        if excluded := self.excluded_counts(data):
            logger.info("exclude_flags: volumes left out by flag: %s", excluded)
        if len(versions := kept.count_preprocessing()) > 1:
            logger.warning("The volumes were ingested in different ways (preprocessing version: volumes): %s", versions)
        return kept.digest

    def licence_counts(self, data: Sequence[str]) -> Mapping[str, int]:
        """See `Kit`."""
        return count_licences(self._rows(data).select(split="train"))

    def preprocessing(self, data: Sequence[str], config: OmniMRIConfig) -> Mapping[str, Any]:
        """See `Kit`."""
        rows = self._rows(data).select(split="train").count_preprocessing()
        return {"contract": Preprocess(config.inputs).version, "rows": rows}

    def excluded_counts(self, data: Sequence[str]) -> Mapping[str, int]:
        """See `Kit`."""
        counts = self._permitted(Shards.open(data)).count_flags()
        return {flag: count for flag, count in counts.items() if flag in self.exclude_flags}

    def source_rows(self, source: str, data: Sequence[str], config: OmniMRIConfig, split: str) -> SourceRows:
        """See `Kit`."""
        options = self._view_options(config)
        accepted = [ref for ref in self._rows(data).select(split=split).rows if SOURCES[source].accepts(ref)]
        rows = studies(accepted) if SOURCES[source].by_study else accepted
        return SourceRows(rows=rows, load=_Load(SOURCES[source].columns), make=_Make(source, options))

    def _view_options(self, config: OmniMRIConfig) -> ViewOptions:
        known = [field.name for field in fields(ViewOptions) if field.name not in ("preprocess", "patch_shape")]
        if unknown := sorted(set(self.view) - set(known)):
            raise ValueError(f"view: unknown fields {', '.join(unknown)}; known: {', '.join(known)}.")
        patch_shape = config.patch_shape if config.image_decoder.segment_dims == 3 else None
        return ViewOptions(preprocess=Preprocess(config.inputs), patch_shape=patch_shape, **self.view)

    def _rows(self, data: Sequence[str]) -> Shards:
        return self._admitted(Shards.open(data))

    def _admitted(self, shards: Shards) -> Shards:
        admitted = self._permitted(shards).without_flags(self.exclude_flags)
        return admitted.without_generated() if self.exclude_generated else admitted

    def _permitted(self, shards: Shards) -> Shards:
        return licensed(shards, self.licences).without_patients(**self.hold_out)

    def build_tokenizer(self, data: Sequence[str], config: OmniMRIConfig, folder: Path) -> None:
        """See `Kit`."""
        vocab_size = config.backbone.vocab_size
        if self.backbone is not None:
            check_shape(self.backbone, config.backbone)
        pretrained = self.backbone or self.tokenizer
        if pretrained is None:
            tokenizer = train_tokenizer(corpus_texts(self._rows(data)), vocab_size)
        else:
            tokenizer = adopt_tokenizer(pretrained, vocab_size)
        tokenizer.save_pretrained(folder)

    def load_tokenizer(self, folder: Path) -> PreTrainedTokenizerBase:
        """See `Kit`."""
        disable_progress_bar()  # a bar per part and rank, in a log
        return load_tokenizer(folder)

    def create(self, config: OmniMRIConfig, tokenizer: PreTrainedTokenizerBase) -> OmniMRI:
        """See `Kit`."""
        if len(tokenizer) > config.backbone.vocab_size:
            raise ValueError(
                f"The tokenizer has {len(tokenizer)} entries, the backbone {config.backbone.vocab_size}; raise "
                "BackboneConfig.vocab_size or train the tokenizer anew."
            )
        model = OmniMRI(config)
        if self.backbone is not None:
            load_backbone(model.backbone, self.backbone, config.backbone)
        if self.vision_weights is not None:
            match = load_swin_weights(model.vision, self.vision_weights)
            counts = len(match.taken), len(match.other_shape), len(match.absent)
            logger.info("Encoder: %d tensors taken, %d there in another shape, %d not there", *counts)
            if match.other_shape:
                logger.warning("%s: other shapes, left as they were: %s", self.vision_weights, match.other_shape)
        return model

    def load(self, folder: Path, config: OmniMRIConfig) -> OmniMRI:
        """See `Kit`."""
        saved = OmniMRIConfig.from_dict(read_index(folder)["config"])
        before, now = read_preprocess(folder).version, Preprocess(config.inputs).version
        if before != now:
            logger.warning("%s was trained under preprocessing contract %s; it goes on under %s.", folder, before, now)
        return OmniMRI.load(folder, config=None if saved == config else config)

    def objective(self, name: str, model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
        """See `Kit`."""
        assert isinstance(model, OmniMRI)
        return build_objective(name, model, options)

    def collate(
        self, samples: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, model: nn.Module
    ) -> dict[str, Tensor]:
        """See `Kit`."""
        assert isinstance(model, OmniMRI)
        return collate(samples, sequence_builder(model.config, tokenizer), pack_length=self.pack_length)

    def add_adapters(self, model: nn.Module, rank: int) -> None:
        """See `Kit`."""
        assert isinstance(model, OmniMRI)
        add_adapters(model.backbone, rank)

    def checkpoint_activations(self, model: nn.Module) -> None:
        """See `Kit`."""
        assert isinstance(model, OmniMRI)
        model.checkpoint_activations()

    def parts(self, model: nn.Module) -> Mapping[str, nn.Module]:
        """See `Kit`."""
        assert isinstance(model, OmniMRI)
        return model.parts()

    def save(self, model: nn.Module, folder: Path, tokenizer: Any, card: Mapping[str, Any]) -> None:
        """See `Kit`."""
        assert isinstance(model, OmniMRI)
        model.save(folder, tokenizer, version=f"{card['run']}-{card['stage']}-{card['settings_digest'][:8]}", run=card)


def corpus_texts(shards: Shards) -> Iterator[str]:
    """Texts that the model reads and writes: reports and descriptions of training rows, and every instruction."""
    refs = [r for r in shards.select(split="train").rows if r.has_report or r.has_description]
    for ref in refs[:TEXT_ROWS]:
        row = load_row(ref, ("report", "description"))
        yield from filter(None, (row["report"], description_text(row["description"])))
        if row["description"]:
            yield Description.model_validate_json(row["description"]).answer()
    for phrasings in INSTRUCTIONS.values():
        for phrase in phrasings:
            yield from (phrase.format(structure=structure) for structure in STRUCTURES)
    yield from question_texts()
    yield from diagnosis_choices()
