"""A checkpoint from the Hugging Face hub: which files are downloaded, and what may lie in their folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from qwen_common.errors import UserError

_FILES = ["*.safetensors", "*.json", "*.jinja", "merges.txt", "LICENSE", "NOTICE"]


def download(source: str, revision: str | None, file: str | None = None, others: Iterable[str] = ()) -> Path:
    """The folder of the hub's snapshot, which is named after its commit.

    Args:
        source: a hub id such as `Qwen/Qwen3.5-0.8B`.
        revision: branch, tag or commit; None takes the default branch.
        file: the one file that is wanted; None downloads all that a checkpoint is made of.
        others: what the user could have named instead, for the message.

    Raises:
        UserError: `source` is no hub id, or the hub did not give it.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    if source.startswith((".", "~", "/")) or source.count("/") != 1 or "\\" in source:
        choices = ["a checkpoint folder", "a hub id like Qwen/Qwen3.5-0.8B"]
        named = ", ".join(others)
        what = f"{', '.join(choices)}, or one of {named}" if named else " or ".join(choices)
        raise UserError(f"no folder {source}: give {what}")
    try:
        if file:
            return Path(hf_hub_download(source, file, revision=revision)).parent
        return Path(snapshot_download(source, revision=revision, allow_patterns=_FILES)).resolve()
    except Exception as error:  # the library's own errors, and those of whichever HTTP client it uses
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"no folder {source}, and the hub did not give {f'its {file}' if file else 'it'} ({reason}): "
            "check name and network"
        ) from error


def refuse_links_out(root: Path) -> None:
    """No link brings a file from elsewhere into an artifact; a hub snapshot links into its own cache.

    Raises:
        UserError: names the first link that leads out of `root`.
    """
    homes = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    for pattern in _FILES:
        for path in root.glob(pattern):
            target = path.resolve()
            if not any(target.is_relative_to(home) for home in homes):
                raise UserError(f"{path.name} is a link out of {root}: put the file itself there")
