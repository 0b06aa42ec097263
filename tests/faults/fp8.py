"""Faults of float8 checkpoints."""

from __future__ import annotations

from faults.mutant import Mutant

FP8_FILES = "tests/weights/test_fp8.py"
FP8_LOADING = "tests/checkpoint/fp8/test_fp8_loading.py"
ENTRIES = "tests/checkpoint/fp8/test_quantization_entries.py"

FP8 = [
    Mutant(
        name="quantize the router",
        file="weights/fp8/scheme.py",
        old='(?:gate|up|down)_proj)"',
        new='(?:gate|up|down)(?:_proj)?)"',
        test=f"{FP8_FILES}::TestWhichTensors",
    ),
    Mutant(
        name="quantize whatever has two dimensions",
        file="weights/fp8/scheme.py",
        old="if not QUANTIZED.fullmatch(module):",
        new="if False:",
        test=f"{FP8_LOADING}::test_a_head_under_another_name_keeps_its_bytes",
    ),
    Mutant(
        name="quantize the projections of a tower",
        file="weights/fp8/scheme.py",
        old="if not QUANTIZED.fullmatch(module):",
        new="if not QUANTIZED.search(module):",
        test=f"{FP8_FILES}::TestWhichTensors",
    ),
    Mutant(
        name="forget the tied head in a list of modules",
        file="weights/fp8/config.py",
        old='kept = {"lm_head"}',
        new="kept: set[str] = set()",
        test=f"{FP8_LOADING}::TestTransformers",
    ),
    Mutant(
        name="list the modules of an inner text model under one name",
        file="weights/fp8/config.py",
        old="kept.update([alone + name.removeprefix(inside) for name in kept if name.startswith(inside)])",
        new="del alone",
        test=f"{FP8_LOADING}::TestTransformers",
    ),
    Mutant(
        name="forget the experts that are kept in a list of modules",
        file="weights/fp8/config.py",
        old="kept.update(module for module, quantized in experts.items() if not quantized)",
        new="pass",
        test=f"{FP8_LOADING}::TestTransformers",
    ),
    Mutant(
        name="take a block with fewer columns for a full one",
        file="weights/fp8/tensors.py",
        old="and any(size % block for size, block in zip(info.shape, scheme.block, strict=True))",
        new="and info.shape[0] % scheme.block[0]",
        test=f"{FP8_LOADING}::TestPartialBlocks",
    ),
    Mutant(
        name="leave a quantization in the config of a bf16 export",
        file="checkpoint/jobs/export_job.py",
        old="remove_quantization_entries(staging.output, self._hf_config)",
        new="pass",
        test=f"{ENTRIES}::TestBf16",
    ),
    Mutant(
        name="leave the files of another quantization in a float8 export",
        file="checkpoint/fp8/write.py",
        old="    remove_quantization_entries(directory, config)\n",
        new="",
        test=ENTRIES,
    ),
    Mutant(
        name="look for a quantization at the top of a config only",
        file="checkpoint/quantization_entries.py",
        old="for key, value in inner.items() if key not in QUANTIZATION_KEYS]",
        new="for key, value in ()]",
        test=f"{ENTRIES}::TestBf16",
    ),
    Mutant(
        name="quantize under a config that says it is done",
        file="checkpoint/jobs/quantize_job.py",
        old="    if entries:\n",
        new="    if False:\n",
        test=f"{ENTRIES}::TestQuantize",
    ),
    Mutant(
        name="lay tensors into a file in the order of their declaration",
        file="checkpoint/formats/safetensors_writer.py",
        old="{name: tensors[name] for name in by_alignment(tensors)}",
        new="dict(tensors)",
        test="tests/checkpoint/formats/test_huggingface.py",
    ),
    Mutant(
        name="read a list for compressed-tensors as one of prefixes",
        file="weights/fp8/scheme.py",
        old="else entry == module",
        new="else module.startswith(entry)",
        test=f"{FP8_FILES}::TestWhichTensors",
    ),
]
