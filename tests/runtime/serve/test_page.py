"""The web page in a real headless Chromium, on a real server and the trained checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from qwen_profiles.schema import load_profile
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from benchmarks.support.checkpoints import TINY_VL
from tests.checkpoints.drawings import drawing
from tests.support.exported import Exported
from tests.support.servers import Server, serving

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium and chromedriver: apt-get install chromium chromium-driver"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for argument in ("--headless=new", "--no-sandbox", "--window-size=1000,760"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Chrome, server: Server) -> Chrome:
    open_page(browser, server.url)
    return browser


def open_page(browser: Chrome, url: str) -> None:
    browser.get(url)
    until(browser, lambda: by_id(browser, "model").text not in ("", "qwen-edge"))


def until(browser: Chrome, holds: Callable[[], object], seconds: float = 30) -> None:
    WebDriverWait(browser, seconds, poll_frequency=0.05).until(lambda _: holds())


def by_id(browser: Chrome, name: str) -> WebElement:
    return browser.find_element(By.ID, name)


def articles(browser: Chrome, role: str) -> list[WebElement]:
    return browser.find_elements(By.CSS_SELECTOR, f"article.{role}")


def ask(browser: Chrome, text: str) -> str:
    count = len(articles(browser, "assistant"))
    by_id(browser, "text").send_keys(text, Keys.ENTER)
    until(browser, lambda: len(browser.find_elements(By.CSS_SELECTOR, "article footer")) > count)
    return articles(browser, "assistant")[-1].text


def test_a_conversation_with_the_keyboard_alone(page: Chrome) -> None:
    assert page.switch_to.active_element == by_id(page, "text")
    first = ask(page, "What is yield?")
    assert len(first) > 40 and "a second, first after" in first
    ask(page, "Explain numbers.")
    assert [item.text for item in articles(page, "user")] == ["What is yield?", "Explain numbers."]
    assert page.switch_to.active_element == by_id(page, "text")
    by_id(page, "new").click()
    assert not articles(page, "user") and by_id(page, "greeting").is_displayed()


def test_stop_keeps_what_was_written(page: Chrome) -> None:
    by_id(page, "text").send_keys("Explain classes.", Keys.ENTER)
    until(page, lambda: articles(page, "assistant") and articles(page, "assistant")[-1].text)
    page.find_element(By.TAG_NAME, "body").send_keys(Keys.ESCAPE)
    until(page, lambda: by_id(page, "send").is_displayed())
    assert articles(page, "assistant")[-1].text


def test_thoughts_are_folded_away(page: Chrome) -> None:
    page.execute_script("document.getElementById('think').checked = true")
    by_id(page, "text").send_keys("What is yield?", Keys.ENTER)
    until(page, lambda: page.find_elements(By.CSS_SELECTOR, "article details"))
    details = page.find_element(By.CSS_SELECTOR, "article details")
    assert details.get_attribute("open") is None
    by_id(page, "new").click()


def test_what_a_model_writes_is_only_text(page: Chrome) -> None:
    nodes = page.execute_async_script(
        """const done = arguments[arguments.length - 1];
        import("/markdown.js").then(({ markdown }) => {
          const div = document.createElement("div");
          div.append(...markdown(arguments[0]));
          done(div.innerHTML);
        });""",
        "# Title\n\n<script>alert(1)</script> **bold** `a<b`\n- one\n- *two*\n\n1. first\n\n"
        "[ok](https://example.org/) [bad](javascript:alert(1))\n```py\nx = 1 < 2",
    )
    assert nodes == (
        "<h3>Title</h3><p>&lt;script&gt;alert(1)&lt;/script&gt; <strong>bold</strong> <code>a&lt;b</code></p>"
        "<ul><li>one</li><li><em>two</em></li></ul><ol><li>first</li></ol>"
        '<p><a href="https://example.org/" target="_blank" rel="noopener noreferrer">ok</a> '
        "[bad](javascript:alert(1))</p><pre><code>x = 1 &lt; 2</code></pre>"
    )


def test_kiosk_forgets_when_nobody_is_there(browser: Chrome, server: Server) -> None:
    open_page(browser, f"{server.url}/?kiosk&idle=1&greeting=Welcome")
    assert by_id(browser, "greeting").text == "Welcome"
    assert not by_id(browser, "open-settings").is_displayed()
    by_id(browser, "text").send_keys("What is yield?", Keys.ENTER)
    until(browser, lambda: articles(browser, "assistant"))
    until(browser, lambda: not articles(browser, "assistant"))
    assert by_id(browser, "greeting").is_displayed()


def test_it_asks_no_other_host_and_breaks_no_rule(browser: Chrome, server: Server) -> None:
    browser.get_log("performance"), browser.get_log("browser")
    open_page(browser, server.url)
    ask(browser, "What is yield?")
    urls = [
        entry["message"].partition('"url":"')[2].partition('"')[0]
        for entry in browser.get_log("performance")
        if "Network.requestWillBeSent" in entry["message"]
    ]
    urls = [url for url in urls if url.startswith("http")]
    assert urls and all(url.startswith(server.url) for url in urls)
    assert browser.get_log("browser") == []


def test_pictures(browser: Chrome, exported: Exported, tmp_path: Path) -> None:
    """The button is there for a model that sees, and the answer is right."""
    item = drawing(1_000_000_003)
    item.image.save(tmp_path / "drawing.png")
    (tmp_path / "none.png").write_bytes(b"not an image")
    with serving(exported(TINY_VL, load_profile("cpu"))) as server:
        open_page(browser, server.url)
        assert by_id(browser, "attach").is_displayed()
        by_id(browser, "file").send_keys(str(tmp_path / "none.png"))
        until(browser, lambda: "none.png is not an image" in by_id(browser, "status").text)
        by_id(browser, "file").send_keys(str(tmp_path / "drawing.png"))
        until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#images img"))
        assert ask(browser, item.question).startswith(item.answer)


def test_a_key_is_asked_for(browser: Chrome, cpu_artifact: Path) -> None:
    with serving(cpu_artifact, "--api-key", "secret") as server:
        browser.get(server.url)
        until(browser, lambda: by_id(browser, "settings").is_displayed())
        by_id(browser, "key").send_keys("secret", Keys.ENTER)
        until(browser, lambda: by_id(browser, "model").text == "tiny-dense")
        assert ask(browser, "What is yield?")
