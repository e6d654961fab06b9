"""ONNX Runtime GenAI, on whichever execution provider is at hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from qwen_common.errors import UserError, one_line
from qwen_common.manifest import ADVICE, further_graphs
from qwen_common.providers import CPU, PROVIDERS

from qwen_runtime.artifact import Artifact
from qwen_runtime.backends.protocol import (
    ImageGenerator,
    LogitsGenerator,
    OutputGenerator,
    RewindableGenerator,
)
from qwen_runtime.grammar import lark, why_refused
from qwen_runtime.graph_fault import graph_fault
from qwen_runtime.guidance import Guidance
from qwen_runtime.images import Patches, vision_inputs
from qwen_runtime.prepacked import damaged
from qwen_runtime.provider import Choice, load_first
from qwen_runtime.resident import settle
from qwen_runtime.switched import SwitchedAdapter
from qwen_runtime.tokenizer import Tokenizer

# ONNX Runtime, of a graph that it is too old for; the second, 1.30 of quantised experts, the third, 1.31 of
# experts in 4-bit floats.
_TOO_OLD = (
    "is not a registered function/op",
    "Unrecognized attribute: ",
    "Could not find an implementation for QMoE(",
)


class GenAIGenerator(LogitsGenerator, ImageGenerator, RewindableGenerator, OutputGenerator, Protocol):
    """An onnxruntime_genai.Generator. It rewinds if the artifact does."""


class GenAI:
    """An artifact in ONNX Runtime GenAI; attributes as in `Backend`."""

    shows_logits = True

    def __init__(self, artifact: Artifact, choice: Choice, og: Any, model: Any) -> None:
        self.provider, self.reason = choice.name, choice.reason
        # Where a generator cannot take a second chunk ONNX Runtime GenAI cuts the prompt by itself.
        appends = PROVIDERS[choice.name].appends
        self.chunk_size = artifact.chunk_size if appends else None
        self.rewinds = artifact.rewinds(choice.name) and appends
        self._og = og
        self._model = model
        self._adapters: Any = None  # of ONNX Runtime GenAI, where there are any
        self._active: str | None = None
        self.tokenizer = Tokenizer.open(artifact.root)

    @classmethod
    def load(cls, artifact: Artifact, provider: str) -> GenAI:
        """As `backends.load`."""
        import onnxruntime_genai as og

        og.disable_telemetry_events()
        manifest = artifact.manifest
        choice, model = load_first(
            provider,
            manifest["provider"],
            og,
            lambda name: _open(og, artifact, name),
            manifest["settings"].get("fallbacks", []),
            lambda provider: graph_fault(artifact, provider),
        )
        if further := further_graphs(manifest, choice.name):
            choice = replace(choice, reason=f"{choice.reason}; with the {further['lowering']} graph")
        return cls(artifact, choice, og, model)

    def generator(
        self, options: Mapping[str, Any], guidance: Guidance | None, max_length: int
    ) -> GenAIGenerator:
        parameters = self._og.GeneratorParams(self._model)
        parameters.set_search_options(max_length=max_length, **options)
        if guidance is not None:
            kind, text = guidance
            if kind == "answer":
                kind, text = "lark_grammar", lark(text)
            parameters.set_guidance(kind, text)
        try:
            generator = self._og.Generator(self._model, parameters)
        except Exception as error:
            if guidance is None or "grammar" not in str(error):
                raise
            raise UserError(f"the guidance is not valid: {why_refused(str(error))}") from error
        if self._active is not None:
            generator.set_active_adapter(self._adapters, self._active)
        return generator

    logits_generator = generator

    def adapted(self, adapter: SwitchedAdapter) -> GenAI:
        """As `AdaptableBackend`."""
        if self._adapters is None:
            self._adapters = self._og.Adapters(self._model)
        try:
            self._adapters.load(str(adapter.path), adapter.name)
        except Exception as error:
            raise UserError(f"ONNX Runtime GenAI does not take {adapter.path}: {ADVICE}") from error
        other = copy(self)
        other._active = adapter.name
        return other

    def logprobs(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        raise NotImplementedError("its logits say it")

    def image_inputs(self, text: str, tokens: Sequence[int], images: Sequence[Patches]) -> Any:
        tensors = self._og.NamedTensors()
        for name, value in vision_inputs(tokens, images).items():
            tensors[name] = value
        return tensors


def _open(og: Any, artifact: Artifact, name: str) -> Any:
    config = og.Config(str(artifact.root))
    config.clear_providers()
    overlay = artifact.overlay(name)
    # GenAI hides a prompt's pad tokens from attention. Older artifacts say that <|endoftext|> is one.
    overlay = {**overlay, "model": {**overlay.get("model", {}), "pad_token_id": -1}}
    config.overlay(json.dumps(overlay, ensure_ascii=False))  # GenAI reads no escaped surrogate pairs
    provider = PROVIDERS[name]
    if provider.genai_name is not None:
        config.append_provider(provider.genai_name)
        options = {**provider.options, **artifact.provider_options(name)}
        for option, value in options.items():
            config.set_provider_option(provider.genai_name, option, value)
    try:
        model = og.Model(config)
    except Exception as error:
        if (advice := damaged(artifact, error)) is not None:
            raise advice from error
        if not any(text in str(error) for text in _TOO_OLD):
            if name != CPU.key:
                raise  # another provider is tried, or this one's name is told
            raise UserError(f"ONNX Runtime could not load {artifact.root}: {one_line(str(error))}") from error
        needed = (further_graphs(artifact.manifest, name) or artifact.manifest)["onnxruntime"]
        raise UserError(
            f"{artifact.root} needs onnxruntime {needed}: install it, or export with a profile for older ones"
        ) from error
    if name == CPU.key:
        settle(*artifact.folders)
    else:
        _try(og, model)
    return model


def _try(og: Any, model: Any) -> None:
    """Generate one token. Some devices take a model and fail when it first runs, as one without float16 does:
    better now, where another provider can take over."""
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=2, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([0], np.int32))
    generator.generate_next_token()
