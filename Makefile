# Each target is the artifact that it makes; `make` alone lists them in the order data flows.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash

RECIPE ?= standard
DATASET ?= $(if $(filter number%,$(RECIPE)),numbers,mnist)
SEED ?= 0
# Any of fp32,fp16,int8,exact: a file each, a proof each, a served model each.
PRECISION ?= fp32
# However the PATH of folder:PATH is written, it is one data set, called as the folder.
JOINED := $(if $(filter mnist+folder:%,$(DATASET)),mnist)
IS_FOLDER := $(filter folder:% mnist+folder:%,$(DATASET))
ifneq (,$(IS_FOLDER))
override DATASET := $(if $(JOINED),mnist+)folder:$(abspath $(patsubst folder:%,%,$(DATASET:mnist+%=%)))
endif
SET := $(if $(IS_FOLDER),$(if $(JOINED),mnist-)$(notdir $(DATASET)),$(DATASET))
# A model of MNIST is called handwriting, any other as its data set.
RUN ?= $(if $(filter mnist,$(DATASET)),handwriting,$(SET))
NAME ?= $(if $(filter mnist,$(DATASET)),handwriting,$(SET))
PYTHON ?= python3
# Processes that train one network together, one thread each on a CPU: make train NPROC=2
NPROC ?= 1
# The browser that 'make system' installs; empty where there is one: make system CHROMIUM=
CHROMIUM ?= chromium
# The package index that torch comes from; empty for pip's own: make .venv TORCH_INDEX=URL
CPU_INDEX := https://download.pytorch.org/whl/cpu
TORCH_INDEX ?= $(shell $(PYTHON) tools/torch_index.py $(CPU_INDEX))

NAME_OPTION := $(if $(filter handwriting,$(NAME)),, --name $(NAME))
PIPELINE := .venv/bin/pipeline
TORCHRUN := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} .venv/bin/torchrun --standalone --nproc-per-node
TOOL := .venv/bin/python -m tools
TRAIN := $(if $(filter 1,$(NPROC)),$(PIPELINE),$(TORCHRUN) $(NPROC) -m -- pipeline) train
PIP := .venv/bin/python -m pip --disable-pip-version-check
# The server's Python, which has no wheels for 3.14: make SERVER_PYTHON=python3.13
SERVER_PYTHON ?= $(PYTHON)
SERVER_PIP := .venv-triton/bin/python -m pip --disable-pip-version-check
DATA := $(addprefix data/$(SET)/,train-images-idx3-ubyte train-labels-idx1-ubyte \
	t10k-images-idx3-ubyte t10k-labels-idx1-ubyte)
SUMMARY := runs/$(RUN)/summary.json
PAGE := runs/$(RUN)/report.html
ONNX := exported/$(NAME)/model.onnx
VALIDATION := exported/$(NAME)/validation.json
PACKAGED := exported/model_repository/$(NAME)/config.pbtxt
AGREEMENT := exported/$(NAME)/agreement.json

.PHONY: help
help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-19s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: all data train report export validate package prove
all: prove ## everything: data to a model proven on a real server, on a fresh machine as well

data: $(DATA) ## fetch the data set
train: $(SUMMARY) ## train the network (RECIPE, DATASET, SEED, RUN, NPROC)
report: $(PAGE) ## write one page about the run: curves, mistakes, calibration
export: $(ONNX) ## export it to ONNX (NAME, PRECISION=fp32,fp16,int8,exact)
validate: $(VALIDATION) ## prove what was exported against its module in float64
package: $(PACKAGED) ## add it to the Triton model repository
prove: $(AGREEMENT) ## serve it temporarily, and show how all runtimes agree
	@set -o pipefail; $(PIPELINE) report --run $(RUN) --name $(NAME) --table | sed '/^next: /d'
	@printf '%s\n' '' 'To serve it, and to draw a digit on its page:' 'source .venv/bin/activate' \
		'pipeline serve --detach' 'pipeline web$(NAME_OPTION)'

# A folder of pictures is looked through each time; its files stay as they are unless it changed.
$(DATA) &: $(if $(IS_FOLDER),FORCE) | .venv/done
	$(PIPELINE) data fetch --dataset '$(DATASET)'

$(SUMMARY): $(DATA) runs/$(RUN)/.settings | .venv/done
	$(TRAIN) --run $(RUN) --dataset '$(DATASET)' --recipe $(RECIPE) --seed $(SEED)

# Written anew when there is a new export as well; what `prove` adds, it adds itself.
$(PAGE): $(SUMMARY) $(wildcard exported/$(NAME)/manifest.json) | .venv/done
	$(PIPELINE) report --run $(RUN) --name $(NAME)

$(ONNX): $(SUMMARY) exported/$(NAME)/.settings | .venv/done
	$(PIPELINE) export --run $(RUN) --name $(NAME) --precision $(PRECISION)

$(VALIDATION): $(ONNX) | .venv/done
	$(PIPELINE) validate --name $(NAME)

$(PACKAGED): $(VALIDATION) | .venv/done
	$(PIPELINE) package --name $(NAME)

$(AGREEMENT): $(PACKAGED) | .venv/done .venv-triton/done
	$(PIPELINE) validate exported/model_repository --name $(NAME) > /dev/null
	@$(PIPELINE) -q report --run $(RUN) --name $(NAME) > /dev/null

# What a run or an export was asked to be; rewritten only when it changes, so that a change rebuilds.
runs/$(RUN)/.settings: WANTED = $(DATASET) $(RECIPE) $(SEED) $(NPROC)
exported/$(NAME)/.settings: WANTED = $(RUN) $(PRECISION)
%/.settings: FORCE
	@mkdir -p $(@D)
	@echo '$(WANTED)' | cmp -s - $@ || echo '$(WANTED)' > $@
.PHONY: FORCE
FORCE:

.PHONY: serve stop
serve: $(PACKAGED) .venv-triton/done ## serve it, until Ctrl-C
	$(PIPELINE) serve
stop: ## stop a server that 'pipeline serve --detach' started
	$(PIPELINE) serve stop

.PHONY: web-runtime web-static
web-runtime: .venv/done ## fetch ONNX Runtime for browsers from npm
	$(TOOL).fetch_runtime
web-static: PRECISION = fp32,exact
web-static: $(PACKAGED) web-runtime ## write the page and the exact model as a folder for any web host
	$(PIPELINE) web --static exported/web-static --test-images$(NAME_OPTION)

.PHONY: .venv .venv-triton
.venv: .venv/done ## build the project's environment (TORCH_INDEX for another torch)
.venv-triton: .venv-triton/done ## build the server's environment

.venv/done: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14) and "Python 3.11 to 3.14 is needed: make PYTHON=python3.13")'
	$(PYTHON) -m venv .venv
	$(PIP) install -q -c constraints.txt pip
	@echo "installing the project's environment (some minutes the first time)"
	@index="$(TORCH_INDEX)"; test -z "$$index" || { echo "torch comes from $$index"; \
		$(PIP) install -q -c constraints.txt --no-deps torch --index-url "$$index"; } \
		|| test $(origin TORCH_INDEX) = file
	$(PIP) install -q -c constraints.txt -e '.[all]' --group dev
	@touch $@

.venv-triton/done: pipeline/serving/backend/requirements.txt
	$(SERVER_PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) and "The server needs Python 3.11 to 3.13: make SERVER_PYTHON=python3.13")'
	$(SERVER_PYTHON) -m venv .venv-triton
	@echo "installing the server's environment"
	$(SERVER_PIP) install -q --no-deps -r pipeline/serving/backend/requirements.txt
	@touch $@

# torch's lowest version where its CPU builds are within reach, else the pinned one: the result tells.
TEST_PACKAGES := pytest pytest-timeout pytest-xdist hypothesis pyyaml tensorboard check-jsonschema \
	kubernetes-validate playwright axe-playwright-python
LOWEST_TORCH ?= $(if $(TORCH_INDEX),torch==2.9.*,torch)
.venv-lowest/done: pyproject.toml constraints.txt tools/lowest.py
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install -q -c constraints.txt pip
	.venv-lowest/bin/python tools/lowest.py > .venv-lowest/lowest.txt
	.venv-lowest/bin/python -m pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX) '$(LOWEST_TORCH)',-c constraints.txt torch)
	.venv-lowest/bin/python -m pip install -q -c .venv-lowest/lowest.txt -e '.[all]' $(TEST_PACKAGES)
	@touch $@

.venv-build/done:
	$(PYTHON) -m venv .venv-build
	.venv-build/bin/python -m pip install -q build
	@touch $@

.PHONY: dist test-sdist test-lowest
dist: .venv-build/done ## build the wheel and the sdist
	rm -rf dist && .venv-build/bin/python -m build > /dev/null

test-sdist: .venv/done .venv-triton/done dist data/mnist/train-images-idx3-ubyte ## the fast tests, from the unpacked sdist
	rm -rf build/sdist && mkdir -p build/sdist && tar -xf dist/*.tar.gz -C build/sdist --strip-components=1
	ln -s "$(CURDIR)/data" "$(CURDIR)/.venv" "$(CURDIR)/.venv-triton" build/sdist
	cd build/sdist && PYTHONPATH="$$PWD" "$(CURDIR)/.venv/bin/python" -m pytest -n 2 -m "not server and not slow" $(PYTEST)

test-lowest: .venv/done .venv-lowest/done data/mnist/train-images-idx3-ubyte ## the fast tests, with the lowest versions that are allowed
	$(TOOL).prove_lowest tools/results/lowest.json .venv-lowest

.PHONY: test coverage test-fast lint typecheck format figures system
# Python starts some hundred times in the tests: its bytecode is kept.
TEST := PYTHONDONTWRITEBYTECODE= .venv/bin/python -m pytest --no-loadscope-reorder
test: .venv/done .venv-triton/done data/mnist/train-images-idx3-ubyte ## every test, the real server included
	@test ! -d /usr/share/datasets/fashion-mnist || $(PIPELINE) -q data fetch --dataset fashion-mnist > /dev/null
	$(TEST) -n 3 $(PYTEST)

coverage: ## every test, and the lines that none reaches
	$(MAKE) test PYTEST='--cov --cov-report=term-missing:skip-covered --cov-fail-under=85'

test-fast: .venv/done ## the tests without a server and without long training
	$(TEST) -n 2 -m "not server and not slow"

lint: .venv/done ## ruff, codespell, the order of rooms, what is declared, and the code's shape
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/codespell $$(git ls-files)
	.venv/bin/lint-imports --no-cache
	.venv/bin/deptry pipeline
	$(TOOL).shape

typecheck: .venv/done ## mypy --strict
	.venv/bin/mypy

format: .venv/done ## let ruff format the code
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

figures: $(AGREEMENT) ## measure the agreement again and render the README
	$(PIPELINE) validate exported/model_repository
	$(TOOL).readme agreement $(AGREEMENT) $(SUMMARY)

.PHONY: screenshot
screenshot: $(PACKAGED) .venv-triton/done ## take the README's picture of the page, in Chromium
	$(TOOL).screenshot docs/images/page.png

.PHONY: best
best: $(DATA) | .venv/done ## train the best recipe as a run called best; goes on where it stopped
	$(PIPELINE) train --dataset $(DATASET) --recipe best --run best --resume

.PHONY: gpu-check prove-processors prove-rebuild prove-resume prove-runtimes prove-best prove-training prove-serving prove-photos prove-unsure prove-folder-unsure prove-finetune
.PHONY: prove-exact prove-compare prove-install prove-lint prove-swap prove-kill prove-soak prove-native prove-gateway prove-score
gpu-check: .venv/done data/mnist/train-images-idx3-ubyte ## verify it all on a GPU, and sign for it (SIGNED='your name')
	$(TOOL).gpu_check tools/results/gpu.json --signed-off-by "$(SIGNED)"
prove-best: .venv/done data/mnist/train-images-idx3-ubyte ## train the best recipe with three seeds; goes on where it stopped
	set -o pipefail; $(PIPELINE) --json benchmark --what train --recipes best --resume | $(TOOL).readme training /dev/stdin
prove-training: .venv/done data/mnist/train-images-idx3-ubyte ## train the short recipes with their seeds, and a published recipe to compare
	set -o pipefail; $(PIPELINE) --json benchmark --what train | $(TOOL).readme training /dev/stdin
prove-serving: .venv/done .venv-triton/done ## measure how fast a packaged model is served (NAME)
	$(PIPELINE) benchmark --what serve --name $(NAME)
	$(TOOL).readme serving exported/$(NAME)/serving.json
prove-photos: .venv/done data/mnist/train-images-idx3-ubyte ## read pictures that people have with an exported model (NAME)
	$(TOOL).prove_photos tools/results/photos.json --name $(NAME)
prove-unsure: .venv/done data/mnist/train-images-idx3-ubyte ## show an exported model what is no digit (NAME)
	$(TOOL).prove_unsure tools/results/unsure.json --name $(NAME)
prove-folder-unsure: .venv/done data/mnist/train-images-idx3-ubyte ## show models of a folder of letters what is no letter
	OMP_NUM_THREADS=1 $(TOOL).prove_folder_unsure tools/results/folder_unsure.json
prove-finetune: .venv/done data/mnist/train-images-idx3-ubyte ## fine-tune with 20 samples of each digit of a new hand, three seeds
	OMP_NUM_THREADS=1 $(TOOL).prove_finetune tools/results/finetune.json
prove-resume: .venv/done data/mnist/train-images-idx3-ubyte ## kill training 100 times, 30 of them inside a write
	OMP_NUM_THREADS=1 $(TOOL).prove_resume tools/results/resume.json 100 30
prove-processors: .venv/done data/mnist/train-images-idx3-ubyte ## train as on older processors, and compare the weights' bytes
	OMP_NUM_THREADS=1 $(TOOL).prove_processors tools/results/processors.json
prove-rebuild: .venv/done data/mnist/train-images-idx3-ubyte ## train and export releases again, 10 times quick and 3 times standard
	OMP_NUM_THREADS=1 $(TOOL).prove_rebuild tools/results/rebuild.json 10 3
prove-swap: .venv/done .venv-triton/done data/mnist/train-images-idx3-ubyte ## change the served version 100 times under 100,000 requests
	OMP_NUM_THREADS=1 $(TOOL).prove_swap tools/results/swap.json 100 100000
prove-runtimes: $(SUMMARY) | .venv/done ## run what is exported for older Tritons on the ONNX Runtimes inside them (RUN)
	OMP_NUM_THREADS=1 $(TOOL).prove_runtimes tools/results/runtimes.json $(RUN)
prove-exact: PRECISION = fp32,exact
prove-exact: $(PACKAGED) .venv-triton/done ## one digest on every runtime, and planted changes found (NAME)
	OMP_NUM_THREADS=1 $(TOOL).prove_exact tools/results/exact.json --name $(NAME)
prove-kill: $(PACKAGED) .venv-triton/done ## kill stub, server and supervisor 20 times, and drain 50 times, under load
	OMP_NUM_THREADS=1 $(TOOL).prove_kill tools/results/kill.json 20 50
prove-soak: $(PACKAGED) .venv-triton/done ## 200,000 requests: the server keeps its size
	OMP_NUM_THREADS=1 $(TOOL).prove_soak tools/results/soak.json 200000
prove-native: .venv/done ## replay the golden set in NVIDIA's container, where Docker is (NAME)
	$(TOOL).prove_native tools/results/native.json --name $(NAME)
prove-gateway: $(PACKAGED) .venv-triton/done ## 50,000 fuzzed requests, 20,000 damaged pictures, two lockouts and 200 users before the page's gateway
	OMP_NUM_THREADS=1 $(TOOL).prove_gateway tools/results/gateway.json 50000 20000 200 30
prove-score: $(PACKAGED) .venv/done ## score a million images, killed twice, compared with ONNX Runtime in process
	OMP_NUM_THREADS=1 $(TOOL).prove_score tools/results/score.json 1000000
prove-install: $(PACKAGED) .venv/done dist ## install it without extras in a new environment, and look for wheels for Python 3.14
	$(TOOL).prove_install tools/results/install.json dist/*.whl --name $(NAME)
prove-lint: .venv/done .venv-triton/done ## mutate a model repository, and hold lint against a real Triton
	OMP_NUM_THREADS=1 $(TOOL).prove_lint tools/results/lint.json
prove-compare: $(PACKAGED) .venv-triton/done ## plant a slowdown and a loss of accuracy for --compare to find, and compare the same ten times
	OMP_NUM_THREADS=1 $(TOOL).prove_compare tools/results/compare.json 10

system: ## install what only the system's packages have (root)
	@test "$$(id -u)" = 0 || { echo "make system calls apt-get: run it as root"; exit 1; }
	apt-get update -qq
	apt-get install -y -qq --no-install-recommends curl $(CHROMIUM) dataset-fashion-mnist > /dev/null
	@echo "promtool, out of its package: the whole of it would start a server"
	cd "$$(mktemp -d)" && apt-get download -qq prometheus && dpkg-deb --fsys-tarfile prometheus_*.deb | \
		tar -xC /usr/local --strip-components=2 ./usr/bin/promtool && rm -r "$$PWD"

.PHONY: clean clean-venv
clean: ## remove exports and caches, never data or runs
	find exported -mindepth 1 -maxdepth 1 ! -name README.md -exec rm -rf {} +
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage* build dist
clean-venv: ## remove the environments
	rm -rf .venv .venv-triton .venv-runtimes .venv-lowest .venv-build
