"""An artifact for OpenVINO GenAI: converted, compressed, looked at, described."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_common.errors import UserError
from qwen_common.files import as_json
from qwen_profiles.schema import Profile, Role, WeightFormat

from qwen_export.backends.copied_files import copy_files
from qwen_export.backends.onnx.genai_config import genai_config
from qwen_export.backends.onnx.processor_config import processor_config
from qwen_export.backends.openvino.compress import check, compress
from qwen_export.backends.openvino.convert import convert
from qwen_export.backends.openvino.dataset import CalibrationSamples
from qwen_export.backends.openvino.fill import Filler
from qwen_export.backends.openvino.load import load_model
from qwen_export.backends.openvino.repair import repair
from qwen_export.backends.protocol import ExportOptions, Write, Written
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.checkpoint.dequantised import dequantised
from qwen_export.output import STAGED

if TYPE_CHECKING:
    from qwen_export.progress import Progress

_GENERATION_CONFIG = "generation_config.json"
_LIBRARIES = ("openvino", "openvino_tokenizers", "nncf", "optimum.intel", "torch", "transformers")
_INSTALL = "pip install 'qwen-edge[export,openvino]', in an environment of its own"
# What of ONNX Runtime GenAI's description our runtime needs here too.
_MODEL_FIELDS = ("type", "vocab_size", "context_length", "bos_token_id", "eos_token_id", "pad_token_id")
_VISION_FIELDS = ("image_token_id", "video_token_id", "vision_start_token_id")
# Not PROCESSOR_CONFIG's name: OpenVINO GenAI would read it and expect transformers' content.
_IMAGES = "image_processor.json"


def prepare(checkpoint: Checkpoint, profile: Profile, options: ExportOptions, progress: Progress) -> Write:
    """See `ExportBackend.prepare`."""
    _require_libraries()
    expected = {**checkpoint.config.tensors(), **(checkpoint.vision.tensors() if checkpoint.vision else {})}
    for line in dequantised({name: checkpoint.tensors[name] for name in expected}):
        progress.note(line)
    return partial(_write, checkpoint, profile, options.calibration)


def _write(
    checkpoint: Checkpoint, profile: Profile, calibration: Path | None, work: Path, progress: Progress
) -> Written:
    """Write every file of the artifact to `work`/artifact.

    Args:
        calibration: text for a `compression` that needs one; None takes the shipped one.

    Raises:
        UserError: a weight holds NaN or Inf, or was not stored as the recipe says.
    """
    staged, scratch = work / STAGED, work / "weights"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    recipe = profile.weights
    if checkpoint.config.tie_word_embeddings:
        recipe = {**recipe, "embedding": recipe["lm_head"]}
    sizes: dict[Role, int] = {}
    try:
        with _quiet():
            progress.note("tracing the model: minutes for a large one")
            data_free = profile.compression == "data-free"
            left_out = [role for role, form in recipe.items() if form.precision != "float" and data_free]
            model, placeholders = load_model(checkpoint, left_out)
            filler = Filler(placeholders, recipe, scratch)
            if not data_free:
                text = CalibrationSamples(checkpoint.root, model.get_input_embeddings().weight, calibration)

            def finish(traced: Any, name: str) -> Any:
                progress.note(f"compressing {name}")
                if data_free:
                    filler.fill(traced)
                repair(traced)
                if not data_free:
                    traced = _calibrated(traced, name, recipe, profile.compression, text)
                for role, size in check(traced, recipe, name).items():
                    sizes[role] = sizes.get(role, 0) + size
                return traced

            convert(model, staged, finish)
            placeholders.check()
            if missing := _roles(checkpoint) - sizes.keys():
                raise UserError(f"the IR has no weights of {', '.join(sorted(missing))}: {_INSTALL}")
            generation = checkpoint.root / _GENERATION_CONFIG
            if generation.is_file():
                shutil.copyfile(generation, staged / generation.name)
            copy_files(checkpoint.root, staged)
            _write_tokenizers(checkpoint.root, staged)
    finally:
        scratch.unlink(missing_ok=True)
    return _describe(checkpoint, profile, staged, sizes)


def _calibrated(
    model: Any, name: str, recipe: Mapping[Role, WeightFormat], compression: str, text: CalibrationSamples
) -> Any:
    """The whole model through NNCF, 4-bit weights of the language model with what `compression` names."""
    options: dict[str, Any] = {}
    if any(given.any_name == "beam_idx" for given in model.inputs):
        options = {"dataset": text.dataset(model), compression.replace("-", "_"): True}
    return compress(model, recipe, name, **options)


def _describe(checkpoint: Checkpoint, profile: Profile, staged: Path, sizes: Mapping[Role, int]) -> Written:
    config = genai_config(checkpoint, profile)
    model = {name: config["model"][name] for name in _MODEL_FIELDS}
    if checkpoint.vision:
        model |= {name: config["model"][name] for name in _VISION_FIELDS}
        model["vision"] = {"config_filename": _IMAGES}
        (staged / _IMAGES).write_bytes(as_json(processor_config(checkpoint.vision)))
    model["decoder"] = {"session_options": config["model"]["decoder"]["session_options"]}
    context = model["context_length"]
    return Written(
        runs_on={"device": profile.device, "openvino": version("openvino"), "nncf": version("nncf")},
        context_length=context,
        bytes_by_role={str(role): size for role, size in sizes.items()},
        all_logits=True,
        image_prompt_tokens=context if checkpoint.vision else None,
        runtime={"model": model, "search": config["search"]},
    )


def _roles(checkpoint: Checkpoint) -> set[Role]:
    """Those that a model like this has weights of."""
    vision = checkpoint.vision.tensors() if checkpoint.vision else {}
    specs = [*checkpoint.config.tensors().values(), *vision.values()]
    return {spec.recipe_role for spec in specs if spec.recipe_role}


def _write_tokenizers(source: Path, staged: Path) -> None:
    """The tokenizer and the way back, as models that OpenVINO runs."""
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    models = convert_tokenizer(AutoTokenizer.from_pretrained(source), with_detokenizer=True)
    for model, name in zip(models, ("openvino_tokenizer", "openvino_detokenizer"), strict=True):
        openvino.save_model(model, staged / f"{name}.xml")


def _require_libraries() -> None:
    """Raise a UserError that says what to install, if something is missing."""
    for name in _LIBRARIES:
        try:
            import_module(name)
        except ImportError as error:
            raise UserError(f"exporting for OpenVINO needs {error.name or name}: {_INSTALL}") from error
    with suppress(ImportError):  # optimum-intel wants it, nothing here does
        try:
            import_module("torchvision")
        except RuntimeError as error:  # transformers would end with less to go by
            raise UserError(
                f"torchvision was built for another PyTorch ({error}): pip uninstall torchvision, or install "
                "the build that goes with PyTorch"
            ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the libraries print: warnings of the tracing, progress bars, tables on stdout."""
    import nncf
    import transformers

    logs: Any = transformers.utils.logging
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    nncf.set_log_level(logging.ERROR)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), warnings.catch_warnings(action="ignore"):
        yield
