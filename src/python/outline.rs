//! `_vmsnap.key_wrapping` and `_vmsnap.outline`: what shows without a key.

use std::path::PathBuf;
use std::time::SystemTime;

use pyo3::prelude::*;

use crate::{KeyWrapping, Outline, OutlinedFragment};

#[pyfunction]
pub(super) fn key_wrapping(root: PathBuf) -> PyResult<Option<Wrapping>> {
    Ok(crate::key_wrapping(root)?.map(|wrapping| match wrapping {
        KeyWrapping::RawKey => ("raw-key", Vec::new()),
        KeyWrapping::Age { recipients } => ("age", recipients),
        KeyWrapping::Passphrase => ("passphrase", Vec::new()),
        KeyWrapping::KeyProvider { name } => ("key-provider", vec![name]),
    }))
}

/// The kind, and whom it is for.
type Wrapping = (&'static str, Vec<String>);

/// Path, stored size, and time of modification where Python has such a date.
type Row = (String, u64, Option<Py<PyAny>>);

/// Paths of the namespaces, and the fragments.
#[pyfunction]
pub(super) fn outline(py: Python<'_>, root: PathBuf) -> PyResult<(Vec<String>, Vec<Row>)> {
    let Outline { namespaces, fragments } = py.detach(|| Outline::read(root))?;
    let date = |time: SystemTime| time.into_pyobject(py).ok().map(|date| date.into_any().unbind());
    let row = |each: OutlinedFragment| (each.path, each.stored_size_bytes, date(each.modified));
    Ok((namespaces, fragments.into_iter().map(row).collect()))
}
