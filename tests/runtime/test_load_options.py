"""One value says how an artifact is loaded; `Model.load` takes the same by keywords."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
from qwen_runtime import Model, Speculative, StateSettings
from qwen_runtime.load_options import LoadOptions


def test_model_load_takes_each_by_its_name_and_default() -> None:
    taken = list(inspect.signature(Model.load).parameters.values())[1:]  # the first is the folder
    fields, defaults = dataclasses.fields(LoadOptions), LoadOptions()
    given = [(field.name, getattr(defaults, field.name)) for field in fields]
    assert given == [(each.name, each.default) for each in taken]
    assert [(field.name, field.type) for field in fields] == [(each.name, each.annotation) for each in taken]


def test_each_is_described() -> None:
    described = inspect.getdoc(LoadOptions) or ""
    for field in dataclasses.fields(LoadOptions):
        assert f"\n    {field.name}: " in described, field.name


def test_model_load_hands_each_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {
        "provider": "cpu",
        "verify": True,
        "context_length": 100,
        "keep": 3,
        "states": StateSettings(memory_bytes=1),
        "image_pixels": 7,
        "prepacked": Path("layout"),
        "speculative": Speculative.FAST,
        "threads": "2:yield",
        "adapters": {"tools": Path("tools.onnx_adapter")},
    }
    seen: list[LoadOptions] = []
    monkeypatch.setattr(Model, "load_with", lambda path, options: seen.append(options))
    Model.load("artifact", **given)
    assert seen == [LoadOptions(**given)]
    assert set(given) == {field.name for field in dataclasses.fields(LoadOptions)}
    assert pickle.loads(pickle.dumps(seen[0])) == seen[0]
