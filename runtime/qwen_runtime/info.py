"""What is told of a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qwen_runtime.artifact import Artifact


@dataclass(frozen=True)
class ModelInfo:
    """What was loaded and where it runs; `reason` is one line for people, `images` whether it can see."""

    name: str
    path: Path
    profile: str
    provider: str
    reason: str
    context_length: int
    images: bool = False

    @classmethod
    def of(cls, artifact: Artifact, provider: str, reason: str, context_length: int | None) -> ModelInfo:
        """Args:
        context_length: most tokens of prompt and answer together, if fewer than the artifact's own.
        """
        return cls(
            name=artifact.manifest["model"]["name"],
            path=artifact.root,
            profile=artifact.manifest["profile"],
            provider=provider,
            reason=reason,
            context_length=min(artifact.context_length, context_length or artifact.context_length),
            images=artifact.images is not None,
        )
