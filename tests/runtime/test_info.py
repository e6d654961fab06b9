"""What is told of a model before it is asked anything."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from qwen_profiles.schema import load_profile
from qwen_runtime.artifact import Artifact
from qwen_runtime.info import ModelInfo
from qwen_runtime.request import Request
from qwen_runtime.serve import admission
from qwen_runtime.serve.errors import ApiError

from benchmarks.support.artifacts import make_artifact
from benchmarks.support.checkpoints import TINY

TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]
REQUEST = Request(prompt=[{"role": "user", "content": "What is assert?"}], tools=TOOLS)
OTHER_CALLS = "{{- '<tool_call>' + call.name + '<arg_key>' }}"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "cpu"
    return make_artifact(TINY, load_profile("cpu"), folder, all_logits=False)


def info(folder: Path, template: bytes | None = None) -> ModelInfo:
    """Of the artifact, with another chat template than its own."""
    opened, file = Artifact.open(folder), folder / "chat_template.jinja"
    own = file.read_bytes()
    try:
        file.write_bytes(own if template is None else template)
        return ModelInfo.of(opened, "cpu", "for the test", None)
    finally:
        file.write_bytes(own)


def test_calls_as_xml_are_read(artifact: Path) -> None:
    assert info(artifact).dialect == "qwen3_5"
    asyncio.run(admission.check(REQUEST, info(artifact)))


def test_tools_are_refused_where_calls_cannot_be_read(artifact: Path) -> None:
    found = info(artifact, OTHER_CALLS.encode())
    assert found.dialect is None
    with pytest.raises(ApiError, match="in a form that cannot be read") as refused:
        asyncio.run(admission.check(REQUEST, found))
    assert refused.value.status == 400 and refused.value.parameter == "tools"
    asyncio.run(admission.check(Request(prompt=REQUEST.prompt), found))


@pytest.mark.parametrize("template", [b"{{- messages[0].content }}", b"\xff"], ids=["none", "damaged"])
def test_templates_that_say_nothing_of_calls(template: bytes, artifact: Path) -> None:
    """One that cannot be read is told where it is needed."""
    assert info(artifact, template).dialect == "qwen3_5"
