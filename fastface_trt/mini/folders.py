"""Where the mini model's files lie in the installed package."""

from pathlib import Path

MINI = Path(__file__).resolve().parent
EXPORT = MINI / "onnx"
CHECKPOINT = MINI / "checkpoint"
IMAGE_ENCODER = MINI / "image_encoder"
ADAPTER = MINI / "ip-adapter-faceid-plusv2_mini.safetensors"
FACE_MODEL = EXPORT / "face"  # one copy is enough: an export carries its face model
SAMPLE_FACES = MINI / "faces"
JUDGES = MINI / "judges"
