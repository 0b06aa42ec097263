"""Where a `config.json` describes the text model."""

from __future__ import annotations

from typing import Any


def text_part(hf_config: Any) -> dict[str, Any] | None:
    """The object that describes the text model: `text_config` of a vision-language model, or all of `config.json`.

    Args:
        hf_config: parsed `config.json`.

    Returns:
        The object itself, not a copy; None where it is not a JSON object.
    """
    text = hf_config.get("text_config", hf_config) if isinstance(hf_config, dict) else None
    return text if isinstance(text, dict) else None
