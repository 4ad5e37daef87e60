"""Where the mini model's files lie in the installed package."""

from pathlib import Path

MINI = Path(__file__).resolve().parent
EXPORT = MINI / "onnx"
CHECKPOINT = MINI / "checkpoint"
IMAGE_ENCODER = MINI / "image_encoder"
ADAPTER = MINI / "ip-adapter-faceid-plusv2_mini.safetensors"
FACE_MODEL = MINI / "face"
SAMPLE_FACES = MINI / "faces"
JUDGES = MINI / "judges"
