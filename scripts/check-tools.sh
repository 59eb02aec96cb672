#!/bin/sh
# check-tools.sh PYTHON [lint]: report every missing tool at once, and how to install it. Prints nothing if all exist.
# Run it in the root of the repository.
set -u
python=$1
purpose=${2:-build}
rust_floor=$(sed -n 's/^rust-version = "\([0-9.]*\)".*/\1/p' Cargo.toml)
missing=0

lacks() { # the tool, how to install it
    printf 'vmsnap needs %s\n    %s\n' "$1" "$2" >&2
    missing=1
}

if [ "$(uname -s)" != Linux ]; then
    lacks "Linux: this is $(uname -s)" "use a virtual machine or a container with Linux"
fi

if ! "$python" -c '' 2>/dev/null; then
    lacks "Python 3.11 or newer: '$python' does not run" \
        "apt install python3 python3-venv, dnf install python3, or pass the path: make PYTHON=/path/to/python3"
elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    lacks "Python 3.11 or newer: '$python' is $("$python" -c 'import platform; print(platform.python_version())')" \
        "if a newer one is installed under another name, pass it: make PYTHON=python3.12"
elif ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    lacks "the Python modules venv and ensurepip" "apt install python3-venv"
fi

rustup='install it with rustup: https://rustup.rs (or the packages rustc and cargo, if they are new enough)'
if ! rustc --version >/dev/null 2>&1; then
    lacks "rustc $rust_floor or newer" "$rustup"
else
    rust=$(rustc --version | cut -d ' ' -f 2)
    if [ "$(printf '%s\n' "$rust_floor" "${rust%%-*}" | sort -V | head -n 1)" != "$rust_floor" ]; then
        lacks "rustc $rust_floor or newer: this is $rust" "rustup update stable"
    fi
fi
if ! cargo --version >/dev/null 2>&1; then
    lacks "cargo" "$rustup"
elif [ "$purpose" = lint ]; then
    cargo clippy --version >/dev/null 2>&1 || lacks "clippy" "rustup component add clippy, or apt install rust-clippy"
    cargo fmt --version >/dev/null 2>&1 || lacks "rustfmt" "rustup component add rustfmt, or apt install rustfmt"
fi

if ! printf '#include <stdlib.h>\nint main(void) { return EXIT_SUCCESS; }\n' |
    "${CC:-cc}" -x c -o /dev/null - 2>/dev/null; then
    lacks "a C compiler with the headers of the C library ('${CC:-cc}' is missing or cannot compile)" \
        "apt install gcc libc6-dev, or dnf install gcc"
fi

exit "$missing"
