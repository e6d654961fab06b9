"""An artifact's folder is data, whoever gave it away: nothing in it names code, or a file elsewhere.

A manifest proves nothing against somebody who writes a new one, so what the libraries read is looked at, too,
before they see it.
"""

from __future__ import annotations

import fnmatch
from pathlib import Path

from qwen_common import manifest as manifests
from qwen_common.errors import UserError, one_line
from qwen_common.files import read_json
from qwen_common.genai_config import check_config
from qwen_common.manifest import ADVICE, GENAI_CONFIG, MANIFEST, BackendName, Manifest
from qwen_common.onnx_references import references

# Whatever else lies in the folder might be read by a library that finds it by its name. These are not: notes,
# pictures, the reports of a verification that was cut short, and what systems leave in every folder.
_NOTES = (".*", "*.md", "*.png", "report.json", "Thumbs.db", "desktop.ini")
_GRAPHS, _CONFIGS, _IR = "*.onnx", "genai_config*.json", "*.xml"
_DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})
# They load or run what a graph brings along, in a form of their own.
_REFUSED = frozenset({"EPContext", "Snpe", "PythonOp", "PythonOpGrad", "ATen"})
_IR_STARTS = (b"<?xml", b"<net")
_SHOWN = 100


def open_folder(artifact: Path, every: bool = False) -> Manifest:
    """The manifest of the artifact in a folder, after its files were looked at.

    Args:
        every: compare the SHA-256 of every file with the manifest's, whatever its size.

    Raises:
        UserError: as `manifest.read` and `manifest.check_files`; or a file is not listed, or says more than
            an artifact may: a library, an option that is not on the list, a file outside of the manifest.
    """
    manifest = manifests.read(artifact)
    manifests.check_files(artifact, manifest, every)
    listed = manifest["files"]
    _check_unlisted(artifact, manifest)
    if manifest["backend"] == BackendName.OPENVINO:
        check_config(manifest["runtime"], artifact / MANIFEST, listed, "runtime")
        for name in fnmatch.filter(listed, _IR):
            _check_ir(artifact / name)
        return manifest
    configs = {GENAI_CONFIG, *fnmatch.filter(listed, _CONFIGS)}
    configs |= {further["overlay"] for further in manifest.get("further_graphs", [])}
    for name in sorted(configs):
        check_config(read_json(artifact / name, ADVICE), artifact / name, listed)
    for name in fnmatch.filter(listed, _GRAPHS):
        _check_graph(artifact / name, manifest)
    return manifest


def _check_unlisted(artifact: Path, manifest: Manifest) -> None:
    if (artifact / MANIFEST).is_symlink():
        raise UserError(f"{artifact / MANIFEST} is a link: {ADVICE}")
    for path in sorted(artifact.iterdir()):
        known = path.name in manifest["files"] or path.name == MANIFEST
        note = any(fnmatch.fnmatchcase(path.name, pattern) for pattern in _NOTES)
        if not known and not note and not path.is_dir():
            raise UserError(
                f"{_shown(path.name)} is in {artifact} and not in its manifest: move it, or {ADVICE}"
            )


def _check_graph(path: Path, manifest: Manifest) -> None:
    try:
        found = references(path)
    except ValueError as error:
        raise UserError(f"{path} is no ONNX graph ({error}): {ADVICE}") from error
    for location in sorted(found.locations - manifest["files"].keys()):
        raise UserError(f"{path} takes weights from {_shown(location)}, which is not listed: {ADVICE}")
    unknown = [f"{domain}::*" for domain in sorted(found.domains - _DOMAINS)]
    for operator in [*sorted(found.operators & _REFUSED), *unknown]:
        raise UserError(f"{path} has the operator {_shown(operator)}, which an artifact may not: {ADVICE}")


def _check_ir(path: Path) -> None:
    """OpenVINO tries its readers one after the other, by what is in the file: this is none but its own."""
    with path.open("rb") as file:
        if not file.read(16).startswith(_IR_STARTS):
            raise UserError(f"{path} is no OpenVINO IR: {ADVICE}")


def _shown(text: str) -> str:
    return one_line(text[:_SHOWN])
