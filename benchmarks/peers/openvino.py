"""An OpenVINO artifact through our backend: python -m benchmarks.peers.openvino ARTIFACT [--prompt 512]

`--plain` takes plain OpenVINO, which answers that want logits have, in place of the paged pipeline.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from qwen_runtime.artifact import Artifact
from qwen_runtime.backends.load import load as load_backend

from benchmarks.peers.turns import Measure, take_turns


def load(artifact: str, prompt: int, tokens: int, plain: bool) -> tuple[Measure, dict[str, Any]]:
    opened = Artifact.open(Path(artifact))
    backend = load_backend(opened, "auto", keep=0)
    open_generator = backend.logits_generator if plain else backend.generator
    ids = np.random.default_rng(0).integers(0, 100_000, prompt).astype(np.int32)

    def measure() -> dict[str, float]:
        options = {"do_sample": False, "ignore_eos": True}
        generator = open_generator(options, None, prompt + tokens + 2)
        times = [time.perf_counter()]
        generator.append_tokens(ids)
        while len(times) < tokens + 2:
            generator.generate_next_token()
            if len(generator.get_next_tokens()):
                times.append(time.perf_counter())
            elif generator.is_done():
                raise SystemExit("the answer ended by itself: choose another --tokens")
        return {"prefill": prompt / (times[1] - times[0]), "decode": tokens / (times[-1] - times[1])}

    return measure, {"version": f"openvino {opened.manifest['openvino']}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--plain", action="store_true")
    asked = parser.parse_args()
    take_turns(lambda: load(asked.artifact, asked.prompt, asked.tokens, asked.plain))


if __name__ == "__main__":
    main()
