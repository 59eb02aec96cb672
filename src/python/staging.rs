//! `_vmsnap.StagedSnapshot`, `seal`, `clean` and `verify`.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::call::{interruptible, parse_format, sealed_options};
use super::credentials::Credentials;
use super::location::LocationArg;
use super::slot::Slot;
use super::writer::SnapshotWriter;
use crate::error::Error;
use crate::snapshot::remove as removal;
use crate::{Problem, SealId, Verification};

/// Snapshot id and seal digest.
pub(super) type Id<'py> = (Bound<'py, PyBytes>, Bound<'py, PyBytes>);

pub(super) fn id(py: Python<'_>, seal: SealId) -> Id<'_> {
    (PyBytes::new(py, &seal.snapshot_id), PyBytes::new(py, &seal.seal_digest))
}

#[pyclass(frozen, module = "vmsnap._vmsnap")]
pub(super) struct StagedSnapshot {
    slot: Slot<crate::StagedSnapshot>,
    writer: crate::SnapshotWriter,
    location: PathBuf,
}

#[pymethods]
impl StagedSnapshot {
    #[new]
    #[allow(clippy::too_many_arguments, reason = "Python passes each option by itself")]
    fn new(
        py: Python<'_>,
        location: LocationArg,
        credentials: &Credentials,
        threads: Option<&Bound<'_, PyAny>>,
        format: &str,
        durable: bool,
        archive: Option<bool>,
        take_over: bool,
    ) -> PyResult<Self> {
        let options = location.options(credentials, threads)?.format(parse_format(format)?);
        let mut options = options.durable(durable).take_over(take_over);
        if let Some(archive) = archive {
            options = options.archive(archive);
        }
        let staged = interruptible(py, |interrupt| options.create_interruptible(location, interrupt))?;
        Ok(Self { writer: staged.writer().clone(), location: staged.location().to_owned(), slot: Slot::new(staged) })
    }

    #[getter]
    fn location(&self) -> &OsStr {
        self.location.as_os_str()
    }

    #[getter]
    fn writer(&self) -> SnapshotWriter {
        self.writer.clone().into()
    }

    fn commit<'py>(&self, py: Python<'py>) -> PyResult<Id<'py>> {
        let seal = interruptible(py, |interrupt| {
            self.slot.with(interrupt, |staged, interrupt| staged.commit_interruptible(interrupt))
        })?;
        Ok(id(py, seal))
    }

    fn discard(&self, py: Python<'_>) -> PyResult<()> {
        interruptible(py, |interrupt| self.slot.with(interrupt, |staged, _| staged.remove()))
    }
}

#[pyfunction]
pub(super) fn seal<'py>(
    py: Python<'py>,
    location: LocationArg,
    credentials: &Credentials,
    threads: Option<&Bound<'py, PyAny>>,
    durable: bool,
) -> PyResult<Id<'py>> {
    let options = location.options(credentials, threads)?.durable(durable);
    Ok(id(py, interruptible(py, |interrupt| options.seal_interruptible(location, interrupt))?))
}

/// Removes a snapshot; one that this process has just made, without a look at it.
#[pyfunction]
#[allow(clippy::needless_pass_by_value, reason = "the argument comes from Python")]
pub(super) fn remove(py: Python<'_>, location: LocationArg, own: bool) -> PyResult<()> {
    let store = location.store()?;
    interruptible(py, |interrupt| if own { store.remove(interrupt) } else { removal::checked(&store, interrupt) })
}

/// Returns the directories or URLs that were removed, and those that are still in use.
#[pyfunction]
pub(super) fn clean(
    py: Python<'_>,
    parent: LocationArg,
    older_than_seconds: f64,
) -> PyResult<(Vec<OsString>, Vec<OsString>)> {
    let age = Duration::try_from_secs_f64(older_than_seconds)
        .map_err(|_| Error::invalid_argument("older_than is not a valid time"))?;
    let options = parent.cleaning_options();
    let cleaned = interruptible(py, |interrupt| options.clean_interruptible(parent, age, interrupt))?;
    let texts = |paths: Vec<PathBuf>| paths.into_iter().map(PathBuf::into_os_string).collect();
    Ok((texts(cleaned.removed), texts(cleaned.held)))
}

/// Problems (path, kind, text), fragments that were not checked, kinds by fragment, verified bytes, and the seal.
type VerifyReport<'py> =
    (Vec<(String, String, String)>, Vec<String>, Vec<(String, Option<String>)>, u64, Option<Id<'py>>);

#[pyfunction]
pub(super) fn verify<'py>(
    py: Python<'py>,
    location: LocationArg,
    credentials: &Credentials,
    threads: Option<&Bound<'py, PyAny>>,
    expect_seal_digest: Option<&[u8]>,
) -> PyResult<VerifyReport<'py>> {
    let options = sealed_options(location.options(credentials, threads)?, false, expect_seal_digest)?;
    let report = interruptible(py, |interrupt| options.verify_interruptible(location, interrupt))?;
    let Verification { problems, not_checked, fragments, verified_bytes, seal } = report;
    let row = |Problem { path, kind, text }| (path, kind.to_string(), text);
    Ok((
        problems.into_iter().map(row).collect(),
        not_checked,
        fragments.into_iter().map(|(path, kind)| (path, kind.map(|kind| kind.to_string()))).collect(),
        verified_bytes,
        seal.map(|seal| id(py, seal)),
    ))
}
