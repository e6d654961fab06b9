"""The runtime on the trained checkpoint's artifact, through real ONNX Runtime GenAI."""

from __future__ import annotations

import gc
import json
import math
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
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import pytest
import qwen_profiles
import qwen_runtime
import torch
from qwen_common.errors import UserError
from qwen_profiles.schema import load_profile
from qwen_runtime import Model, Sampling
from qwen_runtime.guidance import Guidance
from qwen_runtime.provider import load_first
from qwen_runtime.stop import StopFilter
from qwen_runtime.template import render
from transformers import AutoTokenizer, Qwen3_5ForCausalLM

from tests.checkpoints.drawings import drawing
from tests.support.artifacts import float_profile, make_artifact
from tests.support.random_checkpoints import TINY, TINY_VL

QUESTION = [{"role": "user", "content": "What is assert?"}]
GREEDY = Sampling(temperature=0)
OLD_PYTHON = os.environ.get("QWEN_EDGE_ORT124_PYTHON")
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


def test_characters_of_several_tokens_come_whole(model: Model) -> None:
    """To this small vocabulary they are bytes. They are put in the model's mouth."""
    text = "a🙂b é 中文 ünï"
    said = iter(model.encode(text))
    assert len(model.encode(text)) > len(text)

    class Puppet(og.Generator):
        def get_next_tokens(self) -> np.ndarray:
            return np.array([next(said)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onnxruntime_genai.Generator", Puppet)
        pieces = list(model.generate("The", max_tokens=len(model.encode(text)), sampling=GREEDY))
    assert "".join(pieces) == text
    assert "🙂" in pieces and "中" in pieces and "�" not in "".join(pieces)


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


def test_a_dropped_generation_is_freed_at_once(model: Model) -> None:
    gc.disable()
    try:
        generation = model.generate("The", max_tokens=100)
        next(generation)
        running = weakref.ref(generation._pieces)
        del generation
        assert running() is None
    finally:
        gc.enable()
    with model.generate("The", max_tokens=100) as generation:
        first = next(generation)
    assert list(generation) == [] and generation.text == first


def test_prompt_longer_than_one_run_of_the_graph(tmp_path: Path) -> None:
    artifact = make_artifact(TINY, load_profile("strix-halo"), tmp_path / "out", all_logits=False)
    with Model.load(artifact) as model:
        generation = model.generate("The statement. " * 100, max_tokens=3, sampling=GREEDY)
        assert len("".join(generation)) and generation.prompt_tokens > 300
        assert model.info.provider == "cpu"
        assert model.info.reason == ("CPU: DirectML is not in this install (onnxruntime-genai-winml has it)")


class OneAppendGenerator(og.Generator):
    """Stands for a generator on DirectML, where ONNX Runtime GenAI refuses a second append."""

    def append_tokens(self, tokens: np.ndarray) -> None:
        if self.token_count():
            raise RuntimeError("Continuous decoding is not supported on the selected device type (DirectML)")
        super().append_tokens(tokens)


def test_directml_takes_the_prompt_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = make_artifact(TINY, load_profile("strix-halo"), tmp_path / "out", all_logits=False)
    with Model.load(artifact) as model:
        prompt = "The statement. " * 100
        expected = "".join(model.generate(prompt, max_tokens=20, sampling=GREEDY))
        monkeypatch.setattr("onnxruntime_genai.Generator", OneAppendGenerator)
        monkeypatch.setattr(model._backend, "chunk_size", None)  # as the backend finds it for DirectML
        assert "".join(model.generate(prompt, max_tokens=20, sampling=GREEDY)) == expected


def test_directml_runs_without_graph_capture(cpu_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured graphs want inputs of one size. This install has no DirectML, so loading ends in an error."""
    asked = []

    class RecordingConfig(og.Config):
        def set_provider_option(self, *option: str) -> None:
            asked.append(option)
            super().set_provider_option(*option)

    monkeypatch.setattr("onnxruntime_genai.Config", RecordingConfig)
    monkeypatch.setattr("onnxruntime_genai.is_dml_available", lambda: True)
    with pytest.raises(UserError, match="DirectML could not load"):
        Model.load(cpu_artifact, provider="dml")
    assert asked == [("dml", "enable_graph_capture", "0")]


def test_more_top_k_than_there_are_tokens(model: Model) -> None:
    sampling = Sampling(temperature=1.0, top_k=2**40, seed=3)
    assert "".join(model.generate("The", max_tokens=5, sampling=sampling))


@pytest.mark.parametrize("min_p", [0.0, 0.2])
def test_min_p_rules_the_unlikely_out(model: Model, min_p: float) -> None:
    """At the temperature, and among all tokens: what it lets through would be chosen too without `top_k`."""
    sampling = Sampling(temperature=1.5, top_p=1.0, top_k=2**40, seed=5, min_p=min_p)
    generation = model.generate(QUESTION, max_tokens=60, sampling=sampling, logprobs=1)
    generation.run()
    shares = [math.exp((entry.logprob - entry.top[0][1]) / 1.5) for entry in generation.logprobs]
    assert len(shares) > 20 and min(shares) < 0.9  # it still samples
    assert (min(shares) >= 0.2) == (min_p == 0.2)


def test_min_p_leaves_what_a_grammar_needs(model: Model) -> None:
    guidance = Guidance("regex", "(yes|no), zebra")
    sampling = Sampling(temperature=1.0, seed=5, min_p=1.0)
    assert model.generate(QUESTION, sampling=sampling, guidance=guidance).run() in ("yes, zebra", "no, zebra")


@pytest.mark.parametrize(
    "options,message",
    [
        ({"sampling": Sampling(min_p=1.5)}, "min_p is 1.5, but must be from 0 to 1"),
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
    with pytest.raises(UserError, match="has a NUL character"):
        model.generate("seen\0not seen")
    with pytest.raises(UserError, match="not valid UTF-8"):
        model.generate("half a pair: \ud83d")
    with pytest.raises(UserError, match="does not take these messages"):
        model.generate([{"role": "user", "content": None}])  # type: ignore[dict-item]
    with pytest.raises(UserError, match="a list of prompts is not supported"):
        model.generate(["one", "two"])  # type: ignore[list-item]


def test_answers_end_where_the_context_does(cpu_artifact: Path) -> None:
    with Model.load(cpu_artifact) as model:
        prompt = model.decode(model.encode("word " * 8200)[:8185])
        generation = model.generate(prompt, sampling=GREEDY, max_tokens=100)
        list(generation)
        assert generation.prompt_tokens + len(generation.tokens) <= 8192


@pytest.mark.ort124
@pytest.mark.skipif(not OLD_PYTHON, reason="QWEN_EDGE_ORT124_PYTHON does not name an interpreter")
def test_onnxruntime_that_is_too_old(cpu_artifact: Path) -> None:
    assert OLD_PYTHON is not None
    roots = [str(Path(module.__file__).parents[1]) for module in (qwen_runtime, qwen_profiles)]
    code = (
        f"import sys\nsys.path[:0] = {roots}\nfrom qwen_runtime import Model\n"
        f"from qwen_common.errors import UserError\ntry: Model.load({str(cpu_artifact)!r})\n"
        "except UserError as error: print(error)"
    )
    found = subprocess.run([OLD_PYTHON, "-c", code], capture_output=True, text=True)
    assert "needs onnxruntime >=1.30: install it, or export with a profile for older ones" in found.stdout


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


def replace_by_link(name: str):
    def damage(folder: Path) -> None:
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

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
        (edit("manifest.json", b'{"format_version": 1}'), "manifest.json has no valid 'model'"),
        (rewrite_manifest('"files"', '"file"'), "manifest.json has no valid 'files'"),
        (rewrite_manifest('"size"', '"bytes"'), "has no size and sha256 of chat_template.jinja"),
        (rewrite_manifest('"genai_config.json"', '"merges.txt"'), "does not list genai_config.json"),
        (rewrite_manifest('"provider": "cpu"', '"provider": "tpu"'), "was made for 'tpu'"),
        (replace_by_link("model.onnx.data"), "names a file outside the folder: model.onnx.data"),
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
        self.registered: list[tuple[str, str]] = []
        for name in ("cuda", "dml"):
            setattr(self, f"is_{name}_available", lambda name=name: name in available)

    def register_execution_provider_library(self, name: str, path: str) -> None:
        self.registered.append((name, path))


@pytest.fixture
def fake_webgpu_plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stands for the installed package onnxruntime-ep-webgpu."""
    (tmp_path / "onnxruntime_ep_webgpu.py").write_text(
        "def get_ep_name(): return 'WebGpuExecutionProvider'\ndef get_library_path(): return 'webgpu.so'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("qwen_runtime.provider._registered", set())
    monkeypatch.delitem(sys.modules, "onnxruntime_ep_webgpu", raising=False)


def loads_on(*good: str) -> Callable[[str], str]:
    """Stands for hardware that only these providers start on; the message is ONNX Runtime GenAI's."""

    def load(name: str) -> str:
        if name not in good:
            raise RuntimeError(f"{name} execution provider is not supported in this build.\n")
        return name

    return load


def test_provider_choice() -> None:
    choice, loaded = load_first("auto", "dml", FakeGenAI("dml"), loads_on("dml"))
    assert (choice.name, loaded) == (
        "dml",
        "dml",
    ) and choice.reason == "DirectML: the artifact was made for it"
    assert load_first("cuda", "dml", FakeGenAI("cuda"), loads_on("cuda"))[0].reason == "CUDA: asked for"
    with pytest.raises(UserError, match="CUDA is not in this install: install onnxruntime-genai-cuda"):
        load_first("cuda", "cpu", FakeGenAI(), loads_on("cuda"))
    with pytest.raises(UserError, match="no provider 'gpu': there are auto, cpu, cuda"):
        load_first("gpu", "cpu", FakeGenAI(), loads_on())
    with pytest.raises(UserError, match="CUDA could not load the artifact: it finds no device here"):
        load_first("cuda", "cpu", FakeGenAI("cuda"), loads_on("cpu"))


def test_the_next_provider_that_loads() -> None:
    choice, _ = load_first("auto", "dml", FakeGenAI("cuda"), loads_on("cuda", "cpu"))
    assert choice.name == "cuda"
    assert choice.reason == "CUDA: DirectML is not in this install (onnxruntime-genai-winml has it)"
    choice, _ = load_first("auto", "dml", FakeGenAI("cuda", "dml"), loads_on("cpu"))
    assert choice.name == "cpu"
    assert choice.reason == (
        "CPU: DirectML did not start (it finds no device here); CUDA did not start (it finds no device here)"
    )
    tried = []
    with pytest.raises(ZeroDivisionError):  # what the CPU raises is not hidden
        load_first("auto", "cpu", FakeGenAI("cuda"), lambda name: (tried.append(name), 1 / 0))
    assert tried == ["cpu"]


def test_plugin_is_registered_once(fake_webgpu_plugin: None) -> None:
    library = FakeGenAI()
    for _ in range(2):
        choice, _loaded = load_first("auto", "webgpu", library, loads_on("webgpu"))
        assert choice.reason == "WebGPU: the artifact was made for it"
    assert library.registered == [("WebGpuExecutionProvider", "webgpu.so")]


def test_provider_that_does_not_start(
    cpu_artifact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """This install's CPU-only library, made to claim CUDA: it falls back, or says so when it was asked."""
    monkeypatch.setattr("onnxruntime_genai.is_cuda_available", lambda: True)
    artifact = shutil.copytree(cpu_artifact, tmp_path / "cuda")
    manifest = artifact / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"provider": "cpu"', '"provider": "cuda"'))
    with Model.load(artifact) as model:
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


def test_guidance_that_fails_on_the_way(model: Model) -> None:
    """GenAI 0.18 loses the tokens of a character that its grammar forces. The model stays usable."""
    with pytest.raises(UserError, match="could not be held to the guidance: Parser Error"):
        list(model.generate("The", max_tokens=5, sampling=GREEDY, guidance=Guidance("regex", "中")))
    assert list(model.generate("The", max_tokens=5, sampling=GREEDY))


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
    rewrite_manifest('"name": "tiny-dense"', '"name": "小🙂"')(copied)
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
        ([str(cpu_artifact), "Hi", "--provider", "dml"], "install onnxruntime-genai-winml"),
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
        self._seen = ""  # since the last match

    def type(self, text: str) -> None:
        os.write(self._file, text.encode())

    def wait_for(self, pattern: str, every_second: str = "") -> None:
        """Wait until `pattern` shows, typing `every_second` meanwhile."""
        seconds = 0
        while not (match := re.search(pattern, self._seen)):
            if select.select([self._file], [], [], 1)[0]:
                self._seen += os.read(self._file, 4096).decode(errors="replace")
            else:
                seconds += 1
                assert seconds < 30, f"no {pattern!r} in {self._seen!r}"
                self.type(every_second)
        self._seen = self._seen[match.end() :]

    def leave(self) -> int:
        """End the input until the program is gone; returns its exit code.

        More than once, because an end that is typed between two lines is a character like others.
        """
        for _ in range(30):
            self.type("\x04")
            time.sleep(1)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
        raise AssertionError(f"the program goes on after {self._seen!r}")


def test_chat_in_a_terminal(cpu_artifact: Path) -> None:
    # Hot enough that every token is as likely as the end, so an answer is about a thousand tokens long.
    hot = ["--temperature", "1000", "--top-k", "2048", "--top-p", "1", "--seed", "1"]
    terminal = Terminal([*RUN, str(cpu_artifact), *hot])
    terminal.wait_for("> ")
    # Python takes notice of one that comes between its prompt and the reading of a line at the next.
    terminal.type("\x03")
    terminal.wait_for("/help lists", every_second="\x03")
    terminal.wait_for("> ")
    terminal.type("What is assert?\n")
    terminal.wait_for(r"assert\?\r\n[\s\S]{30}")
    terminal.type("\x03")
    terminal.wait_for(r"\(stopped\)")
    terminal.wait_for(r"\d+ tokens, \d+\.\d a second, first after")
    terminal.wait_for("> ")
    terminal.type("\x1b[A")  # the arrow that brings the last line back
    terminal.wait_for("What is assert")
    terminal.type("\x15/clear\n")
    terminal.wait_for("> ")
    assert terminal.leave() == 0


def test_chat_survives_its_first_message(cpu_artifact: Path) -> None:
    terminal = Terminal([*RUN, str(cpu_artifact), "--system", "word " * 9000, "--max-tokens", "5"])
    terminal.wait_for("> ")
    terminal.type("Hi\n")
    terminal.wait_for(r"shorten it; /clear")
    terminal.wait_for("> ")
    terminal.type("/system Be brief.\n")
    terminal.wait_for("> ")
    terminal.type("Hi\n")
    terminal.wait_for(r"5 tokens, ")
    assert terminal.leave() == 0


def test_chat_prompt_stays_while_a_line_is_edited(cpu_artifact: Path) -> None:
    """Readline must know how wide the prompt is, or it writes over it."""
    terminal = Terminal([*RUN, str(cpu_artifact)])
    terminal.wait_for("> ")
    terminal.type("abc\x01X")  # to the beginning of the line, where X goes
    terminal.wait_for("abc\b\b\bXabc")
    terminal.type("\x05\x15")  # the end would only delete a character of it
    assert terminal.leave() == 0


def test_chat_remembers(cpu_artifact: Path, model: Model) -> None:
    """The second answer is that to the whole conversation; after /clear it is forgotten."""
    first = "".join(model.generate(QUESTION, max_tokens=12, sampling=GREEDY))
    history = [*QUESTION, {"role": "assistant", "content": first}, {"role": "user", "content": "Why?"}]
    second = "".join(model.generate(history, max_tokens=12, sampling=GREEDY))
    alone = "".join(model.generate(history[-1:], max_tokens=12, sampling=GREEDY))
    assert second != alone
    typed = "What is assert?\nWhy?\n\n/clear\nWhy?\n/exit\nnever read\n"
    found = run(str(cpu_artifact), "--temperature", "0", "--max-tokens", "12", stdin=typed)
    assert found.returncode == 0
    assert found.stdout.split("leaves.\n")[1] == f"> {first}\n> {second}\n> > > {alone}\n> "


def test_chat_commands(cpu_artifact: Path, model: Model, tmp_path: Path) -> None:
    """A message of two lines under another system message, saved as it was answered."""
    saved = tmp_path / "saved.json"
    typed = (
        "/system Be brief.\nWhat is\\\nassert?\n/image photo.jpg\n/save\n"
        f"/save {tmp_path}/no/where\n/save {saved}\n/help\n/exit\n"
    )
    found = run(str(cpu_artifact), "--temperature", "0", "--max-tokens", "12", stdin=typed)
    assert found.returncode == 0
    messages = json.loads(saved.read_text())
    assert messages[:2] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is\nassert?"},
    ]
    answer = "".join(model.generate(messages[:2], max_tokens=12, sampling=GREEDY))
    assert messages[2] == {"role": "assistant", "content": answer}
    for text in (
        "has no vision tower",
        "write the file's name",
        "cannot write",
        "3 messages are in",
        "/image",
    ):
        assert text in found.stdout.replace("\n", " ")


def test_chat_about_an_image(tmp_path: Path) -> None:
    item = drawing(1_000_000_003)
    item.image.save(tmp_path / "drawing.png")
    (tmp_path / "none.png").write_bytes(b"none")
    artifact = make_artifact(TINY_VL, load_profile("cpu"), tmp_path / "artifact", all_logits=False)
    typed = (
        f"/image {tmp_path}/nowhere.png\n/image {tmp_path}/none.png\n{item.question}\n"
        f"/image {tmp_path}/drawing.png\n{item.question}\n"
    )
    found = run(str(artifact), "--temperature", "0", stdin=typed)
    assert found.returncode == 0
    text = found.stdout.replace("\n", " ")
    assert "there is no file" in text and "/clear forgets the conversation" in text
    assert item.answer in text


def test_chat_goes_on_when_the_context_is_full(cpu_artifact: Path) -> None:
    typed = f"What is assert?\n{'word ' * 9000}\nWhy?\n"
    found = run(str(cpu_artifact), "--temperature", "0", "--max-tokens", "4", stdin=typed)
    assert found.returncode == 0
    assert "and the context is 8192: shorten it; /clear forgets" in found.stdout.replace("\n", " ")
    assert found.stdout.count("> ") == 4
    alone = run(str(cpu_artifact), "--max-tokens", "4", stdin=f"{'word ' * 9000}\n")
    assert alone.returncode == 2


def test_import_is_light() -> None:
    heavy = ["torch", "transformers", "onnx", "onnxruntime", "pydantic", "rich", "jinja2"]
    code = (
        "import sys, time\nstart = time.perf_counter()\nimport qwen_runtime\n"
        f"print(time.perf_counter() - start)\nprint([name for name in {heavy} if name in sys.modules])"
    )
    runs = [subprocess.check_output([sys.executable, "-c", code], text=True).splitlines() for _ in range(3)]
    assert {line for _, line in runs} == {"[]"}
    assert min(float(seconds) for seconds, _ in runs) < 0.3
