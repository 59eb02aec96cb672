//! The URL of a snapshot in an object store.

use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The kind of an object store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Scheme {
    /// Amazon S3, and everything with its interface.
    S3,
    /// Google Cloud Storage.
    Gs,
    /// Azure Blob Storage.
    Az,
    /// The memory of this process, for tests.
    Memory,
}

impl Scheme {
    fn name(self) -> &'static str {
        match self {
            Self::S3 => "s3",
            Self::Gs => "gs",
            Self::Az => "az",
            Self::Memory => "memory",
        }
    }

    fn of(name: &str) -> Option<Self> {
        [Self::S3, Self::Gs, Self::Az, Self::Memory].into_iter().find(|scheme| scheme.name() == name)
    }
}

/// A prefix in a bucket: `s3://bucket/prefix`. The objects of the snapshot are below it.
///
/// It contains no secret: a URL with user information, a query or a fragment is refused. Names are literal, so `%20` is
/// three characters, as for the clients of the clouds.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct StoreUrl {
    scheme: Scheme,
    /// The whole URL, of which the bucket and the prefix are parts.
    text: String,
    bucket_len: usize,
}

#[cfg_attr(not(feature = "object-store"), allow(dead_code, reason = "only the client of a store takes it apart"))]
impl StoreUrl {
    /// Parses a scheme, in lower case, and the text after `://`.
    pub(super) fn parse(scheme: &str, rest: &[u8]) -> Result<Self> {
        let Some(scheme) = Scheme::of(scheme) else {
            return Err(Error::invalid_argument(format!(
                "{scheme}:// is not a scheme of a snapshot: use s3://, gs://, az:// or file://, or write a path that \
                 contains '://' with './' before it"
            )));
        };
        let name = scheme.name();
        let refuse = |reason: &str| Err(Error::invalid_argument(format!("the {name} URL cannot be used: {reason}")));
        let Ok(rest) = std::str::from_utf8(rest) else { return refuse("it is not UTF-8") };
        // None of these texts is repeated, because it may be a secret.
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.contains('@') {
            return refuse("it contains user information; pass credentials in the environment or as storage options");
        }
        if rest.contains(['?', '#']) {
            return refuse("it contains a query or a fragment; pass options as storage options");
        }
        if bucket.contains(':') {
            return refuse("it contains a port; pass the address of a server as the storage option 'endpoint'");
        }
        if bucket.is_empty() && scheme != Scheme::Memory {
            return refuse("it does not name a bucket");
        }
        if rest.contains(char::is_control) {
            return refuse("it contains a control character");
        }
        let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
        if prefix.is_empty() {
            return refuse("a snapshot needs a prefix in the bucket, such as /vm1");
        }
        match prefix.split('/').find(|segment| matches!(*segment, "" | "." | "..")) {
            Some("") => return refuse("its path contains an empty name ('//')"),
            Some(dots) => return refuse(&format!("its path contains '{dots}'")),
            None => {}
        }
        Ok(Self { scheme, text: format!("{name}://{bucket}/{prefix}"), bucket_len: bucket.len() })
    }

    fn bucket_start(&self) -> usize {
        self.scheme.name().len() + "://".len()
    }

    pub(crate) fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// The name of the bucket; in Azure, of the container.
    pub(crate) fn bucket(&self) -> &str {
        &self.text[self.bucket_start()..][..self.bucket_len]
    }

    /// The prefix of all objects of the snapshot, without a `/` at its end.
    pub(crate) fn prefix(&self) -> &str {
        &self.text[self.bucket_start() + self.bucket_len + 1..]
    }

    /// The text as a path, for callers that name locations by paths. It names the same location again.
    pub(crate) fn path(&self) -> &Path {
        Path::new(&self.text)
    }
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.text.fmt(f)
    }
}

impl From<StoreUrl> for String {
    fn from(url: StoreUrl) -> Self {
        url.text
    }
}

impl TryFrom<String> for StoreUrl {
    type Error = Error;

    /// Parses the URL of a serialized handle.
    fn try_from(text: String) -> Result<Self> {
        match split_scheme(Path::new(&text)) {
            Some((scheme, rest)) => Self::parse(scheme, rest),
            None => Err(Error::invalid_argument("the URL of a snapshot has no scheme")),
        }
    }
}

/// Splits `scheme://rest` at the beginning of a location; the scheme is in lower case.
pub(super) fn split_scheme(named: &Path) -> Option<(&'static str, &[u8])> {
    const KNOWN: [&str; 9] = ["s3", "gs", "az", "memory", "file", "http", "https", "s3a", "abfss"];
    let bytes = named.as_os_str().as_bytes();
    let end = bytes.windows(3).take(8).position(|window| window == b"://")?;
    let scheme = std::str::from_utf8(&bytes[..end]).ok()?.to_ascii_lowercase();
    let known = KNOWN.into_iter().find(|known| **known == *scheme)?;
    Some((known, &bytes[end + 3..]))
}

/// The path in a `file` URL, after `file://`. It is percent-encoded.
pub(super) fn file_path(rest: &[u8]) -> Result<PathBuf> {
    let refuse = |reason: &str| Err(Error::invalid_argument(format!("the file URL cannot be used: {reason}")));
    let rest = rest.strip_prefix(b"localhost").unwrap_or(rest);
    if !rest.starts_with(b"/") {
        return refuse("it names a host; write file:/// and an absolute path");
    }
    if rest.contains(&b'?') || rest.contains(&b'#') {
        return refuse("it contains a query or a fragment; write %3F for '?', and %23 for '#'");
    }
    let mut path = Vec::with_capacity(rest.len());
    let mut bytes = rest.iter();
    while let Some(&byte) = bytes.next() {
        if byte != b'%' {
            path.push(byte);
            continue;
        }
        let mut digit = || bytes.next().and_then(|digit| char::from(*digit).to_digit(16));
        match (digit(), digit()) {
            (Some(high), Some(low)) => path.extend(u8::try_from(high * 16 + low)),
            _ => return refuse("'%' must be followed by two hexadecimal digits; write %25 for '%'"),
        }
    }
    Ok(std::ffi::OsString::from_vec(path).into())
}
