"""The chat page in a real browser.

Needs the package playwright (it brings no browser) and an installed Chromium: CHROMIUM, or chromium on the PATH. The
tests skip where there is none. LALIA_SCREENSHOTS=folder keeps pictures of what the tests see.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.conftest import Running
from tests.serving.stub import ANSWER, MARKUP, wait_until

playwright_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright to test the page")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt install chromium)")

SWITCHES = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield browser
        browser.close()


OpenPage = Callable[..., Any]


@pytest.fixture
def open_page(browser: Any, server: Running) -> Iterator[OpenPage]:
    """Open the page; at the end nothing may have been logged, refused by the policy, or fetched from elsewhere."""
    problems: list[str] = []
    requested: list[str] = []
    contexts: list[Any] = []

    def open_page(expect_problems: bool = False, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1180, "height": 760}, **options})
        contexts.append(context)
        page = context.new_page()
        if not expect_problems:
            page.on("console", lambda message: problems.append(message.text))
            page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requested.append(request.url))
        page.goto(server.url)
        page.get_by_text("sonnet").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []
    assert requested
    assert [url for url in requested if not url.startswith((server.url, "data:"))] == []


def keep_picture(page: Any, name: str) -> None:
    if folder := os.environ.get("LALIA_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def ask(page: Any, text: str) -> Any:
    """Send a message and wait for the whole answer; its node."""
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_label("Message", exact=True).press("Enter")
    answer = page.locator(".answer").last
    answer.locator(".finish").wait_for()
    return answer


def shares(page: Any) -> list[float]:
    return [float(row.get_attribute("data-share")) for row in page.locator("#card li").all()]


def test_chat_and_hover(open_page: OpenPage, server: Running) -> None:
    page = open_page()
    keep_picture(page, "welcome")
    server.model.engine.seconds_per_token = 0.02
    answer = ask(page, "What is love?")
    assert page.locator(".user").inner_text() == "What is love?"
    assert answer.locator(".text-of-answer").inner_text() == ANSWER
    assert re.search(r"^Copy\s+Again\s+\d+ tokens\s+\d+ tokens/s\s+complete$", answer.locator(".facts").inner_text())

    token = answer.locator(".token", has_text="lovely")
    token.hover()
    assert page.locator("#card").is_visible()
    assert page.locator("#card .name").inner_text() == "\u2423lovely"
    found = shares(page)
    assert 8 <= len(found) <= 10 and sum(found) <= 1 + 1e-6 and all(share > 0 for share in found)
    assert page.locator("#card .chosen .what").inner_text() == "\u2423lovely"
    request = server.model.engine.submitted[0]
    _, alternatives = request._weighed(3, server.model.tokenizer.encode(ANSWER)[3])
    assert found[0] == pytest.approx(2.718281828 ** alternatives[0].logprob, rel=1e-6)
    widths = [bar.bounding_box()["width"] for bar in page.locator("#card .bar i").all()[:8]]
    assert widths == sorted(widths, reverse=True) and widths[0] > widths[-1]
    keep_picture(page, "hover")
    page.get_by_label("Message", exact=True).hover()
    assert not page.locator("#card").is_visible()

    # The heart took several tokens; it is one piece, and whole.
    answer.locator(".token").nth(-2).hover()
    assert "tokens" in page.locator("#card p").inner_text()

    tint = "el => getComputedStyle(el).backgroundColor"
    assert token.evaluate(tint) == "rgba(0, 0, 0, 0)"
    page.get_by_role("switch", name="Show probabilities").check(force=True)
    assert "0)" not in answer.locator(".token", has_text="temperate").evaluate(tint)
    surprises = [
        float(t.evaluate("el => el.style.getPropertyValue('--surprise')")) for t in answer.locator(".token").all()
    ]
    assert min(surprises) < 0.1 and max(surprises) == 1.0
    end = answer.locator(".token.end")  # where the model chose to stop is a token like any other
    end.hover()
    assert page.locator("#card .name").inner_text() == "<|im_end|>"
    answer.locator(".token", has_text="more").first.hover()
    keep_picture(page, "probabilities")


def test_keyboard_steps_through_tokens(open_page: OpenPage) -> None:
    page = open_page()
    answer = ask(page, "Hello")
    page.get_by_label("Message", exact=True).focus()
    page.keyboard.press("Shift+Tab")  # "Again"
    page.keyboard.press("Shift+Tab")  # "Copy"
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.className") == "text-of-answer"
    assert page.locator("#card .name").inner_text() == "Thou"
    page.keyboard.press("ArrowRight")
    assert page.locator("#card .name").inner_text() == "\u2423art"
    assert page.locator("#status").inner_text().startswith("art: ")
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")
    assert answer.locator(".token.active").inner_text() == "\u2665"
    page.keyboard.press("Escape")
    assert not page.locator("#card").is_visible()


def test_markup_stays_text(open_page: OpenPage) -> None:
    page = open_page()
    answer = ask(page, "markup <img src=x onerror=hacked=1>")
    assert answer.locator(".text-of-answer").inner_text() == MARKUP
    assert page.locator(".user").inner_text() == "markup <img src=x onerror=hacked=1>"
    assert page.locator("#conversation :is(img, script, a)").count() == 0
    for token in answer.locator(".token").all()[:4]:
        token.hover()
        assert page.locator("#card :is(img, script, a)").count() == 0
    assert page.evaluate("window.hacked") is None


def test_policy_refuses_foreign_scripts(open_page: OpenPage, server: Running) -> None:
    page = open_page(expect_problems=True)
    policy = server.http.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "connect-src 'self'" in policy
    for inject in (
        "const s = document.createElement('script'); s.textContent = 'window.hacked = 1'; document.body.append(s)",
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked = 1\">')",
    ):
        page.evaluate(inject)
    page.wait_for_timeout(100)
    assert page.evaluate("window.hacked") is None


def test_settings_reach_the_server(open_page: OpenPage, server: Running) -> None:
    page = open_page()
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_label("System prompt").fill("Speak like a pirate.")
    page.get_by_label("Temperature").fill("0.3")
    page.get_by_label("Top-p").fill("0.9")
    page.get_by_label("Top-k").fill("7")
    page.get_by_label("Max tokens").fill("5")
    page.get_by_label("Seed").fill("42")
    keep_picture(page, "settings")
    answer = ask(page, "Hello")
    request = server.model.engine.submitted[-1]
    p = request.params
    assert (p.temperature, p.top_p, p.top_k, p.max_tokens, p.seed, p.logprobs) == (0.3, 0.9, 7, 5, 42, 8)
    assert server.model.tokenizer.decode(request.prompt).startswith("system\nSpeak like a pirate.\nuser\nHello")
    assert answer.locator(".finish").inner_text() == "cut off at the token limit"
    page.get_by_label("Max tokens").fill("0")
    page.get_by_label("Message", exact=True).fill("More")
    page.get_by_label("Message", exact=True).press("Enter")
    assert page.locator(".answer").count() == 1  # the browser points at the wrong value, nothing is sent
    page.reload()
    page.get_by_role("button", name="Settings", exact=True).click()
    assert page.get_by_label("Seed").input_value() == "42"
    page.get_by_role("button", name="Reset to defaults").click()
    assert page.get_by_label("Seed").input_value() == "" and page.get_by_label("Max tokens").input_value() == ""


def test_stop_again_and_new_conversation(open_page: OpenPage, server: Running) -> None:
    page = open_page()
    server.model.engine.seconds_per_token = 0.1
    page.get_by_label("Message", exact=True).fill("Hello")
    page.get_by_role("button", name="Send").click()
    page.locator(".token").nth(2).wait_for()
    keep_picture(page, "streaming")
    page.get_by_role("button", name="Stop").click()
    assert page.locator(".finish").inner_text() == "stopped by you"
    assert wait_until(lambda: not server.model.engine.running)
    stopped = page.locator(".text-of-answer").inner_text()
    assert ANSWER.startswith(stopped) and len(stopped) < len(ANSWER)

    server.model.engine.seconds_per_token = 0
    ask(page, "And then?")  # the answer that was cut short is part of the conversation
    history = server.model.tokenizer.decode(server.model.engine.submitted[-1].prompt)
    assert history == f"user\nHello\nassistant\n{stopped}\nuser\nAnd then?\nassistant\n"
    page.get_by_role("button", name="Again").first.click()
    page.locator(".finish", has_text="complete").wait_for()
    assert page.locator(".turn").count() == 2
    assert server.model.tokenizer.decode(server.model.engine.submitted[-1].prompt) == "user\nHello\nassistant\n"

    page.get_by_role("button", name="New conversation").click()
    assert page.locator(".turn").count() == 0 and page.get_by_text("Say something.").is_visible()
    ask(page, "Fresh")
    assert server.model.tokenizer.decode(server.model.engine.submitted[-1].prompt) == "user\nFresh\nassistant\n"


def test_copy(open_page: OpenPage) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    ask(page, "Hello").get_by_role("button", name="Copy").click()
    page.get_by_text("Copied").first.wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == ANSWER


def test_errors_in_plain_words(open_page: OpenPage, server: Running) -> None:
    page = open_page(expect_problems=True)
    box = page.get_by_role("alert")
    page.get_by_label("Message", exact=True).fill("qz" * 400)
    page.get_by_label("Message", exact=True).press("Enter")
    box.wait_for()
    assert "no longer fits the model's memory" in box.inner_text() and "256 tokens" in box.inner_text()
    keep_picture(page, "error")
    # What was refused is given back to be shortened, and is no part of the conversation.
    assert page.get_by_label("Message", exact=True).input_value() == "qz" * 400 and page.locator(".user").count() == 0

    server.model.engine.failing = True
    page.get_by_label("Message", exact=True).fill("Hello")
    page.get_by_label("Message", exact=True).press("Enter")
    box.wait_for()
    assert "went wrong in the server" in box.inner_text()
    server.model.engine.failing = False
    page.get_by_role("button", name="Try again").click()
    page.locator(".finish", has_text="complete").wait_for()
    assert box.count() == 0 and page.locator(".answer").count() == 1

    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.get_by_label("Message", exact=True).fill("More")
    page.get_by_label("Message", exact=True).press("Enter")
    box.wait_for()
    assert "does not answer" in box.inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone(open_page: OpenPage, server: Running, scheme: str) -> None:
    page = open_page(viewport={"width": 400, "height": 780}, color_scheme=scheme, has_touch=True, is_mobile=True,
                     device_scale_factor=2)  # fmt: skip
    answer = ask(page, "What is love?")
    page.get_by_role("switch", name="Show probabilities").check(force=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    answer.locator(".token", has_text="lovely").tap()
    box = page.locator("#card").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 400 and box["y"] >= 0 and box["y"] + box["height"] <= 780
    assert page.locator("#card .name").inner_text() == "\u2423lovely"
    keep_picture(page, f"phone-{scheme}")
    page.locator(".user").tap()
    assert not page.locator("#card").is_visible()
    page.get_by_role("button", name="Settings", exact=True).tap()
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    keep_picture(page, f"phone-settings-{scheme}")


def test_dark(open_page: OpenPage, server: Running) -> None:
    page = open_page(color_scheme="dark")
    ask(page, "What is love?")
    answer = ask(page, "Say it again, but more slowly, and tell me what you were about to say instead.")
    page.get_by_role("switch", name="Show probabilities").check(force=True)
    answer.locator(".token", has_text="temperate").hover()
    keep_picture(page, "dark")


def test_every_control_has_a_name(open_page: OpenPage) -> None:
    page = open_page()
    ask(page, "Hello")
    page.get_by_role("button", name="Settings", exact=True).click()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, input, textarea')].filter((control) =>
            !control.getAttribute('aria-label') && !control.labels?.length && !control.textContent.trim())
            .map((control) => control.outerHTML)"""
    )
    assert nameless == []
    assert page.locator("#conversation").get_attribute("role") == "log"
    assert page.locator("#status").get_attribute("aria-live") == "polite"
