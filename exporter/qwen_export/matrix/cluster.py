"""The work of a release on the machines of a Ray cluster: a task for each group, placed by what it needs.

Ray does the rest: a task waits for a machine with the cores and the memory, and where its machine is lost,
goes on where it was on another. Every path is on a folder that all machines have.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from qwen_common.errors import UserError, one_line
from qwen_common.version import own_version

from qwen_export.matrix.plan import Planned
from qwen_export.matrix.run import Outcome, run
from qwen_export.progress import Progress

_LOOPBACK = ("127.", "localhost:")
_RETRIES = 3  # of a task whose machine is lost

Group = Sequence[Planned]


def run_on_cluster(groups: Sequence[Group], address: str, cpus: int | None) -> Iterator[list[Outcome]]:
    """`run` of each group, wherever there is room; outcomes as they come.

    Args:
        address: `auto`, or `HOST:PORT` of the cluster's head.
        cpus: cores of a task; None: as many as the smallest machine has.

    Raises:
        UserError: Ray is not installed, there is no such cluster, or no machine has what a task needs.
    """
    with redirect_stdout(sys.stderr):  # Ray shows there what its machines print, and stdout is for --json
        ray = _connected(address)
        try:
            yield from _outcomes(ray, groups, address, cpus)
        finally:
            ray.shutdown()


def _outcomes(ray: Any, groups: Sequence[Group], address: str, cpus: int | None) -> Iterator[list[Outcome]]:
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if not machines:
        raise UserError(f"the Ray cluster at {address} has no machine with a core: start one")
    cores = cpus or int(min(machine["CPU"] for machine in machines))
    needs = [(group, max(one.memory for one in group)) for group in groups]
    for group, memory in needs:
        _require(group, cores, memory, machines)
    running: dict[Any, Group] = {}
    try:
        for group, memory in needs:
            task = ray.remote(num_cpus=cores, memory=memory, max_retries=_RETRIES)(_task)
            running[task.remote(group, own_version())] = group
        while running:
            (done,), _ = ray.wait(list(running))
            group = running.pop(done)
            try:
                yield ray.get(done)
            except Exception as error:
                yield [_failed(planned, error) for planned in group]
    finally:
        for task in running:
            ray.cancel(task)


def import_ray(address: str) -> Any:
    """The module, set up for a cluster.

    Raises:
        UserError: it is not installed.
    """
    # With more tries, minutes go by without a word where there is no cluster.
    settings = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_NUM_REDIS_GET_RETRIES": "3"}
    if address.startswith(_LOOPBACK):  # which Ray would replace by the machine's other address
        settings["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise UserError(f"--ray needs {error.name}: pip install 'qwen-edge[cluster]'") from error
    return ray


def _connected(address: str) -> Any:
    """The module `ray`, connected."""
    ray = import_ray(address)
    try:
        ray.init(address=address, log_to_driver=True, logging_level="warning")
    except Exception as error:  # the library's own, and those of its clients
        reason = one_line((str(error).strip() or type(error).__name__).splitlines()[0])
        raise UserError(
            f"no Ray cluster at {address} ({reason}): `ray start --head` on one machine starts one, and "
            "`ray start --address=HOST:PORT` adds others"
        ) from error
    return ray


def _require(group: Group, cores: int, memory: int, machines: Sequence[Mapping[str, float]]) -> None:
    if not any(machine["CPU"] >= cores and machine.get("memory", 0) >= memory for machine in machines):
        most = max(machine.get("memory", 0) for machine in machines)
        raise UserError(
            f"{group[0].combination.label} needs {cores} cores and {memory / 1e9:.1f} GB, and no machine of "
            f"the cluster has both (at most {most / 1e9:.1f} GB): add a larger one, set checks.verify = "
            "false, or give fewer --cpus"
        )


def _task(group: Group, version: str) -> list[Outcome]:
    """On a machine of the cluster."""
    if own_version() != version:
        raise UserError(
            f"a machine of the cluster has qwen-edge {own_version()}, not {version}: install that"
        )
    return run(group, _lines)


def _failed(planned: Planned, error: Exception) -> Outcome:
    outcome = Outcome(planned)
    outcome.fail(getattr(error, "cause", None) or error)
    return outcome


class _Lines:
    """How far a task is, in lines that Ray shows."""

    def __init__(self, title: str) -> None:
        self._title = title

    def note(self, message: str) -> None:
        print(f"{self._title}: {message}", flush=True)

    def start(self, total: int) -> None: ...

    def advance(self, count: int) -> None: ...


@contextmanager
def _lines(title: str, of_bytes: bool) -> Iterator[Progress]:
    print(title, flush=True)
    yield _Lines(title)
