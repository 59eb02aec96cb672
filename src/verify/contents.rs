//! The contents of fragments, read by all threads: small ones by one thread each, large ones by all together.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;

use super::{Key, ProblemKind, Verifier};
use crate::cipher::{HEADER_BYTES, SecretKey, check_declared_chunk_size, header_tag};
use crate::error::{Error, Result};
use crate::fragment::{FragmentReader, folder};
use crate::manifest::{Entry, Manifest, Proof};
use crate::name::SnapshotPath;
use crate::seal::Seal;
use crate::threads::{Interrupt, for_each, lock};

/// What is small.
const SMALL_BYTES: u64 = 4 << 20;

impl Verifier {
    /// Reads everything that is found and listed.
    pub(super) fn read_all(
        &mut self,
        key: &Key,
        seal: Option<&Seal>,
        threads: usize,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let manifest = seal.map(|seal| seal.manifest(&self.root, None)).transpose()?;
        let checker = Checker { root: &self.root, key, proofs: manifest.map(proofs_of).unwrap_or_default() };
        let listed = |path: &str| manifest.and_then(|manifest| manifest.fragments.get(path));
        let items: Vec<_> = self
            .found
            .iter()
            .map(|(path, stored_size)| Item { path, stored_size: *stored_size, entry: listed(path) })
            .filter(|item| manifest.is_none() || item.entry.is_some())
            .collect();
        let (small, large): (Vec<_>, Vec<_>) = items.into_iter().partition(|item| item.stored_size <= SMALL_BYTES);
        let results = Mutex::new(Vec::new());
        let mut buffers = vec![Vec::new(); threads.min(small.len()).max(1)];
        for_each(&mut buffers, small.into_iter(), &mut Interrupt::new(interrupt), |buffer, item| {
            let result = checker.check(&item, 1, buffer, &mut || Ok(()))?;
            lock(&results).push((item.path.to_owned(), result));
            Ok(())
        })?;
        let mut buffer = buffers.pop().unwrap_or_default();
        drop(buffers);
        for item in large {
            let result = checker.check(&item, threads, &mut buffer, interrupt)?;
            lock(&results).push((item.path.to_owned(), result));
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
}

/// A fragment that is there.
struct Item<'a> {
    path: &'a str,
    /// Bytes of its file when it was found.
    stored_size: u64,
    /// What the manifest says of it; none where there is no manifest.
    entry: Option<&'a Entry>,
}

/// Bytes verified, or what is wrong.
type Checked = std::result::Result<u64, (ProblemKind, String)>;

struct Checker<'a> {
    root: &'a Path,
    key: &'a Key,
    /// Which fragment has which digest or tag, to know those that were swapped.
    proofs: BTreeMap<[u8; 32], &'a str>,
}

fn proofs_of(manifest: &Manifest) -> BTreeMap<[u8; 32], &str> {
    let proof = |entry: &Entry| match entry.proof {
        Proof::Blake3(proof) | Proof::HeaderTag { tag: proof, .. } => proof,
    };
    manifest.fragments.iter().map(|(path, entry)| (proof(entry), path.as_str())).collect()
}

impl Checker<'_> {
    /// Reads one fragment.
    ///
    /// # Errors
    ///
    /// What the interrupt returns, and nothing else.
    fn check(
        &self,
        item: &Item<'_>,
        threads: usize,
        buffer: &mut Vec<u8>,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Checked> {
        let checked = match self.key {
            Key::Lacking => self.header(item).map(|_| 0),
            Key::Held(payload) => self.encrypted(item, payload.data_key(), threads, buffer, interrupt),
            Key::Plain => self.plain(item, threads, buffer, interrupt),
        };
        match checked {
            Ok(bytes) => Ok(Ok(bytes)),
            Err(Failure::Problem(kind, text)) => Ok(Err((kind, text))),
            Err(Failure::Error(error)) if error.is_interrupted() || error.is_state() || error.is_out_of_memory() => {
                Err(error)
            }
            Err(Failure::Error(error)) => {
                let kind = if error.is_authentication() {
                    ProblemKind::NotAuthentic
                } else if error.is_io() {
                    ProblemKind::Unreadable
                } else {
                    ProblemKind::Changed
                };
                Ok(Err((kind, error.text_without(self.place(item)))))
            }
        }
    }

    /// A fragment as errors name it; a problem is told with its path.
    fn place(&self, item: &Item<'_>) -> String {
        let path = SnapshotPath::try_from(item.path.to_owned()).unwrap_or_default();
        format!("{path} of {}", self.root.display())
    }

    fn open(&self, item: &Item<'_>, key: Option<&SecretKey>, threads: usize) -> Result<FragmentReader> {
        FragmentReader::open(self.root, &SnapshotPath::try_from(item.path.to_owned())?, key, threads, None)
    }

    /// The tag in a FLOE header; nothing of it is authenticated.
    fn header(&self, item: &Item<'_>) -> std::result::Result<[u8; 32], Failure> {
        let (namespace, name) = item.path.rsplit_once('/').unwrap_or(("", item.path));
        let (file, _) = folder::open_file(&folder::open(self.root, namespace)?, name)?;
        let mut header = [0; HEADER_BYTES];
        file.read_exact_at(&mut header, 0).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                problem(ProblemKind::Truncated, "it is shorter than any encrypted fragment")
            }
            _ => Failure::Error(Error::io("cannot be read", error)),
        })?;
        check_declared_chunk_size(header).map_err(|error| problem(ProblemKind::NotAuthentic, error.to_string()))?;
        Ok(header_tag(&header))
    }

    fn encrypted(
        &self,
        item: &Item<'_>,
        key: &SecretKey,
        threads: usize,
        buffer: &mut Vec<u8>,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> std::result::Result<u64, Failure> {
        if let Some(entry) = item.entry {
            let Proof::HeaderTag { tag: expected, .. } = entry.proof else {
                return Err(problem(ProblemKind::BadManifest, "it is listed as plain"));
            };
            let tag = self.header(item)?;
            if tag != expected {
                self.check_swapped(item, &tag)?;
            }
            item.check_size()?;
            if tag != expected {
                self.open(item, Some(key), threads)?;
                let text = "it is authentic, but not the one that was sealed: an older or newer one of that name";
                return Err(problem(ProblemKind::Changed, text));
            }
        }
        let fragment = self.open(item, Some(key), threads)?;
        fragment.read_through(buffer, interrupt, |_| Ok(()))?;
        Ok(fragment.size())
    }

    fn plain(
        &self,
        item: &Item<'_>,
        threads: usize,
        buffer: &mut Vec<u8>,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> std::result::Result<u64, Failure> {
        if item.entry.is_some_and(|entry| item.stored_size > entry.stored_size.saturating_mul(2).max(SMALL_BYTES)) {
            // Not read: a sparse giant would take for ever.
            item.check_size()?;
        }
        let fragment = self.open(item, None, threads)?;
        let Some(entry) = item.entry else {
            fragment.read_through(buffer, interrupt, |_| Ok(()))?;
            return Ok(fragment.size());
        };
        let digest = fragment.blake3(buffer, interrupt)?;
        if entry.proof == Proof::Blake3(digest) {
            return Ok(fragment.size());
        }
        self.check_swapped(item, &digest)?;
        item.check_size()?;
        Err(problem(ProblemKind::Changed, "its content is not the one that was sealed"))
    }

    fn check_swapped(&self, item: &Item<'_>, proof: &[u8; 32]) -> std::result::Result<(), Failure> {
        match self.proofs.get(proof) {
            Some(other) if *other != item.path => {
                Err(problem(ProblemKind::Swapped, format!("it is what was sealed as {other:?}")))
            }
            _ => Ok(()),
        }
    }
}

impl Item<'_> {
    fn check_size(&self) -> std::result::Result<(), Failure> {
        let (size, listed) = (self.stored_size, self.entry.map_or(self.stored_size, |entry| entry.stored_size));
        let text = || format!("it has {size} bytes, and {listed} in the manifest");
        match size.cmp(&listed) {
            std::cmp::Ordering::Less => Err(problem(ProblemKind::Truncated, text())),
            std::cmp::Ordering::Greater => Err(problem(ProblemKind::WrongSize, text())),
            std::cmp::Ordering::Equal => Ok(()),
        }
    }
}

enum Failure {
    Problem(ProblemKind, String),
    Error(Error),
}

fn problem(kind: ProblemKind, text: impl Into<String>) -> Failure {
    Failure::Problem(kind, text.into())
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}
