"""What an operator adds: checks of prompts and pictures, signatures, pictures by address."""

import base64
import io

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from fastface_trt.errors import InvalidRequest
from fastface_trt.runtime.picture_file import read_parameters
from fastface_trt.serving.http.app import create_app
from fastface_trt.serving.settings import ServerSettings
from tests.serving.certificates import Authority
from tests.serving.http.http_parts import FACE, FACE_BYTES, ask, client_of, error_of, events_of

CHECKS = "tests.serving.pictures.refusing_checks"


def checked_by(name):
    return client_of(checks=(f"{CHECKS}:{name}",))


def test_a_prompt_is_checked_before_its_face_is_looked_at():
    with checked_by("Prompts") as client:
        error = error_of(ask(client, prompt="forbidden"), 400, "refused")
        assert error["message"] == "Such prompts are not served."
        assert client.worker.analysed == []
        assert ask(client).status_code == 200


def test_a_face_is_checked_before_it_is_looked_for():
    with checked_by("Faces") as client:
        error_of(ask(client), 400, "refused")
        error_of(client.post("/v1/faces", json={"image": FACE}), 400, "refused")
        assert client.worker.analysed == []


def test_a_picture_is_checked_before_anybody_sees_it():
    with checked_by("Results") as client:
        answer = ask(client)
        error_of(answer, 400, "refused")
        streamed = ask(client, stream=True, partial_images=3)
    name, data = events_of(streamed.text)[-1]
    assert (name, data["error"]["code"]) == ("error", "refused")
    assert "b64_json" not in streamed.text


def test_where_pictures_are_checked_no_preview_is_sent():
    with checked_by("Nothing") as client:
        names = [name for name, _ in events_of(ask(client, stream=True, partial_images=3).text)]
        assert not client.worker.submitted[0].previews
    assert "image_generation.partial_image" not in names
    assert names[-1] == "image_generation.completed"


def test_a_check_that_is_not_there_is_told_at_the_start():
    with pytest.raises(InvalidRequest, match="refusing_checks"):
        create_app(None, ServerSettings(checks=(f"{CHECKS}:Missing",)), None)


@pytest.fixture(scope="module")
def credentials(tmp_path_factory):
    authority, folder = Authority(), tmp_path_factory.mktemp("credentials")
    certificate, key = authority.issue("A signer", usage=ExtendedKeyUsageOID.EMAIL_PROTECTION)
    (folder / "chain.pem").write_bytes(certificate + authority.pem)
    (folder / "key.pem").write_bytes(key)
    return {"c2pa_certificate": folder / "chain.pem", "c2pa_key": folder / "key.pem"}


def test_pictures_and_previews_are_signed(credentials, tmp_path):
    import c2pa

    with client_of(**credentials) as client:
        plain = ask(client).json()["data"][0]
        events = events_of(ask(client, stream=True, partial_images=1).text)
    sent = [data["b64_json"] for _, data in events if "b64_json" in data]
    assert len(sent) == 2
    for text in (plain["b64_json"], *sent):
        data = base64.b64decode(text)
        with c2pa.Reader("image/png", io.BytesIO(data)) as reader:
            assert reader.get_validation_state() in ("Valid", "Trusted")
    path = tmp_path / "picture.png"
    path.write_bytes(base64.b64decode(plain["b64_json"]))
    assert read_parameters(path) == plain["parameters"]


def test_a_picture_that_cannot_be_signed_is_not_handed_out(credentials, caplog):
    with client_of(**credentials) as client:
        client.app.state.context.signer.close()
        answer = ask(client)
    error_of(answer, 500, "internal_error")
    assert any(record.getMessage() == "a request failed" for record in caplog.records)


def test_pictures_by_address_only_where_that_is_switched_on(monkeypatch):
    asked = []

    async def fetch(url, settings):
        asked.append(url)
        return FACE_BYTES

    monkeypatch.setattr("fastface_trt.serving.pictures.fetch.fetch_picture", fetch)
    url = "https://example.com/ada.png"
    with client_of() as client:
        error_of(ask(client, face_url=url), 400, "invalid_request")
    assert asked == []
    with client_of(fetch_urls=True) as client:
        assert ask(client, face_url=url).status_code == 200
    assert asked == [url]
