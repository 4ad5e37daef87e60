"""Replay of the recorded pipeline on both backends, held to the authors' numbers."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fastface_trt.errors import InvalidRequest, UnknownName, WeightsError
from fastface_trt.verify.replay import replay
from tests.conftest import GOLDEN

PIPELINE = GOLDEN / "pipeline"


def run(tmp_path, **options):
    arguments = {
        "model": PIPELINE / "model",
        "cases": PIPELINE / "cases.json",
        "tensors": PIPELINE / "tensors.safetensors",
        "out": tmp_path / "out.safetensors",
    }
    return replay(**(arguments | options))


def worst(written, recorded, case):
    return max(
        float(np.linalg.norm(tensor - recorded[name]) / np.linalg.norm(recorded[name]))
        for name, tensor in written.items()
        if name.startswith(f"{case}.")
    )


@pytest.mark.parametrize(
    ("backend", "plan"),
    [
        pytest.param("torch", "full", marks=pytest.mark.engines),
        ("torch", "exact"),
        ("onnxruntime", "full"),  # whose export the next one finds in the cache
        ("onnxruntime", "exact"),
    ],
)
def test_every_step_equals_the_recording(tmp_path, backend, plan):
    run(tmp_path, backend=backend, plan=plan)
    written = load_file(tmp_path / "out.safetensors")
    recorded = load_file(PIPELINE / "tensors.safetensors")
    kinds = (
        ("guided", "latents") if plan == "exact" else ("eps", "guided", "latents", "model_input")
    )
    expected = {k for k in recorded if k.rsplit(".", 1)[1] in kinds and not k.startswith("input.")}
    assert written.keys() == expected
    for case in json.loads((PIPELINE / "cases.json").read_text()):
        tolerance = 2e-3 if "am2" in case["name"] else 1e-3
        assert worst(written, recorded, case["name"]) < tolerance, case["name"]


PORTRAIT = GOLDEN / "portrait"
OF_PORTRAIT = {
    "model": PORTRAIT / "model",
    "shared": PORTRAIT,
    "cases": PORTRAIT / "cases.json",
    "tensors": PORTRAIT / "tensors.safetensors",
}


@pytest.mark.parametrize(
    ("backend", "names"),
    [
        ("torch", ()),
        pytest.param(
            "onnxruntime",
            ("one_face_cfg", "no_cfg", "dcg", "am1_dcg", "am2_dcg"),
            marks=pytest.mark.engines,  # another UNet to export
        ),
        pytest.param("onnxruntime", ("unnorm_am1_dcg",), marks=pytest.mark.engines),
    ],
)
def test_portraits_of_a_set_equal_the_recording_at_every_step(tmp_path, backend, names):
    """One and five faces of the authors' own code in engines that take up to five."""
    written = run(tmp_path, backend=backend, names=names, **OF_PORTRAIT)
    recorded = load_file(OF_PORTRAIT["tensors"])
    cases = [case["name"] for case in json.loads(OF_PORTRAIT["cases"].read_text())]
    for case in names or cases:
        ours = {name: written[name] for name in recorded if name.startswith(f"{case}.")}
        assert ours
        assert worst(ours, recorded, case) < (2e-3 if "am2" in case else 1e-3), case
    assert {name.split(".")[0] for name in written} == {*(names or cases)}


def test_a_set_without_a_unet_or_a_file_of_a_case_is_told(tmp_path):
    with pytest.raises(WeightsError, match="unet folder"):
        run(tmp_path, **(OF_PORTRAIT | {"shared": tmp_path}))
    cases = json.loads(OF_PORTRAIT["cases"].read_text())
    (tmp_path / "cases.json").write_text(json.dumps([cases[0] | {"adapter_file": "x.bin"}]))
    with pytest.raises(UnknownName, match=r"x\.bin"):
        run(tmp_path, **(OF_PORTRAIT | {"cases": tmp_path / "cases.json"}))


def test_one_case_by_name(tmp_path):
    written = run(tmp_path, backend="torch", names=["hyper_dcg"])
    assert {name.split(".")[0] for name in written} == {"hyper_dcg"}
    with pytest.raises(UnknownName, match="hyper_dcg"):
        run(tmp_path, backend="torch", names=["hyper_dgc"])
    with pytest.raises(UnknownName, match="onnxruntime"):
        run(tmp_path, backend="onnxruntim")


def edited(tmp_path, change):
    cases = [
        c for c in json.loads((PIPELINE / "cases.json").read_text()) if c["name"] == "hyper_am1_dcg"
    ]
    change(cases[0])
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    return tmp_path / "cases.json"


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unchanged")
    return run(folder, backend="torch", cases=edited(folder, lambda case: None))


@pytest.mark.parametrize(
    "change",
    [
        lambda case: case.update(ip_adapter_scale=0.1),
        lambda case: case.update(faceid_lora_scale=0.0),
        lambda case: case["guidance"].update(rescale_phi=0.1),
        lambda case: case["guidance"].update(alpha=[1.0, 2.0, 2.0, 1.0]),
        lambda case: case["attention_manipulation_parameters"]["up"].update(power=2.0),
        lambda case: case["attention_manipulation_parameters"].update(
            mid={"scale": 3.0, "power": 1.0}
        ),
        lambda case: case["scheduler"].update(beta_end=0.02),
        lambda case: case.update(timesteps=[999.0, 666.0, 333.0, 100.0]),
    ],
)
def test_every_parameter_of_a_case_is_read(tmp_path, unchanged, change):
    after = run(tmp_path, backend="torch", cases=edited(tmp_path, change))
    name = "hyper_am1_dcg.step3.latents"
    assert np.abs(unchanged[name] - after[name]).max() > 1e-4


def test_other_numbers_of_steps(tmp_path):
    def two_steps(case):
        case["timesteps"] = [999.0, 499.0]
        case["guidance"].update(alpha=[1.0, 1.5], beta=[1.0, 3.0])

    written = run(tmp_path, backend="torch", cases=edited(tmp_path, two_steps))
    assert len([n for n in written if n.endswith("latents")]) == 2


def test_tokens_are_projected_where_none_were_recorded(tmp_path):
    recorded = load_file(PIPELINE / "tensors.safetensors")
    del recorded["input.iptokens"]
    save_file(recorded, tmp_path / "t.safetensors")
    case = ["hyper_plain"]
    ours = run(tmp_path, backend="torch", tensors=tmp_path / "t.safetensors", names=case)
    assert worst(ours, recorded, "hyper_plain") < 1e-3


def test_missing_pieces_are_named(tmp_path):
    recorded = load_file(PIPELINE / "tensors.safetensors")
    for missing, case in (
        ("input.pooled", "hyper_plain"),
        ("turbo_am2_dcg.step0.noise", "turbo_am2_dcg"),
    ):
        save_file({k: v for k, v in recorded.items() if k != missing}, tmp_path / "t.safetensors")
        with pytest.raises(WeightsError, match=r"pooled|noise"):
            run(tmp_path, backend="torch", tensors=tmp_path / "t.safetensors", names=[case])
    with pytest.raises(WeightsError, match="no file"):
        run(tmp_path, cases=tmp_path / "absent.json")
    shutil.copytree(PIPELINE / "model" / "unet", tmp_path / "model" / "unet")
    with pytest.raises(WeightsError, match="exactly one adapter"):
        run(tmp_path, model=tmp_path / "model")
    bad = edited(tmp_path, lambda case: case["guidance"].update(alpha=[1.0]))
    with pytest.raises(InvalidRequest, match="1 values for 4 steps"):
        run(tmp_path, backend="torch", cases=bad)


def test_faceid_projects_the_embedding_alone(tmp_path):
    """The golden's adapter without its resampler is a FaceID adapter."""
    import torch

    from fastface_trt.export.adapters import load_projection, read_adapter

    model, tensors = tmp_path / "model", tmp_path / "t.safetensors"
    shutil.copytree(PIPELINE / "model", model)
    (file,) = model.glob("*.safetensors")
    save_file({k: v for k, v in load_file(file).items() if "perceiver" not in k}, file)
    adapter = read_adapter(file)
    assert adapter.kind == "faceid"
    recorded = load_file(PIPELINE / "tensors.safetensors")
    embedding = torch.from_numpy(recorded["input.id_embeds"])
    with torch.no_grad():
        tokens = load_projection(adapter)(torch.cat((torch.zeros_like(embedding), embedding)))
    gone = ("input.iptokens", "input.clip_embeds", "input.negative_clip_embeds")
    recorded = {name: array for name, array in recorded.items() if name not in gone}
    results = []
    for given in ({}, {"input.iptokens": tokens.numpy()}):
        save_file(recorded | given, tensors)
        results.append(
            run(tmp_path, backend="torch", model=model, tensors=tensors, names=["hyper_plain"])
        )
    assert results[0]
    for name, expected in results[1].items():
        np.testing.assert_array_equal(results[0][name], expected)


def test_pulid_files_are_refused(tmp_path):
    from safetensors.torch import save_file as save_torch

    from tests.helpers.tiny_pulid import pulid_tensors, tiny_id_former

    model = tmp_path / "model"
    shutil.copytree(PIPELINE / "model" / "unet", model / "unet")
    save_torch(pulid_tensors(tiny_id_former()), model / "pulid.safetensors")
    with pytest.raises(WeightsError, match="PuLID"):
        run(tmp_path, model=model, backend="torch")
