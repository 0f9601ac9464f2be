# Two commands are enough: `make demo` and `make test`. Each sets up .venv first where it is missing.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
TORCH := $(shell sed -n 's/^torch==/torch==/p' requirements/cpu.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq --no-deps
SEED ?= 0
PORT ?= 3000
JOBS ?= 2

.PHONY: setup demo demo-smollm2 test test-system test-ui check format ui bench bench-gpu evidence evidence-tune evidence-quick lock clean

setup: $(READY)

# --no-deps: the lock is complete, and it leaves out torchvision, torchaudio and torchcodec, which vLLM asks for
# and which do not fit this build of PyTorch. PyTorch's CPU wheels lie on an index of their own.
$(READY): requirements/cpu.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "oapl needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	@echo "Setting up .venv (some minutes; about 2 GB)"
	@$(PYTHON) -m venv .venv
	@$(PIP) "$(TORCH)" 2>/dev/null || $(PIP) --index-url https://download.pytorch.org/whl/cpu "$(TORCH)"
	@$(PIP) -r requirements/cpu.txt
	@$(PIP) -r requirements/compiled.txt 2>/dev/null || echo "No C compiler: reasoning-gym's tasks are left out; all else works."
	@$(PIP) -e .
	@touch $@

demo: setup
	@$(BIN)/oapl run --recipe tiny --set seed=$(SEED) --root $(if $(filter 0,$(SEED)),data,data/seed-$(SEED))

# SmolLM2-135M, converted from its PyPI package: one whole round, a quarter of an hour or more.
demo-smollm2: setup data/smollm2/prompts.jsonl
	@$(BIN)/oapl run --recipe smollm2

data/smollm2/prompts.jsonl: | setup
	@$(BIN)/python -m pipeline.policies.smollm2 --out data/smollm2

test: setup
	$(BIN)/python -m pytest -m "not system"

# Debian: apt-get install chromium chromium-driver postgresql
test-system: setup
	$(BIN)/python -m pytest -m system

test-ui: setup
	$(BIN)/python -m pytest tests/assets/ui/browser.py

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ui: setup
	$(BIN)/oapl ui --port $(PORT)

# Each prints its table; none is timed by a test.
bench: setup
	$(BIN)/python -m benchmarks.verifiers
	PYTHONPATH=. $(BIN)/python benchmarks/learner/bench_learner.py step
	PYTHONPATH=. $(BIN)/python benchmarks/learner/bench_learner.py logprobs --repeat 1
	$(BIN)/python benchmarks/store/bench.py --rows 60000 --small 20000 --baseline-rows 20000

# docs/gpu.md: ten minutes on a card; without one, tiny shapes that say nothing of speed.
bench-gpu:
	@PYTHON=$$([ -x $(BIN)/python ] && echo $(BIN)/python || echo $(PYTHON)); $$PYTHON -m benchmarks.gpu run --out gpu.json

# The comparisons of docs/evidence.md (benchmarks/evidence/experiments.py). Each goes on where it was stopped.
# Two losses, two seeds, one lag: a quarter of an hour at most.
evidence-quick: setup
	@$(BIN)/python -m benchmarks.evidence run quick

# How learning rates, beta2 and clip bounds were chosen.
evidence-tune: setup
	@$(BIN)/python -m benchmarks.evidence run tune

# All of them; hours. JOBS of them at a time share the cores: a small policy leaves a second core half idle.
evidence: setup data/smollm2/prompts.jsonl
	@$(BIN)/python -m benchmarks.evidence run --jobs $(JOBS)
	@$(BIN)/python -m benchmarks.evidence passk
	@$(BIN)/python -m benchmarks.evidence report

# Writes the lock anew from what is installed in .venv.
lock:
	$(BIN)/python -m pip --disable-pip-version-check freeze --all --exclude-editable \
		| grep -viE '^(torchvision|torchaudio|torchcodec|pycosat|oapl|pip|wheel|triton)\b' > requirements/cpu.txt

clean:
	rm -rf .venv build *.egg-info
