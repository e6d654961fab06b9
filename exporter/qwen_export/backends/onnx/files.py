"""Names of an ONNX artifact's files."""

from __future__ import annotations

PROCESSOR_CONFIG = "processor_config.json"
MODEL_FILE = "model.onnx"
EMBEDDING_FILE = "embedding.onnx"
VISION_FILE = "vision.onnx"
SPECULATIVE_FILE = "speculative.onnx"
MTP_FILE = "mtp.onnx"
