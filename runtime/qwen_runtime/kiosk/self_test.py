"""A fixed prompt and the tokens that must follow it, to tell a working install from a broken one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_common.errors import UserError
from qwen_common.providers import CPU

from qwen_runtime.generation import Generation
from qwen_runtime.model import Model
from qwen_runtime.sampling import Sampling

_PROMPT = "Hello"
_TOKENS = 8
# Kernels of other CPUs round differently: a token counts while it is e times as likely as the next best.
_LEAD = 1.0


def make_self_test(artifact: Path) -> dict[str, Any]:
    """{"prompt": text, "tokens": ids of the greedy answer on the CPU, as far as it is clear-cut}.

    Raises:
        UserError: the artifact cannot be loaded.
    """
    generation = _greedy(artifact, _PROMPT, _TOKENS)
    leads = [best[1] - second[1] for best, second in (item.top for item in generation.logprobs)]
    clear = next((index for index, lead in enumerate(leads) if index and lead < _LEAD), len(leads))
    return {"prompt": _PROMPT, "tokens": generation.tokens[:clear]}


def run_self_test(artifact: Path, self_test: Mapping[str, Any]) -> None:
    """Generate again what `make_self_test` recorded.

    Raises:
        UserError: the artifact does not load, or other tokens come.
    """
    expected = list(self_test["tokens"])
    found = _greedy(artifact, self_test["prompt"], max(1, len(expected))).tokens
    if found != expected:
        raise UserError(f"the self-test answered {found} instead of {expected}: keep the version that works")


def _greedy(artifact: Path, prompt: str, count: int) -> Generation:
    # The CPU is everywhere, and the fallback; another provider's kernels may round to another token.
    with Model.load(artifact, provider=CPU.key) as model:
        generation = model.generate(prompt, max_tokens=count, sampling=Sampling(temperature=0), logprobs=2)
        for _ in generation:
            pass
        return generation
