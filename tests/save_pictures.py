"""Take the pictures of the Space in space/images again, for example after the embedded models were trained again.

python tests/save_pictures.py
"""

from pathlib import Path

from playwright.sync_api import Page, sync_playwright
from test_space_browser import CHROMIUM, app, heads, message_box, models, open_tab, press, space_page, stop, visit

IMAGES = Path(__file__).resolve().parents[1] / "space" / "images"


def main() -> None:
    checkpoints = models.Checkpoints()
    checkpoints.preload()
    demo = space_page.build(checkpoints)
    _, address, _ = demo.launch(prevent_thread_lock=True, quiet=True, **app.launch_options())
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        look_inside(visit(browser, address))
        others(visit(browser, address))
        phone = visit(browser, address, width=390, height=844)
        heads(phone).first.wait_for()
        take(phone, "phone")
        browser.close()
    demo.close()


def take(page: Page, name: str) -> None:
    page.wait_for_timeout(1500)  # until nothing moves any more
    page.screenshot(path=IMAGES / f"{name}.png")
    print(IMAGES / f"{name}.png")


def look_inside(page: Page) -> None:
    heads(page).first.wait_for()
    take(page, "look_inside")
    for step, name in (("attention", "attention"), ("mlp", "layers")):
        page.locator(f"#step-{step}").evaluate("element => element.scrollIntoView({block: 'start'})")
        take(page, name)


def others(page: Page) -> None:
    open_tab(page, "Complete")
    press(page, "Write")
    page.locator(".written > [role=button]").nth(70).wait_for()
    stop(page)
    page.locator(".written > [role=button]").nth(4).click()
    page.locator(".popover").wait_for()
    take(page, "complete")
    open_tab(page, "Chat")
    message_box(page).fill("Tell me a short story about a dog named Max.")
    press(page, "Send")
    page.wait_for_timeout(20_000)  # the story is written
    take(page, "chat")
    open_tab(page, "Spam")
    page.locator("#words .for, #words .against").first.wait_for()
    take(page, "spam")


if __name__ == "__main__":
    main()
