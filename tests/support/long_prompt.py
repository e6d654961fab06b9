"""A long prompt through ONNX Runtime GenAI, in a process of its own so that its peak memory is its own.

python long_prompt.py ARTIFACT PROMPT.npy STEPS LOGITS.npy
Writes the logits after the prompt and after each greedy step, and prints what it took as JSON.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime_genai as og


def peak() -> int:
    """VmHWM in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


config = og.Config(sys.argv[1])
config.clear_providers()
model = og.Model(config)
prompt, steps = np.load(sys.argv[2]), int(sys.argv[3])
loaded = peak()
parameters = og.GeneratorParams(model)
parameters.set_search_options(do_sample=False, max_length=len(prompt) + steps)
generator = og.Generator(model, parameters)
start = time.perf_counter()
generator.append_tokens(prompt.astype(np.int32))
logits = [np.array(generator.get_logits()).reshape(-1)]
seconds = time.perf_counter() - start
for _ in range(steps - 1):
    generator.generate_next_token()
    logits.append(np.array(generator.get_logits()).reshape(-1))
np.save(sys.argv[4], np.stack(logits))
print(json.dumps({"loaded": loaded, "peak": peak(), "prompt_seconds": seconds}))
