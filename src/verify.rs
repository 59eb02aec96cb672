//! Reading everything, to find out whether a snapshot is what was sealed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rustix::fs::FileType;

use crate::cipher::{HEADER_BYTES, SecretKey, check_declared_chunk_size, header_tag};
use crate::error::{Error, Result};
use crate::fragment::digest::Digest;
use crate::fragment::{FragmentReader, folder};
use crate::key::KeyPayload;
use crate::key_metadata;
use crate::manifest::{Entry, Manifest, Proof};
use crate::name::{self, KEY_METADATA, MANIFEST, SnapshotPath};
use crate::options::SnapshotOptions;
use crate::seal::{self, Seal};
use crate::staging::SealId;
use crate::threads::{self, Poll, for_each, lock};

/// Fragments up to this size are read by one thread each, larger ones by all together.
const SMALL_BYTES: u64 = 4 << 20;
/// What is read of a larger one at a time.
const PIECE_BYTES: usize = 8 << 20;

/// What [`SnapshotOptions::verify`] found.
#[derive(Clone, Debug, Default)]
pub struct Verification {
    /// Everything that is not as it should be, sorted by path.
    pub problems: Vec<Problem>,
    /// What could not be looked at, and why: without the key, say.
    pub not_checked: Vec<String>,
    /// All fragments there are or should be, by path, with what is wrong with each.
    pub fragments: BTreeMap<String, Option<ProblemKind>>,
    /// Plaintext bytes that were read and verified.
    pub verified_bytes: u64,
    /// What to pin the snapshot by, where its manifest could be read.
    pub seal: Option<SealId>,
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// From the root; what is not UTF-8 in it is shown as U+FFFD.
    pub path: String,
    /// What is wrong.
    pub kind: ProblemKind,
    /// The same in words.
    pub text: String,
}

/// What can be wrong with a part of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum ProblemKind {
    /// The manifest lists it, and it is not there.
    Missing,
    /// It is there, and the manifest does not list it.
    Extra,
    /// Its content is another one.
    Changed,
    /// It is shorter than it was.
    Truncated,
    /// It is another fragment of the same snapshot.
    Swapped,
    /// A tag does not verify.
    NotAuthentic,
    /// It is longer than it was.
    WrongSize,
    /// The manifest cannot be read, or is not the one expected.
    BadManifest,
    /// There is no manifest.
    NotSealed,
    /// `enc_metadata` cannot be read.
    BadKeyMetadata,
    /// A symbolic link.
    Link,
    /// A FIFO, a socket, a device.
    SpecialFile,
    /// A name that is not UTF-8.
    NotUtf8,
    /// The operating system does not let it be read.
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
    /// Whether everything was checked, and is as it was sealed.
    #[must_use]
    pub fn is_ok(&self) -> bool {
        self.problems.is_empty() && self.not_checked.is_empty()
    }
}

impl SnapshotOptions {
    /// Reads all of the snapshot at `root`, by all threads, and tells everything that is not as it was sealed. Without the key
    /// of an encrypted one, it checks what can be checked and says what it could not.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("vm1");
    /// let options = vmsnap::SnapshotOptions::new();
    /// let mut staged = options.stage(&path)?;
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
    /// [`Error::is_io`] where there is no such folder; [`Error::is_invalid_argument`] and [`Error::is_not_encrypted`] as
    /// [`SnapshotOptions::open`]. What is wrong with the snapshot is in the report.
    pub fn verify(&self, root: impl AsRef<Path>) -> Result<Verification> {
        self.verify_polled(root, &mut || Ok(()))
    }

    pub(crate) fn verify_polled(
        &self,
        root: impl AsRef<Path>,
        poll: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Verification> {
        let threads = threads::resolve(self.threads)?;
        let root = folder::absolute(root.as_ref())?;
        drop(folder::open(&root, "")?);
        let mut verifier = Verifier { root, report: Verification::default(), found: BTreeMap::new() };
        let key = verifier.key(self, poll)?;
        let manifest = verifier.manifest(self, &key);
        let namespaces = verifier.walk(poll)?;
        if let Some(seal) = &manifest {
            verifier.compare(seal, &namespaces);
        }
        verifier.read_all(&key, manifest.as_ref(), threads, poll)?;
        Ok(verifier.finish())
    }
}

/// What is known of the key.
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
    /// Fragments on the disk, and the bytes of their files.
    found: BTreeMap<String, u64>,
}

impl Verifier {
    fn problem(&mut self, path: &str, kind: ProblemKind, text: impl Into<String>) {
        self.report.problems.push(Problem { path: path.to_owned(), kind, text: text.into() });
    }

    fn key(&mut self, options: &SnapshotOptions, poll: &mut dyn FnMut() -> Result<()>) -> Result<Key> {
        match key_metadata::unlock(&self.root, options, poll) {
            Ok(None) => Ok(Key::Plain),
            Ok(Some(payload)) => Ok(Key::Held(payload)),
            Err(error) if error.is_key_unavailable() => {
                self.report
                    .not_checked
                    .push(format!("the list of fragments and their contents, without the key: {error}"));
                Ok(Key::Lacking)
            }
            Err(error) if error.is_authentication() || error.is_corrupt() || error.is_unsupported_format() => {
                let kind =
                    if error.is_authentication() { ProblemKind::NotAuthentic } else { ProblemKind::BadKeyMetadata };
                self.problem(KEY_METADATA, kind, error.to_string());
                self.report.not_checked.push("the list of fragments and their contents, without the key".to_owned());
                Ok(Key::Lacking)
            }
            Err(error) => Err(error),
        }
    }

    fn has_no_manifest(&self) -> bool {
        let exists = folder::open(&self.root, "").and_then(|opened| folder::exists(&opened, MANIFEST));
        matches!(exists, Ok(false))
    }

    fn manifest(&mut self, options: &SnapshotOptions, key: &Key) -> Option<Seal> {
        if matches!(key, Key::Lacking) {
            if self.has_no_manifest() {
                self.problem(MANIFEST, ProblemKind::NotSealed, seal::unsealed(&self.root).to_string());
            }
            return None;
        }
        let seal = match Seal::read(&self.root, key.payload()) {
            Ok(Some(seal)) => seal,
            Ok(None) => {
                self.problem(MANIFEST, ProblemKind::NotSealed, seal::unsealed(&self.root).to_string());
                return None;
            }
            Err(error) => {
                let absent = self.has_no_manifest();
                let kind = match absent {
                    true => ProblemKind::Missing,
                    false if error.is_authentication() => ProblemKind::NotAuthentic,
                    false if error.is_io() => ProblemKind::Unreadable,
                    false => ProblemKind::BadManifest,
                };
                self.problem(MANIFEST, kind, error.to_string());
                return None;
            }
        };
        if options.seal_digest.is_some_and(|expected| expected != *seal.digest()) {
            self.problem(MANIFEST, ProblemKind::BadManifest, seal::another(&self.root).to_string());
        }
        Some(seal)
    }

    /// Finds all there is; returns the namespaces.
    fn walk(&mut self, poll: &mut dyn FnMut() -> Result<()>) -> Result<BTreeSet<String>> {
        let mut namespaces = BTreeSet::new();
        let mut pending = vec![SnapshotPath::default()];
        while let Some(namespace) = pending.pop() {
            poll()?;
            let listed = folder::open(&self.root, namespace.as_str()).and_then(|opened| {
                Ok((folder::entries(&opened).map_err(|errno| Error::io("cannot be listed", errno))?, opened))
            });
            let (entries, opened) = match listed {
                Ok(listed) => listed,
                Err(error) => {
                    self.problem(namespace.as_str(), ProblemKind::Unreadable, error.to_string());
                    continue;
                }
            };
            for (bytes, kind) in entries {
                let lossy = String::from_utf8_lossy(&bytes).into_owned();
                let shown =
                    if namespace.as_str().is_empty() { lossy } else { format!("{}/{lossy}", namespace.as_str()) };
                let Ok(name) = String::from_utf8(bytes) else {
                    self.problem(&shown, ProblemKind::NotUtf8, "its name is not UTF-8");
                    continue;
                };
                match kind {
                    FileType::Symlink => {
                        self.problem(&shown, ProblemKind::Link, "a symbolic link, which vmsnap never follows");
                        continue;
                    }
                    FileType::RegularFile | FileType::Directory => {}
                    _ => {
                        self.problem(&shown, ProblemKind::SpecialFile, "neither a file nor a folder");
                        continue;
                    }
                }
                if namespace.as_str().is_empty() && (name == KEY_METADATA || name == MANIFEST) {
                    continue;
                }
                let Ok(path) = namespace.join(&name) else {
                    let text = if name::is_reserved(&name) {
                        "a name that vmsnap keeps for itself; clean() removes what a killed process left"
                    } else {
                        "not a name that a snapshot can hold"
                    };
                    self.problem(&shown, ProblemKind::Extra, text);
                    continue;
                };
                if kind == FileType::Directory {
                    namespaces.insert(path.as_str().to_owned());
                    pending.push(path);
                } else {
                    let size = folder::stat(&opened, &name).ok().and_then(|stat| u64::try_from(stat.st_size).ok());
                    self.found.insert(path.into(), size.unwrap_or(0));
                }
            }
        }
        Ok(namespaces)
    }

    /// What is listed and what is found.
    fn compare(&mut self, seal: &Seal, namespaces: &BTreeSet<String>) {
        let Ok(manifest) = seal.manifest(&self.root, None) else { return };
        self.report.seal = Some(SealId { snapshot_id: manifest.snapshot_id, seal_digest: *seal.digest() });
        let said: BTreeSet<_> = self.report.problems.iter().map(|problem| problem.path.clone()).collect();
        let mut problems = Vec::new();
        for path in manifest.fragments.keys().filter(|path| !self.found.contains_key(*path)) {
            problems.push((path.clone(), ProblemKind::Missing, "the manifest lists it, and it is not there"));
        }
        for path in self.found.keys().filter(|path| !manifest.fragments.contains_key(*path)) {
            problems.push((path.clone(), ProblemKind::Extra, "it is there, and the manifest does not list it"));
        }
        for path in manifest.namespaces.difference(namespaces) {
            problems.push((
                path.clone(),
                ProblemKind::Missing,
                "the manifest lists the namespace, and it is not there",
            ));
        }
        for path in namespaces.difference(&manifest.namespaces) {
            problems.push((path.clone(), ProblemKind::Extra, "the manifest lists no such namespace"));
        }
        for (path, kind, text) in problems {
            // Something that is no file may be in its place, which was said already.
            if !said.contains(&path) {
                self.problem(&path, kind, text);
            }
            if manifest.fragments.contains_key(&path) || self.found.contains_key(&path) {
                self.report.fragments.insert(path, Some(kind));
            }
        }
    }

    /// Reads the contents of everything that is found and listed.
    fn read_all(
        &mut self,
        key: &Key,
        seal: Option<&Seal>,
        threads: usize,
        poll: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let manifest = match seal {
            Some(seal) => Some(seal.manifest(&self.root, None)?),
            None => None,
        };
        let proofs = manifest.map(Proofs::of).unwrap_or_default();
        let checker = Checker { root: &self.root, key, proofs: &proofs };
        let items: Vec<_> = self
            .found
            .iter()
            .filter(|(path, _)| manifest.is_none_or(|manifest| manifest.fragments.contains_key(*path)))
            .map(|(path, size)| (path, *size, manifest.and_then(|manifest| manifest.fragments.get(path))))
            .collect();
        let (small, large): (Vec<_>, Vec<_>) = items.into_iter().partition(|(_, size, _)| *size <= SMALL_BYTES);
        let results = Mutex::new(Vec::new());
        let mut workers = vec![Vec::new(); threads.min(small.len()).max(1)];
        for_each(&mut workers, small.into_iter(), &mut Poll::new(poll), |buffer, (path, size, entry)| {
            let result = checker.check(path, size, entry, 1, buffer, &mut || Ok(()))?;
            lock(&results).push((path.clone(), result));
            Ok(())
        })?;
        let mut buffer = workers.pop().unwrap_or_default();
        for (path, size, entry) in large {
            let result = checker.check(path, size, entry, threads, &mut buffer, poll)?;
            lock(&results).push((path.clone(), result));
        }
        for (path, result) in results.into_inner().unwrap_or_default() {
            let kind = match result {
                Ok(bytes) => {
                    self.report.verified_bytes += bytes;
                    None
                }
                Err((kind, text)) => {
                    self.problem(&path, kind, text);
                    Some(kind)
                }
            };
            self.report.fragments.insert(path, kind);
        }
        Ok(())
    }

    fn finish(mut self) -> Verification {
        self.report.problems.sort_by(|one, other| (&one.path, one.kind).cmp(&(&other.path, other.kind)));
        self.report
    }
}

/// Which fragment has which digest or tag, to know those that were swapped.
#[derive(Default)]
struct Proofs(BTreeMap<[u8; 32], String>);

impl Proofs {
    fn of(manifest: &Manifest) -> Self {
        Self(
            manifest
                .fragments
                .iter()
                .map(|(path, entry)| match entry.proof {
                    Proof::Blake3(proof) | Proof::HeaderTag { tag: proof, .. } => (proof, path.clone()),
                })
                .collect(),
        )
    }
}

/// Bytes verified, or what is wrong.
type Checked = std::result::Result<u64, (ProblemKind, String)>;

struct Checker<'a> {
    root: &'a Path,
    key: &'a Key,
    proofs: &'a Proofs,
}

impl Checker<'_> {
    /// Reads one fragment.
    ///
    /// # Errors
    ///
    /// What the poll returns, and nothing else.
    fn check(
        &self,
        path: &str,
        stored_size: u64,
        entry: Option<&Entry>,
        threads: usize,
        buffer: &mut Vec<u8>,
        poll: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Checked> {
        let checked = match self.key {
            Key::Lacking => self.header(path).map(|_| 0),
            Key::Held(payload) => self.encrypted(path, stored_size, entry, payload.data_key(), threads, buffer, poll),
            Key::Plain => self.plain(path, stored_size, entry, threads, buffer, poll),
        };
        match checked {
            Ok(bytes) => Ok(Ok(bytes)),
            Err(Failure::Problem(kind, text)) => Ok(Err((kind, text))),
            Err(Failure::Error(error)) if error.is_interrupted() || error.is_state() => Err(error),
            Err(Failure::Error(error)) => {
                let kind = if error.is_authentication() {
                    ProblemKind::NotAuthentic
                } else if error.is_io() {
                    ProblemKind::Unreadable
                } else {
                    ProblemKind::Changed
                };
                Ok(Err((kind, error.to_string())))
            }
        }
    }

    /// The tag in a FLOE header; nothing of it is authenticated.
    fn header(&self, path: &str) -> std::result::Result<[u8; 32], Failure> {
        let (namespace, name) = path.rsplit_once('/').unwrap_or(("", path));
        let (file, _) = folder::open_file(&folder::open(self.root, namespace)?, name)?;
        let mut header = [0; HEADER_BYTES];
        file.read_exact_at(&mut header, 0).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                Failure::Problem(ProblemKind::Truncated, "it is shorter than any encrypted fragment".to_owned())
            }
            _ => Failure::Error(Error::io("cannot be read", error)),
        })?;
        check_declared_chunk_size(header)
            .map_err(|error| Failure::Problem(ProblemKind::NotAuthentic, error.to_string()))?;
        Ok(header_tag(&header))
    }

    #[expect(clippy::too_many_arguments, reason = "they are those of check")]
    fn encrypted(
        &self,
        path: &str,
        stored_size: u64,
        entry: Option<&Entry>,
        key: &SecretKey,
        threads: usize,
        buffer: &mut Vec<u8>,
        poll: &mut dyn FnMut() -> Result<()>,
    ) -> std::result::Result<u64, Failure> {
        let open =
            || FragmentReader::open(self.root, &SnapshotPath::try_from(path.to_owned())?, Some(key), threads, None);
        if let Some(entry) = entry {
            let Proof::HeaderTag { tag: expected, .. } = entry.proof else {
                return Err(Failure::Problem(ProblemKind::BadManifest, "it is listed as plain".to_owned()));
            };
            let tag = self.header(path)?;
            if tag != expected {
                self.check_swapped(path, &tag)?;
            }
            check_size(stored_size, entry)?;
            if tag != expected {
                open()?;
                return Err(Failure::Problem(
                    ProblemKind::Changed,
                    "it is authentic, but not the one that was sealed: an older or newer one of that name".to_owned(),
                ));
            }
        }
        let fragment = open()?;
        read(&fragment, buffer, poll, |_| Ok(()))?;
        Ok(fragment.size())
    }

    fn plain(
        &self,
        path: &str,
        stored_size: u64,
        entry: Option<&Entry>,
        threads: usize,
        buffer: &mut Vec<u8>,
        poll: &mut dyn FnMut() -> Result<()>,
    ) -> std::result::Result<u64, Failure> {
        if let Some(entry) = entry
            && stored_size > entry.stored_size.saturating_mul(2).max(SMALL_BYTES)
        {
            // Not read: a sparse giant would take for ever.
            check_size(stored_size, entry)?;
        }
        let fragment = FragmentReader::open(self.root, &SnapshotPath::try_from(path.to_owned())?, None, threads, None)?;
        let mut digest = Digest::default();
        read(&fragment, buffer, poll, |piece| {
            digest.update_with(piece, threads, &mut Poll::new(&mut || Ok(())), |_, _| Ok(()))
        })?;
        let digest = digest.finish();
        match entry {
            Some(Entry { proof: Proof::Blake3(expected), .. }) if *expected == digest => Ok(fragment.size()),
            Some(entry) => {
                self.check_swapped(path, &digest)?;
                check_size(stored_size, entry)?;
                Err(Failure::Problem(ProblemKind::Changed, "its content is not the one that was sealed".to_owned()))
            }
            None => Ok(fragment.size()),
        }
    }

    fn check_swapped(&self, path: &str, proof: &[u8; 32]) -> std::result::Result<(), Failure> {
        match self.proofs.0.get(proof) {
            Some(other) if other != path => {
                Err(Failure::Problem(ProblemKind::Swapped, format!("it is what was sealed as {other:?}")))
            }
            _ => Ok(()),
        }
    }
}

fn read(
    fragment: &FragmentReader,
    buffer: &mut Vec<u8>,
    poll: &mut dyn FnMut() -> Result<()>,
    mut take: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let wanted = usize::try_from(fragment.size()).map_or(PIECE_BYTES, |size| size.min(PIECE_BYTES));
    // Whole chunks: a part of one would be decrypted twice.
    let wanted = fragment.chunk_size_bytes().map_or(wanted, |chunk| wanted.next_multiple_of(chunk));
    if buffer.len() < wanted {
        buffer.resize(wanted, 0);
    }
    let mut offset = 0;
    while offset < fragment.size() {
        let read = fragment.read_at_polled(offset, &mut buffer[..wanted], poll)?;
        take(&buffer[..read])?;
        offset += read as u64;
        poll()?;
    }
    Ok(())
}

fn check_size(stored_size: u64, entry: &Entry) -> std::result::Result<(), Failure> {
    let text = || format!("it has {stored_size} bytes, and {} in the manifest", entry.stored_size);
    match stored_size.cmp(&entry.stored_size) {
        std::cmp::Ordering::Less => Err(Failure::Problem(ProblemKind::Truncated, text())),
        std::cmp::Ordering::Greater => Err(Failure::Problem(ProblemKind::WrongSize, text())),
        std::cmp::Ordering::Equal => Ok(()),
    }
}

enum Failure {
    Problem(ProblemKind, String),
    Error(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}
