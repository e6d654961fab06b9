"""Installing and updating: what is refused, what is kept, what is asked of the disk and of the key."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from qwen_common.errors import UserError
from qwen_export.bundle.keys import make_keys
from qwen_launcher.bundle import Bundle, python_digest
from qwen_launcher.command import main as launcher
from qwen_runtime.kiosk import staging
from qwen_runtime.kiosk.install import Installation

from tests.support.small_kiosk import WEIGHTS, new_key, resealed, small_bundle
from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="locks and links of POSIX")


def quiet(text: str) -> None:
    """Nobody to tell."""


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_key(tmp_path_factory.mktemp("key"))


@pytest.fixture(scope="module")
def bundles(key: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Versions with the same weights; 1.3 has others."""
    folder = tmp_path_factory.mktemp("bundles")
    weights = {"1.0": 0, "1.1": 0, "1.2": 0, "1.3": 1}
    return {name: small_bundle(folder / name, key, name, seed) for name, seed in weights.items()}


@pytest.fixture
def kiosk(bundles: dict[str, Path], key: Path, tmp_path: Path) -> Installation:
    installation = Installation(tmp_path / "kiosk")
    installation.install(bundles["1.0"], key.with_suffix(".pub"), quiet)
    return installation


def versions(installation: Installation) -> tuple[str | None, str | None, list[str]]:
    """In use, the one before, and what is on the disk."""
    current, previous = installation.current, installation.previous
    names = sorted(os.listdir(installation.releases))
    return current and current.name, previous and previous.name, names


def test_an_installed_version_is_the_bundle_and_nothing_else(
    kiosk: Installation, bundles: dict[str, Path], key: Path
) -> None:
    root = kiosk.releases / "1.0"
    assert {path.relative_to(root) for path in root.rglob("*")} == {
        path.relative_to(bundles["1.0"]) for path in bundles["1.0"].rglob("*")
    }
    Bundle.open(root, key.with_suffix(".pub")).check()
    assert os.access(kiosk.target / "qwen-run", os.X_OK)


@pytest.mark.parametrize("ends", [b"\r\n", b"\r", b"\n\n"])
def test_a_key_with_other_line_ends_is_the_same_key(
    kiosk: Installation, bundles: dict[str, Path], key: Path, ends: bytes, tmp_path: Path
) -> None:
    """As an editor, a download or a text-mode write on Windows leaves it."""
    pem = key.with_suffix(".pub").read_bytes()
    other = tmp_path / "their.pub"
    other.write_bytes(b"\xef\xbb\xbf" * (ends == b"\r\n") + pem.replace(b"\n", ends))
    kiosk.key.write_bytes(pem.replace(b"\n", b"\r\n"))
    kiosk.install(bundles["1.1"], other, quiet)
    assert versions(kiosk) == ("1.1", "1.0", ["1.0", "1.1"])
    with pytest.raises(UserError, match="is not the key of"):
        kiosk.install(bundles["1.2"], make_keys(tmp_path / "another.key"), quiet)


def test_the_version_that_served_is_kept_over_one_that_never_did(
    kiosk: Installation, bundles: dict[str, Path]
) -> None:
    kiosk.remember(kiosk.state / "good", "1.0")  # as the watchdog does
    kiosk.install(bundles["1.1"], None, quiet)
    kiosk.install(bundles["1.2"], None, quiet)
    assert versions(kiosk) == ("1.2", "1.0", ["1.0", "1.2"])


def test_a_damaged_version_is_not_what_one_goes_back_to(
    kiosk: Installation, bundles: dict[str, Path]
) -> None:
    """1.1 is damaged in use; 1.2 goes on from there, and 1.0 stays."""
    kiosk.install(bundles["1.1"], None, quiet)
    (kiosk.releases / "1.1" / "site" / "library.py").write_text("")
    kiosk.install(bundles["1.2"], None, quiet)
    assert versions(kiosk) == ("1.2", "1.0", ["1.0", "1.2"])
    kiosk.roll_back()
    assert versions(kiosk)[:2] == ("1.0", "1.2")


def test_an_update_to_the_same_version_mends_it(kiosk: Installation, bundles: dict[str, Path]) -> None:
    said: list[str] = []
    kiosk.install(bundles["1.0"], None, said.append)
    assert said == ["version 1.0 is in use already: nothing to do"]
    (kiosk.releases / "1.0" / WEIGHTS).unlink()
    (kiosk.target / "launcher.pyz").write_bytes(b"")
    (kiosk.target / "current").write_bytes(b"")
    kiosk.key.write_bytes(b"")
    change = kiosk.install(bundles["1.0"], None, quiet)
    assert change.moved is not None and change.moved.fetched == 300_000
    launch("verify", str(kiosk.target), "--full")
    assert versions(kiosk) == ("1.0", None, ["1.0"])


def launch(*arguments: str) -> None:
    saved = sys.argv
    sys.argv = ["launcher.pyz", *arguments]
    try:
        launcher()
    finally:
        sys.argv = saved


@pytest.mark.parametrize("pointer", [b"", b"1.1\0", b"../1.0", b"\xff\xfe", b"[]"])
def test_older_versions_are_refused_whatever_current_says(
    kiosk: Installation, bundles: dict[str, Path], pointer: bytes
) -> None:
    kiosk.install(bundles["1.1"], None, quiet)
    (kiosk.target / "current").write_bytes(pointer)
    (kiosk.target / "previous").unlink()
    with pytest.raises(UserError, match=r"version 1\.0 is older than 1\.1"):
        kiosk.install(bundles["1.0"], None, quiet)
    kiosk.install(bundles["1.0"], None, quiet, older=True)
    assert versions(kiosk)[0] == "1.0"


def test_another_bundle_of_the_same_version(kiosk: Installation, key: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"another version 1\.0 is installed"):
        kiosk.install(small_bundle(tmp_path / "b", key, "1.0", SAYS="other"), None, quiet)


def test_what_does_not_work_or_changed_leaves_nothing(
    kiosk: Installation, bundles: dict[str, Path], key: Path, tmp_path: Path
) -> None:
    broken = small_bundle(tmp_path / "broken", key, "1.1", SELF_TEST=3)
    with pytest.raises(UserError, match="the new version does not work"):
        kiosk.install(broken, None, quiet)
    changed = Path(shutil.copytree(bundles["1.3"], tmp_path / "changed"))
    (changed / WEIGHTS).write_bytes(b"x")
    with pytest.raises(UserError, match=r"model\.onnx\.data is not as it was signed"):
        kiosk.install(changed, None, quiet)
    (changed / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"model\.onnx\.data is missing"):
        kiosk.install(changed, None, quiet)
    assert versions(kiosk) == ("1.0", None, ["1.0"])


def test_the_disk_is_asked_for_what_is_used(
    kiosk: Installation, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same weights a full disk needs room for the rest alone: two names of one file."""
    free = 16 * 1024 * 1024 + 200_000
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(staging, "_can_clone", lambda *_: False)
    with pytest.raises(UserError, match=r"needs 0\.02 GB and .* has 0\.02 free: free some space"):
        kiosk.install(bundles["1.3"], None, quiet)
    said: list[str] = []
    change = kiosk.install(bundles["1.1"], None, said.append)
    assert any("no room for a second copy" in line for line in said)
    assert change.moved is not None and change.moved.linked >= 300_000
    one, other = (kiosk.releases / name / WEIGHTS for name in ("1.0", "1.1"))
    assert one.stat().st_ino == other.stat().st_ino
    monkeypatch.undo()
    kiosk.install(bundles["1.2"], None, quiet)
    assert (kiosk.releases / "1.2" / WEIGHTS).stat().st_ino != other.stat().st_ino


def test_a_damaged_file_is_not_taken_over(kiosk: Installation, bundles: dict[str, Path]) -> None:
    (kiosk.releases / "1.0" / WEIGHTS).write_bytes(bytes(300_000))
    change = kiosk.install(bundles["1.1"], None, quiet)
    assert change.moved is not None and change.moved.fetched >= 300_000
    kiosk.check(kiosk.current or pytest.fail(), full=True)


def test_no_stranger_holds_the_lock(kiosk: Installation, bundles: dict[str, Path]) -> None:
    """A lock is taken on an open file, and nobody else can open this one."""
    lock = kiosk.target / "lock"
    lock.chmod(0o644)  # as earlier versions left it
    kiosk.install(bundles["1.1"], None, quiet)
    assert lock.stat().st_mode & 0o077 == 0
    with lock.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another install is changing"):
            kiosk.install(bundles["1.2"], None, quiet)
        with pytest.raises(UserError, match="another install is changing"):
            kiosk.roll_back()


def test_what_the_service_leaves_in_its_folder_leads_root_nowhere(
    kiosk: Installation, bundles: dict[str, Path], tmp_path: Path
) -> None:
    """The service may write to `state`: links to other files, and a pipe that nobody writes to."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for name in ("checked-1.1.json", ".checked-1.1.json.partial", ".update.json.partial"):
        (kiosk.state / name).symlink_to(secret)
    os.mkfifo(kiosk.state / "good")
    os.mkfifo(kiosk.state / "running.json")
    kiosk.install(bundles["1.1"], None, quiet)
    assert secret.read_text() == "secret" and versions(kiosk)[0] == "1.1"


@pytest.mark.parametrize("mask", [0o077, 0o000])
def test_others_read_and_do_not_write_whatever_the_umask(
    mask: int, bundles: dict[str, Path], key: Path, tmp_path: Path
) -> None:
    """The service is another user than root, whose umask is often 077."""
    installation = Installation(tmp_path / "kiosk")
    before = os.umask(mask)
    try:
        installation.install(bundles["1.0"], key.with_suffix(".pub"), quiet)
        installation.install(bundles["1.1"], None, quiet)
        installation.roll_back()
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    for path in [installation.target, *installation.target.rglob("*")]:
        mode = path.stat().st_mode & 0o777
        readable = 0o055 if path.is_dir() else 0o044
        assert path.name == "lock" or mode & 0o077 in (readable, 0o055), (path, oct(mode))


@pytest.mark.skipif(os.geteuid() != 0, reason="folders of other users")
def test_root_installs_into_no_folder_of_another_user(
    bundles: dict[str, Path], key: Path, tmp_path: Path
) -> None:
    target = tmp_path / "kiosk"
    target.mkdir()
    os.chown(target, 65534, 65534)
    with pytest.raises(UserError, match="belongs to user 65534, who could change what runs"):
        Installation(target).install(bundles["1.0"], key.with_suffix(".pub"), quiet)
    assert not list(target.iterdir())
    os.chown(target, 0, 0)
    target.chmod(0o777)
    Installation(target).install(bundles["1.0"], key.with_suffix(".pub"), quiet)
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("name", ["bundle.json", "bundle.json.sig", "site/new.py"])
def test_a_pipe_on_a_stick_is_waited_for_by_nobody(
    name: str, kiosk: Installation, key: Path, tmp_path: Path
) -> None:
    made = small_bundle(tmp_path / "made", key, "1.1")
    (made / "site" / "new.py").write_text("what no version here has")
    stick = resealed(made, tmp_path / "stick", key)
    (stick / name).unlink()
    os.mkfifo(stick / name)
    command = [sys.executable, "-c", "from qwen_runtime.cli import main; main()", "update", str(stick)]
    variables = {**os.environ, "QWEN_EDGE_KIOSK": str(kiosk.target)}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: "), done.stderr
    assert versions(kiosk) == ("1.0", None, ["1.0"])


def test_a_python_that_is_carried_is_listed_for_the_scripts(
    key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the two versions that are kept. No Windows runs them here."""
    monkeypatch.setattr("qwen_runtime.kiosk.install._try", lambda release: None)
    installation = Installation(tmp_path / "kiosk")
    digests = []
    for version in ("1.0", "1.1", "1.2"):
        made = small_bundle(tmp_path / f"made{version}", key, version)
        (made / "python" / "Lib").mkdir(parents=True)
        for name in ("python.exe", "Lib/os.py"):
            (made / "python" / name).write_text(version)
        bundle = resealed(made, tmp_path / version, key)
        digests.append(python_digest(json.loads((bundle / "bundle.json").read_text())["files"]))
        installation.install(bundle, key.with_suffix(".pub"), quiet)
    assert (installation.target / "pythons.txt").read_text().split() == [digests[2], digests[1]]


def test_a_terminated_update_leaves_nothing(kiosk: Installation, key: Path, tmp_path: Path) -> None:
    """While its self-test runs; neither beside the versions nor among the system's temporary files."""
    slow = small_bundle(tmp_path / "slow", key, "1.1", SELF_TEST="__import__('time').sleep(600)")
    library = slow / "site" / "library.py"
    library.write_text(library.read_text().replace('"', ""))
    reseal(slow, key)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", "from qwen_runtime.cli import main; main()", "update", str(slow)],
        env={**os.environ, "QWEN_EDGE_KIOSK": str(kiosk.target), "TMPDIR": str(temporary)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "trying it" in line:
            break
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == 130
    assert versions(kiosk) == ("1.0", None, ["1.0"]) and not list(temporary.iterdir())
    report = json.loads((kiosk.state / "update.json").read_text())
    assert report["ok"] is False and report["version"] == "1.0"


def reseal(folder: Path, key: Path) -> None:
    from qwen_export.bundle.assemble import seal

    contents = json.loads((folder / "bundle.json").read_text())
    for name in ("bundle.json", "bundle.json.sig"):
        (folder / name).unlink()
    del contents["files"]
    seal(folder, contents, key)


def test_nothing_of_a_changed_bundle_runs(
    kiosk: Installation, bundles: dict[str, Path], key: Path, tmp_path: Path
) -> None:
    """Its scripts, its launcher and its packages would leave a file behind."""
    evil = small_bundle(tmp_path / "evil", key, "1.1", SAYS="new")
    mark = tmp_path / "evil-ran"
    shell = f"#!/bin/sh\ntouch {mark}\n"
    for name in ("install.sh", "start.sh", "qwen-run"):
        (evil / name).write_text(shell)
    python = f"open({str(mark)!r}, 'w')\n"
    (evil / "site" / "sitecustomize.py").write_text(python)
    for path in (evil / "site").rglob("*.py"):
        path.write_text(python)
    update = ["sh", str(kiosk.target / "qwen-run"), "update", str(evil)]
    # The installed program is a page of Python that knows no update; the real one does the same here.
    real = [sys.executable, "-c", "from qwen_runtime.cli import main; main()", *update[2:]]
    variables = {**os.environ, "QWEN_EDGE_KIOSK": str(kiosk.target)}
    done = subprocess.run(real, env=variables, capture_output=True, text=True)
    assert done.returncode == 2 and "is not as it was signed" in done.stderr
    first = [sys.executable, "-I", "-S", str(bundles["1.1"] / "launcher.pyz"), "install", str(evil)]
    done = subprocess.run(
        [*first, str(tmp_path / "new"), "--key", str(key.with_suffix(".pub"))], capture_output=True, text=True
    )
    assert done.returncode == 2 and "sitecustomize.py does not belong" in done.stderr
    assert not mark.exists() and versions(kiosk)[0] == "1.0"


def test_the_script_on_a_stick_is_for_the_first_install_only(
    kiosk: Installation, bundles: dict[str, Path], key: Path
) -> None:
    done = subprocess.run(
        ["sh", str(bundles["1.1"] / "install.sh"), str(key.with_suffix(".pub")), str(kiosk.target)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert f"update it with  {kiosk.target}/qwen-run update {bundles['1.1']}" in done.stderr
    assert versions(kiosk)[0] == "1.0"


def test_verify_full_reads_what_runs(kiosk: Installation, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the record on the device says that a file is as it was, and beside the versions."""
    launch("verify", str(kiosk.target), "--full")
    assert "files are as they were signed" in capsys.readouterr().out
    path = kiosk.releases / "1.0" / "site" / "library.py"
    path.write_bytes(path.read_bytes().replace(b"hello", b"HELLO"))
    record = kiosk.state / "checked-1.0.json"
    status = path.stat()
    seen = json.loads(record.read_text())
    seen["site/library.py"] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    record.write_text(json.dumps(seen))
    with pytest.raises(SystemExit):
        launch("verify", str(kiosk.target), "--full")
    assert "library.py" in capsys.readouterr().err
    path.write_bytes(path.read_bytes().replace(b"HELLO", b"hello"))
    (kiosk.target / "start.sh").write_text("#!/bin/sh\n")
    with pytest.raises(SystemExit):
        launch("verify", str(kiosk.target), "--full")
    assert "start.sh is missing or changed" in capsys.readouterr().err


def test_killed_updates_leave_a_working_version(
    kiosk: Installation, bundles: dict[str, Path], tmp_path: Path
) -> None:
    """SIGKILL at moments all along; a later update goes through."""
    command = [sys.executable, "-c", "from qwen_runtime.cli import main; main()", "update"]
    variables = {**os.environ, "QWEN_EDGE_KIOSK": str(kiosk.target)}
    started = time.monotonic()
    subprocess.run([*command, str(bundles["1.1"])], env=variables, check=True, capture_output=True)
    whole = time.monotonic() - started
    for index in range(4):
        process = subprocess.Popen(
            [*command, str(bundles["1.3"])], env=variables, stderr=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(whole * (index + 1) / 5)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kiosk.check(kiosk.current or pytest.fail(), full=True)
        assert versions(kiosk)[0] in ("1.1", "1.3")
    subprocess.run([*command, str(bundles["1.3"])], env=variables, check=True, capture_output=True)
    assert versions(kiosk) == ("1.3", "1.1", ["1.1", "1.3"])
