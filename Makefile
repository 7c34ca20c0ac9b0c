# Decides the project's commands; `make` lists them. Everything that they install goes into .venv.
#
# VENVS       folder of the two environments, main and alt (default .venv)
# PYTHON      Python that main is made from; ALT_PYTHON the same for alt (default: found)
# ARGS        more arguments for demo, bench, doctor and gpu-check; PYTEST_ARGS for pytest
# COMFYUI_DIR, COMFYUI_PYTHON  a ComfyUI checkout and its Python, for comfy-check
# GPU_PYTHON  Python that runs gpu-check and gpu-bench, with the wheel installed in it (default:
#             main's); for gpu-bench with the peers too, as many as shall be measured
# PLAN        which run gpu-bench makes (default core; python -m bench run --help)

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory
# Some images set it: then each of some hundred processes compiles all that it imports of torch anew,
# seven seconds instead of three, as nothing is compiled when it is installed.
unexport PYTHONDONTWRITEBYTECODE
export PATH := $(PATH):$(or $(CARGO_HOME),$(HOME)/.cargo)/bin

VENVS ?= .venv
export VENVS
main := $(VENVS)/main
alt := $(VENVS)/alt
build := .build
python := $(main)/bin/python
cargo := $(or $(CARGO),cargo)
CARGO_DENY_VERSION := 0.20.2
LIBCLANG_VERSION := 18.1.1

sources := $(wildcard Cargo.toml Cargo.lock README.md build.rs setup.py pyproject.toml LICENSE-*) \
	$(shell find src csrc -type f 2>/dev/null) $(shell find torch_ext -name '*.py' 2>/dev/null) \
	$(wildcard scripts/*.py scripts/exports.map)
shell_scripts := $(shell grep -sl '^\#!/usr/bin/env bash' scripts/* .ci/run)
cxx_sources := $(shell find csrc tests/kernels src/driver/cuda/kernels \
	-name '*.cpp' -o -name '*.c' -o -name '*.h' -o -name '*.cu' 2>/dev/null)

.PHONY: help
help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# ---- for users

.PHONY: demo doctor bench gpu-check gpu-bench host-bench peers
demo: $(main)/.wheel ## set up, build and run the demo
	@$(python) -m dgls_torch demo $(ARGS)

doctor: $(main)/.wheel ## say what this machine can do and what is wrong with it
	@$(python) -m dgls_torch doctor $(ARGS)

bench: $(main)/.wheel ## measure this machine: copies, page locks, streamed models
	@$(python) -m dgls_torch bench $(ARGS)

gpu-check: ## check everything that only a GPU can show (needs one)
	@[[ $$(nvidia-smi -L 2>/dev/null) == GPU* ]] || { \
	  echo "error: gpu-check needs an NVIDIA GPU and nvidia-smi finds none; run it on a machine" \
	    "with a GPU and its driver." >&2; exit 2; }
ifndef GPU_PYTHON
	@$(MAKE) $(main)/.wheel
endif
	@PYTHON="$(or $(GPU_PYTHON),$(python))" "$(or $(GPU_PYTHON),$(python))" tests/gpu/check.py $(ARGS)

# One call of less than eight minutes; the results are kept, and a second call goes on from them.
gpu-bench: ## measure beside every peer against the physical limit (needs a GPU)
	@[[ $$(nvidia-smi -L 2>/dev/null) == GPU* ]] || { \
	  echo "error: gpu-bench needs an NVIDIA GPU and nvidia-smi finds none; host-bench needs none." \
	    >&2; exit 2; }
ifndef GPU_PYTHON
	@$(MAKE) peers
endif
	@python="$(or $(GPU_PYTHON),$(VENVS)/peers/bin/python)"; out=$(build)/bench-$(or $(PLAN),core).json; \
	  mkdir -p $(build); "$$python" -m bench run --plan $(or $(PLAN),core) --minutes 6.5 --out $$out \
	    --python "$$python" --log $(build)/bench.log $(ARGS) && "$$python" -m bench compare $$out

host-bench: $(main)/.wheel ## the same without a GPU: paced blocks, a link held to a rate
	@mkdir -p $(build)
	@$(python) -m bench run --plan host --device cpu --minutes 6 --out $(build)/bench-host.json \
	  --python $(python) --log $(build)/bench.log $(ARGS)

# Torch and the wheel are main's; nothing of the peers gets into main.
peers: $(main)/.wheel ## install the peers of gpu-bench into an environment of their own
	@[ -x $(VENVS)/peers/bin/python ] || $(python) -m venv $(VENVS)/peers
	@$(python) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  "$$($(VENVS)/peers/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth"
	@$(VENVS)/peers/bin/python -m pip install --quiet --no-compile -r bench/requirements-peers.txt

# The wheel has to be installed for COMFYUI_PYTHON, which is the Python that ComfyUI runs with.
.PHONY: comfy-check
comfy-check: ## check the nodes in a real ComfyUI: COMFYUI_DIR=... COMFYUI_PYTHON=... [ARGS=...]
ifndef COMFYUI_DIR
	@echo "error: comfy-check needs COMFYUI_DIR, a ComfyUI checkout" >&2; exit 2
endif
	@python="$(or $(COMFYUI_PYTHON),$(python))"; "$$python" tests/comfy/check.py "$(COMFYUI_DIR)" \
	  --python "$$python" --work $(build)/comfy --report docs/comfyui-check.md $(ARGS)

# ---- tests

.PHONY: test test-rust test-main test-alt audit prepare rust-ready
test: | preflight-check ## run everything that CI runs: Rust and Python tests, audits, lints
	+@MAKE="$(MAKE)" scripts/test-all

# Seeds begin at SEED; the Rust half does not end before 10,000 faults.
.PHONY: soak
SECONDS_EACH ?= 60
SEED ?= 0
soak: $(main)/.wheel ## meet faults of all kinds for a while: [SECONDS_EACH=60] [SEED=0]
	@$(cargo) test --locked --quiet --no-run --package dgls_core --test it
	@DGLS_IT_CHILD=1 DGLS_SEED=$(SEED) DGLS_SOAK_SECONDS=$(SECONDS_EACH) DGLS_SOAK_FAULTS=10000 \
	  $(cargo) test --locked --quiet --package dgls_core --test it -- --nocapture chaos:: \
	  | grep '^chaos:'
	@$(cargo) build --locked --quiet --package fakecuda
	@FAKE="$$(find "$${CARGO_TARGET_DIR:-target}/debug" -maxdepth 1 -name libcuda.so)" \
	  $(python) tests/python/soak.py --seconds $(SECONDS_EACH) --seed $(SEED)

# Compiled into a folder of its own: every crate is another one with this flag.
.PHONY: loom
loom: | preflight ## check the hand-over between threads in every interleaving
	@RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR="$${CARGO_TARGET_DIR:-target}/loom" \
	  $(cargo) test --locked --package dgls_core --lib --release -- _model::

# What can be fetched and compiled side by side, so that the steps after it need not wait.
prepare: $(main)/.ready $(alt)/.ready rust-ready $(build)/cargo-deny

rust-ready: | preflight
	@echo "cargo: compiling tests and the release library"
	@$(cargo) test --workspace --locked --quiet --no-run
	@$(cargo) build --locked --quiet --package dgls_core --lib --release

test-rust: | preflight
	@$(cargo) test --workspace --locked

test-main: $(main)/.wheel
	@$(python) -m pytest --color=no $(PYTEST_ARGS)

# What says the same with every Python and torch is left to main.
test-alt: $(alt)/.wheel
	@$(alt)/bin/python -m pytest --color=no -m "not once" $(PYTEST_ARGS)

# The wheel promises one binary for every Python >= 3.10 and torch >= 2.10: these look if it can.
audit: $(build)/wheel
	@rm -rf $(build)/unpacked
	@$(python) -m zipfile -e dist/dgls_torch-*.whl $(build)/unpacked
	@$(python) scripts/check_symbols.py $(build)/unpacked/dgls_torch/_C.abi3.so
	@$(main)/bin/abi3audit --strict --summary dist/dgls_torch-*.whl
	@$(main)/bin/torch-abi-audit --check both $(build)/unpacked/dgls_torch/_C.abi3.so

# ---- lints

lints := $(addprefix lint-,rustfmt clippy ruff ruff-format mypy clang-format shell licences)
.PHONY: check $(lints)
check: $(lints) ## run the lints only

lint-rustfmt: | preflight-check
	@scripts/quietly rustfmt $(cargo) fmt --all --check
lint-clippy: | preflight-check
	@scripts/quietly clippy $(cargo) clippy --workspace --all-targets --locked -- -D warnings
lint-ruff: $(main)/.ready
	@scripts/quietly ruff $(main)/bin/ruff check .
lint-ruff-format: $(main)/.ready
	@scripts/quietly ruff-format $(main)/bin/ruff format --check --diff .
lint-mypy: $(main)/.ready
	@scripts/quietly mypy $(main)/bin/mypy
lint-clang-format: $(main)/.ready
	@scripts/quietly clang-format $(main)/bin/clang-format --dry-run -Werror $(cxx_sources)
lint-shell: $(main)/.ready
	@scripts/quietly shellcheck $(main)/bin/shellcheck $(shell_scripts)
lint-licences: | preflight-check
	@scripts/quietly licences scripts/check-licences $(VENVS)/cargo

# ---- packages

.PHONY: wheel sdist prebuilt bindings ptx clean distclean
wheel: $(build)/wheel ## build dist/dgls_torch-*.whl
	@ls dist/dgls_torch-*.whl

sdist: $(main)/.ready ## build dist/dgls_torch-*.tar.gz
	@rm -f dist/dgls_torch-*.tar.gz
	@scripts/quietly sdist $(python) -m build --sdist --no-isolation --outdir dist .
	@ls dist/dgls_torch-*.tar.gz

prebuilt: | preflight ## build dist/prebuilt-<triple>.tar.gz for machines without cargo
	@"$$(scripts/find-python main)" scripts/prebuilt.py

# bindgen needs libclang, which the package of that name brings, but for stddef.h and the like
bindings: $(main)/.ready ## make the committed Rust bindings of csrc/host/shim.h anew
	@$(python) -m pip install --quiet libclang==$(LIBCLANG_VERSION)
	@LIBCLANG_PATH="$$($(python) -c 'import clang; print(clang.__path__[0] + "/native")')" \
	  BINDGEN_EXTRA_CLANG_ARGS="-isystem $$(cc -print-file-name=include)" \
	  $(cargo) build --locked --package dgls_core --lib --features regen-bindings
	@$(cargo) fmt --all

# Another release of NVRTC would write other text; it is in no environment of ours.
ptx: $(main)/.ready ## make the committed PTX of the decoding kernel anew
	@$(python) -m pip install --quiet --upgrade --target $(build)/nvrtc nvidia-cuda-nvrtc-cu11==11.8.89
	@PYTHONPATH=$(build)/nvrtc $(python) scripts/ptx.py

clean: ## remove what was built, keep .venv
	rm -rf $(build) build dist *.egg-info torch_ext/*.egg-info torch_ext/dgls_torch/_C.abi3.so
	rm -rf .mypy_cache .pytest_cache .ruff_cache target

distclean: clean ## remove .venv too
	rm -rf $(VENVS)

# ---- what the targets above stand on

.PHONY: preflight preflight-check
preflight:
	@scripts/preflight build
preflight-check:
	@scripts/preflight check

$(main)/.ready: scripts/make-venv scripts/requirements-dev.txt scripts/requirements-test.txt
$(main)/.ready: | preflight
	@scripts/make-venv main $(main)
	@touch $@

$(alt)/.ready: scripts/make-venv scripts/requirements-test.txt | preflight
	@scripts/make-venv alt $(alt)
	@touch $@

# setuptools would take modules deleted since from build/
$(build)/wheel: $(sources) $(main)/.ready
	@echo "building the wheel"
	@rm -rf build dist/dgls_torch-*.whl
	@$(python) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@mkdir -p $(build) && touch $@

$(main)/.wheel $(alt)/.wheel: $(VENVS)/%/.wheel: $(build)/wheel $(VENVS)/%/.ready
	@$(VENVS)/$*/bin/python -m pip install --quiet --force-reinstall --no-deps dist/dgls_torch-*.whl
	@touch $@

# PyPI has no version that reads today's Cargo.lock. Without optimisation it compiles in a third of
# the time, a minute, and checks in half a second all the same.
$(build)/cargo-deny: | preflight
	@mkdir -p $(build)
	@PATH="$$PATH:$(VENVS)/cargo/bin"; command -v cargo-deny >/dev/null || \
	  CARGO_PROFILE_DEV_DEBUG=0 $(cargo) install --quiet --locked --debug --root $(VENVS)/cargo \
	    --version $(CARGO_DENY_VERSION) cargo-deny || \
	  echo "NOTE: cargo deny $(CARGO_DENY_VERSION) could not be installed; it needs Rust 1.88."
	@touch $@
