"""Export backends by name."""

from __future__ import annotations

import subprocess
import sys

import pytest
from qwen_common.errors import UserError
from qwen_export.backends.registry import export_backend
from qwen_profiles.reading import profile_names
from qwen_profiles.schema import load_profile


def test_every_shipped_profile_has_a_backend() -> None:
    titles = {export_backend(load_profile(name).backend).title for name in profile_names()}
    assert titles == {"ONNX Runtime", "OpenVINO"}


def test_an_unknown_one_is_refused() -> None:
    with pytest.raises(UserError, match="backend 'tflite' is not known here: install"):
        export_backend("tflite")


def test_no_library_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys; from qwen_export.backends.registry import export_backend\n"
        "export_backend('onnx'), export_backend('openvino')\n"
        "print({'onnx', 'openvino', 'nncf', 'torch', 'transformers'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
