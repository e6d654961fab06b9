"""The TOML file of a release, and its checks. Relative paths in it are from its own folder."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from qwen_common.errors import UserError
from qwen_common.files import parse_toml, read_text
from qwen_common.providers import PROVIDERS

_Line = Annotated[str, Field(pattern=r"^[^\x00]*$")]  # no path has a zero byte
_Text = Annotated[_Line, Field(min_length=1)]
_Some = Annotated[tuple[_Text, ...], Field(min_length=1)]


_DEVICES = ("gpu", "npu")  # OpenVINO's, beside the CPU


def _known_provider(name: str) -> str:
    if name not in (known := ("auto", *PROVIDERS, *_DEVICES)):
        raise ValueError(f"there are {', '.join(known)}")
    return name


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Checks(_Table):
    """How an artifact is verified, as by `qwen-export verify`. The bar is the profile's `quality`, which its
    `set` may change."""

    verify: bool = True
    """Compare each artifact with its checkpoint; one below the bar is not pushed."""

    tokens: int | None = Field(default=None, gt=0, strict=True)
    """How many to compare on; 1024 if it is not set."""

    text: _Text | None = None
    """UTF-8 file to compare on; the shipped text if it is not set."""

    provider: Annotated[str, AfterValidator(_known_provider)] = "auto"
    """Execution provider; with OpenVINO the device."""


class ProfileEntry(_Table):
    """A profile, perhaps with changes. In place of a table, `"cpu"` names the profile alone."""

    profile: _Text
    """One of `qwen-export profiles`, or the path of a .toml file."""

    set: tuple[_Line, ...] = ()
    """Changes, as `--set` takes them: `weights.body=int8`."""

    name: _Line | None = None
    """What `{profile}` stands for in `output` and `push`; the profile's own name if it is not set."""


def _entry(value: object) -> object:
    return {"profile": value} if isinstance(value, str) else value


_Profiles = Annotated[tuple[Annotated[ProfileEntry, BeforeValidator(_entry)], ...], Field(min_length=1)]


class Release(_Table):
    """Checkpoints, each exported for each profile. What is not set here is as at the top of the file."""

    checkpoints: _Some
    """Folders, hub ids such as `Qwen/Qwen3.5-4B@main`, or GGUF files."""

    name: _Line | None = None
    """What `{name}` stands for; the checkpoint's own name if it is not set."""

    adapters: tuple[_Text, ...] = ()
    """LoRA adapters that are merged, as `--adapter` takes them: `FOLDER` or `FOLDER=WEIGHT`."""

    mmproj: _Text | None = None
    """Vision tower of a GGUF file."""

    text_only: bool = False
    """Leave the vision tower out."""

    max_context: int | None = Field(default=None, ge=2, strict=True)
    """Tokens of prompt and answer together, as `--max-context`."""

    ignore_memory: bool = False
    """Export what does not fit a profile's memory, too."""

    profiles: _Profiles | None = None
    output: _Text | None = None
    push: _Line | None = None
    checks: Checks | None = None


class ReleaseFile(_Table):
    """The whole file."""

    release: tuple[Release, ...] = Field(min_length=1)

    profiles: _Profiles | None = None
    """Hardware classes."""

    output: _Text = "artifacts/{name}-{profile}"
    """Folder of each artifact. `{name}` and `{profile}` stand for what they are called, `{model}` for the
    checkpoint."""

    push: _Line | None = None
    """Where each goes, as `qwen-export push` takes it, with the same fields, for `oci://` in lower case;
    empty: nowhere."""

    public: bool = False
    """A repository that is made on the hub can be read by everybody."""

    plain_http: bool = False
    """To a registry without TLS."""

    checks: Checks = Checks()


def read_release(path: Path) -> ReleaseFile:
    """Raises:
    UserError: the file cannot be read, is not TOML, or a key is missing, unknown or out of range; names the
        first one, and the nearest that there is.
    """
    content = parse_toml(read_text(path, str(path)), str(path))
    try:
        return ReleaseFile.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {_first(error)}") from error


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    where = _dotted(first["loc"])
    if first["type"] != "extra_forbidden":
        return f"{where}: {first['msg'].removeprefix('Value error, ')}"
    *table, key = first["loc"]
    known = list(_table(table).model_fields)
    near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(known)}"
    return f"{where}: no such key: {hint}"


def _dotted(location: tuple[int | str, ...]) -> str:
    """`release.2.profiles.1.set`, counted from 1."""
    return ".".join(str(part + 1 if isinstance(part, int) else part) for part in location)


def _table(location: list[int | str]) -> type[_Table]:
    tables: dict[int | str, type[_Table]] = {"profiles": ProfileEntry, "checks": Checks, "release": Release}
    return next((tables[part] for part in reversed(location) if part in tables), ReleaseFile)


def effective(file: ReleaseFile, release: Release) -> Release:
    """`release` with what the file says for all, where it says nothing itself.

    Raises:
        UserError: neither names a profile.
    """
    common = {name: getattr(file, name) for name in ("profiles", "output", "push", "checks")}
    found = release.model_copy(
        update={name: value for name, value in common.items() if getattr(release, name) is None}
    )
    if not found.profiles:
        raise UserError(f"{release.name or release.checkpoints[0]} has no profiles: set profiles = [...]")
    return found
