"""For tests: a page in a browser, and what it has said and asked for."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from playwright.sync_api import Page

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
