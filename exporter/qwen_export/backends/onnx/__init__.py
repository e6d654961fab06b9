"""An artifact for ONNX Runtime GenAI."""
