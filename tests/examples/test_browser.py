"""examples/browser in a real headless Chromium: ids, tokens and answers are those of `qwen_runtime`."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from qwen_profiles.schema import load_profile
from qwen_runtime import Model, Sampling
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from benchmarks.support.checkpoints import TINY, TINY_MOE, TINY_VL
from tests.support.exported import Exported
from tests.support.pages import chromium, needs_chromium, until

EXAMPLE = Path(__file__).parents[2] / "examples" / "browser"
NPM = shutil.which("npm")
pytestmark = [
    needs_chromium,
    pytest.mark.skipif(not NPM, reason="no npm: apt-get install npm"),
]
# What npm says where it reaches no registry.
NO_NETWORK = ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ETIMEDOUT", "ENETUNREACH", "ENOTCACHED")
QUESTION = "What is yield?"
CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": QUESTION}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "  two\n\n\nlines\t and spaces  "},
    ],
    [
        {"role": "user", "content": "naïve café, Zürich, 東京, 🙂👍🏽, e\u0301, x'll don't 12345 1,000"},
        {"role": "assistant", "content": "<think>\nwell\n</think>\n\nAn *answer* with </think> in it"},
        {"role": "user", "content": "def f(x):\r\n    return x**2  # <|im_end|> no end"},
    ],
]


class Handler(SimpleHTTPRequestHandler):
    """Python 3.11 takes the type of .mjs from the system, which may have none."""

    extensions_map: ClassVar = {**SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}

    def log_message(self, *_: object) -> None: ...


class Site:
    """The example's folder with its packages, served; artifacts are linked into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("node_modules"))
        command = [NPM or "", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode and any(code in done.stderr for code in NO_NETWORK):
            pytest.skip("npm reaches no registry")
        assert done.returncode == 0, done.stderr
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    def with_artifact(self, artifact: Path) -> str:
        link = self.folder / artifact.name
        if not link.exists():
            link.symlink_to(artifact)
        return artifact.name

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("browser") / "site")
    yield site
    site.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    with chromium("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader") as driver:
        yield driver


@pytest.fixture(scope="module")
def artifact(exported: Exported) -> Path:
    return exported(TINY, load_profile("browser"))


def text_of(browser: Chrome, name: str) -> str:
    return browser.find_element(By.ID, name).text


def opened(browser: Chrome, site: Site, query: str) -> str:
    """The page at `query`, until it is ready or has failed; what it says then."""
    browser.get(f"{site.url}?{query}")
    failed = 'return document.getElementById("status").className === "error"'
    until(browser, lambda: browser.find_element(By.ID, "text").is_enabled() or browser.execute_script(failed))
    return text_of(browser, "status")


def result(browser: Chrome, script: str, *arguments: object) -> Any:
    """What `script`, the body of an asynchronous function of `parameters`, returns.

    It is asked for again and again: selenium gives a single request up after two minutes.
    """
    browser.execute_script(
        f"""window.outcome = null;
        (async (...parameters) => {{ {script} }})(...arguments).then(
          (value) => {{ window.outcome = {{ value }}; }},
          (error) => {{ window.outcome = {{ error: error.message }}; }});""",
        *arguments,
    )
    until(browser, lambda: browser.execute_script("return window.outcome"))
    outcome = browser.execute_script("return window.outcome")
    assert "error" not in outcome, outcome
    return outcome["value"]


def tokens_in_the_browser(browser: Chrome, name: str, provider: str, count: int) -> tuple[list[int], str]:
    """Greedy tokens by model.js, without the page, and their text."""
    found = result(
        browser,
        """const [name, provider, question, maxTokens] = parameters;
        const { Model } = await import("./model.js");
        const model = await Model.load(new URL(`${name}/`, location.href), { provider });
        const ids = model.prompt([{ role: "user", content: question }]);
        const tokens = [];
        let text = "";
        for await (const piece of model.answer(ids, { maxTokens, sampling: { temperature: 0 } })) {
          tokens.push(piece.token);
          text += piece.text;
        }
        return { tokens, text, provider: model.provider };""",
        name,
        provider,
        QUESTION,
        count,
    )
    assert found["provider"] == {"webgpu": "WebGPU", "wasm": "CPU (WebAssembly)"}[provider]
    return found["tokens"], found["text"]


def tokens_of_qwen_run(artifact: Path, count: int) -> tuple[list[int], str]:
    with Model.load(artifact, "cpu") as model:
        answer = model.generate(CONVERSATIONS[0], max_tokens=count, sampling=Sampling(temperature=0))
        text = "".join(answer)
        return list(answer.tokens), text


@pytest.mark.parametrize(
    "checkpoint, provider",
    [
        (TINY, "wasm"),
        pytest.param(TINY_MOE, "wasm", marks=pytest.mark.slow),
        pytest.param(TINY, "webgpu", marks=pytest.mark.slow),
        pytest.param(TINY_MOE, "webgpu", marks=pytest.mark.slow),
    ],
    ids=["dense, WebAssembly", "experts, WebAssembly", "dense, WebGPU", "experts, WebGPU"],
)
def test_tokens(browser: Chrome, site: Site, exported: Exported, checkpoint: Path, provider: str) -> None:
    """WebGPU on SwiftShader takes about half a second for each."""
    artifact = exported(checkpoint, load_profile("browser"))
    browser.get(site.url)
    found = tokens_in_the_browser(browser, site.with_artifact(artifact), provider, 24)
    assert found == tokens_of_qwen_run(artifact, 24)


def test_prompts_are_those_of_qwen_run(browser: Chrome, site: Site, artifact: Path) -> None:
    browser.get(site.url)
    found = result(
        browser,
        """const [name, conversations] = parameters;
        const { Model } = await import("./model.js");
        const model = await Model.load(new URL(`${name}/`, location.href), { provider: "wasm" });
        return conversations.flatMap((messages) =>
          [false, true].map((thinking) => model.prompt(messages, { thinking })));""",
        site.with_artifact(artifact),
        CONVERSATIONS,
    )
    with Model.load(artifact, "cpu") as model:
        expected = [
            list(model.encode(model.apply_chat_template(messages, thinking)))
            for messages in CONVERSATIONS
            for thinking in (False, True)
        ]
    assert found == expected


# As a person would who has read enough of an answer.
STOP_SOON = """new MutationObserver(() => {
  const text = document.querySelector("article.assistant:last-of-type")?.textContent ?? "";
  if (text.length > 20) document.getElementById("stop").click();
}).observe(document.getElementById("conversation"), { childList: true, subtree: true });"""


def test_a_conversation_on_the_page(browser: Chrome, site: Site, artifact: Path) -> None:
    """Answers come piece by piece and are stopped; the next turn knows them; no other host is asked."""
    browser.get_log("performance"), browser.get_log("browser")
    opened(browser, site, f"artifact={site.with_artifact(artifact)}&provider=wasm&temperature=0")
    assert text_of(browser, "model") == "tiny-dense" and "WebAssembly" in text_of(browser, "provider")
    browser.execute_script(STOP_SOON)
    box, stop = browser.find_element(By.ID, "text"), browser.find_element(By.ID, "stop")
    messages = []
    with Model.load(artifact, "cpu") as model:
        for count, question in enumerate([QUESTION, "Explain numbers."], 1):
            messages.append({"role": "user", "content": question})
            box.send_keys(question, Keys.ENTER)
            until(browser, lambda count=count: len(answers(browser)) == count and not stop.is_displayed())
            stopped = answers(browser)[-1]
            whole = "".join(model.generate(messages, max_tokens=60, sampling=Sampling(temperature=0)))
            assert 20 < len(stopped) < len(whole) and whole.startswith(stopped)
            messages.append({"role": "assistant", "content": stopped})
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert urls and all(url.startswith((site.url, "blob:", "data:")) for url in urls)
    assert browser.get_log("browser") == []


def answers(browser: Chrome) -> list[str]:
    script = 'return Array.from(document.querySelectorAll("article.assistant"), (item) => item.textContent)'
    return list(browser.execute_script(script))


def test_a_device_without_float16_leaves_the_answer_to_webassembly(
    browser: Chrome, site: Site, exported: Exported
) -> None:
    said = opened(browser, site, f"artifact={site.with_artifact(exported(TINY, load_profile('webgpu')))}")
    assert said == "the graphics device has no float16, in which the artifact was exported"
    assert "WebAssembly" in text_of(browser, "provider")


def test_errors_say_what_to_do(
    browser: Chrome, site: Site, artifact: Path, exported: Exported, tmp_path: Path
) -> None:
    assert "artifact's address right?" in opened(browser, site, "artifact=nothing")
    assert opened(browser, site, "provider=cuda") == "no provider 'cuda': there are webgpu and wasm"
    cut = shutil.copytree(artifact, tmp_path / "cut")
    data = (cut / "model.onnx.data").read_bytes()
    (cut / "model.onnx.data").write_bytes(data[:-1])
    said = opened(browser, site, f"artifact={site.with_artifact(cut)}&provider=wasm")
    assert said == "model.onnx.data is not as its manifest says: copy the artifact to the server again"
    seeing = exported(TINY_VL, load_profile("webgpu"))
    assert "export with --text-only" in opened(browser, site, f"artifact={site.with_artifact(seeing)}")
    browser.get_log("browser")
