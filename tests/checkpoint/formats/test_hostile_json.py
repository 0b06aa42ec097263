"""JSON that is none for somebody, and values that no checkpoint has: an error that names the file, nothing left."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from megatron_fp32 import cli
from megatron_fp32.checkpoint.convert import import_checkpoint
from megatron_fp32.checkpoint.formats.huggingface import INDEX, HuggingFaceReader
from megatron_fp32.checkpoint.formats.json_file import parse_json
from megatron_fp32.checkpoint.formats.torch_dist import TorchDistReader
from megatron_fp32.checkpoint.fp8 import detect_scheme, scheme_from_config
from megatron_fp32.checkpoint.plan import plan_import
from megatron_fp32.checkpoint.quantize import quantize_checkpoint
from megatron_fp32.checkpoint.sidecar import find_sidecar
from megatron_fp32.errors import CheckpointError
from megatron_fp32.models.provider import read_hf_config
from megatron_fp32.weights.tensors import TensorInfo
from tests.conftest import Source
from tests.families import case, config_json

DEEP = "[" * 200_000
TEXTS = {
    "an open list in a list": (DEEP, "nested too deeply"),
    "lists in lists": (f'{{"a": {"[" * 150}{"]" * 150}}}', "nested too deeply"),
    "objects in objects": ('{"a": ' * 150 + "1" + "}" * 150, "nested too deeply"),
    "a million digits": (f'{{"a": {"9" * 10**6}}}', "a number of 1000000 digits"),
    "400 digits": (f'{{"a": -{"9" * 400}}}', "a number of 401 digits"),
    "a key twice": ('{"a": {"b": 1, "b": 2}}', "it has the key 'b' twice"),
    "half of a surrogate pair in a key": ('{"\\ud800": 1}', "surrogates not allowed"),
    "half of a surrogate pair in a value": ('{"a": ["\\uDFFF"]}', "surrogates not allowed"),
    "nothing": ("", "Expecting value"),
}
NOT_FINITE = ('{"a": NaN}', '{"a": [-Infinity]}', '{"a": 1e999}')
NO_TEXT = b'{"a": "\xff"}'


def _header(directory: Path, content: bytes) -> Path:
    path = directory / "model.safetensors"
    path.write_bytes(len(content).to_bytes(8, "little") + content)
    return path


def _file(name: str) -> Callable[[Path, bytes], Path]:
    def write(directory: Path, content: bytes) -> Path:
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return path

    return write


def _import(directory: Path) -> None:
    import_checkpoint(directory, directory / "out")


def _sidecar_config(directory: Path) -> Any:
    listing = {"version": 2, "tensors": {}, "carried": {}, "left_out": []}
    (directory / "source.json").write_text(json.dumps(listing))
    return find_sidecar(directory, directory).hf_config


def _declaration(directory: Path) -> TorchDistReader:
    (directory / ".metadata").touch()
    return TorchDistReader(directory)


READERS: dict[str, tuple[Callable[[Path, bytes], Path], Callable[[Path], Any]]] = {
    "config.json": (_file("config.json"), _import),
    "config.json of a model": (_file("config.json"), read_hf_config),
    "config.json of a scheme": (_file("config.json"), detect_scheme),
    "config.json of a sidecar": (_file("assets/config.json"), _sidecar_config),
    "an index": (_file(INDEX), HuggingFaceReader),
    "a header": (_header, HuggingFaceReader),
    "source.json": (_file("source.json"), lambda directory: find_sidecar(directory, directory)),
    "hf_quant_config.json": (_file("hf_quant_config.json"), detect_scheme),
    "metadata.json": (_file("metadata.json"), _declaration),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("text", TEXTS)
def test_every_reader_names_the_file(tmp_path: Path, reader: str, text: str) -> None:
    (content, expected), (write, read) = TEXTS[text], READERS[reader]
    path = write(tmp_path, content.encode())
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path)
    message = str(caught.value)
    assert str(path) in message
    assert expected in message or (reader == "a header" and "header does not start" in message)
    message.encode()
    assert len(message) < 1000
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("reader", ["an index", "a header", "source.json", "metadata.json"])
@pytest.mark.parametrize("text", NOT_FINITE)
def test_numbers_that_are_not_finite(tmp_path: Path, reader: str, text: str) -> None:
    write, read = READERS[reader]
    path = write(tmp_path, text.encode())
    with pytest.raises(CheckpointError, match="is not a finite number"):
        read(tmp_path)
    assert path.is_file()


def test_a_released_config_has_infinite_numbers(tmp_path: Path) -> None:
    """Such as `time_step_limit` of Mamba 2: they come back as they are, and no field of ours may be one."""
    case("Qwen3").write(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    config = {**json.loads(path.read_text()), "time_step_limit": [0.0, float("inf")]}
    path.write_text(json.dumps(config))
    quantize_checkpoint(tmp_path / "hf", tmp_path / "fp8", "blockwise")
    assert json.loads((tmp_path / "fp8" / "config.json").read_text())["time_step_limit"] == [0.0, float("inf")]
    path.write_text(json.dumps({**config, "rms_norm_eps": float("inf")}))
    with pytest.raises(CheckpointError, match="rms_norm_eps"):
        import_checkpoint(tmp_path / "hf", tmp_path / "out")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("content", [NO_TEXT, b"[1]", b"1", b'"a"', b"null"])
def test_every_reader_wants_an_object(tmp_path: Path, reader: str, content: bytes) -> None:
    write, read = READERS[reader]
    path = write(tmp_path, content)
    with pytest.raises(CheckpointError, match=path.name.replace(".", r"\.")):
        read(tmp_path)


def test_what_configurations_have_is_read() -> None:
    content = {"a": 1e-06, "b": 10**30, "c": [None, True, -1.5], "d": "\U0001f600\u00e9", "e": {"f": [[[]]]}}
    for ascii_only in (True, False):
        assert parse_json(json.dumps(content, ensure_ascii=ascii_only).encode()) == content


VALUES = [
    True, -1, 0, 1.5, 1e308, 10**299, 2**31, 2**62, 4096, "", "x", "9" * 5000, [], [[]], [None], ["x"] * 10_000,
    [1] * 100_000, {}, {"a": {}}, {"": []}, None,
]  # fmt: skip
FAMILIES = ("Llama", "Qwen3-MoE, a dense layer", "Qwen3-Next", "Qwen3.5-VL-MoE")


def _fields(config: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in config.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from _fields(value, (*path, name))


def _with(config: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(config)
    inner = changed
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return changed


def _outcome(call: Callable[[], Any]) -> tuple[Any, str]:
    """What it returns, or the message with which it refuses."""
    try:
        return call(), ""
    except CheckpointError as error:
        return None, str(error)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_field_of_any_kind_is_refused_or_changes_nothing(tmp_path: Path, name: str) -> None:
    directory = case(name).write(tmp_path / "hf")
    config, tensors = config_json(directory), HuggingFaceReader(directory).tensors
    for path in _fields(config):
        for value in VALUES:
            changed = _with(config, path, value)
            plan, message = _outcome(lambda changed=changed: plan_import(changed, tensors, vision="drop"))
            assert len(message) < 5000, path
            assert plan is None or {*plan.hf_shapes, *plan.left_out} == tensors.keys(), (path, value)


class TestSizes:
    """Numbers that are possible one by one. Every mapping takes time, so that an error after making them comes late."""

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"num_hidden_layers": 10**9}, "num_hidden_layers must be an integer"),
            ({"num_experts": 10**9, "num_local_experts": 10**9}, "num_experts must be an integer"),
            ({"num_hidden_layers": 4096}, "the checkpoint has .* tensors in all"),
            ({"num_hidden_layers": 4096, "num_experts": 65536}, "expected at most 131072"),
            ({"num_experts": 40_000, "num_local_experts": 40_000}, "has tensors for"),
            ({"vocab_size": 2**62}, "vocab_size must be an integer"),
            ({"vocab_size": 2**30, "hidden_size": 2**30}, "1152921504606846976 weights"),
            ({"layer_types": ["full_attention"] * 10**6}, "layer_types has 1000000 entries"),
            ({"mlp_only_layers": [1] * 10**6}, "mlp_only_layers has 1000000 entries"),
        ],
    )
    def test_they_are_refused_before_a_mapping_is_made(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], message: str
    ) -> None:
        directory = case("Qwen3-MoE, a dense layer").write(tmp_path / "hf")
        config = {**config_json(directory), **fields}
        (directory / "config.json").write_text(json.dumps(config))
        monkeypatch.setattr("megatron_fp32.weights.blocks.rename", None)
        with pytest.raises(CheckpointError, match=message) as caught:
            import_checkpoint(directory, tmp_path / "out")
        assert str(directory) in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["hf"]

    def test_fused_experts_are_counted(self) -> None:
        infos = {
            "model.embed_tokens.weight": TensorInfo(dtype=torch.bfloat16, shape=(4, 4)),
            "model.layers.0.mlp.experts.gate_up_proj": TensorInfo(dtype=torch.bfloat16, shape=(3, 4, 4)),
        }
        config = {
            "model_type": "qwen3_5_moe_text", "hidden_size": 4, "vocab_size": 4, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 2, "rms_norm_eps": 1e-6,
            "num_experts_per_tok": 1, "moe_intermediate_size": 2, "shared_expert_intermediate_size": 2,
            "linear_conv_kernel_dim": 2, "linear_key_head_dim": 2, "linear_value_head_dim": 2,
            "linear_num_key_heads": 2, "linear_num_value_heads": 2, "layer_types": ["full_attention"] * 2,
            "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.0},
        }  # fmt: skip
        with pytest.raises(CheckpointError, match=r"4000 experts in all layers .* has tensors for at most 3"):
            plan_import({**config, "num_experts": 2000}, infos)
        with pytest.raises(CheckpointError, match="missing tensors"):
            plan_import({**config, "num_experts": 3}, infos)


ENTRY = {"dtype": "F32", "shape": [2], "xxh3_128": "0" * 32}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", True), ("version", 2.0), ("version", [2]), ("version", {}), ("version", 10**200),
        ("left_out", "abc"), ("left_out", [1]), ("left_out", {"a": 1}), ("left_out", [["a"]]),
        ("tensors", []), ("tensors", {"a": []}), ("tensors", {"a": "b"}), ("carried", None), ("carried", {"a": None}),
        *(("tensors", {"a": {**ENTRY, "shape": shape}})
          for shape in (2, "2", [True], [-1], [2.0], [2**63], [2**40, 2**40], [[2]], [1] * 65, {"2": 1}, None)),
        *(("carried", {"a": {**ENTRY, "dtype": dtype}}) for dtype in (["F32"], {}, 1, None, "F99", "x" * 10**5)),
        *(("tensors", {"a": {**ENTRY, "xxh3_128": value}}) for value in (1, None, "", "0" * 31, ["0"], "x" * 32)),
    ],
)  # fmt: skip
def test_a_listing_with_other_types_is_refused(tmp_path: Path, field: str, value: Any) -> None:
    whole = {"version": 2, "tensors": {"a": ENTRY}, "carried": {}, "left_out": []}
    (tmp_path / "source.json").write_text(json.dumps(whole))
    assert find_sidecar(tmp_path, tmp_path).tensors["a"].info.shape == (2,)
    (tmp_path / "source.json").write_text(json.dumps({**whole, field: value}))
    with pytest.raises(CheckpointError, match=r"source\.json") as caught:
        find_sidecar(tmp_path, tmp_path)
    assert len(str(caught.value)) < 1000


def _schemes() -> list[dict[str, Any]]:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
    inputs = {**weights, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return [
        {
            "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head"], "fmt": "e4m3", "scale_fmt": "ue8m0",
        },
        {
            "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["re:.*gate$"],
            "config_groups": {"group_0": group},
        },
        {
            "producer": {"name": "modelopt"},
            "quantization": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "exclude_modules": ["lm_head"]},
        },
    ]  # fmt: skip


@pytest.mark.parametrize("config", _schemes(), ids=["blockwise", "channelwise", "modelopt"])
def test_a_quantization_of_any_kind_is_refused_or_understood(tmp_path: Path, config: dict[str, Any]) -> None:
    scheme_from_config(config)
    for path in _fields(config):
        for value in VALUES:
            (tmp_path / "hf_quant_config.json").write_text(json.dumps(_with(config, path, value)))
            (tmp_path / "config.json").write_text(json.dumps({"quantization_config": _with(config, path, value)}))
            _, message = _outcome(lambda: detect_scheme(tmp_path))
            assert len(message) < 2000, path


@pytest.mark.parametrize("entry", ["(a+)+$", "(?:[a-z]*)*x", ".*.*.*.*.*.*x", "(x{1000}){1000}", "a" * 10**5])
@pytest.mark.parametrize("layout", [0, 1])
def test_expressions_that_take_exponential_time_are_refused(entry: str, layout: int) -> None:
    field, start = (("modules_to_not_convert", ""), ("ignore", "re:"))[layout]
    with pytest.raises(CheckpointError, match="could take too long to match"):
        scheme_from_config({**_schemes()[layout], field: ["lm_head", start + entry]})


@pytest.mark.parametrize("quantization", [[1], "fp8", 1, True, {"quant_method": [1]}, {"quant_method": {}}])
@pytest.mark.parametrize("inside", [False, True])
def test_a_quantization_config_of_another_type(source: Source, tmp_path: Path, quantization: Any, inside: bool) -> None:
    own = shutil.copytree(source(), tmp_path / "own")
    config = config_json(own)
    (config["text_config"] if inside and "text_config" in config else config)["quantization_config"] = quantization
    (own / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantization"):
        detect_scheme(own)


@pytest.mark.parametrize("text", [DEEP, '{"a": 1}', '{"content": {"chunks": 1}}', "\ud800", '{"content": {}}', "[]"])
def test_a_damaged_record_is_refused_and_nothing_is_left(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    read, calls = HuggingFaceReader.read, []

    def failing(self: Any, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 9:
            raise OSError(5, "Input/output error")
        return read(self, *args)

    monkeypatch.setattr(HuggingFaceReader, "read", failing)
    with pytest.raises(OSError, match="Input/output"):
        import_checkpoint(source(), tmp_path / "out", max_part_bytes=20_000)
    record = next((tmp_path / ".out.partial" / "parts").glob("*.json"))
    record.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=record.name):
        import_checkpoint(source(), tmp_path / "out", max_part_bytes=20_000)
    assert list(tmp_path.iterdir()) == []
    import_checkpoint(source(), tmp_path / "out", max_part_bytes=20_000)


@pytest.mark.parametrize("command", [["inspect"], ["import", "--text-only"], ["quantize"]])
@pytest.mark.parametrize(
    "config",
    [DEEP, "\ud800", "[]", '{"text_config": []}', '{"text_config": 1}', '{"model_type": ["llama"]}',
     '{"model_type": "llama", "num_hidden_layers": 1e308}'],
)  # fmt: skip
def test_the_commands_say_so(source: Source, tmp_path: Path, command: list[str], config: str) -> None:
    own = shutil.copytree(source(), tmp_path / "own")
    (own / "config.json").write_bytes(config.encode("utf-8", "surrogatepass"))
    output = [] if command == ["inspect"] else [str(tmp_path / "out")]
    layout = ["--scheme", "blockwise"] if command == ["quantize"] else []
    result = CliRunner().invoke(cli.main, [*command, str(own), *output, *layout])
    if result.exit_code == 0:
        assert command != ["import", "--text-only"]
    else:
        status = 2 if command == ["inspect"] else 1
        assert (result.exit_code, type(result.exception)) == (status, SystemExit), result.output
        assert str(own) in result.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name != "out"] == ["own"]
