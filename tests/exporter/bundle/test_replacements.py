"""Which packages a bundle brings for the providers of a folder."""

from __future__ import annotations

import pytest
from qwen_export.bundle.wheels import replacements
from qwen_profiles.schema import load_profile

WEBGPU = {"onnxruntime-ep-webgpu": "onnxruntime-ep-webgpu>=0.4,<1"}
DIRECTML = {
    "onnxruntime": "onnxruntime-windowsml>=1.30,<2",
    "onnxruntime-genai": "onnxruntime-genai-winml>=0.18,<0.19",
}
CUDA = {"onnxruntime": "onnxruntime-gpu", "onnxruntime-genai": "onnxruntime-genai-cuda>=0.18,<0.19"}


@pytest.mark.parametrize(
    ("profile", "system", "expected", "left_out"),
    [
        ("strix-halo", "win32", WEBGPU | DIRECTML, []),
        ("strix-halo", "linux", WEBGPU, []),
        ("radeon-780m", "win32", WEBGPU | DIRECTML, []),
        # One environment has one ONNX Runtime, and the first provider's is taken.
        ("nvidia-rtx-24gb", "win32", CUDA | WEBGPU, ["DirectML"]),
        ("nvidia-rtx-24gb", "linux", CUDA | WEBGPU, []),
        ("apple-m4", "darwin", WEBGPU | {"onnxruntime-ep-mlx": "onnxruntime-ep-mlx>=0.31,<1"}, []),
        ("cpu", "win32", {}, []),
    ],
)
def test_every_provider_that_the_platform_can_have(
    profile: str, system: str, expected: dict[str, str], left_out: list[str]
) -> None:
    chosen = load_profile(profile)
    assert replacements([chosen.provider, *chosen.fallbacks], system) == (expected, left_out)


def test_a_provider_that_is_not_known_here() -> None:
    assert replacements(["npu", "webgpu"], "linux") == (WEBGPU, [])
