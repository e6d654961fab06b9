"""Counters for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The server's own registry, so that several servers in one process do not share counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        registry = self.registry
        self.requests = Counter(
            "qwen_edge_requests", "Requests that were answered.", ["path", "status"], registry=registry
        )
        self.prompt_tokens = Counter("qwen_edge_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.cached_tokens = Counter(
            "qwen_edge_cached_prompt_tokens", "Of these, tokens that need not be read.", registry=registry
        )
        self.completion_tokens = Counter(
            "qwen_edge_completion_tokens", "Tokens that were generated.", registry=registry
        )
        self.drafted_tokens = Counter(
            "qwen_edge_drafted_tokens", "Tokens that were guessed and checked.", registry=registry
        )
        self.accepted_tokens = Counter(
            "qwen_edge_accepted_tokens", "Of these, tokens that were right.", registry=registry
        )
        self.first_token = Histogram(
            "qwen_edge_time_to_first_token_seconds",
            "From a request's turn to its first text.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.answer = Histogram(
            "qwen_edge_answer_seconds",
            "From a request's turn to its end.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.restarts = Counter(
            "qwen_edge_model_restarts", "Times that the model's process died.", registry=registry
        )

    def watch(self, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Report these two numbers too, as they are when somebody asks."""
        Gauge("qwen_edge_running", "Answers being made.", registry=self.registry).set_function(running)
        Gauge("qwen_edge_waiting", "Requests in the queue.", registry=self.registry).set_function(waiting)


async def metrics(http: HttpRequest) -> Response:
    found: Metrics = http.app.state.models.metrics
    return Response(generate_latest(found.registry), media_type=CONTENT_TYPE_LATEST)
