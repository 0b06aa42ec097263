"""Where a push goes: the protocol of a sink, and a sink that writes a Hugging Face checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_fp32.checkpoint.formats.digests import compare, digest
from megatron_fp32.checkpoint.formats.huggingface import HuggingFaceReader
from megatron_fp32.checkpoint.formats.safetensors_writer import HuggingFaceWriter
from megatron_fp32.checkpoint.formats.section import to_disk
from megatron_fp32.checkpoint.fp8.write import write_configs
from megatron_fp32.checkpoint.jobs.staging import Staging, check_output, open_staging
from megatron_fp32.checkpoint.quantization_entries import remove_quantization_entries
from megatron_fp32.checkpoint.sidecar import Sidecar
from megatron_fp32.weights.choices import SHARD_BYTES
from megatron_fp32.weights.fp8.scheme import Fp8Scheme
from megatron_fp32.weights.tensors import TensorInfo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upload:
    """What a push announces before it sends the first tensor."""

    version: int
    tensors: Mapping[str, TensorInfo]
    """Every tensor that will come, in this order."""
    fp8: Fp8Scheme | None
    sidecar: Sidecar
    """Of the import that the run began with: config, tokenizer and tensors that were not converted."""
    device: torch.device
    """Of the tensors."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineReceipt:
    """What a push did in one engine."""

    engine: str
    """Its URL, or what it is."""
    version: int
    channel: str
    """How the bytes crossed: "gloo", "nccl" or "ipc"."""
    seconds: Mapping[str, float]
    """By phase: "connect", "begin" (pausing the engine), "send" (on the sending rank), "wait" (of it, for the engine),
    "load" (after the last byte was sent), "end" (letting the engine go on); "pause": as long as it was paused."""
    workers: tuple[Mapping[str, Any], ...]
    """Of every worker: tensors, bytes, seconds of receiving and loading, and its peak memory beyond the model."""
    rounded: tuple[str, ...]
    """Tensors that were sent in fp32, and that the engine keeps in fewer bits."""


class Sink(Protocol):
    """Receives the tensors of a push, on the sending rank alone.

    The order is `begin`, `write` for every tensor, `finish`. `abort` comes instead at any moment when the push fails,
    also when `begin` itself has failed. An error that a method raises ends the push on all ranks.
    """

    def begin(self, upload: Upload) -> None:
        """Get ready, or raise before anything is sent."""

    def write(self, name: str, tensor: Tensor) -> None:
        """Take one tensor.

        It does not change before the push ends. It may be a view of a parameter, which the next optimizer step changes:
        copy what you keep longer. A tensor that is not a view takes memory for as long as you hold it.
        """

    def finish(self) -> None:
        """Every announced tensor has come: make the version valid."""

    def abort(self, error: BaseException) -> None:
        """The push has failed: what has come is not a version."""


class HuggingFaceDirectory:
    """A sink that writes a Hugging Face checkpoint, with the config and the tokenizer of the import.

    The checkpoint appears under its name when every tensor was written, read back and compared. It equals what saving
    and `export` would give, except that experts have one tensor each.

    Args:
        out: directory to make; it must not exist.
        max_shard_bytes: a file is closed before it grows past this.
    """

    def __init__(self, out: str | Path, *, max_shard_bytes: int = SHARD_BYTES) -> None:
        self._out, self._max_shard_bytes = Path(out), max_shard_bytes
        self._open = contextlib.ExitStack()

    def begin(self, upload: Upload) -> None:
        """Declare the files.

        Raises:
            CheckpointError: when the directory exists, or someone else writes it.
        """
        check_output(self._out)
        self._upload = upload
        self._carried = self._open.enter_context(upload.sidecar.open_carried())
        self._staging: Staging = self._open.enter_context(open_staging(self._out, {"job": "stream"}))
        for place in self._staging.output.iterdir():  # a push that was killed
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        carried = {name: tensor.info for name, tensor in upload.sidecar.carried.items()}
        self._infos = {**upload.tensors, **carried}
        self._writer = HuggingFaceWriter(self._staging.output, self._infos, max_shard_bytes=self._max_shard_bytes)
        self._digests: dict[str, str] = {}

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor into its file."""
        self._writer.write(name, tensor)
        self._digests[name] = digest(tensor)

    def finish(self) -> None:
        """Read everything back, and give the directory its name.

        Raises:
            CheckpointError: when the files do not hold what was written.
        """
        for name in self._upload.sidecar.carried:
            self.write(name, self._carried.read(name))
        self._writer.finish()
        for path in self._staging.output.glob("*.safetensors"):
            to_disk(path)
        with HuggingFaceReader(self._staging.output) as reader:
            for name, expected in self._digests.items():
                compare(digest(reader.read(name)), expected, self._staging.output, name)
        self._upload.sidecar.copy_assets(self._staging.output)
        config: dict[str, Any] = self._upload.sidecar.hf_config
        if self._upload.fp8 is None:
            remove_quantization_entries(self._staging.output, config)
        else:
            write_configs(self._staging.output, config, self._infos, self._upload.fp8)
        self._staging.publish()
        self._open.close()

    def abort(self, error: BaseException) -> None:
        """Leave nothing behind."""
        # As if the error came out of the block that has the staging directory open.
        with contextlib.suppress(ValueError):
            self._open.__exit__(ValueError, ValueError(str(error)), None)
