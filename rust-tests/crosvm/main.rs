//! `vmsnap::crosvm`: code written against crosvm's crate `snapshot`, and how errors show that its callers cannot see.
//!
//! `writing`, `reading` and `values` have one way to call crosvm's API a test. These files compile against crosvm's own
//! signatures, and pass, when their `use` lines are changed back. Here all of them run a second time with encryption.

#![allow(clippy::unwrap_used, reason = "a test stops where something fails")]

mod dropped;
mod encrypted;
mod handles;
mod reading;
mod values;
mod writing;

use std::path::PathBuf;

/// Set for the second run: snapshots are encrypted for the identity in the environment.
const ENCRYPT: &str = "VMSNAP_TEST_ENCRYPT";

/// A place for a snapshot, and whether it is to be encrypted.
fn place() -> (tempfile::TempDir, PathBuf, bool) {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("vm1");
    (directory, root, std::env::var_os(ENCRYPT).is_some())
}
