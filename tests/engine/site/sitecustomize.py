"""Every process of the server imports this module at its start, because `server.py` puts its folder on PYTHONPATH.

PyPI's torchvision is built for CUDA, and its extension does not load beside a torch for the CPU. torchvision's Python
modules then fail, because they describe two operators that the extension should have defined. vLLM's Qwen3.5 imports
these modules even when it serves text.
"""

from __future__ import annotations

import importlib.abc
import importlib.metadata
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_library: list[Any] = []  # torch forgets operators when their library is freed


class _DefineOperators(importlib.abc.MetaPathFinder):
    """Defines the two operators when torchvision is about to be imported, and finds nothing itself."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None and not importlib.metadata.version("torchvision").endswith("+cpu"):
                _library.append(torch.library.Library("torchvision", "DEF"))
                for operator in ("nms", "qnms"):
                    _library[0].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _DefineOperators())
