"""A checkpoint from the Hugging Face hub: which files are downloaded, and what may lie in their folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from qwen_common.errors import UserError

from qwen_export.checkpoint.streamed import StreamedShards

_SHARDS = "*.safetensors"
_TEXT_FILES = ["*.json", "*.jinja", "merges.txt", "LICENSE", "NOTICE"]
_FILES = [_SHARDS, *_TEXT_FILES]


def hub_id(source: str, revision: str | None) -> tuple[str, str | None]:
    """Repository and revision of `org/name` or `org/name@revision`.

    Raises:
        UserError: `source` has a revision, and `revision` is another one.
    """
    repo, at, named = source.partition("@")
    if not at:
        return repo, revision
    if not named or (revision and revision != named):
        other = f", and --revision says {revision}: give one of them" if revision else ": it has no revision"
        raise UserError(f"{source}{other}")
    return repo, named


def download(
    source: str,
    revision: str | None,
    file: str | None = None,
    others: Iterable[str] = (),
    patterns: Sequence[str] = _FILES,
) -> Path:
    """The folder of the hub's snapshot, which is named after its commit.

    Args:
        source: a hub id such as `Qwen/Qwen3.5-0.8B`, or with a revision, `Qwen/Qwen3.5-0.8B@main`.
        revision: branch, tag or commit; None takes the default branch.
        file: the one file that is wanted; None downloads all that a checkpoint is made of.
        others: what the user could have named instead, for the message.
        patterns: the files to download, where `file` names none.

    Raises:
        UserError: `source` is no hub id, or the hub did not give it.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    repo, revision = hub_id(source, revision)
    if repo.startswith((".", "~", "/")) or repo.count("/") != 1 or "\\" in repo:
        choices = ["a checkpoint folder", "a hub id like Qwen/Qwen3.5-0.8B"]
        named = ", ".join(others)
        what = f"{', '.join(choices)}, or one of {named}" if named else " or ".join(choices)
        raise UserError(f"no folder {source}: give {what}")
    try:
        if file:
            return Path(hf_hub_download(repo, file, revision=revision)).parent
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns))).resolve()
    except Exception as error:  # the library's own errors, and those of whichever HTTP client it uses
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"no folder {source}, and the hub did not give {f'its {file}' if file else 'it'} ({reason}): "
            "check name and network"
        ) from error


def stream(source: str, revision: str | None) -> tuple[Path, StreamedShards | None]:
    """As `download`, but without the shards, which are fetched when they are read.

    Returns:
        The folder, and the shards; None where the hub cannot be asked, and its cache has them all.

    Raises:
        UserError: as `download`.
    """
    from huggingface_hub import HfApi

    root = download(source, revision, patterns=_TEXT_FILES)
    repo, _ = hub_id(source, revision)
    try:
        files = HfApi().model_info(repo, revision=root.name, files_metadata=True).siblings or []
    except Exception:  # HF_HUB_OFFLINE, or no network: `download` has the message, if there must be one
        return download(source, revision), None
    sizes = {
        file.rfilename: file.size
        for file in files
        if file.size and "/" not in file.rfilename and Path(file.rfilename).match(_SHARDS)
    }
    return root, StreamedShards(repo, root, sizes)


def text_files(root: Path) -> list[Path]:
    """What a checkpoint's folder has beside its weights."""
    return [path for pattern in _TEXT_FILES for path in root.glob(pattern) if path.is_file()]


def refuse_links_out(root: Path) -> None:
    """No link brings a file from elsewhere into an artifact; a hub snapshot links into its own cache.

    Raises:
        UserError: names the first link that leads out of `root`.
    """
    homes = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    for pattern in _FILES:
        for path in root.glob(pattern):
            target = Path(os.path.realpath(path))  # even where links circle
            if not any(target.is_relative_to(home) for home in homes):
                raise UserError(f"{path.name} is a link out of {root}: put the file itself there")
