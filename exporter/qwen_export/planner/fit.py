"""Which models fit which hardware, before anything but config.json was downloaded."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from qwen_common.errors import UserError
from qwen_profiles.reading import profile_names
from qwen_profiles.schema import Profile, load_profile

from qwen_export.architecture.mtp import declares_mtp
from qwen_export.architecture.registry import config_class
from qwen_export.backends.onnx.plan import plan
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.checkpoint.config import load_config, load_vision_config
from qwen_export.checkpoint.hub import download
from qwen_export.planner.estimate import Estimate, estimate

_NAMED = 3  # as many alternatives as an error's one line names


@dataclass(frozen=True)
class Fit:
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


def family() -> dict[str, Checkpoint]:
    """The published text models by name, smallest first; they have a configuration and no weights."""
    models = json.loads((files("qwen_export.planner") / "family.json").read_text(encoding="utf-8"))["models"]
    return {
        name: Checkpoint(Path(name), name, None, config_class(config["model_type"])(**config), {})
        for name, config in models.items()
    }


def configured(source: str, revision: str | None = None, text_only: bool = False) -> Checkpoint:
    """A checkpoint as its config.json alone tells: a folder, a hub id, or a name of `family`.

    Raises:
        UserError: none of these, or not a supported model.
    """
    if (known := family().get(source)) and not Path(source).exists():
        return known
    if Path(source).is_dir():
        root = Path(source).resolve()
    else:
        root = download(source, revision, "config.json", family())
    config = load_config(root)
    return Checkpoint(root, source, revision, config, {}, None if text_only else load_vision_config(root))


def fit(checkpoint: Checkpoint, profile: Profile) -> Fit:
    """Whether and how well `checkpoint` fits `profile`'s memory; reads no weight."""
    name = Path(checkpoint.source).name
    config = checkpoint.config
    mtp = profile.mtp and declares_mtp(config)
    predicted = estimate(checkpoint, profile, plan(checkpoint, profile, mtp=mtp))
    reason = None
    if not predicted.fits:
        reason = (
            f"{name} needs {predicted.needed / 1e9:.1f} GB and profile {profile.name} has "
            f"{predicted.budget / 1e9:.1f}"
        )
    return Fit(name, profile, predicted, reason)


def compare(checkpoints: list[Checkpoint], profiles: list[Profile]) -> list[Fit]:
    return [fit(checkpoint, profile) for profile in profiles for checkpoint in checkpoints]


def shipped_profiles() -> list[Profile]:
    return [load_profile(name) for name in profile_names()]


def require_fit(checkpoint: Checkpoint, profile: Profile) -> Fit:
    """`fit`, or the reason against it.

    Raises:
        UserError: it does not fit; the message names smaller models and larger profiles that do.
    """
    found = fit(checkpoint, profile)
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
