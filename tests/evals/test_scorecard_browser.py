"""The scorecard's page in a real headless Chromium: filters, keys, pictures, sounds, light and dark."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from core_llm import provenance
from core_llm.chat import Audio, Image, Message, Text
from evals import report, results
from evals.runner import evaluate
from evals.tasks import Options, Sample, Task, scoring

pytestmark = pytest.mark.browser

ROWS = 60
CONTRAST = """
const rgb = c => c.match(/[\\d.]+/g).map(Number);
const channel = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = c => { const [r, g, b] = rgb(c).map(channel); return 0.2126 * r + 0.7152 * g + 0.0722 * b };
const behind = e => {
  for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor;
    if (rgb(c).length < 4 || rgb(c)[3] > 0) return c;
  }
  return "rgb(255, 255, 255)";
};
const kinds = ["h2", ".tile .name", ".tile .metric", ".tile .beside", "td", "th", ".note", ".badge.good",
  ".badge.bad", ".facts", ".sample dt", ".sample dd", "nav a", "#count", "svg text", "kbd", "#next"];
return kinds.flatMap(kind => {
  const e = document.querySelector(kind);
  if (!e) return [];
  const style = getComputedStyle(e), ink = kind === "svg text" ? style.fill : style.color;
  const [a, b] = [light(ink), light(behind(e))].sort((x, y) => y - x);
  return [(a + 0.05) / (b + 0.05)];
});
"""


def _samples() -> list[Sample]:
    tone = np.sin(np.arange(1600) / 5).astype(np.float32)
    rows = []
    for i in range(ROWS):
        part = (
            Image(PIL.Image.new("RGB", (64, 64), (i * 4, 80, 80)))
            if i % 2
            else Audio(tone * (i + 1) / 60, 16_000)
        )
        kind = "seen" if i % 2 else "heard"
        rows.append(
            Sample(f"row-{i}", f"row-{i}", (Message("user", (part, Text(f"what is {i}?"))),), str(i), kind)
        )
    return rows


@pytest.fixture(scope="module")
def page(fake: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Address of a report: every third row is answered wrongly, one with markup in it."""

    def reply(messages: Sequence[Message]) -> str:
        number = int(messages[-1].text.split()[2].rstrip("?"))
        return "<b>nothing</b>" if number % 3 == 0 else str(number)

    task = Task(
        "mixed", "Rows with media", "speech", ("core",), "here", "own", ("accuracy",), "generate",
        lambda options: _samples(), scoring.answer,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("page")
    evaluation = evaluate(task, fake(reply), Options(), folder / "records")
    entry = results.entry(evaluation, provenance.collect("fake", {}, 0))
    return report.write(folder, [entry], [evaluation]).as_uri()


def cards(browser: Any) -> list[Any]:
    return list(browser.find_elements("css selector", ".sample"))


def press(browser: Any, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    for key in keys:
        ActionChains(browser).send_keys(key).perform()


def wait_for_count(browser: Any, text: str) -> None:
    """Until the page says how many rows it shows."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 10).until(
        lambda b: b.find_element("id", "count").text == text,
        f"not {text}: {browser.find_element('id', 'count').text}",
    )


def test_failures_and_kinds_are_filtered(browser: Any, page: str) -> None:
    from selenium.webdriver.support.ui import Select

    browser.get(page)
    wait_for_count(browser, f"{ROWS} rows")
    browser.find_element("id", "failures").click()
    wait_for_count(browser, "20 rows")
    assert all("wrong" in card.get_attribute("class") for card in cards(browser))
    assert "<b>nothing</b>" in cards(browser)[0].text  # shown as text, not as markup
    Select(browser.find_element("id", "kind")).select_by_visible_text("seen")
    wait_for_count(browser, "10 rows")
    assert all(card.find_elements("tag name", "img") for card in cards(browser))
    browser.find_element("id", "query").send_keys("what is 33?")
    wait_for_count(browser, "1 row")
    browser.find_element("id", "query").send_keys(" never")
    wait_for_count(browser, "0 rows")
    assert not cards(browser)


def test_images_are_seen_and_sounds_can_be_played(browser: Any, page: str) -> None:
    browser.get(page)
    shown = (
        "return [...document.querySelectorAll('.sample img')].every(i => i.complete && i.naturalWidth === 64)"
    )
    assert browser.find_elements("css selector", ".sample img")
    browser.execute_script("for (const i of document.querySelectorAll('img')) i.loading = 'eager'")
    browser.set_script_timeout(20)
    decoded = browser.execute_async_script(
        "const done = arguments[0], a = document.querySelector('.sample audio');"
        "a.onloadedmetadata = () => done(a.duration); a.onerror = () => done(-1);"
        "a.preload = 'auto'; a.load();"
    )
    assert decoded == pytest.approx(0.1, abs=0.03)
    decode = "return Promise.all([...document.querySelectorAll('.sample img')].map(i => i.decode()))"
    browser.execute_script(decode)
    assert browser.execute_script(shown)


def test_everything_is_reached_by_keys(browser: Any, page: str) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.get(page)
    press(browser, "n")
    assert browser.find_element("id", "page").text == "2 / 3"
    press(browser, "p", "f")
    wait_for_count(browser, "20 rows")
    press(browser, "/", "3", "3", Keys.ESCAPE, "f")
    wait_for_count(browser, "1 row")
    press(browser, "/", Keys.BACKSPACE, Keys.BACKSPACE, Keys.ESCAPE)
    focused = "return document.activeElement.getAttribute('aria-label')"
    browser.execute_script("document.querySelector('.sample').focus()")
    first = browser.execute_script(focused)
    press(browser, Keys.ARROW_RIGHT)
    second = browser.execute_script(focused)
    assert first != second and second.startswith("mixed, row-")
    press(browser, Keys.ENTER)
    assert browser.execute_script("return document.getElementById('large').open")
    press(browser, Keys.ESCAPE)
    assert not browser.execute_script("return document.getElementById('large').open")
    press(browser, Keys.ARROW_LEFT)
    browser.execute_script(
        "document.activeElement.querySelector('audio').onplay = () => document.title = 'played'"
    )
    press(browser, Keys.SPACE)
    browser.set_script_timeout(10)
    browser.execute_async_script("setTimeout(arguments[0], 400)")
    assert browser.title == "played"


def _contrast(browser: Any) -> list[float]:
    """WCAG contrast of the text of each kind of element against the ground behind it."""
    return list(browser.execute_script(CONTRAST))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_light_and_dark(browser: Any, page: str, scheme: str) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    browser.get(page)
    found = _contrast(browser)
    assert len(found) >= 14
    assert min(found) >= 4.5  # WCAG 2.2, level AA
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 200) == (scheme == "dark")


def test_a_narrow_window_needs_no_sideways_scrolling_and_nothing_fails(browser: Any, page: str) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True},
    )
    browser.get(page)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not severe


def test_the_page_reads_nothing_else(browser: Any, page: str) -> None:
    browser.get(page)
    names = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in names if not name.startswith("data:")] == []
    assert Path(page.removeprefix("file://")).stat().st_size < 5_000_000
