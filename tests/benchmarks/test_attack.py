"""What `benchmarks.attack` sends is what it says, and its numbers are those of what was seen."""

import io
import re

import pytest
from PIL import Image

from benchmarks.attack.answers import Exchange, loads_nothing_from_elsewhere, refused_and_closed
from benchmarks.attack.attacker import Me
from benchmarks.attack.attacks import ATTACKS, chunks, deep_png, scans
from benchmarks.attack.bystanders import Seen, longest_gap

ME = Me("key", "face_1")


def test_the_gap_is_between_good_answers_and_to_the_windows_ends():
    seen = [Seen("alive", done - 0.1, done, 200) for done in (0.5, 1.0, 2.5, 3.0, 9.0)]
    assert longest_gap(seen, 0.0, 3.2) == 1.5
    assert longest_gap(seen, 0.0, 6.0) == 3.0
    failed = [*seen[:2], Seen("alive", 2.4, 2.5, 503), *seen[3:]]
    assert longest_gap(failed, 0.0, 3.2) == 2.0
    assert longest_gap([], 1.0, 4.0) == 3.0


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_an_attack_is_let_in_by_the_limit_of_bytes_and_says_its_length(attack):
    payload = attack.payload(ME)
    for one in [payload] if isinstance(payload, bytes) else payload:
        head, _, body = one.partition(b"\r\n\r\n")
        length = re.search(rb"Content-Length: (\d+)", head)
        if length is not None:
            assert int(length[1]) <= 20_000_000
            if attack.delivery in ("whole", "trickle"):
                assert len(body) == int(length[1])
            else:
                assert len(body) <= int(length[1])


def test_names_of_attacks_are_of_one_attack_each():
    assert len({one.name for one in ATTACKS}) == len(ATTACKS)


def test_hostile_pictures_are_pictures():
    jpeg = scans(3, side=64)
    assert jpeg.count(b"\xff\xda") == scans(0, side=64).count(b"\xff\xda") + 3
    Image.open(io.BytesIO(jpeg)).load()
    png = Image.open(io.BytesIO(deep_png(40, 30)))
    png.load()
    assert png.size == (40, 30)


def test_chunks_are_of_one_byte():
    assert chunks(b"ab", ";x") == b"1;x\r\na\r\n1;x\r\nb\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    ("statuses", "closed", "good"),
    [((400,), True, True), ((), True, True), ((200,), True, False), ((400,), False, False)],
)
def test_a_refusal_is_an_error_and_the_connections_end(statuses, closed, good):
    assert refused_and_closed(Exchange(statuses, closed, "")) is good


def test_a_page_may_load_its_own_files_under_a_policy():
    page = "HTTP/1.1 200 OK\r\nContent-Security-Policy: default-src 'self'\r\n\r\n"
    assert loads_nothing_from_elsewhere(Exchange((200,), True, page + '<script src="/a.js">'))
    assert not loads_nothing_from_elsewhere(
        Exchange((200,), True, page + '<script src="https://cdn/a.js">')
    )
    assert not loads_nothing_from_elsewhere(Exchange((200,), True, '<script src="/a.js">'))
