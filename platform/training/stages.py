"""The four training stages as rows of one table (OmniMRI paper, section 3 and Table 2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

KINDS = ("image", "paired", "instruction")
"""The three views of a corpus that the paper mixes: image-only, paired vision-text, instruction-response."""

PARTS = (
    "vision",
    "ssl_heads",
    "align",
    "text_encoder",
    "clip_head",
    "backbone",
    "flow_head",
    "connector",
    "image_decoder",
)
"""Names of the parts of the model, as `OmniMRI.parts()` returns them."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage: what it reads, what it trains, and which stage's model it starts from."""

    name: str
    number: int
    ratio: Mapping[str, float]
    """Share of the steps that each kind of data gets; sums to one."""
    trains: tuple[str, ...]
    """Parts that learn; every other part is frozen before DeepSpeed sees the model."""
    objective: str
    """Name given to `build_objective`."""
    starts_from: str | None
    """Stage whose model folder this one loads; None builds a new model from the preset."""

    def __post_init__(self) -> None:
        if unknown := set(self.ratio) - set(KINDS):
            raise ValueError(f"Stage {self.name!r}: unknown kinds {sorted(unknown)} in ratio; known: {list(KINDS)}.")
        if unknown := set(self.trains) - set(PARTS):
            raise ValueError(f"Stage {self.name!r}: unknown parts {sorted(unknown)} in trains; known: {list(PARTS)}.")
        if abs(sum(self.ratio.values()) - 1.0) > 1e-9:
            raise ValueError(f"Stage {self.name!r}: ratio sums to {sum(self.ratio.values())}, expected 1.")

    def trained_parts(self, also: Iterable[str] = ()) -> tuple[str, ...]:
        """Parts that learn, each once: those of the stage, and further ones."""
        return tuple(dict.fromkeys((*self.trains, *also)))


def _ratio(image: float, paired: float, instruction: float) -> Mapping[str, float]:
    return MappingProxyType({"image": image, "paired": paired, "instruction": instruction})


STAGES: Mapping[str, Stage] = MappingProxyType(
    {
        stage.name: stage
        for stage in (
            Stage(
                name="vision",
                number=1,
                ratio=_ratio(1.0, 0.0, 0.0),
                trains=("vision", "ssl_heads"),
                objective="vision",
                starts_from=None,
            ),
            Stage(
                name="align",
                number=2,
                ratio=_ratio(0.0, 1.0, 0.0),
                trains=("align", "text_encoder", "clip_head"),
                objective="align",
                starts_from="vision",
            ),
            Stage(
                name="multimodal",
                number=3,
                ratio=_ratio(0.0, 0.8, 0.2),
                trains=("backbone", "align", "flow_head"),
                objective="multimodal",
                starts_from="align",
            ),
            Stage(
                name="instruct",
                number=4,
                ratio=_ratio(0.0, 0.0, 1.0),
                trains=("backbone", "align", "connector", "image_decoder"),
                objective="instruct",
                starts_from="multimodal",
            ),
        )
    }
)


def stage_named(name: str) -> Stage:
    """The row of the table.

    Raises:
        ValueError: With the known names.
    """
    if name not in STAGES:
        raise ValueError(f"Unknown stage {name!r}; known stages: {', '.join(STAGES)}.")
    return STAGES[name]
