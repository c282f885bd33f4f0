# Every target makes .venv and installs what it needs; none needs anything but Python 3.11 or later and make.
# `make test CONSTRAINTS=/dev/null` takes the newest release of every library instead of those in constraints.txt.

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin

.PHONY: demo quickstart test docs lint format clean niivue

demo: .venv/installed
	rm -rf runs/demo
	$(BIN)/python evaluate.py --scan examples/7_t2_SPACE.mha --tta --calibrate --hotspots --report runs/demo/report \
		--out runs/demo/evaluation

quickstart: .venv/installed
	rm -rf runs/quickstart
	$(BIN)/python -m data_prep phantom --out runs/quickstart/discs --patients 200 --seed 0 --workers 2
	$(BIN)/python train.py quickstart --data runs/quickstart/discs --workdir runs/quickstart/run
	$(BIN)/python evaluate.py --checkpoint runs/quickstart/run --data runs/quickstart/discs --split test --tta --calibrate \
		--hotspots --report runs/quickstart/report \
		--out runs/quickstart/evaluation

test: .venv/installed-dev lint node_modules/axe-core
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# The manual, in build/manual/index.html. Material's advertisement for its successor is no warning of ours.
docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "The manual is build/manual/index.html."

# Checks the contrast and the names of the pages in the browser tests, which do without it where there is no npm.
node_modules/axe-core:
	-npm install --no-save --silent axe-core@4.14.1

# Gets NiiVue's bundle from npm again, for a new version: its number and digest are in spinejax/report/niivue.py.
NIIVUE = $(shell sed -n 's/^NIIVUE_VERSION = "\(.*\)"/\1/p' spinejax/report/niivue.py)
niivue:
	npm install --no-save --silent @niivue/niivue@$(NIIVUE)
	xz -9e --stdout node_modules/@niivue/niivue/dist/niivue.umd.js > spinejax/report/niivue_bundle/niivue.umd.js.xz
	sha256sum node_modules/@niivue/niivue/dist/niivue.umd.js

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv runs

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing into .venv, which takes a minute or two…"
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[report,scans]'
	touch $@

.venv/installed-docs: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[docs]'
	touch $@

.venv/installed-dev: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[all,dev,docs]'
	touch $@
