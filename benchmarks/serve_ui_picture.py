"""README's picture of the page: `fastface-trt serve --ui` in a real browser, over the mini model.

    python -m benchmarks.serve_ui_picture

Writes benchmarks/results/serve-ui.png. Needs chromium and chromedriver.
"""

import io
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from benchmarks.load.server import serve

OUT = Path(__file__).parent / "results" / "serve-ui.png"
WIDTH, HEIGHT = 1440, 1240
MAX_BYTES = 300_000
PATIENCE = 120
PICTURES = (
    ("gina", "photo; person in a garden, smiling"),
    ("chika", "photo; person in space, laughing"),
)
COMPARED = "bruno", "oil painting; person on a beach, smiling"


@contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """A headless browser. Leaves with a sentence where there is none."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        sys.exit("Install chromium and chromedriver: apt-get install chromium chromium-driver.")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    # Containers have no user namespaces and a small /dev/shm.
    for option in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
    ):
        options.add_argument(option)
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield made
    finally:
        made.quit()


class Visit:
    """What somebody does on the page."""

    def __init__(self, driver: webdriver.Chrome, address: str) -> None:
        self._driver = driver
        size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get(address)
        self._until("#samples button", 1)

    def ask(self, face: str, prompt: str) -> None:
        """Choose a sample face and say what the picture shows."""
        self._click(f"#samples [data-name='{face}']")
        self._run("document.getElementById('prompt').value = arguments[0]", prompt)

    def generate(self, count: int) -> None:
        """Make pictures with the preset that the page starts with."""
        self._run("document.getElementById('count').value = arguments[0]", str(count))
        self._make("#generate", count)

    def compare(self) -> None:
        """Make a picture with every preset."""
        boxes = "document.querySelectorAll('#compare-presets input')"
        self._run(f"{boxes}.forEach((box) => {{ box.checked = true; }})")
        self._make("#compare-start", int(self._run(f"return {boxes}.length")))

    def picture(self) -> Image.Image:
        """The window as it is, with the dials in sight."""
        self._run("document.getElementById('more').open = true")
        self._run("document.activeElement.blur()")
        return Image.open(io.BytesIO(self._driver.get_screenshot_as_png())).convert("RGB")

    def _make(self, button: str, count: int) -> None:
        done = len(self._driver.find_elements(By.CSS_SELECTOR, "[data-state=done]"))
        self._click(button)
        self._until("[data-state=done]", done + count)

    def _click(self, selector: str) -> None:
        self._run("document.querySelector(arguments[0]).click()", selector)

    def _run(self, script: str, *arguments: object) -> Any:
        return self._driver.execute_script(script, *arguments)

    def _until(self, selector: str, count: int) -> None:
        WebDriverWait(self._driver, PATIENCE).until(
            lambda driver: len(driver.find_elements(By.CSS_SELECTOR, selector)) >= count
        )


def main() -> None:
    """Make the picture."""
    with serve("--ui", "--workers", "1") as server, chromium() as driver:
        host, port = server.wait_until_ready()
        visit = Visit(driver, f"http://{host}:{port}/")
        for face, prompt in PICTURES:
            visit.ask(face, prompt)
            visit.generate(3)
        visit.ask(*COMPARED)
        visit.compare()
        picture = visit.picture()
    # The two lowest bits of a colour are a third of the file, and nobody sees them.
    ImageOps.posterize(picture, 6).save(OUT, optimize=True)
    size = OUT.stat().st_size
    if size > MAX_BYTES:
        sys.exit(f"{OUT} has {size} bytes; README's pictures have at most {MAX_BYTES}.")
    print(f"{OUT}: {size} bytes")


if __name__ == "__main__":
    main()
