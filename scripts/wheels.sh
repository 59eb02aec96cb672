#!/usr/bin/env bash
# wheels.sh TARGET OUT: build the wheels of a release for a target of Rust (gnu or musl): one for the stable ABI of
# CPython, one for the free-threaded CPython. zig is the C compiler and linker; its glibc is as old as manylinux_2_17.
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

# Panic messages contain paths of source files: map them to paths that are the same everywhere. The last match wins.
root=$(pwd -P) cargo_home=${CARGO_HOME:-$HOME/.cargo}
RUSTFLAGS="${RUSTFLAGS-} --remap-path-prefix=$root=/vmsnap --remap-path-prefix=$cargo_home=/cargo"
export RUSTFLAGS

# Both builds share a directory, so that crates without Python are compiled once. maturin knows these versions for each
# target; from a path to an interpreter it would take the settings of this machine.
built=target/wheels/built/$target
rm -rf "$built"
for interpreter in python3.11 3.14t; do
    PATH="$PWD/$tools/bin:$PATH" "$tools/bin/maturin" build --release --locked --zig --target "$target" \
        --compatibility "$compatibility" --interpreter "$interpreter" --target-dir target/wheels --out "$built"
done

"$tools/bin/python" - "$target" "$root/" "$cargo_home/" "$built"/*.whl <<'end'
import sys
import zipfile

target, *directories = sys.argv[1:4]
triple = target.replace("-unknown-", "-")
for wheel in sys.argv[4:]:
    with zipfile.ZipFile(wheel) as archive:
        modules = {name: archive.read(name) for name in archive.namelist() if name.endswith(".so")}
    if not modules:
        sys.exit(f"wheels.sh: {wheel} does not contain an extension module")
    for name, content in modules.items():
        if not name.endswith((".abi3.so", f"-{triple}.so")):
            sys.exit(f"wheels.sh: {wheel} contains {name}, which Python on {target} does not import")
        for directory in directories:
            if directory.encode() in content:
                sys.exit(f"wheels.sh: {name} in {wheel} contains {directory}, a path of this machine")
end
mkdir -p "$out"
cp "$built"/*.whl "$out"
