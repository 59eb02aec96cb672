#!/usr/bin/env bash
# wheels.sh TARGET OUT: the wheels of a release for a target of Rust, gnu or musl, for CPython's stable ABI and for the
# free-threaded one. Cross-compiled: zig is the C compiler and linker, whose glibc is as old as manylinux_2_17 wants it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

target=$1 out=$2
case $target in
    *-gnu) compatibility=manylinux_2_17 ;;
    *-musl) compatibility=musllinux_1_2 ;;
    *) echo "wheels.sh: no wheels are made for $target" >&2; exit 2 ;;
esac

python=${PYTHON:-python3.11}
tools=target/wheels/tools
"$python" -m venv "$tools"
"$tools/bin/python" -m pip install --quiet --upgrade 'pip>=25.1'
"$tools/bin/python" -m pip install --quiet --group build 'ziglang>=0.13'
rustup target add "$target"

# One after the other in one folder: what does not depend on Python is compiled once.
for interpreter in python3.11 python3.14t; do
    PATH="$PWD/$tools/bin:$PATH" "$tools/bin/maturin" build --release --locked --zig --target "$target" \
        --compatibility "$compatibility" --interpreter "$interpreter" --target-dir target/wheels --out "$out"
done
