"""Faults of the readers and writers of files."""

from __future__ import annotations

from faults.mutant import Mutant

SAFETENSORS = "tests/checkpoint/test_safetensors_file.py"
TORCH_FILE = "tests/checkpoint/test_torch_file.py"
TORCH_DIST = "tests/checkpoint/test_torch_dist.py"
DTYPES = "tests/checkpoint/test_dtypes.py"
FUZZ = "tests/checkpoint/test_fuzz.py"

FILES = [
    Mutant(
        name="leave a hole in a safetensors file",
        file="checkpoint/safetensors_file.py",
        old="if start != covered:",
        new="if start < covered:",
        test=f"{SAFETENSORS}::TestRefuses",
    ),
    Mutant(
        name="believe the length of a header",
        file="checkpoint/safetensors_file.py",
        old="if length > HEADER_LIMIT or 8 + length > size:",
        new="if False:",
        test=f"{SAFETENSORS}::TestRefuses",
    ),
    Mutant(
        name="take the last of two keys",
        file="checkpoint/files.py",
        old="if key in found:",
        new="if False:",
        test=f"{SAFETENSORS}::TestRefuses",
    ),
    Mutant(
        name="take true for a size",
        file="checkpoint/tensors.py",
        old="if not all(type(size) is int and",
        new="if not all(isinstance(size, int) and",
        test=f"{SAFETENSORS}::TestRefuses",
    ),
    Mutant(
        name="be content with a short read",
        file="checkpoint/files.py",
        old="while done < len(memory):",
        new="if done < len(memory):",
        test=f"{SAFETENSORS}::TestReading",
    ),
    Mutant(
        name="read from another file than the header",
        file="checkpoint/safetensors_file.py",
        old="if _identity(file.fileno()) != header.identity:",
        new="if False:",
        test=f"{SAFETENSORS}::TestReading",
    ),
    Mutant(
        name="accept tensors that the index does not name",
        file="checkpoint/huggingface.py",
        old="if expected is not None and names - expected:",
        new="if False:",
        test="tests/checkpoint/test_huggingface.py::TestReaderRefuses",
    ),
    Mutant(
        name="ignore checksums",
        file="checkpoint/torch_file.py",
        old="if checksum != member.CRC:",
        new="if False:",
        test=f"{TORCH_FILE}::TestDamage",
    ),
    Mutant(
        name="ignore checksums, fuzzed",
        file="checkpoint/torch_file.py",
        old="self._has_checksums = any(member.CRC for member in members)",
        new="self._has_checksums = False",
        test=f"{FUZZ}::test_data",
    ),
    Mutant(
        name="ignore the checksum of a part",
        file="checkpoint/torch_file.py",
        old="if not is_whole and not is_checked and self._has_checksums:",
        new="if False:",
        test=f"{TORCH_FILE}::TestDamage",
    ),
    Mutant(
        name="believe where a member begins",
        file="checkpoint/torch_file.py",
        old="if self._section.read(4) not in _AFTER:",
        new="if False:",
        test=f"{TORCH_FILE}::TestDamage",
    ),
    Mutant(
        name="ignore strides",
        file="checkpoint/torch_file.py",
        old="if size != 1 and stride != expected:",
        new="if False:",
        test=f"{TORCH_FILE}::test_every_view_is_read",
    ),
    Mutant(
        name="believe the size of a storage",
        file="checkpoint/torch_file.py",
        old="if stored.offset + stored.span > available or math.prod(sizes) > available:",
        new="if False:",
        test=f"{TORCH_FILE}::TestDamage",
    ),
    Mutant(
        name="the unpickler in C",
        file="checkpoint/pickles.py",
        old="class RestrictedUnpickler(pickle._Unpickler):",
        new="class RestrictedUnpickler(pickle.Unpickler):",
        test=f"{TORCH_FILE}::TestDamage",
    ),
    Mutant(
        name="run what a common state asks for",
        file="checkpoint/common_state.py",
        old="            return self._stand_in(module, name)\n",
        new="            return getattr(__import__(module), name)\n",
        test=f"{TORCH_FILE}::TestCommonState",
    ),
    Mutant(
        name="two chunks in the same bytes",
        file="checkpoint/torch_dist_metadata.py",
        old="if file == next_file and start < end:",
        new="if False:",
        test="tests/checkpoint/test_torch_dist_damage.py",
    ),
    Mutant(
        name="reserve what the metadata promises",
        file="checkpoint/torch_dist.py",
        old="if nbytes > where.length:",
        new="if False:",
        test="tests/checkpoint/test_torch_dist_damage.py",
    ),
    Mutant(
        name="read a part that is not there",
        file="checkpoint/torch_dist.py",
        old="        flat_index(index, tuple(entry.size))\n",
        new="",
        test=f"{TORCH_DIST}::TestReader",
    ),
    Mutant(
        name="read a chunk aside and copy it",
        file="checkpoint/torch_file.py",
        old="part = target if target.is_contiguous() else unfilled(target.shape, stored.dtype)",
        new="part = unfilled(target.shape, stored.dtype)",
        test="tests/checkpoint/test_reader_memory.py",
    ),
    Mutant(
        name="take the upper half of a byte for the first value of float4",
        file="checkpoint/difference.py",
        old="torch.stack([codes & 15, codes >> 4], dim=-1)",
        new="torch.stack([codes >> 4, codes & 15], dim=-1)",
        test=f"{DTYPES}::TestValues::test_float4",
    ),
    Mutant(
        name="refuse white space before a header",
        file="checkpoint/safetensors_file.py",
        old="        if not isinstance(entries, dict):",
        new='        if not content.startswith(b"{"):',
        test=f"{SAFETENSORS}::TestAccepts",
    ),
    Mutant(
        name="follow a link out of the directory",
        file="checkpoint/assets.py",
        old="if not any(real.is_relative_to(place) for place in allowed):",
        new="if False:",
        test="tests/checkpoint/test_assets.py",
    ),
    Mutant(
        name="take weights for assets of a sidecar",
        file="checkpoint/assets.py",
        old="        if wrong:\n",
        new="        if False:\n",
        test="tests/checkpoint/test_assets.py",
    ),
    Mutant(
        name="carry a Megatron checkpoint as assets",
        file="checkpoint/assets.py",
        old="if not is_top and _is_megatron(here, files):",
        new="if False:",
        test="tests/checkpoint/test_assets.py",
    ),
    Mutant(
        name="find a dangling link in place of the output at the end",
        file="checkpoint/staging.py",
        old="    if not os.path.lexists(out):\n",
        new="    if not out.exists():\n",
        test="tests/checkpoint/test_assets.py",
    ),
]
