"""`/v1/embeddings`, and Ollama's `/api/embed` and `/api/embeddings`: texts as vectors."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from qwen_runtime.pooling import Pooling, Vector
from qwen_runtime.serve import queries
from qwen_runtime.serve.common import served_for
from qwen_runtime.serve.http import read_json, while_connected
from qwen_runtime.serve.schema.base import parse
from qwen_runtime.serve.schema.embeddings import EmbeddingsRequest, EmbedRequest, OldEmbedRequest
from qwen_runtime.serve.served import Served


async def embeddings(http: HttpRequest) -> Response:
    asked = parse(EmbeddingsRequest, await read_json(http))
    served = served_for(http, asked.model)
    vectors, tokens = await while_connected(http, _embed(served, asked.texts, asked.pooling))
    written = _as_base64 if asked.encoding_format == "base64" else _as_list
    data = [
        {"object": "embedding", "index": index, "embedding": written(vector)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({"object": "list", "data": data, "model": served.name, "usage": usage})


async def ollama_embed(http: HttpRequest) -> Response:
    begun = time.monotonic_ns()
    asked = parse(EmbedRequest, await read_json(http, undeclared=True))
    served = served_for(http, asked.model)
    texts = [asked.input] if isinstance(asked.input, str) else asked.input
    vectors, tokens = await while_connected(http, _embed(served, texts))
    return JSONResponse(
        {
            "model": served.name,
            "embeddings": [_as_list(vector) for vector in vectors],
            "total_duration": time.monotonic_ns() - begun,
            "load_duration": 0,
            "prompt_eval_count": tokens,
        }
    )


async def ollama_embeddings(http: HttpRequest) -> Response:
    asked = parse(OldEmbedRequest, await read_json(http, undeclared=True))
    served = served_for(http, asked.model)
    [vector], _ = await while_connected(http, _embed(served, [asked.prompt]))
    return JSONResponse({"embedding": _as_list(vector)})


async def _embed(
    served: Served, texts: Sequence[str | Sequence[int]], pooling: Pooling = "mean"
) -> tuple[list[Vector], int]:
    """A vector for each text, and the tokens of all. Each text waits for its turn: answers come between."""
    vectors, tokens = [], 0
    for text in texts:
        vector, count = await served.ask_in_turn(queries.embed, text, pooling)
        vectors.append(vector)
        tokens += count
    return vectors, tokens


def _as_list(vector: Vector) -> list[float]:
    found: list[Any] = vector.tolist()
    return found


def _as_base64(vector: Vector) -> str:
    """Of float32 numbers, the lowest byte first."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
