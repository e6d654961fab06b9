"""An ONNX artifact through ONNX Runtime GenAI: python -m benchmarks.peers.genai ARTIFACT [--prompt 512]

The provider is the artifact's own; `--plugin` names it where it is a plug-in.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
from qwen_common.providers import PROVIDERS
from qwen_runtime.plugins import register
from qwen_runtime.resident import release_freed, release_mapped, use_huge_pages

from benchmarks.peers.turns import Measure, take_turns


def load(artifact: str, prompt: int, tokens: int, plugin: str | None) -> tuple[Measure, dict[str, Any]]:
    if plugin:
        register(PROVIDERS[plugin], og)
    model = og.Model(artifact)
    release_mapped(Path(artifact))  # as the runtime does
    release_freed()
    use_huge_pages()
    ids = np.random.default_rng(0).integers(0, 100_000, prompt).astype(np.int32)

    def measure() -> dict[str, float]:
        params = og.GeneratorParams(model)
        # An end token is as likely as any other with random weights.
        params.set_search_options(do_sample=False, max_length=prompt + tokens + 2, min_length=prompt + tokens)
        generator = og.Generator(model, params)
        started = time.perf_counter()
        generator.append_tokens(ids)
        read = time.perf_counter()
        generator.generate_next_token()  # chosen from the prompt's logits: no run of the model
        begun = time.perf_counter()
        for _ in range(tokens):
            generator.generate_next_token()
            generator.get_next_tokens()
        ended = time.perf_counter()
        return {"prefill": prompt / (read - started), "decode": tokens / (ended - begun)}

    return measure, {"version": f"onnxruntime-genai {og.__version__}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--plugin", choices=[key for key, provider in PROVIDERS.items() if provider.plugin])
    asked = parser.parse_args()
    take_turns(lambda: load(asked.artifact, asked.prompt, asked.tokens, asked.plugin))


if __name__ == "__main__":
    main()
