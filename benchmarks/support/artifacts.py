"""Artifacts as tests and benchmarks make them: in silence, and with logits at every position."""

from __future__ import annotations

from pathlib import Path

from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.export import export
from qwen_profiles.schema import ROLES, Profile, WeightFormat, load_profile

FLOAT = {role: WeightFormat(precision="float") for role in ROLES}


def directml_profile(*overrides: str) -> Profile:
    """`strix-halo` for DirectML alone: the portable lowering, and no other graph."""
    alone = ["provider=dml", "lowering=portable", "fallbacks=[]"]
    return load_profile("strix-halo", [*alone, *overrides])


class Quiet:
    """No progress, but the notes are kept."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def start(self, total: int) -> None: ...

    def advance(self, count: int) -> None: ...


def float_profile(lowering: str, dtype: str = "float32", prefill_chunk: int = 64) -> Profile:
    """A profile that quantises nothing, for one lowering."""
    base = {"fused": load_profile("cpu"), "portable": directml_profile()}[lowering]
    update = {
        "weights": FLOAT,
        "activation_dtype": dtype,
        "accuracy_level": 0,
        "prefill_chunk": prefill_chunk,
    }
    return base.model_copy(update=update)


def make_artifact(checkpoint: Path, profile: Profile, output: Path, all_logits: bool = True) -> Path:
    export(Checkpoint.open(str(checkpoint)), profile, output, Quiet(), all_logits=all_logits)
    return output
