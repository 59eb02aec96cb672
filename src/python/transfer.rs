//! `_vmsnap.pack` and `_vmsnap.unpack`: a snapshot as one file.

#![allow(unsafe_code, reason = "a descriptor is a number in Python")]
#![allow(clippy::needless_pass_by_value, reason = "the arguments come from Python")]

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use pyo3::prelude::*;

use super::call::{interruptible, sealed_options};
use super::credentials::Credentials;
use super::location::LocationArg;
use super::staging::{Id, id};
use crate::error::{Error, Result};

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
