"""Which backend an artifact takes. Its library is imported only when an artifact of its kind is loaded."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_common.errors import UserError
from qwen_common.manifest import BackendName

from qwen_runtime.artifact import Artifact
from qwen_runtime.backends.protocol import Backend

if TYPE_CHECKING:
    from qwen_runtime.backends.ort import Ort
    from qwen_runtime.speculative import Speculative


_PACKAGES = Path(__file__).parents[2]

if sys.platform == "win32" and (_PACKAGES / "msvcp140.dll").is_file():
    # A bundle that brings Microsoft's runtime along has it beside the packages, where Windows does not look.
    os.add_dll_directory(str(_PACKAGES))


def load(artifact: Artifact, provider: str, keep: int) -> Backend:
    """The backend that the artifact was made for, with its weights loaded.

    Args:
        provider: as in `Model.load`.
        keep: conversations whose history shall not be read again, as in `Model.load`.

    Raises:
        UserError: the artifact is for a backend that is unknown here, or it cannot be loaded.
    """
    if artifact.backend == BackendName.OPENVINO:
        from qwen_runtime.backends.openvino import OpenVINO

        return OpenVINO.load(artifact, provider, keep)
    from qwen_runtime.backends.genai import GenAI

    return GenAI.load(artifact, provider)


def load_ort(artifact: Artifact, provider: str, speculative: Speculative | None) -> Ort:
    """The artifact in ONNX Runtime itself, for states that are kept as arrays, and for speculative decoding.

    Raises:
        UserError: the artifact or the provider is not one for that.
    """
    if speculative is not None:
        from qwen_runtime.speculative.generator import BACKENDS

        if artifact.backend == BackendName.OPENVINO:
            raise UserError("OpenVINO artifacts are not decoded speculatively: leave --speculative off")
        if speculative not in BACKENDS:
            raise UserError(f"speculative is {speculative!r}, but must be one of Speculative, or None")
        return BACKENDS[speculative].load(artifact, provider)
    from qwen_runtime.backends.ort import Ort

    if artifact.backend == BackendName.OPENVINO:
        raise UserError("OpenVINO GenAI keeps states by itself, and none on disk: leave --state-dir off")
    return Ort.load(artifact, provider)
