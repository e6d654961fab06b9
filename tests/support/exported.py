"""Artifacts that many tests read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen_profiles.schema import Profile


class Exported:
    """Each artifact is made when the first test asks for it. A test that changes one works on a copy."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[tuple[Path, str, bool], Path] = {}
        self._files: dict[Path, dict[str, int]] = {}

    def __call__(self, checkpoint: Path, profile: Profile, all_logits: bool = False) -> Path:
        from benchmarks.support.artifacts import make_artifact

        key = (checkpoint, profile.model_dump_json(), all_logits)
        if key not in self._made:
            output = self._folder / f"{len(self._made)}-{checkpoint.name}-{profile.name}"
            self._made[key] = make_artifact(checkpoint, profile, output, all_logits)
            self._files[output] = written(output)
        return self._made[key]

    def check(self) -> None:
        """Nobody changed what others read, as `qwen-export verify` does."""
        for artifact, files in self._files.items():
            assert written(artifact) == files, f"a test changed {artifact.name}: give it a copy"


def written(folder: Path) -> dict[str, int]:
    """When each file was written last."""
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
