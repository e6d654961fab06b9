"""What every artifact needs on an execution provider, whoever opens it."""

from __future__ import annotations

# ONNX Runtime GenAI captures the graph on DirectML unless told not to, which asks for inputs of one size: an
# attention mask of max_length, and a KV cache that never grows. The exporter writes this into
# genai_config.json; the runtime says it again where it chooses the provider itself.
PROVIDER_OPTIONS: dict[str, dict[str, str]] = {"dml": {"enable_graph_capture": "0"}}
