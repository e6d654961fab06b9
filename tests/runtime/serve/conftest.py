"""Fixtures of the server's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from qwen_runtime import Model
from selenium.webdriver import Chrome

from tests.support.pages import chromium, open_page
from tests.support.servers import Server, serving

if TYPE_CHECKING:
    from openai import OpenAI

QUESTION = [{"role": "user", "content": "What is assert?"}]


@pytest.fixture(scope="session")
def server(cpu_artifact: Path) -> Iterator[Server]:
    """One that is shared: tests that end it or want options start their own."""
    with serving(cpu_artifact) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Server) -> OpenAI:
    return server.client()


@pytest.fixture(scope="module")
def ask(client: OpenAI, model: Model) -> Callable[..., Any]:
    def create(messages: Any = QUESTION, **options: Any) -> Any:
        return client.chat.completions.create(
            model=model.info.name, messages=messages, **{"temperature": 0, "max_tokens": 30, **options}
        )

    return create


@pytest.fixture(scope="session")
def browser() -> Iterator[Chrome]:
    with chromium("--window-size=1000,760") as driver:
        yield driver


@pytest.fixture
def page(browser: Chrome, server: Server) -> Chrome:
    open_page(browser, server.url)
    return browser
