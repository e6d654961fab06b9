"""A release file spelled out."""

from __future__ import annotations

from pathlib import Path

import pytest
from qwen_common.errors import UserError
from qwen_export.matrix.combinations import Combination, combinations, groups
from qwen_export.matrix.file import read_release

VENDOR = """
profiles = ["intel-n100", "laptop-16gb", "laptop-32gb", "strix-halo", "nvidia-rtx-8gb"]
output = "releases/{name}/{profile}"
push = "oci://registry.example/{name}:{profile}"
[[release]]
checkpoints = ["Qwen/Qwen3.5-0.8B", "Qwen/Qwen3.5-2B@v1", "Qwen/Qwen3.5-4B", "own/9B.gguf"]
[[release]]
name = "Week-47"
checkpoints = ["Qwen/Qwen3.5-4B"]
adapters = ["adapters/47=0.5", "org/adapter"]
"""


def spelled_out(folder: Path, text: str) -> list[Combination]:
    path = folder / "release.toml"
    path.write_text(text)
    return combinations(read_release(path), folder)


def test_five_classes_four_sizes_and_a_fine_tune(tmp_path: Path) -> None:
    (tmp_path / "adapters" / "47").mkdir(parents=True)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "9B.gguf").write_bytes(b"GGUF")
    found = spelled_out(tmp_path, VENDOR)
    assert len(found) == 25 and len({one.output for one in found}) == 25
    assert [len(group) for group in groups(found)] == [5, 5, 10, 5]  # the fine-tune reads what 4B reads
    gguf, tuned = found[15], found[20]
    assert gguf.source == str(tmp_path / "own" / "9B.gguf")
    assert gguf.output == tmp_path / "releases" / "9B" / "intel-n100"
    assert found[5].source == "Qwen/Qwen3.5-2B@v1" and found[5].label == "Qwen3.5-2B for intel-n100"
    assert found[5].push == "oci://registry.example/qwen3.5-2b:intel-n100"
    assert tuned.adapters == (f"{tmp_path / 'adapters' / '47'}=0.5", "org/adapter")
    assert tuned.output == tmp_path / "releases" / "Week-47" / "intel-n100"
    assert tuned.push == "oci://registry.example/week-47:intel-n100"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[release]]\ncheckpoints = ['a']\nprofiles = ['cpux']", "no profile 'cpux': did you mean 'cpu'"),
        (
            "[[release]]\ncheckpoints = ['a']\nprofiles = [{profile = 'cpu', set = ['mtpp=true']}]",
            "profile 'cpu', field 'mtpp'",
        ),
        ("[[release]]\ncheckpoints = ['a']\nprofiles = ['./none.toml']", "cannot read the profile"),
        (
            "[[release]]\ncheckpoints = ['a', 'b/a']\nprofiles = ['cpu']",
            "a for cpu and a for cpu both write",
        ),
        (
            "output = 'x/{name}'\n[[release]]\ncheckpoints = ['a']\nprofiles = ['cpu', 'webgpu']",
            "a for cpu and a for webgpu both write",
        ),
        (
            "push = 'org/{name}'\n[[release]]\ncheckpoints = ['a']\nprofiles = ['cpu', 'webgpu']",
            "a for cpu and a for webgpu both go to org/a",
        ),
        (
            "output = 'x/{size}'\n[[release]]\ncheckpoints = ['a']\nprofiles = ['cpu']",
            "has {size}, which stands for nothing: there are {name}, {profile}, {model}",
        ),
        (
            "output = 'x/{name.__class__}'\n[[release]]\ncheckpoints = ['a']\nprofiles = ['cpu']",
            "stands for nothing",
        ),
        ("output = 'x/{name'\n[[release]]\ncheckpoints = ['a']\nprofiles = ['cpu']", "is no pattern"),
        (
            "checks = {text = 'none.txt'}\n[[release]]\ncheckpoints = ['a']\nprofiles = ['cpu']",
            "a for cpu: no file",
        ),
    ],
)
def test_what_cannot_be_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        spelled_out(tmp_path, text)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_an_output_within_another(tmp_path: Path) -> None:
    text = "output = 'x/{name}'\n[[release]]\ncheckpoints = ['a']\nprofiles = ['cpu']\nname = 'a'\n"
    with pytest.raises(UserError, match="both write"):
        spelled_out(tmp_path, text + text.partition("\n")[2].replace("'a'\n", "'a/b'\n"))
