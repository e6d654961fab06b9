"""Artifacts in a model catalogue of Windows ML: Windows downloads a model once for all apps that ask for it.

The format is Microsoft's "Windows ML Model Catalog Source schema reference" (learn.microsoft.com/windows/ai/
new-windows-ml/model-catalog/model-catalog-source): names of fields are those of its JSON.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    UrlConstraints,
    ValidationError,
)
from pydantic_core import Url
from qwen_common.artifact_folder import open_folder
from qwen_common.errors import UserError, one_line
from qwen_common.manifest import MANIFEST, BackendName, Manifest, file_entry
from qwen_common.providers import CPU, PROVIDERS

LARGE_BYTES = 10**9  # Microsoft advises packages of its own kind for larger files
_LICENCE = "LICENSE"
_Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
# An app, or Windows, may name a file or a folder after an entry: no separator, no character that is not seen.
_ID = re.compile(r"\w[\w .+()-]{0,199}")
_Https = TypeAdapter(Annotated[Url, UrlConstraints(allowed_schemes=["https"], host_required=True)])


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CatalogueFile(_Frozen):
    name: _Text
    uri: str
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class ExecutionProvider(_Frozen):
    """By ONNX Runtime's name."""

    name: _Text


class CatalogueModel(_Frozen):
    """One artifact. Variants of one model share the name, and an app that asks for it gets the first whose
    providers the machine has."""

    id: _Text
    name: _Text
    version: _Text
    publisher: _Text
    executionProviders: tuple[ExecutionProvider, ...] = Field(min_length=1)
    modelSizeBytes: int = Field(ge=0)
    license: _Text
    licenseUri: str
    licenseText: str | None = None
    uri: str
    files: tuple[CatalogueFile, ...] = Field(min_length=1)


class Catalogue(_Frozen):
    models: tuple[CatalogueModel, ...]


@dataclass(frozen=True)
class Publication:
    """What no artifact says of itself.

    Attributes:
        base_url: where the artifacts' folders lie, each under its own name; https.
        version: of every entry, such as 1.0.0.
        license: its short name, such as Apache-2.0.
    """

    base_url: str
    publisher: str
    version: str
    license: str
    license_uri: str


def catalogue(artifacts: Sequence[Path], publication: Publication) -> Catalogue:
    """Entries for `artifacts`, in their order; every file is compared with its manifest.

    Raises:
        UserError: an artifact is damaged, for the OpenVINO backend or has a name that no catalogue should
            have, two have one id, or something of `publication` is not valid.
    """
    for option, url in ("--base-url", publication.base_url), ("--license-uri", publication.license_uri):
        _check_url(option, url)
    if {*"?#"} & {*publication.base_url}:
        raise UserError("--base-url must end in a folder, without '?' or '#': files' names are put after it")
    opened = [open_folder(path, every=True) for path in artifacts]
    for_the_cpu = {_name(manifest) for manifest in opened if manifest["provider"] == CPU.key}
    try:
        models = [
            _model(path, manifest, publication, _name(manifest) not in for_the_cpu)
            for path, manifest in zip(artifacts, opened, strict=True)
        ]
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"'{first['loc'][0]}' of the catalogue: {first['msg']}") from error
    seen: set[str] = set()
    for model in models:
        if model.id in seen:
            raise UserError(f"two artifacts have the id {model.id}: publish one of them in another catalogue")
        seen.add(model.id)
    return Catalogue(models=tuple(models))


def large_files(models: Iterable[CatalogueModel], artifacts: Iterable[Path]) -> list[str]:
    """Files larger than Microsoft advises for this way of publishing."""
    return [
        f"{model.id}: {file.name}"
        for model, artifact in zip(models, artifacts, strict=True)
        for file in model.files
        if (artifact / file.name).stat().st_size > LARGE_BYTES
    ]


def _model(path: Path, manifest: Manifest, publication: Publication, with_cpu: bool) -> CatalogueModel:
    if manifest["backend"] != BackendName.ONNX:
        raise UserError(f"{path} is for the OpenVINO backend: Windows ML's catalogue is of ONNX models")
    name = _name(manifest)
    identity = f"{name}-{manifest['profile']}".lower()
    if not (_ID.fullmatch(name) and _ID.fullmatch(identity)):
        raise UserError(
            f"{path} has a model's name that no catalogue should have, {one_line(identity[:100])!r}: "
            "export it again, from a checkpoint with a profile, named in letters, digits and . + - ( ) only"
        )
    entries = {MANIFEST: file_entry(path / MANIFEST), **manifest["files"]}
    folder = f"{publication.base_url.rstrip('/')}/{quote(path.resolve().name)}"
    licence = path / _LICENCE
    return CatalogueModel(
        id=identity,
        name=name,
        version=publication.version,
        publisher=publication.publisher,
        executionProviders=tuple(ExecutionProvider(name=name) for name in _providers(manifest, with_cpu)),
        modelSizeBytes=sum(entry["size"] for entry in entries.values()),
        license=publication.license,
        licenseUri=publication.license_uri,
        licenseText=licence.read_text(encoding="utf-8", errors="replace") if _LICENCE in entries else None,
        uri=folder,
        files=tuple(
            CatalogueFile(name=name, uri=f"{folder}/{quote(name)}", sha256=entry["sha256"])
            for name, entry in entries.items()
        ),
    )


def _name(manifest: Manifest) -> str:
    return manifest["model"]["name"].rpartition("/")[2]


def _providers(manifest: Manifest, with_cpu: bool) -> list[str]:
    """Those that the artifact is made for. The CPU takes each artifact, but where the catalogue has a variant
    of the model that is made for it, that one shall be found."""
    keys = [
        manifest["provider"],
        *manifest["settings"].get("fallbacks", []),
        *([CPU.key] if with_cpu else []),
    ]
    return [PROVIDERS[key].onnxruntime_name for key in dict.fromkeys(keys) if key in PROVIDERS]


def _check_url(option: str, url: str) -> None:
    try:
        parts = _Https.validate_python(url)
    except ValidationError:
        valid = False
    else:
        if parts.username or parts.password:
            raise UserError(f"{option} holds a user's name or password, which the catalogue would publish")
        valid = url.isascii() and not {*' "<>\\^`{|}'} & {*url} and not re.search("%(?![0-9A-Fa-f]{2})", url)
    if not valid:
        raise UserError(
            f"{option} {one_line(url)!r} is no https address: write it as https://example.com/models"
        )
