//! `vmsnap::crosvm`: code written against crosvm's crate `snapshot`, and errors that crosvm's own callers do not see.
//!
//! Each test of `writing`, `reading` and `values` calls crosvm's API in one way. With their `use` lines changed back,
//! these files compile against crosvm's own signatures, and pass. Here all of them run a second time with encryption.

#![allow(clippy::unwrap_used, reason = "a test stops at the first failure")]

mod dropped;
mod encrypted;
mod handles;
mod reading;
mod values;
mod writing;

use std::path::PathBuf;

/// Set for the second run, in which snapshots are encrypted for the identity in the environment.
const ENCRYPT: &str = "VMSNAP_TEST_ENCRYPT";

/// Returns a path for a snapshot, and whether it must be encrypted.
fn place() -> (tempfile::TempDir, PathBuf, bool) {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("vm1");
    (directory, root, std::env::var_os(ENCRYPT).is_some())
}
