"""The file of a release: what is read, and how a mistake in it is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from qwen_common.errors import UserError
from qwen_export.matrix.file import ProfileEntry, effective, read_release

GOOD = """
profiles = ["cpu", {profile = "./kiosk.toml", set = ["weights.body=int8"], name = "kiosk-8"}]
push = "my-org/{name}-{profile}"

[checks]
tokens = 256

[[release]]
checkpoints = ["Qwen/Qwen3.5-4B@main"]

[[release]]
name = "kiosk"
checkpoints = ["checkpoints/4B"]
adapters = ["adapters/week-47=0.5"]
profiles = ["intel-n100"]
push = ""
checks = {verify = false}
"""

FAULTS = {
    "profils = ['cpu']": "profils: no such key: did you mean 'profiles'?",
    "zzz = 1": "zzz: no such key: there are: release, profiles, output",
    "[chekcs]\ntokens = 1": "chekcs: no such key: did you mean 'checks'?",
    "[checks]\ntoken = 1": "checks.token: no such key: did you mean 'tokens'?",
    "[checks]\ntokens = 0": "checks.tokens: Input should be greater than 0",
    "[[release]]\ncheckpoint = ['a']": "release.2.checkpoints: Field required",
    "[[release]]\ncheckpoints = ['a']\nadapter = ['b']": (
        "release.2.adapter: no such key: did you mean 'adapters'?"
    ),
    "[[release]]\ncheckpoints = []": "release.2.checkpoints: Tuple should have at least 1 item",
    "[[release]]\ncheckpoints = 'a'": "release.2.checkpoints: Input should be a valid tuple",
    "[[release]]\ncheckpoints = ['a']\nprofiles = [{profile = 'cpu', sett = []}]": (
        "release.2.profiles.1.sett: no such key: did you mean 'set'?"
    ),
    "a = ": "is not valid TOML",
    f"a = {5000 * '['}": "is not valid TOML",
    "output = 'a{name}\\u0000'".replace("'", '"'): "output: String should match pattern",
    '[checks]\ntext = "\\u0000"': "checks.text: String should match pattern",
    "[checks]\ntokens = true": "checks.tokens: Input should be a valid integer",
    "[checks]\nprovider = 'tpu'": "checks.provider: there are auto, cpu, cuda, ",
    "[[release]]\ncheckpoints = ['a']\nmax_context = 1": "release.2.max_context: Input should be",
}


def write(folder: Path, text: str) -> Path:
    path = folder / "release.toml"
    path.write_text(text)
    return path


def test_a_release_takes_what_it_does_not_say_from_the_file(tmp_path: Path) -> None:
    file = read_release(write(tmp_path, GOOD))
    first, second = (effective(file, release) for release in file.release)
    assert first.profiles == (
        ProfileEntry(profile="cpu"),
        ProfileEntry(profile="./kiosk.toml", set=("weights.body=int8",), name="kiosk-8"),
    )
    assert first.push == "my-org/{name}-{profile}" and second.push == ""
    assert first.output == second.output == "artifacts/{name}-{profile}"
    assert first.checks and first.checks.verify and first.checks.tokens == 256
    assert second.checks and not second.checks.verify


@pytest.mark.parametrize("text", FAULTS)
def test_what_is_wrong_is_named(text: str, tmp_path: Path) -> None:
    release = "[[release]]\ncheckpoints = ['x']\n"
    whole = f"{release}{text}" if text.startswith("[[release]]") else f"{text}\n{release}"
    with pytest.raises(UserError) as raised:
        read_release(write(tmp_path, whole))
    assert FAULTS[text] in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        read_release(tmp_path / "none.toml")
    with pytest.raises(UserError, match="release: Field required"):
        read_release(write(tmp_path, "profiles = ['cpu']"))
    file = read_release(write(tmp_path, "[[release]]\ncheckpoints = ['x']"))
    with pytest.raises(UserError, match=r"x has no profiles: set profiles"):
        effective(file, file.release[0])
