# Everything runs in .venv, which the first target that needs it makes; nothing needs root.
# More options for a target's command go in ARGS: make test ARGS="-k reports -x"
# Another Python: make setup PYTHON=/path/to/python3.12

VENV := .venv
RUN := $(VENV)/bin/python
ARGS ?=
# Files of tests are shared out in the order of tests/conftest.py. One at a time: ARGS="-n 0"
SIDE_BY_SIDE := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# An interpreter that has PyTorch; where there is none, nothing is compared with it.
TORCH_PYTHON ?= $(RUN)
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
# What git calls for the files that notebooks/.gitattributes names. Without --keep-id, cells would be
# numbered anew; the keys are what Jupyter adds to those that nbstripout takes away by itself.
STRIP = "$(abspath $(RUN))" -m nbstripout --keep-id
LANGUAGE := codemirror_mode file_extension mimetype nbconvert_exporter pygments_lexer version
CELL := editable jupyter papermill slideshow vscode
EXTRA_KEYS = metadata.papermill $(LANGUAGE:%=metadata.language_info.%) $(CELL:%=cell.metadata.%)
# On Linux without a display no browser can open: JupyterLab prints the address alone.
NO_BROWSER = $(if $(DISPLAY)$(WAYLAND_DISPLAY),,$(if $(filter Linux,$(shell uname)),--no-browser))
# The first of these whose version is supported makes .venv.
CANDIDATES = $(or $(PYTHON),python3 python3.13 python3.12 python3.11)
# A user's own pip settings must not install outside .venv.
export PIP_USER := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo report test test-browser lab filter pages reference clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile

setup: $(VENV)/.ready ## Make .venv and install everything in it (3.4 GB of disk)

demo: $(VENV)/.ready ## Run the whole of it small, and write a report (2 to 7 minutes on 2 cores)
	$(RUN) -m cifar_lib demo $(ARGS)

report: $(VENV)/.ready ## Make pages of all finished runs; only what changed is executed again
	$(RUN) -m cifar_lib report $(ARGS)

test: $(VENV)/.ready-test ## Check the style and run the tests (10 to 30 minutes on 2 cores)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m pytest $(SIDE_BY_SIDE) $(ARGS)

test-browser: $(VENV)/.ready ## Operate notebooks and reports in Chromium
	$(RUN) -m pytest tests/browser $(SIDE_BY_SIDE) $(ARGS)

# Pictures that are dropped into a notebook may be larger than the 10 MB of a usual message.
lab: filter ## Open the notebooks in JupyterLab
	$(RUN) -m jupyterlab --ServerApp.root_dir='$(CURDIR)' $(NO_BROWSER) \
	    --ServerApp.tornado_settings='{"websocket_max_message_size": 104857600}' \
	    --LabApp.default_url=/lab/tree/notebooks/01_dataset.ipynb $(ARGS)

filter: $(VENV)/.ready ## Keep what notebooks put out away from git (make lab does so, too)
	@if [ -e .git ] && git rev-parse >/dev/null 2>&1; then \
	    git config filter.nbstripout.clean '$(STRIP)'; \
	    git config filter.nbstripout.smudge cat; \
	    git config filter.nbstripout.required true; \
	    git config filter.nbstripout.extrakeys '$(EXTRA_KEYS)'; \
	else \
	    echo "This is no checkout of git, so outputs of notebooks need not be kept away from it."; \
	fi

pages: $(VENV)/.ready ## Make figures/, reports/ and README's tables of results/ again (some minutes)
	$(RUN) -m cifar_lib reference --pages $(ARGS)

reference: $(VENV)/.ready ## Make results/, figures/, reports/ and weights/ again (seven hours on 2 cores)
	$(RUN) benchmarks/data_loading.py --out results/benchmarks/data_loading.json
	$(RUN) benchmarks/augmentation.py --out results/benchmarks/augmentation.json
	$(RUN) benchmarks/throughput.py --out results/benchmarks/throughput.json
	$(RUN) benchmarks/pytorch.py --torch-python $(TORCH_PYTHON) --out results/benchmarks/pytorch.json
	$(RUN) benchmarks/operations.py --out results/benchmarks/operations.json
	$(RUN) benchmarks/sweeps.py --out results/benchmarks/sweeps.json
	$(RUN) -m cifar_lib reference $(ARGS)

# The filter of notebooks goes, too: it is in .venv, and git would refuse to add notebooks.
clean: ## Delete .venv and caches; runs/ and the data stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
	find . -name .ipynb_checkpoints -prune -exec rm -rf {} +
	@if [ -e .git ]; then git config --remove-section filter.nbstripout 2>/dev/null || true; fi

# requirements.txt names all that is needed: pip need not look for more. It would compile on one core,
# for as long as all else that it does takes. What does not compile is for another Python, and not
# imported.
$(VENV)/.ready: requirements.txt pyproject.toml
	@if ! $(RUN) -c '$(SUPPORTED)' 2>/dev/null; then \
	    python=; \
	    for candidate in $(CANDIDATES); do \
	        if $$candidate -c '$(SUPPORTED)' 2>/dev/null; then python=$$candidate; break; fi; \
	    done; \
	    if [ -z "$$python" ]; then \
	        echo "This needs Python 3.11, 3.12 or 3.13, and none of these is one:"; \
	        for candidate in $(CANDIDATES); do \
	            echo "  $$candidate: $$($$candidate --version 2>/dev/null || echo not found)"; \
	        done; \
	        echo "Install one and name it: make $(or $(MAKECMDGOALS),setup) PYTHON=/path/to/python3.12"; \
	        exit 1; \
	    fi >&2; \
	    if ! $$python -c 'import ensurepip, venv' 2>/dev/null; then \
	        package=$$($$python -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
	        echo "$$python cannot make virtual environments: its venv module is missing." >&2; \
	        echo "On Debian and Ubuntu: sudo apt install $$package (or python3-venv)" >&2; \
	        exit 1; \
	    fi; \
	    echo "Making $(VENV) with $$($$python --version)"; \
	    $$python -m venv --clear $(VENV) || exit 1; \
	fi
	$(RUN) -m pip install --no-deps --no-compile -r requirements.txt
	$(RUN) -m compileall -q -j 0 $(VENV)/lib cifar_lib || true
	$(RUN) -m pip install --no-deps --no-build-isolation --editable .
	@touch $@

# JAX is for the tests of KERAS_BACKEND=jax alone. The constraint keeps the pinned versions; '.[jax]'
# would have pip look for all else again.
$(VENV)/.ready-test: $(VENV)/.ready
	$(RUN) -m pip install --constraint requirements.txt $$(grep -o 'jax==[0-9.]*' pyproject.toml)
	@touch $@
