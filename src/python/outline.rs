//! `_vmsnap.key_wrapping` and `_vmsnap.outline`: information that does not require a key.

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

/// The kind of wrapping, and its recipients or the name of its key provider.
type Wrapping = (&'static str, Vec<String>);

/// Path, stored size, and time of modification, if Python can express it.
type Row = (String, u64, Option<Py<PyAny>>);

/// Returns the paths of the namespaces, and the fragments.
#[pyfunction]
pub(super) fn outline(py: Python<'_>, root: PathBuf) -> PyResult<(Vec<String>, Vec<Row>)> {
    let Outline { namespaces, fragments } = py.detach(|| Outline::read(root))?;
    let date = |time: SystemTime| time.into_pyobject(py).ok().map(|date| date.into_any().unbind());
    let row = |each: OutlinedFragment| (each.path, each.stored_size_bytes, date(each.modified));
    Ok((namespaces, fragments.into_iter().map(row).collect()))
}
