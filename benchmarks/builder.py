"""ONNX Runtime GenAI's model builder as the peer: the same weights, its own export."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
)

_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "num_position_embeddings": 16,
}


def wrap(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint as the builder takes it: inside a vision-language model, with a tiny vision tower."""
    folder.mkdir(parents=True)
    text = AutoConfig.from_pretrained(checkpoint).to_dict()
    config_class, model_class = (
        (Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration)
        if "num_experts" in text
        else (Qwen3_5Config, Qwen3_5ForConditionalGeneration)
    )
    config = config_class(
        text_config=text,
        vision_config={**_VISION, "out_hidden_size": text["hidden_size"]},
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    config.architectures = [model_class.__name__]
    config.save_pretrained(folder)
    with torch.device("meta"):
        names = dict(model_class(config).named_parameters())
    tensors = {
        name: torch.randn(value.shape, dtype=torch.bfloat16) * 0.02
        for name, value in names.items()
        if name.startswith("model.visual.")
    }
    for shard in sorted(checkpoint.glob("*.safetensors")):
        for name, value in load_file(shard).items():
            tensors[name.replace("model.", "model.language_model.", 1)] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for path in checkpoint.iterdir():
        if path.suffix in (".jinja", ".txt") or path.name.startswith(("tokenizer", "vocab", "generation")):
            shutil.copy(path, folder / path.name)
    return folder


def command(wrapped: Path, output: Path, *extra: str, precision: str = "int4") -> list[str]:
    """The builder's command line; `extra` are its own options, such as `block_size=128`."""
    arguments = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(wrapped)]
    arguments += ["-o", str(output), "-p", precision, "-e", "cpu", "-c", str(output / "cache")]
    return [*arguments, "--extra_options", "exclude_embeds=false", *extra]


def build(wrapped: Path, output: Path, *extra: str, precision: str = "int4") -> Path:
    """Run it.

    Raises:
        subprocess.CalledProcessError: it failed; its messages are in `stderr`.
    """
    subprocess.run(command(wrapped, output, *extra, precision=precision), check=True, capture_output=True)
    return output
