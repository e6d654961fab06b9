"""The text that the tiny checkpoints learn, and the tokenizer made from it.

Python's own language reference (`pydoc_data.topics`) and the docstrings of its standard library. A part of
the reference is held out; what no other part repeats is in eval.txt and never trained on.
"""

from __future__ import annotations

import ast
import json
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

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
