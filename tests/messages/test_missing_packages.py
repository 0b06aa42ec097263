"""What users see when an optional package is not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from megatron.core.models.gpt import gpt_layer_specs

from megatron_fp32.extras import MissingPackageError
from megatron_fp32.models.provider import read_hf_config, transformer_config
from megatron_fp32.models.specs import decoder_block_spec, mtp_block_spec

ROOT = Path(__file__).parents[2]


class TestMissingPackages:
    """In a process where the package cannot be imported."""

    @pytest.mark.parametrize(
        ("package", "modules", "remedies"),
        [
            ("megatron", 13, ("pip install 'megatron_fp32[megatron]'", "PYTHONPATH")),
            ("triton", 6, ("pip install triton",)),
            ("vllm", 1, ("pip install 'megatron_fp32[vllm]'", "environment of the engine")),
        ],
    )
    def test_every_module(self, package: str, modules: int, remedies: tuple[str, ...]) -> None:
        """Each either works without it, or says how to install it. (megatron-core, too, may need Triton.)"""
        script = f"""
import importlib, pkgutil, megatron_fp32
from megatron_fp32.extras import MissingPackageError
missing = 0
for module in pkgutil.walk_packages(megatron_fp32.__path__, "megatron_fp32."):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
    except MissingPackageError as error:
        if error.name.split(".")[0] == {package!r}:
            missing += 1
            assert all(remedy in str(error) for remedy in {remedies!r}), error
assert missing >= {modules}, missing
"""
        _without(package, script)

    def test_every_name_of_the_package(self) -> None:
        script = """
import megatron_fp32
from megatron_fp32.extras import MissingPackageError
failed = []
for name in megatron_fp32.__all__:
    try:
        getattr(megatron_fp32, name)
    except MissingPackageError as error:
        assert isinstance(error, ImportError)
        failed.append(name)
assert failed == [
    "Fp32GatedDeltaNet", "Fp32OutputLayer", "HuggingFaceDirectory", "LogprobsRequest", "SGLangOptions", "SGLangSink",
    "SelectedLogprobsRequest", "TopLogprobsRequest", "TruncatedLogprobsRequest", "VllmOptions", "VllmSink",
    "WeightStreamer", "WeightedLossRequest",
    "apply_fp32", "check_fp32", "install_optimizer_repairs",
    "logprobs_processor", "model_provider", "pre_wrap_hook", "returning", "to_fp32_output_layer",
], failed
from megatron_fp32.testing import cpu
for enter in (cpu.cpu_megatron, cpu.model_parallel):
    try:
        with enter():
            raise SystemExit("it worked")
    except MissingPackageError:
        pass
"""
        _without("megatron", script)

    def test_the_commands_do_not_need_it(self, original: Path, tmp_path: Path) -> None:
        script = "from megatron_fp32.cli import main; main()"
        _without("megatron", script, "import", str(original), str(tmp_path / "out"))
        assert (tmp_path / "out/release/.metadata").is_file()

    def test_another_error_inside_of_megatron_core_is_not_hidden(self) -> None:
        script = """
import sys, types
sys.modules["megatron.core.process_groups_config"] = None
try:
    import megatron_fp32.models.provider
except ImportError as error:
    assert "pip install" not in str(error), error
    assert "process_groups_config" in str(error), error
else:
    raise SystemExit("it worked")
"""
        _without("nothing", script)

    def test_transformer_engine(self, original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """megatron-core without it calls None, or a name that is not there."""
        monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", None, raising=False)
        config = transformer_config(read_hf_config(original))
        for spec in (decoder_block_spec, mtp_block_spec):
            with pytest.raises(
                MissingPackageError, match=r"transformer_engine is not installed.*transformer_impl='local'"
            ):
                spec(config)

    def test_of_a_testing_helper(self) -> None:
        script = """
from megatron_fp32.extras import MissingPackageError
from megatron_fp32.testing.qwen3_5 import load_qwen3_5, write_qwen3_5
for function in (load_qwen3_5, write_qwen3_5):
    try:
        function("nowhere")
    except MissingPackageError as error:
        assert "pip install 'megatron_fp32[transformers]'" in str(error), error
    else:
        raise SystemExit("it worked")
"""
        _without("transformers", script)


def _without(package: str, script: str, *args: str) -> None:
    """Run a script where a package is not installed."""
    block = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", block + script, *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
