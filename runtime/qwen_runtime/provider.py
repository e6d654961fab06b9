"""Which execution provider runs the artifact on this machine, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qwen_profiles.errors import UserError


@dataclass(frozen=True)
class Provider:
    """One execution provider of ONNX Runtime GenAI.

    Attributes:
        title: its usual name.
        genai_name: what Config.append_provider calls it; None runs on the CPU.
        probe: function of onnxruntime_genai that says whether this install has it; None: always.
        package: what to install to get it.
        appends: whether a generator takes its prompt in several pieces.
    """

    title: str
    genai_name: str | None
    probe: str | None
    package: str
    appends: bool = True


# On DirectML, ONNX Runtime GenAI refuses a second append to a generator.
PROVIDERS = {
    "cpu": Provider("CPU", None, None, "onnxruntime-genai"),
    "cuda": Provider("CUDA", "cuda", "is_cuda_available", "onnxruntime-genai-cuda"),
    "dml": Provider(
        "DirectML",
        "dml",
        "is_dml_available",
        "onnxruntime-genai-winml",
        appends=False,
    ),
    "openvino": Provider("OpenVINO", "OpenVINO", "is_openvino_available", "onnxruntime-ep-openvino"),
    "webgpu": Provider("WebGPU", "webgpu", "is_webgpu_available", "onnxruntime-ep-webgpu"),
}


@dataclass(frozen=True)
class Choice:
    """A provider by its key in `PROVIDERS`, and the reason in one line."""

    name: str
    reason: str


def choose(wanted: str, artifact_provider: str, og: Any) -> Choice:
    """The provider to try first.

    Args:
        wanted: a key of `PROVIDERS`, or "auto" for the artifact's own, or else the CPU.
        og: the module onnxruntime_genai.

    Raises:
        UserError: no such provider, or one that was asked for by name is not in this install.
    """
    if wanted == "auto":
        if artifact_provider not in PROVIDERS:
            raise UserError(
                f"the artifact was made for '{artifact_provider}', which this qwen-edge does not know: "
                "install a newer one, or choose another provider"
            )
        provider = PROVIDERS[artifact_provider]
        if is_available(provider, og):
            return Choice(artifact_provider, f"{provider.title}: the artifact was made for it")
        return Choice("cpu", f"CPU: {provider.title} is not in this install ({provider.package} has it)")
    if wanted not in PROVIDERS:
        raise UserError(f"no provider '{wanted}': there are auto, {', '.join(PROVIDERS)}")
    provider = PROVIDERS[wanted]
    if not is_available(provider, og):
        raise UserError(f"{provider.title} is not in this install: install {provider.package}")
    return Choice(wanted, f"{provider.title}: asked for")


def is_available(provider: Provider, og: Any) -> bool:
    return provider.probe is None or bool(getattr(og, provider.probe)())
