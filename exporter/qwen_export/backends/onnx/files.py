"""Names of an ONNX artifact's files."""

from __future__ import annotations

PROCESSOR_CONFIG = "processor_config.json"
MODEL_FILE = "model.onnx"
EMBEDDING_FILE = "embedding.onnx"
VISION_FILE = "vision.onnx"
SPECULATIVE_FILE = "speculative.onnx"
PAIRS_FILE = "pairs.onnx"
MTP_FILE = "mtp.onnx"
# The others are for speculative decoding.
ANSWERING_FILES = (MODEL_FILE, EMBEDDING_FILE, VISION_FILE)


def provider_file(name: str, provider: str) -> str:
    """`model.dml.onnx`: what the provider takes in place of `model.onnx`; of other files likewise."""
    stem, _, ending = name.rpartition(".")
    return f"{stem}.{provider}.{ending}"
