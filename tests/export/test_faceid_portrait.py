"""FaceID-Portrait: its two files, its export, and people whom several pictures show."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

from fastface_trt import FastFace
from fastface_trt.checkpoints import HubItem
from fastface_trt.cli.main import cli
from fastface_trt.embedding.host import Host
from fastface_trt.embedding.session import Session
from fastface_trt.engines import contract
from fastface_trt.engines.manifest import MAX_FACES
from fastface_trt.errors import InvalidRequest, WeightsError
from fastface_trt.export.adapters import (
    FaceIdProjection,
    QueryResampler,
    attach_adapter,
    load_projection,
    read_adapter,
)
from fastface_trt.export.exporter import run_export
from fastface_trt.export.options import ExportOptions
from fastface_trt.export.oracle import TorchUNet
from fastface_trt.runtime.conditioning import token_mask
from fastface_trt.runtime.face import one_person
from tests.conftest import GOLDEN
from tests.export.test_exporter import open_module, quiet, unet_inputs
from tests.helpers import face_models
from tests.helpers.tiny_sdxl import TEXT_WIDTHS, adapter_tensors, tiny_unet

TOKENS, FACES = 16, 3
PORTRAIT = GOLDEN / "portrait" / "model"
NORMAL = PORTRAIT / "ip-adapter-faceid-portrait_tiny.safetensors"
UNNORM = PORTRAIT / "ip-adapter-faceid-portrait_tiny_unnorm.safetensors"


def write_adapter(path, projection):
    tensors = adapter_tensors(tiny_unet(), projection=projection)
    save_file({name: t for name, t in tensors.items() if "_lora." not in name}, path)
    return path


@pytest.fixture(scope="module")
def adapter_file(tmp_path_factory):
    torch.manual_seed(4)
    projection = FaceIdProjection(tokens=TOKENS, width=sum(TEXT_WIDTHS))
    return write_adapter(tmp_path_factory.mktemp("portrait") / "portrait.safetensors", projection)


@pytest.fixture(scope="module")
def exported(tiny_entry, adapter_file, export_with_shared_modules, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "portrait"
    entry = replace(tiny_entry, adapter=HubItem(str(adapter_file)))
    options = ExportOptions(entry, max_faces=FACES)
    shared = ("text_encoder", "text_encoder_2", "vae_decoder")
    return folder, export_with_shared_modules(options, folder, shared)


@pytest.fixture(scope="module")
def fastface(exported):
    with FastFace.load(exported[0]) as opened:
        yield opened


def picture(colour):
    canvas = np.full((320, 320, 3), colour, np.uint8)
    face_models.draw(canvas, (160, 160), 24, half=60)
    return canvas


@pytest.fixture(scope="module")
def faces(fastface):
    """Faces of one picture whose embeddings are made different."""
    analysed = fastface.analyze(picture(30))
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((FACES, 512)).astype(np.float32)
    return [replace(analysed, embedding=v / np.linalg.norm(v)) for v in vectors]


def test_the_kind_is_told_by_keys_shapes_and_name(tmp_path):
    assert read_adapter(NORMAL).kind == "faceid-portrait"
    assert read_adapter(UNNORM).kind == "faceid-portrait-unnorm"
    assert [read_adapter(one).tokens for one in (NORMAL, UNNORM)] == [TOKENS, TOKENS]
    other = shutil.copyfile(UNNORM, tmp_path / "ip-adapter.safetensors")
    with pytest.raises(WeightsError, match="InstantID") as refused:
        read_adapter(other)
    assert "--adapter-kind" in refused.value.hint
    assert read_adapter(other, "faceid-portrait-unnorm").kind == "faceid-portrait-unnorm"
    assert read_adapter(NORMAL, "faceid").kind == "faceid"


@pytest.mark.parametrize(
    ("file", "said"), [(NORMAL, "faceid-portrait-unnorm"), (UNNORM, "faceid"), (NORMAL, "pulid")]
)
def test_a_kind_that_the_keys_speak_against_is_refused(file, said):
    with pytest.raises(WeightsError, match=f"no adapter of kind {said}"):
        read_adapter(file, said)


def test_an_adapter_that_reads_no_face_vector_is_refused(tiny_entry, tmp_path):
    projection = QueryResampler(embedding=64, inner=64, attended=64, hidden=64, depth=1, width=40)
    path = write_adapter(tmp_path / "plus_unnorm.safetensors", projection)
    options = ExportOptions(replace(tiny_entry, adapter=HubItem(str(path))))
    with pytest.raises(WeightsError, match="vectors of 64 numbers"):
        run_export(options, tmp_path / "out", quiet)


@pytest.mark.parametrize(("faces", "told"), [(0, "0 pictures"), (17, "17 pictures")])
def test_numbers_of_faces_out_of_range_are_refused(tiny_entry, faces, told):
    with pytest.raises(InvalidRequest, match=told):
        ExportOptions(tiny_entry, max_faces=faces)


def test_other_adapters_take_one_picture(tiny_entry, tmp_path):
    with pytest.raises(InvalidRequest, match="one picture of a person"):
        run_export(ExportOptions(tiny_entry, max_faces=2), tmp_path / "out", quiet)


def test_manifest_says_how_many_pictures_it_takes(exported):
    _, manifest = exported
    assert manifest.adapter_kind == "faceid-portrait"
    assert (manifest.max_faces, manifest.tokens_per_face) == (FACES, TOKENS)
    assert manifest.image_token_count == FACES * TOKENS
    assert "image_encoder" not in manifest.modules
    assert contract.TOKEN_MASK in {one.name for one in manifest.modules["unet"].inputs}


def test_unet_equals_the_oracle_at_every_number_of_faces(exported, adapter_file):
    folder, manifest = exported
    unet = tiny_unet()
    attach_adapter(unet, read_adapter(adapter_file), lora_scale=1.0)
    oracle = TorchUNet(unet, FACES * TOKENS, masked=True)
    inputs = unet_inputs(oracle.spec, requests=3, branches=2, height=8, width=16)
    masks = [token_mask(n * TOKENS, FACES * TOKENS) for n in (1, 2, 3)]
    inputs[contract.TOKEN_MASK] = np.repeat(masks, 2, axis=0)
    with open_module(folder, manifest.modules["unet"]) as engine:
        ours = engine(**inputs)[contract.NOISE_PREDICTION]
    expected = oracle(**inputs)[contract.NOISE_PREDICTION]
    assert np.linalg.norm(ours - expected) / np.linalg.norm(expected) < 1e-4


@pytest.mark.parametrize("preset", ["dcg", "am1+dcg", "am2+dcg"])
def test_people_of_one_two_and_three_pictures_in_a_batch_equal_single_runs(fastface, faces, preset):
    people = [one_person(faces[:count]) for count in (1, 2, 3)]

    def latents(someone):
        return fastface(
            "photo; person", someone, preset=preset, seed=2, output_type="latent"
        ).images

    alone = np.concatenate([latents(one) for one in people])
    together = latents(people)
    np.testing.assert_allclose(together, alone, atol=1e-4 * np.abs(alone).max())
    assert np.abs(alone[0] - alone[1]).max() > 1e-3
    assert np.abs(alone[1] - alone[2]).max() > 1e-3


def test_pictures_of_a_person_are_a_list_in_the_list_of_faces(fastface):
    pictures = [picture(30), picture(90)]
    one = fastface("photo; person", [pictures], seed=1)
    two = fastface("photo; person", pictures, seed=1)
    assert (len(one.images), len(two.images)) == (1, 2)
    (token,) = {fastface.stages.image_tokens(fastface.analyze(pictures)).shape}
    assert token == (2 * TOKENS, sum(TEXT_WIDTHS))


def test_more_pictures_than_the_export_takes_are_refused(fastface, faces, tiny_export):
    with pytest.raises(InvalidRequest, match=f"up to {FACES} pictures of a person, and 4"):
        fastface("photo; person", one_person([*faces, faces[0]]))
    with pytest.raises(InvalidRequest, match="no picture"):
        fastface("photo; person", [[]])
    with (
        FastFace.load(tiny_export[0]) as other,
        pytest.raises(InvalidRequest, match="one picture of a person, and 2"),
    ):
        other("photo; person", [[picture(30), picture(90)]])


def test_only_the_unnorm_file_takes_the_embeddings_own_length(fastface, faces):
    def tokens(length, kind):
        face = replace(faces[0], embedding_norm=length)
        manifest = fastface.manifest.model_copy(update={"adapter_kind": kind})
        modules = type("Modules", (), {"manifest": manifest})
        conditioner = object.__new__(type(fastface.stages._conditioner))
        conditioner._modules = modules
        return conditioner._of_face(face, "bgr", None)["face_embeds"][0]

    for kind, length in (("faceid-portrait", 1.0), ("faceid-portrait-unnorm", 21.5)):
        expected = faces[0].embedding * np.float32(length)
        np.testing.assert_array_equal(tokens(21.5, kind), expected)


def test_scale_is_adjusted_to_the_number_of_tokens_and_said_so(fastface, faces):
    def scales(result):
        (request,) = result.requests
        sample = fastface.stages.sample(request, fastface.stages.image_tokens(person))
        return sample.manipulation_rows()[[0, 2], contract.MANIPULATION_COLUMNS.index("scale")]

    person = one_person(faces[:2])
    adjusted = fastface("photo; person", person, preset="am1")
    plain = fastface("photo; person", person, preset="am1", strength_for_tokens=False)
    np.testing.assert_allclose(scales(plain), [1.55, 1.45], rtol=1e-6)
    np.testing.assert_allclose(scales(adjusted), np.float64([1.55, 1.45]) * 8**0.3, rtol=1e-6)
    (told,) = adjusted.warnings
    assert "multiplied by 1.87 for 32" in told
    assert plain.warnings == []
    assert plain.parameters[0]["strength_for_tokens"] is False
    assert np.asarray(adjusted.images[0]).tolist() != np.asarray(plain.images[0]).tolist()


def test_hosts_join_faces_and_give_tokens_of_as_many_pictures(fastface, faces):
    host = object.__new__(Host)
    host._fastface, host._session = fastface, Session(fastface)
    person = host.one_person(faces[:2])
    assert len(person.others) == 1
    with pytest.raises(InvalidRequest, match="up to 3 pictures"):
        host.one_person([*faces, faces[0]])
    tokens = np.asarray(host._session.tokens(person))
    request = fastface.request("photo; person", seed=3)
    by_face = host._session.generate(request, person).pixels
    np.testing.assert_array_equal(host._session.generate(request, tokens).pixels, by_face)
    with pytest.raises(InvalidRequest, match=r"not \[48, 40\]"):
        host._session.generate(request, tokens[:17])


def test_generate_takes_every_face_for_one_person_unless_told_otherwise(exported, tmp_path):
    files = []
    for colour in (30, 90):
        files += ["--face", tmp_path / f"{colour}.png"]
        Image.fromarray(picture(colour)).save(files[-1])
    common = ("generate", "--export", exported[0], *files, "--prompt", "photo; person", "--json")
    counts = []
    for options in ((), ("--people",)):
        command = (*common, "--out", tmp_path / "out", *options)
        result = CliRunner().invoke(cli, [str(word) for word in command])
        assert result.exit_code == 0, result.output
        counts.append(len(json.loads(result.stdout)["files"]))
    assert counts == [1, 2]


def test_random_weights_have_the_published_shapes():
    """Those of spec's tables; the golden file has the same keys."""
    from fastface_trt.export.full_size import random_projection

    for kind, file in (("faceid-portrait", NORMAL), ("faceid-portrait-unnorm", UNNORM)):
        made = random_projection(torch.float16, kind)
        assert made.tokens == TOKENS
        names = {k.removeprefix("image_proj.") for k in load_file(file) if "image_proj." in k}
        assert {*made.state_dict()} == names
        assert made.input_shapes("S") == {"face_embeds": (512,)}
    assert MAX_FACES == 5
    assert load_projection(read_adapter(UNNORM)).width == 256
