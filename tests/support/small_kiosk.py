"""Bundles whose program is a page of Python. The launcher does with them what it does with large ones.

The program answers /health, /looks with how many of THEN are still to come, and anything else with the
version and the provider that it was started with.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from qwen_export.bundle.assemble import seal, write_scripts
from qwen_export.bundle.keys import make_keys
from qwen_export.bundle.platforms import PLATFORMS
from qwen_launcher.bundle import CONTENTS, SIGNATURE

from tests.support.ports import free_port
from tests.support.waiting import PATIENCE, until

PROGRAM = """
import http.server, operator, os, pathlib, sys, threading

import library


def main():
    while_open = sys.argv[1:2] == ["--while-stdin-is-open"]
    command, folder, *options = sys.argv[1 + while_open:]
    if command == "self-test":
        sys.exit(library.SELF_TEST)
    if "--wrong" in options:
        sys.exit("error: no such option: --wrong") if library.CRASHES else fail("no such option: --wrong")
    if library.CRASHES:
        sys.exit(library.CRASHES)
    if while_open and not library.HANGS:
        threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    told = dict(zip(options[::2], options[1::2]))
    version = pathlib.Path(folder).parent.name
    answer = f"{version} {told['--provider']} {library.SAYS} {sys.flags.optimize}"

    looks = iter([200, *library.THEN])

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status = next(looks, 200) if self.path == "/health" else 200
            if not status:
                return
            said = operator.length_hint(looks) if self.path == "/looks" else answer
            self.send_response(status)
            self.end_headers()
            self.wfile.write(f"{said}".encode())

        def log_message(self, *_):
            pass

    try:
        server = http.server.ThreadingHTTPServer((told["--host"], int(told["--port"])), Answer)
    except OSError as error:
        fail(f"cannot listen: {error.strerror}")
    server.serve_forever()


def fail(text):
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)
"""
# THEN: statuses of /health after the first, before 200 again; 0 is no answer.
LIBRARY = {"SELF_TEST": 0, "CRASHES": 0, "HANGS": False, "SAYS": "hello", "THEN": ()}
WEIGHTS = "artifact/model.onnx.data"
FACTS = {
    "name": "tiny",
    "platform": f"linux_{os.uname().machine}" if sys.platform == "linux" else "macos_arm64",
    "python": f"{sys.version_info.major}.{sys.version_info.minor}",
    "provider": "cpu",
    "self_test": {"prompt": "Hello", "tokens": [1]},
}


def new_key(folder: Path) -> Path:
    """A private key; its public one is beside it, with the suffix .pub."""
    make_keys(folder / "kiosk.key")
    return folder / "kiosk.key"


def small_bundle(folder: Path, key: Path, version: str, weights: int = 0, **library: object) -> Path:
    """A signed bundle.

    Args:
        weights: seed of its weights.
        library: see LIBRARY.
    """
    package = folder / "site" / "qwen_runtime" / "kiosk"
    package.mkdir(parents=True)
    for parent in (package, package.parent):
        (parent / "__init__.py").write_text("")
    (package / "program.py").write_text(PROGRAM)
    values = LIBRARY | library
    (folder / "site" / "library.py").write_text(
        "".join(f"{name} = {value!r}\n" for name, value in values.items())
    )
    (folder / "artifact").mkdir()
    (folder / WEIGHTS).write_bytes(np.random.default_rng(weights).bytes(300_000))
    platform = PLATFORMS[str(FACTS["platform"])]
    write_scripts(folder, platform, python=FACTS["python"], model="tiny", devices=False)
    seal(folder, {**FACTS, "version": version}, key)
    return folder


def resealed(source: Path, folder: Path, key: Path, **facts: object) -> Path:
    """A copy of a bundle with other facts, signed again."""
    shutil.copytree(source, folder)
    contents = json.loads((folder / CONTENTS).read_text())
    for name in (CONTENTS, SIGNATURE):
        (folder / name).unlink()
    kept = {name: contents[name] for name in (*FACTS, "version")}
    seal(folder, {**kept, **facts}, key)
    return folder


def ask(port: int, path: str = "/") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as answer:
        return str(answer.read().decode())


def wait_for(port: int, text: str = "", path: str = "/") -> str:
    """What it answers, once it answers with `text` in it."""

    def answer() -> str:
        with suppress(OSError):
            if text in (found := ask(port, path)):
                return found
        return ""

    return until(answer)


@contextmanager
def started(target: Path, *options: str, **variables: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """start.sh on a free port, and the port."""
    port = free_port()
    process = subprocess.Popen(
        ["sh", str(target / "start.sh"), "--port", str(port), *options],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **variables},
        start_new_session=True,
    )
    try:
        yield process, port
    finally:
        process.terminate()
        try:
            process.communicate(timeout=PATIENCE)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
