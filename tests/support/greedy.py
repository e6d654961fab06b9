"""Greedy answers of the runtime beside those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from qwen_runtime import Model, Sampling
from transformers import AutoTokenizer


def check_greedy_answers(model: Model, checkpoint: Path, reference: Any) -> None:
    """`model` answers three questions with the tokens of `reference`, transformers' model of `checkpoint`."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for question in ("What is assert?", "Explain numbers.", "Tell me about yield."):
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=False, return_tensors="pt"
        )["input_ids"]
        with torch.no_grad():
            expected = reference.generate(prompt, max_new_tokens=64, do_sample=False)[0, prompt.shape[1] :]
        generation = model.generate(messages, max_tokens=64, sampling=Sampling(temperature=0))
        text = "".join(generation)
        ends = set(reference.generation_config.eos_token_id)
        assert generation.tokens == [token for token in expected.tolist() if token not in ends]
        assert text == generation.text == tokenizer.decode(generation.tokens)
