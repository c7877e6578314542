"""What training needs of the model room and of the views, behind one seam."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from omnimri.platform.data.stream import SourceRows


class Kit(Protocol):
    """Builds what a stage is made of. Instances travel to Ray workers, so they are small and picklable."""

    def kinds(self) -> Mapping[str, str]:
        """Kind (`image`, `paired` or `instruction`) of every source."""

    def data_digest(self, data: Sequence[str]) -> str:
        """Version of the data in the folders."""

    def licence_counts(self, data: Sequence[str]) -> Mapping[str, int]:
        """Training volumes by licence."""

    def preprocessing(self, data: Sequence[str], config: Any) -> Mapping[str, Any]:
        """`contract` from volumes to the model's input; `rows`: training volumes by how they were made of files."""

    def excluded_counts(self, data: Sequence[str]) -> Mapping[str, int]:
        """Volumes left out for their quality, by flag."""

    def source_rows(self, source: str, data: Sequence[str], config: Any, split: str) -> SourceRows:
        """The rows of a split (`train` or `val`) that a source may show, and how samples are made of them."""

    def build_tokenizer(self, data: Sequence[str], config: Any, folder: Path) -> None:
        """Write the run's tokenizer to `folder`: a pretrained one, or one trained on the texts of the training rows."""

    def load_tokenizer(self, folder: Path) -> Any:
        """A tokenizer from its folder."""

    def create(self, config: Any, tokenizer: Any) -> nn.Module:
        """A new model; the caller has seeded torch."""

    def load(self, folder: Path, config: Any) -> nn.Module:
        """The model of a folder; parts whose shapes differ from `config` are new, and it says so in the log."""

    def objective(self, name: str, model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
        """Module from a batch to a dict of scalars, of which `loss` is optimised."""

    def collate(self, samples: list[dict[str, Any]], tokenizer: Any, model: nn.Module) -> dict[str, torch.Tensor]:
        """One batch of samples of one source; the model is asked for its sizes only."""

    def add_adapters(self, model: nn.Module, rank: int) -> None:
        """Freeze the backbone but for updates of that rank; `save` merges them."""

    def checkpoint_activations(self, model: nn.Module) -> None:
        """Let the model compute activations again in the backward pass instead of keeping them."""

    def parts(self, model: nn.Module) -> Mapping[str, nn.Module]:
        """Parts of the model by name."""

    def save(self, model: nn.Module, folder: Path, tokenizer: Any, card: Mapping[str, Any]) -> None:
        """Write the plain folder: parts, tokenizer, preprocessing, card."""
