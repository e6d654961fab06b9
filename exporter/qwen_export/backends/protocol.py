"""What an export backend does: all that depends on which runtime family an artifact is for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qwen_common.manifest import Manifest, RunsOn
from qwen_profiles.schema import Profile

from qwen_export.architecture.tensors import TensorSpec
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.checkpoint.tensors.tensor import CheckpointTensor
from qwen_export.planner.estimate import Estimate
from qwen_export.progress import Progress


@dataclass(frozen=True)
class ExportOptions:
    """What of an export is neither the checkpoint's nor the profile's.

    Attributes:
        all_logits: logits for every position, for evaluation.
        calibration: UTF-8 text for a profile's `compression` that looks at activations; None takes the
            shipped one.
    """

    all_logits: bool = False
    calibration: Path | None = None


@dataclass(frozen=True)
class Written:
    """What a backend says, for the manifest, of the files that it wrote.

    Attributes:
        runs_on: what they need of their runtime.
        context_length: tokens of prompt and answer together.
        bytes_by_role: of the stored weights.
        all_logits: whether there are logits for every position.
        image_prompt_tokens: of a prompt with images, at most; None without a vision tower.
        carried_over: roles with weights whose codes are the checkpoint's own.
        runtime: as in `Manifest`; None: there is none.
    """

    runs_on: RunsOn
    context_length: int
    bytes_by_role: Mapping[str, int]
    all_logits: bool
    image_prompt_tokens: int | None
    carried_over: Sequence[str] = ()
    runtime: Mapping[str, Any] | None = None


# Writes every file but manifest and model card to `artifact` in the hidden folder that it is given, and
# beside it what is needed to go on later.
Write = Callable[[Path, Progress], Written]


class ArtifactTensor(CheckpointTensor, Protocol):
    """A tensor of the checkpoint, read from an artifact: its shape is the checkpoint's."""

    @property
    def role(self) -> str:
        """Of the recipe."""

    @property
    def quantised(self) -> bool:
        """Whether any part of it is held in codes and scales."""


@dataclass(frozen=True)
class ArtifactWeights:
    """What an artifact holds, and what it takes to run it.

    Attributes:
        tensors: the matrices by their names in the checkpoint; vectors are not among them.
        decode_bytes: of weights that are read for one token.
        needed: bytes of memory with a short context.
    """

    tensors: Mapping[str, ArtifactTensor]
    decode_bytes: int
    needed: int


class ExportBackend(Protocol):
    """One runtime family; `registry.export_backend` finds it by a profile's or manifest's `backend`.

    Attributes:
        title: as the family calls itself.
        packages: distributions whose versions a verification's report names.
        not_compared: files whose weights no verification compares, and what they are.
        per_channel: precisions with one scale for each output channel, whatever the recipe's block size.
        formats_by_layer: whether a role's weights may have another format in each layer.
    """

    title: str
    packages: Sequence[str]
    not_compared: Sequence[tuple[str, str]]
    per_channel: frozenset[str]
    formats_by_layer: bool

    def why_not(self, checkpoint: Checkpoint) -> str | None:
        """Why the model cannot be exported for this family, whatever its size; None where it can."""
        return None

    def prepare(
        self, checkpoint: Checkpoint, profile: Profile, options: ExportOptions, progress: Progress
    ) -> Write:
        """All that can fail before the work begins; what is returned does the work.

        Raises:
            UserError: `why_not`, a library is missing, or the calibration text cannot be used.
        """

    def write_together(
        self, writes: Sequence[tuple[Write, Path]], progress: Progress
    ) -> Iterator[tuple[int, Written | Exception]]:
        """Write several artifacts of one checkpoint, each to its hidden folder; what they read is read once
        where the backend can do that.

        Args:
            writes: what `prepare` returned, and the hidden folders.

        Yields:
            Index in `writes`, and what came of it, as soon as it is whole or has failed.
        """
        for index, (write, work) in enumerate(writes):
            try:
                yield index, write(work, progress)
            except Exception as error:
                yield index, error

    def estimate(self, checkpoint: Checkpoint, profile: Profile) -> Estimate:
        """What the artifact will take and give; reads no weight."""

    def artifact_weights(
        self,
        artifact: Path,
        checkpoint: Checkpoint,
        profile: Profile,
        specs: Mapping[str, TensorSpec],
    ) -> ArtifactWeights:
        """The matrices of `artifact` by their names in the checkpoint.

        Args:
            specs: the checkpoint's tensors.

        Raises:
            UserError: the artifact is not of that checkpoint and profile.
        """

    def inspect(self, artifact: Path, manifest: Manifest) -> dict[str, Any]:
        """What is in the graphs of `artifact`, and where they can run.

        Raises:
            UserError: a library is missing, or a file cannot be read.
        """

    def exact_setting(self, profile: Profile) -> str:
        """`field=value` that makes the provider compute more exactly, for advice."""
