"""A real bundle of the trained checkpoint, installed and served without any network. Minutes of work."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from qwen_common.errors import UserError
from qwen_export.bundle.assemble import Device, bundle
from qwen_export.bundle.keys import make_keys
from qwen_export.bundle.platforms import PLATFORMS
from qwen_runtime.kiosk.install import Installation

from tests.support.ports import free_port
from tests.support.small_kiosk import resealed, wait_for
from tests.support.waiting import PATIENCE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux" or os.geteuid() != 0, reason="a network namespace needs Linux and root"
    ),
]
NO_NETWORK = ["unshare", "--net"]  # a namespace without interfaces


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    private = tmp_path_factory.mktemp("key") / "kiosk.key"
    make_keys(private)
    return private


@pytest.fixture(scope="module")
def first(cpu_artifact: Path, key: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Version 1.0, packed for this machine."""
    folder = tmp_path_factory.mktemp("bundles") / "first"
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    device = Device(f"linux_{os.uname().machine}", python)
    bundle(cpu_artifact, folder, device, "1.0", key, lambda _: None)
    return folder


@pytest.fixture(scope="module")
def second(first: Path, key: Path) -> Path:
    return resealed(first, first.with_name("second"), key, version="1.1")


@pytest.fixture(scope="module")
def installed(first: Path, key: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Version 1.0 as its own script installs it."""
    target = tmp_path_factory.mktemp("device") / "qwen-edge"
    script = [*NO_NETWORK, "sh", str(first / "install.sh"), str(key.with_suffix(".pub")), str(target)]
    subprocess.run(script, check=True, capture_output=True)
    return target


@pytest.fixture
def device(installed: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(installed, tmp_path / "device"))


def verified(target: Path) -> str:
    """The version in use, each byte of it checked."""
    installation = Installation(target)
    assert installation.current is not None
    installation.check(installation.current, full=True)
    return installation.current.name


def update(target: Path, source: Path) -> subprocess.Popen[str]:
    command = [*NO_NETWORK, "sh", str(target / "qwen-run"), "update", str(source)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


@contextmanager
def serving(target: Path) -> Iterator[int]:
    """start.sh on a free port; it is ready when this yields."""
    port = free_port()
    process = subprocess.Popen(
        ["sh", str(target / "start.sh"), "--port", str(port)],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(port, path="/health")
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=PATIENCE)
        finally:
            kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    """The process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def ask(port: int) -> str:
    body = json.dumps(
        {
            "model": "tiny-dense",
            "messages": [{"role": "user", "content": "What is yield?"}],
            "max_tokens": 8,
            "temperature": 0,
        }
    ).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", body, {"Content-Type": "application/json"}
    )
    answer = json.load(urllib.request.urlopen(request, timeout=PATIENCE))
    return answer["choices"][0]["message"]["content"]


def test_it_answers_from_the_device(installed: Path) -> None:
    assert verified(installed) == "1.0"
    with serving(installed) as port:
        assert ask(port)


def test_update_and_rollback(device: Path, second: Path) -> None:
    done = update(device, second)
    assert done.wait() == 0, done.stderr.read() if done.stderr else ""
    assert verified(device) == "1.1"
    assert Installation(device).roll_back().name == "1.0"
    assert verified(device) == "1.0"


def refusal(target: Path, source: Path, key: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        Installation(target).install(source, key, lambda _: None)
    assert verified(target) == "1.0"
    return str(caught.value)


def test_refused_versions_keep_the_old_one(device: Path, first: Path, key: Path, tmp_path: Path) -> None:
    older = resealed(first, tmp_path / "older", key, version="0.9")
    assert "is older than 1.0" in refusal(device, older)
    wrong = resealed(
        first, tmp_path / "wrong", key, version="1.2", self_test={"prompt": "Hello", "tokens": [0]}
    )
    assert "the new version does not work: the self-test answered" in refusal(device, wrong)
    other = Path(shutil.copytree(first, tmp_path / "other"))
    (other / "README.txt").write_text("what no version here has")
    damaged = resealed(other, tmp_path / "damaged", key, version="1.3")
    (damaged / "README.txt").write_text("x")
    assert "README.txt is not as it was signed" in refusal(device, damaged)
    assert "is not the key of" in refusal(device, first, make_keys(tmp_path / "other.key"))


def test_killed_updates_leave_a_working_version(device: Path, second: Path) -> None:
    """SIGKILL at 20 random moments; the whole group dies, pip among it."""
    started = time.monotonic()
    assert update(device, second).wait() == 0
    whole = time.monotonic() - started
    Installation(device).roll_back()
    generator = random.Random(0)
    for _ in range(20):
        process = update(device, second)
        time.sleep(generator.uniform(0, whole))
        kill(process)
        process.wait()
        if verified(device) == "1.1":
            Installation(device).roll_back()
    assert update(device, second).wait() == 0
    assert verified(device) == "1.1"


def test_killed_servers_are_started_again(installed: Path) -> None:
    """SIGKILL of the server process at 20 random moments."""
    generator = random.Random(0)
    with serving(installed) as port:
        expected = ask(port)
        for _ in range(20):
            time.sleep(generator.uniform(0, 1))
            subprocess.run(["pkill", "-KILL", "-f", f"serve .* --port {port}"], check=False)
            time.sleep(0.3)
            wait_for(port, path="/health")
            assert ask(port) == expected
    assert verified(installed) == "1.0"


@pytest.mark.parametrize("pattern", ["artifact/model.onnx.data", "site/**/onnxruntime_genai*.so"])
def test_a_changed_file_falls_back_to_the_last_good_version(device: Path, second: Path, pattern: str) -> None:
    assert update(device, second).wait() == 0
    path = next((device / "releases" / "1.1").glob(pattern))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with serving(device) as port:
        assert ask(port)
        assert "version 1.0" in (device / "logs" / "kiosk.log").read_text()
    with pytest.raises(UserError, match=path.name):
        verified(device)


def test_random_damages_of_any_file(device: Path, second: Path, tmp_path: Path) -> None:
    """20 of them, the Python packages included: the last good version answers each time."""
    assert update(device, second).wait() == 0
    generator = random.Random(2)
    files = [path for path in (device / "releases" / "1.1").rglob("*") if path.is_file()]
    for _ in range(20):
        path = generator.choice(files)
        saved = path.read_bytes()
        content = bytearray(saved)
        if content and generator.random() < 0.7:
            content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
            path.write_bytes(content)
        elif generator.random() < 0.5:
            path.unlink()
        else:
            path.write_bytes(saved[: len(saved) // 2] if saved else b"x")
        with serving(device) as port:
            assert ask(port), path
            running = json.loads((device / "state" / "running.json").read_text())
            assert running["release"] == "1.0", path
        path.write_bytes(saved)


def test_killed_first_installs_leave_nothing_or_a_working_version(
    first: Path, key: Path, tmp_path: Path
) -> None:
    """SIGKILL at 20 random moments of the script; then it is run to its end."""
    target = tmp_path / "qwen-edge"
    script = [*NO_NETWORK, "sh", str(first / "install.sh"), str(key.with_suffix(".pub")), str(target)]
    generator = random.Random(1)
    for _ in range(20):
        process = subprocess.Popen(
            script, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(generator.uniform(0, 12))
        kill(process)
        process.wait()
        if (target / "current").exists():
            assert verified(target) == "1.0"
            shutil.rmtree(target)
    subprocess.run(script, check=True, capture_output=True)
    assert verified(target) == "1.0"


@pytest.mark.parametrize("options", ["size=64k", "ro"])
def test_logs_on_a_full_or_read_only_disk(installed: Path, options: str) -> None:
    logs = installed / "logs"
    logs.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(logs)], check=True)
    try:
        if options != "ro":
            with suppress(OSError):
                (logs / "filler").write_bytes(bytes(1_000_000))
        with serving(installed) as port:
            assert ask(port)
    finally:
        subprocess.run(["umount", str(logs)], check=True)


def test_update_on_a_full_disk_is_refused(installed: Path, second: Path, tmp_path: Path) -> None:
    """The folder of releases on a disk of 120 MB; the version in use stays."""
    target = tmp_path / "device"
    target.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120m", "tmpfs", str(target)], check=True)
    try:
        with pytest.raises(UserError, match="free some space"):
            Installation(target).install(second, installed / "key.pub", lambda _: None)
        assert Installation(target).current is None
    finally:
        subprocess.run(["umount", str(target)], check=True)


def test_bundle_for_windows_has_exactly_the_packages_that_it_needs(
    cpu_artifact: Path, key: Path, tmp_path: Path
) -> None:
    """Each fits Windows and CPython 3.12, and together they meet each other's requirements there."""
    contents = bundle(cpu_artifact, tmp_path / "b", Device("win_amd64", "3.12"), "1.0", key, lambda _: None)
    packages = {
        canonicalize_name(found.name): found for found in distributions(path=[str(tmp_path / "b" / "site")])
    }
    environment = {
        **PLATFORMS["win_amd64"].markers,
        "python_version": "3.12",
        "python_full_version": "3.12.0",
    }
    for name, found in packages.items():
        tags = [
            tag for line in (found.read_text("WHEEL") or "").splitlines() for tag in line.split("Tag: ")[1:]
        ]
        assert any(tag.rpartition("-")[2] in ("win_amd64", "any") for tag in tags), name
        for path in found.files or []:
            if path.hash is not None and ".." not in path.parts:
                assert f"site/{str(path).replace(chr(92), '/')}" in contents["files"], path
        extras = ["", *(["kiosk", "serve", "vision"] if name == "qwen-edge" else [])]
        for item in map(Requirement, found.requires or []):
            needed = not item.marker or any(
                item.marker.evaluate({**environment, "extra": extra}) for extra in extras
            )
            if needed and item.name != "qwen-edge":
                version = packages[canonicalize_name(item.name)].version
                assert item.specifier.contains(version, prereleases=True), item
    assert "onnxruntime-genai" in packages and (tmp_path / "b" / "install.ps1").exists()
    assert not (tmp_path / "b" / "install.sh").exists()
    assert not list((tmp_path / "b").rglob("*.exe")), "a command names a Python of the machine that packed it"
