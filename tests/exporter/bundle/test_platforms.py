"""Which systems the wheels of a bundle need."""

from __future__ import annotations

from pathlib import Path

import pytest
from qwen_export.bundle.platforms import PLATFORMS
from qwen_export.bundle.wheels import Wheel, system_needed


@pytest.mark.parametrize(
    "names,needed",
    [
        (["a-1-py3-none-any"], {}),
        (["a-1-cp312-cp312-win_amd64"], {}),
        (["a-1-cp312-cp312-manylinux2014_x86_64.manylinux_2_17_x86_64"], {"glibc": "2.17"}),
        (["a-1-cp312-cp312-manylinux2014_x86_64"], {"glibc": "2.17"}),
        (["a-1-cp39-abi3-manylinux_2_28_x86_64", "b-1-cp312-cp312-manylinux_2_9_x86_64"], {"glibc": "2.28"}),
        (["a-1-cp312-cp312-manylinux_2_27_x86_64.manylinux_2_28_x86_64"], {"glibc": "2.27"}),
        (["a-1-cp312-cp312-macosx_11_0_arm64", "b-1-cp312-cp312-macosx_14_0_universal2"], {"macos": "14.0"}),
        (["a-1-cp312-cp312-manylinux1_x86_64"], {"glibc": "2.5"}),
    ],
)
def test_the_oldest_system_that_serves(names: list[str], needed: dict[str, str]) -> None:
    assert system_needed(Wheel(Path(f"{name}.whl")) for name in names) == needed


def test_of_several_wheels_that_for_the_oldest_system_comes_first() -> None:
    """pip takes the first tag that fits."""
    for name in ("linux_x86_64", "linux_aarch64"):
        tags = PLATFORMS[name].tags
        assert tags[0].startswith("manylinux_2_17") and tags.index(tags[0]) < tags.index(
            tags[0].replace("2_17", "2_28")
        )
    assert PLATFORMS["macos_arm64"].tags[0] == "macosx_11_0_arm64"
