"""The page: complete, closed in itself, escaped, and there for runs that are not finished too."""

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from io import BytesIO

import pytest
from PIL import Image

from fastface_trt.errors import InvalidRequest, MissingDependency, StorageError
from fastface_trt.evaluation import report as report_module
from fastface_trt.evaluation.report import write_report
from tests.evaluation.synthetic_run import (
    ablation_settings,
    grid_settings,
    pareto_settings,
    setting_name,
    write_run,
)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


class Page(HTMLParser):
    """Everything of a page that a test asks about."""

    def __init__(self, html):
        super().__init__()
        self.links, self.tags, self.texts, self.handlers, self._in = [], [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self._in.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset", "poster", "action", "data", "background"):
                self.links.append(value)
            if name.startswith("on"):
                self.handlers.append((tag, name))

    def handle_endtag(self, tag):
        while self._in and self._in.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"script", "style"} & set(self._in):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


@pytest.fixture
def no_figures(monkeypatch):
    """Drawing takes most of the time, and these tests ask for something else."""
    monkeypatch.setattr(report_module, "choose_figures", lambda run: [])


def report(folder):
    path = write_report(folder)
    assert path == folder / "report.html"
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


def test_the_page_holds_everything_and_asks_for_nothing(tmp_path):
    settings = pareto_settings()
    html, page = report(write_run(tmp_path / "run", settings))
    for axes in settings:
        assert f"{axes['preset']}, λ {axes['ip_adapter_scale']:g}" in page.text
        assert f'title="{setting_name(axes)}"' in html
    for fact in ("a processor", "onnxruntime 1.20", "12 pairs", "Cosine of face embeddings"):
        assert fact in page.text
    assert {link[:1] for link in page.links if not link.startswith("data:")} == {"#"}
    code = re.sub(r'"data:image[^"]*"', "", html)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|fetch\(|XMLHttp", code)
    # Every picture decodes; figures come for both colour schemes.
    uris = [link for link in page.links if link.startswith("data:image")]
    assert len(uris) > 20
    for uri in uris:
        kind, data = uri.removeprefix("data:image/").split(";base64,")
        assert Image.open(BytesIO(base64.b64decode(data))).format.lower() == kind
    assert page.tags.count("source") == 3
    assert {path.name for path in (tmp_path / "run/plots").iterdir()} == {
        "differences.png",
        "pareto-id-clip.png",
        "curve-ip_adapter_scale.png",
        "contact-sheet-1.png",  # one per preset
        "contact-sheet-2.png",
    }
    # Six settings × four kept pairs, and what is best and worst.
    assert page.tags.count("button") == 24 + 2 * (2 + 2)


@pytest.mark.usefixtures("no_figures")
def test_hostile_texts_are_texts(tmp_path):
    evil = '<script>alert("x")</script>'
    attribute = '"><img src=x onerror=alert(1)>'
    settings = [{"preset": evil}, {"preset": attribute}, {"preset": "$x^2", "name": "$\\frac"}]
    folder = write_run(
        tmp_path / "run",
        settings,
        pairs=3,
        kept=3,
        title=evil,
        prompts=[evil, attribute, "{{ 7*7 }}"],
    )
    html, page = report(folder)
    assert evil in page.text
    assert attribute in page.text
    assert "{{ 7*7 }}" in page.text
    assert page.tags.count("script") == 1
    assert not page.handlers
    assert not any(link == "x" for link in page.links)
    assert html.count("<script>") == 1


@pytest.mark.usefixtures("no_figures")
def test_a_run_that_has_only_begun(tmp_path):
    settings = ablation_settings()
    names = [setting_name(axes) for axes in settings]
    labels = [axes["preset"] for axes in settings]
    folder = write_run(
        tmp_path / "run", settings, finished=dict(zip(names, (12, 3, 0, 0), strict=True))
    )
    with open(folder / "results.jsonl", "a") as file:
        file.write('{"setting": "pre')  # killed while it wrote
    _, page = report(folder)
    assert "2 of 4 settings have no picture yet" in page.text
    assert f"of 12 pairs, {labels[1]} 3 are done" in page.text
    assert "15 of 48 finished" in page.text


@pytest.mark.usefixtures("no_figures")
def test_one_setting_alone(tmp_path):
    _, page = report(write_run(tmp_path / "run", [{"preset": "plain"}], pairs=1, kept=1))
    assert "No two settings with pictures are to be compared" in page.text
    assert "(n = 1)" in page.text


def test_nothing_finished(tmp_path):
    folder = write_run(
        tmp_path / "run",
        ablation_settings(),
        finished=dict.fromkeys([setting_name(axes) for axes in ablation_settings()], 0),
    )
    _, page = report(folder)
    assert "No picture is finished yet" in page.text
    assert not list((folder / "plots").iterdir())


def test_no_face_anywhere(tmp_path):
    _, page = report(write_run(tmp_path / "run", ablation_settings(), faceless=1.0))
    assert "No face was found in any picture" in page.text
    assert "Best and worst" not in page.text
    assert "no face found" in page.text


@pytest.mark.usefixtures("no_figures")
def test_pictures_that_are_gone(tmp_path):
    folder = write_run(tmp_path / "run", ablation_settings())
    first = folder / "pictures/000/00000.png"
    first.write_bytes(first.read_bytes()[:100])
    (folder / "pictures/001/00000.png").unlink()
    shutil.rmtree(folder / "faces")
    _, page = report(folder)
    assert page.text.count("no picture") >= 2
    shutil.rmtree(folder / "pictures")
    _, page = report(folder)
    assert "This run kept no pictures." in page.text


@pytest.mark.long
def test_a_page_of_thirty_settings_stays_small(tmp_path):
    settings = [{"preset": f"p{index}"} for index in range(30)]
    write_run(tmp_path / "run", settings, pairs=6, kept=6, size=512)
    write_report(tmp_path / "run")
    assert (tmp_path / "run" / "report.html").stat().st_size < 8_000_000


@pytest.mark.usefixtures("no_figures")
def test_attention_maps_beside_the_run_are_shown(tmp_path):
    folder = write_run(tmp_path / "run", ablation_settings(("plain",)), pairs=1, kept=0)
    (folder / "attention").mkdir()
    Image.new("RGB", (64, 32)).save(folder / "attention" / "maps-up_blocks.1.png")
    _, page = report(folder)
    assert "Attention maps" not in page.text  # nothing says what they are of
    told = {"preset": "am1", "parameters": {"prompt": "photo; person", "seed": 5}}
    (folder / "attention" / "attention.json").write_text(json.dumps(told))
    _, page = report(folder)
    assert "Attention maps of up_blocks.1" in page.text
    assert "photo; person, seed 5, am1" in page.text


@pytest.mark.usefixtures("no_figures")
def test_paths_out_of_the_folder_are_not_read(tmp_path):
    folder = write_run(tmp_path / "run", ablation_settings(("plain",)), pairs=1, kept=1)
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    line = json.loads((folder / "results.jsonl").read_text())
    for path in (str(secret), "../secret.png"):
        (folder / "results.jsonl").write_text(json.dumps(line | {"picture": path}) + "\n")
        _, page = report(folder)
        assert "This run kept no pictures." in page.text


@pytest.mark.usefixtures("no_figures")
def test_errors_are_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(InvalidRequest, match="no run"):
        write_report(tmp_path)
    folder = write_run(tmp_path / "run", ablation_settings(("plain", "am1")), pairs=2, kept=0)
    (folder / "plots").write_text("a file where the folder should be")
    with pytest.raises(StorageError):
        write_report(folder)
    (folder / "plots").unlink()
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | {"schema_version": 2}))
    with pytest.raises(InvalidRequest, match="schema_version"):
        write_report(folder)
    (folder / "run.json").write_text(json.dumps(run))
    with open(folder / "results.jsonl") as file:
        lines = file.readlines()
    (folder / "results.jsonl").write_text("".join(["nonsense\n", *lines]))
    with pytest.raises(InvalidRequest, match="line 1"):
        write_report(folder)
    (folder / "results.jsonl").write_text("".join(lines))
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(MissingDependency, match="jinja2"):
        write_report(folder)


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed; it renders the page")
@pytest.mark.parametrize("width", [500, 1400])
def test_a_browser_draws_it(tmp_path, width):
    """The page is as wide as its window, sorts, enlarges, and loads every picture."""
    folder = write_run(tmp_path / "run", grid_settings())
    path = write_report(folder)
    probe = """<script>addEventListener("load", () => {
      const images = [...document.images].filter((one) => one.getAttribute("src"));
      const table = document.querySelector("table.scores");
      const heads = [...table.tHead.rows[0].cells].map((cell) => cell.textContent);
      const head = heads.findIndex((text) => text.startsWith("ID, s"));
      const button = table.tHead.rows[0].cells[head].firstElementChild;
      const column = () => [...table.tBodies[0].rows].map((r) => Number(r.cells[head].dataset.key));
      button.click(); const rising = column(); button.click(); const falling = column();
      document.querySelector(".zoom").click();
      document.body.dataset.probe = JSON.stringify({
        wide: document.documentElement.scrollWidth - innerWidth, rising, falling,
        broken: images.filter((one) => !one.naturalWidth).length, count: images.length,
        open: document.querySelector("dialog").open,
      });
    });</script></body>"""
    html = path.read_text(encoding="utf-8")
    # Lazy pictures would still be on their way when the page has loaded.
    html = html.replace(' loading="lazy"', "").replace("</body>", probe)
    path.write_text(html, encoding="utf-8")
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},900",
            "--virtual-time-budget=20000",
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r'<body data-probe="([^"]*)"', done.stdout)
    seen = json.loads(found[1].replace("&quot;", '"'))
    assert seen["wide"] <= 0
    assert seen["count"] > 30
    assert seen["broken"] == 0
    assert seen["rising"] == sorted(seen["rising"])
    assert seen["falling"] == sorted(seen["rising"], reverse=True)
    assert seen["open"]
