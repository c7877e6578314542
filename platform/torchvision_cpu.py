"""Let torchvision of the package index load beside PyTorch's CPU build.

Its compiled operators are for CUDA builds and stay away, and its import then fails on registering two of them. Defined
before that, they are merely absent: pictures are resized by PyTorch itself. `platform.vllm_cpu` copies this file into
the environment and has every interpreter import it at its start, so that engines in other processes have it too.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_defined: list[object] = []
"""Definitions last as long as their library object."""


class BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Defines the operators when torchvision is about to be imported; finds nothing itself."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Always None."""
        del path, target
        if name == "torchvision":
            sys.meta_path.remove(self)
            _define()
        return None


def _define() -> None:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in _OPERATORS:
        if not hasattr(torch.ops.torchvision, operator.partition("(")[0]):
            library.define(operator)
    _defined.append(library)


sys.meta_path.insert(0, BeforeTorchvision())
