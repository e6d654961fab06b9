"""The OpenVINO backend, for OpenVINO GenAI."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_common.errors import UserError
from qwen_common.manifest import Manifest
from qwen_profiles.schema import Profile

from qwen_export.architecture.tensors import TensorSpec
from qwen_export.backends.onnx.estimate import estimate
from qwen_export.backends.protocol import ArtifactWeights, ExportBackend, ExportOptions, Write
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.planner.estimate import Estimate
from qwen_export.progress import Progress


class OpenVINOBackend(ExportBackend):
    """See `ExportBackend`."""

    title = "OpenVINO"
    packages = ("openvino", "openvino-genai", "openvino-tokenizers", "numpy")
    not_compared = (("openvino_vision_embeddings_model.xml", "the vision tower"),)
    per_channel = frozenset({"int8"})  # as NNCF has it
    formats_by_layer = False

    def why_not(self, checkpoint: Checkpoint) -> str | None:
        if not checkpoint.config.fused:
            return None
        return (
            f"{checkpoint.config.model_type} has projections that are stored fused, which are exported to "
            "ONNX only, not to OpenVINO"
        )

    def prepare(
        self, checkpoint: Checkpoint, profile: Profile, options: ExportOptions, progress: Progress
    ) -> Write:
        from qwen_export.backends.openvino.artifact import prepare

        if (reason := self.why_not(checkpoint)) is not None:
            raise UserError(f"{reason}: choose another profile than {profile.name}")
        return prepare(checkpoint, profile, options, progress)

    def estimate(self, checkpoint: Checkpoint, profile: Profile) -> Estimate:
        """As an ONNX artifact of the same recipe: the stored weights are alike, byte for byte of codes."""
        return estimate(checkpoint, profile)

    def artifact_weights(
        self,
        artifact: Path,
        checkpoint: Checkpoint,
        profile: Profile,
        specs: Mapping[str, TensorSpec],
    ) -> ArtifactWeights:
        from qwen_export.backends.openvino.stored import artifact_weights

        return artifact_weights(artifact, checkpoint.config, specs)

    def inspect(self, artifact: Path, manifest: Manifest) -> dict[str, Any]:
        from qwen_export.backends.openvino.inspection import inspect_ir

        return inspect_ir(artifact, manifest)

    def exact_setting(self, profile: Profile) -> str:
        return "provider_options.INFERENCE_PRECISION_HINT=f32"


BACKEND = OpenVINOBackend()
