"""A fixed prompt and the tokens that must follow it, to tell a working install from a broken one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_profiles.errors import UserError

from qwen_runtime.model import Model, Sampling

_PROMPT = "Hello"
_TOKENS = 8


def make_self_test(artifact: Path) -> dict[str, Any]:
    """{"prompt": text, "tokens": ids of the greedy answer on the CPU}.

    Raises:
        UserError: the artifact cannot be loaded.
    """
    return {"prompt": _PROMPT, "tokens": _greedy(artifact, _PROMPT, _TOKENS)}


def run_self_test(artifact: Path, self_test: Mapping[str, Any]) -> None:
    """Generate again what `make_self_test` recorded.

    Raises:
        UserError: the artifact does not load, or other tokens come.
    """
    expected = list(self_test["tokens"])
    found = _greedy(artifact, self_test["prompt"], _TOKENS)
    if found != expected:
        raise UserError(f"the self-test answered {found} instead of {expected}: keep the version that works")


def _greedy(artifact: Path, prompt: str, count: int) -> list[int]:
    # The CPU is everywhere, and the fallback; another provider's kernels may round to another token.
    with Model.load(artifact, provider="cpu", verify=True) as model:
        generation = model.generate(prompt, max_tokens=count, sampling=Sampling(temperature=0))
        for _ in generation:
            pass
        return generation.tokens
