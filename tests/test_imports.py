"""Who may import whom: the map of the package.

Every import counts, wherever it stands: at the top of a module, inside of a function (which only puts off the loading
of torch or of an optional package), or under `TYPE_CHECKING`. The one exception is `megatron_fp32/__init__.py`, the
list of public names, which loads each of them on first use.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "megatron_fp32"

GROUND = {"errors", "validation", "extras", "needs_megatron", "needs_triton", "needs_vllm"}
"""Small modules that import nothing else of the package."""

OPS = {"ops", "ops.products", "ops.logits", "ops.logprobs", "ops.fp8"}
LAYERS = {"output_layer", "gated_delta_net", "kept_parameters", "optimizer"}

# A room is a folder or a module below `megatron_fp32/`. Read the table from the bottom: there are the highest rooms.
ALLOWED: dict[str, set[str]] = {
    # Checks of arguments, the package's exceptions, and errors that name the package to install.
    "errors": set(),
    "validation": set(),
    "extras": set(),
    "needs_megatron": {"extras"},
    "needs_triton": {"extras"},
    "needs_vllm": {"extras"},
    # Arithmetic on plain tensors and process groups.
    "ops": {"validation", "errors", "needs_triton"},  # first_order.py
    "ops.products": {"validation", "errors", "needs_triton", "ops"},
    "ops.logits": {"validation", "errors", "needs_triton", "ops", "ops.products"},
    "ops.logprobs": {"validation", "errors", "needs_triton", "ops", "ops.products"},
    "ops.fp8": {"validation", "errors", "needs_triton"},
    # Which Hugging Face tensor is which Megatron tensor: no files, no Megatron.
    "weights": {"validation", "errors", "ops.fp8"},
    # What is kept in fp32, as one value.
    "config": {"validation", "errors", "ops.products"},
    # Files: no Megatron.
    "checkpoint": {"validation", "errors", "extras", "ops.fp8", "weights"},
    # Buffers on their way from a trainer to an engine: no Megatron, no engine.
    "transfer": {"validation", "errors", "extras", "needs_triton", "weights"},
    # The layers and optimizers of a model.
    "kept_parameters": GROUND | {"config"},
    "optimizer": GROUND | {"config", "kept_parameters"},
    "gated_delta_net": GROUND | {"config", "kept_parameters"} | OPS,
    "output_layer": GROUND | {"config", "kept_parameters"} | OPS,
    # One call that changes a built model, and one that looks at it.
    "find_layers": GROUND,
    "apply": GROUND | {"config", "find_layers"} | LAYERS,
    "check": GROUND | {"config", "find_layers"} | LAYERS,
    # What the output layer of a model returns in place of its logits.
    "results": GROUND | {"find_layers"} | LAYERS,
    # Building a model from a Hugging Face config, and reading its tensors.
    "models": GROUND | {"config", "apply", "check", "weights", "checkpoint"} | OPS | LAYERS,
    # RL frameworks' functions, with their names and arguments.
    "integrations": GROUND | OPS,
    # What runs in the processes of vLLM: no Megatron.
    "vllm_plugin": {"errors", "validation", "needs_vllm", "transfer"},
    # Tensors of a live model on their way to an engine or a directory.
    "streaming": GROUND | {"models", "weights", "checkpoint", "transfer"},
    # Training and ranks without a GPU.
    "testing": GROUND,
    # The command line.
    "cli": GROUND | {"weights", "checkpoint"},
    "__main__": {"cli"},
}

EXCEPTIONS = {
    ("weights.hf_config.bounds", "weights.hf_config.decoder"): "annotates the dataclass whose fields it checks",
    ("weights.hf_config.sizes", "weights.hf_config.decoder"): "annotates the dataclass whose fields it checks",
    ("optimizer.float16", "checkpoint.formats.torch_dist_metadata"): "reads which optimizer states a checkpoint holds",
}
"""Imports that the rules below do not see, and why each of them stays."""

WITHOUT_MEGATRON = [*OPS, "weights", "checkpoint", "config", "cli", "transfer", "vllm_plugin"]
"""Rooms that can be read, tested and used where megatron-core is not installed."""


def modules() -> dict[str, Path]:
    """Every module by its name below the package; the package itself has the empty name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported_names(text: str) -> Iterator[str]:
    """Every `package.module.name` that a text imports."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_of(text: str) -> set[str]:
    """Modules of the package that a text imports."""
    found = set()
    for name in imported_names(text):
        package, *rest = name.split(".")
        if package == "megatron_fp32" and rest != ["__version__"]:
            prefixes = (".".join(rest[:length]) for length in range(len(rest), -1, -1))
            found.add(next(prefix for prefix in prefixes if prefix in MODULES))
    return found


def room_of(module: str) -> str:
    """The longest name in the table that a module's name begins with, or else its folder."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if (name := ".".join(parts[:length])) in ALLOWED:
            return name
    return parts[0]


def refused(module: str, imported: set[str]) -> set[str]:
    """What a module imports and must not."""
    room = room_of(module)
    allowed = {room, *ALLOWED.get(room, set())}
    return {name for name in imported if room_of(name) not in allowed and (module, name) not in EXCEPTIONS}


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """Names that lead back to the first of them; empty where there are none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        circle: list[str] = error.args[1]
        return circle
    return []


GRAPH = {name: imports_of(path.read_text()) - {name} for name, path in MODULES.items() if name}


@pytest.mark.parametrize("module", GRAPH)
def test_a_module_imports_what_its_room_may(module: str) -> None:
    assert room_of(module) in ALLOWED, f"{module} is in no room of the table: give the new room a line"
    assert not refused(module, GRAPH[module])


def test_no_circle_between_modules() -> None:
    without = {name: {other for other in found if (name, other) not in EXCEPTIONS} for name, found in GRAPH.items()}
    assert not circle_in(without)


@pytest.mark.parametrize("exception", EXCEPTIONS, ids=" -> ".join)
def test_every_exception_is_still_needed(exception: tuple[str, str]) -> None:
    module, imported = exception
    assert imported in GRAPH[module]


def test_no_circle_in_the_table() -> None:
    assert not circle_in(ALLOWED)


@pytest.mark.parametrize("module", [name for name in GRAPH if room_of(name) in WITHOUT_MEGATRON])
def test_no_megatron_below_the_layers(module: str) -> None:
    assert not [name for name in imported_names(MODULES[module].read_text()) if name.split(".")[0] == "megatron"]


def test_a_forbidden_import_is_found_wherever_it_stands() -> None:
    text = """
from __future__ import annotations
from typing import TYPE_CHECKING
import torch
from megatron_fp32 import needs_triton, __version__
from megatron_fp32.ops.products.chunks import even_chunks
if TYPE_CHECKING:
    from megatron_fp32.ops.logprobs import kernels
def function():
    import megatron_fp32.config
"""
    imported = imports_of(text)
    assert imported == {"needs_triton", "ops.products.chunks", "ops.logprobs.kernels", "config"}
    assert refused("ops.products.gemm", imported) == {"ops.logprobs.kernels", "config"}


def test_a_circle_is_found() -> None:
    assert set(circle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}
