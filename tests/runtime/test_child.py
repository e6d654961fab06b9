"""A model in a process of its own: tasks run there, and its end is told apart from ours."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from qwen_common.errors import UserError
from qwen_runtime import Model
from qwen_runtime.child import ChildEnded, child
from qwen_runtime.load_options import LoadOptions


def answer(model: Model, text: str, process: int) -> tuple[str, bool]:
    return model.decode(model.encode(text)), os.getpid() != process


def end(model: Model) -> None:
    os._exit(1)


def test_tasks_run_beside_the_model(cpu_artifact: Path) -> None:
    with child(cpu_artifact, LoadOptions("cpu")) as model:
        assert model.loaded.info.provider == "cpu"
        assert 0 <= model.loaded.resident_before < model.loaded.resident
        assert model.call(answer, "Hello", os.getpid()) == ("Hello", True)
        with pytest.raises(ChildEnded):
            model.call(end)


def test_what_cannot_be_loaded_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest\.json"), child(tmp_path, LoadOptions("cpu")):
        pass
