"""An artifact to an OCI registry: one layer for each file."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from qwen_common.artifact_folder import open_folder
from qwen_common.errors import UserError
from qwen_common.manifest import MANIFEST, FileEntry, Manifest, file_entry
from qwen_runtime.fetch import tenths
from qwen_runtime.registry import image
from qwen_runtime.registry.reference import Reference
from qwen_runtime.registry.registry import Registry, digest_of


@dataclass(frozen=True)
class RegistryPush:
    """What is to be done.

    Attributes:
        image: the manifest that the registry will have.
        files: of the artifact, by name.
        missing: names of those that the registry has not yet.
    """

    registry: Registry
    image: bytes
    files: Mapping[str, FileEntry]
    missing: Sequence[str]

    @property
    def digest(self) -> str:
        """Of `image`: the same artifact has the same one, wherever it is pushed."""
        return digest_of(self.image)


def destination(name: str) -> Reference:
    """Raises:
    UserError: nothing can be pushed to `name`.
    """
    reference = Reference.parse(name)
    if reference.tag is None or reference.digest is not None:
        raise UserError(f"{reference} is no place to push to: give oci://{reference.repository}:TAG")
    return reference


def plan(artifact: Path, name: str, plain_http: bool, note: Callable[[str], None]) -> RegistryPush:
    """Look at both sides; changes nothing.

    Args:
        name: `oci://HOST/NAME:TAG`.
        plain_http: without TLS, also to other machines.
        note: told a line where the registry does not answer and is asked again, also by `push`.

    Raises:
        UserError: no such name, not an artifact, a damaged one, or the registry does not answer.
    """
    reference = destination(name)
    manifest = open_folder(artifact, every=True)
    files = {**manifest["files"], MANIFEST: file_entry(artifact / MANIFEST)}
    registry = Registry(reference, note, push=True, plain_http=plain_http)
    missing = [file for file, entry in files.items() if not registry.has(entry)]
    return RegistryPush(registry, image.build(files, _annotations(manifest)), files, missing)


def push(artifact: Path, planned: RegistryPush, note: Callable[[str], None]) -> None:
    """Send what `plan` found missing, and then give the tag to the whole.

    Args:
        note: told lines about how far it is.

    Raises:
        UserError: the registry refuses, or does not answer. Files that were sent need not be sent again.
    """
    tell = tenths("pushing", sum(planned.files[name]["size"] for name in planned.missing), note)
    done = 0
    for name in planned.missing:
        entry = planned.files[name]
        with (artifact / name).open("rb") as file:
            planned.registry.upload(file, entry, partial(_count, tell, done))
        done += entry["size"]
    if not planned.registry.has(image.EMPTY_ENTRY):
        planned.registry.upload(io.BytesIO(image.EMPTY), image.EMPTY_ENTRY, lambda _: None)
    planned.registry.put(planned.image)


def _count(tell: Callable[[int], None], before: int, sent: int) -> None:
    tell(before + sent)


def _annotations(manifest: Manifest) -> dict[str, str]:
    """Of the manifest's own words alone, so that the same artifact is the same image."""
    model, profile, source = manifest["model"]["name"], manifest["profile"], manifest["source"]
    made = f"{model} for {profile}, made with qwen-edge {manifest['qwen_edge']} from {source['checkpoint']}"
    found = {"title": f"{model}-{profile}", "description": made, "revision": source["revision"]}
    return {f"org.opencontainers.image.{name}": value for name, value in found.items() if value}
