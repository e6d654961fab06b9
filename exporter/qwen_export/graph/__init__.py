"""The ONNX graph of Qwen3.5, one small module per block of the architecture."""
