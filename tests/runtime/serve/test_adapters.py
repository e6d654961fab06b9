"""An adapter for each request: PEFT's tokens through every API, side by side, and after a restart."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anthropic
import ollama
import openai
import pytest
from click.testing import CliRunner
from qwen_common.errors import UserError
from qwen_runtime import Model
from qwen_runtime.cli import main
from qwen_runtime.load_options import LoadOptions
from qwen_runtime.serve.engine import Engine
from qwen_runtime.serve.models import Models
from qwen_runtime.serve.worker import ModelSettings

from tests.support.commands import run
from tests.support.servers import Server, request, serving, workers
from tests.support.waiting import PATIENCE, until

if TYPE_CHECKING:
    from tests.support.adapters import Adapted

BASE = "base"
NAMES = (BASE, "style", "tools", "words")
QUESTION = [{"role": "user", "content": "the river and the hill"}]
COUNT = 8
Ask = Callable[[str], tuple[str, str]]  # by the name of a model; the name in the answer, and the answer


@pytest.fixture(scope="module")
def server(adapted: Adapted) -> Iterator[Server]:
    given = ("--adapter", f"words={adapted.words}", "--parallel", "3", "--keep", "4")
    with serving(adapted.artifact, *given) as running:
        yield running


@pytest.fixture(scope="module")
def expected(adapted: Adapted) -> dict[str, str]:
    """What PEFT's models answer to the question."""
    with Model.load(adapted.artifact) as model:
        prompt = model.encode(model.apply_chat_template(QUESTION))
        return {
            name: model.decode(adapted.greedy(None if name == BASE else name, prompt, COUNT))
            for name in NAMES
        }


def asks(server: Server) -> dict[str, Ask]:
    """The question, in each API."""
    client = server.client()
    claude = anthropic.Anthropic(base_url=server.url, api_key="unused", max_retries=0)
    local = ollama.Client(server.url)
    greedy: dict[str, Any] = {"temperature": 0, "max_tokens": COUNT}
    options = {"temperature": 0, "num_predict": COUNT}

    def chat(name: str) -> tuple[str, str]:
        found = client.chat.completions.create(model=name, messages=QUESTION, **greedy)  # type: ignore[call-overload]
        assert found.usage.completion_tokens <= COUNT
        return found.model, found.choices[0].message.content

    def stream(name: str) -> tuple[str, str]:
        chunks = list(client.chat.completions.create(model=name, messages=QUESTION, stream=True, **greedy))  # type: ignore[call-overload]
        return chunks[0].model, "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    def completions(name: str) -> tuple[str, str]:
        body = json.dumps({"model": name, "messages": QUESTION}).encode()
        prompt = json.loads(request(server, "POST", "/apply-template", body)[2])["prompt"]
        found = client.completions.create(model=name, prompt=prompt, **greedy)
        return found.model, found.choices[0].text

    def responses(name: str) -> tuple[str, str]:
        found = client.responses.create(
            model=name, input=QUESTION[0]["content"], temperature=0, max_output_tokens=COUNT
        )
        return found.model, found.output_text

    def messages(name: str) -> tuple[str, str]:
        found = claude.messages.create(
            model=name,
            messages=QUESTION,  # type: ignore[arg-type]
            max_tokens=COUNT,
            extra_body={"temperature": 0},
        )
        return found.model, found.content[0].text

    def ollamas(name: str) -> tuple[str, str]:
        found = local.chat(name, QUESTION, options=options)
        return found.model or "", found.message.content or ""

    def generate(name: str) -> tuple[str, str]:
        found = local.generate(name, QUESTION[0]["content"], options=options)
        return found.model or "", found.response

    return {ask.__name__: ask for ask in (chat, stream, completions, responses, messages, ollamas, generate)}


def test_every_api_side_by_side(server: Server, expected: dict[str, str]) -> None:
    assert len(set(expected.values())) == len(NAMES)
    wanted = [(ask, name) for name in NAMES for ask in asks(server).values()]
    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(lambda one: one[0](one[1]), wanted))
    assert found == [(name, expected[name]) for _, name in wanted]


def test_the_models(server: Server) -> None:
    client = server.client()
    listed = {model.id: model.parent for model in client.models.list()}  # type: ignore[attr-defined]
    assert listed == {BASE: None, "style": BASE, "tools": BASE, "words": BASE}
    assert client.models.retrieve("words").parent == BASE  # type: ignore[attr-defined]
    local = ollama.Client(server.url)
    assert [model.model for model in local.list().models] == list(NAMES)
    details = local.show("words").details
    assert details is not None and details.parent_model == BASE
    assert json.loads(request(server, "GET", "/props?model=words")[2])["model_alias"] == "words"
    claude = anthropic.Anthropic(base_url=server.url, api_key="unused")
    assert [model.id for model in claude.models.list()] == list(NAMES)


def test_a_name_that_is_none(server: Server, expected: dict[str, str], adapted: Adapted) -> None:
    """The model itself answers, as it does where there are no adapters, and says so."""
    for ask in asks(server).values():
        assert ask("gpt-4o") == (BASE, expected[BASE])
    with serving(adapted.artifact, "--strict-model") as strict:
        with pytest.raises(
            openai.NotFoundError, match="no model 'words': this server has 'base', 'style', 'tools'"
        ):
            asks(strict)["chat"]("words")
        with pytest.raises(anthropic.NotFoundError, match="not_found_error"):
            asks(strict)["messages"]("words")
        with pytest.raises(ollama.ResponseError, match="no model 'words'"):
            asks(strict)["ollamas"]("words")


def test_conversations_are_kept_for_each(server: Server) -> None:
    client = server.client()
    question: Any = [{"role": "user", "content": "a hill by the old river " * 6}]

    def asked(name: str, messages: Any) -> tuple[int, str]:
        found = client.chat.completions.create(model=name, messages=messages, temperature=0, max_tokens=2)
        assert found.usage is not None and found.usage.prompt_tokens_details is not None
        return found.usage.prompt_tokens_details.cached_tokens or 0, found.choices[0].message.content or ""

    said = {}
    for name in NAMES:
        cached, said[name] = asked(name, question)
        assert cached == 0
    for name, text in said.items():
        history = [*question, {"role": "assistant", "content": text}, {"role": "user", "content": "and"}]
        assert asked(name, history)[0] > 0


def test_grammars_and_tools(server: Server) -> None:
    client = server.client()
    tool: Any = {
        "type": "function",
        "function": {
            "name": "look",
            "parameters": {"type": "object", "properties": {"far": {"type": "boolean"}}, "required": ["far"]},
        },
    }
    for name in NAMES:
        asked: dict[str, Any] = {"model": name, "messages": QUESTION, "max_tokens": 200}
        chosen = client.chat.completions.create(**asked, extra_body={"guided_choice": ["yes", "no"]})
        assert chosen.choices[0].message.content in ("yes", "no")
        called = client.chat.completions.create(**asked, tools=[tool], tool_choice="required")
        (call,) = called.choices[0].message.tool_calls[:1]
        assert call.function.name == "look" and type(json.loads(call.function.arguments)["far"]) is bool


def test_after_the_worker_died(server: Server, expected: dict[str, str]) -> None:
    (worker,) = workers(server)
    worker.kill()
    worker.wait(PATIENCE)
    ask = asks(server)["chat"]

    def answered() -> bool:
        with suppress(openai.InternalServerError):
            assert ask("words") == ("words", expected["words"])
            return True
        return False

    until(answered)
    assert ask("style") == ("style", expected["style"])


def test_what_is_refused(adapted: Adapted, cpu_artifact: Path) -> None:
    def refused(*options: str) -> str:
        found = CliRunner().invoke(main, ["serve", *options, "--port", "0"])
        assert found.exit_code == 2 and len(found.stderr.splitlines()) == 1, found.stderr
        return found.stderr

    artifact, words = str(adapted.artifact), str(adapted.words)
    assert "two adapters are called a" in refused(
        artifact, "--adapter", f"a={words}", "--adapter", f"a={words}"
    )
    assert "two adapters are called style" in refused(artifact, "--adapter", f"style={words}")
    assert "give NAME=PATH" in refused(artifact, "--adapter", "words")
    assert "base is a model and an adapter of base: name the model otherwise" in refused(
        artifact, "--adapter", f"base={words}"
    )
    assert "does not say which artifact" in refused(artifact, str(cpu_artifact), "--adapter", f"a={words}")


def test_a_damaged_file_is_known_before_the_model_is_loaded(adapted: Adapted, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.write_bytes(b"nothing")
    found = run("serve", str(adapted.artifact), "--adapter", f"a={damaged}", "--port", "0")
    assert found.returncode == 2 and len(found.stderr.splitlines()) == 1, found.stderr
    assert "is no adapter that ONNX Runtime reads" in found.stderr


def test_adapters_of_several_models(adapted: Adapted) -> None:
    models = [ModelSettings(adapted.artifact, name) for name in ("one", "two")]
    with pytest.raises(UserError, match="style is an adapter of two and of one: serve them apart"):
        Models([Engine(settings) for settings in models])
    given = ModelSettings(adapted.artifact, "one", LoadOptions(adapters={"words": adapted.words}))
    assert list(Models([Engine(given)]).served) == ["one", "style", "tools", "words"]
