//! The crate as its users see it. What is tested by way of Python (processes, hostile folders, other readers) is not
//! tested here again.

#![allow(clippy::unwrap_used, reason = "a test stops where something fails")]

mod alone;
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

/// A place for a snapshot, and options for a plain and an encrypted one.
fn place() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("vm1");
    (folder, root)
}

fn encrypted() -> SnapshotOptions {
    SnapshotOptions::new().key(SecretKey::generate().unwrap()).threads(3)
}

/// Bytes that do not repeat within a chunk or a strip.
fn pattern(length: usize) -> Vec<u8> {
    (0_u32..).flat_map(|number| (number.wrapping_mul(0x9e37_79b9)).to_le_bytes()).take(length).collect()
}
