//! Passes the commit to the extension module, for `vmsnap --version`.

use std::env;
use std::path::Path;
use std::process::Command;

/// The files in git from which the module is built.
const SOURCES: [&str; 5] = ["src", "python", "Cargo.toml", "Cargo.lock", "build.rs"];

fn main() {
    println!("cargo::rerun-if-env-changed=VMSNAP_COMMIT");
    // Only the extension module uses it, and a Rust user would have to recompile after each commit.
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

/// Returns the commit that is checked out, with `-dirty` if sources differ from it, or `None` outside of a git
/// repository.
fn commit(root: &Path) -> Option<String> {
    // The directory of an unpacked archive may be inside another repository.
    if !root.join(".git").exists() {
        return None;
    }
    // The log gets a line for each commit that is made or checked out.
    let log = git(root, &["rev-parse", "--git-path", "logs/HEAD"])?;
    for watched in SOURCES.into_iter().chain([log.as_str()]) {
        println!("cargo::rerun-if-changed={watched}");
    }
    let commit = git(root, &["rev-parse", "HEAD"])?;
    let changes = git(root, &[&["status", "--porcelain", "--"], &SOURCES[..]].concat())?;
    Some(if changes.is_empty() { commit } else { commit + "-dirty" })
}

/// Returns the output of git. The index is not refreshed, because another process may use it.
fn git(root: &Path, arguments: &[&str]) -> Option<String> {
    let told = Command::new("git").arg("--no-optional-locks").args(arguments).current_dir(root).output().ok()?;
    let printed = String::from_utf8(told.stdout).ok().filter(|_| told.status.success())?;
    Some(printed.trim().to_owned())
}
