"""Greedy tokens of an artifact in another interpreter, which needs nothing but the runtime.

python generate_tokens.py ARTIFACT COUNT [VISION_INPUTS.npz] < prompt_ids.json
Prints {"onnxruntime": version, "tokens": tokens} as its last line.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def greedy(python: str, artifact: Path, prompt: list[int], count: int = 64, *inputs: Path) -> dict:
    """What this file prints when the interpreter `python` runs it."""
    result = subprocess.run(
        [python, __file__, artifact, str(count), *inputs],
        input=json.dumps(prompt),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    import numpy as np
    import onnxruntime
    import onnxruntime_genai as og

    config = og.Config(sys.argv[1])
    config.clear_providers()
    model = og.Model(config)
    parameters = og.GeneratorParams(model)
    prompt = json.load(sys.stdin)
    length = len(prompt) + int(sys.argv[2])
    parameters.set_search_options(do_sample=False, min_length=length, max_length=length)
    generator = og.Generator(model, parameters)
    if len(sys.argv) > 3:
        tensors = og.NamedTensors()
        for name, value in np.load(sys.argv[3]).items():
            tensors[name] = value
        generator.set_inputs(tensors)
    else:
        generator.append_tokens(np.asarray(prompt, np.int32))
    tokens = []
    for _ in range(length - len(prompt)):
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    print(json.dumps({"onnxruntime": onnxruntime.__version__, "tokens": tokens}))


if __name__ == "__main__":
    main()
