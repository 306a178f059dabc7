"""
A real browser for pages: an installed Chromium, driven without a window.

Tests skip, with the reason, where there is no browser or nothing to drive it with. Every page is watched: what it asks
of the network, and what it writes to the console as an error.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = {"phone": 390, "desktop": 1280}

SIDEWAYS = "document.documentElement.scrollWidth - document.documentElement.clientWidth"

# The least contrast (WCAG 2, 1 to 21) between a text and the nearest painted background behind it, and where it is.
CONTRAST = """
() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
  };
  const linear = v => v <= .03928 * 255 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
  const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3]));
  const behind = element => {
    if (!element) return rgba(getComputedStyle(document.documentElement).colorScheme.includes('dark') &&
      matchMedia('(prefers-color-scheme: dark)').matches ? 'black' : 'white');
    const own = rgba(getComputedStyle(element).backgroundColor);
    return own[3] === 1 ? own : [...over(own, behind(element.parentElement)), 1];
  };
  let worst = [21, ''];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !element.checkVisibility({checkVisibilityCSS: true})) continue;
    if (element.closest('svg, script, style, button, [disabled]')) continue;
    const ground = behind(element), ink = over(rgba(getComputedStyle(element).color), ground);
    const [low, high] = [light(ground), light(ink)].sort((a, b) => a - b), ratio = (high + .05) / (low + .05);
    if (ratio < worst[0]) worst = [ratio, walker.currentNode.textContent.trim().slice(0, 60)];
  }
  return worst;
}
"""


@dataclass
class Visit:
    """A page that was opened, and what went on in it."""

    page: Any
    errors: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)

    def assert_quiet(self) -> None:
        """Nothing was asked of any other machine, and nothing failed in the page."""
        assert self.strangers == []
        assert self.errors == []

    def sideways(self) -> int:
        """By how many pixels the page is wider than its window."""
        return int(self.page.evaluate(SIDEWAYS))

    def least_contrast(self) -> tuple[float, str]:
        """Between any text and its background, and the text."""
        ratio, text = self.page.evaluate(CONTRAST)
        return float(ratio), text

    def colours(self) -> tuple[str, str]:
        """Of text and background."""
        style = "(() => { const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]; })()"
        ink, paper = self.page.evaluate(style)
        return ink, paper


@pytest.fixture(scope="session")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[dev]'")
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed: apt-get install chromium")
    # Chromium's sandbox refuses to work for root, which is who runs in most containers.
    arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with api.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path, args=arguments)
        yield started
        started.close()


@pytest.fixture
def visit(browser):
    """Opens an address; only what starts with it, or with its server, may be loaded."""
    contexts = []

    def go(url: str, *, width: str = "desktop", scheme: str = "light") -> Visit:
        context = browser.new_context(viewport={"width": WIDTHS[width], "height": 900}, color_scheme=scheme)
        contexts.append(context)
        context.set_default_timeout(180_000)
        here = url if url.startswith("file:") else "/".join(url.split("/")[:3]) + "/"
        visited = Visit(context.new_page())

        def pass_or_note(route: Any) -> None:
            if route.request.url.startswith((here, "data:", "blob:")):
                route.continue_()
            else:
                visited.strangers.append(route.request.url)
                route.abort()

        context.route("**/*", pass_or_note)
        visited.page.on("pageerror", lambda error: visited.errors.append(str(error)))
        visited.page.on("console", lambda said: visited.errors.append(said.text) if said.type == "error" else None)
        visited.page.goto(url)
        return visited

    yield go
    for context in contexts:
        context.close()
