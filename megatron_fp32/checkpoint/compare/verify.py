"""Compares two checkpoints, tensor by tensor. Each is a Hugging Face or a Megatron checkpoint.

- Two checkpoints of one kind are compared by name. Their files and shards do not matter.
- Megatron checkpoints with and without stacked layers are compared layer by layer.
- Hugging Face checkpoints of known families with different names or layouts are paired by the families' mappings.
- A Megatron checkpoint is compared with a Hugging Face checkpoint as `export` would write it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor

from megatron_fp32.checkpoint.compare.findings import Findings, VerifiedSide, VerifyReport
from megatron_fp32.checkpoint.compare.layouts import Entries, Entry, note_on_names, under_common_names
from megatron_fp32.checkpoint.formats.huggingface import HuggingFaceReader
from megatron_fp32.checkpoint.formats.torch_dist import TorchDistReader
from megatron_fp32.checkpoint.identify import CheckpointKind, checkpoint_kind, model_tensors, read_config, sidecar_of
from megatron_fp32.checkpoint.progress import ProgressCallback
from megatron_fp32.checkpoint.sidecar import Sidecar
from megatron_fp32.errors import listing
from megatron_fp32.validation import check_callable, check_flag, check_path
from megatron_fp32.weights.families.registry import find_family
from megatron_fp32.weights.mapping import TensorMapping
from megatron_fp32.weights.model_map import ModelMap, map_model
from megatron_fp32.weights.naming import MTP, VISION, is_rotary_frequencies
from megatron_fp32.weights.restore import Restorer, narrowed_if_exact
from megatron_fp32.weights.spec import TensorSpec
from megatron_fp32.weights.stacking import has_stacked_layers, is_stack_of_layers, name_in_layer
from megatron_fp32.weights.tensors import FLOAT4, TensorInfo
from megatron_fp32.weights.vocabulary import PADDED_VOCABULARY, check_vocab_size, nonzero_rows

_WHOLE_BYTES = 1 << 28
"""Bytes. Larger tensors with more than two axes are compared one element at a time."""


def verify_checkpoints(
    a: str | Path,
    b: str | Path,
    *,
    source: str | Path | None = None,
    text_only: bool = False,
    vocab_size: int | None = None,
    progress: ProgressCallback | None = None,
) -> VerifyReport:
    """Compare two checkpoints. One tensor of each, or the tensors of one mapping, are in memory at a time.

    Two Hugging Face checkpoints are compared by name. If their names differ and both `config.json` belong to supported
    families, equal parts of the model are compared:

    - fused experts with separate experts, under the names of the separate experts;
    - the text model of a vision-language checkpoint with a text model that stands alone, under the names of a.

    A Megatron checkpoint is compared with a Hugging Face checkpoint as `export` would write it: with the names and the
    layout of the Hugging Face checkpoint, in the dtypes of the source, and without padding rows of the vocabulary.
    Rounded tensors, which `export` would refuse, are compared in the dtype that they have. The source's dtypes, its
    originals and the carried tensors come from the sidecar. Without a sidecar, the Hugging Face checkpoint is used as
    the source.

    Optimizer states and other entries that are not weights are counted but not compared. Carried tensors of two
    Megatron checkpoints are not compared.

    Args:
        a: a directory with `model.safetensors` or its index, or a `torch_dist` checkpoint.
        b: the other checkpoint.
        source: the directory that the import made, for Megatron checkpoints that a trainer saved elsewhere.
        text_only: leave out vision and multi-token prediction in both checkpoints.
        vocab_size: rows of Megatron's embedding and head from this row on are padding, whatever their values are. With
            None, rows above the vocabulary of `config.json` are padding if they are zero, and a difference otherwise.
        progress: called after every tensor; see `ProgressCallback`.

    Raises:
        CheckpointError: when a checkpoint cannot be read.
        ValueError: when checkpoints of two kinds are compared and `config.json` describes a model that is not
            supported; or when `source` or `vocab_size` is given and neither checkpoint is a Megatron checkpoint.
    """
    for name, path in (("a", a), ("b", b)):
        check_path(name, path)
    check_path("source", source, optional=True)
    check_flag("text_only", text_only)
    check_vocab_size(vocab_size)
    check_callable("progress", progress)
    kinds = checkpoint_kind(a), checkpoint_kind(b)
    for name, value in (("source", source), ("vocab_size", vocab_size)):
        if value is not None and "megatron" not in kinds:
            raise ValueError(f"{name} must be left out, because neither {a} nor {b} is a Megatron checkpoint")
    with contextlib.ExitStack() as stack:
        first, second = (
            _Side(Path(path), kind, source, text_only, stack) for path, kind in zip((a, b), kinds, strict=True)
        )
        found = Findings(progress or _no_progress)
        if first.kind == second.kind:
            _compare_by_name(first, second, found, vocab_size)
        else:
            _HuggingFaceWithMegatron(first, second, found, vocab_size).compare()
        return found.report(first.summary(), second.summary())


class _Side:
    """An open checkpoint."""

    def __init__(
        self, path: Path, kind: CheckpointKind, source: str | Path | None, text_only: bool, stack: contextlib.ExitStack
    ) -> None:
        self.path, self.kind = path, kind
        self.reader: HuggingFaceReader | TorchDistReader
        self.sidecar: Sidecar | None = None
        self.padding: dict[str, int] = {}
        self._ignored = 0
        if kind == "megatron":
            self.reader = TorchDistReader(path)
            tensors = model_tensors(self.reader.tensors)
            self._ignored = len(self.reader.tensors) - len(tensors) + len(self.reader.objects)
            self.sidecar = sidecar_of(path, source)
        else:
            self.reader = stack.enter_context(HuggingFaceReader(path))
            tensors = self.reader.tensors
        carried = {n: t.info for n, t in self.sidecar.carried.items()} if self.sidecar else {}
        out = {name for name in (*tensors, *carried) if text_only and name.startswith((*VISION, MTP))}
        self._left_out = tuple(sorted(out))
        self.tensors = {name: info for name, info in tensors.items() if name not in out}
        self.carried = {name: info for name, info in carried.items() if name not in out}

    def summary(self) -> VerifiedSide:
        return VerifiedSide(
            path=self.path,
            kind=self.kind,
            tensors=len(self.tensors),
            carried=len(self.carried),
            ignored=self._ignored,
            left_out=self._left_out,
            padding=self.padding,
        )


def _compare_by_name(a: _Side, b: _Side, found: Findings, vocab_size: int | None) -> None:
    sidecar = a.sidecar or b.sidecar
    vocabulary = _vocabulary(sidecar) if sidecar else vocab_size
    rows = _rows_of_vocabulary((a, b), vocabulary, vocab_size)
    first: Entries = {entry.name: entry for entry in _entries(a, rows)}
    second: Entries = {entry.name: entry for entry in _entries(b, rows)}
    is_named_otherwise = bool(first.keys() - second.keys() and second.keys() - first.keys())
    has_other_shapes = any(first[name].info.shape != second[name].info.shape for name in first.keys() & second.keys())
    if a.kind == "huggingface" and (is_named_otherwise or has_other_shapes):
        try:
            plans = _plan(a), _plan(b)
        except ValueError as error:
            found.names_only = str(error) if is_named_otherwise else ""
        else:
            first, second = under_common_names(first, second, plans)
    both = first.keys() & second.keys()
    found.total = sum(first[n].info.nbytes for n in both if first[n].info.shape == second[n].info.shape)
    for name, entry in first.items():
        if name not in both:
            _only("a", entry, found)
        elif entry.info.shape != second[name].info.shape:
            padding = ""
            if a.kind == "megatron" and name in PADDED_VOCABULARY:
                padding = "perhaps padded to other sizes: pass source=DIR, which has the vocabulary size"
                if vocabulary is not None:
                    padding = f"rows above the vocabulary of {vocabulary} are not zero"
            note = padding or note_on_names(name, entry, second[name])
            found.add_shapes(name, entry.info, second[name].info, note)
        else:
            note = note_on_names(name, entry, second[name])
            for spec in _elements(name, entry.info, second[name].info):
                found.add_values(spec, entry.read(spec.index), second[name].read(spec.index), note)
    for name, entry in second.items():
        if name not in both:
            _only("b", entry, found)


def _only(side: Literal["a", "b"], entry: Entry, found: Findings) -> None:
    found.add_only(side, entry.name, entry.info, f"in {entry.origin}" if entry.origin else "")


def _plan(side: _Side) -> ModelMap:
    """The mappings of a Hugging Face checkpoint, without stacked layers.

    Raises:
        ValueError: naming the checkpoint, for a model that is not supported or without `config.json`.
    """
    config = read_config(side.path)
    try:
        return map_model(config, side.tensors, stacked=False)
    except ValueError as error:
        raise ValueError(f"{side.path}: {error}") from error


def _rows_of_vocabulary(sides: tuple[_Side, _Side], vocabulary: int | None, end: int | None) -> dict[str, int]:
    """For each Megatron tensor, how many rows to compare: the vocabulary, and rows up to `end` that are not zero."""
    if vocabulary is None:
        return {}
    rows = {}
    for name in PADDED_VOCABULARY:
        is_in_both = all(name in side.tensors for side in sides)
        with_rows = [side for side in sides if is_in_both and len(side.tensors[name].shape) == 2]
        trained = [nonzero_rows(side.reader.read(name)[:end][vocabulary:], vocabulary) for side in with_rows]
        rows[name] = max([vocabulary, *(found.end for found in trained if found)])
    return rows


def _entries(side: _Side, vocabulary: dict[str, int]) -> Iterator[Entry]:
    """The tensors of a checkpoint. `vocabulary` has the number of rows to compare of some tensors, by name."""
    read = side.reader.read
    for name, info in side.tensors.items():
        if side.kind == "megatron" and is_stack_of_layers(name) and len(info.torch_shape) > (info.dtype == FLOAT4):
            layer_info = dataclasses.replace(info, shape=info.shape[1:])
            for layer in range(info.shape[0]):
                yield Entry(
                    name=name_in_layer(name, layer),
                    info=layer_info,
                    read=lambda index, n=name, at=layer: read(n, (at, *index)),
                )
        elif name in vocabulary and info.shape and info.shape[0] > vocabulary[name]:
            rows = vocabulary[name]
            side.padding[name] = info.shape[0] - rows
            cut = dataclasses.replace(info, shape=(rows, *info.shape[1:]))
            yield Entry(name=name, info=cut, read=lambda _, n=name, rows=rows: read(n)[:rows])
        else:
            yield Entry(name=name, info=info, read=lambda index, n=name: read(n, index))


def _elements(name: str, a: TensorInfo, b: TensorInfo) -> Iterator[TensorSpec]:
    if len(a.shape) > 2 and max(a.nbytes, b.nbytes) > _WHOLE_BYTES:
        for at in range(a.shape[0]):
            yield TensorSpec(name=name, shape=a.shape[1:], index=(at,), stack=a.shape[:1])
    else:
        yield TensorSpec(name=name, shape=a.shape)


def _vocabulary(sidecar: Sidecar) -> int:
    config = sidecar.hf_config
    return find_family(config).parse(config).vocab_size


class _HuggingFaceWithMegatron:
    """Compares a Hugging Face checkpoint with a Megatron checkpoint, in either order."""

    def __init__(self, a: _Side, b: _Side, found: Findings, vocab_size: int | None) -> None:
        self._vocab_size = vocab_size
        self._is_hf_first = a.kind == "huggingface"
        self._hf, self._megatron = (a, b) if self._is_hf_first else (b, a)
        self._found = found
        originals = self._megatron.sidecar.originals() if self._megatron.sidecar else {}
        self._restorer = Restorer(self._megatron.reader, originals)
        has_mtp = any(name.startswith(MTP) for name in self._megatron.tensors)
        converted = {
            name: info
            for name, info in self._hf.tensors.items()
            if not name.startswith(VISION) and (has_mtp or not name.startswith(MTP)) and not is_rotary_frequencies(name)
        }
        stacked = has_stacked_layers(self._megatron.tensors)
        self._plan = map_model(read_config(self._hf.path), converted, stacked=stacked)

    def compare(self) -> None:
        hf, megatron, plan = self._hf.tensors, self._megatron.tensors, self._plan
        carried, converted = self._megatron.carried, plan.hf_shapes
        self._found.total = sum(info.nbytes for name, info in hf.items() if name in converted or name in carried)
        for mapping in plan.mappings:
            self._compare_mapping(mapping)
        for name in sorted(megatron.keys() - plan.megatron_shapes.keys()):
            self._only_megatron(name, megatron[name])
        sidecar = self._megatron.sidecar
        left_out = set(sidecar.left_out) if sidecar else set()
        for name in sorted(hf.keys() - converted.keys() - carried.keys()):
            note = "rotary frequencies, computed from config.json" if is_rotary_frequencies(name) else ""
            self._only_hf(name, "the import left it out" if name in left_out else note)
        for name in sorted(carried.keys() - hf.keys()):
            self._only_megatron(name, carried[name], "carried in the sidecar")
        if sidecar:
            with sidecar.open_carried() as reader:
                for name in sorted(hf.keys() & carried.keys() - converted.keys()):
                    self._compare(TensorSpec(name=name, shape=carried[name].shape), reader.read(name))

    def _compare_mapping(self, mapping: TensorMapping) -> None:
        stored = self._megatron.tensors
        missing = [spec.name for spec in mapping.megatron if spec.name not in stored]
        misshapen = [spec for spec in mapping.megatron if spec.name in stored and not _has_shape(stored, spec)]
        present = [spec for spec in mapping.hf if spec.name in self._hf.tensors]
        if missing:
            for spec in present:
                self._only_hf(spec.name, f"no {listing(missing)}")
            for spec in mapping.megatron:
                if spec.name in stored:
                    self._only_megatron(spec.name, stored[spec.name], f"no {listing(missing)}")
        elif misshapen:
            wrong = misshapen[0]
            for spec in present:
                self._shape(spec.name, stored[wrong.name], f"shape of {wrong.name}, expected {wrong.stored_shape}")
        else:
            for spec, tensor in zip(mapping.hf, self._exported(mapping), strict=True):
                self._compare(spec, tensor)

    def _compare(self, spec: TensorSpec, megatron: Tensor) -> None:
        info = TensorInfo(dtype=megatron.dtype, shape=spec.stored_shape)
        if spec.name not in self._hf.tensors:
            self._only_megatron(spec.name, info)
        elif self._hf.tensors[spec.name].shape != spec.stored_shape:
            self._shape(spec.name, info)
        else:
            hf = self._hf.reader.read(spec.name, spec.index)
            self._found.add_values(spec, *((hf, megatron) if self._is_hf_first else (megatron, hf)))

    def _exported(self, mapping: TensorMapping) -> tuple[Tensor, ...]:
        """The tensors that `export` would write, except that a tensor is only cast if that keeps every bit."""
        restored = self._restorer.restore(mapping, originals=self._originals_of(mapping))
        for spec in mapping.megatron:
            if spec.name in restored.above_vocabulary:
                self._note_nonzero_rows(mapping, spec, restored.above_vocabulary[spec.name])
        return tuple(self._in_source_dtype(spec.name, t) for spec, t in zip(mapping.hf, restored.hf, strict=True))

    def _note_nonzero_rows(self, mapping: TensorMapping, spec: TensorSpec, above: Tensor) -> None:
        """Record rows above the vocabulary: as padding if they are zero, otherwise as a difference."""
        considered = None if self._vocab_size is None else max(0, self._vocab_size - spec.shape[0])
        rows = nonzero_rows(above[:considered], spec.shape[0])
        stored = self._megatron.tensors[spec.name]
        if rows is None:
            self._megatron.padding[spec.name] = len(above)
            return
        note = f"{rows.rows} rows of {spec.name} above the vocabulary of {spec.shape[0]} are not zero"
        if rows.alike:
            note += "; they are all equal, as padding rows are after training"
        note += f". Pass vocab_size={spec.shape[0]} to compare without them"
        for hf in mapping.hf:
            if hf.name in self._hf.tensors:
                self._shape(hf.name, stored, note)

    def _originals_of(self, mapping: TensorMapping) -> Mapping[str, Tensor]:
        if mapping.invertible or all(spec.name in self._restorer.originals for spec in mapping.hf):
            return self._restorer.originals
        hf = self._hf.tensors
        fitting = [spec for spec in mapping.hf if spec.name in hf and hf[spec.name].shape == spec.stored_shape]
        return {spec.name: self._hf.reader.read(spec.name, spec.index) for spec in fitting}

    def _in_source_dtype(self, name: str, tensor: Tensor) -> Tensor:
        sidecar = self._megatron.sidecar
        if sidecar and name in sidecar.tensors:
            dtype = sidecar.tensors[name].info.dtype
        elif name in self._hf.tensors:
            dtype = self._hf.tensors[name].dtype
        else:
            return tensor
        return narrowed_if_exact(tensor, dtype)

    def _only_hf(self, name: str, note: str = "") -> None:
        self._found.add_only("a" if self._is_hf_first else "b", name, self._hf.tensors[name], note)

    def _only_megatron(self, name: str, info: TensorInfo, note: str = "") -> None:
        self._found.add_only("b" if self._is_hf_first else "a", name, info, note)

    def _shape(self, name: str, megatron: TensorInfo, note: str = "") -> None:
        hf = self._hf.tensors[name]
        self._found.add_shapes(name, *((hf, megatron) if self._is_hf_first else (megatron, hf)), note)


def _has_shape(stored: dict[str, TensorInfo], spec: TensorSpec) -> bool:
    shape, expected = stored[spec.name].shape, spec.stored_shape
    if spec.name in PADDED_VOCABULARY:
        return len(shape) == 2 and shape[0] >= expected[0] and shape[1:] == expected[1:]
    return shape == expected


def _no_progress(action: str, nbytes: int, total: int) -> None:
    pass
