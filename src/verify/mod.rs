//! Verification: reads a whole snapshot and compares it with its manifest.

mod compare;
mod contents;

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use crate::error::{Error, Result};
use crate::key::KeyPayload;
use crate::location::Location;
use crate::manifest::{Manifest, SealId};
use crate::name::{KEY_METADATA, MANIFEST};
use crate::snapshot::{SnapshotOptions, key_metadata, open_manifest};
use crate::store::{Head, Store};
use crate::threads;

/// The result of [`SnapshotOptions::verify`].
#[derive(Clone, Debug, Default)]
pub struct Verification {
    /// All problems, sorted by path.
    pub problems: Vec<Problem>,
    /// The checks that were not possible, with the reason: for example, because the key is missing.
    pub not_checked: Vec<String>,
    /// All fragments that exist or should exist, by path, each with its problem.
    pub fragments: BTreeMap<String, Option<ProblemKind>>,
    /// The number of plaintext bytes that were read and verified.
    pub verified_bytes: u64,
    /// The id and seal digest of the snapshot, if its manifest could be read.
    pub seal: Option<SealId>,
}

/// A problem that verification found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The path in the snapshot. Bytes that are not UTF-8 are replaced by U+FFFD.
    pub path: String,
    /// The kind of problem.
    pub kind: ProblemKind,
    /// A description of the problem.
    pub text: String,
}

/// The kind of a problem that verification found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum ProblemKind {
    /// The manifest lists it, but it does not exist.
    Missing,
    /// It exists, but the manifest does not list it.
    Extra,
    /// Its contents have changed.
    Changed,
    /// It is shorter than it was.
    Truncated,
    /// It is another fragment of the same snapshot.
    Swapped,
    /// A tag does not verify.
    NotAuthentic,
    /// It is longer than it was.
    WrongSize,
    /// The manifest cannot be read, or has another digest than the expected one.
    BadManifest,
    /// There is no manifest.
    NotSealed,
    /// `enc_metadata` cannot be read.
    BadKeyMetadata,
    /// A symbolic link.
    Link,
    /// A FIFO, a socket or a device.
    SpecialFile,
    /// A name that is not UTF-8.
    NotUtf8,
    /// The operating system reports an error when it is read.
    Unreadable,
}

impl fmt::Display for ProblemKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Missing => "missing",
            Self::Extra => "extra",
            Self::Changed => "changed",
            Self::Truncated => "truncated",
            Self::Swapped => "swapped",
            Self::NotAuthentic => "not authentic",
            Self::WrongSize => "wrong size",
            Self::BadManifest => "bad manifest",
            Self::NotSealed => "not sealed",
            Self::BadKeyMetadata => "bad key metadata",
            Self::Link => "link",
            Self::SpecialFile => "special file",
            Self::NotUtf8 => "not UTF-8",
            Self::Unreadable => "unreadable",
        })
    }
}

impl Verification {
    /// Whether everything was checked and no problem was found.
    #[must_use]
    pub fn is_ok(&self) -> bool {
        self.problems.is_empty() && self.not_checked.is_empty()
    }
}

impl SnapshotOptions {
    /// Reads the whole snapshot at `location` with all threads and reports every difference from the sealed state. Without
    /// the key of an encrypted snapshot it checks less, and lists the skipped checks.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("vm1");
    /// let options = vmsnap::SnapshotOptions::new();
    /// let mut staged = options.create(&path)?;
    /// staged.writer().write_fragment("clock", &12_u64)?;
    /// staged.commit()?;
    /// assert!(options.verify(&path)?.is_ok());
    /// std::fs::write(path.join("clock"), "x")?;
    /// let report = options.verify(&path)?;
    /// assert_eq!(report.problems[0].kind, vmsnap::ProblemKind::Changed);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`crate::Error::is_io`] if the directory does not exist; [`crate::Error::is_invalid_argument`] and
    /// [`crate::Error::is_not_encrypted`] like [`SnapshotOptions::open`]. Problems of the snapshot are not errors but
    /// part of the report.
    pub fn verify(&self, location: impl AsRef<Path>) -> Result<Verification> {
        self.verify_interruptible(location, &mut || Ok(()))
    }

    pub(crate) fn verify_interruptible(
        &self,
        location: impl AsRef<Path>,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Verification> {
        let threads = threads::resolve(self.threads)?;
        let store = Store::at(Location::new(location.as_ref())?, &self.remote)?.uncached()?;
        let head = store.head(interrupt);
        let mut verifier = Verifier { store, report: Verification::default(), found: BTreeMap::new() };
        let Head { key_metadata, manifest } = match head {
            // The beginning of an archive is damaged, and with it the way to everything else.
            Err(error) if error.is_corrupt() => {
                verifier.problem_of(MANIFEST, ProblemKind::BadManifest, &error);
                verifier.report.not_checked.push("everything behind the beginning of the archive".to_owned());
                return Ok(verifier.finish());
            }
            head => head?,
        };
        let key = verifier.key(key_metadata, self, interrupt)?;
        let manifest = verifier.manifest(manifest, self, &key)?;
        let namespaces = verifier.survey(manifest.as_ref(), interrupt)?;
        if let Some(manifest) = &manifest {
            verifier.compare(manifest, &namespaces);
        }
        verifier.read_all(&key, manifest.as_ref(), threads, interrupt)?;
        Ok(verifier.finish())
    }
}

const WITHOUT_KEY: &str = "the list of fragments and their contents, without the key";

/// The key of the snapshot, as far as it is known.
enum Key {
    Plain,
    Held(KeyPayload),
    Lacking,
}

impl Key {
    fn payload(&self) -> Option<&KeyPayload> {
        match self {
            Self::Held(payload) => Some(payload),
            Self::Plain | Self::Lacking => None,
        }
    }
}

/// The manifest, with the seal digest.
struct SealedManifest {
    manifest: Manifest,
    digest: [u8; 32],
}

struct Verifier {
    store: Store,
    report: Verification,
    /// The stored fragments, with their sizes.
    found: BTreeMap<String, u64>,
}

impl Verifier {
    fn problem(&mut self, path: &str, kind: ProblemKind, text: impl Into<String>) {
        self.report.problems.push(Problem { path: path.to_owned(), kind, text: text.into() });
    }

    /// Adds a problem of one of vmsnap's own files.
    fn problem_of(&mut self, name: &str, kind: ProblemKind, error: &Error) {
        let text = error.text_without(format!("{name} of {}", self.store.location()));
        self.problem(name, kind, text);
    }

    fn key(
        &mut self,
        key_metadata: Result<Option<Vec<u8>>>,
        options: &SnapshotOptions,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Key> {
        options.credentials.unwrapper()?;
        let wrapped = match key_metadata {
            Ok(wrapped) => wrapped,
            Err(error) if error.is_io() => {
                self.problem_of(KEY_METADATA, ProblemKind::Unreadable, &error);
                self.report.not_checked.push(WITHOUT_KEY.to_owned());
                return Ok(Key::Lacking);
            }
            Err(error) => return Ok(self.bad_key(&error)),
        };
        match key_metadata::unlock(self.store.location(), wrapped, options, interrupt) {
            Ok(None) => Ok(Key::Plain),
            Ok(Some(payload)) => Ok(Key::Held(payload)),
            Err(error) if error.is_key_unavailable() => {
                self.report.not_checked.push(format!("{WITHOUT_KEY}: {error}"));
                Ok(Key::Lacking)
            }
            Err(error) if error.is_authentication() || error.is_corrupt() || error.is_unsupported_format() => {
                Ok(self.bad_key(&error))
            }
            Err(error) => Err(error),
        }
    }

    fn bad_key(&mut self, error: &Error) -> Key {
        let kind = if error.is_authentication() { ProblemKind::NotAuthentic } else { ProblemKind::BadKeyMetadata };
        self.problem_of(KEY_METADATA, kind, error);
        self.report.not_checked.push(WITHOUT_KEY.to_owned());
        Key::Lacking
    }

    fn not_sealed(&mut self) {
        self.problem(MANIFEST, ProblemKind::NotSealed, open_manifest::unsealed(self.store.location()).to_string());
    }

    /// Decodes the manifest; returns it with its digest.
    fn manifest(
        &mut self,
        stored: Result<Option<Vec<u8>>>,
        options: &SnapshotOptions,
        key: &Key,
    ) -> Result<Option<SealedManifest>> {
        let is_absent = matches!(stored, Ok(None));
        if matches!(key, Key::Lacking) {
            if is_absent {
                self.not_sealed();
            }
            return Ok(None);
        }
        let location = self.store.location();
        match stored.and_then(|stored| open_manifest::decode(location, stored, key.payload())) {
            Ok(Some((manifest, digest))) => {
                if options.seal_digest.is_some_and(|expected| expected != digest) {
                    let text = open_manifest::another(location).to_string();
                    self.problem(MANIFEST, ProblemKind::BadManifest, text);
                }
                Ok(Some(SealedManifest { manifest, digest }))
            }
            Ok(None) => {
                self.not_sealed();
                Ok(None)
            }
            Err(error) if error.is_out_of_memory() => Err(error),
            Err(error) => {
                let kind = match is_absent {
                    true => ProblemKind::Missing,
                    false if error.is_authentication() => ProblemKind::NotAuthentic,
                    false if error.is_io() => ProblemKind::Unreadable,
                    false => ProblemKind::BadManifest,
                };
                self.problem_of(MANIFEST, kind, &error);
                Ok(None)
            }
        }
    }

    fn finish(mut self) -> Verification {
        self.report.problems.sort_by(|one, other| (&one.path, one.kind).cmp(&(&other.path, other.kind)));
        self.report
    }
}
