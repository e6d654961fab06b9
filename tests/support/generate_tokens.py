"""Greedy tokens of an artifact, as JSON; run by the tests in environments that have only the runtime.

python generate_tokens.py ARTIFACT COUNT [VISION_INPUTS.npz] < prompt_ids.json
"""

import json
import sys

import numpy as np
import onnxruntime
import onnxruntime_genai as og

config = og.Config(sys.argv[1])
config.clear_providers()
model = og.Model(config)
parameters = og.GeneratorParams(model)
prompt = json.load(sys.stdin)
count = int(sys.argv[2])
parameters.set_search_options(do_sample=False, min_length=len(prompt) + count, max_length=len(prompt) + count)
generator = og.Generator(model, parameters)
if len(sys.argv) > 3:
    tensors = og.NamedTensors()
    for name, value in np.load(sys.argv[3]).items():
        tensors[name] = value
    generator.set_inputs(tensors)
else:
    generator.append_tokens(np.asarray(prompt, np.int32))
tokens = []
for _ in range(count):
    generator.generate_next_token()
    tokens.append(int(generator.get_next_tokens()[0]))
print(json.dumps({"onnxruntime": onnxruntime.__version__, "tokens": tokens}))
