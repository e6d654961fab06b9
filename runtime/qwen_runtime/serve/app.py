"""The routes, and who may use them."""

from __future__ import annotations

import asyncio
import hmac
import mimetypes
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen_runtime.serve import ollama, ollama_models
from qwen_runtime.serve.access import Access
from qwen_runtime.serve.chat import chat_completions
from qwen_runtime.serve.common import no_model
from qwen_runtime.serve.completions import completions
from qwen_runtime.serve.embeddings import embeddings, ollama_embed, ollama_embeddings
from qwen_runtime.serve.errors import ApiError, on_api_error, on_crash, on_http_error
from qwen_runtime.serve.http import ClientGone
from qwen_runtime.serve.llama_server import apply_template, detokenize, props, slots, tokenize
from qwen_runtime.serve.messages import count_tokens, messages
from qwen_runtime.serve.metrics import Metrics, metrics
from qwen_runtime.serve.models import Models
from qwen_runtime.serve.responses import responses
from qwen_runtime.serve.served import Served

_CLOSED_REQUEST = 499  # nginx's number; nobody reads it


def make_app(
    served: Models,
    *,
    access: Access | None = None,
    api_key: str | None = None,
    thinking: bool = False,
    strict_model: bool = False,
    kiosk: bool = False,
) -> Starlette:
    """The web application.

    Args:
        access: which names it answers to, and to which sites' pages; None is every name, and no other
            site.
        api_key: what requests must carry as a bearer token or `x-api-key`, but for the page and `/health`.
        thinking: whether the model thinks first where a request does not say.
        strict_model: whether a request for another model is refused, and not answered by the one at hand.
        kiosk: whether the page comes in its kiosk mode without being asked for it.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        running = asyncio.create_task(served.supervise())
        yield
        running.cancel()
        await asyncio.wait([running])

    routes = [
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/props", props),
        Route("/slots", slots),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/apply-template", apply_template, methods=["POST"]),
        Mount(
            "/v1",
            routes=[
                Route("/models", models),
                Route("/models/{name:path}", model),
                Route("/chat/completions", chat_completions, methods=["POST"]),
                Route("/completions", completions, methods=["POST"]),
                Route("/embeddings", embeddings, methods=["POST"]),
                Route("/responses", responses, methods=["POST"]),
                Route("/messages", messages, methods=["POST"]),
                Route("/messages/count_tokens", count_tokens, methods=["POST"]),
            ],
        ),
        Mount(
            "/api",
            routes=[
                Route("/chat", ollama.chat, methods=["POST"]),
                Route("/generate", ollama.generate, methods=["POST"]),
                Route("/embed", ollama_embed, methods=["POST"]),
                Route("/embeddings", ollama_embeddings, methods=["POST"]),
                Route("/tags", ollama_models.tags),
                Route("/show", ollama_models.show, methods=["POST"]),
                Route("/ps", ollama_models.ps),
                Route("/version", ollama_models.version),
            ],
        ),
        Mount("/", _Page(kiosk, directory=Path(__file__).parent / "page", html=True)),
    ]
    paths = frozenset(_paths(routes))
    middleware = [
        Middleware(_Count, metrics=served.metrics, paths=paths),
        *(access or Access()).middleware(),
    ]
    if api_key is not None:
        middleware.append(Middleware(_KeyCheck, api_key=api_key, paths=paths - {"/", "/health"}))
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={
            ApiError: on_api_error,
            ClientGone: _on_client_gone,
            HTTPException: on_http_error,
            Exception: on_crash,
        },
        lifespan=lifespan,
    )
    app.state.models = served
    app.state.thinking = thinking
    app.state.strict_model = strict_model
    return app


class _Page(StaticFiles):
    """The web page's files. The browser is told to run nothing else and to ask no other host."""

    _HEADERS: ClassVar = {
        "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
        "connect-src 'self'; img-src 'self' data: blob:; "
        "require-trusted-types-for 'script'; trusted-types dompurify; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    def __init__(self, kiosk: bool, **options: Any) -> None:
        super().__init__(**options)
        self._kiosk = kiosk
        # Windows' registry may have other types for them, with which no browser runs them.
        for ending in (".js", ".mjs"):
            mimetypes.add_type("text/javascript", ending)

    async def get_response(self, path: str, scope: Scope) -> Response:
        if self._kiosk and scope["path"] == "/" and b"kiosk" not in scope["query_string"]:
            return RedirectResponse("/?kiosk")
        response = await super().get_response(path, scope)
        response.headers.update(self._HEADERS)
        return response


def _paths(routes: Sequence[BaseRoute], prefix: str = "") -> Iterator[str]:
    """The paths of `routes` that have nothing variable in them."""
    for route in routes:
        if isinstance(route, Mount) and route.routes:
            yield from _paths(route.routes, prefix + route.path)
        elif isinstance(route, Mount | Route) and "{" not in route.path:
            yield prefix + (route.path or "/")


class _Count:
    """Counts requests by path and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]) -> None:
        """Args:
        paths: what is counted by itself; all others together, for clients can invent as many as they like.
        """
        self._app = app
        self._requests = metrics.requests
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._requests.labels(path, message["status"]).inc()
            await send(message)

        await self._app(scope, receive, counting)


class _KeyCheck:
    """Lets only requests with the key through to what runs the model or tells of it."""

    def __init__(self, app: ASGIApp, api_key: str, paths: Collection[str]) -> None:
        """Args:
        paths: what needs the key, beside all that is below `/v1` and `/api`.
        """
        self._app = app
        self._expected = api_key.encode()
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"] if scope["type"] == "http" else ""
        guarded = path in self._paths or path.startswith(("/v1/", "/api/"))
        if guarded and not any(hmac.compare_digest(key, self._expected) for key in _keys(scope)):
            error = ApiError(
                401,
                "no valid API key: send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error.response(path)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _keys(scope: Scope) -> Iterator[bytes]:
    """The keys that a request carries."""
    for name, value in scope["headers"]:
        scheme, _, token = value.partition(b" ")
        if name == b"authorization" and scheme.lower() == b"bearer":
            yield token.strip()
        elif name == b"x-api-key":
            yield value


def _on_client_gone(http: HttpRequest, error: Exception) -> Response:
    return Response(status_code=_CLOSED_REQUEST)


async def health(http: HttpRequest) -> Response:
    """The model in memory, or the first: `asleep` where the next request loads it, `frozen` where its process
    does not run."""
    served: Models = http.app.state.models
    engine = served.current
    status = "asleep" if engine.asleep else "ok" if engine.alive else "loading"
    if engine.frozen:
        status = "frozen"
    body = {
        "status": status,
        "model": engine.info.name,
        "provider": engine.info.provider,
        "running": served.running,
        "waiting": served.waiting,
    }
    return JSONResponse(body, 200 if status in ("ok", "asleep") else 503)


async def models(http: HttpRequest) -> Response:
    """As OpenAI has them, and as Anthropic has them."""
    found = [_model(served) for served in http.app.state.models.served.values()]
    ends = {"has_more": False, "first_id": found[0]["id"], "last_id": found[-1]["id"]}
    return JSONResponse({"object": "list", "data": found, **ends})


async def model(http: HttpRequest) -> Response:
    models: Models = http.app.state.models
    if (name := http.path_params["name"]) not in models.served:
        raise no_model(name, models)
    return JSONResponse(_model(models.served[name]))


def _model(served: Served) -> dict[str, object]:
    """`parent` is vLLM's word for the model whose adapter it is."""
    info, loaded = served.info, int(served.engine.loaded)
    return {
        "id": info.name,
        "object": "model",
        "type": "model",
        "display_name": info.name,
        "created": loaded,
        "created_at": datetime.fromtimestamp(loaded, UTC).isoformat(),
        "owned_by": "qwen-edge",
        "parent": served.parent,
        "context_length": info.context_length,
        "images": info.images,
    }
