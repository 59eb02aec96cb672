//! Tells the extension module which commit it is built from, for `vmsnap --version`.

use std::env;
use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-env-changed=VMSNAP_COMMIT");
    // Nothing else asks, and for a Rust user each commit would mean to compile anew.
    if env::var_os("CARGO_FEATURE_PYTHON").is_none() {
        return;
    }
    let root = env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default();
    let commit =
        env::var("VMSNAP_COMMIT").ok().filter(|commit| !commit.is_empty()).or_else(|| commit(Path::new(&root)));
    if let Some(commit) = commit {
        println!("cargo::rustc-env=VMSNAP_BUILT_FROM={commit}");
    }
}

/// The commit that is checked out, followed by `-dirty` where files differ from it. None outside of a repository of our own.
fn commit(root: &Path) -> Option<String> {
    // Unpacked from an archive, this may lie in somebody else's.
    let git = root.join(".git");
    if !git.exists() {
        return None;
    }
    // The last has a line for each time that another commit was checked out or made.
    for watched in ["src", "python", "Cargo.toml", "Cargo.lock", ".git/logs/HEAD"] {
        println!("cargo::rerun-if-changed={watched}");
    }
    let told = Command::new("git")
        .args(["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"])
        .current_dir(root)
        .output()
        .ok()
        .filter(|told| told.status.success())?;
    String::from_utf8(told.stdout).ok().map(|commit| commit.trim().to_owned())
}
