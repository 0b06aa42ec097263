"""What only a checkpoint's tensors say: where the text model begins, how experts are stored, whether MTP is there.

`config.json` is no witness for these: transformers drops the MTP layer and keeps the fields that describe it, and one
model is released with fused experts and saved again with one tensor for each expert, or the other way round; Qwen3-VL
was released with its fused experts transposed, and transformers saves them so or not, depending on what it loaded.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping

from megatron_fp32.weights.experts import DOWN, GATE_UP

PREFIXES = ("model.language_model.", "model.")
"""What the text model's tensors may start with, the longer first: inside of a vision-language model, and alone."""

_WRAPPERS = {
    "base_model": "PEFT saved it so: merge the adapter first (merge_and_unload), and save the model that this returns",
    "module": "A wrapper such as DistributedDataParallel was saved with the model: save the model inside of it",
    "_orig_mod": "torch.compile saved it so: save the model that was compiled (its _orig_mod)",
    "_fsdp_wrapped_module": "FSDP saved it so: save the model inside of it",
}
"""What to do with a checkpoint whose names begin so."""

VISION = ("model.visual.", "model.language_model.visual.", "visual.")
"""What the tensors of the vision part start with: one of these."""

MTP = "mtp."
"""What the tensors of multi-token prediction start with."""

HEAD = "lm_head.weight"
"""The output layer."""

_FREQUENCIES = ("rotary_emb.inv_freq", "rotary_emb.original_inv_freq")


def is_rotary_frequencies(name: str) -> bool:
    """Whether a tensor holds rotary frequencies, which older versions of transformers stored in every layer.

    They follow from `config.json`; transformers reads them no more (modeling_utils.py,
    `_adjust_missing_and_unexpected_keys`).
    """
    return any(name == end or name.endswith(f".{end}") for end in _FREQUENCIES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Naming:
    """A checkpoint's way to name and to lay out its tensors."""

    prefix: str
    """One of `PREFIXES`."""
    fused_experts: bool = False
    """The decoder's experts are stacks, `experts.gate_up_proj` [E, 2F, H] and `experts.down_proj` [E, H, F]."""
    fused_mtp_experts: bool = False
    """The same of the MTP layer, which may differ from the decoder."""
    transposed_experts: bool = False
    """Fused experts are [E, H, 2F] and [E, F, H]."""
    mtp_layers: int = 0
    head: bool = False
    """`lm_head.weight` is there; where embeddings are tied it has the values of the embedding."""

    @classmethod
    def of(cls, names: Collection[str], shapes: Mapping[str, tuple[int, ...]] | None = None) -> Naming:
        """The naming of a checkpoint with these tensors.

        Args:
            names: of all of them.
            shapes: of those that are known; fused experts without any are taken for [E, 2F, H] and [E, H, F].

        Raises:
            ValueError: when no text model is among them.
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
        raise ValueError(f"the tensor {name!r} does not name a layer: expected {MTP}layers.N., where N is a number")
    return int(number)


def _is_transposed(experts: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """[E, H, 2F] beside [E, F, H], which no sizes make [E, 2F, H] beside [E, H, F]."""
    gate_up, down = (shapes.get(f"{experts}{name}", ()) for name in (GATE_UP, DOWN))
    return len(gate_up) == len(down) == 3 and gate_up[1:] == (down[2], 2 * down[1])


def find_prefix(names: Collection[str]) -> str:
    """Which of `PREFIXES` a checkpoint's tensor names use.

    Raises:
        ValueError: when neither fits.
    """
    for prefix in PREFIXES:
        if f"{prefix}embed_tokens.weight" in names:
            return prefix
    wanted = " nor ".join(f"{prefix}embed_tokens.weight" for prefix in PREFIXES)
    message = f"there is no text model in this checkpoint: neither {wanted} is in it"
    other = next((name for name in sorted(names) if name.endswith("embed_tokens.weight")), None)
    if other is not None:
        start = other.removesuffix("embed_tokens.weight")
        return_to = next((prefix for prefix in PREFIXES if start.endswith(prefix)), PREFIXES[-1])
        raise ValueError(
            f"{message}, but {other}: its names start with {start!r}, where {return_to!r} is expected. "
            f"{_WRAPPERS.get(start.split('.')[0], 'Rename its tensors')}"
        )
    shown = ", ".join(sorted(names)[:3])
    raise ValueError(f"{message}; its tensors are {shown}{', ...' if len(names) > 3 else ''}" if names else message)
