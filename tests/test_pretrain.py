"""examples/pretrain.py on the CPU: its help, its arguments, its model and its data.

tests/gpu/test_pretrain.py trains with it.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from megatron_fp32 import check_fp32
from megatron_fp32.config import Fp32Config
from megatron_fp32.optimizer.native_fp32 import install_optimizer_repairs
from megatron_fp32.testing.qwen3_5 import write_qwen3_5

PRETRAIN = Path(__file__).parent.parent / "examples" / "pretrain.py"
RUN = [
    *("--seq-length", "16", "--max-position-embeddings", "16", "--micro-batch-size", "1", "--global-batch-size", "1"),
    *("--train-iters", "1", "--eval-iters", "0", "--lr", "1", "--bf16", "--transformer-impl", "local"),
    *("--no-gradient-accumulation-fusion", "--no-rope-fusion", "--no-persist-layer-norm", "--no-bias-swiglu-fusion"),
    *("--no-bias-dropout-fusion", "--no-masked-softmax-fusion"),
]


@pytest.fixture
def pretrain() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pretrain_example", PRETRAIN)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def training() -> ModuleType:
    """megatron.training, as the script needs it."""
    utils = pytest.importorskip("megatron.training.argument_utils", reason="megatron-core < 0.18 brings no training")
    if not hasattr(utils, "gpt_config_from_args"):
        pytest.skip("read in megatron-core 0.19.2")
    return importlib.import_module("megatron.training")


@pytest.fixture
def parse(
    pretrain: ModuleType, training: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Any]]:
    """Parse flags after those of a tiny model; Megatron's global variables are unset afterwards."""
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.training.global_vars import unset_global_variables

    # Megatron asks which GPU this is when several processes train.
    monkeypatch.setattr("megatron.training.arguments.get_device_arch_version", lambda: 9)

    def of(*flags: str) -> Any:
        return pretrain.parse(["--hf-dir", str(write_qwen3_5(tmp_path / "hf")), *RUN, *flags])

    yield of
    unset_global_variables()
    destroy_num_microbatches_calculator()


def test_help_needs_neither_a_gpu_nor_megatron_training() -> None:
    """Under Python 3.11, megatron-core 0.16.1 brings no megatron.training."""
    shown = subprocess.run([sys.executable, str(PRETRAIN), "--help"], check=True, capture_output=True, text=True).stdout
    assert "--hf-dir DIR" in shown
    assert "--fp32-logits-grad-precision {bf16,bf16x2,bf16x3}" in shown
    assert "torchrun --nnodes 2" in shown
    assert ("--data-path" in shown.split("Megatron's own flags")[1]) == has_training()


def has_training() -> bool:
    return importlib.util.find_spec("megatron.training") is not None


def test_the_directory_of_the_model_is_required(pretrain: ModuleType, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        pretrain.parse(["--mock-data"])
    assert "--hf-dir is required: the Hugging Face directory with the model's config.json" in capsys.readouterr().err


def test_a_megatron_that_is_too_old_is_named(
    pretrain: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def import_module(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name.rpartition(".")[0])

    monkeypatch.setattr(pretrain.importlib, "import_module", import_module)
    with pytest.raises(
        SystemExit, match=r"needs megatron.training of megatron-core 0.19 or newer.*found megatron-core"
    ):
        pretrain.parse(["--hf-dir", str(tmp_path)])


def test_another_missing_package_is_not_taken_for_an_old_megatron(
    pretrain: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def import_module(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'packaging'", name="packaging")

    monkeypatch.setattr(pretrain.importlib, "import_module", import_module)
    with pytest.raises(ModuleNotFoundError, match="packaging"):
        pretrain.parse(["--hf-dir", str(tmp_path)])


@pytest.mark.usefixtures("training")
def test_a_directory_that_is_not_there_is_a_wrong_flag(pretrain: ModuleType, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        pretrain.parse(["--hf-dir", "nothing", *RUN])
    assert "--hf-dir: nothing does not exist" in capsys.readouterr().err


def test_the_shapes_come_from_the_model_and_the_rest_from_the_flags(parse: Callable[..., Any]) -> None:
    before = list(sys.argv)
    args = parse(
        "--mock-data",
        "--load",
        "run",
        "--save",
        "run",
        "--save-interval",
        "1",
        "--fp32-logits-grad-precision",
        "bf16x2",
    )
    assert sys.argv == before
    assert (args.hidden_size, args.vocab_size, args.seq_length) == (128, 1000, 16)
    assert (args.num_layers, args.linear_attention_freq) == (4, 4)  # every fourth layer is full attention
    assert (args.load, args.save, args.finetune, args.tokenizer_type) == ("run", "run", False, "NullTokenizer")
    assert args.fp32_logits_grad_precision == "bf16x2"
    assert args.eval_interval == 1000


def test_flags_win_over_the_defaults(parse: Callable[..., Any]) -> None:
    assert parse("--mock-data", "--eval-interval", "7").eval_interval == 7


def test_context_parallelism_is_refused(parse: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron asks for it
    with pytest.raises(ValueError, match="expected --context-parallel-size 1, got 2"):
        parse("--mock-data", "--context-parallel-size", "2", "--global-batch-size", "2")


@pytest.fixture
def chunks(pretrain: ModuleType, parse: Callable[..., Any], megatron: None) -> Iterator[tuple[Any, list[Any]]]:
    """(arguments, the model as Megatron's own builder makes and wraps it from the script's configuration)."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    args = parse("--mock-data")
    args.deterministic_mode = True  # torch's gated delta rule, which needs no GPU
    config = pretrain.model_config(args, Fp32Config())
    builder = config.get_builder_cls()(config)
    with install_optimizer_repairs():
        yield (
            args,
            builder.build_distributed_models(
                ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False, data_parallel_random_init=False
            ),
        )


def test_megatrons_builder_makes_the_model_in_fp32(chunks: tuple[Any, list[Any]]) -> None:
    _, (model,) = chunks
    check_fp32(model, Fp32Config())
    assert model.module.decoder.layers[0].self_attention.A_log.dtype == torch.float32
    assert model.module.embedding.word_embeddings.weight.dtype == torch.bfloat16


def test_the_model_is_checked_after_it_is_wrapped(pretrain: ModuleType, chunks: tuple[Any, list[Any]]) -> None:
    _, (model,) = chunks
    with pytest.raises(RuntimeError, match="not in fp32 as configured"):
        pretrain.checked([model], fp32=Fp32Config(grad_precision="bf16x3"))


def batches(dataset: Any) -> Iterator[dict[str, Tensor]]:
    return iter(torch.utils.data.DataLoader(dataset, batch_size=2))


def test_a_step_on_mock_data_gives_the_sum_of_the_losses(pretrain: ModuleType, chunks: tuple[Any, list[Any]]) -> None:
    args, (model,) = chunks
    train, _, _ = pretrain.datasets(args, [4, 0, 0])
    losses, loss_of = pretrain.ForwardStep(Fp32Config())(batches(train), model)
    assert losses.shape == (2, 16)
    total, tokens, logged = loss_of(losses)
    mask = next(batches(train))["loss_mask"]
    assert 0 < int(tokens) == int(mask.sum()) <= 32
    torch.testing.assert_close(total, (losses.double() * mask).sum().float())
    assert logged["lm loss"].tolist() == [float(total), float(tokens)]


def test_the_first_step_notices_layers_that_did_not_run(pretrain: ModuleType, chunks: tuple[Any, list[Any]]) -> None:
    args, (model,) = chunks
    train, _, _ = pretrain.datasets(args, [4, 0, 0])
    step = pretrain.ForwardStep(Fp32Config(grad_precision="bf16x3"))
    with pytest.raises(RuntimeError, match="not in fp32 as configured"):
        step(batches(train), model)


@pytest.mark.usefixtures("megatron")
def test_real_data(pretrain: ModuleType, parse: Callable[..., Any], tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path / "text_document"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.int32)
    text = torch.arange(400) % 900
    for document in text.split(100):
        builder.add_item(document)
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    flags = ["--data-path", str(prefix), "--split", "80,20,0", "--data-cache-path", str(tmp_path / "cache")]
    train, valid, test = pretrain.datasets(parse(*flags), [8, 2, 0])
    assert test is None
    for dataset, documents in ((train, range(320)), (valid, range(320, 400))):
        sample = dataset[0]
        first = int(sample["tokens"][0])
        assert sample["tokens"].shape == (16,)
        assert first in documents
        # The next token is the label, within a document and across its end.
        assert sample["tokens"][1:].tolist() == sample["labels"][:-1].tolist()
        assert set(sample["labels"].tolist()) <= set(documents)
