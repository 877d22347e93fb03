"""A headless Chromium, where the machine has one, and pages that tell of everything that goes wrong in them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import Opened
from playwright.sync_api import Browser, sync_playwright

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
