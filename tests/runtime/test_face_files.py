"""Which files a face model is: an export's, a folder's, a pack's; nothing else is opened."""

import hashlib
import io
import shutil
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from fastface_trt.engines.files import describe_file
from fastface_trt.errors import ExportIncomplete, WeightsError
from fastface_trt.mini import folders
from fastface_trt.runtime import face_files
from fastface_trt.runtime.export_folder import Export
from fastface_trt.runtime.face import FaceAnalyzer
from fastface_trt.runtime.face_files import PACKS, Pack
from fastface_trt.runtime.images import load_picture
from tests.helpers import face_models


def other(side, outputs=1):
    """A model of another kind: landmarks take 192 pixels, attributes 96."""
    inputs = [helper.make_tensor_value_info("data", TensorProto.FLOAT, [1, 3, side, side])]
    made = [helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 3, side, side])]
    node = helper.make_node("Identity", ["data"], ["out"])
    return helper.make_model(helper.make_graph([node], "g", inputs, made))


@pytest.fixture
def folder(tmp_path):
    return face_models.write(tmp_path / "own")


def test_a_folder_of_ones_own_is_its_one_detector_and_its_one_recogniser(folder):
    for side in (96, 192):
        onnx.save(other(side), str(folder / f"a{side}.onnx"))
    (folder / "README.md").write_text("x")
    files = face_files.of_folder(folder)
    assert (files.detector.name, files.recogniser.name) == ("det.onnx", "rec.onnx")


def test_weights_among_a_graphs_inputs_make_no_other_kind_of_it(tmp_path):
    """As files of the first versions of ONNX have them, MXNet's recognisers among them."""
    rec = face_models.recogniser()
    for tensor in rec.graph.initializer:
        rec.graph.input.append(
            helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
    assert face_files.of_folder(face_models.write(tmp_path / "m", rec=rec)).recogniser.is_file()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: (f / "det.onnx").unlink(), "has no detector"),
        (lambda f: (f / "rec.onnx").unlink(), "has no recogniser"),
        (lambda f: [p.unlink() for p in f.iterdir()], "has no detector"),
        (lambda f: shutil.copy(f / "det.onnx", f / "b.onnx"), "detector: b.onnx and det.onnx"),
        (lambda f: shutil.copy(f / "rec.onnx", f / "z.onnx"), "recogniser: rec.onnx and z.onnx"),
        (lambda f: (f / "x.onnx").write_bytes(b"x" * 99), "x.onnx is not an ONNX model"),
        (lambda f: (f / "x.onnx").write_bytes(b""), "x.onnx cannot be read"),
        (lambda f: cut(f / "det.onnx"), "det.onnx is not an ONNX model"),
    ],
)
def test_a_folder_with_more_or_less_is_refused_by_name(folder, change, said):
    change(folder)
    with pytest.raises(WeightsError, match=said) as caught:
        FaceAnalyzer(folder).load()
    assert str(folder) in caught.value.message
    assert caught.value.hint


def cut(path):
    path.write_bytes(path.read_bytes()[:500])


def outside(folder, where):
    """The recogniser's weights in the file `where`, as its graph names it."""
    target = folder / "w.bin"
    model = onnx.load(str(folder / "rec.onnx"))
    onnx.save(
        model,
        str(folder / "rec.onnx"),
        save_as_external_data=True,
        location=target.name,
        size_threshold=0,
    )
    content = (folder / "rec.onnx").read_bytes()
    assert len(where) == len("w.bin")
    (folder / "rec.onnx").write_bytes(content.replace(b"w.bin", where.encode()))


@pytest.mark.parametrize("where", ["w.bin", "../wb", "/etc/"])
def test_a_graph_that_reads_other_files_is_refused_before_it_is_opened(folder, where):
    outside(folder, where)
    with pytest.raises(WeightsError, match=f"rec.onnx reads '{where}'"):
        FaceAnalyzer(folder).load()


def test_a_recogniser_whose_graph_no_library_runs_is_one_sentence(tmp_path):
    rec = face_models.recogniser()
    rec.graph.node[2].op_type = "NoSuchOperator"
    with pytest.raises(WeightsError, match=r"rec.onnx cannot be opened") as caught:
        FaceAnalyzer(face_models.write(tmp_path / "m", rec=rec)).load()
    assert caught.value.hint


@pytest.fixture
def export(tmp_path):
    """The mini model's manifest and face model, in a folder of their own."""
    shutil.copytree(folders.FACE_MODEL, tmp_path / "export" / "face")
    return Export(tmp_path / "export", Export.open().manifest)


def test_an_exports_face_model_is_what_its_manifest_names(export):
    face = FaceAnalyzer.of_export(export).analyze(load_picture(folders.SAMPLE_FACES / "ada.png"))
    assert face.count == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: onnx.save(other(96), str(f / "aa.onnx")), "aa.onnx"),
        (lambda f: (f / "zz.onnx").symlink_to(f / "detection.onnx"), "zz.onnx"),
        (lambda f: cut(f / "detection.onnx"), "detection.onnx is truncated"),
        (lambda f: (f / "recognition.onnx").unlink(), "recognition.onnx is missing"),
        (lambda f: flip(f / "recognition.onnx"), "recognition.onnx is changed"),
    ],
)
def test_a_file_beside_or_instead_of_those_named_is_refused_by_name(export, change, said):
    change(export.folder / "face")
    with pytest.raises(ExportIncomplete, match=said) as caught:
        FaceAnalyzer.of_export(export).load()
    assert caught.value.hint


def flip(path):
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("outside", ["../other", "/etc", "other", "face/../../other"])
def test_an_export_opens_no_face_model_that_its_manifest_names_no_files_of(export, outside):
    face_models.write(export.folder / "other")
    face_models.write(export.folder.parent / "other")
    manifest = export.manifest.model_copy(update={"face_model": outside})
    with pytest.raises(ExportIncomplete, match="names no files of its face model"):
        FaceAnalyzer.of_export(Export(export.folder, manifest))


def test_two_detectors_that_a_manifest_names_are_refused(export):
    shutil.copy(export.folder / "face/detection.onnx", export.folder / "face/b.onnx")
    extra = (*export.manifest.extra_files, describe_file(export.folder, "face/b.onnx"))
    manifest = export.manifest.model_copy(update={"extra_files": extra})
    with pytest.raises(WeightsError, match=r"b.onnx and detection.onnx"):
        FaceAnalyzer.of_export(Export(export.folder, manifest)).load()


def test_an_export_takes_the_two_files_of_a_folder_and_no_others(folder, tmp_path):
    onnx.save(other(96), str(folder / "genderage.onnx"))
    (folder / "notes.txt").write_text("x")
    face_files.copy_models(folder, tmp_path / "copy")
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {"det.onnx", "rec.onnx"}


def sha256(content):
    return hashlib.sha256(content).hexdigest()


class Releases:
    """A release as a server on this machine has it, and a home without packs.

    `publish` puts an archive there and pins it; what is asked for is counted.
    """

    def __init__(self, home, monkeypatch, address, answers):
        self.home, self.answers, self.asked = home, answers, []
        self._monkeypatch = monkeypatch
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.setattr(face_files, "RELEASE", f"{address}/")

    def publish(self, members, *, prefix="", pinned=None):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, content in members.items():
                archive.writestr(prefix + name, content)
        content = buffer.getvalue()
        self.answers["/tiny.zip"] = content
        pin = Pack(
            pinned or sha256(content),
            ("det.onnx", sha256(DETECTOR)),
            ("rec.onnx", sha256(RECOGNISER)),
        )
        self._monkeypatch.setattr(face_files, "PACKS", {"tiny": pin})
        return content

    @property
    def folder(self):
        return self.home / ".insightface" / "models" / "tiny"

    def files(self):
        files = {path.name for path in self.folder.rglob("*") if path.is_file()}
        return files if self.folder.exists() else None


DETECTOR = face_models.detector().SerializeToString()
RECOGNISER = face_models.recogniser().SerializeToString()
MEMBERS = {"det.onnx": DETECTOR, "rec.onnx": RECOGNISER, "genderage.onnx": b"x", "LICENSE": b"x"}


@pytest.fixture
def releases(tmp_path, monkeypatch):
    answers = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            made.asked.append(self.path)
            content = answers.get(self.path)
            if content is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: made.sent])

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = tmp_path / "home"
    home.mkdir()
    made = Releases(home, monkeypatch, f"http://127.0.0.1:{server.server_port}", answers)
    made.sent = None
    yield made
    server.shutdown()
    server.server_close()


def obtain(progress=lambda line: None):
    return face_files.of_pack("tiny", progress)


@pytest.mark.parametrize("prefix", ["", "tiny/"])
def test_a_pack_is_downloaded_once_and_only_its_two_models_are_kept(releases, prefix):
    releases.publish(MEMBERS, prefix=prefix)
    told = []
    files = obtain(told.append)
    assert files.detector.read_bytes() == DETECTOR
    assert files.recogniser.read_bytes() == RECOGNISER
    assert releases.files() == {"det.onnx", "rec.onnx"}
    assert obtain() == files
    assert releases.asked == ["/tiny.zip"]
    (line,) = told
    assert "Downloading" in line


def test_a_folder_of_a_packs_name_is_not_the_pack(tmp_path, monkeypatch, releases):
    """Whoever controls the working directory does not choose what an export's pack is."""
    monkeypatch.chdir(tmp_path)
    face_models.write(tmp_path / "buffalo_l")
    monkeypatch.setattr(face_files, "RELEASE", "http://127.0.0.1:9/")
    with pytest.raises(WeightsError, match="cannot be downloaded"):
        FaceAnalyzer("buffalo_l", licence_acknowledged=True).load()
    for own in ("./buffalo_l", Path("buffalo_l")):
        FaceAnalyzer(own).load()


@pytest.mark.parametrize("deep", ["", "tiny"])
def test_a_pack_that_somebody_unpacked_is_used_though_a_folder_too_deep(releases, deep):
    releases.publish(MEMBERS)
    place = releases.folder / deep
    place.mkdir(parents=True)
    (releases.folder / "__MACOSX").mkdir()  # which macOS puts into archives
    for name, content in MEMBERS.items():
        (place / name).write_bytes(content)
        (releases.folder / "__MACOSX" / name).write_bytes(b"x")
    assert obtain().detector == place / "det.onnx"
    assert releases.asked == []


@pytest.mark.parametrize(
    ("members", "pinned", "said"),
    [
        (MEMBERS, "0" * 64, "not the one that is known"),
        ({"../det.onnx": DETECTOR, "rec.onnx": RECOGNISER}, None, "no det.onnx"),
        ({"/det.onnx": DETECTOR, "rec.onnx": RECOGNISER}, None, "no det.onnx"),
        ({"x/det.onnx": DETECTOR, "rec.onnx": RECOGNISER}, None, "no det.onnx"),
        ({**MEMBERS, "tiny/det.onnx": DETECTOR}, None, "no det.onnx"),
        ({**MEMBERS, "det.onnx": RECOGNISER}, None, "its det.onnx is not the known one"),
        ({**MEMBERS, "rec.onnx": b"x"}, None, "its rec.onnx is not the known one"),
    ],
)
def test_an_archive_that_is_not_as_known_is_refused_and_leaves_nothing_false(
    releases, members, pinned, said
):
    releases.publish(members, pinned=pinned)
    with pytest.raises(WeightsError, match=said) as caught:
        obtain()
    assert "tiny.zip" in caught.value.hint
    assert str(releases.folder) in caught.value.hint
    assert releases.files() <= {"det.onnx"}  # which comes first, and was right then
    assert not (releases.folder.parent / "det.onnx").exists()


def test_a_download_that_breaks_off_is_refused_and_can_be_tried_again(releases):
    releases.publish(MEMBERS)
    releases.sent = 1000
    with pytest.raises(WeightsError, match="cannot be downloaded"):
        obtain()
    assert releases.files() == set()
    releases.sent = None
    obtain()


def test_an_archive_beyond_the_limit_is_read_no_further(releases, monkeypatch):
    releases.publish({**MEMBERS, "LICENSE": b"x" * 5_000_000})
    monkeypatch.setattr(face_files, "LARGEST_BYTES", 1_000_000)
    with pytest.raises(WeightsError, match="not the one that is known"):
        obtain()


@pytest.mark.parametrize("where", ["nothing there", "nobody there"])
def test_a_pack_that_is_not_there_or_offline_is_one_sentence(releases, monkeypatch, where):
    releases.publish(MEMBERS)
    releases.answers.clear()
    if where == "nobody there":
        monkeypatch.setattr(face_files, "RELEASE", "http://127.0.0.1:9/")
    with pytest.raises(WeightsError, match=r"tiny cannot be downloaded: \w.*[^.]\.$") as caught:
        obtain()
    assert caught.value.hint.startswith("Go online")


def test_a_file_that_was_changed_since_is_refused_by_name(releases):
    releases.publish(MEMBERS)
    flip(obtain().recogniser)
    with pytest.raises(WeightsError, match=r"rec.onnx is not tiny's"):
        obtain()


def test_processes_that_want_a_pack_at_once_download_it_once(releases):
    releases.publish(MEMBERS)
    threads = [threading.Thread(target=obtain) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert releases.asked == ["/tiny.zip"]


def test_every_known_pack_has_whole_hashes_and_names_within_its_folder():
    for pack in PACKS.values():
        for name, known in (pack.detector, pack.recogniser):
            assert name.endswith(".onnx")
            assert "/" not in name
            assert len(bytes.fromhex(known)) == 32
        assert len(bytes.fromhex(pack.archive)) == 32
