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

# Panics name files: under folders that are the same whoever builds. Of two prefixes that fit, the last one counts.
root=$(pwd -P) cargo_home=${CARGO_HOME:-$HOME/.cargo}
RUSTFLAGS="${RUSTFLAGS-} --remap-path-prefix=$root=/vmsnap --remap-path-prefix=$cargo_home=/cargo"
export RUSTFLAGS

# One after the other in one folder: what does not depend on Python is compiled once. A bare version is one that maturin
# knows for each target; of an interpreter by that name it would take the names of its own machine.
built=target/wheels/built/$target
rm -rf "$built"
for interpreter in python3.11 3.14t; do
    PATH="$PWD/$tools/bin:$PATH" "$tools/bin/maturin" build --release --locked --zig --target "$target" \
        --compatibility "$compatibility" --interpreter "$interpreter" --target-dir target/wheels --out "$built"
done

"$tools/bin/python" - "$target" "$root/" "$cargo_home/" "$built"/*.whl <<'end'
import sys
import zipfile

target, *folders = sys.argv[1:4]
triple = target.replace("-unknown-", "-")
for wheel in sys.argv[4:]:
    with zipfile.ZipFile(wheel) as archive:
        modules = {name: archive.read(name) for name in archive.namelist() if name.endswith(".so")}
    if not modules:
        sys.exit(f"wheels.sh: {wheel} holds no module")
    for name, content in modules.items():
        if not name.endswith((".abi3.so", f"-{triple}.so")):
            sys.exit(f"wheels.sh: {wheel} holds {name}, which no Python on {target} would import")
        for folder in folders:
            if folder.encode() in content:
                sys.exit(f"wheels.sh: {name} in {wheel} names {folder}, a folder of this machine")
end
mkdir -p "$out"
cp "$built"/*.whl "$out"
