"""How the Space looks, on a desktop and on a phone, in light and in dark: contrast, focus, sizes, what is cut.

SPACE_SCREENSHOTS=/tmp/shots python -m pytest tests/test_space_look.py     keeps a picture of each tab
"""

# ruff: noqa: F811  (pytest passes imported fixtures by their names)

from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the Space needs pip install '.[space]'")
pytest.importorskip("playwright", reason="the browser test needs pip install playwright")

from test_space_browser import (  # noqa: F401  (the second line are fixtures)
    CHROMIUM,
    address,
    browser,
    endless,
    folder,
    heads,
    keep,
    leave,
    message_box,
    open_tab,
    page,
    press,
    read,
    stop,
    visit,
    wait_until,
)

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here (apt-get install chromium)"),
    pytest.mark.xdist_group("look"),  # one server, one browser
]
SIZES = pytest.mark.parametrize("size", [(1280, 800), (390, 844)], ids=["desktop", "phone"])


def use_every_tab(page, endless):
    """Each tab in turn, with something on it."""
    heads(page).first.wait_for()
    yield "Look inside"
    open_tab(page, "Complete")
    press(page, "Write")
    page.locator(".written > [role=button]").nth(9).wait_for()
    stop(page)
    wait_until(lambda: len(endless.ended) == 1)
    page.locator(".written > [role=button]").nth(3).click()
    page.locator(".popover").wait_for()
    yield "Complete"
    open_tab(page, "Chat")
    message_box(page).fill("the cat")
    press(page, "Send")
    wait_until(lambda: read(page.get_by_test_id("bot").last))
    stop(page)
    wait_until(lambda: len(endless.ended) == 2)
    page.get_by_label("Retry").first.wait_for()
    yield "Chat"
    open_tab(page, "Spam")
    page.locator("#words .for, #words .against").first.wait_for()  # of the first message
    page.get_by_text("Many at once").click()
    yield "Spam"


def show(page, theme: str) -> None:
    """The page as it looks with `?__theme=`, when its colors have faded into their new values."""
    page.emulate_media(color_scheme=theme)
    page.shot = f"{theme}-{page.viewport_size['width']}"
    page.evaluate("dark => document.body.classList.toggle('dark', dark)", theme == "dark")
    transitions = "document.getAnimations().filter(one => one instanceof CSSTransition).map(one => one.finished)"
    page.evaluate(f"Promise.allSettled({transitions}).then(() => null)")


def test_the_theme_is_a_class_of_the_page(browser, address):
    """Which `show` changes."""
    pages = [visit(browser, address, theme=theme) for theme in ("light", "dark")]
    show(pages[0], "dark")
    colors = "['body', '.stations', 'button[role=tab]'].map(name => getComputedStyle(document.querySelector(name)))"
    found = []
    for one in pages:
        heads(one).first.wait_for()
        found.append(one.evaluate(f"{colors}.map(style => style.backgroundColor + style.color)"))
        leave(one)
    assert found[0] == found[1]


@SIZES
def test_axe_finds_no_serious_violation(browser, address, endless, size):
    """All rules in light, those about colors in dark as well."""
    axe = pytest.importorskip("axe_playwright_python", reason="axe-core comes with pip install axe-playwright-python")
    script = (Path(axe.__path__[0]) / "axe.min.js").read_text(encoding="utf-8")
    page = visit(browser, address, *size)
    for tab in use_every_tab(page, endless):
        page.evaluate(script)
        for theme, rules in (("dark", "['color-contrast', 'link-in-text-block']"), ("light", "undefined")):
            show(page, theme)
            found = page.evaluate(
                f"axe.run(document, {{resultTypes: ['violations'], runOnly: {rules}}}).then(({{violations}}) => "
                "violations.map(v => [v.impact, v.id, "
                "v.nodes.map(n => n.target.join(' ') + ': ' + n.failureSummary)]))"
            )
            keep(page, tab.lower().replace(" ", "_"))
            assert [one for one in found if one[0] in ("serious", "critical")] == [], (tab, theme)
    leave(page)


TOO_SMALL = """() => [...document.querySelectorAll('button, a, select, input, [role=tab]')].filter(item => {
  const target = item.closest('label') || item, box = target.getBoundingClientRect();
  return box.width && item.checkVisibility() && box.height < 44 && !item.closest('footer');
}).map(item => item.outerHTML.slice(0, 120))"""


def test_a_phone_shows_every_tab_without_scrolling_aside(browser, address, endless):
    page = visit(browser, address, 390, 844)
    for tab in use_every_tab(page, endless):
        assert page.locator(".overflow-menu").first.is_hidden(), "tabs are hidden behind a menu"
        assert page.evaluate("document.documentElement.scrollWidth") == 390, tab
        assert page.evaluate(TOO_SMALL) == [], tab
        if tab == "Look inside":
            assert page.locator(".arcs").bounding_box()["width"] > 300
        if tab == "Complete":
            button = page.get_by_role("button", name="Stop", exact=True).locator("visible=true").bounding_box()
            below = [page.locator(part).first.bounding_box()["y"] for part in ("#completion .legend", ".written")]
            bottom = button["y"] + button["height"]
            assert below[0] - bottom < 80 and below[1] - bottom < 160, (bottom, below)
    leave(page)


CONTRAST = """(selector) => {
  const context = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const layers = (item) => item ? [...layers(item.parentElement), getComputedStyle(item).backgroundColor] : ['white'];
  const seen = (colors) => {
    for (const color of colors) { context.fillStyle = color; context.fillRect(0, 0, 1, 1); }
    const parts = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((value) => value / 255)
      .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2] + 0.05;
  };
  return [...document.querySelectorAll(selector)].map((item) => {
    const style = getComputedStyle(item), behind = layers(item);
    const [low, high] = [seen(behind), seen([...behind, item.closest('svg') ? style.fill : style.color])].sort();
    return high / low;
  });
}"""
FIGURE_TEXTS = (
    "#overview .name", "#overview .number", ".stations b", ".chips li", ".vectors li", ".vectors figcaption",
    ".heads small", ".arcs text", "#ablation .number", ".legend span", ".lens th", ".lens td", ".lens small",
)  # fmt: skip


def test_the_texts_of_the_figures_are_readable(page):
    heads(page).first.wait_for()
    for theme in ("light", "dark"):
        show(page, theme)
        for selector in FIGURE_TEXTS:
            found = page.evaluate(CONTRAST, selector)
            assert found and min(found) >= 4.5, (theme, selector, min(found, default=None))


@SIZES
def test_the_first_screen_shows_the_answer_and_nothing_hides_the_last_token(browser, address, size):
    page = visit(browser, address, *size)
    heads(page).first.wait_for()
    bars = page.locator("#overview .bar")
    assert bars.count() == 5
    last, strip = bars.last.bounding_box(), page.locator(".stations").bounding_box()
    assert last["y"] + last["height"] < size[1] and strip["y"] + strip["height"] < size[1]
    cut = page.locator(".scroll").bounding_box()
    name, cell = (page.locator(f".lens tbody tr:last-child {part}").bounding_box() for part in ("th", "td:last-child"))
    assert cell["x"] + cell["width"] <= cut["x"] + cut["width"] + 1 and cell["x"] >= name["x"] + name["width"]
    assert name["x"] >= cut["x"] - 1, "the names of the layers are scrolled away"
    if size[0] == 1280:
        assert page.evaluate("(e => e.scrollWidth - e.clientWidth)(document.querySelector('.scroll'))") == 0
    gaps = page.evaluate(
        "[...document.querySelectorAll('.bar')].filter(bar => bar.checkVisibility()).map(bar => "
        "bar.querySelector('.number').getBoundingClientRect().left - "
        "bar.querySelector('.shares').getBoundingClientRect().right)"
    )
    assert len(gaps) > 5 and min(gaps) > 0 and max(gaps) < 12, "a number stands away from its bar"
    leave(page)


@SIZES
def test_a_strip_that_scrolls_fades_out_and_ends_in_full(browser, address, size):
    page = visit(browser, address, *size)
    heads(page).first.wait_for()
    for strip, last in ((".stations", "li:last-child"), (".gallery", ".gallery-item:last-child")):
        box = page.locator(strip).locator("visible=true").first
        if box.evaluate("e => e.scrollWidth > e.clientWidth"):
            assert "gradient" in box.evaluate("e => getComputedStyle(e).maskImage"), strip
            box.evaluate("e => { e.scrollLeft = e.scrollWidth; }")
            end, item = box.bounding_box(), box.locator(last).bounding_box()
            assert item["x"] + item["width"] <= end["x"] + end["width"] - 39, strip
        else:
            assert size[0] == 1280, strip
    leave(page)


def test_an_open_popover_leaves_no_empty_area_and_is_on_top(page, endless):
    open_tab(page, "Complete")
    press(page, "Write")
    token = page.locator(".written > [role=button]").nth(3)
    page.locator(".written > [role=button]").nth(9).wait_for()
    stop(page)
    wait_until(lambda: len(endless.ended) == 1)
    token.click()
    page.locator(".popover").wait_for()
    text, part = page.locator(".written").bounding_box(), page.locator("#completion").bounding_box()
    assert part["y"] + part["height"] - text["y"] - text["height"] < 40
    on_top = page.evaluate(
        "[...document.querySelectorAll('.popover .bar')].map(bar => { bar.scrollIntoView({block: 'center'}); "
        "const box = bar.getBoundingClientRect(); return bar.contains(document.elementFromPoint("
        "box.left + box.width / 2, box.top + box.height / 2)); })"
    )
    assert len(on_top) > 3 and all(on_top)


def test_stop_stands_beside_the_message_and_results_come_when_there_are_some(page):
    open_tab(page, "Chat")
    button = page.get_by_role("button", name="Stop", exact=True).locator("visible=true").bounding_box()
    box = message_box(page).bounding_box()
    assert button["width"] < 200 and button["y"] < box["y"] + box["height"] < button["y"] + button["height"] + 20
    open_tab(page, "Spam")
    page.get_by_text("Many at once").click()
    page.get_by_role("button", name="Sort the file").wait_for()
    results, table = page.get_by_text("Download the results"), page.get_by_text("First rows")
    assert results.count() == table.count() == 0
    press(page, "Sort the file")  # a refusal shows none either
    page.locator(".notice, .toast-body").filter(has_text="Choose a CSV file first").first.wait_for()
    assert results.count() == table.count() == 0


RING = """(dark) => {
  document.body.classList.toggle('dark', dark);
  const item = document.activeElement, box = item.getBoundingClientRect(), style = getComputedStyle(item);
  if (item === document.body) return null;
  const drawn = style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2 && style.opacity !== '0'
    && box.width > 3 && box.height > 3;
  return [item.outerHTML.slice(0, 150), drawn, style.outlineColor];
}"""


def test_every_control_has_a_focus_ring(page):
    heads(page).first.wait_for()
    bare = []
    for tab in ("Look inside", "Complete", "Chat", "Spam"):
        open_tab(page, tab)
        closed = page.locator("button.label-wrap:not(.open)").locator("visible=true")
        while closed.count():
            closed.first.click()
        page.get_by_role("tab", name=tab, exact=True).focus()
        count = 0
        while True:
            page.keyboard.press("Tab")
            found = [page.evaluate(RING, dark) for dark in (True, False)]
            if found[0] is None or count > 120:
                break
            count += 1
            bare += [(tab, *one) for one in found if not one[1]]
        assert 8 < count < 120, (tab, count)
    assert bare == []
