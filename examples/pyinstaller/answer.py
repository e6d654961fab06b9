"""Answers one question from an artifact:  answer FOLDER "QUESTION"."""

import sys

from qwen_runtime import Model, Sampling

with Model.load(sys.argv[1]) as model:
    messages = [{"role": "user", "content": sys.argv[2]}]
    for piece in model.generate(messages, max_tokens=200, sampling=Sampling(temperature=0)):
        print(piece, end="", flush=True)
print()
