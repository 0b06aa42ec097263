"""What an import leaves beside a Megatron checkpoint, so that an export can give back what came.

`hf_source/` holds `source.json` (naming style, and dtype, shape and digest of every tensor), `originals/` (the exact
values of tensors whose change of layout cannot be undone), and `assets/` (config, tokenizer and every other file of the
Hugging Face directory that is no weights, byte for byte).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fp32.checkpoint.huggingface import (
    DTYPE_NAMES,
    DTYPES,
    CheckpointError,
    HuggingFaceReader,
    HuggingFaceWriter,
    TensorInfo,
    tensor_bytes,
)
from megatron_fp32.checkpoint.torch_dist import find_checkpoint

DIRECTORY = "hf_source"

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".h5")


def digest(tensor: Tensor) -> str:
    """SHA-256 of dtype, shape and values: equal for tensors that are equal byte for byte."""
    header = f"{DTYPE_NAMES[tensor.dtype]} {list(tensor.shape)} ".encode()
    sha = hashlib.sha256(header)
    sha.update(tensor_bytes(tensor))
    return sha.hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceTensor:
    """One tensor of the Hugging Face checkpoint that was imported."""

    info: TensorInfo
    digest: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sidecar:
    """A `hf_source` directory."""

    directory: Path
    prefix: str
    """Which of the family's naming styles the tensors came under."""
    tensors: Mapping[str, SourceTensor]
    left_out: tuple[str, ...]
    """Tensors of the source that the import left out, as it was told to."""

    @property
    def hf_config(self) -> dict[str, Any]:
        """The source's `config.json`, parsed."""
        path = self.directory / "assets" / "config.json"
        try:
            config: dict[str, Any] = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        return config

    def originals(self) -> dict[str, Tensor]:
        """The tensors whose change of layout cannot be undone, as they came."""
        path = self.directory / "originals"
        if not path.is_dir():
            return {}
        with HuggingFaceReader(path) as reader:
            tensors = {name: reader.read(name).clone() for name in reader.tensors}
        damaged = [n for n, t in tensors.items() if n not in self.tensors or digest(t) != self.tensors[n].digest]
        if damaged:
            raise CheckpointError(f"{path} is damaged: {damaged} are not what was imported")
        return tensors

    def copy_assets(self, directory: Path) -> None:
        """Put the files that are no weights into `directory`."""
        shutil.copytree(self.directory / "assets", directory, dirs_exist_ok=True)


def write_sidecar(
    root: Path,
    hf_dir: Path,
    *,
    prefix: str,
    tensors: Mapping[str, SourceTensor],
    left_out: tuple[str, ...],
    originals: Mapping[str, Tensor],
) -> None:
    """Make `root/hf_source`."""
    directory = root / DIRECTORY
    (directory / "assets").mkdir(parents=True)
    for path in sorted(hf_dir.rglob("*")):
        place = path.relative_to(hf_dir)
        # Hidden folders are those of git and of download caches.
        hidden = any(part.startswith(".") for part in place.parts[:-1])
        if path.is_file() and not hidden and not path.name.endswith(_WEIGHTS):
            target = directory / "assets" / place
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    if originals:
        (directory / "originals").mkdir()
        infos = {n: TensorInfo(dtype=t.dtype, shape=tuple(t.shape)) for n, t in originals.items()}
        writer = HuggingFaceWriter(directory / "originals", infos)
        for name, tensor in originals.items():
            writer.write(name, tensor)
        writer.finish()
    listing = {
        name: {"dtype": DTYPE_NAMES[t.info.dtype], "shape": list(t.info.shape), "sha256": t.digest}
        for name, t in tensors.items()
    }
    content = {"version": 1, "prefix": prefix, "tensors": listing, "left_out": list(left_out)}
    (directory / "source.json").write_text(json.dumps(content, indent=1) + "\n")


def find_sidecar(megatron_dir: str | Path, source: str | Path | None = None) -> Sidecar:
    """The sidecar that `source` names, or that lies in or beside a Megatron checkpoint.

    Raises:
        CheckpointError: when there is none, or it is damaged.
    """
    places = [Path(source), Path(source) / DIRECTORY] if source is not None else _places(Path(megatron_dir))
    for directory in places:
        if (directory / "source.json").is_file():
            return _read_sidecar(directory)
    if source is not None:
        raise CheckpointError(f"{source} holds no {DIRECTORY}: it must be what an import made, or its {DIRECTORY}")
    raise CheckpointError(
        f"there is no {DIRECTORY} beside {megatron_dir}. A checkpoint that a trainer saved does not know its Hugging "
        "Face config, tokenizer, names and dtypes: name the directory that the import made with --source"
    )


def _places(megatron_dir: Path) -> list[Path]:
    checkpoint = find_checkpoint(megatron_dir)
    return [checkpoint / DIRECTORY, checkpoint.parent / DIRECTORY]


def _read_sidecar(directory: Path) -> Sidecar:
    try:
        content = json.loads((directory / "source.json").read_text())
        if content["version"] != 1:
            raise CheckpointError(f"{directory}: unknown version {content['version']!r} of source.json")
        tensors = {
            name: SourceTensor(
                info=TensorInfo(dtype=DTYPES[entry["dtype"]], shape=tuple(entry["shape"])), digest=entry["sha256"]
            )
            for name, entry in content["tensors"].items()
        }
        return Sidecar(
            directory=directory,
            prefix=content["prefix"],
            tensors=tensors,
            left_out=tuple(content["left_out"]),
        )
    except CheckpointError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{directory / 'source.json'} is damaged: {error!r}") from error


def fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Every value survives a round trip through `dtype`, bit for bit."""
    back = tensor.to(dtype).to(tensor.dtype)
    return torch.equal(back.view(torch.uint8), tensor.contiguous().view(torch.uint8)) if tensor.numel() else True
