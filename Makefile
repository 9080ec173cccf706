# Each target is the artifact that it makes; `make` alone lists them in the order data flows.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash

DATASET ?= mnist
RECIPE ?= quick
SEED ?= 0
# However the PATH of folder:PATH is written, it is one data set, called as the folder.
ifneq (,$(filter folder:%,$(DATASET)))
override DATASET := folder:$(abspath $(patsubst folder:%,%,$(DATASET)))
endif
SET := $(if $(filter folder:%,$(DATASET)),$(notdir $(DATASET)),$(DATASET))
# A model of MNIST is called handwriting, any other as its data set.
RUN ?= $(if $(filter mnist,$(DATASET)),handwriting,$(SET))
NAME ?= $(if $(filter mnist,$(DATASET)),handwriting,$(SET))
PYTHON ?= python3
# A package index for another build of torch, CPU-only say: make .venv TORCH_INDEX=URL
TORCH_INDEX ?=

PIPELINE := .venv/bin/pipeline
PIP := .venv/bin/python -m pip --disable-pip-version-check
SERVER_PIP := .venv-triton/bin/python -m pip --disable-pip-version-check
DATA := $(addprefix data/$(SET)/,train-images-idx3-ubyte train-labels-idx1-ubyte \
	t10k-images-idx3-ubyte t10k-labels-idx1-ubyte)
SUMMARY := runs/$(RUN)/summary.json
ONNX := exported/$(NAME)/model.onnx
VALIDATION := exported/$(NAME)/validation.json
PACKAGED := exported/model_repository/$(NAME)/config.pbtxt
AGREEMENT := exported/$(NAME)/agreement.json

.PHONY: help
help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: all data train export validate package prove
all: prove ## everything: data to a model proven on a real server, on a fresh machine as well

data: $(DATA) ## fetch the data set
train: $(SUMMARY) ## train the network (RECIPE, DATASET, SEED, RUN)
export: $(ONNX) ## export it to ONNX (NAME)
validate: $(VALIDATION) ## prove ONNX Runtime equal to eager PyTorch
package: $(PACKAGED) ## add it to the Triton model repository
prove: $(AGREEMENT) ## serve it for the occasion, and show how all runtimes agree
	@$(PIPELINE) report --name $(NAME)

# A folder of pictures is looked through each time; its files stay as they are unless it changed.
$(DATA) &: $(if $(filter folder:%,$(DATASET)),FORCE) | .venv/done
	$(PIPELINE) data fetch --dataset '$(DATASET)'

$(SUMMARY): $(DATA) runs/$(RUN)/.settings | .venv/done
	$(PIPELINE) train --run $(RUN) --dataset '$(DATASET)' --recipe $(RECIPE) --seed $(SEED)

$(ONNX): $(SUMMARY) exported/$(NAME)/.settings | .venv/done
	$(PIPELINE) export --run $(RUN) --name $(NAME)

$(VALIDATION): $(ONNX) | .venv/done
	$(PIPELINE) validate --name $(NAME)

$(PACKAGED): $(VALIDATION) | .venv/done
	$(PIPELINE) package --name $(NAME)

$(AGREEMENT): $(PACKAGED) | .venv/done .venv-triton/done
	$(PIPELINE) validate exported/model_repository --name $(NAME)

# What a run or an export was asked to be; rewritten only when it changes, so that a change rebuilds.
runs/$(RUN)/.settings: WANTED = $(DATASET) $(RECIPE) $(SEED)
exported/$(NAME)/.settings: WANTED = $(RUN)
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

.PHONY: .venv .venv-triton
.venv: .venv/done ## build the project's environment (TORCH_INDEX for another torch)
.venv-triton: .venv-triton/done ## build the server's environment

.venv/done: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) and "Python 3.11 to 3.13 is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PIP) install -q -c constraints.txt pip
	$(if $(TORCH_INDEX),$(PIP) install -q -c constraints.txt torch --index-url $(TORCH_INDEX))
	@echo "installing the project's environment (some minutes the first time)"
	$(PIP) install -q -c constraints.txt -e . --group dev
	@touch $@

.venv-triton/done: pipeline/backend/requirements.txt
	$(PYTHON) -m venv .venv-triton
	@echo "installing the server's environment"
	$(SERVER_PIP) install -q --no-deps -r pipeline/backend/requirements.txt
	@touch $@

.PHONY: test test-fast lint typecheck format figures system
test: .venv/done .venv-triton/done data/mnist/train-images-idx3-ubyte ## every test, the real server included
	.venv/bin/python -m pytest -n 2 --cov --cov-report=term:skip-covered --cov-fail-under=85

test-fast: .venv/done ## the tests without a server and without long training
	.venv/bin/python -m pytest -m "not server and not slow" -n 2

lint: .venv/done ## ruff and codespell
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/codespell $$(git ls-files)

typecheck: .venv/done ## mypy --strict
	.venv/bin/mypy

format: .venv/done ## let ruff format the code
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

figures: $(AGREEMENT) ## measure the README's figures anew and render them
	$(PIPELINE) validate exported/model_repository
	$(PIPELINE) report --name $(NAME) --figures

system: ## install what only the system's packages have (root)
	@test "$$(id -u)" = 0 || { echo "make system calls apt-get: run it as root"; exit 1; }
	apt-get update -qq
	apt-get install -y -qq --no-install-recommends curl dataset-fashion-mnist > /dev/null

.PHONY: clean clean-venv
clean: ## remove exports and caches, never data or runs
	find exported -mindepth 1 -maxdepth 1 ! -name figures ! -name README.md -exec rm -rf {} +
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage* build dist
clean-venv: ## remove both environments
	rm -rf .venv .venv-triton
