"""Notices of other people's software: its licences, and a bill of materials."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import DisjunctiveLicense
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from qwen_export.bundle.wheels import Wheel

_LICENCE_FILES = ("LICENSE", "LICENCE", "COPYING", "NOTICE", "AUTHORS", "THIRDPARTYNOTICES")


def licence_texts(wheels: Iterable[Wheel]) -> str:
    """Name, version, licence and the licence files' text of every wheel."""
    parts = []
    for wheel in wheels:
        distribution = wheel.distribution
        parts.append(f"{'=' * 80}\n{wheel.name} {wheel.version}: {licence(wheel)}\n{'=' * 80}")
        for path in distribution.files or []:
            if any(word in path.name.upper() for word in _LICENCE_FILES) and path.suffix != ".py":
                parts.append(distribution.read_text(_within(str(path))) or "")
    return "\n\n".join(parts) + "\n"


def _within(path: str) -> str:
    """A path of the wheel, relative to its .dist-info folder, as Distribution.read_text takes it."""
    return path.partition(".dist-info/")[2] if ".dist-info/" in path else f"../{path}"


def licence(wheel: Wheel) -> str:
    """What the wheel says of its licence, in a word or two."""
    metadata = wheel.distribution.metadata
    classifiers = [
        text.rpartition(" :: ")[2]
        for text in metadata.get_all("Classifier") or []
        if text.startswith("License ::")
    ]
    stated = [*(metadata.get_all("License-Expression") or []), *classifiers]
    stated += metadata.get_all("License") or []
    return str(stated[0]).splitlines()[0] if stated else "see its files"


def bill_of_materials(name: str, version: str, wheels: Iterable[Wheel], hashes: dict[str, str]) -> str:
    """CycloneDX 1.6 as JSON (cyclonedx.org).

    Args:
        hashes: SHA-256 by wheel file name.
    """
    bom = Bom()
    whole = Component(name=name, version=version, type=ComponentType.APPLICATION)
    bom.metadata.component = whole
    parts = [
        Component(
            name=wheel.name,
            version=wheel.version,
            type=ComponentType.LIBRARY,
            purl=PackageURL("pypi", name=wheel.name, version=wheel.version),
            licenses=[DisjunctiveLicense(name=licence(wheel))],
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=hashes[wheel.path.name])],
        )
        for wheel in wheels
    ]
    bom.components.update(parts)
    bom.register_dependency(whole, parts)
    return JsonV1Dot6(bom).output_as_string(indent=2) + "\n"


def write_notices(folder: Path, name: str, version: str, wheels: list[Wheel], hashes: dict[str, str]) -> None:
    (folder / "THIRD-PARTY-NOTICES.txt").write_text(licence_texts(wheels), encoding="utf-8")
    (folder / "sbom.cdx.json").write_text(bill_of_materials(name, version, wheels, hashes), encoding="utf-8")
