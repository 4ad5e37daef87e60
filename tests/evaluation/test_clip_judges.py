"""CLIP, FCS and AE on a tiny random CLIP against transformers' own classes in float64."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from fastface_trt.checkpoints import HubItem
from fastface_trt.errors import MissingDependency, WeightsError
from fastface_trt.evaluation.data import Dataset, Pair
from fastface_trt.evaluation.judges import (
    CLIP_MEAN,
    CLIP_STD,
    AestheticJudge,
    ClipJudge,
    ClipView,
    FaceClipJudge,
    Sample,
    face_area,
)
from fastface_trt.mini import folders
from fastface_trt.runtime.face import Face

WIDTH, SIDE = 24, 32
PROMPTS = ("oil painting; person on a beach", "person in space, smiling" * 20)
DATA = Dataset("test", {}, [], {})


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = folders.CHECKPOINT / "tokenizer"
    for file in tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    vocabulary = json.loads((folder / "vocab.json").read_text())
    layer = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = CLIPConfig(
        projection_dim=WIDTH,
        text_config=layer
        | {
            "hidden_size": 16,
            "vocab_size": len(vocabulary),
            "bos_token_id": vocabulary["<|startoftext|>"],
            "eos_token_id": vocabulary["<|endoftext|>"],
            "projection_dim": WIDTH,
        },
        vision_config=layer
        | {"hidden_size": 16, "image_size": SIDE, "patch_size": 8, "projection_dim": WIDTH},
    )
    torch.manual_seed(0)
    model = CLIPModel(config)
    for parameter in model.parameters():  # larger than the initialisation, so that inputs matter
        torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def samples():
    rng = np.random.default_rng(3)
    pictures = [rng.integers(0, 256, (40, 56, 3), dtype=np.uint8) for _ in PROMPTS]
    return [Sample(p, Pair(n, "x", PROMPTS[n], n)) for n, p in enumerate(pictures)]


def preprocessed(picture):
    """What OpenAI's CLIP does: shorter side to SIDE, bicubic, centre, normalise."""
    image = Image.fromarray(picture)
    scale = SIDE / min(image.size)
    size = tuple(int(side * scale) for side in image.size)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
    unit = np.asarray(image.crop((left, top, left + SIDE, top + SIDE)), dtype=np.float64) / 255
    return torch.from_numpy(((unit - CLIP_MEAN) / CLIP_STD).transpose(2, 0, 1)[None])


@pytest.fixture(scope="module")
def reference(clip_folder):
    """Cosine of picture and prompt, and the unit embedding of a picture, in float64."""
    model = CLIPModel.from_pretrained(clip_folder).double().eval()
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)

    def judge(picture, prompt):
        tokens = tokenizer([prompt], truncation=True, max_length=77, return_tensors="pt")
        with torch.no_grad():
            out = model(input_ids=tokens.input_ids, pixel_values=preprocessed(picture))
        cosine = out.logits_per_image / model.logit_scale.exp()
        return float(cosine.detach()), out.image_embeds[0].numpy()

    return judge


def test_clip_score_is_that_of_transformers(clip_folder, samples, reference):
    judge = ClipJudge(ClipView(HubItem(str(clip_folder))))
    judge.load(DATA)
    expected = [reference(s.picture, s.pair.prompt)[0] for s in samples]
    assert judge.judge(samples) == pytest.approx(expected, abs=2e-6)
    assert abs(expected[0] - expected[1]) > 1e-3


class OneFace:
    """A face's box on the first sample, none on the second."""

    def __init__(self, box):
        self.box = box

    def load(self, data):
        pass

    def face(self, sample):
        if sample.pair.index:
            return None
        crop = np.zeros((224, 224, 3), np.uint8)
        return Face(np.zeros(512, np.float32), 1.0, crop, self.box, 0.9, 0, 1, 640)


def test_face_clip_score_sees_the_face_area_alone(clip_folder, samples, reference):
    judge = FaceClipJudge(ClipView(HubItem(str(clip_folder))), OneFace((9.6, -3.0, 41.2, 30.4)))
    judge.load(DATA)
    area = samples[0].picture[0:30, 10:41]
    expected = reference(area, samples[0].pair.prompt)[0]
    assert judge.judge(samples) == [pytest.approx(expected, abs=2e-6), None]


def test_face_area_stays_inside_and_needs_pixels():
    picture = np.zeros((40, 50, 3), np.uint8)
    assert face_area(picture, (-5.0, -5.0, 99.0, 99.0)).shape == (40, 50, 3)
    assert face_area(picture, (45.0, 0.0, 70.0, 40.0)) is None


def test_aesthetics_with_one_layer_and_with_five(clip_folder, samples, reference, tmp_path):
    torch.manual_seed(1)
    one = torch.nn.Linear(WIDTH, 1)
    torch.save(one.state_dict(), tmp_path / "one.pth")
    sizes = (WIDTH, 20, 12, 8, 6, 1)
    five = torch.nn.Sequential()
    for at, (inner, outer) in enumerate(pairwise(sizes)):
        five.append(torch.nn.Linear(inner, outer))
        if at < 3:
            five.append(torch.nn.Dropout(0.2))
    state = {f"layers.{name}": tensor for name, tensor in five.state_dict().items()}
    torch.save(state, tmp_path / "five.pth")
    for head, file in ((one, "one.pth"), (five, "five.pth")):
        judge = AestheticJudge(ClipView(HubItem(str(clip_folder))), HubItem(str(tmp_path / file)))
        judge.load(DATA)
        head = head.double().eval().requires_grad_(False)
        expected = [
            float(head(torch.from_numpy(reference(s.picture, s.pair.prompt)[1]))) for s in samples
        ]
        assert judge.judge(samples) == pytest.approx(expected, abs=1e-5)


def test_wrong_heads_and_absent_weights_are_one_sentence(clip_folder, tmp_path):
    torch.save({"weight": torch.zeros(1, 7), "bias": torch.zeros(1)}, tmp_path / "head.pth")
    judge = AestheticJudge(ClipView(HubItem(str(clip_folder))), HubItem(str(tmp_path / "head.pth")))
    with pytest.raises(WeightsError, match="not an aesthetic head for embeddings of 24"):
        judge.load(DATA)
    with pytest.raises(WeightsError, match="There is no"):
        ClipJudge(ClipView(HubItem(str(tmp_path / "absent")))).load(DATA)


def test_missing_package_is_named_with_the_hint(clip_folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(MissingDependency, match=r"need transformers.*--judges"):
        ClipView(HubItem(str(clip_folder))).load()
