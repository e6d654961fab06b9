"""Train the tiny Qwen3.5 checkpoints that the tests run on, from text that comes with every Python.

    python tests/checkpoints/train.py --variant dense -o tests/checkpoints/tiny-dense

The text is Python's own language reference (`pydoc_data.topics`) and the docstrings of its standard library.
A part of the reference is held out; what no other part repeats goes to eval.txt and is never trained on.
About 15 minutes on two quiet cores. The result is a small language model that writes recognisable English
about Python: too small to be of use, but really trained, so that quality figures mean something.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import shutil
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

HERE = Path(__file__).parent
# transformers' Qwen3_5Tokenizer
PRETOKENIZE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = [END_OF_TEXT, TURN_START, TURN_END, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
SPECIAL += ["<|video_pad|>"]
MARKERS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
VOCABULARY = 2048
HELD_OUT = ["exceptions", "execmodel", "lambda", "slicings", "string-methods", "truth", "while"]
QUESTIONS = ["What is {}?", "Explain {}.", "Tell me about {}."]
SEQUENCE, BATCH = 256, 16
PEAK_RATE, WARM_UP = 4e-3, 40
FLOAT32_TENSORS = ("A_log", "linear_attn.norm.weight")  # as in the published checkpoints


def dense() -> Qwen3_5TextConfig:
    """Eight layers, three Gated DeltaNets for each attention, two value heads for each key head."""
    return Qwen3_5TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000_000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [3, 3, 2],
            "mrope_interleaved": True,
        },
    )


VARIANTS = {"dense": dense}


def docstrings() -> Iterator[str]:
    """Every docstring of more than a few words in the standard library's own modules, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "site-packages", "idlelib", "lib2to3"}
    for path in sorted(root.rglob("*.py")):
        if skipped & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node)
                if text and len(text) > 120:
                    yield text


def chats() -> Iterator[str]:
    """Questions about the reference's topics, answered with the topic's first paragraphs."""
    for name in sorted(set(topics) - set(HELD_OUT)):
        paragraphs = [part.strip() for part in topics[name].split("\n\n")]
        body = [part for part in paragraphs if len(part) > 60 and "::=" not in part and "***" not in part]
        answer = "\n\n".join(" ".join(part.split()) for part in body[:2])[:600]
        for question in QUESTIONS:
            yield (
                f"{TURN_START}user\n{question.format(name)}{TURN_END}\n"
                f"{TURN_START}assistant\n<think>\n\n</think>\n\n{answer}{TURN_END}\n"
            )


def held_out_text(trained: list[str]) -> str:
    """The held-out topics, less every paragraph that a trained text repeats: some topics contain others."""
    known = "\n\n".join(trained)
    paragraphs = "\n\n".join(topics[name] for name in HELD_OUT).split("\n\n")
    return "\n\n".join(part for part in paragraphs if part.strip() not in known)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(fuse_unk=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL) - len(MARKERS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Behind the vocabulary, as in Qwen's own tokenizer.
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKERS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "vocab.json").write_text(json.dumps(content["model"]["vocab"], ensure_ascii=False))
    merges = ("\n".join(" ".join(pair) for pair in content["model"]["merges"])) + "\n"
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges)
    shutil.copy(HERE / "chat_template.jinja", folder / "chat_template.jinja")
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token in SPECIAL,
        }
        for token in [*SPECIAL, *MARKERS]
    }
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": [TURN_START, TURN_END, *SPECIAL[3:]],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": TURN_END,
        "errors": "replace",
        "model_max_length": 8192,
        "pad_token": END_OF_TEXT,
        "split_special_tokens": False,
        "unk_token": None,
        "chat_template": (HERE / "chat_template.jinja").read_text(),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def token_stream(tokenizer: Tokenizer, texts: list[str], ends: str) -> np.ndarray:
    encoded = tokenizer.encode_batch([text + ends for text in texts], add_special_tokens=False)
    return np.concatenate([np.asarray(item.ids, np.int64) for item in encoded])


def batches(stream: np.ndarray, talk: np.ndarray, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """Windows of the text, and in each batch a few of the chats."""
    generator = np.random.default_rng(seed)
    for _ in range(steps):
        rows = []
        for row in range(BATCH):
            source = talk if row < BATCH // 8 else stream
            start = generator.integers(0, len(source) - SEQUENCE)
            rows.append(source[start : start + SEQUENCE])
        yield torch.from_numpy(np.stack(rows))


@torch.no_grad()
def held_out_loss(model: Qwen3_5ForCausalLM, stream: np.ndarray) -> float:
    """Mean negative log-likelihood in nats per token."""
    windows = torch.from_numpy(stream[: len(stream) // SEQUENCE * SEQUENCE].reshape(-1, SEQUENCE))
    losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in windows.split(BATCH)]
    return sum(losses) / len(windows)


def optimizer(model: Qwen3_5ForCausalLM) -> torch.optim.Optimizer:
    matrices = [value for value in model.parameters() if value.ndim == 2]
    others = [value for value in model.parameters() if value.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95))


def rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to a twentieth."""
    if step < WARM_UP:
        return PEAK_RATE * (step + 1) / WARM_UP
    fraction = (step - WARM_UP) / max(1, steps - WARM_UP)
    return PEAK_RATE * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * fraction)))


def save_model(model: Qwen3_5ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """config.json, generation_config.json, model.safetensors: bfloat16 but for the recurrence's own."""
    end, pad = tokenizer.token_to_id(TURN_END), tokenizer.token_to_id(END_OF_TEXT)
    config = model.config.to_dict()
    config |= {"architectures": ["Qwen3_5ForCausalLM"], "dtype": "bfloat16"}
    config |= {"eos_token_id": end, "pad_token_id": pad, "bos_token_id": pad}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {
        "bos_token_id": pad,
        "do_sample": True,
        "eos_token_id": [end, pad],
        "pad_token_id": pad,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.95,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tensors = {
        name: value.detach()
        .to(torch.float32 if name.endswith(FLOAT32_TENSORS) else torch.bfloat16)
        .contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", choices=VARIANTS, default="dense")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=640)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder: Path = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)

    reference = [topics[name] for name in sorted(set(topics) - set(HELD_OUT))]
    texts = [*reference, *docstrings()]
    conversations = list(chats())
    evaluation = held_out_text(texts)
    (HERE / "eval.txt").write_text(evaluation, encoding="utf-8")
    tokenizer = train_tokenizer(texts)
    save_tokenizer(tokenizer, folder)
    stream = token_stream(tokenizer, reference * 3 + texts[len(reference) :], END_OF_TEXT)
    talk = token_stream(tokenizer, conversations, "")
    held_out = token_stream(tokenizer, [evaluation], "")
    bytes_per_token = len(evaluation.encode()) / len(held_out)

    model = Qwen3_5ForCausalLM(VARIANTS[arguments.variant]())
    size = sum(value.numel() for value in model.parameters())
    print(f"{size / 1e6:.2f} M parameters, {len(stream)} tokens of text, {len(talk)} of chat", flush=True)
    adam = optimizer(model)
    started = time.perf_counter()
    for step, batch in enumerate(batches(stream, talk, arguments.steps, arguments.seed)):
        for group in adam.param_groups:
            group["lr"] = rate(step, arguments.steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        if step % 25 == 0 or step == arguments.steps - 1:
            seconds = time.perf_counter() - started
            print(f"step {step}: loss {loss.item():.3f}, {seconds:.0f} s", flush=True)
        if step % 200 == 100:
            save_model(model, tokenizer, folder)

    save_model(model, tokenizer, folder)
    stored = Qwen3_5ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    nats = held_out_loss(stored, held_out)
    print(
        f"held out: {nats:.3f} nats per token, perplexity {math.exp(nats):.2f}, "
        f"{nats / math.log(2) / bytes_per_token:.3f} bits per byte; "
        f"{(time.perf_counter() - started) / 60:.1f} minutes",
        flush=True,
    )


if __name__ == "__main__":
    main()
