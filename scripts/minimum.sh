#!/usr/bin/env bash
# minimum.sh: run the tests with the oldest versions of Rust, Python and every dependency that the manifests allow.
# Works in target/minimum, on a copy of the files that git knows.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
least=$(sed -n 's/^requires-python = ">=\(.*\)"/\1/p' pyproject.toml)
if [ "$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" != "$least" ]; then
    echo "minimum.sh: needs Python $least, but '$python' is another version: make test-minimum PYTHON=python$least" >&2
    exit 1
fi
rust=$(sed -n 's/^rust-version = "\([0-9.]*\)".*/\1/p' Cargo.toml)
copy=$PWD/target/minimum/copy
export CARGO_TARGET_DIR=$PWD/target/minimum/cargo
export RUSTUP_TOOLCHAIN=$rust

printf '\n==> Rust %s, and the oldest version of every crate\n' "$rust"
rustup toolchain install "$rust" --profile minimal
rm -rf "$copy"
mkdir -p "$copy"
git ls-files -z --cached --others --exclude-standard --deduplicate |
    while IFS= read -r -d '' file; do [ ! -e "$file" ] && [ ! -L "$file" ] || printf '%s\0' "$file"; done |
    xargs -0 cp --parents --no-dereference --target-directory "$copy"
# The directory of known answers beside the checkout, if it exists.
ln -sfn "$PWD/../shared" "$copy/../shared"
cd "$copy"
# RUSTC_BOOTSTRAP allows an option of the nightly cargo. Indirect dependencies get their newest versions.
RUSTC_BOOTSTRAP=1 cargo -Z direct-minimal-versions update --quiet
cargo tree --depth 1 --edges normal --features python,crosvm,object-store
cargo test --locked --features crosvm,object-store

printf '\n==> %s, and the oldest version of every package\n' "$("$python" --version)"
rm -rf target/venv
"$python" -m venv target/venv
venv=$PWD/target/venv/bin
"$venv/python" -m pip install --quiet --upgrade 'pip>=25.1' uv
"$venv/uv" pip install --quiet --python "$venv/python" --group build --group test
CARGO_PROFILE_RELEASE_LTO=off "$venv/maturin" build --release --locked --interpreter "$venv/python" --out target/dist
"$venv/uv" pip compile --quiet --resolution lowest-direct --all-extras --output-file target/least.txt pyproject.toml
"$venv/uv" pip install --python "$venv/python" --requirements target/least.txt
"$venv/uv" pip install --python "$venv/python" --no-deps --reinstall-package vmsnap target/dist/*.whl
# Only the tests that use these packages: writing and reading fragments does not need them.
"$venv/python" -m pytest -q tests/test_values_*.py tests/test_hostile_values.py tests/test_cli*.py tests/test_qemu.py \
    tests/test_memory.py tests/test_snapshot.py tests/test_golden.py tests/test_staging.py
