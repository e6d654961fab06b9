"""The trained vision-language checkpoint and its artifacts, asked what only the picture tells."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from qwen_profiles.schema import load_profile
from qwen_runtime import Model, Sampling
from transformers import AutoTokenizer, Qwen3_5ForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from benchmarks.support.checkpoints import TINY_VL
from tests.checkpoints.drawings import Drawing, drawing
from tests.support.exported import Exported

FIRST_HELD_OUT = 1_000_000_000  # checkpoints/train.py draws from 0 on
COUNT = 100
LONGEST_ANSWER = 12  # tokens


def asking(item: Drawing) -> list[dict]:
    parts = [{"type": "image", "image": item.image}, {"type": "text", "text": item.question}]
    return [{"role": "user", "content": parts}]


@pytest.fixture(scope="module")
def drawings() -> list[Drawing]:
    return [drawing(FIRST_HELD_OUT + index) for index in range(COUNT)]


@pytest.fixture(scope="module")
def reference(drawings: list[Drawing]) -> list[str]:
    """transformers' answers in float32, by its own template and image processor."""
    model = Qwen3_5ForConditionalGeneration.from_pretrained(TINY_VL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(TINY_VL)
    processor = Qwen2VLImageProcessorPil.from_pretrained(TINY_VL)
    pad = model.config.image_token_id
    answers = []
    for item in drawings:
        prompt = tokenizer.apply_chat_template(
            asking(item), tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        seen = processor([item.image], return_tensors="pt")
        features = int(seen["image_grid_thw"].prod()) // 4
        ids = np.array(tokenizer(prompt)["input_ids"])
        ids = np.repeat(ids, np.where(ids == pad, features, 1))[None]
        with torch.no_grad():
            found = model.generate(
                torch.from_numpy(ids),
                mm_token_type_ids=torch.from_numpy((ids == pad).astype(np.int64)),
                max_new_tokens=LONGEST_ANSWER,
                do_sample=False,
                **seen,
            )
        answers.append(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))
    return answers


def test_it_sees(drawings: list[Drawing], reference: list[str]) -> None:
    """Guessing is right about one time in six."""
    assert sum(found == item.answer for found, item in zip(reference, drawings, strict=True)) >= 90


@pytest.mark.parametrize("profile", ["cpu", "strix-halo"])
def test_the_artifact_sees_the_same(
    profile: str, drawings: list[Drawing], reference: list[str], exported: Exported
) -> None:
    """As shipped: INT4 in the MLP, and the tower in INT8 or float16."""
    options = {"max_tokens": LONGEST_ANSWER, "sampling": Sampling(temperature=0)}
    with Model.load(exported(TINY_VL, load_profile(profile)), provider="cpu") as model:
        answers = ["".join(model.generate(asking(item), **options)) for item in drawings]
    right = [found == item.answer for found, item in zip(reference, drawings, strict=True)]
    kept = sum(found == item.answer for found, item, was in zip(answers, drawings, right, strict=True) if was)
    assert kept >= 0.95 * sum(right)
    assert sum(found == expected for found, expected in zip(answers, reference, strict=True)) >= 95
