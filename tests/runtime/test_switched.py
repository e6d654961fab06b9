"""Adapters of single answers: PEFT's tokens whatever came before, states of their own, and files at fault."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from qwen_common.errors import UserError
from qwen_runtime import Model, Sampling
from qwen_runtime import loading as loading_module
from qwen_runtime.cli import main
from qwen_runtime.states import StateSettings

if TYPE_CHECKING:
    from tests.support.adapters import Adapted

NAMES = (None, "style", "tools", "words")
SHORT, LONG = "the river and", "the river and the hill and the house by the river and the old hill " * 3
GREEDY = Sampling(temperature=0)
Factors = dict[str, np.ndarray]


def answer(model: Model, prompt: str, adapter: str | None) -> tuple[list[int], int]:
    """The tokens, and how many of the prompt's were not read."""
    generation = model.generate(prompt, max_tokens=8, sampling=GREEDY, adapter=adapter)
    generation.run()
    return generation.tokens, generation.cached_tokens


@pytest.fixture(scope="module", params=["GenAI", "states"])
def model(adapted: Adapted, request: pytest.FixtureRequest) -> Any:
    states = StateSettings() if request.param == "states" else None
    with Model.load(adapted.artifact, keep=2, states=states, adapters={"words": adapted.words}) as loaded:
        yield loaded


def test_interleaved_answers_are_pefts(adapted: Adapted, model: Model) -> None:
    assert model.info.adapters == ("style", "tools", "words")
    expected = {name: adapted.greedy(name, model.encode(SHORT), 8) for name in NAMES}
    assert len({tuple(tokens) for tokens in expected.values()}) == len(NAMES)
    for name in ("style", None, "words", "tools", "style", "words", None, "tools"):
        assert answer(model, SHORT, name)[0] == expected[name]


def test_concurrent_answers_are_pefts(adapted: Adapted, model: Model) -> None:
    wanted = [(name, prompt) for prompt in (SHORT, LONG) for name in NAMES] * 2
    expected = [adapted.greedy(name, model.encode(prompt), 8) for name, prompt in wanted]
    with ThreadPoolExecutor(4) as threads:
        found = threads.map(lambda one: answer(model, one[1], one[0])[0], wanted)
        assert list(found) == expected


def test_what_one_has_read_no_other_goes_on_from(adapted: Adapted, tmp_path: Path) -> None:
    """Neither in memory nor on disk, where another process finds it."""
    for states in (None, StateSettings(tmp_path)):
        with Model.load(adapted.artifact, keep=8, states=states, adapters={"words": adapted.words}) as model:
            for name in NAMES:
                assert answer(model, LONG, name)[1] == 0
            assert all(answer(model, LONG, name)[1] > 0 for name in NAMES)
    # The same file by another name is the same adapter; another file by the same name is another one.
    given = {"words": adapted.artifact / "tools.onnx_adapter", "other": adapted.words}
    with Model.load(adapted.artifact, states=StateSettings(tmp_path), adapters=given) as model:
        tokens, cached = answer(model, LONG, "other")
        assert (tokens, cached > 0) == (adapted.greedy("words", model.encode(LONG), 8), True)
        assert answer(model, LONG, "words")[0] == adapted.greedy("tools", model.encode(LONG), 8)


def test_what_names_none_has_the_one_that_was_chosen(adapted: Adapted, model: Model) -> None:
    tokens = model.encode(SHORT)
    model.use_adapter("tools")
    assert answer(model, SHORT, None)[0] == adapted.greedy("tools", tokens, 8)
    assert answer(model, SHORT, "style")[0] == adapted.greedy("style", tokens, 8)
    (logits,) = model.score(tokens, len(tokens))
    assert int(logits.argmax()) == adapted.greedy("tools", tokens, 1)[0]
    model.use_adapter(None)
    assert answer(model, SHORT, None)[0] == adapted.greedy(None, tokens, 8)
    for missing in ("nobody", ""):
        with pytest.raises(UserError, match=f"has no adapter {missing}, it has style, tools, words"):
            model.generate(SHORT, adapter=missing)


def test_a_conversation_that_is_read_ahead_stays_with_its_adapter(adapted: Adapted) -> None:
    question = [{"role": "user", "content": LONG}]
    with Model.load(adapted.artifact, keep=8) as model:
        text = model.generate(question, max_tokens=4, sampling=GREEDY, adapter="style").run()
        history = [*question, {"role": "assistant", "content": text}]
        model.read_ahead(history, sampling=GREEDY, adapter="style")
        asked = [*history, {"role": "user", "content": "and"}]
        for name, spared in (("tools", False), (None, False), ("style", True)):
            found = model.generate(asked, max_tokens=4, sampling=GREEDY, adapter=name)
            found.run()
            assert (found.cached_tokens > 0) == spared
            assert found.tokens == adapted.greedy(name, model.encode(model.apply_chat_template(asked)), 4)


def written(path: Path, change: Callable[[Factors], Factors], like: Path) -> Path:
    """An adapter as the one in the file `like`, with its factors changed."""
    read = ort.AdapterFormat.read_adapter(str(like))
    factors = change({name: value.numpy() for name, value in read.get_parameters().items()})
    made = ort.AdapterFormat()
    made.set_adapter_version(1)
    made.set_model_version(1)
    made.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in factors.items()})
    made.export_adapter(str(path))
    return path


A = "model.layers.0.mlp.down_proj.lora_A"
CHANGES: dict[str, tuple[Callable[[Factors], Factors], str]] = {
    "wider": (lambda f: f | {A: np.ones((99, 3), np.float32)}, r"is for another model than .* \[99, 3\]"),
    "elsewhere": (
        lambda f: {name.replace("layers.0", "layers.9"): value for name, value in f.items()},
        "changes model.layers.9.* it is for another model, or export the artifact again with it",
    ),
    "no pair": (lambda f: {A: f[A]}, "has model.layers.0.mlp.down_proj.lora_A without what belongs to it"),
    "ranks": (lambda f: f | {A: f[A][:, :2].copy()}, "lora_A without what belongs to it"),
    "not finite": (lambda f: f | {A: f[A] * np.float32("nan")}, "has values in .* that are no numbers"),
    "flat": (lambda f: f | {A: f[A].reshape(-1)}, r"has .* as tensor\(float\) \[288\]"),
    "whole numbers": (lambda f: f | {A: f[A].astype(np.int32)}, r"as tensor\(int32\)"),
    "another dtype": (lambda f: {name: value.astype(np.float16) for name, value in f.items()}, "float16"),
    "empty": (lambda f: {}, "changes nothing"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_files_that_do_not_fit(
    change: str, adapted: Adapted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known before the model is loaded."""
    monkeypatch.setattr(loading_module, "load", None)
    changed, message = CHANGES[change]
    path = written(tmp_path / "a.onnx_adapter", changed, adapted.words)
    with pytest.raises(UserError, match=message) as caught:
        Model.load(adapted.artifact, adapters={"a": path})
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_files_that_are_none(adapted: Adapted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading_module, "load", None)
    whole = adapted.words.read_bytes()
    for content in (b"", b"{}", whole[: len(whole) // 2], whole[:40] + bytes(200) + whole[240:]):
        path = tmp_path / "damaged.onnx_adapter"
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"damaged\.onnx_adapter is no adapter that ONNX Runtime reads"):
            Model.load(adapted.artifact, adapters={"a": path})
    with pytest.raises(UserError, match=r"is a folder, and an adapter is a file NAME\.onnx_adapter"):
        Model.load(adapted.artifact, adapters={"a": adapted.folder / "style"})
    with pytest.raises(UserError, match="there is no adapter"):
        Model.load(adapted.artifact, adapters={"a": tmp_path / "none.onnx_adapter"})


def test_names(adapted: Adapted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading_module, "load", None)
    for name in ("", "a b", "a/b", "..", "ä", "a\nb", "-a"):
        with pytest.raises(UserError, match="an adapter cannot be called") as caught:
            Model.load(adapted.artifact, adapters={name: adapted.words})
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="two adapters are called style"):
        Model.load(adapted.artifact, adapters={"style": adapted.words})
    copied = Path(shutil.copytree(adapted.artifact, tmp_path / "copy"))
    manifest = json.loads((copied / "manifest.json").read_text())
    for name in ("tools", "a b", "../tools"):
        manifest["switched_adapters"][0]["name"] = name
        (copied / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match="has no valid 'switched_adapters'"):
            Model.load(copied)


def test_an_artifact_that_takes_none(cpu_artifact: Path, adapted: Adapted) -> None:
    with pytest.raises(UserError, match="takes no adapters at run time: export it again with --adapter-at"):
        Model.load(cpu_artifact, adapters={"words": adapted.words})


def test_the_command(adapted: Adapted) -> None:
    def told(*options: str) -> tuple[int, str]:
        plain = ["--raw", "--temperature", "0", "--max-tokens", "8"]
        found = CliRunner().invoke(main, [str(adapted.artifact), SHORT, *plain, *options])
        return found.exit_code, found.stderr if found.exit_code else found.stdout.removesuffix("\n")

    with Model.load(adapted.artifact) as model:
        expected = adapted.greedy("words", model.encode(SHORT), 8)
        given = ("--adapter", f"words={adapted.words}")
        assert told(*given) == (0, model.decode(expected))
        found = json.loads(told(*given, "--json")[1])
        assert (found["text"], found["adapter"]) == (model.decode(expected), "words")
    for given in ("words=", "=x"):
        assert told("--adapter", given) == (2, f"error: --adapter {given}: give NAME=PATH\n")
    for missing in ("nobody", ""):
        wanted = f"error: {adapted.artifact} has no adapter {missing}, it has style, tools\n"
        assert told("--adapter", missing) == (2, wanted)
