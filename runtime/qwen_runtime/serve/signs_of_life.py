"""Whether a process still runs: by its processor time, which a thread of its own lets grow.

Native code may hold Python's global lock for minutes, so that no thread can say anything. The thread here
takes processor time all the same: asleep it wakes each second, and waiting for the lock every few
milliseconds, to ask for it. What takes none is not run by the system: it was stopped, or all of it waits
for a disk or a driver.
"""

from __future__ import annotations

import sys
import threading
import time

_BEAT = 1.0  # seconds


def show() -> None:
    """Let this process's time grow from now on."""
    threading.Thread(target=_beat, name="signs of life", daemon=True).start()


def _beat() -> None:
    while True:
        time.sleep(_BEAT)


class Silence:
    """How long a process that called `show` has shown no sign of life, by looks at it.

    It is the time of looks, not the clock's: whoever looks may have been stopped meanwhile too, with the
    process's whole group or the machine.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._time = processor_time(pid)
        self._seconds = 0.0

    def look(self, seconds: float) -> float:
        """Seconds of silence, where the last look was so many ago; 0 where the system does not tell."""
        before, self._time = self._time, processor_time(self._pid)
        silent = before is not None and before == self._time
        self._seconds = self._seconds + seconds if silent else 0.0
        return self._seconds


def processor_time(pid: int) -> float | None:
    """Seconds, to the nanosecond, of all threads of a process; None where it is not there, or the system has
    no such clock.

    Source: Linux's include/linux/posix-timers_types.h, which glibc's clock_getcpuclockid follows.
    """
    if sys.platform != "linux":
        return None
    try:
        return time.clock_gettime(~pid << 3 | 2)
    except OSError:
        return None
