# make demo      train four models on a CPU, two at a time, and score them beyond the trained context
# make test      the tests
# make soak      the tests that take minutes
# make lint      the linter
# make mutants   put 100 faults into the code, one at a time: which share do the tests notice? (SAMPLE=100 SEED=1)
# make look      open the pages in a browser: screenshots, and errors of their scripts
# All of them work in their own virtual environment, which the first call makes.

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: demo trainings test soak lint mutants look
# the packages are installed anew whenever one of these files is newer than the last install
$(VENV)/installed: requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -r requirements-dev.txt -c constraints.txt
	touch $@

DEMO = rope hope rope_qkv_bias windows
rope = @config/cpu_demo --pe rope
hope = @config/cpu_demo --pe hope
rope_qkv_bias = @config/cpu_demo --pe rope --qkv_bias
windows = @config/cpu_windows

demo: $(VENV)/installed
	$(MAKE) --no-print-directory -j 2 trainings
	$(RUN) eval_extrapolation.py $(DEMO:%=out/demo/%) --json out/demo/results.json --plot out/demo/results.png
	$(RUN) -m experiments.page $(DEMO:%=out/demo/%) --html out/demo/page.html \
	    --names RoPE HoPE "RoPE, QKV biases" windows
	@echo "the tables: out/demo/results.json; the picture: out/demo/results.png; a text as the models read it:"
	@echo "out/demo/page.html; the idea in six steps: docs/index.html"

# Two trainings of one thread each are done sooner than one of two threads after the other. Each line gets the name of
# its run. A finished training is not repeated, an interrupted one continues: delete out/demo to start over.
trainings: $(DEMO:%=out/demo/%/done)
out/demo/%/done:
	@mkdir -p $(@D)
	@export OMP_NUM_THREADS=1; { $(RUN) train.py $($*) --out_dir $(@D) $$(test -f $(@D)/ckpt.pt && echo --resume) \
	    && touch $@; } 2>&1 | { trap "" INT; while IFS= read -r line; do printf "%s\n" "$*: $$line"; done; }; test -f $@

# two processes with one thread each are done sooner than one process with two
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist loadfile tests

soak: $(VENV)/installed
	$(RUN) -m pytest -q -m slow tests

lint: $(VENV)/installed
	$(RUN) -m ruff check .

SAMPLE ?= 100
SEED ?= 1
mutants: $(VENV)/installed
	$(VENV)/bin/pip install --quiet cosmic-ray -c constraints.txt
	$(RUN) tools/mutants.py $(SAMPLE) $(SEED)

# in a browser: needs an installed Chromium (Debian: apt install chromium); screenshots go to out/look
look: $(VENV)/installed
	$(VENV)/bin/pip install --quiet playwright -c constraints.txt
	$(RUN) tools/look.py
