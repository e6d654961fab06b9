"""States kept as arrays, in memory and in a folder: the same tokens as without, and how much they spare."""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from qwen_common.errors import UserError
from qwen_profiles.schema import load_profile
from qwen_runtime import Guidance, Model, Sampling, StateSettings, state_folder
from qwen_runtime.grammar import make_guidance
from qwen_runtime.prefix import common_prefix
from qwen_runtime.tokenizer import Tokenizer
from safetensors.torch import load_file

from benchmarks.support.artifacts import directml_profile
from benchmarks.support.checkpoints import TINY, TINY_VL, TRAINED_HEAD
from benchmarks.support.mtp import with_head
from tests.support.exported import Exported

GREEDY = Sampling(temperature=0)
SYSTEM = {"role": "system", "content": "The statement is a word. " * 40}
QUESTION = {"role": "user", "content": "What is assert?"}
NEXT = {"role": "user", "content": "What is yield?"}


@pytest.fixture(scope="module", params=["fused", "portable"])
def artifact(request: pytest.FixtureRequest, cpu_artifact: Path, exported: Exported) -> Path:
    return cpu_artifact if request.param == "fused" else exported(TINY, directml_profile())


@pytest.fixture(scope="module")
def fresh(artifact: Path) -> Iterator[Model]:
    with Model.load(artifact, "cpu") as model:
        yield model


def answer(model: Model, messages: Any, **options: Any) -> Any:
    generation = model.generate(messages, **{"max_tokens": 20, "sampling": GREEDY, **options})
    generation.run()
    return generation


def keeping(artifact: Path, folder: Path | None = None, keep: int = 2, **options: Any) -> Model:
    return Model.load(artifact, "cpu", keep=keep, states=StateSettings(folder, **options))


def conversation(model: Model, fresh: Model, turns: int) -> list[Any]:
    """Whose every answer has the tokens of a model that keeps nothing; how many were not read, by turn."""
    messages, cached = [SYSTEM, QUESTION], []
    for _ in range(turns):
        found = answer(model, messages)
        assert found.tokens == answer(fresh, messages).tokens
        cached.append(found.cached_tokens)
        messages += [{"role": "assistant", "content": found.text}, NEXT]
    return cached


def test_a_conversation_goes_on_after_a_restart(artifact: Path, fresh: Model, tmp_path: Path) -> None:
    with keeping(artifact, tmp_path) as model:
        first = conversation(model, fresh, 3)
    assert first[0] == 0 < first[1] <= first[2]
    with keeping(artifact, tmp_path) as model:
        again = conversation(model, fresh, 3)
    # The last three questions are on disk.
    assert again[0] == first[1]
    assert again[1:] >= first[1:]


def test_a_prompt_lists_the_folder_once(
    cpu_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with keeping(cpu_artifact, tmp_path) as model:
        answer(model, [SYSTEM, QUESTION])
    listed: list[Path] = []
    files = state_folder._files
    monkeypatch.setattr(state_folder, "_files", lambda folder: listed.append(folder) or files(folder))
    with keeping(cpu_artifact, tmp_path) as model:
        generation = model.generate([SYSTEM, QUESTION], max_tokens=1, sampling=GREEDY)
        assert generation.cached_tokens and len(listed) == 1


def test_another_question_begins_after_the_same_instructions(
    artifact: Path, fresh: Model, tmp_path: Path
) -> None:
    other = [SYSTEM, {"role": "user", "content": "Assert something else, please."}]
    system = len(fresh.encode(fresh.apply_chat_template([SYSTEM, QUESTION]))) - 60
    with keeping(artifact, tmp_path) as model:
        answer(model, [SYSTEM, QUESTION])
        assert answer(model, other).cached_tokens > system - 128
    with keeping(artifact, tmp_path) as model:
        found = answer(model, other)
        assert found.cached_tokens > system - 128
        assert found.tokens == answer(fresh, other).tokens


def in_folder(name: str, sentences: int = 160) -> list[Any]:
    """Instructions as an agent's, which name its folder, and a question."""
    text = "The statement is a word. " * sentences + f"The folder is {name}. " + "It is a list. " * 40
    return [{"role": "system", "content": text}, QUESTION]


def points_of(folder: Path) -> list[list[Any]]:
    """Those of each state on disk."""
    found = []
    for path in folder.rglob("*.npz"):
        with np.load(path) as arrays:
            found.append(json.loads(arrays["about"].tobytes())["points"])
    return found


def agreeing(model: Model, *conversations: Any) -> int:
    """Tokens with which their prompts begin alike."""
    prompts = [model.encode(model.apply_chat_template(messages)) for messages in conversations]
    return min(common_prefix(prompts[0], prompt) for prompt in prompts[1:])


def test_instructions_that_differ_near_their_end(artifact: Path, fresh: Model, tmp_path: Path) -> None:
    """As an agent's in another folder: the second one reads a little of what is the same, the third none."""
    names = ("first", "other", "third")
    common = agreeing(fresh, *map(in_folder, names))
    cached = []
    for name in names:
        with keeping(artifact, tmp_path) as model:  # a new process each time
            found = answer(model, in_folder(name))
        assert found.tokens == answer(fresh, in_folder(name)).tokens
        cached.append(found.cached_tokens)
    rest = found.prompt_tokens - common
    assert cached[0] == 0 and common - cached[1] <= rest + 512 and common - cached[2] < 128
    with keeping(artifact, keep=3) as model:  # in memory alone
        again = [answer(model, in_folder(name)).cached_tokens for name in names]
    assert again == cached


@pytest.mark.parametrize("rest", [0, 1, 7])
def test_where_points_are_made(rest: int, cpu_artifact: Path) -> None:
    """A question that begins just after the instructions takes nothing from their point."""
    with keeping(cpu_artifact) as model:
        states = model._reader._kept  # type: ignore[attr-defined]
    assert states._stops(5000, 0, 4096, 4096 + rest, 0) == {2048: True, 3072: True, 3584: True, 4096: True}
    assert states._stops(5000, 3584, 4096, 4120, 3584) == {4096: True, 4120: False}
    assert states._stops(5000, 3072, 4096, 4120, 3400) == {3400: True, 3584: True, 4096: True, 4120: False}
    assert states._stops(5000, 3072, 4096, 4120, 3300) == {3584: True, 4096: True, 4120: False}
    assert states._stops(300, 0, 0, 299, 0) == {296: True}


def test_texts_that_agree_little(cpu_artifact: Path, tmp_path: Path) -> None:
    """As two agents' instructions do, of which the template's words are the same: a point costs memory."""
    with keeping(cpu_artifact, tmp_path) as model:
        for name in ("one", "two"):
            answer(model, [{"role": "system", "content": f"You are agent {name}. " * 60}, QUESTION])
    assert [len(points) for points in points_of(tmp_path)] == [1, 1]


def test_many_folders(cpu_artifact: Path, tmp_path: Path) -> None:
    """However many texts begin alike, a state has few points and the folder its limit."""
    with keeping(cpu_artifact, tmp_path) as model:
        answer(model, in_folder("none", 120))
        model.flush_states()
        limit = 8 * sum(path.stat().st_size for path in tmp_path.rglob("*.npz"))
    with keeping(cpu_artifact, tmp_path, disk_bytes=limit) as model:
        for number in range(10):  # each agrees with the one before in 270 tokens more
            found = answer(model, in_folder("some", 120 + 45 * number), max_tokens=2)
            model.flush_states()
            assert number < 2 or found.cached_tokens > 250 * number
            assert sum(path.stat().st_size for path in tmp_path.rglob("*.npz")) <= limit
            assert max(map(len, points_of(tmp_path))) <= 8


def test_conversations_do_not_disturb_each_other(cpu_artifact: Path) -> None:
    one, two = [SYSTEM, QUESTION], [SYSTEM, NEXT]
    with Model.load(cpu_artifact) as plain, keeping(cpu_artifact, keep=3) as model:
        for _ in range(2):
            for messages in (one, two):
                found = answer(model, messages)
                assert found.tokens == answer(plain, messages).tokens
                messages += [{"role": "assistant", "content": found.text}, QUESTION]
        assert answer(model, one).cached_tokens > 300 < answer(model, two).cached_tokens


def test_memory_limit(cpu_artifact: Path) -> None:
    def ask(model: Model, name: str) -> int:
        prompt = f"{name} " * 100
        return int(answer(model, prompt, max_tokens=2).cached_tokens)

    with keeping(cpu_artifact, keep=8) as model:
        assert [ask(model, name) > 0 for name in ("one", "two", "one", "two")] == [False, False, True, True]
    with keeping(cpu_artifact, keep=8, memory_bytes=1) as model:  # the last one is kept whatever its size
        assert [ask(model, name) > 0 for name in ("one", "two", "one", "one")] == [False, False, False, True]


def test_images(exported: Exported, tmp_path: Path) -> None:
    artifact = exported(TINY_VL, load_profile("cpu"))
    random = np.random.default_rng(0)
    one, other = (Image.fromarray(random.integers(0, 255, (120, 200, 3), dtype=np.uint8)) for _ in range(2))

    def look(image: Image.Image) -> list[Any]:
        content = [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]
        return [SYSTEM, {"role": "user", "content": content}]

    with Model.load(artifact) as fresh, keeping(artifact, tmp_path) as model:
        messages = look(one)
        for held in (False, True, True):
            found = answer(model, messages)
            assert found.tokens == answer(fresh, messages).tokens
            assert (found.cached_tokens > 0) == held
            messages += [{"role": "assistant", "content": found.text}, look(other)[1]]
        seen = answer(model, look(other))  # of the same size
        assert 0 < seen.cached_tokens < answer(model, look(one)).cached_tokens
        assert seen.tokens == answer(fresh, look(other)).tokens
    with Model.load(artifact) as fresh, keeping(artifact, tmp_path) as model:
        found = answer(model, messages)
        assert found.tokens == answer(fresh, messages).tokens
        assert found.cached_tokens > 300


def test_reading_ahead(cpu_artifact: Path, tmp_path: Path) -> None:
    messages = [SYSTEM, QUESTION]
    with Model.load(cpu_artifact) as fresh, keeping(cpu_artifact, tmp_path) as model:
        found = answer(model, messages)
        messages.append({"role": "assistant", "content": found.text})
        model.read_ahead(messages, sampling=GREEDY)
        ahead = answer(model, [*messages, NEXT])
        assert ahead.cached_tokens >= found.prompt_tokens
        assert ahead.tokens == answer(fresh, [*messages, NEXT]).tokens


def test_a_prompt_that_is_cancelled_is_taken_up(cpu_artifact: Path) -> None:
    prompt = "The statement is a word. " * 400
    with Model.load(cpu_artifact) as fresh, keeping(cpu_artifact) as model:
        generation = model.generate(prompt, max_tokens=5, sampling=GREEDY)
        read_once = generation._progress.cancelled.is_set
        asked = []

        def second_time() -> bool:
            asked.append(generation.prompt_read)
            return len(asked) > 1 or read_once()

        generation._progress.cancelled.is_set = second_time  # type: ignore[method-assign]
        assert generation.run() == "" and generation.finish_reason == "cancelled"
        assert asked == [0, 512]
        found = answer(model, prompt)
        assert found.cached_tokens == 512
        assert found.tokens == answer(fresh, prompt).tokens


def test_a_prompt_that_is_cancelled_at_a_point(cpu_artifact: Path, tmp_path: Path) -> None:
    with keeping(cpu_artifact, tmp_path) as model:
        generation = model.generate([SYSTEM, QUESTION], max_tokens=5, sampling=GREEDY)
        generation._progress.cancelled.is_set = (  # type: ignore[method-assign]
            lambda: generation.prompt_read > 0
        )
        assert generation.run() == "" and generation.finish_reason == "cancelled"
    with keeping(cpu_artifact, tmp_path) as model:
        assert answer(model, [SYSTEM, NEXT]).cached_tokens == generation.prompt_read > 200


def test_options_that_change_nothing_of_what_was_read(cpu_artifact: Path) -> None:
    messages = [SYSTEM, QUESTION]
    with keeping(cpu_artifact) as model:
        answer(model, messages)
        held = answer(model, messages).cached_tokens
        assert held > 250
        seeded = [
            answer(model, messages, sampling=Sampling(temperature=1.5, seed=seed), max_tokens=12)
            for seed in (5, 5, 6)
        ]
        assert seeded[0].tokens == seeded[1].tokens != seeded[2].tokens
        held_to = answer(model, messages, guidance=Guidance("regex", "[0-9]{5}"), logprobs=1)
        assert held_to.text.isdigit() and len(held_to.text) == 5 and len(held_to.logprobs) > 0
        assert {found.cached_tokens for found in (*seeded, held_to)} == {held}
        with pytest.raises(UserError, match="the guidance is not valid"):
            answer(model, messages, guidance=Guidance("regex", "[0-9"))


def test_json_is_what_llguidance_in_genai_makes(cpu_artifact: Path) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"]}
    guidance = Guidance("json_schema", json.dumps({**schema, "additionalProperties": False}))
    with Model.load(cpu_artifact) as fresh, keeping(cpu_artifact) as model:
        found = answer(model, [QUESTION], guidance=guidance, max_tokens=60)
        assert found.tokens == answer(fresh, [QUESTION], guidance=guidance, max_tokens=60).tokens


def test_forced_calls_are_what_genai_makes(cpu_artifact: Path) -> None:
    parameters = {"type": "object", "properties": {"zone": {"type": "string"}}, "required": ["zone"]}
    tools = [{"type": "function", "function": {"name": "now", "description": "", "parameters": parameters}}]
    options: dict[str, Any] = {"tools": tools, "guidance": make_guidance(thinking=False, tools=tools)}
    with Model.load(cpu_artifact) as fresh, keeping(cpu_artifact) as model:
        found = answer(model, [QUESTION], **options)
        assert found.text.startswith("<tool_call>\n<function=now>")
        assert found.tokens == answer(fresh, [QUESTION], **options).tokens


def test_bytes_of_tokens(cpu_artifact: Path) -> None:
    tokenizer = Tokenizer.open(cpu_artifact)
    text = "Ünïcode, 日本語, 🙂\n\tdef f(): pass <tool_call>" + "".join(map(chr, range(1, 128)))
    tokens, special = tokenizer.bytes_of_tokens(2048)
    assert b"".join(tokens[token] for token in tokenizer.encode(text)).decode() == text
    assert tokenizer.encode("<|im_end|>")[0] in special
    assert tokenizer.encode("<tool_call>")[0] not in special
    assert {bytes([byte]) for byte in range(256)} <= set(tokens)


def test_save_and_load(cpu_artifact: Path, copied: Path, tmp_path: Path) -> None:
    messages, file = [SYSTEM, QUESTION], tmp_path / "state.npz"
    with keeping(cpu_artifact) as model:
        length = model.save_state(file, messages)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        with np.load(file, allow_pickle=False) as arrays:  # anybody can look into it
            assert len(arrays["keys"]) == length
    with Model.load(cpu_artifact) as fresh, keeping(cpu_artifact) as model:
        assert model.load_state(file) == length
        found = answer(model, messages)
        assert found.cached_tokens == length
        assert found.tokens == answer(fresh, messages).tokens
        with pytest.raises(UserError, match="load it with states=StateSettings"):
            fresh.load_state(file)
        with pytest.raises(UserError, match="too short to keep"):
            model.save_state(file, "A")
        with pytest.raises(UserError, match="No such file"):
            model.load_state(tmp_path / "none")
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(UserError, match="is no state of this model"):
            model.load_state(file)
    with keeping(copied, tmp_path) as model:
        model.save_state(file, messages)
        manifest = json.loads((copied / "manifest.json").read_text())
        (copied / "manifest.json").write_text(json.dumps(manifest, indent=1))
    with keeping(copied, tmp_path) as model, pytest.raises(UserError, match="another model"):
        model.load_state(file)


def test_damaged_and_foreign_files_are_ignored(
    cpu_artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with keeping(cpu_artifact, tmp_path) as model:
        tokens = answer(model, [SYSTEM, QUESTION]).tokens
    [folder] = tmp_path.iterdir()
    good = sorted(folder.iterdir())
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path, folder)} <= {0o700, 0o755}
    assert {stat.S_IMODE(path.stat().st_mode) for path in good} == {0o600}
    for path in good:  # one byte of an array
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    (folder / "text.npz").write_text("nothing")
    (folder / "long.npz").write_text("nothing" * 1000)
    np.savez(folder / "other.npz", keys=np.arange(3))
    np.savez(folder / "objects.npz", keys=np.array([{}], object), allow_pickle=True)
    os.symlink("/dev/zero", folder / "link.npz")
    os.mkfifo(folder / "pipe.npz")
    with caplog.at_level(logging.WARNING), keeping(cpu_artifact, tmp_path) as model:
        found = answer(model, [SYSTEM, QUESTION])
        assert found.tokens == tokens and found.cached_tokens == 0
        answer(model, [QUESTION])
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(good) + 4 and all("is ignored" in line and "\n" not in line for line in said)
    assert not any("pickle" in line for line in said)  # NumPy's advice to load it all the same


def test_the_folder_has_a_limit(cpu_artifact: Path, tmp_path: Path) -> None:
    def size() -> int:
        return sum(path.stat().st_size for path in tmp_path.rglob("*.npz"))

    names = ("1", "2", "3")
    with keeping(cpu_artifact, tmp_path) as model:
        answer(model, "1 " * 200, max_tokens=2)
        model.flush_states()
        limit = int(2.5 * size())
    with keeping(cpu_artifact, tmp_path, disk_bytes=limit) as model:
        for name in names:
            answer(model, f"{name} " * 200, max_tokens=2)
            model.flush_states()
            assert size() <= limit
    with keeping(cpu_artifact, tmp_path, keep=0) as model:
        held = {name: answer(model, f"{name} " * 200, max_tokens=2).cached_tokens > 0 for name in names}
    assert held == {"1": False, "2": True, "3": True}


def test_a_state_that_is_larger_than_the_limit(
    cpu_artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with keeping(cpu_artifact, tmp_path) as model:
        answer(model, "1 " * 200, max_tokens=2)
    [file] = tmp_path.rglob("*.npz")
    with keeping(cpu_artifact, tmp_path, disk_bytes=int(1.2 * file.stat().st_size)) as model:
        answer(model, "2 " * 600, max_tokens=2)
    assert list(tmp_path.rglob("*.npz")) == [file]  # what is there stays
    assert "does not fit the limit" in caplog.text


def test_hidden_states(exported: Exported, tmp_path: Path) -> None:
    """What reads outputs of the graph besides logits."""
    checkpoint = with_head(TINY, load_file(TRAINED_HEAD), tmp_path / "tiny-dense")
    artifact = exported(checkpoint, load_profile("cpu"))
    with Model.load(artifact) as fresh, keeping(artifact) as model:
        tokens = fresh.encode("The statement is a word. " * 100)
        assert np.array_equal(model.embed(tokens, "mean"), fresh.embed(tokens, "mean"))


def test_refusals(cpu_artifact: Path, exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="on the CPU only, not on DirectML: take --provider cpu"):
        Model.load(exported(TINY, directml_profile()), states=StateSettings())
    with pytest.raises(UserError, match="on the CPU only, not on CUDA"):
        Model.load(cpu_artifact, "cuda", states=StateSettings())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another folder"):
        keeping(cpu_artifact, tmp_path / "file" / "states")
