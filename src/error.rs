//! The one error type of the crate.

use std::fmt;
use std::io;

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of vmsnap.
///
/// The `is_*` predicates tell its kind. The text names the snapshot, the fragment and the remedy, and
/// [`std::error::Error::source`] returns the cause. An error never contains a key or plaintext.
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
    /// Whether the same call may succeed later.
    is_transient: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// An error of the operating system; the source has the errno.
    Io,
    /// A name, a size or a key that is not allowed.
    InvalidArgument,
    /// A tag did not verify.
    Authentication,
    /// The snapshot is encrypted, and no key was given.
    KeyUnavailable,
    /// Encryption was required, and the snapshot is plain.
    NotEncrypted,
    /// A sealed snapshot was required, and this one has no manifest.
    NotSealed,
    /// The files on disk are not a valid snapshot.
    Corrupt,
    /// The format is newer than this version, or this version cannot unwrap such a key.
    Unsupported,
    /// A fragment or a snapshot that cannot be used in its current state.
    State,
    /// The snapshot is sealed already.
    Sealed,
    /// A value that serde cannot write or read in the format at hand.
    Serialization,
    /// A callback asked to stop.
    Interrupted,
    /// The cryptographic provider failed, for example for lack of randomness.
    Provider,
    /// There is not enough memory for a buffer.
    OutOfMemory,
}

impl Error {
    pub(crate) fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner { kind, message: message.into(), source: None, is_transient: false }))
    }

    pub(crate) fn with_source(
        kind: Kind,
        message: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self(Box::new(Inner { kind, message: message.into(), source: Some(source.into()), is_transient: false }))
    }

    /// An error of the operating system with its errno; `message` names the failed operation.
    pub(crate) fn io(message: impl Into<String>, source: impl Into<io::Error>) -> Self {
        let source = source.into();
        // std reports a buffer without an errno; the system's own error has one.
        let is_memory = source.kind() == io::ErrorKind::OutOfMemory && source.raw_os_error().is_none();
        Self::with_source(if is_memory { Kind::OutOfMemory } else { Kind::Io }, message, source)
    }

    /// An error of a network, or of a server beyond it, after all repetitions.
    #[cfg(feature = "object-store")]
    pub(crate) fn transient(message: impl Into<String>, source: impl Into<io::Error>) -> Self {
        let mut error = Self::io(message, source);
        error.0.is_transient = true;
        error
    }

    /// An error like this one, for another of several callers that wait for one result. Of the cause, the errno stays.
    #[cfg(feature = "object-store")]
    pub(crate) fn duplicate(&self) -> Self {
        let source = self.0.source.as_ref().map(|source| match self.raw_os_error() {
            Some(errno) => io::Error::from_raw_os_error(errno).into(),
            None => source.to_string().into(),
        });
        let (kind, message) = (self.0.kind, self.0.message.clone());
        Self(Box::new(Inner { kind, message, source, is_transient: self.0.is_transient }))
    }

    pub(crate) fn invalid_argument(message: impl Into<String>) -> Self {
        Self::new(Kind::InvalidArgument, message)
    }

    pub(crate) fn corrupt(message: impl Into<String>) -> Self {
        Self::new(Kind::Corrupt, message)
    }

    /// The error with which a callback stops a long call, for example [`crate::Fragment::write_all_interruptible`].
    #[must_use]
    pub fn interrupted() -> Self {
        Self::new(Kind::Interrupted, "interrupted by the caller")
    }

    /// Puts the place of the error before its text, unless the text begins with it already.
    #[must_use]
    pub(crate) fn context(mut self, place: impl fmt::Display) -> Self {
        let place = format!("{place}: ");
        if !self.0.message.starts_with(&place) {
            self.0.message.insert_str(0, &place);
        }
        self
    }

    /// The text without the place at its beginning, for a report that names the place itself.
    pub(crate) fn text_without(&self, place: impl fmt::Display) -> String {
        let text = self.to_string();
        text.strip_prefix(&format!("{place}: ")).map(str::to_owned).unwrap_or(text)
    }

    /// The operating system reported an error; [`Error::raw_os_error`] returns its number.
    #[must_use]
    pub fn is_io(&self) -> bool {
        self.0.kind == Kind::Io
    }

    /// A network or an object store failed, after several attempts: the same call may succeed later. Such an error is
    /// also [`Error::is_io`].
    #[must_use]
    pub fn is_transient(&self) -> bool {
        self.0.is_transient
    }

    /// A name, chunk size, key length or thread count is not allowed.
    #[must_use]
    pub fn is_invalid_argument(&self) -> bool {
        self.0.kind == Kind::InvalidArgument
    }

    /// A tag did not verify: the key is wrong, or the file is damaged, truncated, moved or from another snapshot.
    /// Cryptography cannot tell these cases apart.
    #[must_use]
    pub fn is_authentication(&self) -> bool {
        self.0.kind == Kind::Authentication
    }

    /// The snapshot is or must be encrypted, and no usable key was given.
    #[must_use]
    pub fn is_key_unavailable(&self) -> bool {
        self.0.kind == Kind::KeyUnavailable
    }

    /// An encrypted snapshot was required or a key was given, and the snapshot is plain.
    #[must_use]
    pub fn is_not_encrypted(&self) -> bool {
        self.0.kind == Kind::NotEncrypted
    }

    /// A sealed snapshot was required, and this one has no manifest.
    #[must_use]
    pub fn is_not_sealed(&self) -> bool {
        self.0.kind == Kind::NotSealed
    }

    /// The files on disk are not a valid snapshot: a link, a special file, an invalid header, a malformed value.
    #[must_use]
    pub fn is_corrupt(&self) -> bool {
        self.0.kind == Kind::Corrupt
    }

    /// The format is newer, a required feature is unknown, or this version cannot unwrap such a key.
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

    /// There is not enough memory: for a chunk, a block, a list of ranges, or the scrypt of a passphrase. As after any
    /// other error, nothing has changed, or the change was undone.
    #[must_use]
    pub fn is_out_of_memory(&self) -> bool {
        self.0.kind == Kind::OutOfMemory
    }

    /// The errno, if the operating system is the cause.
    #[must_use]
    pub fn raw_os_error(&self) -> Option<i32> {
        let error = self.0.source.as_ref()?.downcast_ref::<io::Error>()?;
        // An error of vmsnap may have come through a trait that returns io::Error.
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
        // The message of the operating system belongs to the text: "…: No space left on device (os error 28)".
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
