# make demo: a picture, without torch.  make test: lint, types and tests.  make setup: both need it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A CPU build of torch is enough for export and tests; the range for users is in pyproject.toml.
TORCH ?= torch==2.13.0

.PHONY: setup demo test test-long test-engines test-serving test-image test-first-hour test-gpu \
	docs test-onnxruntime-versions test-onnxruntime-bounds bench bench-full-width sizing evaluate \
	evaluate-quantized mini-export full-size full-size-engines operator-library clean

# The light runtime: no torch, no diffusers.
$(VENV)/.runtime: pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

# Everything: export and the tools of developers.
$(VENV)/.full: $(VENV)/.runtime
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[export,bench,evaluate,heif,insightface,serve,telemetry,provenance,ray,docs,dev]'
	touch $@

setup: $(VENV)/.full

demo: $(VENV)/.runtime
	$(BIN)/fastface-trt demo --out out

# Tests run in so many processes, a file of them at a time.
TEST_PROCESSES ?= 2

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses $(TEST_PROCESSES) --dist loadfile \
		-m "not long and not engines and not serving and not gpu and not image and not hour"

# Tests that take minutes: kills at random moments, more shapes, more seeds.
test-long: setup
	$(BIN)/pytest -m long

# TensorRT-RTX engines of every module of the mini and the golden model, and the slower exports for
# them (fp16, fp8, int8); no GPU needed.
test-engines: setup
	$(BIN)/pytest --numprocesses $(TEST_PROCESSES) --dist loadfile -m engines

# The golden pictures by every second minor version of onnxruntime, in environments of their own, on
# Python 3.10, 3.11 and 3.13 where they are: writes benchmarks/results/onnxruntime-versions.json.
# Most of its minutes are pip's. The second target runs the oldest and the newest alone.
test-onnxruntime-versions: setup
	$(BIN)/python -m benchmarks.onnxruntime_versions

test-onnxruntime-bounds: setup
	$(BIN)/python -m benchmarks.onnxruntime_versions --bounds

# Load, attacks, faults and fuzz against whole servers; the page in a headless Chromium, where there is one.
test-serving: setup
	$(BIN)/pytest -m serving

# What the images hold, built in folders by debootstrap and chroot, without a container engine: as
# root, where debootstrap and curl are, four minutes. The GPU's is built without TensorRT, whose
# gigabytes lie on NVIDIA's index; FASTFACE_TEST_IMAGES=gpu builds the whole of it.
test-image: setup
	$(BIN)/pytest -m image

# A newcomer's hour: the wheel in a new environment and an empty home, generate, inspect, serve, stop.
# Prints how large the environment is, without and with InsightFace.
test-first-hour: setup
	$(BIN)/pytest -m hour -rP

# On a machine with a GPU: pictures, kernels, memory, serving and the full-size UNet, in at most eight
# minutes and without a network; writes benchmarks/results/gpu-<machine>.json. Nothing is installed;
# GPU_PYTHON needs what the package needs, pytest, and onnxruntime-gpu. FASTFACE_TEST_BACKEND names
# another backend.
GPU_PYTHON ?= python3
test-gpu:
	$(GPU_PYTHON) -m pytest -m gpu tests/gpu

# The site of docs/ in build/site, whose pages open from a disk; a link that leads nowhere is an error.
docs: $(VENV)/.runtime
	$(BIN)/pip install --quiet --editable '.[docs]'
	$(BIN)/mkdocs build --quiet --strict

# Latency of the mini model: stage by stage in out/bench, and beside PyTorch, diffusers and plain ONNX
# Runtime in benchmarks/results/peers-mini.json. About six minutes on a quiet machine.
bench: setup
	$(BIN)/python -m benchmarks.peers
	$(BIN)/fastface-trt bench --preset plain --preset am1+dcg --trace --out out/bench

# Pictures per hour by branch plan, from the mini model's rates; a minute on a quiet machine. Writes
# benchmarks/results/bench-mini.json and sizing-mini.md.
sizing: setup
	$(BIN)/fastface-trt bench --preset plain --preset am1+dcg --preset am2+dcg --requests 1,4 \
		--concurrency 1 --runs 15 --cold-starts 0 --out out/sizing
	cp out/sizing/bench.json benchmarks/results/bench-mini.json
	$(BIN)/fastface-trt bench sizing benchmarks/results/bench-mini.json > benchmarks/results/sizing-mini.md

# One UNet step of full-size SDXL with random weights at 512², PyTorch beside ONNX Runtime: 24 GB of
# memory and half an hour; writes benchmarks/results/peers-full-width.json.
bench-full-width: setup
	$(BIN)/python -m benchmarks.peers --full-width

# Quality of the mini model by independent judges, all experiments of the package: runs lie in
# out/evaluation, their summaries in benchmarks/results/evaluation. Stopped, it goes on where it was.
EXPERIMENTS ?= presets guidance_ablation scope first_token plan pareto per_step schedulers lora_scale \
	alpha_beta sensitivity_am1 sensitivity_am2
evaluate: setup
	mkdir -p benchmarks/results/evaluation
	set -e; for name in $(EXPERIMENTS); do \
		$(BIN)/fastface-trt evaluate $$name --out out/evaluation/$$name; \
		cp out/evaluation/$$name/summary.json benchmarks/results/evaluation/$$name.json; \
	done

# The mini model in fp16, fp8 and int8 before the same judges; writes quantized-quality.json.
evaluate-quantized: setup
	$(BIN)/python -m benchmarks.quantized_quality

# The mini model's ONNX modules, as the package ships them.
mini-export: setup
	$(BIN)/fastface-trt export --checkpoint mini --weight-storage fp16 fastface_trt/mini/onnx

# Full-size SDXL with random weights, fp16: prints time and peak memory (about 6 GB of memory).
full-size: setup
	$(BIN)/fastface-trt export --checkpoint hyper --random-weights --fp16 out/hyper-random-fp16

# Full-size engines for TensorRT-RTX, no GPU needed (24 GB of memory): exports first if need be, and
# writes benchmarks/results/full-size-build.json.
full-size-engines: setup
	$(BIN)/python -m benchmarks.full_size_build

# The ONNX Runtime operator as the package ships it: library for glibc 2.28, kernels by NVRTC 12, whose
# code drivers of CUDA 12 and 13 take. Three minutes; needs neither a GPU nor a C++ compiler.
operator-library:
	test -d build/operator || $(PYTHON) -m venv build/operator
	build/operator/bin/pip install --quiet cuda-bindings==12.9.10 nvidia-cuda-nvrtc-cu12==12.9.86 ziglang==0.15.2
	PYTHONPATH=. build/operator/bin/python -m fastface_trt.engines.kernels.operator_library

clean:
	rm -rf $(VENV) out build *.egg-info
