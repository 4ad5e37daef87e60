"""Portraits for PuLID: alignment, grey on white, the tower's pixels, and face parsers."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from fastface_trt.errors import EngineFailed, WeightsError
from fastface_trt.runtime.face import FaceParser, align_portrait, portrait_pixels

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# The pose of FFHQ's faces at 512 pixels.
POSE = np.float32(
    [
        [192.98138, 239.94708],
        [318.90277, 240.1936],
        [256.63416, 314.01935],
        [201.26117, 371.41043],
        [313.08905, 371.15118],
    ]
)


def similarity(points, angle, scale, shift):
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return (scale * points @ turn.T + shift).astype(np.float32)


@pytest.mark.parametrize("angle", [0.0, 0.4, -1.0])
def test_key_points_land_on_the_pose(angle):
    points = similarity(POSE - 256, angle, 0.4, (300, 250))
    picture = np.full((500, 600, 3), 40, np.uint8)
    for x, y in points:
        picture[round(float(y)) - 3 : round(float(y)) + 4, round(float(x)) - 3 :][:, :7] = 250
    portrait = align_portrait(picture, points)
    assert portrait.shape == (512, 512, 3)
    bright = portrait[..., 0] > 140
    for x, y in POSE:
        around = bright[round(float(y)) - 12 : round(float(y)) + 13, round(float(x)) - 12 :][:, :25]
        rows, columns = np.nonzero(around)
        assert abs(rows.mean() - 12) < 2
        assert abs(columns.mean() - 12) < 2


def test_beyond_the_picture_is_grey():
    portrait = align_portrait(np.zeros((20, 20, 3), np.uint8), POSE / 20)
    assert tuple(portrait[-1, -1]) == (135, 133, 132)


def test_points_on_one_spot_are_explained():
    with pytest.raises(EngineFailed, match="key points"):
        align_portrait(np.zeros((9, 9, 3), np.uint8), np.full((5, 2), 4, np.float32))


def expected_pixels(portrait, size, background=None):
    """What PuLID does, in torch: grey, white, bicubic with antialiasing, normalised."""
    import torch

    rgb = torch.from_numpy(portrait[:, :, ::-1].copy()).permute(2, 0, 1).double()[None] / 255
    grey = 0.299 * rgb[:, 0:1] + 0.587 * rgb[:, 1:2] + 0.114 * rgb[:, 2:3]
    if background is not None:
        grey = torch.where(torch.from_numpy(background), torch.ones_like(grey), grey)
    small = torch.nn.functional.interpolate(
        grey, size=(size, size), mode="bicubic", antialias=True, align_corners=False
    )
    mean, std = (torch.tensor(x).double()[:, None, None] for x in (MEAN, STD))
    return ((small.expand(-1, 3, -1, -1)[0] - mean) / std).numpy()


@pytest.mark.parametrize("masked", [False, True])
def test_pixels_equal_torch(masked):
    rng = np.random.default_rng(0)
    portrait = rng.integers(0, 256, (512, 512, 3), dtype=np.uint8)
    background = rng.random((512, 512)) > 0.7 if masked else None
    ours = portrait_pixels(portrait, size=336, mean=MEAN, std=STD, background=background)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected_pixels(portrait, 336, background), atol=1e-4)


def write_parser(path, classes=19):
    """A parser that calls a pixel class 1 (skin) where red is above ImageNet's mean, else 0."""
    other = classes - 2
    nodes = [
        helper.make_node("Split", ["pixels"], ["r", "g", "b"], axis=1, num_outputs=3),
        helper.make_node("Neg", ["r"], ["not_r"]),
        helper.make_node("Expand", ["low", "shape"], ["others"]),
        helper.make_node("Concat", ["not_r", "r", "others"], ["scores"], axis=1),
    ]
    size = [1, 3, 512, 512]
    graph = helper.make_graph(
        nodes,
        "parser",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, size)],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, classes, 512, 512])],
        [
            helper.make_tensor("low", TensorProto.FLOAT, [1], [-9.0]),
            helper.make_tensor("shape", TensorProto.INT64, [4], [1, other, 512, 512]),
        ],
    )
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    return path


def test_a_parser_finds_the_background(tmp_path):
    portrait = np.zeros((512, 512, 3), np.uint8)
    portrait[100:300, 200:400, 2] = 200  # red, in BGR
    background = FaceParser(write_parser(tmp_path / "parser.onnx")).background(portrait)
    assert not background[100:300, 200:400].any()
    assert background.sum() == 512 * 512 - 200 * 200


def test_what_is_no_parser_is_explained(tmp_path):
    portrait = np.zeros((512, 512, 3), np.uint8)
    with pytest.raises(WeightsError, match=r"a\.onnx is no face parser"):
        FaceParser(write_parser(tmp_path / "a.onnx", classes=7)).background(portrait)
    (tmp_path / "b.onnx").write_bytes(b"no")
    with pytest.raises(WeightsError, match=r"b\.onnx is no face parser"):
        FaceParser(tmp_path / "b.onnx").background(portrait)
