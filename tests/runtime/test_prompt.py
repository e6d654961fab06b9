"""Prompts: the chat template as transformers has it, and what does not fit."""

from __future__ import annotations

import pytest
from qwen_common.errors import UserError
from qwen_runtime import Model
from transformers import AutoTokenizer

from benchmarks.support.checkpoints import TINY

QUESTION = [{"role": "user", "content": "What is assert?"}]


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize(
    "messages",
    [
        QUESTION,
        [{"role": "system", "content": "Be brief."}, *QUESTION],
        [*QUESTION, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nA statement."}, *QUESTION],
        [{"role": "user", "content": 'Quotes " and \\ and {{ braces }} and ünïcödé 🙂\n'}],
    ],
)
def test_chat_template_is_rendered_as_by_transformers(model: Model, messages: list, thinking: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    expected = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=thinking, tokenize=False
    )
    assert model.apply_chat_template(messages, thinking) == expected
    assert model.encode(expected) == tokenizer(expected, add_special_tokens=False)["input_ids"]


def test_nul_characters_are_text(model: Model) -> None:
    text = "seen\0seen too"
    assert model.decode(model.encode(text)) == text
    parts = [len(model.encode(part)) for part in text.split("\0")]
    assert model.generate(text).prompt_tokens == sum(parts) + 1


def test_prompts_that_do_not_fit(model: Model) -> None:
    with pytest.raises(UserError, match="the prompt is empty"):
        model.generate("")
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens, and the context is 8192"):
        model.generate("word " * 9000)
    with pytest.raises(UserError, match="not valid UTF-8"):
        model.generate("half a pair: \ud83d")
    with pytest.raises(UserError, match="does not take these messages"):
        model.generate([{"role": "user", "content": None}])  # type: ignore[dict-item]
    with pytest.raises(UserError, match="a list of prompts is not supported"):
        model.generate(["one", "two"])  # type: ignore[list-item]
