"""The profile that an artifact was exported with, as its manifest has it."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError
from qwen_common.errors import UserError
from qwen_common.manifest import Manifest
from qwen_profiles.schema import Profile


def recorded_profile(artifact: Path, manifest: Manifest) -> Profile:
    """As it was then.

    Raises:
        UserError: profiles had other fields then.
    """
    try:
        return Profile.model_validate(manifest["settings"])
    except (KeyError, ValidationError) as error:
        raise UserError(
            f"{artifact} was exported by another version of qwen-edge: export it again"
        ) from error
