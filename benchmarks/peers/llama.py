"""A GGUF file through llama.cpp: python -m benchmarks.peers.llama FILE [--prompt 512]

By llama-cpp-python's plain bindings, and the likeliest token by numpy: no sampler, no text. It has
an environment of its own (see benchmarks/decode.py), where nothing of ours is installed.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.peers.turns import Measure, take_turns


def load(file: str, prompt: int, tokens: int) -> tuple[Measure, dict[str, Any]]:
    llama_cpp.llama_log_set(_silent, None)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot read {file}")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = prompt + tokens + 2
    params.n_batch = prompt
    params.n_ubatch = min(prompt, params.n_ubatch)  # its default, which it takes long prompts by
    params.n_threads = params.n_threads_batch = os.cpu_count() or 1
    context = llama_cpp.llama_init_from_model(model, params)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    ids = np.random.default_rng(0).integers(0, 100_000, prompt).tolist()

    def run(ids: list[int]) -> int:
        """The likeliest token after `ids`."""
        held = (llama_cpp.llama_token * len(ids))(*ids)  # the batch is but a pointer to it
        batch = llama_cpp.llama_batch_get_one(held, len(ids))
        if llama_cpp.llama_decode(context, batch):
            raise SystemExit("llama_decode failed")
        return int(np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (vocabulary,)).argmax())

    def measure() -> dict[str, float]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        started = time.perf_counter()
        token = run(ids)
        begun = time.perf_counter()
        for _ in range(tokens):
            token = run([token])
        ended = time.perf_counter()
        return {"prefill": prompt / (begun - started), "decode": tokens / (ended - begun)}

    instructions = llama_cpp.llama_print_system_info().decode().strip()
    return measure, {"version": f"llama-cpp-python {llama_cpp.__version__}", "instructions": instructions}


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, user_data: Any) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    asked = parser.parse_args()
    take_turns(lambda: load(asked.file, asked.prompt, asked.tokens))


if __name__ == "__main__":
    main()
