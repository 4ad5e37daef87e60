import io
import json
import sys

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from PIL import Image

from fastface_trt import __version__
from fastface_trt.errors import InvalidRequest, MissingDependency
from fastface_trt.runtime.picture_file import DIGITAL_SOURCE_TYPE, encode_picture, read_parameters
from fastface_trt.serving.pictures.provenance import (
    PictureSigner,
    SigningFailed,
    open_signer,
)
from fastface_trt.serving.settings import ServerSettings
from tests.serving.certificates import Authority

PIXELS = np.random.default_rng(5).integers(0, 256, (32, 48, 3)).astype(np.uint8)
FILES = {
    format: encode_picture(PIXELS, parameters={"prompt": "a person", "seed": 3}, format=format)
    for format in ("png", "jpeg", "webp")
}
PNG = FILES["png"]


@pytest.fixture(scope="module")
def authority():
    return Authority()


@pytest.fixture
def credentials(authority, tmp_path):
    def write(certificate, key):
        paths = tmp_path / "chain.pem", tmp_path / "key.pem"
        for path, data in zip(paths, (certificate, key), strict=True):
            path.write_bytes(data)
        return paths

    certificate, key = authority.issue("A signer", usage=ExtendedKeyUsageOID.EMAIL_PROTECTION)
    write.paths = write(certificate + authority.pem, key)
    return write


@pytest.fixture
def signer(credentials):
    signer = PictureSigner.load(*credentials.paths)
    yield signer
    signer.close()


def report(data, anchors=None, format="png"):
    """What a verifier that trusts `anchors` (PEM) finds."""
    import c2pa

    settings = {"verify": {"verify_trust": anchors is not None}}
    if anchors is not None:
        settings["trust"] = {"user_anchors": anchors.decode()}
    with (
        c2pa.Context.from_dict(settings) as context,
        c2pa.Reader(f"image/{format}", io.BytesIO(data), context=context) as reader,
    ):
        return reader.get_validation_state(), json.loads(reader.json())


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_a_signed_picture_says_who_made_it_and_how(signer, authority, format):
    signed = signer.sign(FILES[format], format)
    state, found = report(signed, authority.pem, format)
    assert state == "Trusted"
    manifest = found["manifests"][found["active_manifest"]]
    (action,) = [
        action
        for assertion in manifest["assertions"]
        if assertion["label"].startswith("c2pa.actions")
        for action in assertion["data"]["actions"]
    ]
    assert action["action"] == "c2pa.created"
    assert action["digitalSourceType"] == DIGITAL_SOURCE_TYPE
    assert action["softwareAgent"] == {"name": "FastFace-TRT", "version": __version__}
    assert manifest["signature_info"]["common_name"] == "A signer"
    assert report(signed, Authority("Another").pem, format)[0] != "Trusted"


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_pixels_mark_and_parameters_stay(signer, tmp_path, format):
    path = tmp_path / "signed"
    path.write_bytes(signer.sign(FILES[format], format))
    assert read_parameters(path) == {"prompt": "a person", "seed": 3}
    with Image.open(path) as image, Image.open(io.BytesIO(FILES[format])) as before:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(before))
        xmp = image.info["XML:com.adobe.xmp" if format == "png" else "xmp"]
        assert DIGITAL_SOURCE_TYPE in str(xmp)
        assert {**image.info} == {**before.info}


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_a_change_breaks_the_signature(signer, format):
    signed = signer.sign(FILES[format], format)
    changed = signed.replace(b"a person", b"a parson")
    assert changed != signed
    assert report(changed, format=format)[0] == "Invalid"


def test_no_prompt_or_path_of_this_machine_is_in_the_manifest(signer, credentials):
    signed = signer.sign(PNG)
    assert signed.count(b"a person") == PNG.count(b"a person")
    assert str(credentials.paths[0].parent).encode() not in signed


def test_settings_choose(credentials):
    assert open_signer(ServerSettings()) is None
    certificate, key = credentials.paths
    signer = open_signer(ServerSettings(c2pa_certificate=certificate, c2pa_key=key))
    signer.close()
    for one in ({"c2pa_certificate": certificate}, {"c2pa_key": key}):
        with pytest.raises(InvalidRequest, match="one of them is missing"):
            open_signer(ServerSettings(**one))


def test_wrong_files_are_found_at_the_start(credentials, authority, tmp_path):
    certificate, key = credentials.paths
    with pytest.raises(InvalidRequest, match=r"nothing\.pem cannot be read"):
        PictureSigner.load(tmp_path / "nothing.pem", key)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        PictureSigner.load(tmp_path, key)
    (tmp_path / "text.pem").write_text("text")
    with pytest.raises(InvalidRequest, match="not a PEM file"):
        PictureSigner.load(certificate, tmp_path / "text.pem")
    for wrong in ((certificate, certificate), (key, key), (key, certificate)):
        with pytest.raises(InvalidRequest, match="cannot sign for C2PA"):
            PictureSigner.load(*wrong)


def test_credentials_that_do_not_fit_are_found_at_the_start(credentials, authority):
    chain = credentials.paths[0].read_bytes()
    mail = ExtendedKeyUsageOID.EMAIL_PROTECTION
    other_key = authority.issue("Other", usage=mail)[1]
    rsa_key = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    web_chain, web_key = authority.issue("For the web")
    old_chain, old_key = authority.issue("Expired", usage=mail, days=-1)
    for wrong in (
        (chain, other_key),
        (chain, rsa_key),
        (web_chain + authority.pem, web_key),
        (old_chain + authority.pem, old_key),
    ):
        with pytest.raises(InvalidRequest, match="cannot sign for C2PA"):
            PictureSigner.load(*credentials(*wrong))


def test_a_picture_that_cannot_be_signed_is_not_handed_out(signer):
    with pytest.raises(SigningFailed):
        signer.sign(b"no picture")
    assert report(signer.sign(PNG))[0] == "Valid"


def test_without_the_package(credentials, monkeypatch):
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(MissingDependency, match="c2pa-python"):
        PictureSigner.load(*credentials.paths)
