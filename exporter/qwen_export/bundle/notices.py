"""Notices of other people's work, wheels and model: its licences, and a bill of materials."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from cyclonedx.model import AttachedText, HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import DisjunctiveLicense, License, LicenseExpression
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.spdx import fixup_id
from packageurl import PackageURL
from qwen_common.files import sha256
from qwen_common.manifest import MANIFEST
from qwen_runtime.artifact import Artifact

from qwen_export.bundle.licences import spdx
from qwen_export.bundle.wheels import Wheel

NOTICES, SBOM = "THIRD-PARTY-NOTICES.txt", "sbom.cdx.json"
_LICENCE_FILES = ("LICENSE", "LICENCE", "COPYING", "NOTICE", "AUTHORS", "THIRDPARTYNOTICES")
_VENDORED = "vendored.json"  # beside the files of others that a wheel has in it
_LINE = "=" * 80


@dataclass(frozen=True)
class Part:
    """Something that others made.

    Attributes:
        kind: cyclonedx.org's word for it.
        purl: github.com/package-url says how it is named; None for what has no name anywhere.
        sha256: of the file that it is in the bundle; of a model, its manifest, which has every file's.
        stated: what it says of its licence, the most exact first.
        text: of its licence files.
    """

    name: str
    version: str
    kind: ComponentType
    purl: PackageURL | None
    sha256: str
    stated: tuple[str, ...]
    text: str

    @property
    def licence(self) -> str:
        """An SPDX expression, or what is stated where that is none."""
        return spdx(self.stated, self.text) or next(iter(self.stated), "see its files")

    @property
    def component(self) -> Component:
        return Component(
            name=self.name,
            version=self.version,
            type=self.kind,
            purl=self.purl,
            licenses=[_licence(self)],
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=self.sha256)],
        )


def wheel_parts(wheel: Wheel, digest: str) -> list[Part]:
    """The wheel, and the JavaScript libraries that it says it has in it.

    Args:
        digest: SHA-256 of the wheel.
    """
    vendored = _vendored(wheel)
    others = {item["licence_file"] for item, _ in vendored}
    return [_wheel_part(wheel, digest, others), *(part for _, part in vendored)]


def _wheel_part(wheel: Wheel, digest: str, others: Collection[str]) -> Part:
    """Args:
    others: names of licence files that are not the wheel's own.
    """
    metadata = wheel.distribution.metadata
    classifiers = [
        text.rpartition(" :: ")[2]
        for text in metadata.get_all("Classifier") or []
        if text.startswith("License ::")
    ]
    stated = [
        *(metadata.get_all("License-Expression") or []),
        *(line.splitlines()[0] for line in metadata.get_all("License") or [] if line.strip()),
        *classifiers,
    ]
    texts = [
        wheel.text(path)
        for path in wheel.distribution.files or []
        if any(word in path.name.upper() for word in _LICENCE_FILES)
        and path.suffix != ".py"
        and path.name not in others
    ]
    purl = PackageURL("pypi", name=wheel.name, version=wheel.version)
    return Part(
        wheel.name, wheel.version, ComponentType.LIBRARY, purl, digest, tuple(stated), "\n\n".join(texts)
    )


def _vendored(wheel: Wheel) -> list[tuple[dict[str, str], Part]]:
    """What the wheel's `vendored.json` files list, and as parts."""
    found = []
    for path in wheel.distribution.files or []:
        if path.name != _VENDORED:
            continue
        for item in json.loads(wheel.text(path)):
            text = wheel.text(path.parent / item["licence_file"])
            purl = PackageURL("npm", name=item["name"], version=item["version"])
            part = Part(
                item["name"],
                item["version"],
                ComponentType.LIBRARY,
                purl,
                item["sha256"],
                (item["licence"],),
                text,
            )
            found.append((item, part))
    return found


def model_part(artifact: Artifact) -> Part:
    """The model, whose licence files came along from the checkpoint."""
    source, model = artifact.manifest["source"], artifact.manifest["model"]
    owner, _, name = source["checkpoint"].rpartition("/")
    revision = source["revision"]
    purl = PackageURL("huggingface", owner or None, name, revision) if revision else None
    texts = [
        (artifact.root / name).read_text(encoding="utf-8", errors="replace")
        for name in sorted(artifact.manifest["files"])
        if Path(name).stem.upper() in _LICENCE_FILES
    ]
    return Part(
        model["name"],
        revision or "unknown",
        ComponentType.MACHINE_LEARNING_MODEL,
        purl,
        sha256(artifact.root / MANIFEST),
        (),
        "\n\n".join(texts),
    )


def cpython_part(folder: Path, version: str) -> Part:
    """CPython in a folder, whose program stands for it."""
    text = (folder / "LICENSE.txt").read_text(encoding="utf-8", errors="replace")
    purl = PackageURL("generic", name="cpython", version=version)
    digest = sha256(folder / "python.exe")
    return Part("CPython", version, ComponentType.PLATFORM, purl, digest, ("Python-2.0.1",), text)


def write_notices(folder: Path, name: str, version: str, parts: Iterable[Part]) -> None:
    """Write the licences' texts and the bill of materials of a bundle."""
    parts = list(parts)
    (folder / NOTICES).write_text(licence_texts(parts), encoding="utf-8")
    (folder / SBOM).write_text(bill_of_materials(name, version, parts), encoding="utf-8")


def licence_texts(parts: Iterable[Part]) -> str:
    """Name, version, licence and the licence files' text of each."""
    return "\n\n".join(
        f"{_LINE}\n{part.name} {part.version}: {part.licence}\n{_LINE}\n\n{part.text}" for part in parts
    )


def bill_of_materials(name: str, version: str, parts: Iterable[Part]) -> str:
    """CycloneDX 1.6 as JSON (cyclonedx.org)."""
    bom = Bom()
    whole = Component(name=name, version=version, type=ComponentType.APPLICATION)
    bom.metadata.component = whole
    components = [part.component for part in parts]
    bom.components.update(components)
    bom.register_dependency(whole, components)
    return JsonV1Dot6(bom).output_as_string(indent=2) + "\n"


def _licence(part: Part) -> License:
    expression = spdx(part.stated, part.text)
    if expression is None:
        text = AttachedText(content=part.text) if part.text else None
        return DisjunctiveLicense(name=part.licence, text=text)
    if fixup_id(expression) == expression:
        return DisjunctiveLicense(id=expression)
    return LicenseExpression(expression)
