"""`megatron-fp32`: one module a command. None of them imports torch before its command runs."""

from __future__ import annotations

import click

from megatron_fp32 import __version__
from megatron_fp32.cli import export, import_, inspect, quantize, verify
from megatron_fp32.cli.terminal import Commands


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
    Tab completion: add this line to ~/.bashrc (in other shells use zsh_source or
    fish_source):
      eval "$(_MEGATRON_FP32_COMPLETE=bash_source megatron-fp32)"
    """,
)
@click.version_option(__version__, prog_name="megatron-fp32")
def main() -> None:
    """Convert checkpoints between Hugging Face and Megatron, compare them, and show what they hold.

    Families: Qwen3.5 and Qwen3.5-MoE, alone and as the text model of a vision-language checkpoint, Qwen3-Next, Qwen3,
    Qwen3-MoE, Llama 3.

    The commands need neither a GPU nor torch.distributed. They do not build the model: they read and write one tensor
    at a time.

    `import`, `export` and `quantize` write into the directory .NAME.partial, next to the output. They rename it to NAME
    after every tensor was written, read back and compared. After Ctrl-C, a full disk or a kill, run the same command
    again: it converts only what is missing.

    Where a Hugging Face checkpoint is read, you can pass the id of a repository on the Hub instead of a directory:
    Qwen/Qwen3-0.6B or Qwen/Qwen3-0.6B@REVISION. That needs pip install 'megatron_fp32[hub]'. A directory of that name
    is taken first.

    \b
    Exit status of import, export and quantize:
      0    everything was converted and verified
      1    the conversion was refused or failed, or `export` left tensors rounded
           (--allow-rounded) or cut added tokens off (see --vocab-size)
      2    a mistake on the command line
      130  Ctrl-C
    \b
    Exit status of verify and inspect:
      0    done; for verify: no difference
      1    verify: something differs
      2    a mistake on the command line, or a checkpoint that cannot be read
      130  Ctrl-C
    """


for module in (import_, export, quantize, verify, inspect):
    main.add_command(module.command)
