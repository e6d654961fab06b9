"""What is told of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qwen_common.errors import UserError

from qwen_runtime.artifact import Artifact
from qwen_runtime.template import chosen
from qwen_runtime.threads import Threads
from qwen_runtime.tool_calls.registry import DEFAULT, dialect_of


@dataclass(frozen=True)
class ModelInfo:
    """What was loaded and where it runs.

    Attributes:
        reason: one line for people.
        images: whether it can see.
        threads: that compute on the CPU.
        adapters: those that answers may be made with.
        templates: its chat templates by name; none where they cannot be read, which a request is told.
    """

    name: str
    path: Path
    profile: str
    provider: str
    reason: str
    context_length: int
    images: bool = False
    threads: Threads | None = None
    adapters: Sequence[str] = ()
    templates: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        artifact: Artifact,
        provider: str,
        reason: str,
        context_length: int | None,
        adapters: Iterable[str] = (),
    ) -> ModelInfo:
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
            threads=artifact.threads,
            adapters=tuple(adapters),
            templates=_templates(artifact),
        )

    @property
    def placed(self) -> str:
        """Where it runs and why, and with how many threads where that is not ONNX Runtime's own choice."""
        told = self.threads is not None and not self.threads.usual
        return f"{self.reason}; {self.threads}" if told else self.reason

    @property
    def dialect(self) -> str | None:
        """In which calls of tools are written, as its chat template has them; None where it is not known."""
        return dialect_of(chosen(self.templates, tools=True)) if self.templates else DEFAULT


def _templates(artifact: Artifact) -> Mapping[str, str]:
    try:
        return artifact.chat_templates
    except UserError:
        return {}
