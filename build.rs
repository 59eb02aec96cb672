//! Tells the extension module which commit it is built from, for `vmsnap --version`.

use std::env;
use std::path::Path;
use std::process::Command;

/// What it is built from, of all that git has.
const SOURCES: [&str; 5] = ["src", "python", "Cargo.toml", "Cargo.lock", "build.rs"];

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

/// The commit that is checked out, with `-dirty` where sources differ from it. None outside of a repository of our own.
fn commit(root: &Path) -> Option<String> {
    // Unpacked from an archive, this may lie in somebody else's.
    if !root.join(".git").exists() {
        return None;
    }
    // It has a line for each time that another commit was checked out or made.
    let log = git(root, &["rev-parse", "--git-path", "logs/HEAD"])?;
    for watched in SOURCES.into_iter().chain([log.as_str()]) {
        println!("cargo::rerun-if-changed={watched}");
    }
    let commit = git(root, &["rev-parse", "HEAD"])?;
    let changes = git(root, &[&["status", "--porcelain", "--"], &SOURCES[..]].concat())?;
    Some(if changes.is_empty() { commit } else { commit + "-dirty" })
}

/// What git prints. It leaves its index alone, which somebody may be working with.
fn git(root: &Path, arguments: &[&str]) -> Option<String> {
    let told = Command::new("git").arg("--no-optional-locks").args(arguments).current_dir(root).output().ok()?;
    let printed = String::from_utf8(told.stdout).ok().filter(|_| told.status.success())?;
    Some(printed.trim().to_owned())
}
