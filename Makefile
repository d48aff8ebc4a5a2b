# Two commands are enough for a newcomer: `make quickstart` and `make test`. Both install what they need.

MAKEFLAGS += --no-print-directory
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The first Python on the PATH that will do; scripts/setup.py says what is wrong when there is none.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null && echo $$p && exit; \
	done; echo python3)
BIN := .venv/bin
QUICKSTART := examples/01-quickstart
NODE_TOOLS := coredns node
CHART := charts/finetune-operator
PYTEST := $(BIN)/pytest --durations=15

.PHONY: help
help: ## List these targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: quickstart
quickstart: setup ## Set up, then finetune a small real model and report what changed
	$(BIN)/python $(QUICKSTART)/make_model.py $(QUICKSTART)/model
	$(BIN)/python $(QUICKSTART)/make_data.py $(QUICKSTART)/data
	$(BIN)/finetune run $(QUICKSTART)/job.yaml --price-per-hour 0.10

# The api tier comes by itself and one test at a time: it has promises in seconds, and training takes every core.
.PHONY: test
test: setup-tests tools verify ## Set up, check style and types, run every test (ARGS="tests/unit -k mask" for some)
	$(if $(ARGS),$(PYTEST) $(ARGS),$(PYTEST) --numprocesses=2 --dist=loadfile tests/unit tests/chart tests/trainer && $(PYTEST) tests/api)

# Namespaces of its own: whatever the lab starts, mounts and routes is gone when it ends, also when it is killed.
LAB = FINETUNE_LAB_IMAGES=$$($(BIN)/python -m tests.cluster.images) \
	unshare --net --mount --pid --fork --kill-child --mount-proc

.PHONY: e2e
e2e: setup-cluster ## Run the tests on a real cluster of two nodes on this machine (Linux, root; ARGS as above)
	$(LAB) $(PYTEST) $(or $(ARGS),tests/cluster)

.PHONY: cluster
cluster: setup-cluster ## Start such a cluster with the service in it, and a shell to use it
	$(LAB) $(BIN)/python -m tests.cluster.shell

# Never run: docs/contributing.md says what was checked, and which tests can use it.
KIND := --kubeconfig=.cache/kind.kubeconfig
KUBERAY_VERSION = $(shell sed -n 's/.*ray-operator v\([0-9.]*\).*/\1/p' tests/tools/kuberay/go.mod)

.PHONY: kind
kind: ## Start a kind cluster with the service in it (Docker, kind and Helm on the PATH)
	mkdir -p .cache
	kind get clusters | grep -qx finetune || kind create cluster --config=tests/kind.yaml --wait=5m $(KIND)
	kind export kubeconfig --name=finetune $(KIND)
	docker build --target=operator --tag=localhost/finetune-operator:kind .
	docker build --target=trainer --tag=localhost/finetune-trainer:kind --build-arg=ACCELERATOR=cpu .
	kind load docker-image --name=finetune localhost/finetune-operator:kind localhost/finetune-trainer:kind
	helm upgrade --install kuberay-operator kuberay-operator --repo=https://ray-project.github.io/kuberay-helm/ \
		--version=$(KUBERAY_VERSION) --namespace=ray-system --create-namespace --wait $(KIND)
	helm upgrade --install finetune $(CHART) --namespace=finetune-system --create-namespace --wait $(KIND) \
		--set=image.registry=localhost,image.repository=finetune-operator,image.trainerRepository=finetune-trainer \
		--set=image.tag=kind,image.pullPolicy=Never

.PHONY: setup-cluster
setup-cluster: tools
	@$(PYTHON) scripts/setup.py --cluster
	$(BIN)/python tests/tools/build.py $(NODE_TOOLS)

.PHONY: setup
setup: ## Install the locked environment into .venv (ACCELERATOR=cuda or cpu overrules what is found)
	@$(PYTHON) scripts/setup.py

.PHONY: setup-tests
setup-tests:
	@$(PYTHON) scripts/setup.py --tests

.PHONY: tools
tools: setup ## Build the servers that tests use, each from its own go.mod or package.json
	$(BIN)/python tests/tools/build.py $(filter-out $(NODE_TOOLS),$(notdir $(patsubst %/,%,$(dir $(wildcard tests/tools/*/go.mod tests/tools/*/package.json)))))

.PHONY: verify
verify: lint ## Check style, types, import arrows and that generated files are current
	$(BIN)/mypy
	$(BIN)/lint-imports
	@$(MAKE) generate INTO=.cache/generated/
	diff -r manifests/crds .cache/generated/manifests/crds
	diff manifests/install.yaml .cache/generated/manifests/install.yaml
	diff -r docs/reference .cache/generated/docs/reference
	@for file in files/crds files/dashboards files/rights.yaml values.schema.json; do \
		diff -r $(CHART)/$$file .cache/generated/$(CHART)/$$file; done

.PHONY: lint
lint: setup ## Check style only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: format
format: setup ## Put the code into the one style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: generate
generate: setup ## Write the files that are made from the models
	$(BIN)/python -m finetune_api.crd $(INTO)manifests/crds
	$(BIN)/python -m finetune_api.docs $(INTO)docs/reference
	$(BIN)/python -m finetune_operator.install $(INTO)manifests/install.yaml
	$(BIN)/python -m finetune_operator.chart $(INTO)$(CHART)
	$(BIN)/python scripts/dashboards.py $(INTO)$(CHART)/files/dashboards
	$(BIN)/python -m finetune_operator.docs $(INTO)docs/reference
	$(BIN)/python -m finetune_operator.plugin.docs $(INTO)docs/reference
	$(BIN)/python scripts/metrics_page.py $(INTO)docs/reference

.PHONY: bench
bench: setup ## Measure training on this machine's CPU against TRL
	$(BIN)/python benchmarks/train_cpu.py

.PHONY: bench-choices
bench-choices: setup ## Measure what each choice of the training loop gains on this machine's CPU
	$(BIN)/python benchmarks/choices.py $(ARGS)

.PHONY: bench-gpu
bench-gpu: setup ## Measure training on this machine's GPU (ARGS=--dry-run: a tiny model, also on a CPU)
	$(BIN)/python benchmarks/train_gpu.py $(ARGS)

.PHONY: bench-operator
bench-operator: setup-tests tools ## Measure the operator with 1,000 jobs at once and 10,000 at rest (ARGS=--quick: fewer)
	$(BIN)/python -m benchmarks.operator_scale $(ARGS)

.PHONY: clean
clean: ## Remove everything that these targets made
	rm -rf .venv .cache .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis runs
	rm -rf $(QUICKSTART)/data $(QUICKSTART)/model
