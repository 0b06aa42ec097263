"""Small checkpoints of every family, written by transformers, with sizes that no power of two divides."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megatron_fp32.testing.qwen3_5 import fill_parameters

_DECODER: dict[str, Any] = {
    "vocab_size": 57,
    "hidden_size": 36,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
}
_DENSE: dict[str, Any] = {"intermediate_size": 22, "num_hidden_layers": 3}
_HYBRID: dict[str, Any] = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 7,
    "head_dim": 12,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 0.5},
}
_MOE: dict[str, Any] = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 14}
_SHARED = {**_MOE, "shared_expert_intermediate_size": 18}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 48,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One checkpoint."""

    name: str
    module: str
    """Of `transformers.models`."""
    config: str
    model: str
    fields: dict[str, Any]
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    """What is done to the tensors that transformers saved."""
    mtp: bool = False
    outer: str = ""
    """Configuration of the vision-language model to put around the text model."""

    def text_config(self) -> Any:
        """transformers' configuration of the text model."""
        return getattr(self._module(), self.config)(**self.fields)

    def _module(self) -> Any:
        return importlib.import_module(f"transformers.models.{self.module}")

    def write(self, directory: Path, *, seed: int = 0) -> Path:
        """The checkpoint in a directory that is made."""
        torch.manual_seed(seed)
        module, config = self._module(), self.text_config()
        if self.outer:
            vision = {
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 18,
                "num_heads": 2,
                "out_hidden_size": config.hidden_size,
                "num_position_embeddings": 16,
                **({"deepstack_visual_indexes": [0]} if self.module.startswith("qwen3_vl") else {}),
            }
            config = getattr(module, self.outer)(
                text_config=config.to_dict(),
                vision_config=vision,
                tie_word_embeddings=self.fields.get("tie_word_embeddings", False),
            )
        model = getattr(module, self.model)(config)
        fill_parameters(model.bfloat16())
        model.save_pretrained(directory)
        if self.mtp:
            add_tensors(directory, {f"mtp.{n}": p.data for n, p in self.mtp_module().named_parameters()})
        if self.change is not None:
            path = directory / "model.safetensors"
            save_file(self.change(load_file(path)), path, metadata={"format": "pt"})
        return directory

    def mtp_module(self) -> MultiTokenPrediction:
        """The MTP part, with random values, in bf16."""
        modeling = importlib.import_module(f"transformers.models.{self.module}.modeling_{self.module}")
        module = MultiTokenPrediction(modeling, self.text_config()).bfloat16()
        fill_parameters(module)
        return module

    def load(self, directory: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
        """transformers' model of the checkpoint."""
        model: nn.Module = getattr(self._module(), self.model).from_pretrained(
            directory, dtype=dtype, experts_implementation="eager"
        )
        return model.eval()


class MultiTokenPrediction(nn.Module):
    """The MTP part of Qwen3-Next and Qwen3.5, which transformers lacks, out of transformers' modules.

    After vLLM's `qwen3_next_mtp.py`: fc([norm(embedding of the next token) | norm(hidden state)]), a layer of full
    attention, a norm; parameter names are those of the checkpoints, without `mtp.`.
    """

    def __init__(self, modeling: Any, config: Any) -> None:
        super().__init__()
        name = next(n for n in vars(modeling) if n.endswith("DecoderLayer")).removesuffix("DecoderLayer")
        norm = getattr(modeling, f"{name}RMSNorm")
        config = type(config)(**{**config.to_dict(), "layer_types": ["full_attention"], "num_hidden_layers": 1})
        self.layers = nn.ModuleList([getattr(modeling, f"{name}DecoderLayer")(config, 0)])
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.pre_fc_norm_embedding = norm(config.hidden_size, eps=config.rms_norm_eps)
        self.pre_fc_norm_hidden = norm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm = norm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, embedding: Tensor, hidden: Tensor, rotary: Any, mask: Tensor) -> Tensor:
        """[b, s, H], [b, s, H] -> [b, s, H]."""
        both = [self.pre_fc_norm_embedding(embedding), self.pre_fc_norm_hidden(hidden)]
        x = self.layers[0](self.fc(torch.cat(both, dim=-1)), position_embeddings=rotary, attention_mask=mask)
        return self.norm(x)


def add_tensors(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Put more tensors into a checkpoint of one file."""
    path = directory / "model.safetensors"
    save_file({**load_file(path), **tensors}, path, metadata={"format": "pt"})


def unfuse(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One tensor for each expert instead of stacks."""
    changed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            changed[name] = tensor
            continue
        start, kind = name.rsplit(".", 1)
        for expert, weight in enumerate(tensor):
            halves = weight.chunk(2) if kind == "gate_up_proj" else [weight]
            names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
            for part, half in zip(names, halves, strict=True):
                changed[f"{start}.{expert}.{part}.weight"] = half.contiguous()
    return changed


def fuse(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The other way round."""
    separate = {name for name in tensors if ".experts." in name and name.endswith(".weight")}
    changed = {name: tensor for name, tensor in tensors.items() if name not in separate}
    for start in {name.split(".experts.")[0] for name in separate}:

        def stack(kind: str, start: str = start) -> Tensor:
            count = sum(name.startswith(f"{start}.experts.") and name.endswith(f".{kind}.weight") for name in tensors)
            return torch.stack([tensors[f"{start}.experts.{i}.{kind}.weight"] for i in range(count)])

        changed[f"{start}.experts.gate_up_proj"] = torch.cat([stack("gate_proj"), stack("up_proj")], dim=1)
        changed[f"{start}.experts.down_proj"] = stack("down_proj")
    return changed


def transpose_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fused experts as Qwen3-VL was released: [E, H, 2F] and [E, F, H]."""
    ends = ("experts.gate_up_proj", "experts.down_proj")
    return {n: t.transpose(1, 2).contiguous() if n.endswith(ends) else t for n, t in tensors.items()}


def fuse_all_but_mtp(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As Qwen3.5 was released."""
    mtp = {name: tensor for name, tensor in tensors.items() if name.startswith("mtp.")}
    return {**fuse({name: tensor for name, tensor in tensors.items() if name not in mtp}), **unfuse(mtp)}


def _llama(name: str, **fields: Any) -> Case:
    fields = {**_DECODER, **_DENSE, "head_dim": 12, "rope_parameters": _LLAMA3_ROPE, **fields}
    return Case(name=name, module="llama", config="LlamaConfig", model="LlamaForCausalLM", fields=fields)


def _qwen3(name: str, **fields: Any) -> Case:
    fields = {**_DECODER, **_DENSE, **fields}
    return Case(name=name, module="qwen3", config="Qwen3Config", model="Qwen3ForCausalLM", fields=fields)


def _qwen3_moe(name: str, *, change: Any = None, **fields: Any) -> Case:
    fields = {**_DECODER, **_DENSE, **_MOE, **fields}
    return Case(
        name=name, module="qwen3_moe", config="Qwen3MoeConfig", model="Qwen3MoeForCausalLM", fields=fields,
        change=change,
    )  # fmt: skip


def _qwen3_vl_moe(name: str, *, change: Any = None) -> Case:
    return Case(
        name=name, module="qwen3_vl_moe", config="Qwen3VLMoeTextConfig", model="Qwen3VLMoeForConditionalGeneration",
        fields={**_DECODER, **_DENSE, **_MOE, "head_dim": 12}, change=change, outer="Qwen3VLMoeConfig",
    )  # fmt: skip


def _qwen3_next(name: str, *, change: Any = None, mtp: bool = False, **fields: Any) -> Case:
    fields = {**_DECODER, **_SHARED, **_HYBRID, "intermediate_size": 22, **fields}
    return Case(
        name=name, module="qwen3_next", config="Qwen3NextConfig", model="Qwen3NextForCausalLM", fields=fields,
        change=change, mtp=mtp,
    )  # fmt: skip


def _qwen3_5(
    name: str, *, vision: bool = False, moe: bool = False, change: Any = None, mtp: bool = False, **fields: Any
) -> Case:
    start = "Qwen3_5Moe" if moe else "Qwen3_5"
    own, outer = _SHARED if moe else {"intermediate_size": 22}, f"{start}Config" if vision else ""
    return Case(
        name=name, module="qwen3_5_moe" if moe else "qwen3_5", config=f"{start}TextConfig",
        model=f"{start}ForConditionalGeneration" if vision else f"{start}ForCausalLM",
        fields={**_DECODER, **_HYBRID, **own, **fields}, change=change, mtp=mtp, outer=outer,
    )  # fmt: skip


_TIED = {"tie_word_embeddings": True}

CASES = (
    _llama("Llama"),
    _llama("Llama, tied", **_TIED),
    _llama("Llama without scaling", rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    _qwen3("Qwen3"),
    _qwen3("Qwen3, tied", **_TIED),
    Case(
        name="Qwen3-VL", module="qwen3_vl", config="Qwen3VLTextConfig", model="Qwen3VLForConditionalGeneration",
        fields={**_DECODER, **_DENSE, "head_dim": 12}, outer="Qwen3VLConfig",
    ),
    _qwen3_vl_moe("Qwen3-VL-MoE"),
    _qwen3_vl_moe("Qwen3-VL-MoE, as released", change=transpose_experts),
    _qwen3_moe("Qwen3-MoE", norm_topk_prob=True),
    _qwen3_moe("Qwen3-MoE, plain probabilities, tied", norm_topk_prob=False, **_TIED),
    _qwen3_moe("Qwen3-MoE, fused", change=fuse),
    _qwen3_moe("Qwen3-MoE, a dense layer", mlp_only_layers=[1]),
    _qwen3_next("Qwen3-Next", mtp=True),
    _qwen3_next(
        "Qwen3-Next, plain probabilities, tied, a dense layer", norm_topk_prob=False, mlp_only_layers=[0], **_TIED
    ),
    _qwen3_next("Qwen3-Next, fused", mtp=True, change=fuse),
    _qwen3_5("Qwen3.5", mtp=True),
    _qwen3_5("Qwen3.5, tied", **_TIED),
    _qwen3_5("Qwen3.5-MoE", moe=True, mtp=True, change=fuse),
    _qwen3_5("Qwen3.5-MoE, tied", moe=True, **_TIED),
    _qwen3_5("Qwen3.5-MoE, one tensor an expert", moe=True, mtp=True, change=unfuse),
    _qwen3_5("Qwen3.5-VL", vision=True, mtp=True),
    _qwen3_5("Qwen3.5-VL-MoE", vision=True, moe=True, mtp=True, change=fuse_all_but_mtp),
)  # fmt: skip
"""Every family, tied and untied, with experts fused and not, alone and in a vision-language model."""


def case(name: str) -> Case:
    """The case of a name."""
    return next(c for c in CASES if c.name == name)


def config_json(directory: Path) -> dict[str, Any]:
    """A checkpoint's configuration."""
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config
