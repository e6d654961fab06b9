"""Which of this machine's processors a process may compute on: one of each physical core, the quick kind told
from the efficient one.

Found without a library: Linux has files for it, Windows and macOS a call each. No hybrid CPU was at hand:
Linux's files are those of its documentation (ABI/testing/sysfs-devices-system-cpu, and perf's devices for
each kind of Intel's cores), Windows' records those of its headers.
"""

from __future__ import annotations

import ctypes
import math
import os
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SYSTEM = Path("/sys/devices")
_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUP = Path("/proc/self/cgroup")
# What says how quick a processor is, and the share of the quickest from which it is of the quick kind. By
# frequency alike cores differ by a tenth, because the best of them may go higher.
_SPEEDS = (("cpu_capacity", 0.6), ("cpufreq/cpuinfo_max_freq", 0.8))
_CORE_RECORD = 0  # RelationProcessorCore of LOGICAL_PROCESSOR_RELATIONSHIP
_HEADER, _CORE_BYTES = 8, 48  # of every record, and of a core's with one group


@dataclass(frozen=True)
class Cores:
    """Physical cores, each by the number of its first processor that this process may use.

    Attributes:
        usable: in the order of their numbers.
        performance: those of the quick kind; all where they are alike, or nothing tells.
        quota: processors' worth of time that control groups grant; None: all of it.
        restricted: whether the machine has cores that this process may not use.
        numbered: whether threads can be pinned to these numbers.
    """

    usable: tuple[int, ...]
    performance: tuple[int, ...]
    quota: float | None = None
    restricted: bool = False
    numbered: bool = True

    @property
    def hybrid(self) -> bool:
        return self.performance != self.usable

    @property
    def most(self) -> int:
        """Threads that are worth starting: one for each core, and no more than the quota feeds."""
        return self.at_most(len(self.usable))

    def at_most(self, threads: int) -> int:
        """`threads`, or as many as the quota feeds: a part of a processor counts as one."""
        return threads if self.quota is None else max(1, min(threads, math.ceil(self.quota)))


def find_cores() -> Cores:
    """Of this machine, for this process."""
    if sys.platform == "win32":
        return _windows()
    if sys.platform == "darwin":
        return _apple()
    return linux_cores(os.sched_getaffinity(0), _SYSTEM, linux_quota())


def linux_cores(allowed: set[int], system: Path = _SYSTEM, quota: float | None = None) -> Cores:
    """Of a tree such as /sys/devices.

    Args:
        allowed: processors that the process may use.
    """
    home = system / "system" / "cpu"
    online = _numbers(_text(home / "online")) or allowed
    firsts = {processor: _first(home, processor, online) for processor in sorted(online)}
    # Of a core whose first processor is not allowed, another one may be.
    cores: dict[int, int] = {}
    for processor in sorted(allowed & online):
        cores.setdefault(firsts[processor], processor)
    quick = _quick(system, set(firsts))
    usable = tuple(sorted(cores.values()))
    performance = tuple(processor for processor in usable if processor in quick) or usable
    return Cores(usable, performance, quota, restricted=allowed < online)


def _quick(system: Path, online: set[int]) -> set[int]:
    if kind := _numbers(_text(system / "cpu_core" / "cpus")):  # Intel's, beside cpu_atom
        return kind
    for name, share in _SPEEDS:
        found = {number: _text(system / "system" / "cpu" / f"cpu{number}" / name) for number in online}
        speeds = {number: int(text) for number, text in found.items() if text.isdigit()}
        if len(speeds) == len(online):
            return {number for number, speed in speeds.items() if speed >= share * max(speeds.values())}
    return online


def _first(home: Path, processor: int, online: set[int]) -> int:
    """The first processor of the core that has this one."""
    folder = home / f"cpu{processor}" / "topology"
    for name in ("core_cpus_list", "thread_siblings_list"):
        if siblings := _numbers(_text(folder / name)) & online:
            return min(siblings)
    return processor


def linux_quota(groups: Path = _GROUPS, own: Path = _OWN_GROUP) -> float | None:
    """Processors' worth of time that control groups of either version grant; None: all of it."""
    found: list[float] = []
    for line in _text(own).splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount in (groups / controllers, groups / "cpu") if controllers else (groups, groups / "unified"):
            # Inside a container the path may be the host's, and the mount its own group.
            below = mount / path.lstrip("/")
            for folder in (below, *below.parents):
                found.extend(_granted(folder))
                if folder == mount:
                    break
    return min(found, default=None)


def _granted(folder: Path) -> Iterator[float]:
    parts = _text(folder / "cpu.max").split()
    parts = parts or [_text(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
    if len(parts) == 2 and all(part.isdigit() and int(part) for part in parts):  # "max" and -1 are no limit
        yield int(parts[0]) / int(parts[1])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _numbers(text: str) -> set[int]:
    """`0-3,8` as {0, 1, 2, 3, 8}; none where it is no such list."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        if not (first.isdigit() and (last or first).isdigit()):
            return set()
        found.update(range(int(first), int(last or first) + 1))
    return found


def _windows() -> Cores:
    kernel: Any = ctypes.windll.kernel32  # type: ignore[attr-defined,unused-ignore]
    size = ctypes.c_ulong()
    kernel.GetLogicalProcessorInformationEx(_CORE_RECORD, None, ctypes.byref(size))
    records = ctypes.create_string_buffer(size.value)
    if not kernel.GetLogicalProcessorInformationEx(_CORE_RECORD, records, ctypes.byref(size)):
        return _unknown()
    mine, machine = ctypes.c_size_t(), ctypes.c_size_t()
    process = ctypes.c_void_p(kernel.GetCurrentProcess())
    if not kernel.GetProcessAffinityMask(process, ctypes.byref(mine), ctypes.byref(machine)):
        return _unknown()
    return windows_cores(records.raw, mine.value or machine.value)  # 0: threads in several groups


def windows_cores(records: bytes, allowed: int) -> Cores:
    """Of what GetLogicalProcessorInformationEx writes about cores, in the first group of 64 processors.

    Args:
        allowed: mask of the processors that the process may use.
    """
    every, classes = 0, {}
    while len(records) >= _HEADER:
        relation, size = struct.unpack_from("<II", records)
        if not _HEADER <= size <= len(records):
            break
        if relation == _CORE_RECORD and size >= _CORE_BYTES:
            (efficiency,) = struct.unpack_from("<B", records, 9)
            mask, group = struct.unpack_from("<QH", records, 32)
            if group == 0:
                every |= mask
                if usable := mask & allowed:
                    classes[(usable & -usable).bit_length() - 1] = efficiency
        records = records[size:]
    usable_cores = tuple(sorted(classes))
    quickest = max(classes.values(), default=0)  # the higher, the more of speed and the less of efficiency
    performance = tuple(processor for processor in usable_cores if classes[processor] == quickest)
    return Cores(usable_cores, performance, restricted=bool(every & ~allowed)) if classes else _unknown()


def _apple() -> Cores:
    """Its system pins no threads."""
    cores = _sysctl("hw.physicalcpu") or os.cpu_count() or 1
    quick = _sysctl("hw.perflevel0.physicalcpu") or cores  # level 0 is the quickest
    return Cores(tuple(range(cores)), tuple(range(min(quick, cores))), numbered=False)


def _sysctl(name: str) -> int | None:
    value, size = ctypes.c_int(), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    try:
        call = ctypes.CDLL(None).sysctlbyname
    except (AttributeError, OSError, TypeError):
        return None
    failed = call(name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
    return None if failed or value.value < 1 else value.value


def _unknown() -> Cores:
    every = tuple(range(os.cpu_count() or 1))
    return Cores(every, every, numbered=False)
