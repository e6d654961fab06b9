"""llama-server's endpoints beside answers: text to tokens and back, the chat template, and what is served."""

from __future__ import annotations

from qwen_common.version import own_version
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from qwen_runtime.artifact import Artifact
from qwen_runtime.serve import queries
from qwen_runtime.serve.chat import request_for
from qwen_runtime.serve.common import served_for
from qwen_runtime.serve.http import read_json, while_connected
from qwen_runtime.serve.schema.base import parse
from qwen_runtime.serve.schema.chat import ChatRequest
from qwen_runtime.serve.schema.llama_server import DetokenizeRequest, TokenizeRequest

# What a sampling option is called there, by its name here.
_PARAMS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}


async def tokenize(http: HttpRequest) -> Response:
    asked = parse(TokenizeRequest, await read_json(http))
    served = served_for(http, asked.model)
    tokens = await while_connected(http, served.ask(queries.tokenize, asked.content))
    if not asked.with_pieces:
        return JSONResponse({"tokens": tokens})
    pieces = await while_connected(http, served.ask(queries.token_bytes, tokens))
    found = [{"id": token, "piece": _piece(raw)} for token, raw in zip(tokens, pieces, strict=True)]
    return JSONResponse({"tokens": found})


def _piece(raw: bytes) -> str | list[int]:
    """Text, or the bytes of a part of a character."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)


async def detokenize(http: HttpRequest) -> Response:
    asked = parse(DetokenizeRequest, await read_json(http))
    served = served_for(http, asked.model)
    text = await while_connected(http, served.ask(queries.detokenize, asked.tokens))
    return JSONResponse({"content": text})


async def apply_template(http: HttpRequest) -> Response:
    """The prompt that `/v1/chat/completions` makes of the same body."""
    asked = parse(ChatRequest, await read_json(http))
    served = served_for(http, asked.model)
    request, _ = await while_connected(http, request_for(asked, served.info, http.app.state.thinking))
    return JSONResponse({"prompt": await while_connected(http, served.ask(queries.prompt_text, request))})


async def slots(http: HttpRequest) -> Response:
    """The answers at work, and how far each has read its prompt."""
    served = served_for(http, http.query_params.get("model"))
    working: list[dict[str, object]] = [
        {
            "id_task": answer.id,
            "is_processing": True,
            "n_prompt_tokens": answer.prompt_tokens,
            "n_prompt_tokens_processed": answer.prompt_read,
            "n_prompt_tokens_cache": answer.cached_tokens,
        }
        for answer in served.engine.answers
    ]
    idle: list[dict[str, object]] = [{"is_processing": False}] * (served.engine.parallel - len(working))
    return JSONResponse(
        [{"id": at, "n_ctx": served.info.context_length, **slot} for at, slot in enumerate([*working, *idle])]
    )


async def props(http: HttpRequest) -> Response:
    served = served_for(http, http.query_params.get("model"))
    artifact = Artifact.open(served.info.path)
    defaults = artifact.search_defaults
    return JSONResponse(
        {
            "default_generation_settings": {
                "n_ctx": served.info.context_length,
                "chat_template_kwargs": {"enable_thinking": http.app.state.thinking},
                "params": {theirs: defaults[ours] for ours, theirs in _PARAMS.items() if ours in defaults},
            },
            "total_slots": served.engine.parallel,
            "model_alias": served.name,
            "model_path": str(served.info.path),
            "chat_template": next(iter(artifact.chat_templates.values()), ""),
            "modalities": {"vision": served.info.images, "audio": False},
            "build_info": f"qwen-edge {own_version()}",
        }
    )
