"""An engine's environment has neither Megatron nor, on the trainer's machine, vLLM."""

from __future__ import annotations

import subprocess
import sys

MODULES = [
    *(
        f"transfer.{name}"
        for name in ("buckets", "channels", "checksum", "manifest", "receiver", "rendezvous", "sender")
    ),
    *(f"vllm_plugin.{name}" for name in ("lease", "loaded", "norm")),
]


def test_both_rooms_are_importable() -> None:
    text = "import sys\nfor name in ('megatron', 'vllm', 'triton'): sys.modules[name] = None\n"
    text += "".join(f"import megatron_fp32.{module}\n" for module in MODULES)
    subprocess.run([sys.executable, "-c", text], check=True, timeout=120)
