"""Small random Qwen3.5 checkpoints, written by transformers, which must be installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_fp32.extras import remedy_named
from megatron_fp32.validation import check_count, check_flag, check_number, check_path

TINY_QWEN3_5: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
"""Fields of `Qwen3_5TextConfig`: gated delta nets and attention, grouped value heads, gated attention."""


def write_qwen3_5(
    directory: str | Path, *, seed: int = 0, released_names: bool = False, logits_std: float = 4.0, **fields: Any
) -> Path:
    """Write a random Qwen3.5 checkpoint with the dtypes of released ones.

    `A_log` and `linear_attn.norm.weight` are F32, all other tensors BF16. The F32 values have full mantissas, and many
    values of the norm are below 0.5.

    Args:
        directory: the directory to write; it is made if it does not exist.
        seed: seed of all values.
        released_names: also write a vision part, so that text tensors are named `model.language_model.*`, as in the
            released checkpoints.
        logits_std: approximate standard deviation of the logits. It is large enough that rounded logits differ.
        fields: fields of `Qwen3_5TextConfig`, which replace those in `TINY_QWEN3_5`.

    Returns:
        The directory.
    """
    check_path("directory", directory)
    check_count("seed", seed, least=0)
    check_flag("released_names", released_names)
    check_number("logits_std", logits_std, positive=True)
    with remedy_named():
        from transformers.models import qwen3_5

    torch.manual_seed(seed)
    text = qwen3_5.Qwen3_5TextConfig(**{**TINY_QWEN3_5, **fields})
    if released_names:
        vision = {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": text.hidden_size,
            "num_position_embeddings": 16,
        }
        config = qwen3_5.Qwen3_5Config(
            text_config=text.to_dict(), vision_config=vision, tie_word_embeddings=text.tie_word_embeddings
        )
        model: Any = qwen3_5.Qwen3_5ForConditionalGeneration(config)
    else:
        model = qwen3_5.Qwen3_5ForCausalLM(text)
    fill_parameters(model.bfloat16(), logits_std=logits_std)
    model.save_pretrained(directory)
    return Path(directory)


def load_qwen3_5(directory: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load a checkpoint into transformers' model, for comparison. With bfloat16, transformers rounds `A_log`."""
    with remedy_named():
        from transformers.models import qwen3_5

    model: nn.Module = qwen3_5.Qwen3_5ForCausalLM.from_pretrained(directory, dtype=dtype)
    return model.eval()


def fill_parameters(model: nn.Module, *, logits_std: float = 4.0) -> None:
    """Give a transformers model of any family random values as in `write_qwen3_5`.

    Args:
        model: the model; its `A_log` and `linear_attn.norm.weight` become fp32.
        logits_std: approximate standard deviation of the logits. Without an output layer it is ignored.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _fill(name, parameter)
        head = getattr(model, "lm_head", None)
        if head is not None:
            head.weight.mul_(logits_std / head.weight.shape[1] ** 0.5 / head.weight.std())


def _fill(name: str, parameter: nn.Parameter) -> None:
    if name.endswith("A_log"):
        parameter.data = torch.empty(parameter.shape).uniform_(0.01, 16).log()
    elif name.endswith("linear_attn.norm.weight"):
        # Log-normal around 0.5: for half of the values, (w - 1) + 1 is not exact. For values of torch.uniform_ it would
        # always be exact.
        parameter.data = 0.5 * torch.randn(parameter.shape).mul_(0.5).exp_()
    elif name.endswith("dt_bias"):
        parameter.uniform_(-3, 1)
    elif parameter.dim() == 1:
        parameter.add_(0.2 * torch.randn_like(parameter))
    elif name.endswith("embed_tokens.weight"):
        parameter.normal_()
    else:
        # With larger weights, a change of one ulp in the embedding would change a log-prob by more than 1e-5 within
        # transformers, so that no two implementations could agree.
        parameter.normal_(std=0.5 / parameter.shape[-1] ** 0.5)
