"""The documentation site in headless Chromium, the system's, driven by Playwright."""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
sync_api = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install '.[dev]'")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
    pytest.mark.skipif(
        importlib.util.find_spec("mkdocs") is None, reason="no mkdocs: pip install '.[docs]'"
    ),
]
PHONE = {"width": 360, "height": 740}
PAGES = (
    "index.html",
    "concepts/structures.html",
    "concepts/scaling.html",
    "how-to/deploy.html",
    "reference/api/layers.html",
    "reference/recipes.html",
    "reports/speed/index.html",
)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: pytest's output is for failures."""


class Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a browser that is closed drops its connections."""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the built site, served here."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=quiet)
    server = Server(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser: Any, address: str) -> Iterator[Any]:
    """A tab, which must not complain nor ask for anything but the site."""
    complaints: list[str] = []
    asked: list[str] = []
    context = browser.new_context(base_url=address, color_scheme="light")
    tab = context.new_page()
    tab.set_default_timeout(60_000)
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    yield tab
    context.close()
    assert complaints == []
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert asked


@pytest.mark.parametrize("page", PAGES)
def test_page_fits_a_phone(tab: Any, page: str) -> None:
    tab.set_viewport_size(PHONE)
    tab.goto(page)
    assert tab.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    loaded = "[...document.images].every(image => image.complete && image.naturalWidth > 0)"
    tab.wait_for_function(loaded)


def test_search_finds_a_name_of_the_reference(tab: Any) -> None:
    tab.goto("index.html")
    tab.click(".md-search__input")
    tab.keyboard.type("guided_share")
    result = tab.locator(".md-search-result__link[href*='reference/api/accounting.html']")
    result.first.wait_for()
    result.first.click()
    tab.wait_for_url("**/reference/api/accounting.html*")


def brightness(tab: Any) -> np.ndarray:
    """Of the page's first picture, (height, width), 0 to 255."""
    picture = tab.locator("article img[src$='.svg']").first.screenshot()
    return np.asarray(Image.open(io.BytesIO(picture)).convert("L"))


def test_pictures_follow_the_page(tab: Any) -> None:
    """Dark ink on white, then light ink on a dark page, by the page's switch alone."""
    tab.goto("concepts/structures.html")
    light = brightness(tab)
    assert np.median(light) > 240
    assert light.min() < 80
    tab.click("label[title=Dark]")
    tab.wait_for_function("document.body.dataset.mdColorScheme === 'slate'")
    tab.wait_for_timeout(500)  # the page fades
    dark = brightness(tab)
    assert np.median(dark) < 60
    assert dark.max() > 190
