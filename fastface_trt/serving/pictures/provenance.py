"""Signed provenance: a C2PA manifest in every picture, which says that a model made it.

It lies in the file beside the mark and the parameters of `runtime.picture_file` and covers them:
who changes a pixel or a word breaks the signature. Who removes the manifest leaves a picture
without one, which proves nothing. The claim is the one of the C2PA specification (2.x) for such
pictures: the action `c2pa.created` with the IPTC's digital source type.
"""

import io
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np

from fastface_trt import __version__
from fastface_trt.errors import FastFaceError, InvalidRequest, MissingDependency, install_hint
from fastface_trt.runtime.picture_file import DIGITAL_SOURCE_TYPE, PictureFormat, encode_picture
from fastface_trt.serving.settings import ServerSettings

_ALGORITHMS = ("es256", "ps256", "es384", "ps384", "es512", "ps512", "ed25519")
"""Tried in this order: which one a key is for is known by those that refuse it."""
_SOFTWARE = {"name": "FastFace-TRT", "version": __version__}
_MANIFEST = json.dumps(
    {
        "claim_generator_info": [_SOFTWARE],
        "assertions": [
            {
                "label": "c2pa.actions.v2",
                "data": {
                    "actions": [
                        {
                            "action": "c2pa.created",
                            "digitalSourceType": DIGITAL_SOURCE_TYPE,
                            "softwareAgent": _SOFTWARE,
                        }
                    ]
                },
            }
        ],
    }
)
_SETTINGS = {
    # Every signature is verified as it is made. Nothing here talks to the network. Whom a verifier
    # trusts is the verifier's business.
    "verify": {"verify_after_sign": True, "verify_trust": False, "remote_manifest_fetch": False},
    "builder": {"thumbnail": {"enabled": False}},
}


class SigningFailed(FastFaceError):
    """A picture could not be signed, so it must not be handed out."""

    code = "signing_failed"


class PictureSigner:
    """Signs pictures with one certificate; threads may share it. Close it to forget the key."""

    def __init__(self, c2pa: Any, signer: Any) -> None:
        self._c2pa, self._signer = c2pa, signer
        self._lock = threading.Lock()

    @classmethod
    def load(cls, certificate: Path, key: Path) -> "PictureSigner":
        """Read the chain (PEM, the signer's own certificate first) and the private key (PEM).

        A small picture is signed with them at once, and the signature verified. Raises
        `InvalidRequest` when a file cannot be read or the two are no credentials for C2PA,
        `MissingDependency` without c2pa-python.
        """
        try:
            import c2pa
        except ImportError:
            raise MissingDependency(
                "Signed provenance needs c2pa-python.",
                f"Run {install_hint('provenance')}",
            ) from None
        chain, secret = _read(certificate), _read(key)
        picture = encode_picture(np.zeros((16, 16, 3), np.uint8), parameters={})
        reasons = dict[str, str]()
        for algorithm in _ALGORITHMS:
            try:
                info = c2pa.C2paSignerInfo(algorithm.encode(), chain, secret, None)
                signer = cls(c2pa, c2pa.Signer.from_info(info))
            except c2pa.C2paError as error:
                reasons[algorithm] = str(error)
                continue
            try:
                signer.sign(picture)
            except SigningFailed as error:
                signer.close()
                reasons[algorithm] = str(error.__cause__)
                continue
            return signer
        raise InvalidRequest(
            f"{certificate} and {key} cannot sign for C2PA: {_most_relevant(reasons)}.",
            "Give the PEM chain of a certificate for C2PA, the signer's own first, and its key.",
        )

    def sign(self, picture: bytes, format: PictureFormat = "png") -> bytes:
        """The file with a signed manifest; all else in it stays. Raises `SigningFailed`."""
        signed = io.BytesIO()
        try:
            with (
                self._lock,
                self._c2pa.Settings.from_dict(_SETTINGS) as settings,
                self._c2pa.Context(settings=settings) as context,
                self._c2pa.Builder(_MANIFEST, context=context) as builder,
            ):
                builder.sign(self._signer, f"image/{format}", io.BytesIO(picture), signed)
        except self._c2pa.C2paError as error:
            raise SigningFailed(
                "A picture could not be signed.", "Check whether the certificate has expired."
            ) from error
        return signed.getvalue()

    def close(self) -> None:
        """Forget the key."""
        with self._lock:
            self._signer.close()


def open_signer(settings: ServerSettings) -> PictureSigner | None:
    """The signer that the settings ask for, if they do; see `PictureSigner.load`."""
    certificate, key = settings.c2pa_certificate, settings.c2pa_key
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise InvalidRequest(
            "Signed provenance needs a certificate and its key; one of them is missing.",
            "Give both c2pa_certificate and c2pa_key, or neither.",
        )
    return PictureSigner.load(certificate, key)


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidRequest(
            f"{path} cannot be read: {error.strerror or error}.", "Check its path and permissions."
        ) from None
    if b"-----BEGIN" not in data or b"\0" in data:
        raise InvalidRequest(f"{path} is not a PEM file.", "Convert it with openssl.")
    return data


def _most_relevant(reasons: dict[str, str]) -> str:
    """Of what the algorithms said, what is not about a key of another kind."""
    about_kind = ("algorithm", "unsupported")
    others = [text for text in reasons.values() if not any(word in text for word in about_kind)]
    return (others or list(reasons.values()))[0].rstrip(".")
