"""A release file, spelled out: one `Combination` for each artifact."""

from __future__ import annotations

import os
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_common.errors import UserError
from qwen_profiles.schema import Profile, load_profile

from qwen_export.matrix.file import Checks, ProfileEntry, Release, ReleaseFile, effective

_FIELDS = ("name", "profile", "model")


@dataclass(frozen=True)
class Combination:
    """One artifact of a release. Plain data, which may be sent to another machine; paths are absolute.

    Attributes:
        label: for messages and tables.
        source: the checkpoint, as `open_checkpoint` takes it.
        adapters: as `with_adapters` takes them.
        push: where it goes; None: nowhere.
    """

    label: str
    source: str
    mmproj: Path | None
    adapters: tuple[str, ...]
    text_only: bool
    max_context: int | None
    ignore_memory: bool
    profile: Profile
    output: Path
    push: str | None
    public: bool
    plain_http: bool
    checks: Checks


def combinations(file: ReleaseFile, root: Path) -> list[Combination]:
    """What `file` asks for, which lies in the folder `root`; opens no checkpoint.

    Raises:
        UserError: a release has no profiles, there is no such profile, a pattern is none, or two artifacts
            would go to the same place.
    """
    found = []
    for release in file.release:
        own = effective(file, release)
        for source in release.checkpoints:
            for entry in own.profiles or ():
                found.append(_combination(file, own, source, entry, root))
    for index, one in enumerate(found):
        for other in found[:index]:
            _refuse_clash(other, one)
    return found


def groups(found: Sequence[Combination]) -> list[list[Combination]]:
    """Those that read the same checkpoint together."""
    by_source: dict[tuple[str, Path | None], list[Combination]] = {}
    for one in found:
        by_source.setdefault((one.source, one.mmproj), []).append(one)
    return list(by_source.values())


def _combination(
    file: ReleaseFile, release: Release, source: str, entry: ProfileEntry, root: Path
) -> Combination:
    model = Path(source if _exists(root, source) else source.partition("@")[0]).name.removesuffix(".gguf")
    name = release.name or model
    profile = load_profile(_local(root, entry.profile) if _is_file(entry) else entry.profile, entry.set)
    fields = {"name": name, "profile": entry.name or profile.name, "model": model}
    label = f"{name} for {fields['profile']}"
    push = release.push and _filled("push", release.push, fields, lower=release.push.startswith("oci://"))
    checks = release.checks or Checks()
    if checks.text:
        checks = checks.model_copy(update={"text": _local(root, checks.text)})
        if not Path(checks.text or "").is_file():
            raise UserError(f"{label}: no file {checks.text}: give a UTF-8 text in checks.text")
    return Combination(
        label=label,
        source=_local(root, source) if _exists(root, source) else source,
        mmproj=Path(_local(root, release.mmproj)) if release.mmproj else None,
        adapters=tuple(_adapter(root, given) for given in release.adapters),
        text_only=release.text_only,
        max_context=release.max_context,
        ignore_memory=release.ignore_memory,
        profile=profile,
        output=Path(_local(root, _filled("output", release.output or "", fields))),
        push=push or None,
        public=file.public,
        plain_http=file.plain_http,
        checks=checks,
    )


def _is_file(entry: ProfileEntry) -> bool:
    return entry.profile.endswith(".toml")


def _local(root: Path, path: str) -> str:
    return os.path.abspath(root / Path(path).expanduser())


def _exists(root: Path, path: str) -> bool:
    return os.path.lexists(_local(root, path))


def _adapter(root: Path, given: str) -> str:
    """`FOLDER` or `FOLDER=WEIGHT`, the folder from `root` unless it is a hub id."""
    folder, equals, weight = given.rpartition("=")
    if not equals or _exists(root, given):
        folder, equals, weight = given, "", ""
    return f"{_local(root, folder) if _exists(root, folder) else folder}{equals}{weight}"


def _filled(key: str, pattern: str, fields: Mapping[str, str], lower: bool = False) -> str:
    try:
        parsed = list(string.Formatter().parse(pattern))
    except ValueError as error:
        raise UserError(f"{key} '{pattern}' is no pattern ({error}): write {{name}}-{{profile}}") from error
    for _, field, form, conversion in parsed:
        if field is not None and (field not in _FIELDS or form or conversion):
            known = ", ".join(f"{{{name}}}" for name in _FIELDS)
            raise UserError(f"{key} '{pattern}' has {{{field}}}, which stands for nothing: there are {known}")
    return pattern.format_map({name: value.lower() for name, value in fields.items()} if lower else fields)


def _refuse_clash(one: Combination, other: Combination) -> None:
    mine, its = (Path(os.path.realpath(found.output)) for found in (one, other))
    advice = (
        "give the release or the profile a name of its own, and let the pattern have {name} and {profile}"
    )
    if mine.is_relative_to(its) or its.is_relative_to(mine):
        raise UserError(f"{one.label} and {other.label} both write {other.output}: {advice}")
    if one.push and one.push == other.push:
        raise UserError(f"{one.label} and {other.label} both go to {one.push}: {advice}")
