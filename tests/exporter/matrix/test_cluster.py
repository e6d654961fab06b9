"""A release on a Ray cluster: two machines, which are processes of this one, and the loss of one.

Slow, and skipped without Ray: `pip install 'qwen-edge[cluster,test]'` in an environment of its own, then
`python -m pytest -m slow tests/exporter/matrix/test_cluster.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.cli.program import main
from qwen_export.export import export
from qwen_profiles.schema import load_profile

from benchmarks.geometry import write_checkpoint
from benchmarks.support.artifacts import Quiet
from tests.exporter.test_resume import GEOMETRY, written
from tests.support.files import hashes
from tests.support.waiting import PATIENCE

RELEASE = """
profiles = ["cpu", "cpu-avx2", {profile = "cpu", set = ["weights.body=int8"], name = "cpu-8"}]
checks = {verify = false}
[[release]]
checkpoints = ["one", "two"]
"""
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs qwen-edge[cluster]")


def test_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "one").mkdir()
    (tmp_path / "release.toml").write_text("[[release]]\ncheckpoints = ['one']\nprofiles = ['cpu']\n")
    done = CliRunner().invoke(main, ["matrix", str(tmp_path / "release.toml"), "--ray", "auto"])
    assert done.exit_code == 2
    assert done.stderr == "error: --ray needs ray: pip install 'qwen-edge[cluster]'\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate(("one", "two")):
        write_checkpoint(tmp_path / name, GEOMETRY, seed)
    (tmp_path / "release.toml").write_text(RELEASE)
    return tmp_path


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without cores, and two machines with one core each."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    where = {"node_ip_address": "127.0.0.1", "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **where})
    made.machines = [made.add_node(num_cpus=1, memory=4_000_000_000, **where) for _ in range(2)]
    made.wait_for_nodes()
    yield made
    made.shutdown()


def start(folder: Path, address: str, *options: str) -> subprocess.Popen[str]:
    code = "from qwen_export.cli import main\nmain()"
    arguments = ["matrix", str(folder / "release.toml"), "--ray", address, "--json", *options]
    with (folder / "stderr").open("w") as stderr:
        return subprocess.Popen(
            [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=stderr, text=True
        )


def check(folder: Path, output: str) -> None:
    assert [row["state"] for row in json.loads(output)] == ["made"] * 6
    for name in ("one", "two"):
        export(Checkpoint.open(str(folder / name)), load_profile("cpu"), folder / f"{name}-alone", Quiet())
        assert hashes(folder / "artifacts" / f"{name}-cpu") == hashes(folder / f"{name}-alone")


@needs_ray
@pytest.mark.slow
def test_two_machines(folder: Path, cluster: Any) -> None:
    process = start(folder, cluster.address)
    seen: set[int] = set()  # how many exports go on at a time
    while process.poll() is None:
        seen.add(len({path.name.split("-")[0] for path in (folder / "artifacts").glob(".*.partial")}))
        time.sleep(0.05)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert 2 in seen
    check(folder, output)


@needs_ray
@pytest.mark.slow
def test_a_machine_is_lost(folder: Path, cluster: Any) -> None:
    process = start(folder, cluster.address)
    outputs = [folder / "artifacts" / f"{name}-cpu" for name in ("one", "two")]
    while not all(written(output) for output in outputs):
        assert process.poll() is None
        time.sleep(0.01)
    cluster.remove_node(cluster.machines[0], allow_graceful=False)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    assert "an earlier export did not finish: going on" in (folder / "stderr").read_text()
    check(folder, output)


@needs_ray
@pytest.mark.slow
def test_what_no_machine_has(folder: Path, cluster: Any) -> None:
    process = start(folder, cluster.address, "--cpus", "64")
    assert process.wait(PATIENCE) == 2
    code = "import sys; from qwen_export.cli import main; sys.argv[1:] = sys.argv[1:]; main()"
    arguments = ["matrix", str(folder / "release.toml"), "--ray", "127.0.0.1:1", "--no-progress"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and "no Ray cluster at 127.0.0.1:1" in done.stderr.splitlines()[-1]
