"""Signs of life of a process: none where it is stopped, and only there."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest
from qwen_runtime.serve.signs_of_life import Silence, processor_time

from tests.support.waiting import until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")

BUSY = "__import__('ctypes').PyDLL(None).sleep(600)"  # native code that keeps the global lock and rests
IDLE = "__import__('time').sleep(600)"
SHOW = "from qwen_runtime.serve import signs_of_life; signs_of_life.show(); print(flush=True);"


@contextmanager
def started(what: str) -> Iterator[psutil.Process]:
    with subprocess.Popen([sys.executable, "-c", SHOW + what], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        try:
            yield psutil.Process(process.pid)
        finally:
            process.kill()


def silent_for_a_beat(silence: Silence) -> bool:
    silence.look(1)
    time.sleep(1.5)
    return silence.look(1) > 0


@pytest.mark.parametrize("what", [IDLE, BUSY])
def test_stopped_or_not(what: str) -> None:
    with started(what) as process:
        silence = Silence(process.pid)
        until(lambda: silence.look(1) == 0)
        process.suspend()
        until(lambda: silent_for_a_beat(silence))  # a thread may stop later than the first
        process.resume()
        until(lambda: silence.look(1) == 0)


def test_a_process_that_is_not_there() -> None:
    with started(IDLE) as process:
        pid = process.pid
        silence = Silence(pid)
    assert processor_time(pid) is None and silence.look(1) == silence.look(1) == 0
