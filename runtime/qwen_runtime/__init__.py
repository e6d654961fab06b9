"""artifact -> tokens: the runtime. Imports no torch, transformers or onnx.

from qwen_runtime import Model

with Model.load("artifacts/Qwen3.5-0.8B-cpu") as model:
    for piece in model.generate([{"role": "user", "content": "Hello"}]):
        print(piece, end="", flush=True)
"""

from qwen_runtime.generation import Generation
from qwen_runtime.guidance import Guidance
from qwen_runtime.load_options import LoadOptions
from qwen_runtime.logits import TokenLogprob
from qwen_runtime.model import Model, ModelInfo
from qwen_runtime.sampling import Sampling
from qwen_runtime.speculative import Speculative
from qwen_runtime.states import StateSettings

__all__ = [
    "Generation",
    "Guidance",
    "LoadOptions",
    "Model",
    "ModelInfo",
    "Sampling",
    "Speculative",
    "StateSettings",
    "TokenLogprob",
]
