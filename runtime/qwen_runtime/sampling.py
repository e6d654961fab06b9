"""How the next token is chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from qwen_common.errors import UserError

# Search options that take the likeliest token, whatever the artifact's defaults are.
GREEDY: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. None takes the checkpoint's own default.

    Attributes:
        temperature: 0 always takes the likeliest token.
        top_p: smallest set of tokens whose probabilities reach this sum, above 0 and at most 1.
        top_k: number of likeliest tokens that are considered, at least 1.
        min_p: only tokens at least this many times as likely as the likeliest, from 0 to 1; before `top_k`
            and `top_p`. Of those that guidance leaves all are considered where none is as likely.
        repetition_penalty: above 0; 1 changes nothing.
        seed: the same seed, prompt and provider give the same text.
        presence_penalty: subtracted from the logit of every token that the answer has already.
        frequency_penalty: the same, as often as it has it.
        logit_bias: added to the logits of tokens, by id; -100 rules one out, 100 all others.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    min_p: float | None = None

    def check(self) -> None:
        """Raises:
        UserError: a value is out of range.
        """
        valid = {
            "temperature": (self.temperature is None or self.temperature >= 0, "0 or more"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1"),
            "repetition_penalty": (
                self.repetition_penalty is None or self.repetition_penalty > 0,
                "above 0",
            ),
            "min_p": (self.min_p is None or 0 <= self.min_p <= 1, "from 0 to 1"),
            "presence_penalty": (_is_finite(self.presence_penalty), "a finite number"),
            "frequency_penalty": (_is_finite(self.frequency_penalty), "a finite number"),
            "logit_bias": (all(map(math.isfinite, (self.logit_bias or {}).values())), "finite numbers"),
            "seed": (self.seed is None or 0 <= self.seed < 2**31, "from 0 to 2147483647"),
        }
        for name, (holds, range_text) in valid.items():
            if not holds:
                raise UserError(f"{name} is {getattr(self, name)}, but must be {range_text}")

    def search_options(self) -> dict[str, Any]:
        """As ONNX Runtime GenAI's search options, which know none of the last four.

        Raises:
            UserError: a value is out of range.
        """
        self.check()
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        options["random_seed"] = options.pop("seed")
        for name in ("presence_penalty", "frequency_penalty", "logit_bias", "min_p"):
            del options[name]
        options = {name: value for name, value in options.items() if value is not None}
        if self.temperature == 0:
            del options["temperature"]
            options.pop("random_seed", None)
            options["do_sample"] = False
        elif self.temperature is not None:
            options["do_sample"] = True
        return options


def _is_finite(value: float | None) -> bool:
    return value is None or math.isfinite(value)
