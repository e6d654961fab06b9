"""An artifact from a registry into a folder, which appears when it is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from qwen_common.artifact_folder import open_folder
from qwen_common.errors import UserError, mended_by, one_line
from qwen_common.files import partial, replace, sha256
from qwen_common.manifest import MANIFEST, FileEntry, check_files
from qwen_common.manifest import read as read_manifest
from qwen_common.replacing import FILE_MANAGERS, REPLACED, check_replaceable, put_in_place

from qwen_runtime.fetch import tenths
from qwen_runtime.registry import image
from qwen_runtime.registry.reference import Reference
from qwen_runtime.registry.registry import Registry

_ADVICE = "give a folder that is not there yet"
_LOCK, _DIGEST, _STAGED = "lock", "digest", "pulled"  # in the hidden folder, beside the one that is wanted
_MOST_MANIFEST = 16 * 1024 * 1024  # bytes of the artifact's own manifest
_KEPT_FREE = 16 * 1024 * 1024


@dataclass(frozen=True)
class Pulled:
    """Attributes:
    digest: of the manifest in the registry; the same artifact can be had by it again.
    files: by name.
    fetched: bytes that came.
    new: whether the folder was not there before, with the same content.
    """

    digest: str
    files: Mapping[str, FileEntry]
    fetched: int
    new: bool


def pull(
    reference: Reference,
    folder: Path,
    note: Callable[[str], None],
    plain_http: bool = False,
    force: bool = False,
    verify: bool = False,
) -> Pulled:
    """Make `folder` from what `reference` names; a folder that is the same already is left as it is.

    A tag is looked up once. Every file is compared with its SHA-256 while it is written. What was interrupted
    lies in a hidden folder beside `folder`, and is gone on with.

    Args:
        note: told lines about how far it is.
        plain_http: without TLS, also to other machines.
        force: whether another artifact may be replaced. Its files that are the same are not fetched again.
        verify: compare every file of a folder that is there already, whatever its size.

    Raises:
        UserError: there is no such artifact, something else is in `folder`, there is no room for it, the
            registry does not answer, or it is no artifact that may be opened.
    """
    folder = Path(os.path.abspath(folder))
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder} is a link or a file: {_ADVICE}")
    registry = Registry(reference, note, plain_http=plain_http)
    data, digest = registry.manifest()
    files = image.read(data, f"{reference}")
    if MANIFEST not in files or files[MANIFEST]["size"] > _MOST_MANIFEST:
        raise UserError(f"{reference} has no {MANIFEST}: it is no artifact that qwen-export pushed")
    if folder.exists() and any(folder.iterdir()):
        if _is_same(folder, files[MANIFEST], force, verify):
            _check_layers(files, folder, reference)
            return Pulled(digest, files, 0, new=False)
        if not force:
            raise UserError(
                f"{folder} has something else than {reference}: {_ADVICE}, or replace an artifact with "
                "--force"
            )
        check_replaceable(folder, _ADVICE)
    work = partial(folder)
    _open_work(work)
    try:
        with FileLock(work / _LOCK, timeout=0):
            _clear(work, files, digest)
            fetched = _fill(work / _STAGED, files, registry, folder, note)
            open_folder(work / _STAGED)
            put_in_place(work / _STAGED, folder, _ADVICE)
    except Timeout as error:
        raise UserError(f"{folder} is being pulled by another qwen-run: wait for it") from error
    shutil.rmtree(work, ignore_errors=True)
    return Pulled(digest, files, fetched, new=True)


def _is_same(folder: Path, manifest: FileEntry, force: bool, verify: bool) -> bool:
    """Whether `folder` is the artifact with that manifest.

    Raises:
        UserError: it was, and its files changed; not where they may be replaced.
    """
    if not _is_whole(folder / MANIFEST, manifest):
        return False
    try:
        check_files(folder, read_manifest(folder), every=verify)
    except UserError as error:
        if force:
            return False
        raise UserError(f"{folder} was this artifact and changed since: mend it with --force") from error
    return True


def _open_work(work: Path) -> None:
    """Raises:
    UserError: something of somebody else's has the name of the hidden folder, or it cannot be made.
    """
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        raise UserError(f"{work} is in the way: move it elsewhere")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(mended_by(error) or f"cannot write {work}: {error.strerror}") from error
    found = {path.name for path in work.iterdir()} - FILE_MANAGERS
    ours = {_LOCK, _DIGEST, partial(work / _DIGEST).name, _STAGED, REPLACED}
    if strange := sorted(found - ours) or sorted(found if _LOCK not in found else ()):
        raise UserError(f"{work} has {strange[0]}, which no pull made: move it elsewhere")


def _clear(work: Path, files: Mapping[str, FileEntry], digest: str) -> None:
    """Remove what an interrupted pull left and this one cannot use.

    Beginnings of files are of use where it was the same image: else they might be anything's.
    """
    staged, known = work / _STAGED, work / _DIGEST
    staged.mkdir(exist_ok=True)
    same = known.is_file() and known.read_bytes() == digest.encode()
    for path in staged.iterdir():
        entry = files.get(path.name)
        if path.is_symlink() or entry is None or not (same or _is_whole(path, entry)):
            path.unlink()
    replace(known, digest.encode())


def _fill(
    staged: Path,
    files: Mapping[str, FileEntry],
    registry: Registry,
    older: Path,
    note: Callable[[str], None],
) -> int:
    """Make `staged` the folder of exactly `files`; what is right of its content is kept.

    Args:
        older: an artifact that will be replaced, whose files are taken where they are the same.

    Returns:
        Bytes that came.
    """
    # The smallest of all says what the others must be, before any of them comes.
    _fetch(registry, files[MANIFEST], staged / MANIFEST, lambda _: None)
    _check_layers(files, staged, registry.reference)
    others = {name: entry for name, entry in files.items() if name != MANIFEST}
    known = _known(older)
    missing = {
        name: entry
        for name, entry in others.items()
        if not _is_whole(staged / name, entry) and not _take(known.get(entry["sha256"]), entry, staged / name)
    }
    have = sum((staged / name).stat().st_size for name in missing if (staged / name).exists())
    total = sum(entry["size"] for entry in missing.values()) - have
    if (free := shutil.disk_usage(staged).free) < total + _KEPT_FREE:
        raise UserError(
            f"{total + _KEPT_FREE:,} bytes are still to come and {staged.parent.parent} has {free:,} free: "
            "make room for it"
        )
    came = 0
    tell = tenths("pulling", total, note)

    def count(size: int) -> None:
        nonlocal came
        came += size
        tell(min(came, total))

    for name, entry in missing.items():
        _fetch(registry, entry, staged / name, count)
    return came


def _check_layers(files: Mapping[str, FileEntry], folder: Path, reference: Reference) -> None:
    """Raises:
    UserError: the registry has other files than the manifest in `folder` lists.
    """
    listed: Mapping[str, FileEntry] = {**read_manifest(folder)["files"], MANIFEST: files[MANIFEST]}
    for name in sorted(files.keys() | listed.keys()):
        if files.get(name) != listed.get(name):
            raise UserError(
                f"{reference} and its {MANIFEST} do not agree about {one_line(name)}: push it again"
            )


def _known(folder: Path) -> dict[str, Path]:
    """The files of an artifact by the SHA-256 that they should have."""
    try:
        return {entry["sha256"]: folder / name for name, entry in read_manifest(folder)["files"].items()}
    except UserError:
        return {}


def _take(path: Path | None, entry: FileEntry, to: Path) -> bool:
    """Whether the older artifact's file is right, and has another name here now."""
    if to.exists() and to.stat().st_nlink > 1:
        to.unlink()  # taken before, and changed in the older artifact since: that one is not written to
    if path is None or path.is_symlink() or not _is_whole(path, entry):
        return False
    try:
        os.link(path, partial(to))
    except OSError:  # a file system without links
        return False
    os.replace(partial(to), to)
    return True


def _is_whole(path: Path, entry: FileEntry) -> bool:
    return path.is_file() and path.stat().st_size == entry["size"] and sha256(path) == entry["sha256"]


def _fetch(registry: Registry, entry: FileEntry, to: Path, count: Callable[[int], None]) -> None:
    if _is_whole(to, entry):
        return
    registry.fetch(entry, to, count)
    with to.open("r+b") as file:
        os.fsync(file.fileno())  # its bytes are on the disk before the folder has its name
