"""Facts that are read from the names and shapes of a checkpoint's tensors, because `config.json` cannot be trusted.

- The prefix of the text model's tensors.
- Whether there is an MTP layer: transformers drops the MTP layer when it saves, and keeps the fields that describe it.
- Whether experts are fused: a model that was released with fused experts may be saved again with one tensor for each
  expert, or the reverse.
- Whether fused experts are transposed: Qwen3-VL was released so, and transformers saves them as it loaded them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping

from megatron_fp32.weights.experts import DOWN, GATE_UP

PREFIXES = ("model.language_model.", "model.")
"""Possible starts of the names of the text model's tensors: in a vision-language model, and alone. Longest first."""

_WRAPPERS = {
    "base_model": "PEFT adds this start: merge the adapter with merge_and_unload, and save the model that it returns",
    "module": "DistributedDataParallel and other wrappers add this start: save the model inside of the wrapper",
    "_orig_mod": "torch.compile adds this start: save the model that was compiled (its _orig_mod)",
    "_fsdp_wrapped_module": "FSDP adds this start: save the model inside of the FSDP wrapper",
}
"""What to do with a checkpoint whose tensor names begin with this word."""

VISION = ("model.visual.", "model.language_model.visual.", "visual.")
"""Possible starts of the names of vision tensors."""

MTP = "mtp."
"""The start of the names of MTP tensors."""

HEAD = "lm_head.weight"
"""The name of the output layer's weight."""

_FREQUENCIES = ("rotary_emb.inv_freq", "rotary_emb.original_inv_freq")


def is_rotary_frequencies(name: str) -> bool:
    """Whether a tensor holds rotary frequencies, which older versions of transformers stored in every layer.

    They can be computed from `config.json`. transformers does not read them any more (modeling_utils.py,
    `_adjust_missing_and_unexpected_keys`).
    """
    return any(name == end or name.endswith(f".{end}") for end in _FREQUENCIES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Naming:
    """How a Hugging Face checkpoint names and arranges its tensors."""

    prefix: str
    """One of `PREFIXES`."""
    fused_experts: bool = False
    """The decoder's experts are fused: `experts.gate_up_proj` [E, 2F, H] and `experts.down_proj` [E, H, F]."""
    fused_mtp_experts: bool = False
    """The experts of the MTP layer are fused. The decoder may differ."""
    transposed_experts: bool = False
    """Fused experts are [E, H, 2F] and [E, F, H]."""
    mtp_layers: int = 0
    head: bool = False
    """The checkpoint has `lm_head.weight`. If embeddings are tied, it has the values of the embedding."""

    @classmethod
    def from_tensors(cls, names: Collection[str], shapes: Mapping[str, tuple[int, ...]] | None = None) -> Naming:
        """The naming of a checkpoint with these tensors.

        Args:
            names: the names of all tensors.
            shapes: shapes by name, as far as they are known. Fused experts without a shape are assumed to be
                [E, 2F, H] and [E, H, F].

        Raises:
            ValueError: when the tensors do not include a text model.
        """
        mtp = [name for name in names if name.startswith(MTP)]
        fused = [name for name in names if name.endswith(f".experts.{GATE_UP}")]
        layers = [_mtp_layer(name) for name in mtp if name.startswith(f"{MTP}layers.")]
        return cls(
            prefix=find_prefix(names),
            fused_experts=any(not name.startswith(MTP) for name in fused),
            fused_mtp_experts=any(name.startswith(MTP) for name in fused),
            transposed_experts=any(_is_transposed(name.removesuffix(GATE_UP), shapes or {}) for name in fused),
            mtp_layers=max(layers, default=0) + 1 if mtp else 0,
            head=HEAD in names,
        )


def _mtp_layer(name: str) -> int:
    number = name.split(".")[2]
    if not re.fullmatch("[0-9]{1,4}", number):
        raise ValueError(f"the tensor name {name!r} has no layer number: expected {MTP}layers.N., where N is a number")
    return int(number)


def _is_transposed(experts: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the shapes are [E, H, 2F] and [E, F, H]. No E, F and H make these equal [E, 2F, H] and [E, H, F]."""
    gate_up, down = (shapes.get(f"{experts}{name}", ()) for name in (GATE_UP, DOWN))
    return len(gate_up) == len(down) == 3 and gate_up[1:] == (down[2], 2 * down[1])


def find_prefix(names: Collection[str]) -> str:
    """Which of `PREFIXES` a checkpoint's tensor names use.

    Raises:
        ValueError: when no prefix fits.
    """
    for prefix in PREFIXES:
        if f"{prefix}embed_tokens.weight" in names:
            return prefix
    wanted = " nor ".join(f"{prefix}embed_tokens.weight" for prefix in PREFIXES)
    message = f"this checkpoint does not have a text model: it has neither {wanted}"
    other = next((name for name in sorted(names) if name.endswith("embed_tokens.weight")), None)
    if other is not None:
        start = other.removesuffix("embed_tokens.weight")
        return_to = next((prefix for prefix in PREFIXES if start.endswith(prefix)), PREFIXES[-1])
        raise ValueError(
            f"{message}, but it has {other}: its names start with {start!r}, expected {return_to!r}. "
            f"{_WRAPPERS.get(start.split('.')[0], 'Rename its tensors')}"
        )
    shown = ", ".join(sorted(names)[:3])
    raise ValueError(f"{message}; its tensors are {shown}{', ...' if len(names) > 3 else ''}" if names else message)
