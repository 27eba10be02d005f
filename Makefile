# make demo   train RoPE and HoPE on a CPU, score both beyond the trained context (six minutes on two cores)
# make test   the tests
# make soak   the tests that take minutes
# make lint   the linter
# All of them work in their own virtual environment, which the first call makes.

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: demo test soak lint
# the packages are installed anew whenever a requirements file is newer than the last install
$(VENV)/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -r requirements-dev.txt
	touch $@

# a finished training is not repeated, an interrupted one goes on: delete out/demo to start over
out/demo/%/done: | $(VENV)/installed
	$(RUN) train.py @config/cpu_demo --pe $* --out_dir out/demo/$* $$(test -f out/demo/$*/ckpt.pt && echo --resume)
	touch $@

demo: out/demo/rope/done out/demo/hope/done
	$(RUN) eval_extrapolation.py out/demo/rope out/demo/hope --json out/demo/results.json --plot out/demo/results.png
	@echo "the table above is in out/demo/results.json, the picture in out/demo/results.png"

test: $(VENV)/installed
	$(RUN) -m pytest -q tests

soak: $(VENV)/installed
	$(RUN) -m pytest -q -m slow tests

lint: $(VENV)/installed
	$(RUN) -m ruff check .
