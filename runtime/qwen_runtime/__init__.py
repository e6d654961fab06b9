"""artifact -> tokens: the runtime. Imports no torch, transformers or onnx."""
