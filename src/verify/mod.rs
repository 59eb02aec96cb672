//! Verification: reads a whole snapshot and compares it with its manifest.

mod contents;
mod tree;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::fragment::folder;
use crate::key::KeyPayload;
use crate::key_metadata;
use crate::name::{KEY_METADATA, MANIFEST};
use crate::open_manifest::{self, OpenManifest};
use crate::options::SnapshotOptions;
use crate::staging::SealId;
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
        let location = folder::absolute(location.as_ref())?;
        drop(folder::open(&location, "")?);
        let mut verifier = Verifier { root: location, report: Verification::default(), found: BTreeMap::new() };
        let key = verifier.key(self, interrupt)?;
        let manifest = verifier.manifest(self, &key)?;
        let namespaces = verifier.walk(interrupt)?;
        if let Some(open_manifest) = &manifest {
            verifier.compare(open_manifest, &namespaces);
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

struct Verifier {
    root: PathBuf,
    report: Verification,
    /// The fragments on disk, with the sizes of their files.
    found: BTreeMap<String, u64>,
}

impl Verifier {
    fn problem(&mut self, path: &str, kind: ProblemKind, text: impl Into<String>) {
        self.report.problems.push(Problem { path: path.to_owned(), kind, text: text.into() });
    }

    /// Adds a problem of one of vmsnap's own files.
    fn problem_of(&mut self, name: &str, kind: ProblemKind, error: &Error) {
        let text = error.text_without(format!("{name} of {}", self.root.display()));
        self.problem(name, kind, text);
    }

    fn key(&mut self, options: &SnapshotOptions, interrupt: &mut dyn FnMut() -> Result<()>) -> Result<Key> {
        match key_metadata::unlock(&self.root, options, interrupt) {
            Ok(None) => Ok(Key::Plain),
            Ok(Some(payload)) => Ok(Key::Held(payload)),
            Err(error) if error.is_key_unavailable() => {
                self.report.not_checked.push(format!("{WITHOUT_KEY}: {error}"));
                Ok(Key::Lacking)
            }
            Err(error) if error.is_authentication() || error.is_corrupt() || error.is_unsupported_format() => {
                let kind =
                    if error.is_authentication() { ProblemKind::NotAuthentic } else { ProblemKind::BadKeyMetadata };
                self.problem_of(KEY_METADATA, kind, &error);
                self.report.not_checked.push(WITHOUT_KEY.to_owned());
                Ok(Key::Lacking)
            }
            // An identity file that cannot be read is an error of the caller instead.
            Err(error) if error.is_io() && key_metadata::read(&self.root).is_err() => {
                self.problem_of(KEY_METADATA, ProblemKind::Unreadable, &error);
                self.report.not_checked.push(WITHOUT_KEY.to_owned());
                Ok(Key::Lacking)
            }
            Err(error) => Err(error),
        }
    }

    fn has_no_manifest(&self) -> bool {
        let exists = folder::open(&self.root, "").and_then(|opened| folder::exists(&opened, MANIFEST));
        matches!(exists, Ok(false))
    }

    fn manifest(&mut self, options: &SnapshotOptions, key: &Key) -> Result<Option<OpenManifest>> {
        if matches!(key, Key::Lacking) {
            if self.has_no_manifest() {
                self.problem(MANIFEST, ProblemKind::NotSealed, open_manifest::unsealed(&self.root).to_string());
            }
            return Ok(None);
        }
        let open_manifest = match OpenManifest::read(&self.root, key.payload()) {
            Ok(Some(open_manifest)) => open_manifest,
            Ok(None) => {
                self.problem(MANIFEST, ProblemKind::NotSealed, open_manifest::unsealed(&self.root).to_string());
                return Ok(None);
            }
            Err(error) if error.is_out_of_memory() => return Err(error),
            Err(error) => {
                let absent = self.has_no_manifest();
                let kind = match absent {
                    true => ProblemKind::Missing,
                    false if error.is_authentication() => ProblemKind::NotAuthentic,
                    false if error.is_io() => ProblemKind::Unreadable,
                    false => ProblemKind::BadManifest,
                };
                self.problem_of(MANIFEST, kind, &error);
                return Ok(None);
            }
        };
        if options.seal_digest.is_some_and(|expected| expected != *open_manifest.digest()) {
            self.problem(MANIFEST, ProblemKind::BadManifest, open_manifest::another(&self.root).to_string());
        }
        Ok(Some(open_manifest))
    }

    fn finish(mut self) -> Verification {
        self.report.problems.sort_by(|one, other| (&one.path, one.kind).cmp(&(&other.path, other.kind)));
        self.report
    }
}
