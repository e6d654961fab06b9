"""Time to the first token of a conversation's second turn, with its history kept and read anew.

python -m benchmarks.prefix ARTIFACT [--history 2000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from qwen_runtime import Model, Sampling, TokenLogprob
from rich.console import Console
from rich.table import Table

_GREEDY = Sampling(temperature=0)
_TEXT = "A list is mutable, and a tuple is not. "


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--history", type=int, default=2000, help="tokens before the second question")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    table = Table("history", "read", "first token, s", "read anew, s", "times shorter", "same bits")
    with Model.load(asked.artifact) as fresh, Model.load(asked.artifact, keep=1) as kept:
        for name, answered in (
            ("long question, 50 tokens of answer", 50),
            ("half of it the answer", asked.history // 2),
        ):
            for ahead in (False, True):
                found = [
                    _second_turn(kept, fresh, asked.history - answered, answered, ahead, number)
                    for number in range(asked.rounds)
                ]
                reused, anew = (statistics.median(row[at] for row in found) for at in (0, 1))
                table.add_row(
                    name,
                    "ahead" if ahead else "when asked",
                    f"{reused:.3f}",
                    f"{anew:.3f}",
                    f"{anew / reused:.0f}",
                    "yes" if all(row[2] for row in found) else "no",
                )
    Console().print(table)


def _second_turn(
    kept: Model, fresh: Model, question: int, answered: int, ahead: bool, number: int
) -> tuple[float, float, bool]:
    """Seconds to the first token with reuse and without, and whether the likeliest tokens were as likely."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": f"{number}. {_words(kept, question)}"}]
    _first_token(kept, messages)
    messages.append({"role": "assistant", "content": _words(kept, answered)})
    if ahead:
        kept.read_ahead(messages, sampling=_GREEDY)
    messages.append({"role": "user", "content": "What is yield?"})
    reused, found = _first_token(kept, messages)
    anew, expected = _first_token(fresh, messages)
    return reused, anew, found == expected


def _first_token(model: Model, messages: list[dict[str, Any]]) -> tuple[float, list[TokenLogprob]]:
    begun = time.perf_counter()
    generation = model.generate(messages, max_tokens=1, sampling=_GREEDY, logprobs=20)
    for _ in generation:
        pass
    return time.perf_counter() - begun, generation.logprobs


def _words(model: Model, count: int) -> str:
    return model.decode(model.encode(_TEXT * count)[:count])


if __name__ == "__main__":
    main()
