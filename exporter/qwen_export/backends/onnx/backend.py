"""The ONNX backend, for ONNX Runtime and ONNX Runtime GenAI."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_common.manifest import Manifest
from qwen_profiles.schema import Profile

from qwen_export.architecture.mtp import declares_mtp
from qwen_export.architecture.tensors import TensorSpec
from qwen_export.backends.onnx.estimate import estimate
from qwen_export.backends.onnx.files import MTP_FILE, VISION_FILE
from qwen_export.backends.protocol import ArtifactWeights, ExportBackend, ExportOptions, Write, Written
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.planner.estimate import Estimate
from qwen_export.progress import Progress


class OnnxBackend(ExportBackend):
    """See `ExportBackend`."""

    title = "ONNX Runtime"
    packages = ("onnxruntime", "onnxruntime-genai", "numpy")
    not_compared = ((VISION_FILE, "the vision tower"), (MTP_FILE, "the MTP head"))
    per_channel = frozenset[str]()
    formats_by_layer = True

    def prepare(
        self, checkpoint: Checkpoint, profile: Profile, options: ExportOptions, progress: Progress
    ) -> Write:
        from qwen_export.backends.onnx.artifact import prepare

        return prepare(checkpoint, profile, options, progress)

    def write_together(
        self, writes: Sequence[tuple[Write, Path]], progress: Progress
    ) -> Iterator[tuple[int, Written | Exception]]:
        from qwen_export.backends.onnx.artifact import OnnxWrite, write_together

        ours = [(write, work) for write, work in writes if isinstance(write, OnnxWrite)]
        assert len(ours) == len(writes)
        return write_together(ours, progress)

    def estimate(self, checkpoint: Checkpoint, profile: Profile) -> Estimate:
        return estimate(checkpoint, profile, profile.mtp and declares_mtp(checkpoint.config))

    def artifact_weights(
        self,
        artifact: Path,
        checkpoint: Checkpoint,
        profile: Profile,
        specs: Mapping[str, TensorSpec],
    ) -> ArtifactWeights:
        from qwen_export.backends.onnx.graphs import build_graphs
        from qwen_export.backends.onnx.stored import stored_tensors

        tensors = stored_tensors(artifact, build_graphs(checkpoint, profile), specs)
        predicted = estimate(checkpoint, profile)
        return ArtifactWeights(tensors, predicted.decode_bytes, predicted.needed)

    def inspect(self, artifact: Path, manifest: Manifest) -> dict[str, Any]:
        from qwen_export.backends.onnx.inspection import inspect_graphs

        return inspect_graphs(artifact, manifest)

    def exact_setting(self, profile: Profile) -> str:
        return "accuracy_level=0" if profile.accuracy_level else "activation_dtype=float32"


BACKEND = OnnxBackend()
