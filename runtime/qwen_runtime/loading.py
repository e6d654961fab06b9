"""What a `Model` is made of, from an artifact's folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qwen_common.errors import UserError
from qwen_common.manifest import BackendName
from qwen_common.providers import CPU

from qwen_runtime.artifact import Artifact
from qwen_runtime.backends.load import load, load_ort
from qwen_runtime.images import MOST_PIXELS
from qwen_runtime.info import ModelInfo
from qwen_runtime.load_options import LoadOptions
from qwen_runtime.prepacked import with_prepacked
from qwen_runtime.prompt import PromptBuilder
from qwen_runtime.reading import KeepingReader, PromptReader
from qwen_runtime.states import States, StateSettings
from qwen_runtime.switched import load_adapters
from qwen_runtime.threads import Threads, decide
from qwen_runtime.variants import Variant, Variants

Parts = tuple[Artifact, ModelInfo, PromptBuilder, Variants]


def load_parts(path: str | Path, options: LoadOptions) -> Parts:
    """Errors as of `Model.load`."""
    provider, verify, keep, states = options.provider, options.verify, options.keep, options.states
    artifact = Artifact.open(path, verify)
    artifact = replace(artifact, threads=_threads(artifact, options.threads))
    switched = load_adapters(artifact, options.adapters)
    if options.speculative is not None and options.prepacked is not None:
        raise UserError("--speculative has graphs of its own, without --prepacked-dir: leave one off")
    if options.prepacked is not None:
        artifact = with_prepacked(artifact, provider, options.prepacked, verify)
    # ONNX Runtime GenAI passes over the adapters of a model that sees.
    adapted = bool(switched) and artifact.images is not None and provider in ("auto", CPU.key)
    if (options.speculative is not None or adapted) and states is None:
        states = StateSettings()
    ort = None if states is None else load_ort(artifact, provider, options.speculative)
    if ort is not None and adapted and options.states is None:
        ort.reason = f"{CPU.title}: ONNX Runtime itself, for the adapters of a model that sees"
    backend = ort or load(artifact, provider, keep)
    info = ModelInfo.of(artifact, backend.provider, backend.reason, options.context_length, switched)
    text, room, pixels = backend.tokenizer, info.context_length, options.image_pixels or MOST_PIXELS
    prompts = PromptBuilder(
        artifact, backend.provider, text.encode, text.decode, room, text.longest_token, pixels
    )
    reader = PromptReader(backend, prompts, info.context_length, keep)
    if ort is not None and states is not None:
        kept = States(states, ort, ort.digest, keep)
        reader = KeepingReader(ort, prompts, info.context_length, kept)
    variants = Variants(artifact, Variant(backend, reader), switched, asked=bool(options.adapters))
    return artifact, info, prompts, variants


def _threads(artifact: Artifact, asked: int | str | None) -> Threads:
    settings = artifact.manifest["settings"]
    if artifact.backend != BackendName.OPENVINO:
        return decide(asked, settings)
    # It places its threads itself, has no word for how they wait, and does not read ONNX Runtime's variable.
    return replace(decide(asked, settings, {}), processors=(), spin_us=None)
