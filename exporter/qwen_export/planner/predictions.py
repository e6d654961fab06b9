"""Which models fit which hardware, before anything but config.json was read."""

from __future__ import annotations

import gc
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen_common.errors import UserError
from qwen_profiles.reading import profile_names
from qwen_profiles.schema import Profile, load_profile

from qwen_export.backends.registry import export_backend
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.planner.estimate import Estimate
from qwen_export.planner.models import family

_NAMED = 3  # as many alternatives as an error's one line names


@dataclass(frozen=True)
class Prediction:
    """One model on one profile.

    Attributes:
        reason: why it cannot be; None where it fits.
    """

    model: str
    profile: Profile
    estimate: Estimate
    reason: str | None

    def as_json(self) -> dict[str, Any]:
        found = {"model": self.model, "profile": self.profile.name, "fits": self.reason is None}
        predicted = {**asdict(self.estimate), "needed": self.estimate.needed}
        return {**found, "reason": self.reason, **predicted}


def predict(checkpoint: Checkpoint, profile: Profile) -> Prediction:
    """Whether and how well `checkpoint` fits `profile`, its backend and its memory; reads no weight."""
    name = Path(checkpoint.source).name
    backend = export_backend(profile.backend)
    predicted, reason = backend.estimate(checkpoint, profile), backend.why_not(checkpoint)
    if reason is None and not predicted.fits:
        reason = (
            f"{name} needs {predicted.needed / 1e9:.1f} GB and profile {profile.name} has "
            f"{predicted.budget / 1e9:.1f}"
        )
    return Prediction(name, profile, predicted, reason)


def compare(checkpoints: list[Checkpoint], profiles: list[Profile]) -> list[Prediction]:
    # Graphs are many small records without cycles, which the collector would walk again and again.
    collects = gc.isenabled()
    gc.disable()
    try:
        return [predict(checkpoint, profile) for profile in profiles for checkpoint in checkpoints]
    finally:
        if collects:
            gc.enable()


def shipped_profiles() -> list[Profile]:
    return [load_profile(name) for name in profile_names()]


def require_memory(checkpoint: Checkpoint, profile: Profile) -> Prediction:
    """`predict`, or the reason against it.

    Raises:
        UserError: it does not fit; the message names smaller models and larger profiles that do.
    """
    found = predict(checkpoint, profile)
    if found.reason is None:
        return found
    smaller = [other.model for other in compare(list(family().values()), [profile]) if other.reason is None]
    roomy = [
        other for other in shipped_profiles() if other.hardware.memory_budget_gb > found.estimate.budget / 1e9
    ]
    larger = [other.profile for other in compare([checkpoint], roomy) if other.reason is None]
    larger.sort(key=lambda other: other.hardware.memory_budget_gb)
    advice = [f"{smaller[-1]}"] if smaller else []
    advice += [f"--profile {other.name}" for other in larger[:_NAMED]]
    hint = f": try {', or '.join(advice)}" if advice else ": no shipped profile has so much"
    raise UserError(f"{found.reason}{hint}")
