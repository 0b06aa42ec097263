"""What the compiler makes of every Triton kernel, read without a GPU.

Strides and sizes multiply in 64 bits. In 32, the product of a stride of 2^30 and a piece's number 2 is negative, and
the kernel writes 4 GiB before its buffer. A NaN stays a NaN.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import megatron_fp32.ops
import megatron_fp32.transfer
from megatron_fp32.ops.fp8.scales import ScaleFormat
from megatron_fp32.ops.logprobs.divergence import Divergence, Pair
from megatron_fp32.ops.logprobs.softmax import FIELDS, Mean
from megatron_fp32.ops.logprobs.statistics import KeptLogits
from megatron_fp32.ops.products.devices import SHARED_MEMORY, why_not_tiles
from tests.ops.logprobs_cases import softmax

triton = pytest.importorskip("triton")
TOKENS, COLUMNS, HIDDEN = 40, 300, 64

WITHIN_A_TILE = {"_block_kernel": {"row_stride", "columns"}, "_row_kernel": {"row_stride", "columns"}}
"""Kernels whose products with these arguments stay below 2^31: the host sends larger ones elsewhere."""


def all_kernels() -> set[str]:
    """Every function that is launched, by the convention that its name ends with `_kernel`."""
    found = set()
    for package in (megatron_fp32.ops, megatron_fp32.transfer):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            for name, value in vars(importlib.import_module(module.name)).items():
                if isinstance(value, triton.JITFunction) and name.endswith("_kernel"):
                    found.add(name)
    return found


def call_distillation(raw: torch.Tensor, labels: torch.Tensor) -> None:
    """With every branch of its kernels, and without."""
    from megatron_fp32.ops.logprobs.distillation_kernels import gradient_triton, sums_triton

    every = Divergence(forward=1.0, reverse=1.0, jsd=1.0)
    for divergence, cap, tokens, count in (
        (every, 5.0, TOKENS, 3), (Divergence.reverse_kl(), None, 1, 1), (Divergence.generalized_jsd(), None, TOKENS, 2),
    ):  # fmt: skip
        part, x = softmax(290, scale=1.1, softcap=cap), raw[:tokens]
        pair = Pair(student=part, teacher=part, divergence=divergence)
        sums_triton(x, x, torch.zeros(6, tokens), pair)
        dtype = torch.float16 if count == 2 else torch.bfloat16
        scale = torch.ones(()) if count == 2 else None
        for vectors in (torch.zeros(12, tokens), torch.zeros(17, tokens)):
            gradient_triton(x, x, vectors, labels[:tokens], pair, 1, count, dtype, scale)


def call_every_host_function() -> None:
    """With small CPU tensors; the launches are recorded, not run."""
    from megatron_fp32.ops.fp8.kernels import LONGEST_ROW, quantize_triton
    from megatron_fp32.ops.logprobs import kernels
    from megatron_fp32.ops.products.hidden_grad_triton import add_hidden_grad
    from megatron_fp32.ops.products.project_triton import project_triton
    from megatron_fp32.ops.products.split_triton import split_triton
    from megatron_fp32.ops.products.weight_grad_triton import add_weight_grad
    from megatron_fp32.transfer.checksum_kernel import add_checksum

    add_checksum(torch.zeros(5000, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    x, w = torch.zeros(TOKENS, HIDDEN).bfloat16(), torch.zeros(COLUMNS, HIDDEN).bfloat16()
    raw, labels, vector = torch.zeros(TOKENS, 304)[:, :COLUMNS], torch.zeros(TOKENS).int(), torch.zeros(TOKENS)
    mean: Mean
    for mean, cap in (("none", None), ("logit", 5.0), ("logprob", 5.0)):
        part = softmax(290, scale=1.1, softcap=cap)
        statistics = torch.zeros(3, FIELDS[mean], TOKENS)
        for keep in (None, KeptLogits.allocate(TOKENS, w), KeptLogits.allocate(TOKENS, w, exponentials=True)):
            project_triton(
                x, w, logits=None if keep is None else keep.values, statistics=statistics, labels=labels,
                label_logits=vector, inverse_temperature=vector, valid_columns=290, softcap=cap,
            )  # fmt: skip
        kernels.statistics_triton(raw, labels, vector, part, statistics, vector)
        kernels.combine_triton(statistics)
        kernels.finish_triton(statistics[:1], vector, labels.long(), part)
        for count, fields, dtype in ((1, 6, torch.bfloat16), (3, 8, torch.bfloat16), (2, 8, torch.float16)):
            scale = vector[0] if dtype == torch.float16 else None
            kernels.gradient_triton(raw, torch.zeros(fields, TOKENS), labels, part, 0, count, dtype, scale)
            split_triton(raw, count, dtype, scale)
        kernels.gradient_triton(raw, torch.zeros(6, TOKENS), labels, part, 0, 1, torch.bfloat16, None, cuts=vector)
        kernels.gradient_triton(raw, torch.zeros(6, TOKENS), labels, part, 0, 2, torch.bfloat16, None, True)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            stored = raw.to(dtype)
            kernels.statistics_triton(stored, labels, vector, part, statistics, vector)
            for out in (stored, torch.empty_like(stored)):
                kernels.gradient_triton(stored, torch.zeros(8, TOKENS), labels, part, 0, 1, dtype, None, out=out)
        exponentials = KeptLogits.allocate(TOKENS, w, exponentials=True)
        kernels.exponentials_gradient_triton(exponentials.values, exponentials.tops, torch.zeros(6, 40), labels, part)
    # The compiler may know an argument of 1 by its value.
    for tokens, count in itertools.product((TOKENS, 1), (1, 2, 3)):
        grads = (torch.zeros(tokens, 304).bfloat16()[:, :COLUMNS],) * count
        add_hidden_grad(torch.zeros(tokens, HIDDEN), grads, w, begin=False)
        add_weight_grad(torch.zeros(COLUMNS, HIDDEN), grads, x[:tokens])
        add_weight_grad(torch.zeros(1, HIDDEN), tuple(g[:, :1] for g in grads), x[:tokens])
        part = softmax(290, scale=1.1)
        kept = KeptLogits.allocate(tokens, w)
        project_triton(
            x[:tokens], w, logits=kept.values, statistics=torch.zeros(3, 3, tokens), labels=labels[:tokens],
            label_logits=vector[:tokens], inverse_temperature=vector[:tokens], valid_columns=290,
        )  # fmt: skip
        vectors = torch.zeros(6, tokens)
        kernels.gradient_triton(kept.values, vectors, labels[:tokens], part, 1, count, torch.bfloat16, None)
        kernels.combine_triton(torch.zeros(1, 3, tokens))
    call_distillation(raw, labels)
    formats: list[ScaleFormat] = ["float32", "bf16", "ue8m0"]
    for columns, block in ((256, (128, 128)), (256, (1, 256)), (LONGEST_ROW + 8, (1, LONGEST_ROW + 8))):
        weight = torch.zeros(2, 130, columns).bfloat16()
        scales = torch.zeros(2, -(-130 // block[0]), -(-columns // block[1]))
        for scale_format in formats:
            quantize_triton(weight, weight.to(torch.float8_e4m3fn), scales, block, scale_format, 1.0, native=False)


@pytest.fixture(scope="module")
def launches() -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.JITFunction, "run", lambda self, *args, **options: found.append((self, args, options)))
        call_every_host_function()
    return found


def source_of(capability: int, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any, Any]:
    """A launch as Triton would compile it for a GPU: source, target and options."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    options = {k: v for k, v in options.items() if k not in ("grid", "warmup")}
    if "INTERPRETED" in options:
        options["INTERPRETED"] = False
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, rest = bind(*args, **options)
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, rest)
    return ASTSource(kernel, signature, constants, attributes), target, parsed


def ttir(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> str:
    """What the compiler's front end makes of a launch on a Hopper GPU, with its functions inlined."""
    from triton._C.libtriton import ir, passes
    from triton.compiler.compiler import make_backend

    source, target, parsed = source_of(90, kernel, args, options)
    backend = make_backend(target)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = source.make_ir(
        target, parsed, backend.get_codegen_implementation(parsed), backend.get_module_map(), context
    )
    manager = ir.pass_manager(context)
    passes.common.add_inliner(manager)
    manager.run(module, "inline")
    return str(module)


def shared_memory(capability: int, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> int:
    """Bytes of shared memory that a block of the compiled kernel takes."""
    source, target, parsed = source_of(capability, kernel, args, options)
    return int(triton.compile(source, target=target, options=parsed.__dict__).metadata.shared)


def narrow_products(text: str) -> Iterator[str]:
    """Arguments that are factors of a 32-bit product."""
    argument = {f"%{name}": name for name in re.findall(r"%(\w+): i32", text.split("{\n", 2)[1])}
    for line in text.splitlines():
        if passed_on := re.match(r"\s*(%\S+) = tt\.(?:splat|expand_dims|broadcast) (%\w+)", line):
            result, operand = passed_on.groups()
            if operand in argument:
                argument[result] = argument[operand]
        if product := re.match(
            r"\s*%\S+ = arith\.muli (%\w+), (%\w+)(?: overflow<\w+>)? : (?:tensor<[\dx]*)?i32", line
        ):
            yield from (argument[x] for x in product.groups() if x in argument)


def test_a_narrow_product_is_found() -> None:
    """The fault that this file is for, in a kernel of its own."""

    @triton.jit
    def kernel(x, stride, COUNT: triton.language.constexpr):  # type: ignore[no-untyped-def]
        for index in triton.language.static_range(COUNT):
            triton.language.store(x + index * stride, 0.0)

    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.JITFunction, "run", lambda self, *args, **options: found.append((self, args, options)))
        kernel[(1,)](torch.zeros(4), 7, COUNT=3)
    assert set(narrow_products(ttir(*found[0]))) == {"stride"}


def test_every_kernel_is_looked_at(launches: Any) -> None:
    assert {kernel.__name__ for kernel, _, _ in launches} == all_kernels()


@pytest.mark.parametrize("name", ["_project_kernel", "_statistics_kernel"])
def test_distances_to_the_maximum_keep_a_nan(launches: Any, name: str) -> None:
    """`maxnumf` would drop it on a GPU. The interpreter keeps it either way."""
    taking = [
        (k, args, options) for k, args, options in launches if k.__name__ == name and options.get("STATISTICS", True)
    ]
    for launch in taking:
        text = ttir(*launch)
        assert re.search(r"arith\.maximumf %\w+, %\w+ : tensor<\d+x128xf32>", text)
        assert not re.search(r"arith\.maxnumf %\w+, %\w+ : tensor<\d+x128xf32>", text)
    assert taking


def test_strides_and_sizes_multiply_in_64_bits(launches: Any) -> None:
    faults = set()
    for kernel, args, options in launches:
        narrow = set(narrow_products(ttir(kernel, args, options))) - WITHIN_A_TILE.get(kernel.__name__, set())
        faults |= {(kernel.__name__, name) for name in narrow}
    assert not faults


TILES = ("_project_kernel", "_hidden_grad_kernel", "_weight_grad_kernel")


@pytest.mark.parametrize("capability", [90, 120])
def test_shared_memory_of_the_kernels_with_tiles(launches: Any, capability: int) -> None:
    """What `devices.py` says of them is what the compiler makes of them."""
    needed = max(shared_memory(capability, *launch) for launch in launches if launch[0].__name__ in TILES)
    assert needed == SHARED_MEMORY[capability // 10]


def test_other_kernels_fit_on_every_gpu(launches: Any) -> None:
    """The least that any GPU offers without being asked is 48 KiB."""
    others: dict[str, Any] = {kernel.__name__: (kernel, *rest) for kernel, *rest in launches}
    for name, launch in others.items():
        if name not in TILES:
            assert shared_memory(75, *launch) <= 48 * 1024, name


class FakeGpu:
    """Properties of a device that is not there."""

    def __init__(self, capability: tuple[int, int], shared: int) -> None:
        self.capability, self.shared_memory_per_block_optin = capability, shared


@pytest.mark.parametrize(
    ("gpu", "reason"),
    [
        (FakeGpu((7, 5), 65536), "9.0 or newer"),
        (FakeGpu((8, 0), 166912), "9.0 or newer"),
        (FakeGpu((8, 6), 101376), "9.0 or newer"),
        (FakeGpu((8, 9), 101376), "9.0 or newer"),
        (FakeGpu((9, 0), 232448), None),
        (FakeGpu((10, 0), 232448), "needs 278576 bytes of shared memory for a block, and the GPU offers 232448"),
        (FakeGpu((12, 0), 101376), "needs 165904 bytes of shared memory for a block, and the GPU offers 101376"),
        (FakeGpu((13, 0), 10**6), "not known to run on compute capability 13.0"),
    ],
    ids=lambda value: f"sm_{value.capability[0]}{value.capability[1]}" if isinstance(value, FakeGpu) else None,
)
def test_gpus_that_the_kernels_with_tiles_fit(
    gpu: FakeGpu, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu.capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    found = why_not_tiles(torch.device("cuda", 0))
    assert (found is None) == (reason is None)
    assert reason is None or reason in str(found)
