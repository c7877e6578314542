"""Exponential moving average of the weights that learn, a slice of it on each worker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FILES = "average-*.safetensors"


class WeightAverage:
    """Average over the optimizer steps, in float32, under every ZeRO stage.

    Every worker averages its own slice of each parameter: under ZeRO-3 the slice that it holds, otherwise one of the
    same size. What is averaged are the weights as the forward pass reads them.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module, self._decay = module, decay
        self._slices = {name: _own_slice(p).float().clone() for name, p in self._learning()}

    def _learning(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self._module.named_parameters() if p.requires_grad)

    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (from 0).

        The decay begins at 0.1 and rises to its value, else a short run would be averaged with its first weights.
        """
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, parameter in self._learning():
            self._slices[name].lerp_(_own_slice(parameter).float(), 1 - decay)

    def save(self, folder: Path) -> None:
        """Write this worker's slices beside the other files of a checkpoint."""
        slices = {name: value.cpu() for name, value in self._slices.items()}
        save_file(slices, folder / FILES.replace("*", f"{dist.get_rank():05}"))

    def load(self, folder: Path) -> None:
        """Read the average of a checkpoint, written by any number of workers.

        Raises:
            ValueError: If the checkpoint has none.
        """
        paths = sorted(folder.glob(FILES))
        if not paths:
            raise ValueError(f"{folder}: expected {FILES}, for TrainConfig.ema_decay is set; found none.")
        files = [safe_open(path, framework="pt") for path in paths]
        for name, parameter in self._learning():
            whole = torch.cat([file.get_tensor(name) for file in files])[: _num_elements(parameter)]
            own, mine = _cut(whole), self._slices[name]
            mine[: len(own)].copy_(own)  # what ZeRO-3 pads at the end of the last slice stays

    @torch.no_grad()
    def publish(self) -> None:
        """Replace the weights by their average, at the end of a run; every worker calls it."""
        for name, parameter in self._learning():
            average = self._slices[name]
            if hasattr(parameter, "ds_tensor"):
                parameter.ds_tensor.copy_(average)
            if parameter.numel():  # of a parameter in pieces, nothing is here
                parameter.copy_(_joined(average.to(parameter.device), parameter))


def _num_elements(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _own_slice(parameter: nn.Parameter) -> Tensor:
    """This worker's part `(n,)` of a parameter."""
    return parameter.ds_tensor.detach() if hasattr(parameter, "ds_tensor") else _cut(parameter.detach().reshape(-1))


def _cut(flat: Tensor) -> Tensor:
    size = -(-len(flat) // dist.get_world_size())
    return flat[dist.get_rank() * size : (dist.get_rank() + 1) * size]


def _joined(piece: Tensor, parameter: nn.Parameter) -> Tensor:
    """The slices of all workers in the parameter's shape."""
    size = -(-_num_elements(parameter) // dist.get_world_size())
    padded = nn.functional.pad(piece, (0, size - len(piece)))
    pieces = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(pieces, padded)
    return torch.cat(pieces)[: _num_elements(parameter)].view(parameter.shape)
