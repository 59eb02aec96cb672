//! The one error type of the crate.

use std::fmt;
use std::io;

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, and where.
///
/// The kind is asked for by the `is_*` predicates, the text names the snapshot, the fragment and the remedy, and
/// [`std::error::Error::source`] keeps the cause. No key and no plaintext is ever part of an error.
///
/// An `Error` converts into a [`std::io::Error`] (so that fragments are [`std::io::Read`] and [`std::io::Write`]) and
/// back without loss.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// let error = vmsnap::SnapshotReader::new(folder.path().join("absent"), false).unwrap_err();
/// assert!(error.is_io());
/// assert_eq!(error.raw_os_error(), Some(2)); // ENOENT
/// assert!(error.to_string().contains("absent"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Error(Box<Inner>);

struct Inner {
    kind: Kind,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The operating system refused; the errno is the source's.
    Io,
    /// A name, a size or a key that no snapshot can have.
    InvalidArgument,
    /// A tag did not verify.
    Authentication,
    /// Encrypted, and no key was given.
    KeyUnavailable,
    /// Encryption was asked for, and the snapshot is plain.
    NotEncrypted,
    /// A sealed snapshot was asked for, and this one has no manifest.
    NotSealed,
    /// What is on disk is not a snapshot's.
    Corrupt,
    /// Newer than this version, or wrapped in a way it does not open.
    Unsupported,
    /// A fragment or a snapshot that cannot be used in its current state.
    State,
    /// The snapshot is sealed already.
    Sealed,
    /// A value that serde cannot write or read in the format at hand.
    Serialization,
    /// A callback asked to stop.
    Interrupted,
    /// The cryptographic provider failed (no randomness, say).
    Provider,
    /// There is not enough memory for a buffer.
    OutOfMemory,
}

impl Error {
    pub(crate) fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner { kind, message: message.into(), source: None }))
    }

    pub(crate) fn with_source(
        kind: Kind,
        message: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self(Box::new(Inner { kind, message: message.into(), source: Some(source.into()) }))
    }

    /// An operating system's error with what was tried, errno kept.
    pub(crate) fn io(message: impl Into<String>, source: impl Into<io::Error>) -> Self {
        let source = source.into();
        // std's own, of a buffer: the system's has an errno.
        let is_memory = source.kind() == io::ErrorKind::OutOfMemory && source.raw_os_error().is_none();
        Self::with_source(if is_memory { Kind::OutOfMemory } else { Kind::Io }, message, source)
    }

    pub(crate) fn invalid_argument(message: impl Into<String>) -> Self {
        Self::new(Kind::InvalidArgument, message)
    }

    pub(crate) fn corrupt(message: impl Into<String>) -> Self {
        Self::new(Kind::Corrupt, message)
    }

    /// A long call that its caller asked to stop, from the callback of [`crate::Fragment::write_all_interruptible`] and its
    /// like.
    #[must_use]
    pub fn interrupted() -> Self {
        Self::new(Kind::Interrupted, "interrupted by the caller")
    }

    /// The same error, its text preceded by where it happened, unless it begins with that already.
    #[must_use]
    pub(crate) fn context(mut self, place: impl fmt::Display) -> Self {
        let place = format!("{place}: ");
        if !self.0.message.starts_with(&place) {
            self.0.message.insert_str(0, &place);
        }
        self
    }

    /// The text without the place that it begins with, for a report that names the place itself.
    pub(crate) fn text_without(&self, place: impl fmt::Display) -> String {
        let text = self.to_string();
        text.strip_prefix(&format!("{place}: ")).map(str::to_owned).unwrap_or(text)
    }

    /// An error of the operating system; [`Error::raw_os_error`] tells which.
    #[must_use]
    pub fn is_io(&self) -> bool {
        self.0.kind == Kind::Io
    }

    /// A name, chunk size, key length or thread count that is not allowed.
    #[must_use]
    pub fn is_invalid_argument(&self) -> bool {
        self.0.kind == Kind::InvalidArgument
    }

    /// A tag did not verify: the key is wrong, or the file is damaged, truncated, moved or another snapshot's. The two
    /// cannot be told apart by cryptography.
    #[must_use]
    pub fn is_authentication(&self) -> bool {
        self.0.kind == Kind::Authentication
    }

    /// The snapshot is (or is to be) encrypted and no key was given.
    #[must_use]
    pub fn is_key_unavailable(&self) -> bool {
        self.0.kind == Kind::KeyUnavailable
    }

    /// An encrypted snapshot was required, or a key given, and the snapshot is plain.
    #[must_use]
    pub fn is_not_encrypted(&self) -> bool {
        self.0.kind == Kind::NotEncrypted
    }

    /// A sealed snapshot was required, and this one has no manifest.
    #[must_use]
    pub fn is_not_sealed(&self) -> bool {
        self.0.kind == Kind::NotSealed
    }

    /// What is on disk cannot be a snapshot's: a link, a special file, a header that is not one, a value that does not
    /// parse.
    #[must_use]
    pub fn is_corrupt(&self) -> bool {
        self.0.kind == Kind::Corrupt
    }

    /// A newer format, an unknown requirement, or a key wrapped in a way this version does not open.
    #[must_use]
    pub fn is_unsupported_format(&self) -> bool {
        self.0.kind == Kind::Unsupported
    }

    /// The fragment or the snapshot cannot be used in its current state: an earlier write failed, a fragment is still
    /// being written or was never finished, or this is not the process that opened it.
    #[must_use]
    pub fn is_state(&self) -> bool {
        self.0.kind == Kind::State
    }

    /// The snapshot is sealed already: nothing can be added to it, and it cannot be sealed again.
    #[must_use]
    pub fn is_sealed(&self) -> bool {
        self.0.kind == Kind::Sealed
    }

    /// serde could not write or read the value.
    #[must_use]
    pub fn is_serialization(&self) -> bool {
        self.0.kind == Kind::Serialization
    }

    /// A callback asked to stop.
    #[must_use]
    pub fn is_interrupted(&self) -> bool {
        self.0.kind == Kind::Interrupted
    }

    /// There is not enough memory for what is asked: a chunk, a block, a list of ranges, a passphrase's scrypt. Nothing was
    /// changed, or it was undone, as after any other error.
    #[must_use]
    pub fn is_out_of_memory(&self) -> bool {
        self.0.kind == Kind::OutOfMemory
    }

    /// The errno, where the operating system was the cause.
    #[must_use]
    pub fn raw_os_error(&self) -> Option<i32> {
        let error = self.0.source.as_ref()?.downcast_ref::<io::Error>()?;
        // One of ours may have come through a trait that has io::Error.
        error.raw_os_error().or_else(|| error.get_ref()?.downcast_ref::<Self>()?.raw_os_error())
    }

    pub(crate) fn is_not_found(&self) -> bool {
        self.io_kind() == io::ErrorKind::NotFound
    }

    fn io_kind(&self) -> io::ErrorKind {
        match self.0.kind {
            Kind::Io => self
                .0
                .source
                .as_ref()
                .and_then(|source| source.downcast_ref::<io::Error>())
                .map_or(io::ErrorKind::Other, io::Error::kind),
            Kind::InvalidArgument => io::ErrorKind::InvalidInput,
            Kind::Authentication | Kind::Corrupt | Kind::Unsupported | Kind::Serialization => {
                io::ErrorKind::InvalidData
            }
            Kind::KeyUnavailable | Kind::NotEncrypted | Kind::NotSealed => io::ErrorKind::PermissionDenied,
            // Not io::ErrorKind::Interrupted: std's loops would try again, and a stop was asked for.
            Kind::State | Kind::Sealed | Kind::Interrupted | Kind::Provider => io::ErrorKind::Other,
            Kind::OutOfMemory => io::ErrorKind::OutOfMemory,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)?;
        // The operating system's words belong to the text: "…: No space left on device (os error 28)".
        match &self.0.source {
            Some(source) if matches!(self.0.kind, Kind::Io | Kind::Serialization | Kind::OutOfMemory) => {
                write!(f, ": {source}")
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Error").field("kind", &self.0.kind).field("message", &self.to_string()).finish()
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|source| source as &(dyn std::error::Error + 'static))
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        Self::new(error.io_kind(), error)
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        match error.downcast::<Self>() {
            Ok(own) => own,
            Err(other) => Self::io("input or output failed", other),
        }
    }
}
