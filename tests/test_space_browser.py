"""Every tab of the Space used once as a person would, in a headless Chromium.

SPACE_SCREENSHOTS=/tmp/shots python -m pytest tests/test_space_browser.py     keeps a picture of each tab
SPACE_CHECKPOINTS=space/checkpoints ...                                       with the embedded models
"""

import os
import shutil
import sys
import time
from pathlib import Path
from urllib.parse import urlparse

import pytest

pytest.importorskip("gradio", reason="the Space needs pip install '.[space]'")
pytest.importorskip("playwright", reason="the browser test needs pip install playwright")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "space"))

import app
import generation
import handlers
import models
from playwright import sync_api
from test_space import folder  # noqa: F401  (a fixture)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here (apt-get install chromium)")
SECOND = 1000
PATIENCE = 60 * SECOND
INJECTION = (
    "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script> **b** [a](http://b.c)"
)


@pytest.fixture(scope="module")
def address(request):
    given = os.environ.get("SPACE_CHECKPOINTS")
    checkpoints = models.Checkpoints(given or request.getfixturevalue("folder"))
    demo = app.build(checkpoints)
    _, address, _ = demo.launch(prevent_thread_lock=True, quiet=True, **app.launch_options())
    yield address
    demo.close()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(PATIENCE)
    page.strangers = set()
    page.on("request", lambda request: page.strangers.add(urlparse(request.url).hostname))
    page.goto(address)
    page.get_by_role("tab", name="Chat").wait_for()
    yield page
    assert page.strangers <= {"127.0.0.1", "localhost", None, ""}, "the page has asked other servers"
    assert page.title() != "broken"
    page.close()


@pytest.fixture
def slow_steps(monkeypatch):
    """20 tokens a second, so that there is time to see a text grow and to stop it; the steps that were taken."""
    steps, original = [], generation.next_step

    def step(*arguments):
        time.sleep(0.05)
        steps.append(1)
        return original(*arguments)

    monkeypatch.setattr(generation, "next_step", step)
    return steps


def open_tab(page, name: str):
    page.get_by_role("tab", name=name).click()


def keep(page, name: str) -> None:
    if target := os.environ.get("SPACE_SCREENSHOTS"):
        Path(target).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(target, f"{name}.png"))


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def stands_still(steps) -> bool:
    before = len(steps)
    time.sleep(1)
    return len(steps) == before


def test_chat_streams_stops_and_retries(page, slow_steps):
    box = page.get_by_placeholder("Ask something")
    box.fill(INJECTION)
    box.press("Enter")
    answer = page.locator(".bot.message, .message.bot").last
    wait_until(lambda: len(slow_steps) > 4)
    early = answer.inner_text()
    wait_until(lambda: answer.inner_text() != early)
    keep(page, "chat")
    page.locator("button.stop-button, .stop-button").first.click()
    wait_until(lambda: stands_still(slow_steps))
    assert len(slow_steps) < 110
    count = len(slow_steps)
    page.get_by_label("Retry").first.click()
    wait_until(lambda: len(slow_steps) > count)


def test_chat_shows_text_as_text(page, monkeypatch):
    """What was asked and what was answered, while it grows and in the end."""

    def echo(*arguments):
        for end in range(1, len(INJECTION) + 1):
            time.sleep(0.02)
            yield INJECTION[:end], []

    monkeypatch.setattr(handlers, "write_text", echo)
    box = page.get_by_placeholder("Ask something")
    box.fill(INJECTION + " &lt;i&gt;")
    box.press("Enter")
    answer = page.get_by_test_id("bot").last
    grown = set()
    wait_until(lambda: grown.add(read(answer)) or INJECTION in grown)
    assert len(grown) > 2 and all(INJECTION.startswith(text) for text in grown)
    assert read(page.get_by_test_id("user").last) == INJECTION + " &lt;i&gt;"
    assert page.locator("img[src=x]").count() == 0


def read(message) -> str:
    """As the eye sees it, without the word joiners."""
    return message.inner_text().replace("\u2060", "").strip()


def test_an_edited_message_gets_another_answer(page):
    box = page.get_by_placeholder("Ask something")
    box.fill("the cat <b>sat</b>")
    box.press("Enter")
    page.get_by_label("Retry").first.wait_for()  # the answer's next piece would close the editor
    page.get_by_label("Edit").first.click()
    editor = page.locator('[aria-label="chatbot conversation"] textarea').first
    assert editor.input_value().replace("\u2060", "") == "the cat <b>sat</b>"
    editor.fill("the hat <i>sat</i>")
    page.get_by_label("Submit").first.click()
    wait_until(lambda: read(page.get_by_test_id("user").last) == "the hat <i>sat</i>")
    page.get_by_label("Retry").first.wait_for()
    assert page.get_by_test_id("user").count() == 1


def test_a_closed_tab_ends_its_work(page, slow_steps):
    open_tab(page, "Complete")
    page.get_by_role("button", name="Write", exact=True).click()
    wait_until(lambda: len(slow_steps) > 3)
    page.goto("about:blank")
    wait_until(lambda: stands_still(slow_steps))
    assert len(slow_steps) < 110


def test_complete_streams_stops_and_shows_alternatives(page, slow_steps):
    open_tab(page, "Complete")
    text = page.locator("#completion textarea")
    page.get_by_role("button", name="Write", exact=True).click()
    wait_until(lambda: len(slow_steps) > 5)
    early = text.input_value()
    wait_until(lambda: len(text.input_value()) > len(early))
    page.get_by_role("button", name="Stop", exact=True).click()
    wait_until(lambda: stands_still(slow_steps))
    assert len(slow_steps) < 110 and text.input_value().startswith("Once upon a time")
    page.locator(".textfield .token").nth(2).click()
    title = page.get_by_label("Alternatives")
    wait_until(lambda: "had a probability of" in title.input_value())
    keep(page, "complete")
    assert page.get_by_text("drawn", exact=True).count() >= 1


def test_spam_shows_probabilities_words_and_sorts_a_file(page, tmp_path):
    open_tab(page, "Spam or not")
    page.get_by_label("Message").fill("Win a FREE prize now! " + INJECTION)
    page.get_by_role("button", name="Spam or not?").click()
    note = page.get_by_label("How to read this")
    wait_until(lambda: "speak for" in note.input_value())
    assert page.get_by_text("<script>").count() >= 1
    keep(page, "spam")
    (tmp_path / "texts.csv").write_text("text\nhello there\n<b>you</b> have won\n")
    page.locator("input[type=file]").first.set_input_files(tmp_path / "texts.csv")
    page.get_by_text("texts.csv").first.wait_for()
    page.get_by_role("button", name="Sort the file").click()
    result = page.get_by_label("Result", exact=True)
    wait_until(lambda: result.input_value().startswith("2 rows: "))
    with page.expect_download() as download:
        page.locator("a[href*='results.csv']").first.click()
    assert "<b>you</b> have won" in Path(download.value.path()).read_text()


def test_look_inside_from_left_to_right(page):
    open_tab(page, "Look inside")
    page.get_by_label("Sentence").fill("The <b>king</b> said that the")
    page.get_by_role("button", name="Look", exact=True).click()
    count = page.get_by_label("Count")
    wait_until(lambda: "characters became" in count.input_value())
    keep(page, "tokens")
    open_tab(page, "2 Attention")
    page.locator(".js-plotly-plot .heatmaplayer image").first.wait_for()
    assert page.locator(".js-plotly-plot b").count() == 0
    keep(page, "attention")
    open_tab(page, "3 Layers")
    page.get_by_text("last layer").first.wait_for()
    keep(page, "layers")
    open_tab(page, "4 Next token")
    title = page.locator(".js-plotly-plot .gtitle").last
    wait_until(lambda: "can be drawn" in (title.text_content() or ""))
    page.get_by_label("number input for Top-k (0: all)").fill("3")
    wait_until(lambda: (page.locator(".js-plotly-plot .gtitle").last.text_content() or "").startswith("3 of "))
    keep(page, "next_token")
    open_tab(page, "5 Memory")
    page.get_by_role("button", name="Write 40 tokens").click()
    size = page.get_by_label("Size")
    wait_until(lambda: "Each new token adds" in size.input_value())
    early = size.input_value()
    wait_until(lambda: size.input_value() != early)
    keep(page, "memory")


def test_an_error_is_one_sentence_shown_as_text(page):
    open_tab(page, "Complete")
    model = page.get_by_label("Model").locator("visible=true").first
    model.fill("<img src=x onerror=\"document.title='broken'\">")
    model.press("Enter")
    page.get_by_role("button", name="Write", exact=True).click()
    page.get_by_text("is no model; choose one of the list").wait_for()
    assert page.locator("img[src=x]").count() == 0
