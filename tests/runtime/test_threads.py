"""With how many threads an artifact computes: what decides it, and the threads that really run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner
from qwen_common.errors import USER_ERROR, UserError
from qwen_runtime.bench_threads import Comparison, Row, compare, verdict
from qwen_runtime.child import child
from qwen_runtime.cli import main
from qwen_runtime.cores import Cores
from qwen_runtime.load_options import LoadOptions
from qwen_runtime.model import Model
from qwen_runtime.states import StateSettings
from qwen_runtime.threads import VARIABLE, Asked, Threads, decide

from tests.support.commands import heed_interrupts
from tests.support.threads import read_of_threads
from tests.support.waiting import PATIENCE, until

EIGHT = Cores(tuple(range(8)), tuple(range(8)))
HYBRID = Cores((0, 2, 4, 5, 6, 7), (0, 2))  # a fake one: two P and four E cores
linux = pytest.mark.skipif(sys.platform != "linux", reason="threads are read in /proc")


@pytest.mark.parametrize(
    "asked, variable, settings, count, why",
    [
        (3, "5", {"threads": 6}, 3, "asked for"),
        (None, "5", {"threads": 6}, 5, "by ORT_INTRA_OP_NUM_THREADS"),
        (None, "0", {"threads": 6}, 6, "by the artifact"),
        (None, "", {"threads": 20}, 8, "by the artifact"),  # made for a larger machine
        ("20", "", {}, 20, "asked for"),
        ("0", "5", {"threads": 6}, 8, "one for each physical core"),
        (
            None,
            "",
            {"threads": "performance"},
            8,
            "by the artifact: all cores are alike",
        ),
        (None, "", {"threads": [2]}, 8, "one for each physical core"),
        (None, "", {"threads": 10**6, "spin_us": 10**9}, 8, "one for each physical core"),
        (None, "", {"spin_us": -1}, 8, "one for each physical core"),
        (None, "", {}, 8, "one for each physical core"),
    ],
)
def test_order(asked: Any, variable: str, settings: dict[str, Any], count: int, why: str) -> None:
    found = decide(asked, settings, {VARIABLE: variable}, EIGHT)
    assert (found.count, found.why, found.spin_us) == (count, why, None)


def test_left_to_onnxruntime_only_where_it_takes_as_many() -> None:
    assert decide(None, {}, {}, EIGHT).session_options["intra_op_num_threads"] == 0
    for cores in Cores((3,), (3,), restricted=True), Cores((0, 1), (0, 1), quota=1.0):
        found = decide(None, {}, {}, cores)
        assert found.session_options["intra_op_num_threads"] == 1 and "may use" in str(found)
    # ONNX Runtime would take the variable's.
    assert decide(0, {}, {VARIABLE: "5"}, EIGHT).session_options["intra_op_num_threads"] == 8


def test_performance_cores() -> None:
    found = decide("performance:yield", {}, {}, HYBRID)
    assert str(found) == "2 threads, asked for: the P cores, on processors 0, 2, yielding while they wait"
    assert found.session_options == {
        "intra_op_num_threads": 2,
        "session.intra_op.allow_spinning": "0",
        "session.intra_op_thread_affinities": "3",  # counted from 1, and not the caller's
    }
    short = decide("2:50us", {"spin_us": 0}, {}, HYBRID)
    assert short.session_options["session.intra_op.spin_duration_us"] == "50" and "after 50 us" in str(short)
    assert decide("2", {"spin_us": 0}, {}, HYBRID).session_options["session.intra_op.allow_spinning"] == "0"
    assert found.openvino == {"INFERENCE_NUM_THREADS": 2, "SCHEDULING_CORE_TYPE": "PCORE_ONLY"}
    assert decide(None, {}, {}, HYBRID).count == 6
    granted = Cores(HYBRID.usable, HYBRID.performance, quota=0.5)
    assert "session.intra_op_thread_affinities" not in decide("performance", {}, {}, granted).session_options
    apple = Cores(tuple(range(10)), tuple(range(4)), numbered=False)
    assert (
        decide("performance", {}, {}, apple).processors == ()
        and decide("performance", {}, {}, apple).count == 4
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-1",
        "1.5",
        "2000",
        "9" * 5000,
        "Performance",
        "yield",
        ":yield",
        "2:",
        "2:us",
        "2:99999us",
        "2:5us:yield",
        "²",
        "2\n3",
    ],
)
def test_no_number(text: str) -> None:
    with pytest.raises(UserError, match=r"no number of threads .*: give a number, 0 for") as caught:
        Asked.parse(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250
    with pytest.raises(UserError, match="set a number of threads"):
        decide(None, {}, {VARIABLE: text or "x"}, EIGHT)


def tasks() -> dict[int, tuple[str, int]]:
    """By thread, the processors it may use and how often it has waited."""
    found = {}
    for thread, text in read_of_threads("status"):
        lines = dict(line.split(":", 1) for line in text.splitlines())
        found[thread] = (lines["Cpus_allowed_list"].strip(), int(lines["voluntary_ctxt_switches"]))
    return found


def count_threads(model: Model) -> int:
    """Of the model's process."""
    return len(tasks())


@linux
def test_threads_are_those_asked_for(cpu_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "2")
    with ExitStack() as stack:
        models = [
            stack.enter_context(child(cpu_artifact, LoadOptions("cpu", threads=threads)))
            for threads in (1, 4, None)
        ]

        def more() -> list[int]:
            one, *others = [model.call(count_threads) for model in models]
            return [count - one for count in others]

        until(lambda: more() == [3, 1])  # once the threads of loading have ended


@linux
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor")
@pytest.mark.parametrize("states", [None, StateSettings()], ids=["GenAI", "ONNX Runtime"])
def test_where_they_lie_and_how_they_wait(
    cpu_artifact: Path, states: StateSettings | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a fake hybrid CPU whose P cores are this machine's second and first processor: three threads, so
    that ONNX Runtime pins two, where by itself it would pin none."""
    monkeypatch.setattr("qwen_runtime.threads.find_cores", lambda: Cores((1, 0, 1, 7), (1, 0, 1)))
    waits = {}
    for asked in "performance", "performance:yield", "performance:20us":
        before = tasks()
        with Model.load(cpu_artifact, "cpu", threads=asked, states=states) as model:
            list(model.generate("a", max_tokens=2))
            begun = {thread: found for thread, found in tasks().items() if thread not in before}
            list(model.generate("Waiting. " * 200, max_tokens=1))  # one token has no product to share
            ended = tasks()
            assert model.info.placed.endswith(str(model.info.threads))
        pinned = {thread: where for thread, (where, _) in begun.items() if where in ("0", "1")}
        assert sorted(pinned.values()) == ["0", "1"]
        waits[asked] = sum(ended[thread][1] - begun[thread][1] for thread in pinned)
    # Also on a busy machine: there 0 against 63 at least.
    assert waits["performance:20us"] > 10 + waits["performance"], waits
    assert waits["performance:yield"] > 10 + 2 * waits["performance"], waits


def test_mistake_before_loading(tmp_path: Path) -> None:
    for command in ["answer", str(tmp_path), "a"], ["serve", str(tmp_path)], ["bench", str(tmp_path)]:
        result = CliRunner().invoke(main, [*command, "--threads", "many"])
        assert result.exit_code == USER_ERROR and "no number of threads 'many'" in " ".join(
            result.stderr.split()
        )


def test_several_in_turns(cpu_artifact: Path) -> None:
    found = compare(cpu_artifact, ["1", "2:yield"], LoadOptions("cpu"), [16], tokens=4, rounds=2)
    assert [(row.asked, row.threads.count, row.threads.spin_us) for row in found.rows] == [
        ("1", 1, None),
        ("2:yield", 2, 0),
    ]
    assert found.rows[0].decode_ratios == (1.0, 1.0)
    command = [
        "bench",
        str(cpu_artifact),
        "--threads",
        "1,2",
        "--contexts",
        "16",
        "--tokens",
        "2",
        "--rounds",
        "1",
    ]
    shown = CliRunner().invoke(main, command)
    assert (
        shown.exit_code == 0
        and "decodes the quickest" in shown.stdout
        and "1  1 thread, asked for" in shown.stdout
    ), shown.output
    rows = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)["rows"]
    assert [row["threads"]["count"] for row in rows] == [1, 2]


def measuring_children(process: int) -> bool:
    """Whether both of the processes that measure are past their imports."""
    found = 0
    for process_of_one in psutil.Process(process).children():
        with suppress(psutil.NoSuchProcess):
            found += any("onnxruntime_genai" in each.path for each in process_of_one.memory_maps())
    return found >= 2


@pytest.mark.skipif(sys.platform == "win32", reason="signals to a group of processes")
def test_interrupted_without_a_traceback(cpu_artifact: Path) -> None:
    """Ctrl-C reaches the processes that measure too."""
    code = "from qwen_runtime.cli import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        "bench",
        str(cpu_artifact),
        "--threads",
        "1,2",
        "--rounds",
        "10000",
    ]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=heed_interrupts,
    ) as run:
        until(lambda: measuring_children(run.pid))
        os.killpg(run.pid, signal.SIGINT)
        told, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == 130 and b"Traceback" not in told and b"interrupted" in told, told


@pytest.mark.parametrize("ratios, told", [((1.2, 1.3, 1.25), True), ((1.2, 0.9, 1.3), False)])
def test_verdict(ratios: tuple[float, ...], told: bool) -> None:
    def row(asked: str, ratios: tuple[float, ...]) -> Row:
        return Row(asked, Threads(1, (), None, ""), 512, 1.0, 1.0, (1.0, 1.0), ratios)

    text = verdict(Comparison("", "", "", 3, 1, (row("2", (1.0, 1.0, 1.0)), row("4", ratios))))
    assert (
        text.startswith("after 512 tokens '4' decodes the quickest, 1.2")
        and ("not told apart" not in text) == told
    )
