import random

import httpx
import pytest

from fastface_trt.serving.http.errors import InvalidField
from fastface_trt.serving.http.json_text import MAX_REST, MAX_TEXT
from fastface_trt.serving.http.multipart import MAX_HEAD, MAX_PARTS, read_form
from tests.serving.http.http_parts import FACE, FACE_BYTES, PROMPT, client_of, error_of
from tests.serving.loopback import longest_gap

EDITS = "/v1/images/edits"
SIZE = 19_000_000
TYPE = "multipart/form-data; boundary=xx"


def part(head, data=b"", boundary=b"xx"):
    return b"--%s\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (boundary, head, data)


def fields_of(content_type, body):
    return [(one.name, one.filename, one.data) for one in read_form(content_type, body)]


@pytest.fixture(scope="module")
def client():
    with client_of() as client:
        yield client


@pytest.mark.parametrize("seed", range(20))
def test_forms_that_httpx_writes_are_read(seed):
    draw = random.Random(seed)
    texts = {f"field{index}[é]": f"é\r\n--{index}\n" * draw.randrange(3) for index in range(5)}
    # Bytes of boundaries are the likeliest to be taken for one.
    data = bytes(draw.choice(b"\r\n-x\0") for _ in range(draw.randrange(500)))
    files = {"image": ('a "face"; name=b.png', data, "image/png"), "empty": ("b", b"")}
    request = httpx.Request("POST", "http://x", data=texts, files=files)
    found = fields_of(request.headers["content-type"], request.read())
    assert [(name, data.decode()) for name, _, data in found[:5]] == list(texts.items())
    assert [name for _, name, _ in found[:5]] == [None] * 5
    assert [(name, data) for name, _, data in found[5:]] == [("image", data), ("empty", b"")]
    assert all(filename is not None for _, filename, _ in found[5:])


@pytest.mark.parametrize(
    "body",
    [
        part(b'name="a"', b"1") + b"--xx--",
        b"a preamble\r\n" + part(b'name="a"', b"1") + b"--xx--\r\nan epilogue",
        part(b"name=a", b"1") + b"--xx--",
        part(b'NAME="a"; other="; name=b"', b"1").replace(b"xx\r", b"xx \t\r") + b"--xx--",
        part(b'name="a"\r\nContent-Type: text/plain; charset=UTF-8', b"1") + b"--xx--",
        b'--xx\r\nX-Other: 1\r\ncontent-disposition:form-data;name="a"\r\n\r\n1\r\n--xx--',
    ],
)
def test_other_ways_to_write_the_same_form(body):
    for kind in (TYPE, 'multipart/form-data; charset=utf-8; boundary="xx"'):
        assert fields_of(kind, body) == [("a", None, b"1")]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (TYPE, b""),
        (TYPE, b"--xx"),
        (TYPE, b"--xy--"),
        (TYPE, part(b'name="a"')),
        (TYPE, part(b'filename="a"') + b"--xx--"),
        (TYPE, part(b'name="a"; name="b"') + b"--xx--"),
        (TYPE, part(b'name="a"; name="\xff"').replace(b'name="a"; ', b"") + b"--xx--"),
        (TYPE, part(b'name="a"').replace(b"form-data", b"attachment") + b"--xx--"),
        (TYPE, part(b'name="a"\r\nContent-Transfer-Encoding: base64', b"QQ==") + b"--xx--"),
        (TYPE, part(b'name="a"; b="%s"' % (b"x" * MAX_HEAD)) + b"--xx--"),
        (TYPE, b'--xxContent-Disposition: form-data; name="a"\r\n\r\n\r\n--xx--'),
        (TYPE, b"".join(part(b'name="a%d"' % i) for i in range(MAX_PARTS + 1)) + b"--xx--"),
        ("multipart/form-data", part(b'name="a"') + b"--xx--"),
        ("multipart/form-data; boundary=", part(b'name="a"') + b"--xx--"),
        (f"multipart/form-data; boundary={'x' * 71}", part(b'name="a"') + b"--xx--"),
    ],
)
def test_what_is_no_form_is_refused(kind, body):
    with pytest.raises(InvalidField, match="The form cannot be read"):
        fields_of(kind, body)


@pytest.mark.parametrize(
    "charset",
    [
        *("undefined", "punycode", "idna", "utf-16", "utf-7", "base64", "rot13", "zlib", "hex"),
        *("unicode_escape", "raw_unicode_escape", "mbcs", "latin-1", "\\x00", "x" * 3000, ""),
    ],
)
def test_whatever_codec_is_named_the_answer_is_400(client, charset):
    body = part(b'name="prompt"', b"a portrait") + part(b'name="image"; filename="a"', FACE_BYTES)
    named = b"\r\nContent-Type: text/plain; charset=%s\r\n\r\na portrait" % charset.encode()
    inner = body.replace(b"\r\n\r\na portrait", named)
    for kind, sent in ((f"{TYPE}; charset={charset}", body), (TYPE, inner)):
        answer = client.post(EDITS, content=sent + b"--xx--", headers={"Content-Type": kind})
        error_of(answer, 400, "invalid_request")
    for good in ("utf-8", "UTF8", '"utf-8"'):
        kind = {"Content-Type": f"{TYPE}; charset={good}"}
        assert client.post(EDITS, content=body + b"--xx--", headers=kind).status_code == 200


def test_text_that_is_not_utf_8_is_refused_by_its_field(client):
    files = {"prompt": (None, b"caf\xe9"), "image": FACE_BYTES}
    assert error_of(client.post(EDITS, files=files), 400, "invalid_request")["param"] == "prompt"


HOSTILE = {
    "lists": {f"field{i}": "[" + "1," * 15_000 + "1]" for i in range(MAX_PARTS)},
    "objects": {"alpha": "[" + "{}," * 30_000 + "{}]"},
    "texts": {"alpha": "[" + '"",' * 30_000 + '""]'},
    "depth": {"alpha": "[" * 90_000},
    "a long text": {"prompt": "x" * SIZE},
    "a long list": {"beta": "[" + "1," * (SIZE // 2) + "1]"},
    "a long list for a picture": {"image": "[" + "{}," * (SIZE // 3) + "{}]"},
    "long lists for pictures": [("images[]", "[" + "{}," * 9_000 + "{}]")] * MAX_PARTS,
    "a long name": {"x" * 300: "1"},
    "more text than a form holds": {f"a{i}": "x" * MAX_TEXT for i in range(MAX_REST // MAX_TEXT)},
    "twice": [("alpha", "1"), ("alpha", "2")],
    "twice inside": {"manipulation": '{"up": {"power": 1, "power": 2}}'},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_too_much_in_a_form_is_refused(client, name):
    fields = HOSTILE[name]
    pairs = fields if isinstance(fields, list) else fields.items()
    parts = [part(b'name="%s"' % key.encode(), value.encode()) for key, value in pairs]
    body = part(b'name="prompt"', b"x") if "prompt" not in dict(pairs) else b""
    kind = {"Content-Type": TYPE}
    answers = []

    def post():
        answers.append(client.post(EDITS, content=body + b"".join(parts) + b"--xx--", headers=kind))

    assert longest_gap(post) < 2
    code = answers[0].json()["error"]["code"]
    assert code in ("invalid_request", "bad_picture")
    error = error_of(answers[0], 400, code)
    assert len(error["message"]) < 500
    assert name != "more text than a form holds" or "all text" in error["message"]


@pytest.mark.parametrize("boundary", [b"xx", b"x" * 70, b"ab" * 35])
@pytest.mark.parametrize("content", ["almost boundaries", "line breaks", "all but the last"])
def test_a_file_is_read_in_linear_time_whatever_it_holds(boundary, content):
    unit = {
        "almost boundaries": b"\r\n--" + boundary[:-1],
        "line breaks": b"\r\n",
        "all but the last": boundary,
    }[content]
    data = unit * (SIZE // len(unit))
    body = part(b'name="image"; filename="a"', data, boundary) + b"--%s--" % boundary
    kind = f"multipart/form-data; boundary={boundary.decode()}"
    found = []
    assert longest_gap(lambda: found.extend(fields_of(kind, body))) < 1.5
    assert found == [("image", "a", data)]


def test_a_picture_as_the_text_of_a_form_may_be_long(client):
    long = "data:image/png;base64," + FACE + "\r\n" * MAX_REST
    for name in ("image", "image[]", "face", "images"):
        files = {"prompt": (None, PROMPT), name: (None, long)}
        answer = client.post(EDITS, files=files)
        assert answer.status_code == 200, answer.text
