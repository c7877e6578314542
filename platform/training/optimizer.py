"""Which parameters learn, in which groups, and at which rate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from omnimri.platform.training.config import TrainConfig


def train_only(parts: Mapping[str, nn.Module], trains: Iterable[str]) -> None:
    """Freeze every parameter of the model but those of the named parts.

    Raises:
        ValueError: If the model lacks a part that the stage trains.
    """
    trains = tuple(trains)
    if missing := [name for name in trains if name not in parts]:
        raise ValueError(f"The model has no part {missing}; it has {sorted(parts)}.")
    for part in parts.values():
        part.requires_grad_(False)
    for name in trains:
        parts[name].requires_grad_(True)


def parameter_groups(objective: nn.Module, parts: Mapping[str, nn.Module], train: TrainConfig) -> list[dict[str, Any]]:
    """Groups for AdamW by part and by whether the parameter decays; frozen parameters are in none.

    Parameters of the objective outside every part form the part `objective`.
    """
    owner = {id(parameter): name for name, part in parts.items() for parameter in part.parameters()}
    decaying = _decaying(objective)
    members: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for parameter in objective.parameters():
        if parameter.requires_grad:
            key = (owner.get(id(parameter), "objective"), id(parameter) in decaying)
            members.setdefault(key, []).append(parameter)
    if unknown := set(train.lr_scale) - set(parts) - {"objective"}:
        raise ValueError(f"TrainConfig.lr_scale: unknown parts {sorted(unknown)}; known: {sorted(parts)}.")
    return [
        {
            "params": members[part, decays],
            "lr": train.lr * train.lr_scale.get(part, 1.0),
            "weight_decay": train.weight_decay if decays else 0.0,
        }
        for part, decays in sorted(members)
    ]


def _decaying(module: nn.Module) -> set[int]:
    """Identities of the parameters that decay: matrices, but not embeddings or routers.

    A router's weight decides which expert learns; pulling it to zero levels the choice.
    """
    decaying = set()
    for path, child in module.named_modules():
        if isinstance(child, nn.Embedding) or path.endswith(("mlp.gate", "router")):
            continue
        for name, parameter in child.named_parameters(recurse=False):
            if parameter.ndim >= 2 and not name.endswith(("embed", "embedding", "token", "tokens")):
                decaying.add(id(parameter))
    # Tied weights are found under several names; an embedding stays one.
    tied = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    return decaying - tied


def set_learning_rates(groups: Sequence[dict[str, Any]], base_lrs: Sequence[float], factor: float) -> None:
    """Set each group's rate to its base times `factor`."""
    for group, base in zip(groups, base_lrs, strict=True):
        group["lr"] = base * factor


def forget_gradients(optimizer: Any) -> None:
    """Zero what ZeRO-3, or ZeRO on the CPU, keeps of the last step's gradients.

    DeepSpeed 0.19 overwrites a parameter's gradient there only when the step gives it one. A head that this step's
    source does not use would be moved by its gradient of an earlier step, again and again, without any error.
    """
    partitions = getattr(optimizer, "grad_partitions_flat_buffer", None)
    if partitions is not None:
        partitions.zero_()
    masters = getattr(optimizer, "fp32_partitioned_groups_flat", None) or getattr(
        optimizer, "single_partition_of_fp32_groups", ()
    )
    for master in masters or ():
        if master.grad is not None:
            master.grad.zero_()
    norms = getattr(optimizer, "norm_for_param_grads", None)
    if norms:
        norms.clear()
