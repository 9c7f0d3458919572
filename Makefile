# Everything starts from a bare Python 3.11 (or newer) and an empty clone; the second time is quick.

USABLE := import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3 python; do \
	$$python -c '$(USABLE)' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
READY := .venv/ready
SHAPES := --jaxtyping-packages='difflex,beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))'

.DEFAULT_GOAL := help
.PHONY: help demo serve test test-peers style check attack docs bench peers

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' Makefile

demo: $(READY)  ## install, then generate images with the embedded model and study it: demo/report.html
	@echo "demo: generating images with mini-flux into demo/"
	@$(BIN)/python -m difflex generate mini-flux \
		"two red stars above a blue circle on grass" \
		"a large green heart in the center on paper" \
		"three small yellow diamonds on night" \
		"a striped purple square left of a shiny orange ring on sky" \
		"a white cross on brick cartoon" \
		"a pink triangle on sand watercolor" \
		--seeds 0:6 --steps 4 --out demo/contact-sheet.png
	@echo "demo: studying mini-flux: harvest activations, train dictionaries, evaluate and explain them (minutes the first time)"
	@$(BIN)/python -m difflex run mini --out demo
	@echo "demo: open demo/report.html in a browser, or look at all features with: make serve"

serve: $(READY)  ## open the study of the demo in the browser
	@$(BIN)/python -m difflex serve demo --open

test: $(READY)  ## install, then run the tests
	@echo "test: running the tests (CPU only, no network)"
	@$(BIN)/python -m pytest --numprocesses auto --dist worksteal

test-peers: $(READY) .venv-peers/ready  ## compare dictionaries with what SAELens, sparsify and others compute; run before a release
	@echo "test-peers: dictionaries written and read by the tools themselves"
	@$(BIN)/python -m pytest -m peers tests/test_interchange_peers.py

style: $(READY)  ## check format, lint and types
	@echo "style: format, lint, types"
	@$(BIN)/ruff format --check
	@$(BIN)/ruff check
	@$(BIN)/basedpyright

check: style  ## style, and the tests with the axes of every tensor checked
	@echo "check: tests with shape checking"
	@$(BIN)/python -m pytest --numprocesses auto --dist worksteal $(SHAPES)

attack: $(READY)  ## run every command on damaged, full and forbidden disks, killed, and twice at once (minutes)
	@echo "attack: nothing may be lost, hang or end with a traceback"
	@$(BIN)/python -m tests.attack

docs: $(READY)  ## build the documentation as a site: site/index.html
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "docs: open site/index.html in a browser"

bench: $(READY)  ## run every benchmark and compare it with its bar
	@failed=; for script in benchmarks/*.py; do \
		echo "bench: $$script"; $(BIN)/python $$script || failed="$$failed $$script"; done; \
	test -z "$$failed" || { echo "bench: below their bars:$$failed"; exit 1; }

peers: .venv-peers/ready  ## install the libraries that benchmarks compare with, in an environment of their own

$(READY): pyproject.toml constraints.txt
	@$(or $(PYTHON),false) -c '$(USABLE)' || { \
		echo "difflex needs Python 3.11 or newer with venv; found: $(or $(PYTHON),none). Name one: make PYTHON=/path/to/python"; exit 1; }
	@echo "setup: installing difflex and what it needs into .venv with $(PYTHON) (minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# The peers pin other versions of our dependencies, and some change torch when imported, so they have their own environment.
# repeng, for one, asks for an old NumPy and transformers but works with current ones.
# dictionary-learning requires an old nnsight but works with a current one; the torchvision it pulls in is for other builds of torch.
.venv-peers/ready: Makefile
	@echo "setup: installing the peers into .venv-peers"
	@test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	@.venv-peers/bin/python -m pip install --quiet torch==2.13.0 \
		eai-sparsify dictionary-learning sae-lens overcomplete diffusers scikit-learn datasets
	@.venv-peers/bin/python -m pip install --quiet nnsight==0.8.1
	@.venv-peers/bin/python -m pip install --quiet --no-deps gguf repeng steering-vectors
	@.venv-peers/bin/python -m pip uninstall --quiet --yes torchvision
	@touch $@
