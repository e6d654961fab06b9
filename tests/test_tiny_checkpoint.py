"""The checkpoint that the tests stand on: really trained, small, in the published layout."""

from __future__ import annotations

import json
import math
import re
from pydoc_data.topics import topics

import numpy as np
import torch
from checkpoints.corpus import HELD_OUT
from random_checkpoints import TINY, load_tensors
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_size_and_layout() -> None:
    assert (TINY / "model.safetensors").stat().st_size <= 8_000_000
    config = json.loads((TINY / "config.json").read_text())
    assert config["architectures"] == ["Qwen3_5ForCausalLM"]
    assert config["layer_types"] == [*["linear_attention"] * 3, "full_attention"] * 2
    assert (
        config["tie_word_embeddings"]
        and config["linear_num_value_heads"] == 2 * config["linear_num_key_heads"]
    )
    with safe_open(TINY / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - not a mapping
    dtypes = {name: tensor.dtype for name, tensor in load_tensors(TINY).items()}
    assert {dtype for name, dtype in dtypes.items() if name.endswith("A_log")} == {torch.float32}
    assert dtypes["model.embed_tokens.weight"] == torch.bfloat16


def test_every_weight_was_trained() -> None:
    """No norm, gate or convolution is still what it was initialised to."""
    for name, tensor in load_tensors(TINY).items():
        assert tensor.float().std() > 1e-3, name


def test_held_out_text_is_in_no_other_topic() -> None:
    """Some topics of the reference contain others word for word."""
    trained = "\n\n".join(text for name, text in topics.items() if name not in HELD_OUT)
    paragraphs = (TINY.parent / "eval.txt").read_text(encoding="utf-8").split("\n\n")
    assert [part for part in paragraphs if part.strip() in trained] == []


def test_it_learned_the_text() -> None:
    """Perplexity on held-out text; token frequencies alone give 620, an untrained model 2100."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    text = (TINY.parent / "eval.txt").read_text(encoding="utf-8")
    ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"][: 256 * 16]).reshape(16, 256)
    batch = torch.from_numpy(ids)
    with torch.no_grad():
        loss = model(input_ids=batch, labels=batch).loss.item()
    assert math.exp(loss) < 80


def test_it_answers_in_english() -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Explain numbers."}],
        add_generation_prompt=True,
        enable_thinking=False,
        return_tensors="pt",
    )["input_ids"]
    with torch.no_grad():
        answer = model.generate(prompt, max_new_tokens=60, do_sample=False)[0, prompt.shape[1] :]
    known = set(re.findall(r"[a-z]+", " ".join(topics.values()).lower()))
    words = re.findall(r"[a-z]+", tokenizer.decode(answer, skip_special_tokens=True).lower())
    assert len(words) > 20
    assert sum(word in known for word in words) > 0.9 * len(words)
