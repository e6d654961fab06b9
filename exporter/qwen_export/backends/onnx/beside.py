"""Adapters for an artifact that is there already, each in a file of its own; the artifact stays as it is."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from qwen_common.errors import UserError
from qwen_runtime.artifact import Artifact
from qwen_runtime.switched import load_adapters, takes_none

from qwen_export.adapters.switched import adapter_file, with_switched_adapters
from qwen_export.backends.onnx.graphs import build_graphs
from qwen_export.backends.onnx.switched import check_switched, write_switched
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.recorded import recorded_profile


def write_beside(artifact: Path, checkpoint: Checkpoint, given: Sequence[str], folder: Path) -> list[Path]:
    """Write the adapters `FOLDER[=weight]` into `folder`; where they are.

    Args:
        checkpoint: what `artifact` was made from. Its weights are not read.

    Raises:
        UserError: the artifact takes no adapters, or not one of these; a file is there already; as
            `with_switched_adapters`.
    """
    opened = Artifact.open(artifact)
    if not opened.manifest.get("switched_adapters"):
        raise takes_none(opened)
    profile = recorded_profile(artifact, opened.manifest)
    checkpoint = with_switched_adapters(checkpoint, given, profile)
    names = [adapter.described["name"] for adapter in checkpoint.switched_adapters]
    for name in names:
        if os.path.lexists(folder / adapter_file(name)):
            raise UserError(f"{folder / adapter_file(name)} is there already: choose another --output")
    graphs = build_graphs(checkpoint, profile)
    check_switched(checkpoint, graphs)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".adapters-", dir=folder) as work:
        write_switched(checkpoint, graphs, Path(work))
        try:
            load_adapters(opened, {f"{at}": Path(work) / adapter_file(name) for at, name in enumerate(names)})
        except UserError as error:
            raise UserError(str(error).replace(f"{work}{os.sep}", "")) from error
        return [(Path(work) / adapter_file(name)).rename(folder / adapter_file(name)) for name in names]
