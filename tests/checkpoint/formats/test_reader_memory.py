"""Memory of reading one large tensor, by the operating system's account: pages of mapped files would count."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import filesystem, metadata

MIB = 2**20
ROWS, COLUMNS = 160, MIB // 4  # of fp32: 160 MiB

_SCRIPT = """
import sys, torch
from pathlib import Path
{imports}

def status(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024

reader = {reader}(sys.argv[1])
reader.read("small")
before = status("VmRSS")
tensor = reader.read("large", {index})
print((status("VmHWM") - before) / tensor.nbytes)
assert tensor.flatten()[-1] == 1
"""

_TORCH_DIST = "from megatron_fp32.checkpoint.formats.torch_dist import TorchDistReader"
_HUGGING_FACE = "from megatron_fp32.checkpoint.formats.huggingface import HuggingFaceReader"


def _peak(directory: Path, imports: str, index: tuple[int, ...] = ()) -> float:
    """Highest memory while the large tensor is read, above that before, in sizes of the tensor."""
    script = _SCRIPT.format(imports=imports, reader=imports.split()[-1], index=index)
    done = subprocess.run(
        [sys.executable, "-c", script, str(directory)], capture_output=True, text=True, timeout=120,
        cwd=Path(__file__).parents[3], check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def _write_torch_dist(directory: Path, chunks: int, axis: int) -> Path:
    """The matrix in so many chunks along an axis, as tensor-parallel ranks save it."""
    large = torch.ones(ROWS, COLUMNS).chunk(chunks, axis)
    parts = {"small": [torch.ones(3, 1)], "large": [part.clone() for part in large]}
    entries, storage = {}, {}
    with (directory / "__0_0.distcp").open("wb") as file:
        for name, tensors in parts.items():
            size = torch.cat(tensors, axis if len(tensors) > 1 else 0).shape
            entry = metadata.TensorStorageMetadata(metadata.TensorProperties(dtype=torch.float32), size, [])
            entries[name], at = entry, [0] * len(size)
            for tensor in tensors:
                offsets, start = torch.Size(at), file.tell()
                torch.save(tensor, file)
                entry.chunks.append(metadata.ChunkStorageMetadata(offsets, tensor.shape))
                place = filesystem._StorageInfo("__0_0.distcp", start, file.tell() - start)
                storage[metadata.MetadataIndex(name, offsets)] = place
                at[axis] += tensor.shape[axis]
    complete = metadata.Metadata(state_dict_metadata=entries, storage_data=storage)
    (directory / ".metadata").write_bytes(pickle.dumps(complete))
    return directory


@pytest.mark.parametrize(
    ("chunks", "axis", "most"),
    [(1, 0, 1.2), (4, 0, 1.2), (2, 1, 1.7)],
    ids=["one chunk", "chunks of rows", "chunks of columns"],
)
def test_a_tensor_of_torch_dist_is_in_memory_once(tmp_path: Path, chunks: int, axis: int, most: float) -> None:
    assert _peak(_write_torch_dist(tmp_path, chunks, axis), _TORCH_DIST) < most


def test_a_row_of_a_chunk_takes_the_memory_of_a_row(tmp_path: Path) -> None:
    assert _peak(_write_torch_dist(tmp_path, 1, 0), _TORCH_DIST, (7,)) < 8  # of 160 rows


def test_a_tensor_of_a_safetensors_file_is_in_memory_once(tmp_path: Path) -> None:
    save_file({"small": torch.ones(3), "large": torch.ones(ROWS, COLUMNS)}, tmp_path / "model.safetensors")
    assert _peak(tmp_path, _HUGGING_FACE) < 1.2
    assert _peak(tmp_path, _HUGGING_FACE, (7,)) < 4
