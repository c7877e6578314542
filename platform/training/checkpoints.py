"""Checkpoints of a running stage (DeepSpeed's shards and a record of the position), and the plain folder at its end."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)

META = "meta.json"
SHARDS = "shards"
"""Tag of DeepSpeed's files inside a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What stands beside the shards: enough to go on, and to refuse what does not fit."""

    stage: str
    step: int
    """Optimizer steps done."""
    world_size: int
    zero_stage: int
    settings_digest: str
    data_digest: str
    positions: dict[str, int]
    """Samples that each source has given so far."""
    losses: dict[str, list[float]] = field(default_factory=dict)
    """State of the averages over the first and last tenth."""

    def write(self, folder: Path) -> None:
        """Write to `meta.json` in the folder."""
        (folder / META).write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, folder: Path) -> Meta:
        """Read `meta.json` of the folder."""
        return cls(**json.loads((folder / META).read_text()))


def check_resumable(meta: Meta, *, stage: str, settings_digest: str, data_digest: str) -> None:
    """Refuse a checkpoint that another configuration or other data made.

    Raises:
        ValueError: With what differs and what to do.
    """
    wanted = {"stage": stage, "settings_digest": settings_digest, "data_digest": data_digest}
    for name, value in wanted.items():
        if getattr(meta, name) != value:
            raise ValueError(
                f"The checkpoint at step {meta.step} was made with {name} {getattr(meta, name)!r}, this run has "
                f"{value!r}. Start under another --name, or with --fresh to discard the checkpoint."
            )


def save_shards(engine: Any, folder: Path, *, keep_frozen: bool) -> None:
    """Write this rank's part of the engine's state; every rank calls it."""
    engine.save_checkpoint(str(folder), tag=SHARDS, exclude_frozen_parameters=not keep_frozen)


def load_shards(engine: Any, folder: Path) -> None:
    """Restore weights, optimizer state and counters of the engine; every rank calls it.

    Raises:
        ValueError: If the folder holds no complete checkpoint.
    """
    # Frozen parameters may be absent: then the model folder that the stage started from has given them already.
    loaded, _ = engine.load_checkpoint(str(folder), tag=SHARDS, load_module_strict=False)
    if loaded is None:
        raise ValueError(f"{folder}: expected DeepSpeed's files of a checkpoint under {SHARDS!r}, found none.")


def needs_universal(meta: Meta, world_size: int, zero_stage: int) -> bool:
    """Whether the shards were cut for another number of workers, or ZeRO stage, and must be converted.

    Raises:
        ValueError: If there is no conversion.
    """
    same = (meta.world_size, meta.zero_stage) == (world_size, zero_stage)
    families = {0: "replicated", 1: "sharded state", 2: "sharded state", 3: "sharded parameters"}
    if families[meta.zero_stage] != families[zero_stage]:
        raise ValueError(
            f"The checkpoint at step {meta.step} was made with ZeRO stage {meta.zero_stage}, this run has "
            f"{zero_stage}, and DeepSpeed converts between 1 and 2 only. Resume with "
            f"--set zero.stage={meta.zero_stage}, or pass --fresh to discard it."
        )
    if zero_stage == 3 and not same:
        raise ValueError(
            f"The checkpoint at step {meta.step} was made by {meta.world_size} workers under ZeRO-3, this run has "
            f"{world_size}. Such a conversion changes the weights (DeepSpeed 0.19.8), so it is refused: resume with "
            f"--workers {meta.world_size}, or pass --fresh to discard it."
        )
    return not same and zero_stage != 0


def convert_universal(checkpoint: Path, target: Path) -> Path:
    """Write the checkpoint once more in the form that any number of workers can load; one rank calls it.

    Returns:
        Folder to hand to `load_shards`.
    """
    from argparse import Namespace

    from deepspeed.checkpoint.ds_to_universal import main as to_universal

    folder = target / checkpoint.name
    if not (folder / SHARDS).is_dir():
        partial = folder.with_name(f".{folder.name}")
        shutil.rmtree(partial, ignore_errors=True)
        to_universal(
            Namespace(
                input_folder=str(checkpoint / SHARDS),
                output_folder=str(partial / SHARDS),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )
        partial.rename(folder)
    return folder


def export_folder(model: nn.Module, folder: Path, save: Callable[[Path], None], *, rank: int, sharded: bool) -> None:
    """Write the plain model folder from rank 0 at once or not at all; every rank calls it.

    Args:
        model: Whose parameters ZeRO-3 may hold in pieces.
        folder: Final place; an older one is replaced.
        save: Writes the model to the folder it is given.
        rank: Of this worker.
        sharded: Whether the parameters are in pieces (ZeRO-3) and must be gathered first.
    """
    if sharded:
        import deepspeed

        for parameter in model.parameters():  # under autocast they would be gathered, and written, in bfloat16
            vars(parameter).pop("comm_dtype", None)
        with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=None):
            if rank == 0:
                _write_at_once(folder, save)
    elif rank == 0:
        _write_at_once(folder, save)


def _write_at_once(folder: Path, save: Callable[[Path], None]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}-{os.getpid()}")
    save(partial)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    logger.info("Model written to %s", folder)
