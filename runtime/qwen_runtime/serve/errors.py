"""Errors as the clients of each protocol expect them."""

from __future__ import annotations

import math

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

_PLACES = "OpenAI's and Anthropic's APIs are at /v1, Ollama's at /api, the page is at /"
TOO_LONG = "context_length_exceeded"


class ApiError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: HTTP status code.
        parameter: the field of the request that is at fault, if it is one.
        details: what OpenAI's error has no field for.
        headers: extra headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        parameter: str | None = None,
        details: dict[str, object] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.parameter = parameter
        self.details = details or {}
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, object]:
        """As OpenAI's clients expect it."""
        return {
            "error": {
                "message": str(self),
                "type": _TYPES.get(self.status, "invalid_request_error"),
                "param": self.parameter,
                "code": self.code,
                **self.details,
            }
        }

    @property
    def anthropic_body(self) -> dict[str, object]:
        kind = _ANTHROPIC_TYPES.get(
            self.status, "api_error" if self.status >= 500 else "invalid_request_error"
        )
        message = str(self)
        if self.code == TOO_LONG:  # Anthropic has no code for it, so agents read the message
            message = "prompt is too long: {n_prompt_tokens} tokens > {n_ctx} maximum".format(**self.details)
        return {"type": "error", "error": {"type": kind, "message": message}}

    @property
    def ollama_body(self) -> dict[str, object]:
        return {"error": str(self)}

    def body_at(self, path: str) -> dict[str, object]:
        """In the shape of the protocol that is spoken at `path`."""
        if path.startswith("/v1/messages"):
            return self.anthropic_body
        return self.ollama_body if path.startswith("/api/") else self.body

    def response(self, path: str) -> Response:
        """As `body_at`."""
        return JSONResponse(self.body_at(path), self.status, headers=self.headers)


_TYPES = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def reloading() -> ApiError:
    return ApiError(503, "the model is being loaded again", headers={"Retry-After": "5"})


def queue_full(waiting: int, seconds: float) -> ApiError:
    return ApiError(
        429,
        f"{waiting} requests are waiting already: try again later",
        code="queue_full",
        headers={"Retry-After": str(math.ceil(seconds))},
    )


def request_failed(message: str, user_error: bool, sizes: tuple[int, int] | None) -> ApiError:
    """What the worker says of a request that it could not answer.

    Args:
        sizes: tokens of a prompt that is too long, and of the context. They come as llama-server's fields,
            with OpenAI's code: agents shorten the prompt then.
    """
    if sizes is None:
        return ApiError(400 if user_error else 500, message)
    details: dict[str, object] = dict(zip(("n_prompt_tokens", "n_ctx"), sizes, strict=True))
    return ApiError(400, message, code=TOO_LONG, details=details)


def on_api_error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response(http.url.path)


def on_http_error(http: HttpRequest, error: Exception) -> Response:
    """Starlette's own: no such path, or not with this method."""
    status = getattr(error, "status_code", 500)
    headers = dict(getattr(error, "headers", None) or {})
    message = f"{http.method} {http.url.path}: {getattr(error, 'detail', 'error')}"
    if status == 404:
        message = f"there is no {http.url.path[:100]}: {_PLACES}"
    elif status == 405:
        methods = " or ".join(sorted(set(headers.get("Allow", "GET").split(", ")) - {"HEAD"}))
        message = f"{http.url.path[:100]} takes no {http.method}: send {methods}"
    return ApiError(status, message, headers=headers).response(http.url.path)


def on_crash(http: HttpRequest, error: Exception) -> Response:
    return ApiError(500, "internal error: see the server's log").response(http.url.path)
