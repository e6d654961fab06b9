"""The export backends by name. One is imported when it is first asked for, and so are its libraries."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from qwen_common.errors import UserError
from qwen_common.manifest import BackendName

from qwen_export.backends.protocol import ExportBackend

_MODULES: dict[str, str] = {
    BackendName.ONNX: "qwen_export.backends.onnx.backend",
    BackendName.OPENVINO: "qwen_export.backends.openvino.backend",
}


@cache
def export_backend(name: str) -> ExportBackend:
    """The backend that a profile or a manifest calls `name`.

    Raises:
        UserError: there is none of that name.
    """
    if name not in _MODULES:
        raise UserError(f"backend {name!r} is not known here: install the qwen-edge that exported with it")
    backend: ExportBackend = import_module(_MODULES[name]).BACKEND
    return backend
