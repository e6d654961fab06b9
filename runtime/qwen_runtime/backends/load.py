"""Which backend an artifact takes. Its library is imported only when an artifact of its kind is loaded."""

from __future__ import annotations

from qwen_common.manifest import BackendName

from qwen_runtime.artifact import Artifact
from qwen_runtime.backends.protocol import Backend


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
