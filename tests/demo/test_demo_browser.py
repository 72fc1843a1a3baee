"""The demo in a real headless Chromium, with the bundled nano family. Run with `make test-browser`."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

pytestmark = pytest.mark.browser

WAIT = 60  # seconds for anything to appear


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The running app."""
    from demo.app import build, launch
    from evals.models import load_assistant, load_guard

    app = build(load_assistant("nano"), load_guard("nano"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    yield launch(app, "127.0.0.1", port, wait=False)
    app.close()


def find(browser: Any, css: str) -> Any:
    """The first element that matches, as soon as there is one."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, WAIT).until(lambda b: b.find_elements(By.CSS_SELECTOR, css))[0]


def open_tab(browser: Any, name: str) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def click(b: Any) -> bool:
        tabs = [
            tab for tab in b.find_elements(By.CSS_SELECTOR, "button[role=tab]") if tab.text.strip() == name
        ]
        for tab in tabs:
            tab.click()
        return bool(tabs)

    WebDriverWait(browser, WAIT).until(click)


def answer(browser: Any) -> str:
    """The last answer, once it no longer changes."""
    from selenium.webdriver.common.by import By

    deadline, seen = time.monotonic() + WAIT, ""
    while time.monotonic() < deadline:
        bubbles = browser.find_elements(By.CSS_SELECTOR, "#chat-log .bot")
        text = bubbles[-1].text.strip() if bubbles else ""
        if text and text == seen and text != "…":
            return text
        seen = text
        time.sleep(0.7)
    raise AssertionError("no answer appeared")


def test_uploaded_image_is_seen(browser: Any, address: str, tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    picture = PIL.Image.new("RGB", (64, 64), (255, 245, 240))
    picture.paste((255, 0, 0), (20, 18, 44, 40))
    picture.save(tmp_path / "red.png")
    browser.get(address)
    find(browser, "#chat-input input[type=file]").send_keys(str(tmp_path / "red.png"))
    find(browser, "#chat-input .thumbnail-item, #chat-input img")
    box = find(browser, "#chat-input textarea")
    box.send_keys("what color is the shape?")
    box.send_keys(Keys.ENTER)
    assert answer(browser) == "red"


def test_moderation_draws_a_bar_per_category(browser: Any, address: str) -> None:
    from selenium.webdriver.common.by import By

    browser.get(address)
    open_tab(browser, "Moderation")
    find(browser, "#moderation-user textarea").send_keys("you are a stupid idiot, i will kill you.")
    find(browser, "#moderation-judge").click()
    assert find(browser, "#moderation-result .badge").text == "unsafe"
    assert len(browser.find_elements(By.CSS_SELECTOR, "#moderation-result .bar.category")) == 14


def test_scorecard_is_shown_and_the_page_has_no_errors(browser: Any, address: str) -> None:
    browser.get(address)
    open_tab(browser, "Scorecard")
    assert find(browser, "#scorecard-table").text
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not severe
