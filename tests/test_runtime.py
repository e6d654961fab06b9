"""The runtime on the trained checkpoint's artifact, through real ONNX Runtime GenAI."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from qwen_profiles.errors import UserError
from qwen_profiles.schema import load_profile
from qwen_runtime import Model, Sampling
from qwen_runtime.provider import choose
from qwen_runtime.stop import StopFilter
from qwen_runtime.template import render
from random_checkpoints import TINY
from transformers import AutoTokenizer, Qwen3_5ForCausalLM

from artifacts import float_profile, make_artifact

QUESTION = [{"role": "user", "content": "What is assert?"}]
GREEDY = Sampling(temperature=0)
RUN = [sys.executable, "-c", "from qwen_runtime.cli import main; main()"]


@pytest.fixture(scope="module")
def model(cpu_artifact: Path) -> Iterator[Model]:
    with Model.load(cpu_artifact) as loaded:
        yield loaded


@pytest.fixture
def copied(cpu_artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cpu_artifact, tmp_path / "copy"))


@pytest.mark.parametrize("lowering", ["fused", "portable"])
def test_greedy_answers_are_those_of_transformers(lowering: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    reference = Qwen3_5ForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    artifact = make_artifact(TINY, float_profile(lowering), tmp_path / "out", all_logits=False)
    with Model.load(artifact) as model:
        for question in ("What is assert?", "Explain numbers.", "Tell me about yield."):
            messages = [{"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, enable_thinking=False, return_tensors="pt"
            )["input_ids"]
            with torch.no_grad():
                expected = reference.generate(prompt, max_new_tokens=64, do_sample=False)[
                    0, prompt.shape[1] :
                ]
            generation = model.generate(messages, max_tokens=64, sampling=GREEDY)
            text = "".join(generation)
            ends = set(reference.generation_config.eos_token_id)
            assert generation.tokens == [token for token in expected.tolist() if token not in ends]
            assert text == generation.text == tokenizer.decode(generation.tokens)


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize(
    "messages",
    [
        QUESTION,
        [{"role": "system", "content": "Be brief."}, *QUESTION],
        [*QUESTION, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nA statement."}, *QUESTION],
        [{"role": "user", "content": 'Quotes " and \\ and {{ braces }} and ünïcödé 🙂\n'}],
    ],
)
def test_chat_template_is_rendered_as_by_transformers(model: Model, messages: list, thinking: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    expected = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=thinking, tokenize=False
    )
    assert model.apply_chat_template(messages, thinking) == expected
    assert model.encode(expected) == tokenizer(expected, add_special_tokens=False)["input_ids"]


def test_length_and_usage(model: Model) -> None:
    generation = model.generate("The statement", max_tokens=5, sampling=GREEDY)
    pieces = list(generation)
    assert len(generation.tokens) == 5
    assert generation.finish_reason == "length"
    assert generation.prompt_tokens == len(model.encode("The statement"))
    assert "".join(pieces) == model.decode(generation.tokens)


def test_seed(model: Model) -> None:
    def text(seed: int) -> str:
        return "".join(
            model.generate("The", max_tokens=30, sampling=Sampling(temperature=1.0, top_k=50, seed=seed))
        )

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(5)}) > 1


def test_stop_strings_never_show(model: Model) -> None:
    whole = "".join(model.generate("The", max_tokens=60, sampling=GREEDY))
    stop = whole[20:31]  # over several tokens
    generation = model.generate("The", max_tokens=60, sampling=GREEDY, stop=["not in there", stop])
    assert "".join(generation) == whole[: whole.index(stop)]
    assert generation.finish_reason == "stop"


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_stop_filter_holds_back_only_what_it_must(size: int) -> None:
    text = "abcabxabcabcabd"
    stop = StopFilter(["abcabd", ""])
    shown = "".join(stop.feed(text[at : at + size]) for at in range(0, len(text), size))
    assert shown == "abcabxabc" and stop.stopped
    held = StopFilter(["xyz"])
    assert held.feed("ab") == "ab"
    assert held.feed("xy") == "" and held.flush() == "xy"


def test_cancel_from_another_thread(model: Model) -> None:
    generation = model.generate("The", max_tokens=4000, sampling=GREEDY)
    first = next(generation)
    thread = threading.Thread(target=generation.cancel)
    thread.start()
    thread.join()
    assert list(generation) == []
    assert generation.text == first
    assert generation.finish_reason == "cancelled"


def test_cancel_during_a_long_prompt(model: Model) -> None:
    generation = model.generate("word " * 4000, max_tokens=1)
    generation.cancel()
    assert list(generation) == [] and generation.finish_reason == "cancelled"


def test_template_that_refuses(model: Model) -> None:
    with pytest.raises(UserError, match="does not take these messages: only users"):
        render("{{ raise_exception('only users') }}", QUESTION)
    with pytest.raises(UserError, match="does not take these messages"):
        render("{{ messages.__class__.__mro__ }}", QUESTION)


def test_a_closed_generation_yields_nothing_more(model: Model) -> None:
    generation = model.generate("The", max_tokens=100)
    next(generation)
    generation.close()
    assert list(generation) == []


def test_prompt_longer_than_one_run_of_the_graph(tmp_path: Path) -> None:
    artifact = make_artifact(TINY, load_profile("strix-halo"), tmp_path / "out", all_logits=False)
    with Model.load(artifact) as model:
        generation = model.generate("The statement. " * 100, max_tokens=3, sampling=GREEDY)
        assert len("".join(generation)) and generation.prompt_tokens > 300
        assert model.info.provider == "cpu"
        assert model.info.reason == ("CPU: DirectML is not in this install (onnxruntime-genai-winml has it)")


@pytest.mark.parametrize(
    "options,message",
    [
        ({"sampling": Sampling(temperature=-1)}, "temperature is -1, but must be 0 or more"),
        ({"sampling": Sampling(top_p=0)}, "top_p is 0, but must be above 0"),
        ({"sampling": Sampling(top_k=0)}, "top_k is 0"),
        ({"sampling": Sampling(repetition_penalty=0)}, "repetition_penalty is 0"),
        ({"sampling": Sampling(seed=-1)}, "seed is -1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
    ],
)
def test_options_out_of_range(model: Model, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        model.generate("The", **options)


def test_prompts_that_do_not_fit(model: Model) -> None:
    with pytest.raises(UserError, match="the prompt is empty"):
        model.generate("")
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens, and the context is 8192"):
        model.generate("word " * 9000)
    with pytest.raises(UserError, match="a list of prompts is not supported"):
        model.generate(["one", "two"])  # type: ignore[list-item]


def test_answers_end_where_the_context_does(cpu_artifact: Path) -> None:
    with Model.load(cpu_artifact) as model:
        prompt = model.decode(model.encode("word " * 8200)[:8185])
        generation = model.generate(prompt, sampling=GREEDY, max_tokens=100)
        list(generation)
        assert generation.prompt_tokens + len(generation.tokens) <= 8192


def edit(name: str, change: bytes | None):
    def damage(folder: Path) -> None:
        if change is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(change)

    return damage


def flip(name: str, at: int):
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[at] ^= 1
        (folder / name).write_bytes(content)

    return damage


def rewrite_manifest(old: str, new: str):
    def damage(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(path.read_text().replace(old, new))

    return damage


@pytest.mark.parametrize(
    "damage,message",
    [
        (edit("manifest.json", None), "has no manifest.json: it is not a finished artifact"),
        (edit("manifest.json", b"{"), "manifest.json is not valid JSON"),
        (edit("tokenizer.json", None), "tokenizer.json is missing"),
        (edit("genai_config.json", b"{}"), "genai_config.json changed since the export"),
        (flip("model.onnx.data", 1000), "model.onnx.data changed since the export"),
        (flip("model.onnx", 1000), "model.onnx changed since the export"),
        (rewrite_manifest('"format_version": 1', '"format_version": 2'), "has artifact format 2"),
        (
            rewrite_manifest('"model.onnx"', '"../model.onnx"'),
            "names a file outside the folder: ../model.onnx",
        ),
    ],
)
def test_changed_artifacts(damage, message: str, copied: Path) -> None:
    damage(copied)
    with pytest.raises(UserError, match=re.escape(message)):
        Model.load(copied)


def test_large_files_are_hashed_only_when_asked(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_runtime.artifact._ALWAYS_HASHED", 1000)
    flip("model.onnx.data", 1000)(copied)
    Model.load(copied).close()
    with pytest.raises(UserError, match="changed since the export"):
        Model.load(copied, verify=True)


class FakeGenAI:
    """Stands for an onnxruntime_genai built with providers that this machine does not have."""

    def __init__(self, *available: str) -> None:
        for name in ("cuda", "dml", "openvino", "webgpu"):
            setattr(self, f"is_{name}_available", lambda name=name: name in available)


def test_provider_choice() -> None:
    assert choose("auto", "dml", FakeGenAI("dml")).reason == "DirectML: the artifact was made for it"
    assert choose("auto", "dml", FakeGenAI("cuda")).name == "cpu"
    assert choose("cuda", "dml", FakeGenAI("cuda")).reason == "CUDA: asked for"
    with pytest.raises(UserError, match="CUDA is not in this install: install onnxruntime-genai-cuda"):
        choose("cuda", "cpu", FakeGenAI())
    with pytest.raises(UserError, match="no provider 'gpu': there are auto, cpu, cuda"):
        choose("gpu", "cpu", FakeGenAI())


def test_provider_that_does_not_start(cpu_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This install's CPU-only library, made to claim CUDA: it falls back, or says so when it was asked."""
    monkeypatch.setattr("onnxruntime_genai.is_cuda_available", lambda: True)
    monkeypatch.setattr("qwen_runtime.model.choose", lambda wanted, made_for, og: choose(wanted, "cuda", og))
    with Model.load(cpu_artifact) as model:
        assert model.info.provider == "cpu"
        assert model.info.reason.startswith("CPU: CUDA did not start (")
    with pytest.raises(UserError, match="CUDA could not load"):
        Model.load(cpu_artifact, provider="cuda")


def run(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*RUN, *arguments], input=stdin, capture_output=True, text=True)


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
    assert result["provider"] == "cpu"


def test_command_errors(cpu_artifact: Path, tmp_path: Path) -> None:
    for arguments, message in [
        ([str(tmp_path / "nothing"), "Hi"], "make an artifact with qwen-export first"),
        ([str(cpu_artifact), "Hi", "--provider", "dml"], "install onnxruntime-genai-winml"),
        ([str(cpu_artifact), "Hi", "--top-k", "0"], "top_k is 0"),
    ]:
        failed = run(*arguments)
        assert failed.returncode == 2
        assert message in failed.stderr and "Traceback" not in failed.stderr


def test_interrupted_command(cpu_artifact: Path) -> None:
    process = subprocess.Popen(
        [*RUN, str(cpu_artifact), "--raw", "The", "--temperature", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    assert process.stdout is not None
    process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors.endswith("interrupted\n")


def heed_interrupts() -> None:
    """A background job's children ignore Ctrl-C unless told otherwise; the tests may run in one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A program on a pseudo-terminal of its own."""

    def __init__(self, arguments: list[str]) -> None:
        self.pid, self._file = pty.fork()
        if self.pid == 0:
            heed_interrupts()
            os.environ["TERM"] = "dumb"
            os.execv(arguments[0], arguments)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._file, text.encode())

    def wait_for(self, pattern: str, seconds: float = 30) -> None:
        start, deadline = len(self.seen), time.monotonic() + seconds
        while not re.search(pattern, self.seen[start:]):
            assert time.monotonic() < deadline, f"no {pattern!r} after {self.seen[start:]!r}"
            if select.select([self._file], [], [], 0.1)[0]:
                self.seen += os.read(self._file, 4096).decode(errors="replace")


def test_chat_in_a_terminal(cpu_artifact: Path) -> None:
    terminal = Terminal([*RUN, str(cpu_artifact), "--temperature", "1", "--repetition-penalty", "1.1"])
    terminal.wait_for("> ")
    terminal.type("\x03")
    terminal.wait_for("Ctrl-D or /exit leaves")
    terminal.type("What is assert?\n")
    terminal.wait_for(r"assert\?\r\n.*\w{3}")
    terminal.type("\x03")  # stops the answer, or finds it already ended
    terminal.wait_for("> ")
    terminal.type("/clear\n")
    terminal.wait_for("> ")
    terminal.type("\x04")
    _, status = os.waitpid(terminal.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_import_is_light() -> None:
    heavy = ["torch", "transformers", "onnx", "onnxruntime", "pydantic", "rich", "jinja2"]
    code = (
        "import sys, time\nstart = time.perf_counter()\nimport qwen_runtime\n"
        f"print(time.perf_counter() - start)\nprint([name for name in {heavy} if name in sys.modules])"
    )
    runs = [subprocess.check_output([sys.executable, "-c", code], text=True).splitlines() for _ in range(3)]
    assert {line for _, line in runs} == {"[]"}
    assert min(float(seconds) for seconds, _ in runs) < 0.3
