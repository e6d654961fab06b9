"""Weights in the layout that this CPU's kernels want, saved, so that they are mapped and not copied.

ONNX Runtime repacks quantised weights into memory of its own whenever a model is loaded. It can write them to
a file beside the graph, and a graph that has such a file maps it: the pages are the page cache's, shared by
all processes and dropped where memory is short, so that a model larger than the memory runs at the pace of
the disk. The file holds the weights twice, as they were and repacked. While it loads, ONNX Runtime repacks
again and compares: another CPU's layout is not taken, and what differs otherwise is refused. The weights as
they were are compared as an artifact's are: sizes always, and every byte on demand.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen_common.errors import UserError
from qwen_common.files import as_json, sha256
from qwen_common.manifest import MANIFEST, BackendName, file_entry
from qwen_common.providers import CPU

from qwen_runtime.artifact import Artifact, check_path
from qwen_runtime.resident import release_freed

_log = logging.getLogger(__name__)

GRAPH = "model.onnx"
_DATA = "model.onnx.data"
_FILES = "files.json"  # size and SHA-256 of both
_INLINE_BYTES = 1024  # smaller tensors stay in the graph
_TIMES = 2.1  # of the artifact's size: both forms, with floats for each block
_PARTIAL = ".partial"
_DAMAGED = "pre-packed weights"  # ONNX Runtime, of a file that its kernels do not agree with


def with_prepacked(artifact: Artifact, provider: str, folder: Path, verify: bool) -> Artifact:
    """`artifact` with the decoder's weights as saved below `folder`, where they are written first if need be,
    with the memory of a load without them.

    Args:
        provider, verify: as in `Model.load`.

    Raises:
        UserError: it does not run on the CPU, the disk has no room, the folder cannot be written, or its
            files are not those that were written.
    """
    wanted = artifact.manifest["provider"] if provider == "auto" else provider
    if artifact.backend == BackendName.OPENVINO or wanted != CPU.key:
        raise UserError(
            "prepacked weights are ONNX Runtime's for the CPU: take --provider cpu, or leave them off"
        )
    home = folder.resolve() / _name(artifact)
    try:
        # ONNX Runtime GenAI puts the artifact's folder before the name of a graph.
        graph = Path(os.path.relpath(home / GRAPH, artifact.root.resolve()))
    except ValueError as error:
        raise UserError(
            f"{folder} is on another drive than {artifact.root}: choose one on the same"
        ) from error
    check_path(graph)
    try:
        if not home.is_dir():
            _write(artifact, home)
        _check(home, verify)
    except OSError as error:
        raise UserError(
            f"no prepacked weights can be kept in {folder} ({error.strerror}): choose another"
        ) from error
    return replace(artifact, prepacked=graph)


def damaged(artifact: Artifact, error: Exception) -> UserError | None:
    """What to say where loading failed because the saved weights are not those that the kernels made."""
    if artifact.prepacked is None or _DAMAGED not in str(error):
        return None
    return _damage(artifact.folders[-1])


def _damage(home: Path) -> UserError:
    return UserError(f"prepacked weights are damaged: delete {home}, and they are written again")


def _name(artifact: Artifact) -> str:
    """Another one for another artifact, ONNX Runtime or kind of CPU."""
    import onnxruntime

    made = f"{sha256(artifact.root / MANIFEST)} {onnxruntime.__version__} {_cpu()}"
    return hashlib.sha256(made.encode()).hexdigest()[:16]


def _cpu() -> str:
    """What kernels are chosen by, as far as the system tells without asking the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _write(artifact: Artifact, home: Path) -> None:
    import psutil  # here, because other loads do without it

    needed = int(_TIMES * sum(entry["size"] for entry in artifact.manifest["files"].values()))
    home.parent.mkdir(parents=True, exist_ok=True)
    for left in home.parent.glob(f".{home.name}.*{_PARTIAL}"):  # by a process that was killed
        maker = int(left.name.split(".")[-2])
        if maker == os.getpid() or not psutil.pid_exists(maker):  # containers give the same numbers again
            shutil.rmtree(left, ignore_errors=True)
    free = shutil.disk_usage(home.parent).free
    if free < needed:
        raise UserError(
            f"prepacked weights need {needed / 1e9:.1f} GB and {home.parent} has {free / 1e9:.1f} GB free: "
            "free some space, or choose another disk"
        )
    _log.warning("writing prepacked weights to %s, once: %.1f GB", home, needed / 1e9)
    partial = home.with_name(f".{home.name}.{os.getpid()}{_PARTIAL}")
    partial.mkdir(mode=0o700)
    try:
        _save(artifact, partial)
        entries = {path.name: file_entry(path) for path in sorted(partial.iterdir())}
        (partial / _FILES).write_bytes(as_json(entries))
        if not home.is_dir():  # another process may have been quicker
            partial.rename(home)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        release_freed()


def _check(home: Path, every: bool) -> None:
    """Sizes, and SHA-256 if `every`."""
    try:
        entries = json.loads((home / _FILES).read_text(encoding="utf-8"))
        for name in (GRAPH, _DATA):
            size, digest = entries[name]["size"], entries[name]["sha256"]
            whole = (home / name).stat().st_size == size and not (every and sha256(home / name) != digest)
            if not whole:
                raise _damage(home)
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise _damage(home) from error


def _save(artifact: Artifact, folder: Path) -> None:
    import onnxruntime as ort

    options: Any = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / GRAPH)
    entries = {
        "session.save_external_prepacked_constant_initializers": "1",
        "session.optimized_model_external_initializers_file_name": _DATA,
        "session.optimized_model_external_initializers_min_size_in_bytes": str(_INLINE_BYTES),
    }
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    ort.InferenceSession(artifact.root / artifact.decoder(CPU.key), options, providers=[CPU.onnxruntime_name])
