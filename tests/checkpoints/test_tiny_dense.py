"""The checkpoint that the tests stand on: really trained, small, in the published layout."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.support.checkpoints import TINY, TINY_MOE, TINY_MOE_128, TINY_VL
from tests.checkpoints.corpus import HELD_OUT
from tests.support.random_checkpoints import load_tensors

CLASSES = {
    TINY: "Qwen3_5ForCausalLM",
    TINY_MOE: "Qwen3_5MoeForCausalLM",
    TINY_MOE_128: "Qwen3_5MoeForCausalLM",
    TINY_VL: "Qwen3_5ForConditionalGeneration",
}
every = pytest.mark.parametrize("folder", CLASSES, ids=lambda folder: folder.name)


@every
def test_size_and_layout(folder: Path) -> None:
    most = 30_000_000 if folder == TINY_MOE_128 else 8_000_000
    assert (folder / "model.safetensors").stat().st_size <= most
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [CLASSES[folder]]
    text = config.get("text_config", config)
    group = [*["linear_attention"] * (1 if folder == TINY_MOE_128 else 3), "full_attention"]
    assert text["layer_types"] == group * (text["num_hidden_layers"] // len(group))
    assert config["tie_word_embeddings"]
    assert text["linear_num_value_heads"] == 2 * text["linear_num_key_heads"]
    dtypes = {name: tensor.dtype for name, tensor in load_tensors(folder).items()}
    assert "lm_head.weight" not in dtypes
    assert {dtype for name, dtype in dtypes.items() if name.endswith("A_log")} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "embed_tokens" in name} == {torch.bfloat16}


@every
def test_every_weight_was_trained(folder: Path) -> None:
    """No norm, gate or convolution is still what it was initialised to."""
    for name, tensor in load_tensors(folder).items():
        assert tensor.float().std() > 1e-3, name


@every
def test_tokenizers_are_one(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (TINY / name).read_bytes()


def test_held_out_text_is_in_no_other_topic() -> None:
    """Some topics of the reference contain others word for word."""
    trained = "\n\n".join(text for name, text in topics.items() if name not in HELD_OUT)
    paragraphs = (TINY.parent / "eval.txt").read_text(encoding="utf-8").split("\n\n")
    assert [part for part in paragraphs if part.strip() in trained] == []


@pytest.mark.parametrize("folder", [TINY, TINY_MOE, TINY_MOE_128], ids=lambda folder: folder.name)
def test_it_learned_the_text(folder: Path) -> None:
    """Perplexity on held-out text; token frequencies alone give 620, an untrained model 2100."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (TINY.parent / "eval.txt").read_text(encoding="utf-8")
    ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"][: 256 * 16]).reshape(16, 256)
    batch = torch.from_numpy(ids)
    with torch.no_grad():
        loss = model(input_ids=batch, labels=batch).loss.item()
    assert math.exp(loss) < 80


@pytest.mark.parametrize("folder", [TINY, TINY_MOE], ids=lambda folder: folder.name)
def test_it_answers_in_english(folder: Path) -> None:
    words = re.findall(r"[a-z]+", answer(folder, "Explain numbers.").lower())
    known = set(re.findall(r"[a-z]+", " ".join(topics.values()).lower()))
    assert len(words) > 20
    assert sum(word in known for word in words) > 0.9 * len(words)


def test_experts_answer_the_question() -> None:
    """It saw more chats than the dense one."""
    assert answer(TINY_MOE, "What is yield?").startswith('A "yield" statement is semantically')
    assert answer(TINY_MOE, "Tell me about assert.").startswith("Assert statements are a convenient way")


def answer(folder: Path, question: str) -> str:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        enable_thinking=False,
        return_tensors="pt",
    )["input_ids"]
    with torch.no_grad():
        found = model.generate(prompt, max_new_tokens=60, do_sample=False)[0, prompt.shape[1] :]
    return str(tokenizer.decode(found, skip_special_tokens=True))


@pytest.mark.parametrize(("folder", "least"), [(TINY_MOE, 1), (TINY_MOE_128, 0.9)], ids=["8", "128"])
def test_experts_are_used(folder: Path, least: float) -> None:
    """On 1024 tokens of held-out text, of the experts of each layer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    counts: list[torch.Tensor] = []

    def count(_gate, _inputs, outputs) -> None:
        counts.append(torch.bincount(outputs[2].flatten(), minlength=model.config.num_experts))

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(count)
    text = (TINY.parent / "eval.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"][:1024]
    with torch.no_grad():
        model(torch.tensor(ids).reshape(4, 256))
    assert min((layer > 0).float().mean() for layer in counts) >= least
    if least == 1:  # and each expert in some layer
        assert torch.stack(counts).float().mean(0).min() > 0.02 * 2 * 1024
