"""A headless Chromium for tests of the page, and what they do with it again and again."""

import contextlib
import json
import shutil

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

from tests.serving.loopback import wait_until

INSTALL = (
    "The page's tests need chromium and chromedriver: apt-get install chromium chromium-driver."
)
WATCH = """
window.seen = [];
const note = () => document.querySelectorAll('.card').forEach((card, at) => {
  const image = card.querySelector('img');
  const line = [at, card.dataset.state, card.querySelector('.note').textContent,
    image.hidden ? '' : image.src];
  if (!window.seen.some((one) => String(one) === String(line))) window.seen.push(line);
});
new MutationObserver(note).observe(document.getElementById('gallery'),
  { subtree: true, childList: true, attributes: true, characterData: true });
"""


@contextlib.contextmanager
def chromium(downloads):
    """A browser that keeps what it downloads in a folder."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.fail(INSTALL)
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    # Containers have no user namespaces and a small /dev/shm.
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        driver.execute_cdp_cmd(
            "Browser.setDownloadBehavior",
            {"behavior": "allow", "downloadPath": str(downloads)},
        )
        yield driver
    finally:
        driver.quit()


class Page:
    """The page of one server in the browser."""

    def __init__(self, driver, downloads):
        self.driver, self.downloads = driver, downloads
        self.expected_statuses = set()

    def open(self, port, *, width=1280, height=900):
        """Load the page anew."""
        self.origin = f"http://127.0.0.1:{port}"
        self.resize(width, height)
        self.driver.get(self.origin)
        self.driver.execute_script(WATCH)
        return self

    def ready(self):
        """Wait until the server's presets are there."""
        self.until(lambda: self.all("#samples button") and self.all("#preset option"))
        return self

    def resize(self, width, height):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector):
        return self.one(selector).get_property("textContent")

    def until(self, condition):
        wait_until(condition, 60)

    def click(self, selector):
        """Click what a user would have scrolled to."""
        element = self.one(selector)
        script = "arguments[0].scrollIntoView({block: 'center'})"
        self.driver.execute_script(script, element)
        element.click()

    def fill(self, selector, text):
        element = self.one(selector)
        script = """arguments[0].value = arguments[1];
            arguments[0].dispatchEvent(new Event('change', {bubbles: true}))"""
        self.driver.execute_script(script, element, str(text))

    def open_sections(self):
        self.driver.execute_script(
            "document.querySelectorAll('details').forEach((one) => { one.open = true; })"
        )

    def choose_sample(self, name):
        self.click(f"#samples [data-name='{name}']")
        self.until(lambda: self.text("#face-name") == name)

    def states(self):
        return [card.get_dom_attribute("data-state") for card in self.all(".card")]

    def until_states(self, *states):
        """Wait until the cards, the newest row first, are in these states."""
        self.until(lambda: self.states() == list(states))

    def seen(self):
        """(card, state, note, address of its picture) as they changed."""
        return [tuple(line) for line in self.driver.execute_script("return window.seen")]

    def download(self, card=1):
        """The bytes of the file behind a picture's download link."""
        self.click(f".card:nth-child({card}) .frame")
        name = self.one("#details-download").get_dom_attribute("download")
        path = self.downloads / name
        path.unlink(missing_ok=True)
        self.click("#details-download")
        self.until(path.exists)
        self.until(lambda: path.read_bytes().endswith(b"IEND\xaeB`\x82"))
        self.click("#details-close")
        return path.read_bytes()

    def overflow(self):
        """Pixels by which the page is wider than its window."""
        script = """const page = document.documentElement;
            return page.scrollWidth - page.clientWidth"""
        return self.driver.execute_script(script)

    def check_console(self):
        """Nothing was logged as severe, but the answers that a test expects."""
        for entry in self.driver.get_log("browser"):
            expected = entry["source"] == "network" and any(
                f"status of {status}" in entry["message"] for status in self.expected_statuses
            )
            assert entry["level"] != "SEVERE" or expected, entry["message"]

    def check_requests(self):
        """Every request since the last look went to the server."""
        addresses = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                addresses.append(message["params"]["request"]["url"])
        assert f"{self.origin}/" in addresses  # or the log says nothing
        for address in addresses:
            assert address.startswith((f"{self.origin}/", "blob:", "data:")), address
