"""Tests that need a GPU.

flash-linear-attention tunes each of its kernels over dozens of configurations at the first call of a shape, which takes
minutes. What is tested here does not depend on the choice, so every kernel takes its first one. This runs before
anything imports the kernels, in the test process and in its ranks.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

if torch.cuda.is_available():
    from triton.runtime.autotuner import Autotuner

    _init = Autotuner.__init__

    @functools.wraps(_init)
    def _first_config_only(self: Any, fn: Any, arg_names: Any, configs: Any, *args: Any, **kwargs: Any) -> None:
        _init(self, fn, arg_names, configs[:1], *args, **kwargs)

    Autotuner.__init__ = _first_config_only
