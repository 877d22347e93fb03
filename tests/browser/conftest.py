"""A headless Chromium, where the machine has one, and pages that tell of everything that goes wrong in them."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
)
"""Without these the browser itself talks to its maker."""


def chromium() -> str | None:
    """Path of the machine's Chromium; the variable CHROMIUM may name another."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    program = chromium()
    if program is None:
        pytest.skip(f"needs a Chromium: none of {', '.join(NAMES)} is on PATH, and CHROMIUM names none")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=list(QUIET))
        yield started
        started.close()


TIMEOUT_S = 30


@dataclass
class Opened:
    """A page, and what it has said and asked for.

    Attributes:
        console: warnings and errors.
        errors: exceptions that nothing caught.
        requests: addresses that were asked for, but for the page's own file and what is inside it.
        refused: those of them that the page's own policy did not let through.
        dialogs: alerts, prompts and the like.
    """

    page: Page
    console: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)

    def require_calm(self) -> None:
        """Nothing went wrong, nothing was asked for, and nothing of a transcript ran."""
        assert (self.console, self.errors, self.requests, self.dialogs) == ([], [], [], [])

    def draw_all(self) -> None:
        """Bring every plot near the window, and wait until all are drawn."""
        self.page.evaluate(
            """async () => {
                for (const place of document.querySelectorAll(".canvas")) {
                    place.scrollIntoView();
                    await new Promise((done) => requestAnimationFrame(() => setTimeout(done, 30)));
                }
                window.scrollTo(0, 0);
            }"""
        )
        self.wait('[...document.querySelectorAll(".canvas")].every((one) => one.dataset.drawn)')

    def wait(self, condition: str) -> None:
        """Look until an expression holds. Playwright's own way evaluates text in the page, which its policy refuses."""
        deadline = time.monotonic() + TIMEOUT_S
        while not self.page.evaluate(condition):
            assert time.monotonic() < deadline, f"it never came to that: {condition}"
            self.page.wait_for_timeout(20)

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_text_contents()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Opened]]:
    """Opens a file in a window of its own: `open_page(path, width=390, color_scheme="dark")`."""
    contexts = []

    def start(path: Path, width: int = 1280, height: int = 900, **options: Any) -> Opened:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        opened = Opened(context.new_page())

        def ask(request: Any) -> None:
            if request.url != path.as_uri() and not request.url.startswith(("data:", "blob:")):
                opened.requests.append(request.url)

        def fail(request: Any) -> None:
            if "csp" in (request.failure or "").lower():
                opened.refused.append(request.url)

        def dialog(found: Any) -> None:
            opened.dialogs.append(found.message)
            found.dismiss()

        opened.page.on("console", lambda message: opened.console.append(f"{message.type}: {message.text}"))
        opened.page.on("pageerror", lambda error: opened.errors.append(str(error)))
        opened.page.on("request", ask)
        opened.page.on("requestfailed", fail)
        opened.page.on("dialog", dialog)
        opened.page.goto(path.as_uri())
        opened.wait("document.documentElement.dataset.ready === 'true'")
        return opened

    yield start
    for context in contexts:
        context.close()
