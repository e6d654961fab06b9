"""start.sh: what answers when something of a kiosk is damaged, killed, replaced or asked for wrongly."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from qwen_common.errors import UserError
from qwen_launcher.installed import Installed
from qwen_runtime.kiosk.install import Installation

from tests.support.ports import free_port
from tests.support.small_kiosk import (
    WEIGHTS,
    ask,
    new_key,
    resealed,
    small_bundle,
    started,
    wait_for,
)
from tests.support.waiting import PATIENCE, until

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="start.sh needs a shell")
PROGRAM = "site/qwen_runtime/kiosk/program.py"


def quiet(text: str) -> None:
    """Nobody to tell."""


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_key(tmp_path_factory.mktemp("key"))


@pytest.fixture(scope="module")
def installed(key: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Version 1.1 in use, 1.0 before it; their weights are the same."""
    folder = tmp_path_factory.mktemp("small")
    for version in ("1.0", "1.1"):
        source = small_bundle(folder / version, key, version)
        Installation(folder / "kiosk").install(source, key.with_suffix(".pub"), quiet)
    return folder / "kiosk"


@pytest.fixture
def kiosk(installed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(installed, tmp_path / "a kiosk"))


def newest(target: Path) -> Path:
    return target / "releases" / "1.1"


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes() or b"\0")
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def flipped_in_secret(path: Path) -> None:
    """With the file's times set back."""
    status = path.stat()
    flipped(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def removed(path: Path) -> None:
    path.unlink()


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthened(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def made_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def made_a_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def unlike_json(path: Path) -> None:
    path.write_bytes(b"[]")


def null(path: Path) -> None:
    path.write_bytes(b"null")


def junk(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(1000))


DAMAGES = (
    flipped,
    flipped_in_secret,
    emptied,
    removed,
    shortened,
    lengthened,
    made_a_folder,
    made_a_link,
    junk,
)


@pytest.mark.parametrize(
    "place,damage",
    [
        (PROGRAM, emptied),
        (PROGRAM, removed),
        (PROGRAM, flipped_in_secret),
        ("site/library.py", made_a_link),
        (WEIGHTS, flipped_in_secret),
        ("bundle.json", null),
        ("bundle.json.sig", emptied),
    ],
)
def test_a_damaged_version_is_left_for_the_last_good_one(
    kiosk: Path, place: str, damage: Callable[[Path], None]
) -> None:
    damage(newest(kiosk) / place)
    with started(kiosk) as (_, port):
        assert wait_for(port).startswith("1.0 auto hello")


@pytest.mark.parametrize(
    "place,damage,served",
    [
        ("current", emptied, "1.0"),
        ("current", junk, "1.0"),
        ("current", removed, "1.0"),
        ("current", made_a_folder, "1.0"),
        ("key.pub", emptied, "1.1"),
        ("key.pub", flipped, "1.1"),
        ("launcher.pyz", flipped, "1.1"),
        ("launcher.pyz", emptied, "1.1"),
        ("state/checked-1.1.json", unlike_json, "1.1"),
        ("state/checked-1.1.json", null, "1.1"),
        ("state", shutil.rmtree, "1.1"),
    ],
)
def test_what_is_beside_the_versions_is_not_missed(
    kiosk: Path, place: str, damage: Callable[[Path], None], served: str
) -> None:
    damage(kiosk / place)
    with started(kiosk) as (_, port):
        assert wait_for(port).startswith(served)


def test_folders_that_are_nested_more_deeply_than_python_calls_itself(kiosk: Path) -> None:
    path = newest(kiosk) / "site" / "a"
    for _ in range(1200):
        os.mkdir(path)
        path = path / "a"
    path.touch()
    whole = Installed(kiosk)
    try:
        with pytest.raises(UserError, match="does not belong in"):
            whole.check(whole.current or pytest.fail())
    finally:
        subprocess.run(["rm", "-rf", str(newest(kiosk) / "site" / "a")], check=True)


def test_a_dangling_link_hides_no_version(kiosk: Path) -> None:
    (kiosk / "releases" / "9.9").symlink_to("nowhere")
    for name in ("current", "previous"):
        emptied(kiosk / name)
    assert sorted(found.name for found in Installed(kiosk).candidates()) == ["1.0", "1.1"]


@pytest.mark.parametrize("by", ["a link", "a path that CDPATH changes"])
def test_where_the_scripts_are_started_from(kiosk: Path, by: str, tmp_path: Path) -> None:
    """Each finds its own folder: `verify` says that everything is whole."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "start.sh").symlink_to(kiosk / "start.sh")
    shutil.copytree(kiosk, tmp_path / "elsewhere" / kiosk.name)
    command = [str(tmp_path / "bin" / "start.sh")] if by == "a link" else [f"{kiosk.name}/start.sh"]
    port = free_port()
    process = subprocess.Popen(
        ["sh", *command, "--port", str(port)],
        cwd=kiosk.parent,
        env={**os.environ, "CDPATH": str(tmp_path / "elsewhere")},
        stderr=subprocess.DEVNULL,
    )
    try:
        assert wait_for(port).startswith("1.1")
        assert json.loads((kiosk / "state" / "running.json").read_text())["supervisor"] == process.pid
    finally:
        process.terminate()
        process.wait(timeout=PATIENCE)


def test_a_number_of_an_earlier_boot_is_another_process(kiosk: Path) -> None:
    """After a restart an editor of a file in the kiosk's folder may have the old supervisor's number."""
    command = [sys.executable, "-c", "import time; time.sleep(600)", str(kiosk / "README.txt")]
    other = subprocess.Popen(command)
    running = {"boot": "another", "supervisor": other.pid, "server": other.pid, "release": "1.1"}
    (kiosk / "state" / "running.json").write_text(json.dumps(running))
    try:
        with started(kiosk) as (_, port):
            assert wait_for(port).startswith("1.1")
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_compiled_files_of_an_earlier_server_are_not_read(kiosk: Path) -> None:
    """They are damaged under a running one, which then dies."""
    with started(kiosk) as (_, port):
        wait_for(port)
        compiled = list((kiosk / "state" / "compiled").rglob("library.*.pyc"))
        assert compiled
        for path in compiled:
            path.write_bytes(path.read_bytes()[:16] + b"\xff" * 50)
        server = json.loads((kiosk / "state" / "running.json").read_text())["server"]
        os.kill(server, signal.SIGKILL)
        until(lambda: json.loads((kiosk / "state" / "running.json").read_text())["server"] != server)
        assert wait_for(port).startswith("1.1 auto hello")


@pytest.mark.parametrize("content", [b"", b"\n", b"one two", b"\xff", None])
def test_a_missing_key_of_the_api_ends_with_a_message(
    content: bytes | None, key: Path, tmp_path: Path
) -> None:
    """The real `serve` reads it; None: the file is a link that leads nowhere."""
    made = small_bundle(tmp_path / "made", key, "1.0")
    library = made / "site" / "library.py"
    library.write_text(
        "import os, sys\n"
        "if 'serve' in sys.argv:\n"
        "    line = [sys.executable, '-c', 'from qwen_runtime.cli import main; main()']\n"
        f"    paths = {{'PYTHONPATH': {os.pathsep.join(sys.path)!r}}}\n"
        "    os.execve(sys.executable, line + sys.argv[sys.argv.index('serve'):], {**os.environ, **paths})\n"
        + library.read_text()
    )
    target = tmp_path / "kiosk"
    bundle = resealed(made, tmp_path / "bundle", key)
    Installation(target).install(bundle, key.with_suffix(".pub"), quiet)
    if content is None:
        (target / "api.key").symlink_to("nowhere")
    else:
        (target / "api.key").write_bytes(content)
    with started(target) as (process, _):
        assert process.wait(timeout=PATIENCE) == 2
        said = process.communicate()[1].strip().splitlines()[-1]
    assert said.startswith("error: ") and "API key" in said and "api.key" in said


def random_damage(target: Path, generator: random.Random) -> str:
    """Something happens to a file of the newest version, or to one beside the versions; says what."""
    files = [path for path in newest(target).rglob("*") if path.is_file()]
    files += [target / name for name in ("current", "previous", "key.pub", "key.copy.pub", "launcher.pyz")]
    path, damage = generator.choice(files), generator.choice(DAMAGES)
    damage(path)
    return f"{path.relative_to(target)} {damage.__name__}"


def test_random_damages(kiosk: Path, tmp_path: Path) -> None:
    """Which versions would be started; `test_kiosk.py` starts them, large ones."""
    generator = random.Random(0)
    for index in range(24):
        copy = Path(shutil.copytree(kiosk, tmp_path / str(index)))
        happened = random_damage(copy, generator)
        whole = Installed(copy)
        found = []
        for release in whole.candidates():
            try:
                whole.check(release)
                found.append(release.name)
            except Exception as error:
                assert type(error).__name__ == "UserError", (happened, error)
        assert "1.0" in found, happened
        shutil.rmtree(copy)


def test_nothing_that_python_writes_matters(kiosk: Path) -> None:
    """Compiled files of another optimisation and of another source, and a start that writes some."""
    compiled = newest(kiosk) / "site" / "__pycache__"
    source = newest(kiosk) / "site" / "library.py"
    text = source.read_text()
    status = source.stat()
    source.write_text(
        text.replace("hello", "HELLO")
    )  # as long, and compiled for the time that it is set back to
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    for flag in ("-O", "-B", "-OO"):
        command = [sys.executable, flag, "-c", "import library"]
        subprocess.run(command, check=True, cwd=source.parent, env=environment)
    command = [sys.executable, "-m", "compileall", "-q", "."]
    subprocess.run(command, check=True, cwd=source.parent, env=environment)
    source.write_text(text)
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert len(list(compiled.iterdir())) == 3
    for variables in (
        {"PYTHONOPTIMIZE": "1"},
        {"PYTHONSTARTUP": "/x", "PYTHONHOME": "/x", "PYTHONPATH": "/x"},
    ):
        with started(kiosk, **variables) as (_, port):
            assert wait_for(port) == "1.1 auto hello 0"


def test_modules_of_others_are_not_found(kiosk: Path, tmp_path: Path) -> None:
    """Not those on the user's path; one that was put into the version is damage."""
    (tmp_path / "library.py").write_text("raise SystemExit(7)")
    with started(kiosk, PYTHONPATH=str(tmp_path)) as (_, port):
        assert wait_for(port).startswith("1.1 auto hello")
    (newest(kiosk) / "site" / "zlib.py").write_text("raise SystemExit(7)")
    with started(kiosk) as (_, port):
        assert wait_for(port).startswith("1.0")


def test_when_every_version_is_damaged_it_says_so(kiosk: Path) -> None:
    for release in (kiosk / "releases").iterdir():
        emptied(release / PROGRAM)
    with started(kiosk) as (process, _):
        assert process.wait(timeout=PATIENCE) == 2
        assert "every version in" in process.communicate()[1]


@pytest.mark.parametrize(
    "options,damage,message",
    [
        (["--wrong", "1"], None, "no such option: --wrong"),
        ([], "keys", "key.pub is missing or damaged"),
    ],
)
def test_what_another_start_does_not_mend_ends_with_a_message(
    kiosk: Path, options: list[str], damage: str | None, message: str
) -> None:
    if damage:
        removed(kiosk / "key.pub")
        emptied(kiosk / "key.copy.pub")
    with started(kiosk, *options) as (process, _):
        assert process.wait(timeout=PATIENCE) == 2
        said = process.communicate()[1].strip().splitlines()[-1]
    assert message in said and said.startswith("error: ")


def test_a_port_that_is_taken_is_waited_for(kiosk: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port := free_port())],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    wait_for(port)
    process = subprocess.Popen(
        ["sh", str(kiosk / "start.sh"), "--port", str(port)], stderr=subprocess.DEVNULL
    )
    try:
        time.sleep(1)
        assert process.poll() is None
        other.terminate()
        other.wait()
        assert wait_for(port, text="1.1").startswith("1.1")
    finally:
        process.terminate()
        process.wait(timeout=PATIENCE)


@pytest.mark.parametrize("hangs", [False, True])
def test_a_killed_supervisor_leaves_no_orphan_behind(tmp_path: Path, key: Path, hangs: bool) -> None:
    """One that ends with its supervisor, and one that does not, which the next supervisor ends."""
    target = tmp_path / "kiosk"
    Installation(target).install(
        small_bundle(tmp_path / "bundle", key, "1.0", HANGS=hangs), key.with_suffix(".pub"), quiet
    )
    port = free_port()
    command = ["sh", str(target / "start.sh"), "--port", str(port)]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    wait_for(port)
    server = json.loads((target / "state" / "running.json").read_text())["server"]
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        until(lambda: json.loads((target / "state" / "running.json").read_text())["server"] != server)
        wait_for(port)
        assert not runs(server)
        third = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        assert third.returncode == 2 and f"is served by process {second.pid} already" in third.stderr
    finally:
        second.terminate()
        second.wait(timeout=PATIENCE)


def runs(process: int) -> bool:
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_running_kiosk_changes_to_an_update_and_back(kiosk: Path, key: Path, tmp_path: Path) -> None:
    with started(kiosk) as (process, port):
        wait_for(port)
        Installation(kiosk).install(small_bundle(tmp_path / "b", key, "1.2", SAYS="new"), None, quiet)
        assert wait_for(port, text="1.2") == "1.2 auto new 0"
        Installation(kiosk).roll_back()
        assert wait_for(port, text="1.1").startswith("1.1")
        assert process.poll() is None


def test_a_restart_is_checked_like_a_start(kiosk: Path) -> None:
    """A file changes under a running server, which then dies."""
    with started(kiosk) as (_, port):
        wait_for(port)
        flipped_in_secret(newest(kiosk) / "site" / "library.py")
        os.kill(json.loads((kiosk / "state" / "running.json").read_text())["server"], signal.SIGKILL)
        assert wait_for(port, text="1.0").startswith("1.0 auto hello")
        assert ask(port).startswith("1.0")


@contextmanager
def impatient(target: Path, **patience: float) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`supervise` with another patience, and the port; its standard error is a pipe."""
    port = free_port()
    script = (
        "import sys; from pathlib import Path; from qwen_launcher.supervise import Patience, supervise;"
        f"supervise(Path(sys.argv[1]), '127.0.0.1', int(sys.argv[2]), [], Patience(**{patience!r}))"
    )
    arguments = [sys.executable, "-c", script, str(target), str(port)]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process, port
        finally:
            process.terminate()


def test_a_version_that_keeps_crashing_is_left(tmp_path: Path, key: Path) -> None:
    """Its files are as they were signed: the CPU is tried, then the last good version."""
    target = tmp_path / "kiosk"
    for version, exit_code in (("1.0", 0), ("1.1", 3)):
        source = small_bundle(tmp_path / version, key, version, CRASHES=exit_code)
        Installation(target).install(source, key.with_suffix(".pub"), quiet)
    with impatient(target, interval=0.1, pause=0.05) as (process, port):
        assert wait_for(port).startswith("1.0 auto")
        process.terminate()
        said = process.communicate(timeout=PATIENCE)[1]
    assert said.count("starting version 1.1, provider auto") == 3
    assert said.count("starting version 1.1, provider cpu") == 3


@pytest.mark.parametrize(
    ("looks", "loading", "end"),
    [
        ((503,) * 10, 600.0, None),  # the model's process died, and loads again
        ((0, 0, 503) * 4, 600.0, None),
        ((0,) * 10, 600.0, "does not answer"),
        ((503,) * 100, 2.0, "does not get ready"),
    ],
    ids=["loads again", "loads again, slowly", "silent", "never ready"],
)
def test_a_server_that_loads_its_model_again_is_left_alone(
    looks: tuple[int, ...], loading: float, end: str | None, tmp_path: Path, key: Path
) -> None:
    """Not one that answers nothing three times, or is not ready for too long."""
    target = tmp_path / "kiosk"
    bundle = small_bundle(tmp_path / "bundle", key, "1.0", THEN=looks)
    Installation(target).install(bundle, key.with_suffix(".pub"), quiet)
    with impatient(target, interval=0.1, missed=3, loading=loading, pause=0.05) as (process, port):
        wait_for(port)
        log = target / "logs" / "kiosk.log"
        until(lambda: f"the server {end}" in log.read_text() if end else ask(port, "/looks") == "0")
        time.sleep(0.3)  # for what would follow the last look
        process.terminate()
        said = process.communicate(timeout=PATIENCE)[1]
    if end is None:
        assert said.count("starting version") == 1 and "the server " not in said
    else:
        assert f"the server {end}" in said
