import itertools

import numpy as np
import pytest

from fastface_trt.errors import Busy
from fastface_trt.serving.http.errors import UnknownFace
from fastface_trt.serving.http.faces import FaceRegistry
from tests.serving.http import http_parts
from tests.serving.http.http_parts import FACE, FACE_BYTES, ask, client_of, error_of
from tests.serving.loopback import wait_until
from tests.serving.scripted_worker import make_face

KEYS = ("key-of-ada", "key-of-bruno")


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def register(client, **headers):
    answer = client.post("/v1/faces", files={"image": FACE_BYTES}, headers=headers)
    assert answer.status_code == 201, answer.text
    return answer.json()


def test_a_face_is_registered_used_listed_and_deleted():
    with client_of() as client:
        one = register(client)
        assert one["box"] == [1.0, 2.0, 30.0, 40.5]
        assert (one["score"], one["index"], one["count"]) == (0.75, 0, 2)
        assert one["expires_at"] - one["created_at"] == 3600
        other = client.post("/v1/faces", json={"image": FACE, "face_index": 1}).json()
        assert other["index"] == 1
        assert [face["id"] for face in client.get("/v1/faces").json()["data"]] == [
            one["id"],
            other["id"],
        ]
        assert ask(client, face_id=one["id"]).status_code == 200
        assert np.all(client.worker.submitted[-1].face.embedding == 1.0)
        assert len(client.worker.analysed) == 2  # not again for the picture
        assert client.worker.forgotten == 0
        assert client.delete(f"/v1/faces/{one['id']}").status_code == 204
        assert (
            client.worker.forgotten == 1
        )  # workers keep what they worked out for the next picture
        error_of(ask(client, face_id=one["id"]), 404, "unknown_face")
        error_of(client.delete(f"/v1/faces/{one['id']}"), 404, "unknown_face")
        assert [face["id"] for face in client.get("/v1/faces").json()["data"]] == [other["id"]]


def test_a_form_may_name_a_registered_face_and_needs_no_file():
    with client_of() as client:
        one = register(client)
        fields = {"prompt": (None, "a portrait"), "face_id": (None, one["id"])}
        assert client.post("/v1/images/edits", files=fields).status_code == 200


def test_a_registered_face_is_one_already():
    with client_of() as client:
        one = register(client)
        error = error_of(ask(client, face_id=one["id"], face_index=1), 400, "invalid_request")
        assert error["param"] == "face_index"


def test_registered_faces_of_one_person_are_joined_where_the_export_takes_several(monkeypatch):
    portrait = {"adapter_kind": "faceid-portrait", "max_faces": 2, "image_token_count": 32}
    manifest = http_parts.mini_manifest().model_copy(update=portrait)
    with client_of() as client:  # the mini model takes one
        ids = [register(client)["id"] for _ in range(2)]
        error = error_of(ask(client, face=..., face_ids=ids), 400, "invalid_request")
        assert error["param"] == "face_ids"
        assert "one picture of a person" in error["message"]
        assert ask(client, face=..., face_ids=ids[:1]).status_code == 200
        assert client.get("/v1/models").json()["data"][0]["max_faces"] == 1
    monkeypatch.setattr(http_parts, "mini_manifest", lambda: manifest)
    with client_of() as client:
        ids = [register(client)["id"] for _ in range(3)]
        assert ask(client, face=..., face_ids=ids[:2]).status_code == 200
        assert len(client.worker.submitted[-1].face.others) == 1
        error_of(ask(client, face=..., face_ids=ids), 400, "invalid_request")
        error_of(ask(client, face=..., face_ids=[ids[0], "face_none"]), 404, "unknown_face")
        error_of(ask(client, face_ids=ids[:2]), 400, "invalid_request")  # and face
        assert client.get("/v1/models").json()["data"][0]["max_faces"] == 2


def test_faces_belong_to_the_key_that_made_them():
    with client_of(api_keys=KEYS) as client:
        ada, bruno = ({"Authorization": f"Bearer {key}"} for key in KEYS)
        one = register(client, **ada)
        assert client.get("/v1/faces", headers=bruno).json()["data"] == []
        error_of(client.delete(f"/v1/faces/{one['id']}", headers=bruno), 404, "unknown_face")
        body = {"prompt": "a portrait", "face_id": one["id"]}
        other = client.post("/v1/images/generations", json=body, headers=bruno)
        error_of(other, 404, "unknown_face")
        assert client.post("/v1/images/generations", json=body, headers=ada).status_code == 200


@pytest.mark.parametrize(
    "request_of",
    [
        {"json": {}},
        {"json": {"image": "no picture"}},
        {"json": {"image": FACE, "name": "Ada"}},
        {"files": {"portrait": FACE_BYTES}},
        {"files": {"face_index": (None, "0")}},
    ],
)
def test_what_is_no_face_to_register(request_of):
    with client_of() as client:
        assert client.post("/v1/faces", **request_of).status_code == 400
        assert client.get("/v1/faces").json()["data"] == []


def test_a_full_registry_refuses_and_drops_nobody():
    with client_of(max_faces=1) as client:
        one = register(client)
        answer = client.post("/v1/faces", files={"image": FACE_BYTES})
        error_of(answer, 429, "busy")
        assert 3500 < int(answer.headers["retry-after"]) <= 3600
        assert [face["id"] for face in client.get("/v1/faces").json()["data"]] == [one["id"]]


def test_faces_expire_by_the_clock_that_nobody_sets(clock, monkeypatch):
    registry = FaceRegistry(60.0, 10, clock)
    one = registry.add("ada", make_face())
    monkeypatch.setattr("time.time", lambda: 4e9)  # the wall clock jumps ahead
    clock.now += 30
    two = registry.add("ada", make_face())
    assert registry.get("ada", one.id) is one
    clock.now += 30
    with pytest.raises(UnknownFace):
        registry.get("ada", one.id)
    assert registry.of("ada") == [two]
    assert len(registry) == 1


def test_expired_faces_are_dropped_though_nobody_asks(clock):
    registry = FaceRegistry(60.0, 10, clock)
    registry.add("ada", make_face())
    clock.now += 61
    registry.forget_expired()
    assert registry._faces == {}


def test_expired_faces_make_room(clock):
    registry = FaceRegistry(60.0, 1, clock)
    registry.add("ada", make_face())
    with pytest.raises(Busy) as caught:
        registry.add("bruno", make_face())
    assert caught.value.retry_after == 60
    clock.now += 60
    registry.add("bruno", make_face())


def test_ids_cannot_be_guessed_and_tell_nothing(clock):
    registry = FaceRegistry(60.0, 1000, clock)
    ids = [registry.add("ada", make_face()).id for _ in range(100)]
    assert all(name.startswith("face_") and len(name) >= 5 + 22 for name in ids)
    assert all(a[5:12] != b[5:12] for a, b in itertools.combinations(ids, 2))


def test_neither_owner_nor_face_is_in_what_a_log_would_show(clock):
    one = FaceRegistry(60.0, 1, clock).add("key 0123", make_face())
    assert "0123" not in repr(one)
    assert "embedding" not in repr(one)


def test_when_the_server_stops_it_forgets_all():
    with client_of() as client:
        register(client)
        faces = client.app.state.context.faces
        assert faces.count == 1
    assert faces.count == 0


def test_workers_keep_nothing_of_a_face_for_longer_than_its_time():
    with client_of(faces_ttl=0.05) as client:
        register(client)
        before = client.worker.forgotten
        wait_until(lambda: client.worker.forgotten >= before + 2, 60)
        assert client.get("/v1/faces").json()["data"] == []
