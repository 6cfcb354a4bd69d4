"""One browser and one tab for all page tests of a worker; any error fails its test."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="session")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with sync_api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def _tab(browser):
    """The tab, and the handlers' list of what went wrong in it."""
    problems: list[str] = []
    allowed: list[str] = []
    tab = browser.new_context(accept_downloads=True).new_page()
    tab.set_default_timeout(10_000)
    tab.on("pageerror", lambda e: problems.append(f"error: {e}"))
    tab.on("console", lambda m: m.type == "error" and problems.append(m.text))
    tab.on("dialog", lambda d: (problems.append("dialog"), d.dismiss()))
    tab.on(
        "request",
        lambda r: (
            r.url.startswith(("data:", "blob:", *allowed))
            or problems.append(f"request: {r.url}")
        ),
    )
    return tab, problems, allowed


@pytest.fixture
def open_page(_tab, tmp_path: Path) -> Any:
    """Open HTML from a file; any error in it or request off it fails the test."""
    tab, problems, allowed = _tab
    problems.clear()

    def load(
        html: str,
        *,
        size: tuple[int, int] = (1280, 800),
        scheme: str = "light",
        hash: str = "",
    ) -> Any:
        path = tmp_path / "index.html"
        path.write_text(html, encoding="utf-8")
        allowed[:] = [path.as_uri()]
        tab.goto("about:blank")
        tab.set_viewport_size({"width": size[0], "height": size[1]})
        tab.emulate_media(color_scheme=scheme)
        tab.goto(path.as_uri() + hash)
        return tab

    yield load
    assert problems == []


@pytest.fixture
def open_url(_tab) -> Any:
    """The same for a server's page: only requests to that server are allowed."""
    tab, problems, allowed = _tab
    problems.clear()

    def load(url: str, origin: str) -> Any:
        allowed[:] = [origin]
        tab.goto(url)
        return tab

    yield load
    assert problems == []
