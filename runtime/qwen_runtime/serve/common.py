"""What the kinds of completions share."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request as HttpRequest

from qwen_runtime.request import Request
from qwen_runtime.sampling import Sampling
from qwen_runtime.serve.errors import ApiError
from qwen_runtime.serve.models import Models
from qwen_runtime.serve.schema.shared import SharedRequest
from qwen_runtime.serve.served import Served

SEEDS = 2**31  # of the runtime
_EVERY_TOKEN = SEEDS - 1  # what vLLM's clients mean by a top_k of -1 or 0


def served_for(http: HttpRequest, name: str | None) -> Served:
    """What answers a request for the model `name`.

    Clients come with names of their own: the model in memory answers to all that are none of a model or an
    adapter, unless the server is strict.

    Raises:
        ApiError: a model was asked for that is not there, and the server is strict.
    """
    models: Models = http.app.state.models
    if name is not None and name in models.served:
        return models.served[name]
    if name is not None and http.app.state.strict_model:
        raise no_model(name, models, parameter="model")
    return Served(models.current)


def no_model(name: str, models: Models, parameter: str | None = None) -> ApiError:
    names = ", ".join(f"'{name}'" for name in models.served)
    return ApiError(
        404, f"no model '{name}': this server has {names}", code="model_not_found", parameter=parameter
    )


def plain_request(asked: SharedRequest, prompt: str | Sequence[Any], max_tokens: int | None) -> Request:
    """With the options that all kinds of completions have."""
    return Request(
        prompt=prompt,
        max_tokens=max_tokens,
        sampling=sampling(asked),
        stop=asked.stops,
        stop_token_ids=asked.stop_token_ids,
        min_tokens=asked.min_tokens,
        ignore_eos=asked.ignore_eos,
    )


def sampling(asked: SharedRequest) -> Sampling:
    return Sampling(
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k if asked.top_k not in (-1, 0) else _EVERY_TOKEN,
        min_p=asked.min_p,
        repetition_penalty=asked.repetition_penalty,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        logit_bias=asked.logit_bias,
        seed=None if asked.seed is None else asked.seed % SEEDS,  # any integer is OpenAI's range
    )


def head_of(kind: str, served: Served) -> dict[str, Any]:
    """What an answer begins with. The fingerprint is of what makes the same answer of the same seed."""
    made_by = [served.info.profile, served.info.provider, *([served.adapter] if served.adapter else [])]
    return {
        "id": f"{kind}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": served.name,
        "system_fingerprint": "-".join(made_by),
    }


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
