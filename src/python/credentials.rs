//! `_vmsnap.Credentials`, `rekey`, identities, recipients, and files with secrets.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pyo3::exceptions::{PyException, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyBytes, PyString};
use zeroize::{Zeroize, Zeroizing};

use super::buffer;
use super::call::interruptible;
use super::location::LocationArg;
use crate::cipher::SecretKey;
use crate::error::{Error, Kind};
use crate::key::{self, RecipientsFile};
use crate::snapshot::SnapshotOptions;
use crate::snapshot::key_metadata;
use crate::{Identity, KeyProvider, Passphrase, ProviderError};

/// The keys and passphrases with which a snapshot is written or opened.
#[pyclass(frozen, module = "vmsnap._vmsnap")]
pub(super) struct Credentials(pub(super) SnapshotOptions);

/// The text or path of an identity, whether it is a path, and its passphrase.
type IdentityArguments<'py> = (Bound<'py, PyAny>, bool, Option<Bound<'py, PyAny>>);

#[pymethods]
impl Credentials {
    #[new]
    fn new(
        encrypt: bool,
        key: Option<&Bound<'_, PyAny>>,
        recipients: Option<Vec<String>>,
        identities: Option<Vec<IdentityArguments<'_>>>,
        passphrase: Option<&Bound<'_, PyAny>>,
        key_provider: Option<&Bound<'_, PyAny>>,
        on_new_identity: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        let mut options = SnapshotOptions::new().encrypt(encrypt);
        if let Some(callback) = on_new_identity {
            options = options.on_new_identity(move |path| {
                Python::attach(|py| callback.call1(py, (path,))).map(drop).map_err(|error| {
                    Error::with_source(Kind::KeyUnavailable, "the new identity could not be reported", Raised(error))
                })
            });
        }
        if let Some(key) = key {
            let key = buffer::Readable::get(key)?;
            key.bytes().in_batches(|_| Ok(()))?;
            options = options.key(SecretKey::from_slice(key.as_slice())?);
        }
        if let Some(recipients) = recipients {
            options = options.recipients(recipients);
        }
        if let Some(identities) = identities {
            options = options.identities(identities.into_iter().map(parse_identity).collect::<PyResult<Vec<_>>>()?);
        }
        if let Some(given) = passphrase {
            options = options.passphrase(asked_or_given(given)?);
        }
        if let Some(provider) = key_provider {
            options = options.key_provider(Arc::new(Provider::of(provider)?));
        }
        Ok(Self(options))
    }
}

fn parse_identity((source, is_path, given): IdentityArguments<'_>) -> PyResult<Identity> {
    let identity = if is_path {
        Identity::file(source.extract::<PathBuf>()?)
    } else {
        Identity::text(source.extract::<String>()?)
    };
    match given {
        Some(given) => Ok(identity.with_passphrase(asked_or_given(&given)?)),
        None => Ok(identity),
    }
}

/// Makes a passphrase from a str, bytes, a bytearray (which is cleared), or a callable that returns one of them.
fn asked_or_given(given: &Bound<'_, PyAny>) -> PyResult<Passphrase> {
    if !given.is_callable() {
        return Ok(Passphrase::from(text_of(given)?));
    }
    let ask = given.clone().unbind();
    Ok(Passphrase::ask_for(move || {
        Python::attach(|py| text_of(ask.bind(py).call0()?.as_any())).map(Zeroizing::new).map_err(|error| {
            Error::with_source(Kind::KeyUnavailable, "the callable for the passphrase failed", Raised(error))
        })
    }))
}

fn copied(bytes: &[u8]) -> crate::error::Result<Vec<u8>> {
    crate::buffer::collect(bytes.iter().copied())
}

fn text_of(given: &Bound<'_, PyAny>) -> PyResult<String> {
    // Python's own error would contain the passphrase.
    let not_utf8 = || PyErr::from(Error::invalid_argument("a passphrase must be UTF-8"));
    if let Ok(text) = given.cast::<PyString>() {
        return text.extract().map_err(|_| not_utf8());
    }
    if !given.is_instance_of::<PyBytes>() && !given.is_instance_of::<PyByteArray>() {
        let kind = given.get_type().name()?;
        return Err(PyTypeError::new_err(format!("a passphrase must be str, bytes or bytearray, not {kind}")));
    }
    let bytes = copied(buffer::Readable::get(given)?.as_slice())?;
    if given.is_instance_of::<PyByteArray>() {
        buffer::Writable::get(given)?.as_mut_slice().fill(0);
    }
    String::from_utf8(bytes).map_err(|error| {
        error.into_bytes().zeroize();
        not_utf8()
    })
}

/// An exception that code of the caller raised, which is raised again unchanged.
#[derive(Debug)]
pub(super) struct Raised(pub(super) PyErr);

impl std::fmt::Display for Raised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for Raised {}

/// A key service whose methods are in Python.
struct Provider {
    object: Py<PyAny>,
    name: String,
    timeout: Duration,
}

impl Provider {
    fn of(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        for method in ["wrap", "unwrap"] {
            if !object.getattr(method).is_ok_and(|method| method.is_callable()) {
                return Err(PyTypeError::new_err(format!(
                    "this is not a key provider: it does not have a method {method}"
                )));
            }
        }
        let name = object.getattr("name").and_then(|name| name.extract());
        let name =
            name.map_err(|_| PyTypeError::new_err("this is not a key provider: its attribute name must be a str"))?;
        let timeout = object.getattr_opt("timeout_seconds")?.map(|seconds| seconds.extract::<f64>()).transpose()?;
        let timeout = Duration::try_from_secs_f64(timeout.unwrap_or(60.0)).map_err(|_| {
            Error::invalid_argument("timeout_seconds of the key provider is not a valid number of seconds")
        })?;
        Ok(Self { object: object.clone().unbind(), name, timeout })
    }

    fn call(&self, method: &str, argument: &[u8]) -> std::result::Result<Vec<u8>, ProviderError> {
        Python::attach(|py| {
            let returned = self.object.bind(py).call_method1(method, (PyBytes::new(py, argument),))?;
            if returned.is_instance_of::<PyString>() || buffer::Readable::get(&returned).is_err() {
                let kind = returned.get_type().name()?;
                return Err(PyTypeError::new_err(format!("{method} returned {kind} instead of bytes")));
            }
            Ok(copied(buffer::Readable::get(&returned)?.as_slice())?)
        })
        .map_err(|error: PyErr| Box::new(error) as ProviderError)
    }
}

impl KeyProvider for Provider {
    fn name(&self) -> &str {
        &self.name
    }

    fn wrap(&self, payload: &[u8]) -> std::result::Result<Vec<u8>, ProviderError> {
        self.call("wrap", payload)
    }

    fn unwrap(&self, wrapped: &[u8]) -> std::result::Result<Vec<u8>, ProviderError> {
        self.call("unwrap", wrapped)
    }

    fn timeout(&self) -> Duration {
        self.timeout
    }
}

/// Returns the exception of the caller's code that caused an error, and true if it must be raised itself.
pub(super) fn raised(py: Python<'_>, error: &Error) -> Option<(PyErr, bool)> {
    let source = std::error::Error::source(error)?;
    if let Some(Raised(raised)) = source.downcast_ref::<Raised>() {
        return Some((raised.clone_ref(py), true));
    }
    let raised = source.downcast_ref::<PyErr>()?.clone_ref(py);
    // KeyboardInterrupt and similar exceptions do not mean that the key service failed.
    let passed_on = !raised.is_instance_of::<PyException>(py);
    Some((raised, passed_on))
}

/// Wraps the data key of a snapshot again, with other keys.
#[pyfunction]
#[allow(clippy::needless_pass_by_value, reason = "the arguments come from Python")]
pub(super) fn rekey(py: Python<'_>, location: LocationArg, old: &Credentials, new: &Credentials) -> PyResult<()> {
    let old = location.options(old, None)?;
    interruptible(py, |interrupt| key_metadata::rekey_interruptible(&location, &old, &new.0, interrupt))
}

/// Returns a new identity and its recipient.
#[pyfunction]
pub(super) fn generate_identity() -> PyResult<(String, String)> {
    let (identity, recipient) = crate::generate_identity()?;
    Ok((identity.as_str().to_owned(), recipient))
}

/// Returns the contents of a file for an identity and its recipient.
#[pyfunction]
pub(super) fn identity_file(identity: &str, recipient: &str) -> String {
    crate::identity_file(identity, recipient).as_str().to_owned()
}

#[pyfunction]
pub(super) fn recipients_of(py: Python<'_>, identity: IdentityArguments<'_>) -> PyResult<Vec<String>> {
    let identity = parse_identity(identity)?;
    interruptible(py, |interrupt| key::recipients_of_interruptible(&identity, interrupt))
}

/// Returns the recipients in a file, and the lines that deserve a warning.
#[pyfunction]
pub(super) fn read_recipients(py: Python<'_>, path: PathBuf) -> PyResult<(Vec<String>, Vec<String>)> {
    let file = interruptible(py, |interrupt| RecipientsFile::read(path, interrupt))?;
    Ok((file.recipients, file.ignored))
}

/// Returns the contents of a file with a secret as a bytearray, which can be cleared.
#[pyfunction]
pub(super) fn read_secret_file(py: Python<'_>, path: PathBuf) -> PyResult<Bound<'_, PyByteArray>> {
    let content = interruptible(py, |interrupt| key::read_secret_file(path, interrupt))?;
    Ok(PyByteArray::new(py, &content))
}
