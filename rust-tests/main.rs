//! The crate as its users see it. The Python tests cover processes, hostile directories and other readers, which are
//! not tested again here.

#![allow(clippy::unwrap_used, reason = "a test stops at the first failure")]

mod alone;
mod archive;
mod corpus;
mod errors;
mod fragments;
mod golden;
mod handles;
mod keys;
mod memory;
mod staging;

use std::path::PathBuf;

use vmsnap::{SecretKey, SnapshotOptions};

/// Returns a path for a snapshot, with options for a plain and an encrypted one.
fn place() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("vm1");
    (directory, root)
}

fn encrypted() -> SnapshotOptions {
    SnapshotOptions::new().key(SecretKey::generate().unwrap()).threads(3)
}

/// Returns bytes that do not repeat within a chunk or a batch.
fn pattern(length: usize) -> Vec<u8> {
    (0_u32..).flat_map(|number| (number.wrapping_mul(0x9e37_79b9)).to_le_bytes()).take(length).collect()
}
