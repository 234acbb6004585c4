# A fresh clone needs only `make demo` and `make test`. Both run inside .venv; TORCH= sets the torch version.
# With PYTHON=, they run in an overlay on that Python, which must have torch >= 2.11; only sslkern is installed there.
TORCH ?= torch==2.13.0

VENV := $(if $(PYTHON),build/overlay,.venv)
PY := $(VENV)/bin/python
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

# pip compiles no bytecode, because most modules are never imported; Python compiles the others on first import
INSTALL := $(PY) -m pip install -q --no-compile --disable-pip-version-check
unexport PYTHONDONTWRITEBYTECODE
OURS := $(INSTALL) --no-build-isolation $(if $(PYTHON),--no-deps )-e .
# Compile the kernels while pip resolves the dependencies; the build that pip starts then reuses the objects
SET_UP = ($(PY) setup.py build_ext > /dev/null & $(OURS)$(if $(PYTHON),,"[$(1)]"); status=$$?; wait; exit $$status)

# Folder for the log, the results and the table of `make gpu`
OUT ?= out

# The oldest Triton, in a folder of its own, for the tests that compile for a GPU. Linux only, and not with PYTHON=
OLD_TRITON := $(if $(PYTHON)$(filter-out Linux,$(shell uname)),,build/triton-3.6.0)

# The binary of `make gpu-bundle`. If it exists, `make gpu` installs nothing and compiles nothing
BUNDLE := $(wildcard build/gpu/sslkern/_C.abi3.so)

# The stamp names TORCH= or PYTHON=, so another value sets up the environment and builds again
READY := $(VENV)/ready-$(firstword $(shell echo "$(or $(PYTHON),$(TORCH))" | cksum))

# Parallel tests, in .venv only: three processes on two cores, because one often waits for a compiler or for ranks
PARALLEL := $(if $(PYTHON),,-n $(if $(filter 1 2,$(shell getconf _NPROCESSORS_ONLN)),3,4))

# Packages whose losses sslkern stands in for, and the torch and torchvision that they run on
PEERS_TORCH ?= torch==2.14.1 torchvision==0.29.1
PEERS := lightly stable-pretraining pytorch-metric-learning lightning

.PHONY: demo test bench peers gpu gpu-bundle build lint clean

demo: build
	$(PY) examples/vicreg_digits.py $(ARGS)
	$(PY) -m bench.large_batch --limit

test: $(VENV)/complete $(addsuffix /ready,$(OLD_TRITON)) lint
	$(PY) -m pytest $(PARALLEL) $(ARGS)

bench: build
	$(PY) -m bench $(ARGS)

# The losses of other packages against ours, in an environment of its own, which takes several GB.
# SOLO_LEARN= and EB_JEPA= name clones of two packages that have no current release; LIGHTLY= names a clone of lightly,
# for a script of it that is run with and without the patch
peers: .venv-peers/ready $(VENV)/built
	rm -rf .venv-peers/lib/python3*/site-packages/*sslkern*
	cp -r $(wildcard $(VENV)/lib/python3*/site-packages/*sslkern*) .venv-peers/lib/python3*/site-packages/
	.venv-peers/bin/python -m pytest tests/peers $(ARGS)

# For a machine with an NVIDIA GPU; takes minutes: ceilings, every op, tests, times, a profile, a sanitizer, a table
# GPU_PEERS= names a folder with the packages of bench/gpu/peers.py, which are measured too
gpu: $(if $(BUNDLE),,$(VENV)/complete)
	$(if $(BUNDLE),$(or $(PYTHON),python3),$(PY)) -m bench.gpu --out $(OUT) $(ARGS)

# The binary for a GPU machine without compilers: copy the tracked files and build/gpu there, then run `make gpu`
gpu-bundle: $(READY)
	SSLKERN_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 $(PY) setup.py build_ext --build-lib build/gpu
	git rev-parse --short HEAD > build/gpu/commit

build: $(VENV)/built

lint: $(VENV)/complete
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -c 'import clang_format; clang_format.clang_format()' --dry-run --Werror \
	  $(filter csrc/%,$(SOURCES)) $(wildcard $(addprefix tests/simulator/*.,h cpp cu))

.venv/ready-%: Makefile
	test -x .venv/bin/python || python3 -m venv .venv
	$(INSTALL) "$(TORCH)" "setuptools>=77.0.3"
	rm -f .venv/ready*
	touch $@

.venv-peers/ready: Makefile
	test -x .venv-peers/bin/python || python3 -m venv .venv-peers
	.venv-peers/bin/python -m pip install -q --no-compile --disable-pip-version-check $(PEERS_TORCH) $(PEERS) \
	  pytest pytest-benchmark scikit-learn scikit-image matplotlib
	touch $@

build/overlay/ready-%: Makefile
	rm -rf build/overlay
	$(PYTHON) -m venv --without-pip build/overlay
	$(PYTHON) -c "import sys; print(*[p for p in sys.path if p.endswith('-packages')], sep='\n')" \
	  > $$(build/overlay/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/parent.pth
	touch $@

# CUDA kernels only if the installed torch is built for CUDA. The stamp has the time before the build, so that a source
# that changes during the build is compiled next time
$(VENV)/built: $(READY) $(SOURCES)
	touch $@.new
	$(call SET_UP,examples)
	mv $@.new $@

# `built`, and what the tests need besides: their tools, and the CUDA kernels wherever there is an nvcc
$(VENV)/complete: $(READY) $(SOURCES)
	touch $@.new
	export SSLKERN_CUDA=$${SSLKERN_CUDA:-1}; $(call SET_UP,test)
	cp -p $@.new $(VENV)/built
	mv $@.new $@

build/triton-%/ready: $(READY)
	$(INSTALL) --no-deps --upgrade --target $(@D) "triton==$*"
	touch $@

clean:
	rm -rf build dist *.egg-info sslkern/*.so .venv/built .venv/complete
