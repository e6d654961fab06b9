"""What the command `qwen-export` imports before it is needed, and what it says where a library is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_HEAVY = {
    "help": (["--help"], {"numpy", "onnx", "pydantic", "rich.progress", "matplotlib", "huggingface_hub"}),
    "plan": (["plan"], {"onnx", "matplotlib", "huggingface_hub", "openvino", "onnxruntime_genai", "jinja2"}),
}


def in_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"import sys\nfrom qwen_export.cli import main\n{code}", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(("arguments", "heavy"), _HEAVY.values(), ids=_HEAVY)
def test_nothing_is_imported_before_it_is_needed(arguments: list[str], heavy: set[str]) -> None:
    code = f"main(standalone_mode=False)\nprint(set({sorted(heavy)}) & set(sys.modules))"
    done = in_python(code, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "set()"


def test_a_missing_library_is_named_with_its_extra(tmp_path: Path) -> None:
    for missing, extra, arguments in (
        ("pydantic", "export", ["profiles"]),
        ("cryptography", "bundle", ["keygen", str(tmp_path / "kiosk.key")]),
    ):
        done = in_python(f"sys.modules[{missing!r}] = None\nmain()", *arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert f"is not installed: pip install 'qwen-edge[{extra}]'" in done.stderr
