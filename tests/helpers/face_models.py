"""Tiny ONNX face models for tests, which InsightFace's code runs as well as ours.

A "face" is a solid square drawn with `draw`: red marks it, green is half of its box's side in
detector pixels, blue the largest detector input at which it shows, divided by four. The square must
be much smaller than the box, so that non-maximum suppression makes one face of its many anchors.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# ArcFace's five key points, as fractions of half the box's side around the centre.
POINTS = np.array([[-0.4, -0.3], [0.4, -0.3], [0, 0.05], [-0.3, 0.45], [0.3, 0.45]], np.float32)


def draw(picture, centre, side, *, half, until=1020):
    """A face on an RGB picture [H, W, 3]; all in pixels, `half` at the detector's scale."""
    x, y = centre
    picture[y - side // 2 : y + side // 2, x - side // 2 : x + side // 2] = (255, half, until // 4)


def _model(nodes, inputs, outputs, constants):
    graph = helper.make_graph(
        nodes,
        "g",
        inputs,
        outputs,
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.checker.check_model(model)
    return model


def detector(*, fixed=None, outputs=9, needs_border=False, points=POINTS, batched=False):
    """SCRFD's layout: scores, boxes, key points for strides 8, 16, 32 with two anchors each.

    With 10 or 15 outputs strides go on to 64 and 128, with one anchor each. With `needs_border` it
    sees nothing unless the top left pixel is black. `batched` outputs have one dimension more.
    """
    f = np.float32
    strides, anchors = ((8, 16, 32), 2) if outputs <= 9 else ((8, 16, 32, 64, 128), 1)
    constants = {
        "bright": f((254 - 127.5) / 128),
        "scale": f(128),
        "shift": f(127.5),
        "dark": f(-0.9),
        "four": f(4),
        "one4": np.ones((1, 4, 1, 1), f),
        "offsets": points.reshape(1, 10, 1, 1).astype(f),
        "c0": np.array([0], np.int64),
        "c1": np.array([1], np.int64),
        "c2": np.array([2], np.int64),
        "c3": np.array([3], np.int64),
        "axis1": np.array([1], np.int64),
        "axes23": np.array([2, 3], np.int64),
        "zeros2": np.array([0, 0], np.int64),
        "ones2": np.array([1, 1], np.int64),
    }
    n = helper.make_node
    nodes = [
        n("Shape", ["image"], ["shape"]),
        n("Gather", ["shape", "c3"], ["width_i"]),
        n("Cast", ["width_i"], ["width"], to=TensorProto.FLOAT),
        n("Slice", ["image", "zeros2", "ones2", "axes23"], ["corner3"]),
        n("ReduceMax", ["corner3"], ["corner"], keepdims=0),
        n("Less", ["corner", "dark"], ["border"]),
    ]
    named = {"scores": [], "boxes": [], "points": []}
    for stride in strides:
        s = str(stride)
        constants[f"stride{s}"] = f(stride)
        nodes += [
            n("AveragePool", ["image"], ["m" + s], kernel_shape=[stride] * 2, strides=[stride] * 2),
            n("Slice", ["m" + s, "c0", "c1", "axis1"], ["red" + s]),
            n("Slice", ["m" + s, "c1", "c2", "axis1"], ["green" + s]),
            n("Slice", ["m" + s, "c2", "c3", "axis1"], ["blue" + s]),
            n("Greater", ["red" + s, "bright"], ["marked" + s]),
            n("Mul", ["blue" + s, "scale"], ["b1" + s]),
            n("Add", ["b1" + s, "shift"], ["b2" + s]),
            n("Mul", ["b2" + s, "four"], ["until" + s]),
            n("GreaterOrEqual", ["until" + s, "width"], ["shows" + s]),
            n("And", ["marked" + s, "shows" + s], ["seen0" + s]),
            n("And", ["seen0" + s, "border"], ["seen1" + s]),
            n("Cast", [("seen1" if needs_border else "seen0") + s], ["sc" + s], to=1),
            n("Mul", ["green" + s, "scale"], ["g1" + s]),
            n("Add", ["g1" + s, "shift"], ["g2" + s]),
            n("Div", ["g2" + s, "stride" + s], ["half" + s]),
            n("Mul", ["half" + s, "one4"], ["bx" + s]),
            n("Mul", ["half" + s, "offsets"], ["kp" + s]),
        ]
        for kind, source, size in (("scores", "sc", 1), ("boxes", "bx", 4), ("points", "kp", 10)):
            shape = [1, -1, size] if batched else [-1, size]
            constants[f"rows{size}"] = np.array(shape, np.int64)
            nodes += [  # [1, c, h, w] to [h · w · anchors, c]
                n("Transpose", [source + s], [f"{kind}t{s}"], perm=[0, 2, 3, 1]),
                n("Concat", [f"{kind}t{s}"] * anchors, [f"{kind}2{s}"], axis=3),
                n("Reshape", [f"{kind}2{s}", f"rows{size}"], [f"{kind}{s}"]),
            ]
            shape = [None if side == -1 else side for side in shape]
            named[kind].append(helper.make_tensor_value_info(f"{kind}{s}", 1, shape))
    side = [fixed, fixed] if fixed else ["height", "width"]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, *side])
    all_outputs = [*named["scores"], *named["boxes"], *named["points"]][:outputs]
    return _model(nodes, [image], all_outputs, constants)


def recogniser(size=512, *, factor=1.0, normalises=False):
    """112×112 crop to `size` numbers: means of 7×7 patches, times `factor`.

    With `normalises` it takes bytes, as MXNet's do, which begin with nodes of these names.
    """
    constants = {
        "start": np.array([0], np.int64),
        "end": np.array([size], np.int64),
        "axis": np.array([1], np.int64),
        "factor": np.float32(factor),
        "lift": np.float32(1.5),
        "mean": np.float32(127.5 if normalises else 0),
        "scale": np.float32(1 / 128 if normalises else 1),
    }
    prefix = "" if normalises else "pre"

    def n(*arguments, name="", **attributes):
        return helper.make_node(*arguments, name=name and prefix + name, **attributes)

    nodes = [
        n("Sub", ["data", "mean"], ["_minusscalar0"], name="_minusscalar0"),
        n("Mul", ["_minusscalar0", "scale"], ["_mulscalar0"], name="_mulscalar0"),
        n("AveragePool", ["_mulscalar0"], ["means"], kernel_shape=[7, 7], strides=[7, 7]),
        n("Flatten", ["means"], ["flat"]),
        n("Slice", ["flat", "start", "end", "axis"], ["cut"]),
        n("Add", ["cut", "lift"], ["lifted"]),
        n("Mul", ["lifted", "factor"], ["embedding"]),
    ]
    data = helper.make_tensor_value_info("data", TensorProto.FLOAT, [1, 3, 112, 112])
    out = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [1, size])
    return _model(nodes, [data], [out], constants)


def write(folder, *, det=None, rec=None):
    """A model folder as InsightFace reads it."""
    folder.mkdir(parents=True)
    onnx.save(det or detector(), str(folder / "det.onnx"))
    onnx.save(rec or recogniser(), str(folder / "rec.onnx"))
    return folder
