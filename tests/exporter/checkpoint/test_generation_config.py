"""generation_config.json, and what else says where an answer ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnxruntime_genai as og
import pytest
from click.testing import CliRunner
from qwen_common.errors import USER_ERROR, UserError
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.checkpoint.generation_config import GenerationConfig
from qwen_export.checkpoint.text_files import check_text_files
from qwen_export.cli import main
from qwen_profiles.schema import load_profile
from qwen_runtime import Model, Sampling

from benchmarks.support.artifacts import make_artifact
from benchmarks.support.checkpoints import TINY

IM_END, END_OF_TEXT = 2037, 2035


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "checkpoint"))


def change(path: Path, **fields: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **fields}), encoding="utf-8")


def generation(folder: Path) -> GenerationConfig:
    return Checkpoint.open(str(folder)).generation


@pytest.mark.parametrize(
    ("named", "in_config", "expected"),
    [
        ([IM_END, END_OF_TEXT], IM_END, [IM_END, END_OF_TEXT]),  # as it ships: kept as it is
        ([END_OF_TEXT, IM_END], IM_END, [END_OF_TEXT, IM_END]),
        ([IM_END], None, [IM_END]),
        (IM_END, IM_END, IM_END),
        (END_OF_TEXT, None, [END_OF_TEXT, IM_END]),
        (END_OF_TEXT, END_OF_TEXT, [END_OF_TEXT, IM_END]),
        (None, END_OF_TEXT, [END_OF_TEXT, IM_END]),
        (None, None, IM_END),
        (5, [6, 7], [5, 6, 7, IM_END]),
    ],
)
def test_ends_are_the_union_of_three_files(folder: Path, named: Any, in_config: Any, expected: Any) -> None:
    change(folder / "generation_config.json", eos_token_id=named)
    change(folder / "config.json", eos_token_id=in_config)
    assert generation(folder).eos_token_id == expected


def test_ends_without_the_file(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    change(folder / "config.json", eos_token_id=END_OF_TEXT)
    assert generation(folder).eos_token_id == [END_OF_TEXT, IM_END]
    change(folder / "tokenizer_config.json", eos_token={"content": "<|im_start|>"})
    assert generation(folder).eos_token_id == [END_OF_TEXT, 2036]
    change(folder / "tokenizer_config.json", eos_token=None)
    assert generation(folder).eos_token_id == END_OF_TEXT
    change(folder / "config.json", eos_token_id=None)
    with pytest.raises(UserError, match="does not say where an answer ends: put eos_token_id into"):
        _ = generation(folder)


def test_a_turn_ends_the_answer_whatever_the_file_names(folder: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "What is `with`?"}]
    artifact = make_artifact(folder, load_profile("cpu"), tmp_path / "whole")
    with Model.load(artifact) as model:
        expected = model.generate(messages, sampling=Sampling(temperature=0), max_tokens=300)
        assert expected.run() and expected.finish_reason == "stop"
    change(folder / "generation_config.json", eos_token_id=END_OF_TEXT)
    change(folder / "config.json", eos_token_id=END_OF_TEXT)
    artifact = make_artifact(folder, load_profile("cpu"), tmp_path / "one-end")
    with Model.load(artifact) as model:
        found = model.generate(messages, sampling=Sampling(temperature=0), max_tokens=300)
        assert found.run() == expected.text and found.finish_reason == "stop"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("eos_token_id", "2037"),
        ("eos_token_id", []),
        ("eos_token_id", [2037, None]),
        ("eos_token_id", 2048),
        ("eos_token_id", -1),
        ("eos_token_id", [2037, 99999]),
        ("eos_token_id", True),
        ("pad_token_id", 2048),
        ("bos_token_id", "<|endoftext|>"),
        ("temperature", "hot"),
        ("temperature", -1),
        ("top_k", -1),
        ("top_k", 20.5),
        ("top_k", "20"),
        ("top_p", 1.5),
        ("top_p", []),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("do_sample", "yes"),
    ],
)
def test_values_that_are_none(folder: Path, tmp_path: Path, field: str, value: Any) -> None:
    change(folder / "generation_config.json", **{field: value})
    arguments = ["--profile", "cpu", str(folder), "-o", str(tmp_path / "out"), "--no-verify", "--no-progress"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == USER_ERROR, result.output
    (line,) = result.stderr.strip().splitlines()
    assert "generation_config.json" in line and field in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_null_is_as_good_as_absent_and_top_k_at_most_the_vocabulary(folder: Path) -> None:
    nothing = {name: None for name in GenerationConfig.model_fields}
    change(folder / "generation_config.json", **nothing)
    assert generation(folder).search() == {} and generation(folder).eos_token_id == IM_END
    change(folder / "generation_config.json", top_k=10**9, temperature=0, do_sample=True)
    assert generation(folder).search() == {"top_k": 2048, "do_sample": False}


def test_sampling_defaults_of_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    change(
        folder / "generation_config.json", repetition_penalty=1.3, min_p=1.0, do_sample=True, temperature=1.0
    )
    artifact = make_artifact(folder, load_profile("cpu"), tmp_path / "out")
    search = json.loads((artifact / "genai_config.json").read_text())["search"]
    assert search["repetition_penalty"] == 1.3 and "min_p" not in search
    assert json.loads((artifact / "manifest.json").read_text())["sampling"] == {"min_p": 1.0}
    og.Model(str(artifact))  # a native program opens it too
    prompt = "The statement The statement The"
    with Model.load(artifact) as model:

        def answer(**options: Any) -> list[int]:
            generation = model.generate(prompt, max_tokens=24, sampling=Sampling(**options))
            generation.run()
            return generation.tokens

        assert answer(temperature=0) == answer(temperature=0, repetition_penalty=1.3)
        assert answer(temperature=0) != answer(temperature=0, repetition_penalty=1.0)
        # With a min_p of 1 only the likeliest is left before the penalty, so that nothing is drawn.
        assert answer(seed=1) == answer(seed=2) == answer(temperature=0, repetition_penalty=1.0)
        assert answer(seed=1, min_p=0) != answer(seed=2, min_p=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", "is no tokenizer that can be read"),
        ("tokenizer_config.json", "{", "has no chat template that can be read|is not valid JSON"),
        (
            "tokenizer_config.json",
            '{"eos_token": "<|nowhere|>"}',
            "'<|nowhere|>' is no token of tokenizer.json",
        ),
        ("chat_template.jinja", "{% for %}", "the default chat template is not valid"),
        ("chat_template.jinja", "{{ x | no_such_filter }}", "the default chat template is not valid"),
        ("generation_config.json", "[1]", "generation_config.json is not a JSON object"),
        ("generation_config.json", '{"temperature": NaN}', "generation_config.json is not valid JSON"),
        ("generation_config.json", "[" * 100_000, "generation_config.json is not valid JSON"),
        ("config.json", None, "the tokenizer in .* has the id 2047, and the model has 1000 tokens"),
    ],
)
def test_faults_that_are_found_before_the_work(
    folder: Path, tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    if name == "tokenizer_config.json" or name == "tokenizer.json":
        (folder / "chat_template.jinja").unlink()
    if content is None:
        change(folder / name, vocab_size=1000)
    else:
        (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message.replace("|nowhere|", r"\|nowhere\|")):
        check_text_files(Checkpoint.open(str(folder)))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_no_tokenizer_to_verify_with(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).unlink()
    arguments = ["--profile", "cpu", str(folder), "-o", str(tmp_path / "out"), "--no-progress"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == USER_ERROR and f"has no {name}: put tokenizer.json and" in result.output
    assert not (tmp_path / "out").exists()
