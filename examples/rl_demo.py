"""RL on a CPU in a few minutes: Megatron trains a tiny Qwen3.5 on what a real vLLM samples.

    make rl-demo
    python examples/rl_demo.py --engine-python .venv/engine/bin/python [--steps 5]

The reward of an answer is the share of its tokens that are even. After every step the trainer pushes its weights into
vLLM with `VllmSink`. One line a step says what the push did, and how far sampler and trainer are apart on the tokens
that were sampled: K3 = mean(exp(d) - 1 - d) with d = trainer's log-prob - sampler's log-prob (Schulman,
http://joschu.net/blog/kl-approx.html), and the largest importance ratio exp(d).

The trainer needs megatron-core, transformers and no GPU. The engine has an environment of its own, with vLLM for CPUs.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from megatron_fp32 import Fp32Config, VllmOptions, VllmSink, WeightStreamer, import_checkpoint, model_provider
from megatron_fp32.models.provider import cpu_overrides
from megatron_fp32.testing.cpu import cpu_megatron, model_parallel, single_process
from megatron_fp32.testing.qwen3_5 import write_qwen3_5
from megatron_fp32.testing.training import Batch, Trainer, TrainerConfig

ROOT = Path(__file__).resolve().parents[1]
SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}  # fmt: skip
PROMPTS, PROMPT, ANSWER = 16, 8, 24


@contextlib.contextmanager
def engine(python: str, model: Path, log: Path) -> Iterator[str]:
    """A server of vLLM on this machine; its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = [
        "--host", "127.0.0.1", "--port", str(port), "--model", str(model), "--served-model-name", "model",
        "--skip-tokenizer-init", "--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "256",
        "--hf-overrides", json.dumps({"head_dtype": "float32"}),
        "--weight-transfer-config", json.dumps({"backend": "megatron_fp32"}),
    ]  # fmt: skip
    variables = {
        "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
        # Compiling takes longer than all of this. torchvision needs a shim beside a torch without CUDA.
        "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "engine" / "site"), str(ROOT)]),
    }  # fmt: skip
    with log.open("wb") as out:
        server = subprocess.Popen(
            [python, "-m", "vllm.entrypoints.openai.api_server", *flags],
            env={**os.environ, **variables}, stdout=out, stderr=subprocess.STDOUT, cwd=log.parent,
            start_new_session=True,
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(server, url, log)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)


def wait_for(server: subprocess.Popen[bytes], url: str, log: Path, timeout: float = 300.0) -> None:
    """Wait until the server answers."""
    start = time.monotonic()
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            print(f"vLLM answers after {time.monotonic() - start:.0f} s", flush=True)
            return
        if server.poll() is not None or time.monotonic() - start > timeout:
            end = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
            raise click.ClickException(f"vLLM did not start; its log ends with\n{end}")
        time.sleep(0.5)


def sample(url: str, prompts: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Answers [b, ANSWER] and the sampler's log-probs of their tokens, at temperature 1."""
    body = {
        "model": "model", "prompt": prompts.tolist(), "max_tokens": ANSWER, "temperature": 1.0, "logprobs": 0,
        "seed": seed, "ignore_eos": True, "return_token_ids": True,
        "return_tokens_as_token_ids": True,  # there is no tokenizer
    }  # fmt: skip
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            choices = sorted(json.loads(answer.read())["choices"], key=lambda choice: choice["index"])
    except urllib.error.HTTPError as error:
        raise click.ClickException(f"vLLM answered {error.code}: {error.read().decode()}") from error
    tokens = torch.tensor([choice["token_ids"] for choice in choices])
    return tokens, torch.tensor([choice["logprobs"]["token_logprobs"] for choice in choices])


def train(trainer: Trainer, prompts: Tensor, answers: Tensor, rewards: Tensor) -> Tensor:
    """One REINFORCE step with the mean reward as baseline; the trainer's log-probs [b, ANSWER] before it."""
    text = torch.cat([prompts, answers], dim=1)
    batch = Batch(tokens=text[:, :-1].contiguous(), labels=text[:, 1:].contiguous())
    for wrapped in trainer.wrapped:
        wrapped.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    # The fused loss of a token is minus its log-prob, in fp32, without logits.
    logprobs = -trainer.loss(batch)[:, PROMPT - 1 :]
    advantages = rewards - rewards.mean()
    loss = -(advantages[:, None] * logprobs).mean()
    trainer.optimizer.scale_loss(loss).backward()
    trainer.ddp.finish_grad_sync()
    trainer.optimizer.step()
    return logprobs.detach()


def run(url: str, streamer: WeightStreamer, trainer: Trainer, steps: int) -> None:
    """Sample, train, push, and print what happened."""
    sink = VllmSink(url, options=VllmOptions(timeout=120))
    generator = torch.Generator().manual_seed(0)
    streamer.push(sink, version=0)
    for step in range(1, steps + 1):
        prompts = torch.randint(0, SIZES["vocab_size"], (PROMPTS, PROMPT), generator=generator)
        answers, sampled = sample(url, prompts, seed=step)
        rewards = (answers % 2 == 0).float().mean(1)
        difference = train(trainer, prompts, answers, rewards) - sampled
        k3 = (difference.exp() - 1 - difference).mean()
        receipt = streamer.push(sink, version=step)
        seconds = receipt.engines[0].seconds
        print(
            f"step {step}: samples of version {step - 1}, reward {rewards.mean():.3f}, K3 {k3:.2e}, largest ratio "
            f"{difference.exp().max():.3f} | push {step}: {receipt.tensors} tensors, {receipt.nbytes} bytes, checksums "
            f"equal, rounded {list(receipt.engines[0].rounded)}, gather {receipt.gather_seconds:.3f} s, send "
            f"{seconds['send']:.3f} s, load {seconds['load']:.3f} s, pause {seconds['pause']:.3f} s",
            flush=True,
        )
    sink.close()


@click.command()
@click.option("--engine-python", default=str(ROOT / ".venv" / "engine" / "bin" / "python"), show_default=True)
@click.option("--steps", default=40, show_default=True)
def main(engine_python: str, steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder, cpu_megatron(), single_process(), model_parallel():
        root = Path(folder)
        hf = write_qwen3_5(root / "qwen3_5", logits_std=1.0, **SIZES)
        import_checkpoint(hf, root / "imported")
        model = model_provider(hf, fp32=Fp32Config(fused_loss="recompute"), bf16=True, **cpu_overrides())()
        trainer = Trainer(model, TrainerConfig(lr=2e-3, weight_decay=0.0))
        trainer.load_model(root / "imported" / "release")
        streamer = WeightStreamer(trainer.wrapped, source=root / "imported")
        with engine(os.path.abspath(engine_python), hf, root / "engine.log") as url:
            run(url, streamer, trainer, steps)


if __name__ == "__main__":
    main()
