"""Adapters that answers may be made with, each with its own: the artifact's, and those of other files.

The graph has inputs A [K, rank] and B [rank, N] for each projection that an adapter of the artifact changes,
and a file in ONNX Runtime's format has values for them, or for some.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from qwen_common.errors import UserError, one_line
from qwen_common.files import sha256
from qwen_common.manifest import ADAPTER_NAME, ADVICE, BackendName

from qwen_runtime.artifact import Artifact

_A, _B = ".lora_A", ".lora_B"
_AGAIN = "make it with qwen-export adapter"
_MARKED = 1 << 62  # no token's id has this bit


@dataclass(frozen=True, eq=False)
class SwitchedAdapter:
    """One adapter, whose file was found sound and to fit.

    Attributes:
        factors: onnxruntime's OrtValues, by input of the graph.
        mark: a number of its contents, which tells states that were read with it from all others; int64.
    """

    name: str
    path: Path
    factors: Mapping[str, Any]
    mark: int
    _mapped: Any = field(repr=False)  # onnxruntime's AdapterFormat, in whose memory the factors are


def adapter_files(artifact: Artifact, given: Mapping[str, str | Path]) -> dict[str, Path]:
    """Those that a model of `artifact` may answer with: its own, then those of `given`. Reads none of them.

    Raises:
        UserError: a name is none, or is there twice; there is no such file; or the artifact takes none.
    """
    manifest = artifact.manifest
    found = {own["name"]: artifact.root / own["file"] for own in manifest.get("switched_adapters", [])}
    if given and not found:
        raise takes_none(artifact)
    own = dict(found)
    for name, file in given.items():
        path = Path(file)
        if not ADAPTER_NAME.fullmatch(name):
            raise UserError(
                f"an adapter cannot be called '{one_line(name)}': take letters, digits, '.', '_' and '-'"
            )
        if path.is_dir():
            raise UserError(f"{path} is a folder, and an adapter is a file NAME.onnx_adapter: {_AGAIN}")
        if not path.is_file():
            raise UserError(f"there is no adapter {path}: give a file NAME.onnx_adapter")
        if name in own and not path.samefile(own[name]):
            raise UserError(f"two adapters are called {name}: {artifact.root} has one, give another name")
        found[name] = path
    return found


def takes_none(artifact: Artifact) -> UserError:
    option = "--adapter" if artifact.backend == BackendName.OPENVINO else "--adapter-at-runtime"
    return UserError(f"{artifact.root} takes no adapters at run time: export it again with {option}")


def no_adapter(artifact: Artifact, name: str | None, names: Iterable[str]) -> UserError:
    """Args:
    names: those that there are.
    """
    has = ", ".join(names) or "none: export it again with --adapter-at-runtime"
    return UserError(f"{artifact.root} has no adapter {one_line(name or '')}, it has {has}")


def load_adapters(artifact: Artifact, given: Mapping[str, str | Path]) -> dict[str, SwitchedAdapter]:
    """The adapters of `adapter_files`, checked before a model is loaded.

    Raises:
        UserError: as there; or one is damaged, has values that are no numbers, or is for another model.
    """
    own = adapter_files(artifact, {})
    inputs: dict[str, Any] = {}
    found: dict[str, SwitchedAdapter] = {}
    for name, path in adapter_files(artifact, given).items():
        adapter = _read(name, path, ADVICE if name in own else _AGAIN)
        if name in own:  # together they have every input of the graph
            inputs = {**adapter.factors, **inputs}
        found[name] = adapter
    for adapter in found.values():
        _check_fits(adapter, inputs, artifact)
    return found


def _read(name: str, path: Path, advice: str) -> SwitchedAdapter:
    import onnxruntime as ort

    try:
        mark = int(sha256(path)[:16], 16) >> 2 | _MARKED
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {advice}") from error
    try:
        mapped = ort.AdapterFormat.read_adapter(str(path))
        factors = dict(mapped.get_parameters())
    except Exception as error:
        raise UserError(f"{path} is no adapter that ONNX Runtime reads: {advice}") from error
    if not factors:
        raise UserError(f"{path} changes nothing: {advice}")
    for key, value in factors.items():
        shape = value.shape()
        if len(shape) != 2 or value.data_type() not in ("tensor(float)", "tensor(float16)"):
            raise UserError(f"{path} has {one_line(key)} as {value.data_type()} {shape}: {advice}")
        if not np.isfinite(value.numpy()).all():
            raise UserError(f"{path} has values in {one_line(key)} that are no numbers: {advice}")
    return SwitchedAdapter(name, path, factors, mark, mapped)


def _check_fits(adapter: SwitchedAdapter, inputs: Mapping[str, Any], artifact: Artifact) -> None:
    for key, value in adapter.factors.items():
        if key not in inputs:
            raise UserError(
                f"{adapter.path} changes {one_line(key)}, and no adapter of {artifact.root} does: it is for "
                "another model, or export the artifact again with it"
            )
        if _fixed(key, value) != _fixed(key, inputs[key]):
            raise UserError(
                f"{adapter.path} is for another model than {artifact.root}: {one_line(key)} is "
                f"{value.data_type()} {value.shape()}, there {inputs[key].data_type()} {inputs[key].shape()}"
            )
        other = _other(key)
        if other not in adapter.factors or _rank(key, value) != _rank(other, adapter.factors[other]):
            raise UserError(f"{adapter.path} has {one_line(key)} without what belongs to it: {_AGAIN}")


def _other(key: str) -> str:
    """The factor that belongs to a factor."""
    return re.sub(f"({re.escape(_A)}|{re.escape(_B)})$", lambda end: _B if end[1] == _A else _A, key)


def _rank(key: str, value: Any) -> int:
    return int(value.shape()[1 if key.endswith(_A) else 0])


def _fixed(key: str, value: Any) -> tuple[str, int]:
    """What every adapter's has alike: all but the rank."""
    return value.data_type(), int(value.shape()[0 if key.endswith(_A) else 1])
