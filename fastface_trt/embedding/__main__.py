"""`python -m fastface_trt.embedding`, for builds that have an interpreter and no PATH."""

from fastface_trt.cli.embedding import embedding

if __name__ == "__main__":
    embedding(prog_name="python -m fastface_trt.embedding")
