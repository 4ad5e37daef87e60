"""Pairs are even, the same in every run, and every mistake in the data names its file."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from fastface_trt.errors import BadPicture, InvalidRequest
from fastface_trt.evaluation.data import load_dataset, sample_listed, sample_product
from fastface_trt.evaluation.mini import make_pairs, mini_dataset


@pytest.mark.parametrize(("people", "prompts"), [(54, 80), (54, 40), (5, 7), (6, 4), (1, 3)])
def test_all_pairs_occur_once_and_every_beginning_is_even(people, prompts):
    pairs = sample_product(people, prompts, None)
    assert sorted(pairs) == [(a, b) for a in range(people) for b in range(prompts)]
    for count in (1, people // 2 + 1, people * prompts // 2 + 1, people * prompts):
        chosen = pairs[:count]
        assert chosen == sample_product(people, prompts, count)
        for side, size in ((0, people), (1, prompts)):
            counts = Counter(pair[side] for pair in chosen)
            spread = max(counts.values()) - min(counts.get(n, 0) for n in range(size))
            assert spread <= 1 + (side == 1)


def test_too_many_pairs_are_refused():
    with pytest.raises(InvalidRequest, match="2 people with 3 prompts make 6"):
        sample_product(2, 3, 7)


def test_listed_pairs_take_turns_between_people():
    people = ["a"] * 10 + ["b"] * 3 + ["c"] * 3
    chosen = sample_listed(people, 9)
    assert len(set(chosen)) == 9
    assert Counter(people[index] for index in chosen) == {"a": 3, "b": 3, "c": 3}


def picture(path, value=100, size=(32, 24)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 50, 50)).save(path)


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(("ann", "ben", "cid")):
        picture(tmp_path / "id_photos" / f"{name}.png", 60 * number)
    (tmp_path / "prompts_nostyle.txt").write_text("person on a beach\n\nperson in space\n")
    (tmp_path / "prompts_style.txt").write_text("oil painting; person at sea\n")
    return tmp_path


def test_folder_in_the_layout_of_diverse_faces(folder):
    data = load_dataset(folder, None)
    assert len(data.pairs) == 9
    assert data.people["ben"].shape == (24, 32, 3)
    assert data.people["cid"][0, 0, 0] == 120
    assert [pair.index for pair in data.pairs] == list(range(9))
    assert len({pair.seed for pair in data.pairs}) == 9
    styled = load_dataset(folder, None, "style")
    assert {pair.prompt for pair in styled.pairs} == {"oil painting; person at sea"}


def test_fingerprint_tells_pictures_and_pairs_apart(folder):
    before = load_dataset(folder, 4).fingerprint()
    assert load_dataset(folder, 4).fingerprint() == before
    assert load_dataset(folder, 5).fingerprint() != before
    picture(folder / "id_photos" / "ann.png", 61)
    assert load_dataset(folder, 4).fingerprint() != before


def test_mistakes_in_a_folder_name_what_is_wrong(folder, tmp_path):
    with pytest.raises(InvalidRequest, match=r"no data at .*nowhere"):
        load_dataset(tmp_path / "nowhere", None)
    (folder / "prompts_style.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InvalidRequest, match=r"prompts_style\.txt cannot be read"):
        load_dataset(folder, None)
    (folder / "prompts_style.txt").unlink()
    (folder / "id_photos" / "dan.png").write_bytes(b"not a picture")
    with pytest.raises(BadPicture, match=r"dan\.png is not a PNG"):
        load_dataset(folder, None)
    picture(folder / "id_photos" / "dan.png", size=(8, 8))
    with pytest.raises(BadPicture, match=r"dan\.png has 8 × 8 pixels"):
        load_dataset(folder, None)


def test_single_characters_of_omnicontext(tmp_path):
    picture(tmp_path / "one" / "face.png", 1)
    picture(tmp_path / "two" / "face.png", 2)
    tasks = [
        {"task_type": "single_character", "prompt": "p0", "input_images": ["one/face.png"]},
        {"task_type": "single_object", "prompt": "p1", "input_images": ["one/face.png"]},
        {"task_type": "multi_character", "prompt": "p2", "input_images": ["a.png", "b.png"]},
        {"task_type": "single_character", "instruction": "p3", "input_images": ["two/face.png"]},
        {"task_type": "single_character", "prompt": "p4", "input_images": ["one/face.png"]},
    ]
    file = tmp_path / "context.json"
    file.write_text(json.dumps(tasks))
    data = load_dataset(file, None)
    assert {(pair.person, pair.prompt) for pair in data.pairs} == {
        ("face", "p0"),
        ("face-2", "p3"),
        ("face", "p4"),
    }
    assert data.people["face-2"][0, 0, 0] == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("{}", "is not a JSON list"),
        ('[{"prompt": "x"}]', "Task 0 of .* is not a task"),
        ("[]", "None of the 0 tasks"),
    ],
)
def test_mistakes_in_json_are_one_sentence(tmp_path, text, message):
    file = tmp_path / "tasks.json"
    file.write_text(text)
    with pytest.raises(InvalidRequest, match=message):
        load_dataset(file, None)


def test_mini_pairs_cover_styles_and_places_evenly():
    pairs = make_pairs(128)
    scenes = Counter((pair.scene.style, pair.scene.place) for pair in pairs)
    assert set(scenes.values()) == {2}
    assert len({pair.seed for pair in pairs}) == 128
    people = Counter(pair.person for pair in pairs)
    assert max(people.values()) - min(people.values()) <= 1


def test_mini_people_are_drawn_the_same_each_time():
    one, two = mini_dataset(3), mini_dataset(3)
    assert list(one.people) == ["person-00", "person-01", "person-02"]
    assert one.fingerprint() == two.fingerprint()
    assert not np.array_equal(one.people["person-00"], one.people["person-01"])
