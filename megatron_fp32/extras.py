"""Optional packages, and the error for a missing one, with the command that installs it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

_REMEDIES = {
    "megatron": "pip install 'megatron_fp32[megatron]', or put a Megatron-LM checkout on PYTHONPATH",
    "einops": "pip install 'megatron_fp32[megatron]', or with a Megatron-LM checkout: pip install einops",
    "psutil": "pip install 'megatron_fp32[megatron]', or with a Megatron-LM checkout: pip install psutil",
    "transformers": "pip install 'megatron_fp32[transformers]'",
    "fla": "pip install 'megatron_fp32[gpu]'",
    "matplotlib": "pip install 'megatron_fp32[plot]'",
    "huggingface_hub": "pip install 'megatron_fp32[hub]'",
    "triton": "pip install triton; torch's wheels for CUDA on Linux bring it along",
    "vllm": "pip install 'megatron_fp32[vllm]', in the environment of the engine",
    "transformer_engine": "pip install 'transformer-engine[pytorch]', or build the model with transformer_impl='local'",
}
"""How to install each package, by the name that is imported."""


class MissingPackageError(ModuleNotFoundError):
    """An optional package is not installed. The message has the command that installs it."""


@contextlib.contextmanager
def remedy_named() -> Iterator[None]:
    """Turn the error of an import of a missing optional package into one that says how to install it.

    Every other ImportError passes unchanged: a module that is missing inside an installed package is another fault.

    Raises:
        MissingPackageError: for a missing package of `megatron_fp32`'s extras.
    """
    try:
        yield
    except MissingPackageError:
        raise
    except ModuleNotFoundError as error:
        # Other distributions share the namespace "megatron", so megatron.core can be missing where "megatron" is not.
        package = "megatron" if error.name == "megatron.core" else error.name
        if package not in _REMEDIES:
            raise
        raise MissingPackageError(missing(package), name=error.name) from error


def missing(package: str) -> str:
    """The message for a package that is not installed, by the name that is imported."""
    shown = "megatron-core (the module megatron.core)" if package == "megatron" else package
    return f"{shown} is not installed. Install it: {_REMEDIES[package]}"
