"""The page in a real browser, over the mini model behind a real server."""

import base64
import contextlib
import io
import math
import threading

import httpx
import pytest
from PIL import Image

from fastface_trt import FastFace
from fastface_trt.runtime.preview import LatentPreview
from fastface_trt.serving.batching.batcher import Batcher
from fastface_trt.serving.http.app import create_app
from fastface_trt.serving.settings import ServerSettings, WorkerSettings
from tests.serving.http.http_parts import FACE, FACE_BYTES
from tests.serving.loopback import serving, wait_until
from tests.serving.ui.ui_browser import Page, chromium

pytestmark = pytest.mark.serving

PROMPT = "photo; person in a garden, smiling"
KEY = "the-key-of-this-server"


class HeldPreview:
    """A preview that lets the engines go on only as often as a test allows."""

    def __init__(self, preview):
        self._preview = preview
        self._changed = threading.Condition()
        self._allowed = math.inf

    def __call__(self, latents):
        with self._changed:
            assert self._changed.wait_for(lambda: self._allowed > 0, 120)
            self._allowed -= 1
        return self._preview(latents)

    def allow(self, count):
        with self._changed:
            self._allowed = count
            self._changed.notify_all()


@pytest.fixture(scope="module")
def preview_and_servers():
    """The preview, and ports of servers over one worker: open, with a key, with a low rate."""
    fastface = FastFace.load("mini")
    preview = HeldPreview(LatentPreview.fit(fastface.stages, fastface.manifest).rgb)
    with (
        Batcher(fastface, WorkerSettings(), preview=preview, owns_fastface=True) as worker,
        contextlib.ExitStack() as servers,
    ):
        ports = {}
        for name, settings in {
            "open": {},
            "key": {"api_keys": (KEY,)},
            "rate": {"requests_per_minute": 3},  # what the page asks when it is loaded
        }.items():
            app = create_app(worker, ServerSettings(ui=True, **settings), fastface.manifest)
            servers.callback(app.state.context.close)
            ports[name] = servers.enter_context(serving(app))
        yield preview, ports


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    downloads = tmp_path_factory.mktemp("downloads")
    with chromium(downloads) as driver:
        yield driver, downloads


@pytest.fixture
def ports(preview_and_servers):
    return preview_and_servers[1]


@pytest.fixture
def page(browser):
    page = Page(*browser)
    yield page
    page.check_console()
    page.check_requests()


@pytest.fixture
def ada(page, ports):
    """The page with everything in it that a picture needs."""
    page.open(ports["open"]).ready()
    page.choose_sample("ada")
    page.fill("#prompt", PROMPT)
    return page


def api(port, path="/v1/images/generations", **fields):
    return httpx.post(f"http://127.0.0.1:{port}{path}", json=fields, timeout=60)


def api_picture(port, **fields):
    """What the API makes of the page's first values, its seed 11 among them, and `fields`."""
    answer = api(port, **{"prompt": PROMPT, "face": FACE, "seed": 11} | fields).json()
    return base64.b64decode(answer["data"][0]["b64_json"])


def tasks_counted(port, outcome):
    for line in httpx.get(f"http://127.0.0.1:{port}/metrics").text.splitlines():
        if line.startswith(f'fastface_tasks_total{{outcome="{outcome}"}}'):
            return float(line.split()[-1])
    return 0.0


def test_a_picture_is_the_apis_and_previews_come_before_it(ada, ports):
    ada.fill("#seed", 7)
    ada.one("#negative").send_keys("hat\n")  # Enter starts it, as in any form
    ada.until_states("done")
    assert ada.download() == api_picture(
        ports["open"], preset="am1+dcg", seed=7, negative_prompt="hat"
    )
    seen = ada.seen()
    working = [address for _, state, note, address in seen if state == "working" and address]
    assert len(set(working)) == 3  # three previews, each drawn
    assert "step 1 of 4" in [note for _, _, note, _ in seen]
    assert seen[-1][1] == "done"
    assert seen[-1][3] not in working
    assert ada.text("#status").startswith("1 picture made")


def test_cancelled_pictures_leave_the_engines(ada, ports, preview_and_servers):
    preview, _ = preview_and_servers
    made, cancelled = (tasks_counted(ports["open"], one) for one in ("picture", "cancelled"))
    preview.allow(1)
    try:
        ada.click("#generate")
        ada.until(lambda: ada.all(".card[data-state=working] img[src^=blob]"))
        ada.click("#cancel")
        ada.until_states("cancelled")
        wait_until(lambda: tasks_counted(ports["open"], "cancelled") == cancelled + 1)
    finally:
        preview.allow(math.inf)
    ada.click("#generate")  # and it works on afterwards
    ada.until_states("done", "cancelled")
    assert tasks_counted(ports["open"], "picture") == made + 1


def test_presets_side_by_side(ada, ports):
    ada.fill("#seed", 3)
    ada.open_sections()
    for box in ada.all("#compare-presets input:checked"):
        ada.driver.execute_script("arguments[0].click()", box)
    for name in ("plain", "am2+dcg"):
        ada.click(f"#compare-presets input[value='{name}']")
    ada.click("#compare-start")
    ada.until_states("done", "done")
    assert len(ada.all(".pictures")) == 1
    boxes = [card.rect for card in ada.all(".card")]
    assert boxes[0]["y"] == boxes[1]["y"]
    for card, preset in ((1, "plain"), (2, "am2+dcg")):
        assert ada.download(card) == api_picture(ports["open"], preset=preset, seed=3)


def test_parameters_reach_the_picture_and_come_back(ada):
    ada.open_sections()
    ada.fill("#preset", "plain")
    ada.fill("#dial-ip_adapter_scale", "0.6")
    ada.fill("#dial-alpha", "1, 2, 1.5, 1")
    ada.fill("#dial-guidance_rescale", "0.5")
    ada.fill("#width", 64)
    ada.click("#dice")
    seed = ada.one("#seed").get_property("value")
    ada.click("#generate")
    ada.until_states("done")
    ada.click(".card .frame")
    shown = ada.text("#details-list")
    for words in ("λ0.6", "α1, 2, 1.5, 1", "φ0.5", f"seed{seed}", "width64", PROMPT):
        assert words in shown
    ada.click("#details-close")
    ada.fill("#preset", "am2+dcg")
    ada.fill("#prompt", "another")
    ada.fill("#seed", 1)
    ada.fill("#dial-alpha", "")
    ada.fill("#dial-beta", "4")
    ada.click(".card .frame")
    ada.click("#details-use")
    values = {
        selector: ada.one(selector).get_property("value")
        for selector in ("#preset", "#prompt", "#seed", "#width", "#dial-alpha", "#dial-beta")
    }
    assert list(values.values()) == ["plain", PROMPT, seed, "64", "1, 2, 1.5, 1", "1"]


def test_a_slider_sets_a_value_and_the_arrow_gives_it_back(ada):
    ada.open_sections()
    ada.click("[data-field=beta] .split input")  # one value for all steps, instead of the preset's
    slider = ada.one("[data-field=beta] input[type=range]")
    slider.send_keys("\ue014")  # arrow right
    assert ada.one("#dial-beta").get_property("value") == "3.1"
    ada.click("[data-field=beta] .back")
    assert ada.one("#dial-beta").get_property("value") == "1, 3, 3, 1"


def test_values_per_step_follow_the_number_of_steps(ada):
    ada.open_sections()
    ada.fill("#dial-alpha", "1, 2, 2, 1")
    ada.fill("#steps", "8")
    assert ada.one("#dial-alpha").get_property("value") == "1, 2, 2, 2, 2, 2, 2, 1"
    ada.click("#generate")
    ada.until_states("done")


def test_a_registered_face_is_used_and_deleted(ada, ports):
    ada.click("#register")
    ada.until(lambda: ada.all(".registered"))
    faces = f"http://127.0.0.1:{ports['open']}/v1/faces"
    (face,) = httpx.get(faces).json()["data"]
    assert ada.one(".registered input").get_property("value") == face["id"]
    ada.driver.get_log("performance")
    ada.click("#generate")
    ada.until_states("done")
    sent = [entry["message"] for entry in ada.driver.get_log("performance")]
    assert any(face["id"] in one and "face_id" in one for one in sent)
    assert ada.download() == api_picture(ports["open"], preset="am1+dcg")
    ada.click(".registered button")
    ada.until(lambda: not ada.all(".registered"))
    assert httpx.get(faces).json()["data"] == []
    ada.driver.get(ada.origin)  # so that the log has the page's address again


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_a_face_can_be_dropped_and_pasted(page, ports, way):
    page.open(ports["open"]).ready()
    script = """
        const bytes = Uint8Array.from(atob(arguments[1]), (one) => one.charCodeAt(0));
        const data = new DataTransfer();
        data.items.add(new File([bytes], 'mine.png', {type: 'image/png'}));
        const init = {bubbles: true, cancelable: true};
        const event = arguments[0] === 'drop'
          ? new DragEvent('drop', {...init, dataTransfer: data})
          : new ClipboardEvent('paste', {...init, clipboardData: data});
        document.getElementById('drop').dispatchEvent(event);"""
    page.driver.execute_script(script, way, base64.b64encode(FACE_BYTES).decode())
    page.until(lambda: page.text("#face-name") == "mine.png")
    page.fill("#prompt", PROMPT)
    page.click("#generate")
    page.until_states("done")
    assert page.download() == api_picture(ports["open"], preset="am1+dcg")


def test_a_key_is_asked_for_and_kept_by_the_tab(page, ports):
    page.expected_statuses = {401}
    page.open(ports["key"])
    page.until(lambda: page.one("#key").is_displayed())
    assert page.text("#error").startswith("This server needs an API key.")
    page.one("#key-value").send_keys("another-key\n")
    page.until(lambda: "none of its keys" in page.text("#error"))
    page.until(lambda: page.one("#key").is_displayed())
    page.one("#key-value").send_keys(f"{KEY}\n")
    page.ready()
    assert not page.one("#key").is_displayed()
    assert not page.one("#error").is_displayed()
    page.choose_sample("ada")
    page.fill("#prompt", PROMPT)
    page.click("#generate")
    page.until_states("done")
    script = "return [Object.values(sessionStorage), localStorage.length, document.cookie]"
    assert page.driver.execute_script(script) == [[KEY], 0, ""]


def test_errors_are_the_apis_sentences(page, ports, tmp_path):
    page.expected_statuses = {400}
    page.open(ports["open"]).ready()
    page.click("#generate")
    page.until(lambda: page.one("#error").is_displayed())  # no prompt: nothing was sent
    page.fill("#prompt", PROMPT)
    page.click("#generate")
    page.until(lambda: "Choose a picture" in page.text("#error"))
    assert page.states() == []
    empty = io.BytesIO()
    Image.new("RGB", (96, 96), "white").save(empty, "PNG")
    path = tmp_path / "white.png"
    path.write_bytes(empty.getvalue())
    page.one("#face-file").send_keys(str(path))
    page.until(lambda: page.text("#face-name") == "white.png")
    page.click("#generate")
    page.until_states("failed")
    face = base64.b64encode(empty.getvalue()).decode()
    told = api(ports["open"], prompt=PROMPT, face=face).json()["error"]
    assert told["code"] == "no_face_found"
    page.until(lambda: page.text("#error") == told["message"])
    assert page.text(".card .note") == told["message"]


def test_a_card_is_deleted_and_a_row_with_its_last(ada):
    ada.fill("#count", 2)
    ada.click("#generate")
    ada.until_states("done", "done")
    for left in (1, 0):
        ada.all(".card .delete")[0].click()
        assert len(ada.all(".card")) == left
        assert len(ada.all("#gallery .pictures")) == (left > 0)
    assert ada.one("#empty").is_displayed()


def test_a_preset_is_explained_in_a_line(ada, ports):
    address = f"http://127.0.0.1:{ports['open']}/v1/presets"
    for preset in httpx.get(address).json()["data"]:
        ada.fill("#preset", preset["name"])
        assert ada.text("#preset-says") == preset["description"] != ""


def test_numbers_out_of_range_are_not_sent(ada):
    for selector, number in (("#count", 5), ("#width", 97), ("#seed", "")):
        before = ada.one(selector).get_property("value")
        ada.fill(selector, number)
        ada.click("#generate")
        ada.until(lambda: ada.one("#error").is_displayed())
        assert ada.text("#error").startswith(ada.one(selector).get_property("labels")[0].text)
        assert ada.driver.switch_to.active_element == ada.one(selector)
        ada.fill(selector, before)
    assert ada.states() == []


def test_when_to_come_back_is_shown(page, ports):
    page.expected_statuses = {429}
    page.open(ports["rate"]).ready()
    page.choose_sample("ada")
    page.fill("#prompt", PROMPT)
    page.until(lambda: page.text("#model") and not page.one("#error").is_displayed())
    page.click("#generate")
    page.until_states("failed")
    page.until(lambda: "The server asks to wait" in page.text("#error"))
    assert page.text("#error").startswith("More than 3 requests per minute.")


@pytest.mark.parametrize("width", [360, 2000])
def test_no_width_needs_horizontal_scrolling(ada, width):
    ada.resize(width, 800)
    ada.open_sections()
    assert ada.overflow() == 0
    ada.driver.execute_script(
        "document.querySelectorAll('#compare-presets input').forEach(o => { o.checked = true; })"
    )
    ada.click("#compare-start")
    ada.until_states(*["done"] * 6)
    assert ada.overflow() == 0
    ada.click(".card .frame")
    dialog = ada.one("dialog").rect
    assert dialog["x"] >= 0
    assert dialog["x"] + dialog["width"] <= width
    assert ada.overflow() == 0


INJECTED = """
const done = arguments[0], tried = {};
const attempt = async (name, work) => {
  try { tried[name] = String(await work()); } catch (error) { tried[name] = error.name; }
};
(async () => {
  await attempt('markup', async () => {
    const one = document.createElement('div');
    one.innerHTML = '<img src="data:," onerror="window.ran = 1">';
    await new Promise((next) => setTimeout(next, 200));
    return window.ran;
  });
  await attempt('inline', () => {
    const script = document.createElement('script');
    script.append('window.ran = 2');
    document.body.append(script);
    return window.ran;
  });
  await attempt('elsewhere', () => fetch('http://127.0.0.1:1/'));
  await attempt('handler', () => {
    const one = document.createElement('p');
    one.setAttribute('onclick', 'window.ran = 3');
    one.click();
    return window.ran;
  });
  await attempt('style', () => {
    const one = document.createElement('style');
    one.append('h1 { position: fixed }');
    document.body.append(one);
    return getComputedStyle(document.querySelector('h1')).position;
  });
  done(tried);
})();
"""


@pytest.mark.parametrize("path", ["", "/docs"])
def test_what_is_injected_into_a_page_does_nothing(page, ports, path):
    page.open(ports["open"])
    page.driver.get(page.origin + path)
    page.check_console()
    tried = page.driver.execute_async_script(INJECTED)
    # Scripts of a page may not make markup of strings; /docs has no scripts that could.
    strings = "undefined" if path else "TypeError"
    assert tried == {
        **{"markup": strings, "handler": strings, "inline": "undefined", "style": "static"},
        "elsewhere": "TypeError",  # refused, as are connections to nobody
    }
    # Nothing but what the policy refused was complained about.
    for entry in page.driver.get_log("browser"):
        assert "Content Security Policy" in entry["message"] or "Trusted" in entry["message"]
