"""The web page in Chromium, as tests use it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from tests.support.waiting import PATIENCE

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium and chromedriver: apt-get install chromium chromium-driver"
)


@contextmanager
def chromium(*arguments: str) -> Iterator[Chrome]:
    """A browser without a window, whose log can be read."""
    options = ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for argument in ("--headless=new", "--no-sandbox", *arguments):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=Service(DRIVER))
    driver.set_script_timeout(PATIENCE)
    yield driver
    driver.quit()


def open_page(browser: Chrome, url: str) -> None:
    browser.get(url)
    until(browser, lambda: by_id(browser, "model").text not in ("", "qwen-edge"))


def until(browser: Chrome, holds: Callable[[], object]) -> None:
    """Drawn again between two looks is not yet there."""
    drawn_again = (StaleElementReferenceException,)
    WebDriverWait(browser, PATIENCE, 0.05, ignored_exceptions=drawn_again).until(lambda _: holds())


def by_id(browser: Chrome, name: str) -> WebElement:
    return browser.find_element(By.ID, name)


def articles(browser: Chrome, role: str) -> list[WebElement]:
    return browser.find_elements(By.CSS_SELECTOR, f"article.{role}")


def ask(browser: Chrome, text: str) -> str:
    count = len(articles(browser, "assistant"))
    by_id(browser, "text").send_keys(text, Keys.ENTER)
    until(browser, lambda: len(browser.find_elements(By.CSS_SELECTOR, "article.assistant footer")) > count)
    return articles(browser, "assistant")[-1].text


def said(browser: Chrome) -> list[str]:
    return browser.execute_script(
        "return [...document.querySelectorAll('article.user .said')].map((node) => node.innerText)"
    )


def click(browser: Chrome, selector: str) -> None:
    """As a finger would, once it is to be seen."""

    def clicked() -> bool:
        found = browser.find_elements(By.CSS_SELECTOR, selector)
        if not found or not found[0].is_displayed():
            return False
        found[0].click()
        return True

    until(browser, clicked)


def kept(browser: Chrome) -> list[str]:
    """Titles of the chats that the browser keeps."""
    return browser.execute_async_script(
        """const done = arguments[0];
        import("/history.js").then(({ list }) => list()).then((found) =>
          done(found.map((chat) => chat.title)));"""
    )


def stop_at_once(browser: Chrome, text: str) -> None:
    """Ask, and stop in the same moment: no token can have come."""
    by_id(browser, "text").send_keys(text)
    browser.execute_script("document.getElementById('send').click(); document.getElementById('stop').click()")
    until(browser, lambda: articles(browser, "failed"))


def shown(browser: Chrome, *texts: str) -> str:
    """The HTML of one answer that grew from text to text."""
    return browser.execute_async_script(
        """const [texts, done] = arguments;
        Promise.all([import("/markdown.js"), import("/dom.js")]).then(([{ Markdown }]) => {
          const markdown = new Markdown();
          for (const text of texts) markdown.show(text);
          document.getElementById("log").append(markdown.node);
          done([...markdown.node.children].map((block) => block.innerHTML.trim()).join(""));
        });""",
        texts,
    )
