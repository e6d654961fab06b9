"""`/v1/embeddings` and Ollama's two, through the official clients."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import ollama
import openai
import pytest
from openai import OpenAI
from qwen_runtime import Model

from tests.support.servers import Server, serving, wait_until_idle

TEXTS = ["A list is mutable.", "A tuple is not.", "Rain in Rome"]


@pytest.fixture(scope="module")
def embedding(seeing: Path) -> Iterator[Server]:
    with serving(seeing) as running:
        yield running


@pytest.mark.parametrize("form", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
def test_vectors_are_the_models(embedding: Server, seeing: Path, form: dict[str, str]) -> None:
    """Without a word about it the client asks for base64, and takes it apart."""
    client = embedding.client()
    with Model.load(seeing) as model:
        tokens = [model.encode(text) for text in TEXTS]
        expected = {pooling: [model.embed(ids, pooling) for ids in tokens] for pooling in ("mean", "last")}  # type: ignore[arg-type]
    for asked in (TEXTS, tokens):
        found = client.embeddings.create(model="any", input=asked, **form)  # type: ignore[arg-type]
        vectors = [entry.embedding for entry in found.data]
        if form == {"encoding_format": "base64"}:
            assert all(isinstance(vector, str) for vector in vectors)
            continue
        np.testing.assert_allclose(vectors, expected["mean"], atol=1e-6)
        assert [entry.index for entry in found.data] == [0, 1, 2]
        assert found.usage.prompt_tokens == sum(map(len, tokens)) and found.model == "tiny-dense"
    last = client.embeddings.create(model="any", input=TEXTS[0], extra_body={"pooling": "last"})
    np.testing.assert_allclose(last.data[0].embedding, expected["last"][0], atol=1e-6)
    one = client.embeddings.create(model="any", input=tokens[0])
    np.testing.assert_allclose(one.data[0].embedding, expected["mean"][0], atol=1e-6)


def test_ollamas(embedding: Server) -> None:
    client = ollama.Client(host=embedding.url)
    expected = [
        entry.embedding for entry in embedding.client().embeddings.create(model="x", input=TEXTS).data
    ]
    np.testing.assert_allclose(client.embed("x", TEXTS).embeddings, expected, atol=1e-6)
    np.testing.assert_allclose(client.embed("x", TEXTS[0]).embeddings, expected[:1], atol=1e-6)
    np.testing.assert_allclose(client.embeddings("x", TEXTS[0]).embedding, expected[0], atol=1e-6)
    assert "embedding" in (client.show("x").capabilities or [])


def test_each_text_waits_for_its_turn(embedding: Server) -> None:
    """Answers and embeddings at once; a client that leaves keeps no place."""
    client = embedding.client()
    expected = client.embeddings.create(model="x", input=TEXTS).data[0].embedding
    found: list[list[float]] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(client.embeddings.create(model="x", input=TEXTS).data[0].embedding)
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    with pytest.raises(openai.APITimeoutError):
        embedding.client(timeout=0.05).embeddings.create(model="x", input=["word " * 2000] * 50)
    answer = client.completions.create(model="x", prompt="The", max_tokens=5)
    for thread in threads:
        thread.join()
    assert answer.choices[0].text and len(found) == 3
    for vector in found:
        np.testing.assert_allclose(vector, expected, atol=1e-6)
    wait_until_idle(embedding)
    assert client.completions.create(model="x", prompt="The", max_tokens=5).choices


def test_what_is_refused(embedding: Server, client: OpenAI) -> None:
    for asked, says in (
        ("", "no tokens"),
        ("word " * 9000, "and the context is"),
        ([[10**6]], "no token 1000000"),
    ):
        with pytest.raises(openai.BadRequestError, match=says):
            embedding.client().embeddings.create(model="x", input=asked)  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError, match="dimensions: not supported"):
        embedding.client().embeddings.create(model="x", input="A", dimensions=8)
    with pytest.raises(openai.BadRequestError, match="no hidden states to make embeddings from"):
        client.embeddings.create(model="x", input="A")
