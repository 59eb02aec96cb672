//! `_vmsnap.pack`, `unpack`, `push`, and the cache of blocks: whole snapshots on their way.

#![allow(unsafe_code, reason = "a descriptor is a number in Python")]
#![allow(clippy::needless_pass_by_value, reason = "the arguments come from Python")]

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use pyo3::prelude::*;

use super::call::{interruptible, sealed_options};
use super::credentials::Credentials;
use super::location::LocationArg;
use super::memory::reporting;
use super::staging::{Id, id};
use crate::error::{Error, Result};
use crate::store::remote::cache;
use crate::transfer::Progress;

/// The file of an archive: the path of it, or the descriptor of an open file.
#[derive(FromPyObject)]
pub(super) enum ArchiveFile {
    Descriptor(i32),
    Path(PathBuf),
}

/// Returns a file for a descriptor. Both have one position.
pub(super) fn duplicate(descriptor: i32) -> Result<File> {
    if descriptor < 0 {
        return Err(Error::invalid_argument("a file descriptor cannot be negative"));
    }
    // SAFETY: not -1, and the caller in Python keeps it open during the call. If it is not open, the system call that
    // duplicates it returns an error.
    let borrowed = unsafe { BorrowedFd::borrow_raw(descriptor) };
    let file = borrowed.try_clone_to_owned().map_err(|error| Error::io("the descriptor cannot be used", error))?;
    Ok(file.into())
}

#[pyfunction]
pub(super) fn pack<'py>(
    py: Python<'py>,
    location: LocationArg,
    archive: ArchiveFile,
    credentials: &Credentials,
    threads: Option<&Bound<'py, PyAny>>,
    durable: bool,
    expect_seal_digest: Option<&[u8]>,
) -> PyResult<Id<'py>> {
    let options = sealed_options(location.options(credentials, threads)?.durable(durable), false, expect_seal_digest)?;
    let seal = interruptible(py, |interrupt| match archive {
        ArchiveFile::Path(path) => options.pack_interruptible(location, path, interrupt),
        ArchiveFile::Descriptor(descriptor) => options.pack_to_file(location, duplicate(descriptor)?, interrupt),
    })?;
    Ok(id(py, seal))
}

#[pyfunction]
pub(super) fn unpack<'py>(
    py: Python<'py>,
    archive: ArchiveFile,
    location: LocationArg,
    credentials: &Credentials,
    threads: Option<&Bound<'py, PyAny>>,
    durable: bool,
    expect_seal_digest: Option<&[u8]>,
) -> PyResult<Id<'py>> {
    let options = sealed_options(location.options(credentials, threads)?.durable(durable), false, expect_seal_digest)?;
    let seal = interruptible(py, |interrupt| match archive {
        ArchiveFile::Path(path) => options.unpack_interruptible(path, location, interrupt),
        ArchiveFile::Descriptor(descriptor) => options.unpack_file(duplicate(descriptor)?, location, interrupt),
    })?;
    Ok(id(py, seal))
}

/// The seal, whether the snapshot was there before, the bytes that were sent, and those that an earlier push had sent.
type PushReport<'py> = (Id<'py>, bool, u64, u64);

#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "the options of vmsnap.push")]
pub(super) fn push<'py>(
    py: Python<'py>,
    source: LocationArg,
    url: LocationArg,
    credentials: &Credentials,
    threads: Option<&Bound<'py, PyAny>>,
    expect_seal_digest: Option<&[u8]>,
    take_over: bool,
    progress: Option<&Bound<'py, PyAny>>,
) -> PyResult<PushReport<'py>> {
    let options = sealed_options(url.options(credentials, threads)?, false, expect_seal_digest)?.take_over(take_over);
    let copied = Progress::default();
    let pushed = reporting(py, progress, |report| {
        options.push_interruptible(source, url, &copied, &mut || report(copied.so_far()))
    })?;
    Ok((id(py, pushed.id), pushed.already_there, pushed.sent_bytes, pushed.resumed_bytes))
}

#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "the options of vmsnap.pull")]
pub(super) fn pull<'py>(
    py: Python<'py>,
    url: LocationArg,
    target: LocationArg,
    credentials: &Credentials,
    threads: Option<&Bound<'py, PyAny>>,
    durable: bool,
    archive: Option<bool>,
    expect_seal_digest: Option<&[u8]>,
    progress: Option<&Bound<'py, PyAny>>,
) -> PyResult<Id<'py>> {
    let mut options = sealed_options(url.options(credentials, threads)?.durable(durable), false, expect_seal_digest)?;
    if let Some(archive) = archive {
        options = options.archive(archive);
    }
    let copied = Progress::default();
    let seal = reporting(py, progress, |report| {
        options.pull_interruptible(url, target, &copied, &mut || report(copied.so_far()))
    })?;
    Ok(id(py, seal))
}

/// Returns the number of blocks in the cache at a directory, the bytes that they occupy, and the most bytes.
#[pyfunction]
pub(super) fn cache_usage(py: Python<'_>, directory: PathBuf) -> PyResult<(u64, u64, u64)> {
    let (usage, limit) = py.detach(|| Ok::<_, Error>((cache::usage(&directory)?, cache::usual_limit(&directory)?)))?;
    Ok((usage.blocks, usage.bytes, limit))
}

/// Removes all blocks from the cache at a directory, and returns their number and the bytes that they occupied.
#[pyfunction]
pub(super) fn empty_cache(py: Python<'_>, directory: PathBuf) -> PyResult<(u64, u64)> {
    let removed = py.detach(|| cache::empty(&directory))?;
    Ok((removed.blocks, removed.bytes))
}
