"""Weights from a live model into a real vLLM: seconds and memory, against plain copies and vLLM's own ways.

    python benchmarks/streaming.py [--layers 16] [--experts 0] [--fp8 channelwise] [--engine-gpu 0] [--json FILE]

The trainer is a random Qwen3 or Qwen3-MoE that megatron-core builds on GPU 0. The engine is a server of vLLM on the
same GPU (CUDA IPC) or on another one (NCCL). One run measures, in turns:

- plain copies of the same bytes between two buffers of the GPU;
- pushes with `VllmSink`, with the seconds of each phase;
- vLLM's own senders, `ipc` or packed `nccl`, from Hugging Face tensors that are ready in memory (with --rival).

Needs CUDA, vLLM and megatron-core.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from megatron_fp32 import import_checkpoint, model_provider  # noqa: E402
from megatron_fp32.models.provider import cpu_overrides  # noqa: E402
from megatron_fp32.streaming import VllmOptions, VllmSink, WeightStreamer  # noqa: E402
from megatron_fp32.testing.cpu import model_parallel, single_process  # noqa: E402
from megatron_fp32.weights.fp8.config import quantization_config  # noqa: E402
from megatron_fp32.weights.fp8.scheme import named_scheme  # noqa: E402
from megatron_fp32.weights.fp8.tensors import fp8_infos  # noqa: E402
from megatron_fp32.weights.tensors import TensorInfo  # noqa: E402
from tests.engine.server import EngineServer  # noqa: E402

PLUGIN = "megatron_fp32.vllm_plugin:register"
GPU_FLAGS = ("--load-format", "dummy", "--gpu-memory-utilization", "0.45")


def sizes(*, layers: int, experts: int) -> dict[str, Any]:
    """The fields of `config.json`."""
    common = {
        "num_hidden_layers": layers, "vocab_size": 151936, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
        "tie_word_embeddings": False, "attention_bias": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    if not experts:
        return common | {
            "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 4096,
            "intermediate_size": 12288,
        }  # fmt: skip
    return common | {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048,
        "num_key_value_heads": 4, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": experts,
        "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
    }  # fmt: skip


def infos_of(config: dict[str, Any]) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint with this config."""
    hidden, heads, groups, dim = (
        config[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        start = f"model.layers.{layer}"
        shapes |= {
            f"{start}.input_layernorm.weight": (hidden,),
            f"{start}.post_attention_layernorm.weight": (hidden,),
            f"{start}.self_attn.q_proj.weight": (heads * dim, hidden),
            f"{start}.self_attn.k_proj.weight": (groups * dim, hidden),
            f"{start}.self_attn.v_proj.weight": (groups * dim, hidden),
            f"{start}.self_attn.o_proj.weight": (hidden, heads * dim),
            f"{start}.self_attn.q_norm.weight": (dim,),
            f"{start}.self_attn.k_norm.weight": (dim,),
        }
        experts = config.get("num_experts", 0)
        if experts:
            shapes[f"{start}.mlp.gate.weight"] = (experts, hidden)
        width = config["moe_intermediate_size"] if experts else config["intermediate_size"]
        for mlp in [f"{start}.mlp.experts.{expert}" for expert in range(experts)] or [f"{start}.mlp"]:
            shapes |= {
                f"{mlp}.gate_proj.weight": (width, hidden),
                f"{mlp}.up_proj.weight": (width, hidden),
                f"{mlp}.down_proj.weight": (hidden, width),
            }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (config["vocab_size"], hidden)}
    return {name: TensorInfo(dtype=torch.bfloat16, shape=shape) for name, shape in shapes.items()}


def write_checkpoint(directory: Path, config: dict[str, Any], infos: dict[str, TensorInfo]) -> Path:
    """A checkpoint of zeros, which is a hole in the file: only names, shapes and dtypes matter here."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, info in infos.items():
        header[name] = {"dtype": "BF16", "shape": list(info.shape), "data_offsets": [end, end + info.nbytes]}
        end += info.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return directory


def seconds_of(action: Callable[[], Any], repeats: int) -> list[float]:
    found = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.monotonic()
        action()
        torch.cuda.synchronize()
        found.append(time.monotonic() - start)
    return found


def copies(nbytes: int) -> Callable[[], None]:
    """Copy as many bytes as the model has, 1 GiB at a time."""
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))

    def copy() -> None:
        for start in range(0, nbytes, 1 << 30):
            size = min(1 << 30, nbytes - start)
            target[:size].copy_(source[:size])

    return copy


def _bare_rank(rank: int, path: str, gpu: int, nbytes: int, repeats: int, seconds: Any) -> None:
    torch.cuda.set_device(gpu if rank else 0)
    dist.init_process_group("nccl", store=dist.FileStore(path, 2), rank=rank, world_size=2)
    buffer = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")

    def send() -> None:
        for start in range(0, nbytes, len(buffer)):
            part = buffer[: min(len(buffer), nbytes - start)]
            dist.recv(part, 0) if rank else dist.send(part, 1)

    send()
    found = seconds_of(send, repeats)
    if rank == 0:
        seconds.put(found)
    dist.destroy_process_group()


def bare_nccl(root: Path, gpu: int, nbytes: int, repeats: int) -> list[float]:
    """Send as many bytes from GPU 0 to another one over NCCL, 256 MiB at a time."""
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    arguments = (str(root / "store"), gpu, nbytes, repeats, queue)
    ranks = [context.Process(target=_bare_rank, args=(rank, *arguments)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    found: list[float] = queue.get()
    for rank in ranks:
        rank.join()
    return found


def pushes(streamer: WeightStreamer, sink: VllmSink, repeats: int) -> list[dict[str, Any]]:
    """Phases of each push."""
    found = []
    for version in range(repeats):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        receipt = streamer.push(sink, version=version)
        engine = receipt.engines[0]
        worker = engine.workers[0]
        found.append(
            {
                "seconds": receipt.seconds,
                "gather": receipt.gather_seconds,
                **{f"{name}": value for name, value in engine.seconds.items()},
                "worker receive": worker["receive_seconds"],
                "worker load": worker["load_seconds"],
                "tensors": receipt.tensors,
                "nbytes": receipt.nbytes,
                "sender peak": torch.cuda.max_memory_allocated() - before,
                "worker peak": worker["peak_bytes"],
                "channel": engine.channel,
            }
        )
    return found


def rival_ipc(url: str, tensors: dict[str, Tensor], packed: bool) -> None:
    """vLLM's own `ipc` sender (0.26)."""
    from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerSendWeightsArgs, IPCWeightTransferEngine

    client = HTTPVLLMWeightSyncClient(url)
    client._post("pause?mode=keep")
    client.start_weight_update()
    arguments = IPCTrainerSendWeightsArgs(send_mode="http", url=url, packed=packed, packed_buffer_size_bytes=2 << 30)
    IPCWeightTransferEngine.trainer_send_weights(iter(tensors.items()), arguments)
    client.finish_weight_update()
    client._post("resume")


def rival_nccl(url: str, port: int) -> Callable[[dict[str, Tensor]], None]:
    """vLLM's own packed `nccl` sender (0.26), connected."""
    from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerSendWeightsArgs, NCCLWeightTransferEngine

    client = HTTPVLLMWeightSyncClient(url)
    info = {"master_address": "127.0.0.1", "master_port": port, "world_size": 2}
    joining = threading.Thread(target=client.init_weight_transfer_engine, args=({**info, "rank_offset": 1},))
    joining.start()
    group = NCCLWeightTransferEngine.trainer_init(info)
    joining.join()

    def send(tensors: dict[str, Tensor]) -> None:
        client._post("pause?mode=keep")
        client.start_weight_update()
        update = {
            "names": list(tensors),
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
            "shapes": [list(tensor.shape) for tensor in tensors.values()],
            "packed": True,
        }
        receiving = threading.Thread(target=client.update_weights, args=(update,))
        receiving.start()
        arguments = NCCLTrainerSendWeightsArgs(group=group, packed=True)
        NCCLWeightTransferEngine.trainer_send_weights(iter(tensors.items()), arguments)
        receiving.join()
        client.finish_weight_update()
        client._post("resume")

    return send


def engine(model: Path, backend: str, gpu: int, **environment: str) -> EngineServer:
    """A server on a GPU."""
    flags = (*GPU_FLAGS, "--weight-transfer-config", json.dumps({"backend": backend}))
    variables = {"CUDA_VISIBLE_DEVICES": f"{gpu},0" if gpu else "0", "VLLM_USE_FLASHINFER_SAMPLER": "0", **environment}
    return EngineServer(model, flags=flags, environment=variables, plugins=(PLUGIN,), timeout=240)


@click.command()
@click.option("--layers", default=16, show_default=True)
@click.option("--experts", default=0, show_default=True, help="0 for a dense model.")
@click.option("--fp8", default=None, help="Also push in this format.")
@click.option("--engine-gpu", default=0, show_default=True)
@click.option("--channel", default="auto", show_default=True)
@click.option("--bucket-mib", default=1024, show_default=True)
@click.option("--repeats", default=4, show_default=True, help="The first one counts apart.")
@click.option("--sha256", is_flag=True, help="Also push once with SHA-256 of every tensor on both sides.")
@click.option("--rival", is_flag=True, help="Also measure vLLM's own senders.")
@click.option("--json", "out", type=click.Path(path_type=Path), default=None)
def main(
    layers: int, experts: int, fp8: str | None, engine_gpu: int, channel: str, bucket_mib: int, repeats: int,
    sha256: bool, rival: bool, out: Path | None,
) -> None:  # fmt: skip
    config = sizes(layers=layers, experts=experts)
    infos = infos_of(config)
    nbytes = sum(info.nbytes for info in infos.values())
    results: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "python": platform.python_version(),
        "command": " ".join(sys.argv), "config": config, "nbytes": nbytes, "tensors": len(infos),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as root, single_process("nccl"), model_parallel():
        hf = write_checkpoint(Path(root) / "hf", config, infos)
        start = time.monotonic()
        import_checkpoint(hf, Path(root) / "imported")
        print(f"imported {nbytes / 1e9:.2f} GB in {time.monotonic() - start:.0f} s", flush=True)
        overrides = {**cpu_overrides(), "deterministic_mode": False, "perform_initialization": False}
        with torch.device("cuda"):
            model = model_provider(hf, bf16=True, **overrides)().cuda()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.02)
        results["copies"] = seconds_of(copies(nbytes), 4)
        if engine_gpu:
            results["bare nccl"] = bare_nccl(Path(root), engine_gpu, nbytes, 4)
        options = VllmOptions(channel=channel, bucket_bytes=bucket_mib << 20, timeout=120)  # type: ignore[arg-type]
        streamer = WeightStreamer(model, source=Path(root) / "imported", allow_rounded=True)
        with engine(hf, "megatron_fp32", engine_gpu) as server:
            sink = VllmSink(server.url, options=options)
            results["bf16"] = pushes(streamer, sink, repeats)
            report(results)
            if sha256:
                proof = VllmSink(server.url, options=VllmOptions(channel=channel, sha256=True))  # type: ignore[arg-type]
                results["sha256"] = pushes(streamer, proof, 1)
                proof.close()
            sink.close()
        if fp8:
            scheme = named_scheme(fp8)
            entry = quantization_config(fp8_infos(infos, scheme), scheme)
            quantized = Path(root) / "fp8"
            quantized.mkdir()
            (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": entry}))
            with engine(quantized, "megatron_fp32", engine_gpu, VLLM_USE_DEEP_GEMM="0") as server:
                sink = VllmSink(server.url, options=options)
                like = WeightStreamer(model, source=Path(root) / "imported", fp8="like:engine", allow_rounded=True)
                results["fp8"] = pushes(like, sink, repeats)
                report(results)
                sink.close()
        if rival:
            tensors = {name: tensor.clone() for name, tensor in streamer}
            if engine_gpu:
                with engine(hf, "nccl", engine_gpu) as server:
                    send = rival_nccl(server.url, 29571)
                    results["vllm nccl packed"] = seconds_of(lambda: send(tensors), repeats)
            else:
                with engine(hf, "ipc", engine_gpu, VLLM_ALLOW_INSECURE_SERIALIZATION="1") as server:
                    server.post("/init_weight_transfer_engine", {"init_info": {}})
                    for packed in (False, True):
                        way = "vllm ipc packed" if packed else "vllm ipc"
                        results[way] = seconds_of(lambda: rival_ipc(server.url, tensors, packed), repeats)  # noqa: B023
    report(results)
    if out is not None:
        out.write_text(json.dumps(results, indent=1) + "\n")


def report(results: dict[str, Any]) -> None:
    """A short table; medians without the first of each."""
    print(f"{results['gpu']}, {results['nbytes'] / 1e9:.2f} GB, {results['tensors']} tensors")
    for name, values in results.items():
        if not isinstance(values, list):
            continue
        if values and isinstance(values[0], dict):
            last = values[1:] or values
            medians = {
                key: round(statistics.median(value[key] for value in last), 3)
                for key in last[0]
                if isinstance(last[0][key], float)
            }
            gib = {key: round((last[-1][key] or 0) / 2**30, 2) for key in ("nbytes", "sender peak", "worker peak")}
            print(f"{name:18}", last[-1]["channel"], medians, "GiB", gib, "first", round(values[0]["seconds"], 2))
        else:
            print(f"{name:18} {statistics.median(values[1:] or values):.3f} s, first {values[0]:.3f} s")


if __name__ == "__main__":
    main()
