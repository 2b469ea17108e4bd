# `make` alone lists the targets. Everything runs from .venv, which `make setup` builds once.

PYTHON ?= python3
SWEEP ?= conf/sweep/mechanisms.yaml

# The container writes to data/ and experiments/ as the caller, not as root.
COMPOSE = HOST_UID=$$(id -u) HOST_GID=$$(id -g) docker compose -f docker/compose.yaml

# A process per core, up to four: each takes 1 GB. `worksteal` keeps the tests of a file together, with what they share.
PYTEST = .venv/bin/python -m pytest
IN_PARALLEL = --numprocesses=auto --maxprocesses=4 --dist=worksteal

# With DRY_RUN=1, print the command instead of running it.
run = $(if $(filter 1,$(DRY_RUN)),@: $(info $(1)),$(1))

.PHONY: help setup demo compare train evaluate explain report masks bench sweep test test-faults test-slow test-slurm test-containers lint audit format docker-build docker-train

help: ## list the targets
	@awk 'BEGIN {FS = ":[^#]*## "} /^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' Makefile

setup: .venv/.installed ## build .venv with the tested versions of constraints.txt

demo: setup ## train a small model on the CPU, score it and draw its attention
	.venv/bin/python train.py experiment=demo run_name=strided overwrite=true
	.venv/bin/python evaluate.py ckpt=experiments/demo/strided

compare: setup ## train six mechanisms with three seeds each on the CPU, and write the report that compares them
	.venv/bin/python train.py experiment=compare $(ARGS)

train: setup ## train a model, e.g. make train ARGS="model.attention=strided"
	.venv/bin/python train.py $(ARGS)

evaluate: setup ## score a checkpoint and draw its attention, e.g. make evaluate ARGS="ckpt=experiments/demo/strided"
	.venv/bin/python evaluate.py $(ARGS)

explain: setup ## explain a checkpoint or its view of a photograph, e.g. make explain ARGS="ckpt=experiments/demo/strided image=photo.jpg"
	.venv/bin/python -m vit_attn.explain $(ARGS)

report: setup ## compare finished runs, e.g. make report ARGS="experiments/compare --baseline softmax"
	.venv/bin/python -m vit_attn.report $(ARGS)

masks: setup ## draw the patterns, e.g. make masks ARGS="--size 1024 --patterns strided fixed"
	.venv/bin/python -m vit_attn.masks $(ARGS)

bench: setup ## measure speed and memory, e.g. make bench ARGS="attention --quick"
	.venv/bin/python -m vit_attn.bench $(or $(ARGS),attention)

sweep: setup ## start a W&B sweep, e.g. make sweep SWEEP=conf/sweep/alpha.yaml
	.venv/bin/wandb sweep $(SWEEP)

test: setup ## run the tests but the slow ones and Slurm's, e.g. make test ARGS="-k strided"
	$(PYTEST) $(IN_PARALLEL) -m "not slow and not fuzz and not containers and not slurm" $(ARGS)

test-faults: setup ## break runs in every way there is a test for, and count what survived
	$(PYTEST) $(IN_PARALLEL) -m "faults or fuzz" $(ARGS)

test-slow: setup ## run the slow tests
	$(PYTEST) $(IN_PARALLEL) -m slow $(ARGS)

test-slurm: setup ## train on a Slurm cluster of this machine alone; needs the packages slurm-wlm and munge
	$(PYTEST) -m slurm tests/slurm $(ARGS)

test-containers: setup ## check the Docker and Kubernetes files, build the image with buildah, run it with runc: root, some minutes
	tests/containers/check
	tests/containers/build
	$(PYTEST) -m containers $(ARGS)

lint: setup ## check style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

audit: ## look the tested versions up in the lists of known vulnerabilities
	.ci/audit

format: setup ## format, and mend what ruff can mend
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

docker-build: ## build the image
	$(call run,$(COMPOSE) build)

docker-train: ## train in a container; DRY_RUN=1 only shows the command, e.g. make docker-train ARGS="trainer=ddp"
	$(call run,mkdir -p data experiments && $(COMPOSE) run --rm train $(ARGS))

.venv/.installed: pyproject.toml constraints.txt | .venv/bin/python
	@echo "setting up .venv (about 5 GB, once)"
	@.venv/bin/python -m pip install -qq --disable-pip-version-check -e '.[dev,slurm]' -c constraints.txt
	@touch $@

# A half-made .venv is removed: `python -m venv` leaves one behind where Debian's python3-venv is missing.
.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "vit_attn needs Python 3.11 or newer; $(PYTHON) is: $$($(PYTHON) --version 2>&1). Name another: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
