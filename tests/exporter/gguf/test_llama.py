"""llama.cpp's logits and tokens of the same file, from an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from qwen_export import reference
from qwen_export.opening import open_checkpoint
from qwen_runtime.tokenizer import Tokenizer

from benchmarks.support.session import cosine
from tests.support.gguf_checkpoints import write_gguf
from tests.support.random_checkpoints import write_random_checkpoint

CHECKPOINTS = Path("tests/checkpoints").resolve()
PYTHON = os.environ.get("QWEN_EDGE_LLAMA_PYTHON", "")
_LLAMA = """
import json, sys
import llama_cpp, numpy
model = llama_cpp.Llama(sys.argv[1], n_ctx=512, logits_all=True, verbose=False, n_threads=1)
ids = model.tokenize(sys.stdin.buffer.read(), add_bos=False, special=True)[:100]
model.eval(ids)
numpy.save(sys.argv[2], model.scores[: len(ids)])
print(json.dumps(ids))
"""

_LLAMA_IDS = """
import json, sys
import llama_cpp
model = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)
texts = json.load(sys.stdin)
print(json.dumps([model.tokenize(text.encode(), add_bos=False, special=True) for text in texts]))
"""
_SCRIPTS = [
    "Héllo wörld, Ångström, việt",
    "नमस्ते दुनिया, কেমন আছ, สวัสดี, مَرْحَبًا, שָׁלוֹם",
    "👩\u200d👩\u200d👧 🇩🇪 ☎\ufe0f 𝔘𝔫𝔦 你好 한국어 がぎ",
    "<|im_start|>user\n\t\tI'M we'Ve ² ½ \u00a0\u3000x  \r\n\n y<|im_end|>",
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="needs QWEN_EDGE_LLAMA_PYTHON, with llama-cpp-python"),
]


@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe", "qwen3-next"])
@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q4_0, Kind.Q8_0])
def test_logits_are_llamas(name: str, kind: Kind, tmp_path: Path) -> None:
    """It is given quantised weights as the floats that they stand for: else it rounds activations, too."""

    def floats(tensor: str, value: np.ndarray) -> tuple[np.ndarray, Kind] | None:
        rounded = value.ndim > 1 and value.shape[-1] % 32 == 0 and "ffn_gate_inp" not in tensor
        return (dequantize(quantize(value, kind), kind), Kind.F32) if rounded else None

    folder = CHECKPOINTS / name
    if name == "qwen3-next":
        shape: dict[str, Any] = {"model_type": "qwen3_next", "num_experts": 8, "vocab_size": 2048}
        folder = write_random_checkpoint(tmp_path / name, **shape)
    file = write_gguf(folder, tmp_path / "model.gguf", kind)
    same = write_gguf(folder, tmp_path / "floats.gguf", change=floats)
    text = (CHECKPOINTS / "eval.txt").read_text()[:1000]
    ids = _printed(_LLAMA, text, same, tmp_path / "logits.npy")
    checkpoint = open_checkpoint(str(file))
    assert Tokenizer.open(checkpoint.root).encode(text)[: len(ids)] == ids
    weights = reference.Weights(checkpoint.tensors)
    *_, hidden = reference.forward(checkpoint.config, weights, np.array([ids]))
    logits = reference.logits(checkpoint.config, weights, hidden)[0]
    assert cosine(logits, np.load(tmp_path / "logits.npy")).min() > 0.9999


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_ids_are_llamas_of_the_composed_text(form: str, tmp_path: Path) -> None:
    """Qwen's tokenizer.json composes characters (NFC); llama.cpp takes them as they come."""
    file = write_gguf(CHECKPOINTS / "tiny-dense", tmp_path / "model.gguf")
    tokenizer = Tokenizer.open(open_checkpoint(str(file)).root)
    texts = [normalize(form, text) for text in _SCRIPTS]
    composed = [normalize("NFC", text) for text in texts]
    assert [tokenizer.encode(text) for text in texts] == _printed(_LLAMA_IDS, json.dumps(composed), file)
    if form == "NFD":
        assert [tokenizer.encode(text) for text in texts] != _printed(_LLAMA_IDS, json.dumps(texts), file)


def _printed(program: str, given: str, *arguments: Path) -> Any:
    """The JSON in the last line that the program prints, in llama.cpp's environment."""
    found = subprocess.run(
        [PYTHON, "-c", program, *arguments],
        input=given.encode(),
        capture_output=True,
        check=True,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )
    return json.loads(found.stdout.splitlines()[-1])
