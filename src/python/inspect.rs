//! `_vmsnap.inspect`, `_vmsnap.is_marked` and `_vmsnap.key_wrapping`: a snapshot without its key.

#![allow(clippy::needless_pass_by_value, reason = "the arguments come from Python")]

use std::ffi::OsString;
use std::time::SystemTime;

use pyo3::prelude::*;

use super::call::interruptible;
use super::location::LocationArg;
use crate::snapshot::{inspect_interruptible, key_metadata};
use crate::{InspectedFragment, Inspection, KeyWrapping};

/// The kind, the name of the key service, and the kinds of recipients.
type Wrapping = (&'static str, Option<String>, Vec<String>);

/// Path, stored size, time of modification where Python has such a date, and whether the fragment was finished.
type Row = (String, u64, Option<Py<PyAny>>, bool);

/// Location, key wrapping, whether the snapshot is sealed, paths of the namespaces, and the fragments.
type Fields = (OsString, Option<Wrapping>, bool, Vec<String>, Vec<Row>);

fn wrapping(wrapping: KeyWrapping) -> Wrapping {
    match wrapping {
        KeyWrapping::RawKey => ("raw-key", None, Vec::new()),
        KeyWrapping::Age { recipients } => ("age", None, recipients),
        KeyWrapping::Passphrase => ("passphrase", None, Vec::new()),
        KeyWrapping::KeyProvider { name } => ("key-provider", Some(name), Vec::new()),
    }
}

#[pyfunction]
pub(super) fn key_wrapping(py: Python<'_>, location: LocationArg) -> PyResult<Option<Wrapping>> {
    let store = location.store()?;
    Ok(interruptible(py, |interrupt| key_metadata::wrapping(&store, interrupt))?.map(wrapping))
}

/// Whether there is key metadata or a manifest, also where they cannot be read.
#[pyfunction]
pub(super) fn is_marked(py: Python<'_>, location: LocationArg) -> PyResult<bool> {
    let store = location.store()?;
    interruptible(py, |interrupt| match store.head(interrupt) {
        Ok(head) => Ok(!matches!(head.key_metadata, Ok(None)) || !matches!(head.manifest, Ok(None))),
        Err(error) if error.is_interrupted() => Err(error),
        Err(_) => Ok(true),
    })
}

#[pyfunction]
pub(super) fn inspect(py: Python<'_>, location: LocationArg) -> PyResult<Fields> {
    let Inspection { location, key_wrapping, sealed, namespaces, fragments } =
        interruptible(py, |interrupt| inspect_interruptible(&location, &location.remote, interrupt))?;
    let date = |time: SystemTime| time.into_pyobject(py).ok().map(|date| date.into_any().unbind());
    let row = |each: InspectedFragment| (each.path, each.stored_size_bytes, date(each.modified), each.finished);
    let fragments = fragments.into_iter().map(row).collect();
    Ok((location.into_os_string(), key_wrapping.map(wrapping), sealed, namespaces, fragments))
}
