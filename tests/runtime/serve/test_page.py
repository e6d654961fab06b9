"""The web page in a real headless Chromium, on a real server and the trained checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
from qwen_profiles.schema import load_profile
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from benchmarks.support.checkpoints import TINY_VL
from tests.checkpoints.drawings import drawing
from tests.support.exported import Exported
from tests.support.pages import (
    articles,
    ask,
    by_id,
    click,
    kept,
    needs_chromium,
    open_page,
    said,
    shown,
    stop_at_once,
    until,
)
from tests.support.servers import Server, serving

pytestmark = needs_chromium


def test_a_conversation_with_the_keyboard_alone(page: Chrome) -> None:
    assert page.switch_to.active_element == by_id(page, "text")
    first = ask(page, "What is yield?")
    assert len(first) > 40 and "a second, first after" in first
    ask(page, "Explain numbers.")
    assert said(page) == ["What is yield?", "Explain numbers."]
    assert page.switch_to.active_element == by_id(page, "text")
    by_id(page, "new").click()
    assert not articles(page, "user") and by_id(page, "greeting").is_displayed()


def test_stop_keeps_what_was_written(page: Chrome) -> None:
    by_id(page, "text").send_keys("Explain classes.", Keys.ENTER)
    until(page, lambda: articles(page, "assistant") and articles(page, "assistant")[-1].text)
    page.find_element(By.TAG_NAME, "body").send_keys(Keys.ESCAPE)
    until(page, lambda: by_id(page, "send").is_displayed())
    assert articles(page, "assistant")[-1].text


def test_a_question_stopped_at_once_stays(page: Chrome) -> None:
    """And can be answered yet, now or after a reload, or be followed by another."""
    stop_at_once(page, "What is yield?")
    assert said(page) == ["What is yield?"] and not articles(page, "assistant")
    until(page, lambda: kept(page)[0] == "What is yield?")
    open_page(page, page.current_url)
    by_id(page, "open-history").click()
    click(page, "#chats button")
    click(page, "article.failed button")
    until(page, lambda: page.find_elements(By.CSS_SELECTOR, "article.assistant footer"))
    assert said(page) == ["What is yield?"] and not articles(page, "failed")
    stop_at_once(page, "Explain numbers.")
    ask(page, "Explain classes.")
    assert said(page) == ["What is yield?", "Explain numbers.", "Explain classes."]


def test_regenerate_and_edit(page: Chrome) -> None:
    """Nothing is lost: an answer stays where no new one comes, and an edited chat is kept as it was."""
    ask(page, "What is yield?")
    page.execute_script(
        """document.querySelector(".again").click(); document.getElementById("stop").click()"""
    )
    until(page, lambda: page.find_elements(By.CSS_SELECTOR, "article.assistant footer"))
    click(page, ".again")
    until(page, lambda: page.find_elements(By.CSS_SELECTOR, "article.assistant:not(.working) footer"))
    assert said(page) == ["What is yield?"] and len(articles(page, "assistant")) == 1
    ask(page, "Explain numbers.")
    before = kept(page)
    click(page, "article.user footer button")
    editor = page.switch_to.active_element
    assert editor.get_attribute("aria-label") == "Edit your question"
    editor.send_keys(Keys.ESCAPE)
    assert page.switch_to.active_element.text == "Edit" and said(page)[0] == "What is yield?"
    page.switch_to.active_element.click()
    page.switch_to.active_element.send_keys(" And classes?", Keys.ENTER)
    until(page, lambda: page.find_elements(By.CSS_SELECTOR, "article.assistant footer"))
    assert said(page) == ["What is yield? And classes?"]
    until(page, lambda: kept(page) == ["What is yield? And classes?", *before])


def test_an_edit_stops_the_answer_that_is_written(page: Chrome) -> None:
    """What was written by then is kept with the chat as it was."""
    by_id(page, "text").send_keys("Explain classes.", Keys.ENTER)
    until(page, lambda: articles(page, "assistant") and articles(page, "assistant")[-1].text)
    page.execute_script("document.querySelector('article.user footer button').click()")
    until(page, lambda: page.switch_to.active_element.get_attribute("aria-label") == "Edit your question")
    page.switch_to.active_element.send_keys(" Now.", Keys.ENTER)
    until(page, lambda: page.find_elements(By.CSS_SELECTOR, "article.assistant footer"))
    assert said(page) == ["Explain classes. Now."] and len(articles(page, "assistant")) == 1
    until(page, lambda: sorted(kept(page)[:2]) == ["Explain classes.", "Explain classes. Now."])


def test_chats_are_kept_until_they_are_deleted(page: Chrome) -> None:
    for text in ("What is yield?", "Explain numbers."):
        ask(page, text)
        by_id(page, "new").click()
    until(page, lambda: kept(page)[:2] == ["Explain numbers.", "What is yield?"])
    by_id(page, "open-history").click()
    click(page, "#chats li:nth-child(2) button")
    until(page, lambda: said(page) == ["What is yield?"])
    assert not by_id(page, "history").is_displayed()
    by_id(page, "open-history").click()
    click(page, "#chats li:nth-child(2) button + button")
    until(page, lambda: not articles(page, "user"))
    until(page, lambda: kept(page)[0] == "Explain numbers.")
    click(page, "#delete-all")
    page.switch_to.alert.accept()
    until(page, lambda: by_id(page, "no-chats").is_displayed())
    click(page, "#keep")
    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    ask(page, "What is yield?")
    assert kept(page) == []
    by_id(page, "open-history").click()
    click(page, "#keep")


def test_a_browser_that_keeps_nothing_is_no_error(browser: Chrome, server: Server) -> None:
    script = """
      for (const name of ["indexedDB", "localStorage", "sessionStorage"])
        Object.defineProperty(window, name, { get() { throw new DOMException("no", "SecurityError"); } });"""
    added = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})
    try:
        open_page(browser, server.url)
        assert ask(browser, "What is yield?")
        by_id(browser, "open-history").click()
        until(browser, lambda: by_id(browser, "not-kept").is_displayed())
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


def test_thoughts_are_folded_away(page: Chrome) -> None:
    by_id(page, "open-settings").click()
    by_id(page, "think").click()
    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    by_id(page, "text").send_keys("What is yield?", Keys.ENTER)
    until(page, lambda: page.find_elements(By.CSS_SELECTOR, "article details"))
    details = page.find_element(By.CSS_SELECTOR, "article details")
    assert details.get_attribute("open") is None
    by_id(page, "new").click()


def test_two_models_and_thinking_by_default(
    browser: Chrome, exported: Exported, cpu_artifact: Path, tmp_path: Path
) -> None:
    """The page chooses the model, offers what it can, and thinks as the server does; then pictures."""
    item = drawing(1_000_000_003)
    item.image.save(tmp_path / "drawing.png")
    (tmp_path / "none.png").write_bytes(b"not an image")
    with serving(cpu_artifact, str(exported(TINY_VL, load_profile("cpu"))), "--think") as server:
        open_page(browser, server.url)
        assert by_id(browser, "think").is_selected() and not by_id(browser, "attach").is_displayed()
        Select(by_id(browser, "models")).select_by_visible_text("tiny-vl")
        until(browser, lambda: by_id(browser, "attach").is_displayed())
        browser.execute_script("document.getElementById('think').click()")
        by_id(browser, "file").send_keys(str(tmp_path / "none.png"))
        until(browser, lambda: "none.png is not an image" in by_id(browser, "status").text)
        by_id(browser, "file").send_keys(str(tmp_path / "drawing.png"))
        until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#images img"))
        assert ask(browser, item.question).startswith(item.answer)
        browser.refresh()
        open_page(browser, server.url)
        by_id(browser, "open-history").click()
        click(browser, "#chats button")
        until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, ".said img"))
        until(browser, lambda: by_id(browser, "models").get_attribute("value") == "tiny-vl")


def test_how_far_a_prompt_is_read(page: Chrome) -> None:
    """A stream in pieces that a network makes, as the client of the API reads it."""
    stream = (
        ": prompt: 512 of 9000 tokens\n\n"
        'data: {"choices": [{"delta": {"content": "\u00fc"}}]}\n\ndata: [DONE]\n\n'
    )
    found = page.execute_async_script(
        """const [stream, done] = arguments;
        const bytes = new TextEncoder().encode(stream);
        window.fetch = async () => new Response(new ReadableStream({ start(controller) {
          for (const byte of bytes) controller.enqueue(new Uint8Array([byte]));
          controller.close();
        } }));
        import("/api.js").then(async ({ chat }) => {
          const found = [];
          for await (const chunk of chat({}, "")) found.push(chunk);
          done(found);
        });""",
        stream,
    )
    assert found == [{"read": 512, "of": 9000}, {"choices": [{"delta": {"content": "\u00fc"}}]}]


@pytest.mark.parametrize("width", [390, 800, 1280])
def test_everything_fits(page: Chrome, width: int) -> None:
    """Name and buttons are whole, in one row, and nothing makes the page wider than the screen."""
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    try:
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        for name in ("model", "new", "open-history", "open-settings", "send"):
            box = by_id(page, name)
            assert box.is_displayed() and box.rect["x"] + box.rect["width"] <= width, name
            assert box.get_property("scrollWidth") <= box.get_property("clientWidth") + 2, name
        assert by_id(page, "name").rect["width"] > 150
        assert page.find_element(By.TAG_NAME, "header").rect["height"] < 70
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_kiosk_forgets_when_nobody_is_there(browser: Chrome, server: Server) -> None:
    open_page(browser, f"{server.url}/?kiosk&idle=3&greeting=Welcome")
    before = kept(browser)
    assert by_id(browser, "greeting").text == "Welcome"
    assert not by_id(browser, "open-settings").is_displayed()
    by_id(browser, "text").send_keys("What is yield?", Keys.ENTER)
    until(browser, lambda: articles(browser, "assistant"))
    until(browser, lambda: not articles(browser, "assistant"))
    assert by_id(browser, "greeting").is_displayed()
    assert not by_id(browser, "open-history").is_displayed() and kept(browser) == before
    assert shown(browser, "[a](https://a.example/) b") == "<p>a b</p>"


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


def test_a_key_is_asked_for(browser: Chrome, cpu_artifact: Path) -> None:
    with serving(cpu_artifact, "--api-key", "secret") as server:
        browser.get(server.url)
        until(browser, lambda: browser.switch_to.active_element == by_id(browser, "key"))
        assert by_id(browser, "key-wanted").is_displayed()
        browser.switch_to.active_element.send_keys("wrong", Keys.ENTER)
        until(browser, lambda: browser.switch_to.active_element == by_id(browser, "key"))
        by_id(browser, "key").clear()
        by_id(browser, "key").send_keys("secret", Keys.ENTER)
        until(browser, lambda: by_id(browser, "model").text == "tiny-dense")
        assert ask(browser, "What is yield?")
