# Everything that one does with bcos_nb, each in one command. A machine needs python >= 3.10 and make, nothing else.
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
.DEFAULT_GOAL := help
.PHONY: help ablation backbones recipes search bcosify guidance transfer demo test test-all lab app bench notebooks export clean

help: ## list the commands
	@echo "make <command>, where <command> is one of"
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

demo: $(STAMP) ## miniature dataset, ordinary and B-cos detectors, both pointing games, report (under 15 minutes on 2 cores)
	@$(BIN)/bcos-nb demo

test: $(STAMP) ## package in step with the notebooks, notebooks clean, all of them execute, pytest
	@$(BIN)/python tests/check.py

test-all: $(STAMP) ## the same and the tests that take minutes
	@$(BIN)/python tests/check.py --slow

lab: $(STAMP) ## open JupyterLab on the exploring notebooks
	@$(BIN)/bcos-nb lab

app: $(STAMP) ## the exploring notebooks as an app in the browser
	@$(BIN)/bcos-nb app

bench: $(STAMP) ## measure speed on this machine
	@$(BIN)/python tests/bench.py

ablation: $(STAMP) ## measure what each part of the training recipe does (a quarter of an hour on 2 cores)
	@$(BIN)/python tests/ablation.py

backbones: $(STAMP) ## train every B-cos backbone on the miniature and measure it (under an hour on 2 cores)
	@$(BIN)/python tests/backbones.py

recipes: $(STAMP) ## train the study's hyperparameters and ours on the miniature, three seeds each (an hour and a half on 2 cores)
	@$(BIN)/python tests/recipes.py

search: $(STAMP) ## search hyperparameters on the miniature: ordinary, the study's B-cos form, ours (half an hour on 2 cores)
	@$(BIN)/python tests/search_demo.py

bcosify: $(STAMP) ## from the demo's ordinary detector to a B-cos one, measured (ten minutes on 2 cores)
	@$(BIN)/python tests/bcosify_demo.py

guidance: $(STAMP) ## train with guided losses of several weights and measure detection and localization (40 minutes on one core)
	@$(BIN)/python tests/guidance_demo.py

transfer: $(STAMP) ## measure the demo's ordinary detector on the counterparts of other datasets (twenty minutes on 2 cores)
	@$(BIN)/python tests/transfer.py

notebooks: $(STAMP) ## execute the library notebooks in place, so that their outputs are current
	@$(BIN)/python tests/check.py --refresh

export: $(STAMP) ## write the package from the notebooks, and clean the notebooks
	@echo "Exporting nbs/ to bcos_nb/ and cleaning the notebooks ..."
	@$(BIN)/nbdev_export && $(BIN)/nbdev_clean

clean: ## remove what building and testing leave behind (not .venv, data or runs)
	@echo "Removing build and test leftovers ..."
	@rm -rf build dist *.egg-info _docs _proc .pytest_cache .hypothesis test-output
	@find bcos_nb tests nbs \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

$(STAMP): settings.ini setup.py pyproject.toml
	@if $(BIN)/python -m pip --version > /dev/null 2>&1 || $(BIN)/python -m ensurepip > /dev/null 2>&1; then exit 0; fi; \
	for python in $(PYTHON) python3.12 python3.11 python3.13 python3.10 python3 python; do \
	  $$python -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null || continue; new=$$python; \
	  $$python -c 'import venv, ensurepip' 2> /dev/null || continue; found=$$python; break; \
	done; \
	if [ -z "$$new" ]; then \
	  echo "bcos_nb needs Python 3.10 or newer, and none was found. Install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; \
	elif [ -z "$$found" ]; then \
	  echo "$$new lacks its venv module. On Debian or Ubuntu: apt install python3-venv. Or name another: make PYTHON=/path/to/python3.11" >&2; exit 1; \
	fi; \
	echo "Making $(VENV) with $$($$found --version) ..."; \
	rm -rf $(VENV) && $$found -m venv $(VENV)
	@echo "Installing bcos_nb and its requirements into $(VENV) (minutes the first time: torch is large) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[dev]"
	@touch $@
