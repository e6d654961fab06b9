"""Train the tiny Qwen3.5 checkpoints that the tests run on, from text that comes with every Python.

    python tests/checkpoints/train.py --variant dense -o tests/checkpoints/tiny-dense
    python tests/checkpoints/train.py --variant moe -o tests/checkpoints/tiny-moe
    python tests/checkpoints/train.py --variant moe128 -o tests/checkpoints/tiny-moe-128
    python tests/checkpoints/train.py --variant vl -o tests/checkpoints/tiny-vl

The text is in corpus.py, the pictures of the vision-language variant in drawings.py. The results write
recognisable English about Python and tell a drawn digit: too small to be of use, but really trained, so that
quality figures mean something.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import experts
import numpy as np
import torch
from corpus import (
    END_OF_TEXT,
    HELD_OUT,
    TURN_END,
    TURN_START,
    VOCABULARY,
    chats,
    docstrings,
    held_out_text,
    save_tokenizer,
    token_stream,
    train_tokenizer,
)
from drawings import drawing
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import (
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

HERE = Path(__file__).parent
SEQUENCE, BATCH = 256, 16
PICTURES = 24  # rows of a batch
WARM_UP = 40
FIRST_HELD_OUT_DRAWING = 1_000_000_000
FLOAT32_TENSORS = ("A_log", "linear_attn.norm.weight")  # as in the published checkpoints

# Three Gated DeltaNets for each attention, two value heads for each key head.
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000_000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    },
}
VISION: dict[str, Any] = {
    "depth": 4,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_heads": 4,
    "out_hidden_size": 192,
    "num_position_embeddings": 64,
}
# The published one's, but for pictures of a few tokens.
PREPROCESSOR: dict[str, Any] = {
    "size": {"shortest_edge": 64 * 64, "longest_edge": 256 * 256},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def dense(tokenizer: Tokenizer) -> PreTrainedModel:
    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**TEXT, intermediate_size=384, num_hidden_layers=8))


def moe(tokenizer: Tokenizer) -> PreTrainedModel:
    config = Qwen3_5MoeTextConfig(
        **TEXT,
        num_hidden_layers=4,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=96,
        shared_expert_intermediate_size=96,
        output_router_logits=True,  # adds the loss that spreads tokens over the experts
        router_aux_loss_coef=0.01,
    )
    return Qwen3_5MoeForCausalLM(config)


def moe128(tokenizer: Tokenizer) -> PreTrainedModel:
    """Many experts, as the published ones have, in rows that are one block of 128."""
    config = Qwen3_5MoeTextConfig(
        **TEXT | {"hidden_size": 128},
        layer_types=["linear_attention", "full_attention"],
        num_hidden_layers=2,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
    )
    model = Qwen3_5MoeForCausalLM(config)
    model.set_experts_implementation(experts.NAME)  # four times as fast
    return model


def vision_language(tokenizer: Tokenizer) -> PreTrainedModel:
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    config = Qwen3_5Config(
        text_config={**TEXT, "intermediate_size": 384, "num_hidden_layers": 4},
        vision_config=VISION,
        tie_word_embeddings=True,
        **{name: tokenizer.token_to_id(token) for name, token in names.items()},
    )
    return Qwen3_5ForConditionalGeneration(config)


@dataclass(frozen=True)
class Variant:
    """One checkpoint: its model, and how it is trained.

    Attributes:
        chat_rows: rows of a batch that are chats.
        sight: steps that the vision tower learns alone before it is joined to the rest; 0: there is none.
    """

    build: Callable[[Tokenizer], PreTrainedModel]
    steps: int
    peak_rate: float
    chat_rows: int
    text_rows: int = BATCH
    sight: int = 0


VARIANTS = {
    "dense": Variant(dense, steps=640, peak_rate=4e-3, chat_rows=2),
    "moe": Variant(moe, steps=800, peak_rate=4e-3, chat_rows=6),
    "moe128": Variant(moe128, steps=800, peak_rate=3e-3, chat_rows=2, text_rows=8),
    "vl": Variant(vision_language, steps=1000, peak_rate=2e-3, chat_rows=1, text_rows=3, sight=2000),
}


def batches(stream: np.ndarray, talk: np.ndarray, variant: Variant, seed: int) -> Iterator[torch.Tensor]:
    """Windows of the text, and in each batch a few of the chats."""
    generator = np.random.default_rng(seed)
    while True:
        rows = []
        for row in range(variant.text_rows):
            source = talk if row < variant.chat_rows else stream
            start = generator.integers(0, len(source) - SEQUENCE)
            rows.append(source[start : start + SEQUENCE])
        yield torch.from_numpy(np.stack(rows))


def picture_batch(tokenizer: Tokenizer, seeds: range) -> dict[str, torch.Tensor]:
    """Drawings with their questions and answers, padded; only the answers count."""
    processor = Qwen2VLImageProcessorPil(**PREPROCESSOR)
    drawings = [drawing(seed) for seed in seeds]
    seen = processor([item.image for item in drawings], return_tensors="pt")
    pad = tokenizer.token_to_id(END_OF_TEXT)
    ids = torch.full((len(drawings), SEQUENCE), pad)
    labels = torch.full_like(ids, -100)
    longest = 0
    for row, (item, grid) in enumerate(zip(drawings, seen["image_grid_thw"], strict=True)):
        tokens = int(grid.prod()) // PREPROCESSOR["merge_size"] ** 2
        picture = f"<|vision_start|>{'<|image_pad|>' * tokens}<|vision_end|>"
        question = (
            f"{TURN_START}user\n{picture}{item.question}{TURN_END}\n"
            f"{TURN_START}assistant\n<think>\n\n</think>\n\n"
        )
        asked = tokenizer.encode(question, add_special_tokens=False).ids
        answered = tokenizer.encode(f"{item.answer}{TURN_END}", add_special_tokens=False).ids
        end = len(asked) + len(answered)
        ids[row, :end] = torch.tensor(asked + answered)
        labels[row, len(asked) : end] = torch.tensor(answered)
        longest = max(longest, end)
    ids, labels = ids[:, :longest], labels[:, :longest]
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": (ids != pad).long(),
        "mm_token_type_ids": (ids == tokenizer.token_to_id("<|image_pad|>")).int(),
        **seen,
    }


def learn_to_see(tower: torch.nn.Module, steps: int) -> None:
    """Train the vision tower with a classifier of the answers, which is thrown away.

    Through a language model that knows nothing yet, it would learn next to nothing in as many steps.
    """
    processor = Qwen2VLImageProcessorPil(**PREPROCESSOR)
    answers = sorted({drawing(seed).answer for seed in range(400)})
    # One question's answers stand together, and only they compete.
    other = torch.tensor([[a.split()[0] != b.split()[0] for b in answers] for a in answers])
    classifier = torch.nn.Linear(tower.config.out_hidden_size, len(answers))
    adam = torch.optim.AdamW(
        [*tower.parameters(), *classifier.parameters()], lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01
    )
    right = 0.0
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / WARM_UP) * (1 - 0.95 * step / steps)
        drawings = [drawing(seed) for seed in range(step * PICTURES, (step + 1) * PICTURES)]
        seen = processor([item.image for item in drawings], return_tensors="pt")
        expected = torch.tensor([answers.index(item.answer) for item in drawings])
        features = tower(seen["pixel_values"], seen["image_grid_thw"]).pooler_output
        counts = (seen["image_grid_thw"].prod(-1) // PREPROCESSOR["merge_size"] ** 2).tolist()
        means = torch.stack([part.mean(0) for part in features.split(counts)])
        logits = classifier(means).masked_fill(other[expected], -1e9)
        loss = torch.nn.functional.cross_entropy(logits, expected)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        right += 0.02 * ((logits.argmax(-1) == expected).float().mean().item() - right)
        if step % 100 == 0 or step == steps - 1:
            print(f"sight, step {step}: loss {loss.item():.3f}, {right:.1%} right", flush=True)


@torch.no_grad()
def right_answers(model: PreTrainedModel, tokenizer: Tokenizer, count: int) -> float:
    """Share of held-out drawings whose whole answer has the largest logit at every token."""
    batch = picture_batch(tokenizer, range(FIRST_HELD_OUT_DRAWING, FIRST_HELD_OUT_DRAWING + count))
    labels = batch.pop("labels")[:, 1:]
    found = model(**batch).logits[:, :-1].argmax(-1)
    return ((found == labels) | (labels == -100)).all(-1).float().mean().item()


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, stream: np.ndarray) -> float:
    """Mean negative log-likelihood in nats per token."""
    windows = torch.from_numpy(stream[: len(stream) // SEQUENCE * SEQUENCE].reshape(-1, SEQUENCE))
    losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in windows.split(BATCH)]
    return sum(losses) / len(windows)


def optimizer(model: PreTrainedModel) -> torch.optim.Optimizer:
    matrices = [value for value in model.parameters() if value.ndim == 2]
    others = [value for value in model.parameters() if value.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def rate(variant: Variant, step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to a twentieth."""
    if step < WARM_UP:
        return variant.peak_rate * (step + 1) / WARM_UP
    fraction = (step - WARM_UP) / max(1, steps - WARM_UP)
    return variant.peak_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * fraction)))


def save_model(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> None:
    """config.json, generation_config.json, model.safetensors: bfloat16 but for the recurrence's own."""
    end, pad = tokenizer.token_to_id(TURN_END), tokenizer.token_to_id(END_OF_TEXT)
    config = model.config.to_dict()
    config |= {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    config.pop("output_router_logits", None)
    config.get("text_config", config).update(eos_token_id=end, pad_token_id=pad, bos_token_id=pad)
    if "vision_config" in config:
        content = PREPROCESSOR | {
            "processor_class": "Qwen3VLProcessor",
            "image_processor_type": "Qwen2VLImageProcessorFast",
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(content, indent=2) + "\n")
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
    parser.add_argument("--steps", type=int, help="default: the variant's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="default: PyTorch's own")
    parser.add_argument("--write-eval", action="store_true", help="write the held-out text to eval.txt")
    arguments = parser.parse_args()
    variant = VARIANTS[arguments.variant]
    steps = arguments.steps or variant.steps
    folder: Path = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    reference = [topics[name] for name in sorted(set(topics) - set(HELD_OUT))]
    texts = [*reference, *docstrings()]
    conversations = list(chats())
    evaluation = held_out_text(texts)
    if arguments.write_eval:
        (HERE / "eval.txt").write_text(evaluation, encoding="utf-8")
    tokenizer = train_tokenizer(texts)
    save_tokenizer(tokenizer, folder)
    stream = token_stream(tokenizer, reference * 3 + texts[len(reference) :], END_OF_TEXT)
    talk = token_stream(tokenizer, conversations, "")
    held_out = token_stream(tokenizer, [evaluation], "")
    bytes_per_token = len(evaluation.encode()) / len(held_out)

    model = variant.build(tokenizer)
    size = sum(value.numel() for value in model.parameters())
    print(f"{size / 1e6:.2f} M parameters, {len(stream)} tokens of text, {len(talk)} of chat", flush=True)
    started = time.perf_counter()
    if variant.sight:
        learn_to_see(model.model.visual, variant.sight)
    adam = optimizer(model)
    windows = batches(stream, talk, variant, arguments.seed)
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = rate(variant, step, steps)
        batch = next(windows)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
            if variant.sight:
                seen = model(**picture_batch(tokenizer, range(step * PICTURES, (step + 1) * PICTURES))).loss
                loss = loss + 4 * seen  # few tokens, and they are the point
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        if step % 25 == 0 or step == steps - 1:
            pictures = f", of pictures {seen.item():.3f}" if variant.sight else ""
            seconds = time.perf_counter() - started
            print(f"step {step}: loss {loss.item():.3f}{pictures}, {seconds:.0f} s", flush=True)
        if step % 200 == 100:
            save_model(model, tokenizer, folder)

    save_model(model, tokenizer, folder)
    stored = type(model).from_pretrained(folder, dtype=torch.float32)
    nats = held_out_loss(stored, held_out)
    print(
        f"held out: {nats:.3f} nats per token, perplexity {math.exp(nats):.2f}, "
        f"{nats / math.log(2) / bytes_per_token:.3f} bits per byte; "
        f"{(time.perf_counter() - started) / 60:.1f} minutes",
        flush=True,
    )
    if variant.sight:
        print(f"right answers about 300 held-out drawings: {right_answers(stored, tokenizer, 300):.1%}")


if __name__ == "__main__":
    main()
