"""Which device an OpenVINO artifact runs on. Devices that are not here are named, as OpenVINO would."""

from __future__ import annotations

import pytest
from qwen_common.errors import UserError
from qwen_runtime.backends.openvino import choose_device

ADVICE = "qwen-export --profile cpu"


@pytest.mark.parametrize(
    "wanted,available,device,says",
    [
        ("auto", ["CPU", "GPU.0"], "gpu", "OpenVINO on GPU: the artifact was made for it"),
        ("gpu", ["CPU", "GPU"], "gpu", "OpenVINO on GPU: asked for"),
        ("auto", ["CPU"], "cpu", "OpenVINO on CPU: OpenVINO finds no GPU on this machine, only CPU"),
        (
            "auto",
            ["CPU", "NPU"],
            "cpu",
            "OpenVINO on CPU: OpenVINO finds no GPU on this machine, only CPU, NPU",
        ),
        ("cpu", ["CPU", "GPU"], "cpu", "OpenVINO on CPU: asked for"),
    ],
)
def test_a_cpu_is_told_what_is_quicker(wanted: str, available: list[str], device: str, says: str) -> None:
    found, reason = choose_device(wanted, "gpu", available)
    assert found == device and reason.startswith(says) and "\n" not in reason
    assert (ADVICE in reason) == (device == "cpu")


@pytest.mark.parametrize("wanted", ["gpu", "npu", "cuda"])
def test_what_was_asked_for_and_is_not_there(wanted: str) -> None:
    with pytest.raises(UserError, match="OpenVINO"):
        choose_device(wanted, "gpu", ["CPU"])
