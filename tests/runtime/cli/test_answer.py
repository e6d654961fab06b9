"""`qwen-run answer` as a program."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from qwen_runtime import Model, Sampling

from tests.support.commands import RUN, heed_interrupts, run
from tests.support.waiting import PATIENCE

QUESTION = [{"role": "user", "content": "What is assert?"}]
GREEDY = Sampling(temperature=0)


def test_command_streams_an_answer(cpu_artifact: Path, model: Model) -> None:
    options = ["--max-tokens", "20", "--temperature", "0"]
    expected = "".join(model.generate(QUESTION, max_tokens=20, sampling=GREEDY))
    for arguments, stdin in (["What is assert?"], None), (["-"], "What is assert?"):
        done = run(str(cpu_artifact), *arguments, *options, stdin=stdin)
        assert done.returncode == 0
        assert done.stdout == expected + "\n"
        assert done.stderr == "CPU: the artifact was made for it\n"
    raw = run(str(cpu_artifact), "--raw", "The", *options, "--json")
    result = json.loads(raw.stdout)
    assert result["text"] == "".join(model.generate("The", max_tokens=20, sampling=GREEDY))
    assert result["usage"]["prompt_tokens"] == len(model.encode("The"))
    assert result["provider"] == "cpu" and result["reason"] == "CPU: the artifact was made for it"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_command_without_stdin(cpu_artifact: Path, arguments: list[str]) -> None:
    command = ["sh", "-c", 'exec "$@" <&-', "sh", *RUN, str(cpu_artifact), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "stdin is closed: give a PROMPT" in done.stderr and "Traceback" not in done.stderr


def test_command_passes_its_options_on(cpu_artifact: Path, model: Model) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *QUESTION]
    sampling = Sampling(temperature=0.9, top_p=0.9, top_k=30, min_p=0.05, repetition_penalty=1.1, seed=7)
    whole = "".join(model.generate(messages, max_tokens=40, sampling=sampling, thinking=True))
    stop = whole[len(whole) // 2 :][:5]
    found = run(
        str(cpu_artifact), "What is assert?", "--system", "Be brief.", "--think", "--verify",
        "--stop", "never", "--stop", stop, "--temperature", "0.9", "--top-p", "0.9", "--top-k", "30",
        "--min-p", "0.05",
        "--repetition-penalty", "1.1", "--seed", "7", "--max-tokens", "40", "--json",
    )  # fmt: skip
    assert found.returncode == 0
    result = json.loads(found.stdout)
    assert result["text"] == whole[: whole.index(stop)]
    assert result["finish_reason"] == "stop"


def test_command_speaks_utf8_whatever_the_code_page(copied: Path, model: Model) -> None:
    """As in a pipe on Windows."""
    manifest = copied / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"name": "tiny-dense"', '"name": "小🙂"'))
    found = subprocess.run(
        [*RUN, str(copied), "-", "--raw", "--json", "--max-tokens", "1"],
        input="中文".encode(),
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
    )
    result = json.loads(found.stdout)
    assert result["model"] == "小🙂"
    assert result["usage"]["prompt_tokens"] == len(model.encode("中文"))


def test_reader_that_leaves_early(cpu_artifact: Path) -> None:
    process = subprocess.Popen(
        [*RUN, str(cpu_artifact), "--raw", "The", "--max-tokens", "2000", "--seed", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b"CPU: the artifact was made for it\n"
    assert process.wait() == 0


def test_output_that_cannot_be_written(cpu_artifact: Path) -> None:
    command = [*RUN, str(cpu_artifact), "Hi", "--max-tokens", "5", "--json"]
    for arguments in (command, [*RUN, "devices"]):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 2 and "error: cannot write: No space left" in done.stderr
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(arguments, stdout=writing, stderr=subprocess.PIPE, text=True)
        os.close(writing)
        assert done.returncode == 141 and "rror" not in done.stderr


def test_command_errors(cpu_artifact: Path, tmp_path: Path) -> None:
    for arguments, message in [
        ([str(tmp_path / "nothing"), "Hi"], "make an artifact with qwen-export first"),
        (["oci://registry.example/model:1", "Hi"], "get it with qwen-run pull first"),
        ([str(cpu_artifact), "Hi", "--provider", "cuda"], "install onnxruntime-genai-cuda"),
        ([str(cpu_artifact), "Hi", "--top-k", "0"], "top_k is 0"),
        ([str(cpu_artifact), "\udcff"], "not valid UTF-8"),
        ([str(cpu_artifact), "--json"], "need a PROMPT"),
        ([str(cpu_artifact), " "], "the prompt is empty"),
        (["serv", str(cpu_artifact)], "is the command 'serve' meant?"),
        # A large model takes its time to load, so what is wrong with the question is said before.
        ([str(tmp_path / "nothing"), "Hi", "--temperature", "-1"], "temperature is -1"),
    ]:
        failed = run(*arguments)
        assert failed.returncode == 2
        assert message in failed.stderr and "Traceback" not in failed.stderr


def test_interrupted_command(cpu_artifact: Path) -> None:
    counting = "1, 2, 3, 4, 5, 6,"  # has no end
    process = subprocess.Popen(
        [*RUN, str(cpu_artifact), "--raw", counting, "--temperature", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    assert process.stdout is not None
    process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert errors.endswith("interrupted\n")
