"""Ids of repositories on the Hugging Face Hub in the place of a directory."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import click

from megatron_fp32.checkpoint.formats.directory_checks import HUB_ID
from megatron_fp32.errors import CheckpointError
from megatron_fp32.extras import missing, remedy_named

FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
"""Weights, index, configs and tokenizer files. Pickles and code are never fetched."""

NOT_FETCHED = ("*/*",)
"""Folders hold copies of the weights in other formats."""

_LIMIT = 500


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubId:
    """A repository, and the branch, tag or commit that is meant; None for the Hub's default branch."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def parse_hub_id(text: str) -> HubId | None:
    """`OWNER/NAME`, `OWNER/NAME@REVISION` or the address of a repository; None for another text."""
    found = HUB_ID.fullmatch(text)
    return found and HubId(repository=found["repository"], revision=found["tag"] or found["tree"])


def why_not_fetched() -> str | None:
    """What must be installed before anything can be fetched; None where it is."""
    return None if importlib.util.find_spec("huggingface_hub") else missing("huggingface_hub")


def local(source: Path | HubId) -> Path:
    """The directory with the files of a source. Those of a repository are fetched into the cache of the Hub.

    Raises:
        CheckpointError: when huggingface_hub cannot fetch them, with its reason.
        MissingPackageError: without huggingface_hub.
    """
    if isinstance(source, Path):
        return source
    with remedy_named():
        import huggingface_hub
        from huggingface_hub.constants import HF_HUB_CACHE
        from huggingface_hub.errors import HTTPError
    click.echo(f"megatron-fp32: fetching {source} from the Hugging Face Hub into {HF_HUB_CACHE}", err=True)
    try:
        snapshot = huggingface_hub.snapshot_download(
            source.repository,
            revision=source.revision,
            allow_patterns=list(FILES),
            ignore_patterns=list(NOT_FETCHED),
        )
    # A bad id is a ValueError. An answer of the Hub and a failed connection are an OSError. A connection that breaks
    # off within a file is an HTTPError of the client that huggingface_hub uses.
    except (OSError, ValueError, HTTPError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk
        reason = " ".join(str(error).split())[:_LIMIT] or type(error).__name__
        raise CheckpointError(
            f"there is no directory {source.repository}, and huggingface_hub cannot fetch {source} from the Hub: "
            f"{reason}"
        ) from error
    return Path(snapshot)
