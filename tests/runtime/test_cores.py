"""Which cores a process may use. No hybrid CPU is at hand: trees of /sys and records of Windows are fakes."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest
from qwen_runtime.cores import Cores, find_cores, linux_cores, linux_quota, windows_cores


def fake_sys(
    root: Path,
    siblings: Mapping[int, str],
    values: Mapping[int, int] | None = None,
    name: str = "cpu_capacity",
) -> Path:
    """A tree such as /sys/devices, by processor the processors of its core, and one value of each."""
    cpu = root / "system" / "cpu"
    for processor, core in siblings.items():
        folder = cpu / f"cpu{processor}"
        (folder / "topology").mkdir(parents=True)
        (folder / "topology" / "thread_siblings_list").write_text(f"{core}\n")
        if values:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(f"{values[processor]}\n")
    (cpu / "online").write_text(f"0-{max(siblings)}\n")
    return root


P_AND_E = {0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3", 4: "4", 5: "5", 6: "6", 7: "7"}


def intel(root: Path) -> Path:
    """Two P cores with two threads each, four E cores."""
    for kind, processors in ("cpu_core", "0-3"), ("cpu_atom", "4-7"):
        (root / kind).mkdir()
        (root / kind / "cpus").write_text(f"{processors}\n")
    return fake_sys(root, P_AND_E)


def test_fake_intel_hybrid(tmp_path: Path) -> None:
    system = intel(tmp_path)
    found = linux_cores(set(range(8)), system)
    assert found == Cores((0, 2, 4, 5, 6, 7), (0, 2)) and found.hybrid and found.most == 6
    assert linux_cores({1, 2, 3, 5}, system) == Cores((1, 2, 5), (1, 2), restricted=True)
    assert linux_cores({5, 6}, system).performance == (5, 6)  # no P core is left


@pytest.mark.parametrize(
    "name, values, quick",
    [
        ("cpu_capacity", (1024, 866, 866, 350), (0, 1, 2)),  # an Arm with three kinds
        ("cpufreq/cpuinfo_max_freq", (5100000, 5100000, 3300000, 3300000), (0, 1)),  # Zen 5 and Zen 5c
        (
            "cpufreq/cpuinfo_max_freq",
            (5200000, 4900000, 4900000, 5200000),
            (0, 1, 2, 3),
        ),  # favoured cores only
        ("cpu_capacity", (1024, 1024, 1024, 1024), (0, 1, 2, 3)),
    ],
)
def test_fake_speeds(tmp_path: Path, name: str, values: tuple[int, ...], quick: tuple[int, ...]) -> None:
    system = fake_sys(tmp_path, {at: str(at) for at in range(4)}, dict(enumerate(values)), name)
    assert linux_cores({0, 1, 2, 3}, system) == Cores((0, 1, 2, 3), quick)


def test_nothing_tells(tmp_path: Path) -> None:
    assert linux_cores({0, 3}, tmp_path) == Cores((0, 3), (0, 3))
    (tmp_path / "cpu_core").mkdir()
    (tmp_path / "cpu_core" / "cpus").write_text("0-x,,-\n")
    assert linux_cores({0, 3}, tmp_path) == Cores((0, 3), (0, 3))


@pytest.mark.parametrize(
    "own, files, expected",
    [
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, 1.5),
        ("0::/a", {"a/cpu.max": "max 100000"}, None),
        ("0::/host/path", {"cpu.max": "200000 100000"}, 2.0),  # a container's own group is the mount
        (
            "4:cpu,cpuacct:/x\n0::/",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "50000", "cpu,cpuacct/x/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("5:memory:/x", {"memory/x/cpu.max": "1 2"}, None),
        ("nonsense", {}, None),
    ],
)
def test_fake_quota(tmp_path: Path, own: str, files: dict[str, str], expected: float | None) -> None:
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    (tmp_path / "own").write_text(own + "\n")
    assert linux_quota(tmp_path / "groups", tmp_path / "own") == expected


@pytest.mark.parametrize("quota, most", [(None, 4), (0.2, 1), (1.0, 1), (2.5, 3), (9.0, 4)])
def test_quota_limits(quota: float | None, most: int) -> None:
    assert Cores((0, 1, 2, 3), (0, 1, 2, 3), quota).most == most


def record(efficiency: int, mask: int, group: int = 0) -> bytes:
    """One SYSTEM_LOGICAL_PROCESSOR_INFORMATION_EX of a core, by winnt.h."""
    return struct.pack("<IIBB20xHQH6x", 0, 48, 0, efficiency, 1, mask, group)


def test_fake_windows_records() -> None:
    records = b"".join(
        (record(1, 0b11), record(1, 0b1100), record(0, 1 << 4), record(0, 1 << 5), record(1, 1, 1))
    )
    assert windows_cores(records, 0b111111) == Cores((0, 2, 4, 5), (0, 2))
    assert windows_cores(records, 0b110010) == Cores((1, 4, 5), (1,), restricted=True)
    assert windows_cores(records[:60], 0b111111) == Cores((0,), (0,))
    assert not windows_cores(b"", 1).numbered


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's own files")
def test_this_machine() -> None:
    """A process of its own, because the suite's may be held to some processors."""
    found = find_cores()
    if not found.restricted:
        assert len(found.usable) == psutil.cpu_count(logical=False)
    one = min(os.sched_getaffinity(0))
    code = f"import os, qwen_runtime.cores as c; os.sched_setaffinity(0, [{one}]); print(c.find_cores())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert f"usable=({one},)" in printed
