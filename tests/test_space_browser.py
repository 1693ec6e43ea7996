"""Every tab of the Space used once as a person would, in a headless Chromium.

SPACE_SCREENSHOTS=/tmp/shots python -m pytest tests/test_space_browser.py     keeps a picture of what it does
SPACE_CHECKPOINTS=space/checkpoints ...                                       with the embedded models
"""

# ruff: noqa: F811  (pytest passes imported fixtures by their names)

import os
import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlparse

import pytest

pytest.importorskip("gradio", reason="the Space needs pip install '.[space]'")
pytest.importorskip("playwright", reason="the browser test needs pip install playwright")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "space"))

import app
import classifier
import generation
import handlers
import models
import page as space_page
import turns
import walk
from playwright import sync_api
from test_space import folder  # noqa: F401  (a fixture)
from test_space_server import endless, wait_until  # noqa: F401  (the first is a fixture)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here (apt-get install chromium)"),
    pytest.mark.xdist_group("browser"),  # one server, one browser
]
SECOND = 1000
PATIENCE = 60 * SECOND
INJECTION = (
    "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script> **b** [a](http://b.c)"
)


@pytest.fixture(scope="module")
def address(request):
    given = os.environ.get("SPACE_CHECKPOINTS")
    checkpoints = models.Checkpoints(given or request.getfixturevalue("folder"))
    checkpoints.preload()
    demo = space_page.build(checkpoints)
    _, address, _ = demo.launch(prevent_thread_lock=True, quiet=True, **app.launch_options())
    yield address
    demo.close()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def visit(browser, address, width=1280, height=800, theme="light"):
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)
    page.set_default_timeout(PATIENCE)
    page.hosts, page.shot = set(), f"{theme}-{width}"
    page.on("request", lambda request: page.hosts.add(urlparse(request.url).hostname))
    page.goto(f"{address}?__theme={theme}")
    page.get_by_role("tab", name="Look inside").wait_for()
    return page


def leave(page) -> None:
    assert page.hosts <= {"127.0.0.1", "localhost", None, ""}, "the page has sent requests to other servers"
    assert page.title() != "broken"
    page.close()


@pytest.fixture
def page(browser, address):
    page = visit(browser, address)
    yield page
    leave(page)


def open_tab(page, name: str):
    page.get_by_role("tab", name=name, exact=True).click()


def keep(page, name: str) -> None:
    if target := os.environ.get("SPACE_SCREENSHOTS"):
        Path(target).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(target, f"{page.shot}-{name}.png"))


def stop(page) -> None:
    page.get_by_role("button", name="Stop", exact=True).locator("visible=true").click()


def wait_until_it_grows(text) -> None:
    """The page can only stop what it has begun to receive: earlier, it does not know the number of the event."""
    early = text.inner_text()
    wait_until(lambda: text.inner_text() != early)


def press(page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def press_until(page, name: str, condition) -> None:
    """Pressed again where the page has just replaced the button: an old one does nothing."""
    for _ in range(5):
        press(page, name)
        try:
            return wait_until(condition, seconds=10)
        except AssertionError:
            continue
    raise AssertionError(f"{name} does nothing")


def give_file(page, file: Path) -> None:
    """Given again where the page has just replaced the box: what an old box gets is lost."""
    for _ in range(5):
        page.locator("input[type=file]").first.set_input_files(file)
        try:
            return page.get_by_text(file.name).first.wait_for(timeout=10_000)
        except sync_api.TimeoutError:
            continue
    raise AssertionError(f"{file.name} does not appear")


def focused(page) -> str:
    return page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.tagName")


def message_box(page):
    return page.get_by_role("textbox", name="Message")


def heads(page):
    return page.locator("#heads button")


def test_the_page_opens_on_a_computed_walk(page):
    heads(page).first.wait_for()
    assert page.locator("#overview a").count() == 7
    assert "".join(page.locator("#step-tokens li").all_inner_texts()).startswith("O")
    for picture in (".vectors img", ".arcs path", "#ablation li", ".neurons", ".lens td", ".columns i"):
        assert page.locator(picture).count() > 0, picture
    assert "tokens can be drawn" in page.locator("#left").inner_text()
    assert page.get_by_text("What the prediction").count() == 0 and page.locator(".toast-body").count() == 0
    keep(page, "look_inside")


def test_a_walk_from_left_to_right(page):
    heads(page).first.wait_for()
    box = page.get_by_label("Sentence")
    box.fill("The <b>king</b> said that the")
    box.press("Enter")
    tokens = page.locator("#step-tokens li")
    wait_until(lambda: "<" in "".join(tokens.all_inner_texts()))
    assert page.locator(".arcs b, .chips b, .lens b").count() == 0
    layers = page.locator("#step-attention input[type=radio]")
    assert layers.count() == 2  # those of the model
    before = page.locator("#heads").inner_html()
    layers.first.check()
    wait_until(lambda: page.locator("#heads").inner_html() != before)
    heads(page).nth(2).click()
    wait_until(lambda: heads(page).nth(2).get_attribute("aria-pressed") == "true")
    assert "without head 3 of layer 1" in page.locator("#ablation").inner_text()
    wait_until(lambda: page.evaluate("document.activeElement.dataset.pick") == "head 2")
    token = page.locator(".arcs .token").nth(3)
    token.locator("rect").hover()
    assert token.locator("path").first.is_visible()
    assert not page.locator(".arcs .token").nth(2).locator("path").first.is_visible()
    box.fill("something else that has not been looked at")  # the steps stay with the sentence of the others
    page.get_by_label("number input for Top-k (0: all)").fill("3")
    page.get_by_label("number input for Top-k (0: all)").press("Tab")
    wait_until(lambda: page.locator("#left").inner_text().startswith("3 of "))
    press(page, "Write 40 tokens")
    text = page.locator("#step-cache textarea")
    wait_until(lambda: text.input_value().startswith("The <b>king</b> said that the") and len(text.input_value()) > 40)
    keep(page, "walk")


def test_a_preset_is_looked_at_and_a_long_sentence_says_what_is_left_out(page):
    heads(page).first.wait_for()
    page.get_by_role("button", name=walk.PRESETS[3]).click()
    wait_until(lambda: page.locator("#step-tokens li").first.inner_text().startswith("o"))
    page.get_by_label("Sentence").fill("cat " * 100)
    press(page, "Look")
    page.get_by_text("The walk shows the first 64 tokens").wait_for()
    assert page.locator("#step-tokens li").count() == 64


@pytest.mark.parametrize(
    ("message", "model", "reason"),
    [
        ("", "", "There is no text; type some first."),
        ("word " * 500, "", "shorten it."),
        ("Tell me", "../../etc", "is not the name of a model"),
        ("Tell me", "nobody/nothing", "could not be downloaded from the Hugging Face Hub"),
        ("Tell me", "folder: broken", "choose another."),
    ],
    ids=["empty", "long", "invalid", "offline", "folder"],
)
def test_a_refusal_ends_no_chat(page, message, model, reason):
    open_tab(page, "Chat")
    box = message_box(page)
    if model:
        page.get_by_text("Model and settings").locator("visible=true").click()
        choice = page.get_by_label("Model", exact=True).locator("visible=true")
        choice.fill(model)
        choice.press("Enter")
    box.fill(message)
    box.press("Enter")
    page.locator(".notice").locator("visible=true").filter(has_text=reason).first.wait_for()
    assert box.input_value() == message and box.is_enabled() and focused(page) == "TEXTAREA"
    if model:
        choice.fill("assistant")
        choice.press("Enter")
    box.fill("the cat")
    box.press("Enter")
    page.get_by_label("Retry").first.wait_for()
    assert box.input_value() == "" and page.get_by_test_id("user").count() == 1


def test_chat_streams_stops_and_retries(page, endless):
    open_tab(page, "Chat")
    box = message_box(page)
    box.fill(INJECTION)
    box.press("Enter")
    answer = page.get_by_test_id("bot").last
    wait_until(lambda: len(endless.steps) > 4)
    wait_until_it_grows(answer)
    assert box.is_enabled() and focused(page) == "TEXTAREA"
    stop(page)
    wait_until(lambda: len(endless.ended) == 1)
    page.get_by_label("Retry").first.click()
    wait_until(lambda: len(endless.begun) == 2)
    wait_until_it_grows(answer)
    stop(page)
    wait_until(lambda: len(endless.ended) == 2)
    assert page.get_by_role("button", name="Send").is_visible()


def test_chat_shows_text_as_text(page, monkeypatch):
    """What was asked and what was answered, while it grows and in the end."""

    shown = {INJECTION[:end]: threading.Event() for end in (10, 60, len(INJECTION))}

    def echo(*arguments):
        for text, event in shown.items():
            yield text, []
            event.wait(PATIENCE / SECOND)

    monkeypatch.setattr(turns, "SECONDS_A_TURN", 0)  # every piece is sent
    monkeypatch.setattr(handlers, "write_text", echo)
    open_tab(page, "Chat")
    box = message_box(page)
    box.fill(INJECTION + " &lt;i&gt;")
    box.press("Enter")
    answer = page.get_by_test_id("bot").last
    for text, event in shown.items():
        wait_until(lambda text=text: answer.count() and read(answer) == text.strip())
        event.set()
    page.get_by_label("Retry").first.wait_for()
    assert read(answer) == INJECTION
    assert read(page.get_by_test_id("user").last) == INJECTION + " &lt;i&gt;"
    assert page.locator("img[src=x]").count() == 0


def read(message) -> str:
    """As the eye sees it, without the word joiners."""
    return message.inner_text().replace("\u2060", "").strip()


def test_an_example_is_asked_and_an_edited_message_gets_another_answer(page):
    open_tab(page, "Chat")
    page.get_by_role("button", name=space_page.STARTERS[0]).click()
    wait_until(lambda: read(page.get_by_test_id("user").last) == space_page.STARTERS[0])
    page.get_by_label("Retry").first.wait_for()  # the answer's next piece would close the editor
    page.get_by_label("Edit").first.click()
    editor = page.locator('[aria-label="chatbot conversation"] textarea').first
    assert editor.input_value().replace("\u2060", "") == space_page.STARTERS[0]
    editor.fill("the hat <i>sat</i>")
    page.get_by_label("Submit").first.click()
    wait_until(lambda: read(page.get_by_test_id("user").last) == "the hat <i>sat</i>")
    page.get_by_label("Retry").first.wait_for()
    assert page.get_by_test_id("user").count() == 1


def test_a_closed_tab_ends_its_work(page, endless):
    open_tab(page, "Complete")
    press(page, "Write")
    wait_until(lambda: len(endless.steps) > 3)
    page.goto("about:blank")
    wait_until(lambda: endless.ended)


def test_a_text_grows_in_place_and_continues_with_an_alternative(page, endless):
    open_tab(page, "Complete")
    written, tokens = page.locator(".written"), page.locator(".written > [role=button]")
    press(page, "Write")
    wait_until(lambda: len(endless.steps) > 12)
    wait_until_it_grows(written)
    stop(page)
    wait_until(lambda: len(endless.ended) == 1)
    assert written.inner_text().startswith("Once upon a time")
    tokens.nth(2).focus()
    page.keyboard.press("ArrowRight")
    fourth = tokens.nth(3).get_attribute("data-pick")
    assert page.evaluate("document.activeElement.dataset.pick") == fourth
    page.keyboard.press("Enter")
    popover = page.locator(".popover")
    popover.wait_for()
    token, below = tokens.nth(3).bounding_box(), popover.bounding_box()
    assert 0 <= below["y"] - token["y"] < 60 and below["y"] + below["height"] > 0
    assert popover.get_by_text("drawn").count() == 1
    wait_until(lambda: page.evaluate("document.activeElement.closest('.popover') !== null"))
    keep(page, "complete")
    page.keyboard.press("Escape")
    wait_until(lambda: popover.count() == 0)
    wait_until(
        lambda: page.evaluate("document.activeElement.dataset.pick") == tokens.nth(3).get_attribute("data-pick")
    )
    tokens.nth(3).click()
    kept = [tokens.nth(n).inner_text() for n in range(3)]
    page.locator(".popover button.bar").first.click()
    wait_until(lambda: len(endless.begun) == 2 and popover.count() == 0 and tokens.count() > 6)
    assert [tokens.nth(n).inner_text() for n in range(3)] == kept
    stop(page)
    wait_until(lambda: len(endless.ended) == 2)


def test_a_text_that_ends_says_so_and_another_seed_writes_another(page, monkeypatch):
    original = generation.next_step

    def ending(model, seen, *arguments):
        step = original(model, seen, *arguments)
        length = 12 + seen[0, 0].item()
        return replace(step, token=model.config.eos_token_id) if seen.shape[1] > length else step

    monkeypatch.setattr(generation, "next_step", ending)
    open_tab(page, "Complete")
    page.get_by_label("Prompt").fill("T")
    press(page, "Write")
    written = page.locator(".written")
    written.get_by_text("the end").wait_for()
    first = written.inner_text()
    press(page, "Another seed")
    wait_until(lambda: written.inner_text() not in (first, ""))


def test_the_verdict_comes_before_the_words(page, monkeypatch):
    started, go_on, original = [], threading.Event(), classifier.attribution_steps

    def slow(*arguments):
        started.append(arguments[2])
        go_on.wait(PATIENCE / SECOND)
        yield from original(*arguments)

    monkeypatch.setattr(classifier, "attribution_steps", slow)
    open_tab(page, "Spam")
    box = page.get_by_label("Text message")
    box.fill("Win a FREE prize now! " + INJECTION)
    press(page, "Spam or not?")
    page.locator("#words .notice").wait_for()  # instead of the words of the first message
    wait_until(lambda: started)
    assert "FREE" not in page.locator("#words").inner_text()
    go_on.set()
    wait_until(lambda: "FREE" in page.locator("#words").inner_text())
    assert page.get_by_text("<script>").count() >= 1 and page.get_by_text("speaks for spam").count() == 1
    keep(page, "spam")
    box.fill("another text altogether")
    box.press("Enter")
    wait_until(lambda: started[-1] == "another text altogether")
    wait_until(lambda: "altogether" in page.locator("#words").inner_text())


@pytest.mark.parametrize(("delimiter", "encoding"), [(";", "cp1252"), ("\t", "utf-16")], ids=["semicolons", "tabs"])
def test_a_file_with_other_delimiters_is_sorted(page, tmp_path, delimiter, encoding):
    open_tab(page, "Spam")
    page.get_by_text("Many at once").click()
    content = "id;body;n\n1;hello thére;2\n2;;3\n3;<b>you</b> have won;4\n".replace(";", delimiter)
    (tmp_path / "texts.csv").write_bytes(content.encode(encoding))
    give_file(page, tmp_path / "texts.csv")
    column = page.get_by_label("Column of the texts")
    wait_until(lambda: column.input_value() == "body")
    press(page, "Sort the file")
    note = page.locator(".notice").locator("visible=true").filter(has_text="3 rows: ")
    note.wait_for()
    assert "1 without text" in note.inner_text()
    with page.expect_download() as download:
        page.get_by_text("Download the results").click()
    rows = Path(download.value.path()).read_text(encoding="utf-8").splitlines()
    assert rows[0] == "id,body,n,label,probability,note" and rows[2] == "2,,3,,,no text"
    assert rows[1].startswith("1,hello thére,2,") and "<b>you</b> have won" in rows[3]


def test_the_sample_file_is_sorted(page):
    open_tab(page, "Spam")
    page.get_by_text("Many at once").click()
    column = page.get_by_label("Column of the texts")
    press_until(page, "A sample file", lambda: column.input_value() == "message")
    press(page, "Sort the file")
    page.locator(".notice").locator("visible=true").filter(has_text="5 rows: ").wait_for()


def test_a_file_without_a_column_of_texts_is_asked_about(page, tmp_path):
    open_tab(page, "Spam")
    page.get_by_text("Many at once").click()
    (tmp_path / "texts.csv").write_text("a,b\n1,hello\n")
    give_file(page, tmp_path / "texts.csv")
    press(page, "Sort the file")
    page.get_by_text("choose the column of the texts from a, b.").wait_for()
    column = page.get_by_label("Column of the texts")
    column.fill("b")
    column.press("Enter")
    press(page, "Sort the file")
    page.locator(".notice").locator("visible=true").filter(has_text="1 row: 1 ").wait_for()


def test_sentences_of_the_page_name_what_stands_on_it(page):
    """No names of the code, no halves of a character, no plural of one."""
    heads(page).first.wait_for()
    page.get_by_label("Sentence").fill("😀")
    press(page, "Look")
    tokens = page.locator("#step-tokens li")
    wait_until(lambda: tokens.count() == 4)  # one for each byte
    assert "\ufffd" not in page.content() and "1 character →" in page.locator("#overview").inner_text()
    open_tab(page, "Complete")
    page.get_by_text("Model and settings").locator("visible=true").click()
    page.get_by_label("Model", exact=True).locator("visible=true").first.click()
    offered = page.get_by_role("option").all_inner_texts()
    assert offered and not any("broken" in name or "spam" in name for name in offered)
    page.keyboard.press("Escape")
    page.get_by_label("Seed").fill("")
    press(page, "Write")
    page.get_by_text("The seed must be a number from 0 to 4,294,967,295; choose one.").wait_for()


def test_an_error_is_one_sentence_shown_as_text(page):
    open_tab(page, "Complete")
    page.get_by_text("Model and settings").locator("visible=true").click()
    model = page.get_by_label("Model", exact=True).locator("visible=true").first
    model.fill("<img src=x onerror=\"document.title='broken'\">")
    model.press("Enter")
    press(page, "Write")
    page.get_by_text("is not the name of a model; choose one from the list").first.wait_for()
    assert page.locator("img[src=x]").count() == 0
