//! Reads the contents of all fragments: each small fragment by one thread, each large one by all threads.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use super::{Key, ProblemKind, SealedManifest, Verifier};
use crate::cipher::{HEADER_BYTES, SecretKey, check_declared_chunk_size, header_tag};
use crate::error::{Error, Result};
use crate::fragment::{FragmentPlace, FragmentReader};
use crate::manifest::{Entry, Manifest, Proof};
use crate::name::SnapshotPath;
use crate::store::Store;
use crate::store::bytes::ReadAt;
use crate::threads::{Interrupt, for_each, lock};

/// Each thread reads a fragment up to this size alone; all threads read a larger one together.
const MAX_SMALL_FRAGMENT_BYTES: u64 = 4 << 20;

impl Verifier {
    /// Reads every fragment that was found and is listed.
    pub(super) fn read_all(
        &mut self,
        key: &Key,
        sealed: Option<&SealedManifest>,
        threads: usize,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let manifest = sealed.map(|sealed| &sealed.manifest);
        let checker =
            Checker { store: &self.store, manifest, key, proofs: manifest.map(proofs_of).unwrap_or_default() };
        let listed = |path: &str| manifest.and_then(|manifest| manifest.fragments.get(path));
        let found: Vec<_> = self
            .found
            .iter()
            .map(|(path, stored_size)| FoundFragment { path, stored_size: *stored_size, entry: listed(path) })
            .filter(|found| manifest.is_none() || found.entry.is_some())
            .collect();
        let (small, large): (Vec<_>, Vec<_>) =
            found.into_iter().partition(|found| found.stored_size <= MAX_SMALL_FRAGMENT_BYTES);
        let results = Mutex::new(Vec::new());
        let mut buffers = vec![Vec::new(); threads.min(small.len()).max(1)];
        for_each(&mut buffers, small.into_iter(), &mut Interrupt::new(interrupt), |buffer, found, _| {
            let result = checker.check(&found, 1, buffer, &mut || Ok(()))?;
            lock(&results).push((found.path.to_owned(), result));
            Ok(())
        })?;
        let mut buffer = buffers.pop().unwrap_or_default();
        drop(buffers);
        for found in large {
            let result = checker.check(&found, threads, &mut buffer, interrupt)?;
            lock(&results).push((found.path.to_owned(), result));
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

/// A stored fragment.
struct FoundFragment<'a> {
    path: &'a str,
    /// Its stored size when it was found.
    stored_size: u64,
    /// Its entry in the manifest, if there is a manifest.
    entry: Option<&'a Entry>,
}

/// The verified bytes, or the problem.
type Checked = std::result::Result<u64, (ProblemKind, String)>;

struct Checker<'a> {
    store: &'a Store,
    manifest: Option<&'a Manifest>,
    key: &'a Key,
    /// The path of each digest or tag, to find fragments that were swapped.
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
    /// The errors of the interrupt, and errors that are not about the fragment: a fork, a lack of memory.
    fn check(
        &self,
        found: &FoundFragment<'_>,
        threads: usize,
        buffer: &mut Vec<u8>,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Checked> {
        let checked = match self.key {
            Key::Lacking => self
                .object(found)
                .map_err(Failure::Error)
                .and_then(|object| Self::header(&*object, interrupt))
                .map(|_| 0),
            Key::Held(payload) => self.encrypted(found, payload.data_key(), threads, buffer, interrupt),
            Key::Plain => self.plain(found, threads, buffer, interrupt),
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
                Ok(Err((kind, error.text_without(self.place(found)))))
            }
        }
    }

    /// The name of a fragment in errors.
    fn place(&self, found: &FoundFragment<'_>) -> String {
        let path = SnapshotPath::try_from(found.path.to_owned()).unwrap_or_default();
        format!("{path} of {}", self.store.location())
    }

    fn object(&self, found: &FoundFragment<'_>) -> Result<Arc<dyn ReadAt>> {
        self.store.found_object(&SnapshotPath::try_from(found.path.to_owned())?, found.stored_size, self.manifest)
    }

    fn open(
        &self,
        object: &Arc<dyn ReadAt>,
        found: &FoundFragment<'_>,
        key: Option<&SecretKey>,
        threads: usize,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<FragmentReader> {
        let path = SnapshotPath::try_from(found.path.to_owned())?;
        let place = FragmentPlace::new(self.store.location(), &path);
        // Without the entry of the manifest: this room tells differences apart.
        FragmentReader::of_object(Arc::clone(object), place, key, threads, None, &mut Interrupt::new(interrupt))
    }

    /// The tag of a FLOE header, not authenticated.
    fn header(
        object: &dyn ReadAt,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> std::result::Result<[u8; 32], Failure> {
        if object.size() < HEADER_BYTES as u64 {
            return Err(problem(ProblemKind::Truncated, "it is shorter than any encrypted fragment"));
        }
        let mut header = [0; HEADER_BYTES];
        object.read_exact_at(&mut header, 0, &mut Interrupt::new(interrupt))?;
        check_declared_chunk_size(header).map_err(|error| problem(ProblemKind::NotAuthentic, error.to_string()))?;
        Ok(header_tag(&header))
    }

    fn encrypted(
        &self,
        found: &FoundFragment<'_>,
        key: &SecretKey,
        threads: usize,
        buffer: &mut Vec<u8>,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> std::result::Result<u64, Failure> {
        let object = self.object(found)?;
        if let Some(entry) = found.entry {
            let Proof::HeaderTag { tag: expected, .. } = entry.proof else {
                return Err(problem(ProblemKind::BadManifest, "the manifest lists it as a plain fragment"));
            };
            let tag = Self::header(&*object, interrupt)?;
            if tag != expected {
                self.check_swapped(found, &tag)?;
            }
            found.check_size()?;
            if tag != expected {
                self.open(&object, found, Some(key), threads, interrupt)?;
                let text = "it is authentic, but it is an older or newer version than the sealed one";
                return Err(problem(ProblemKind::Changed, text));
            }
        }
        let fragment = self.open(&object, found, Some(key), threads, interrupt)?;
        fragment.read_through(buffer, interrupt, |_| Ok(()))?;
        Ok(fragment.size())
    }

    fn plain(
        &self,
        found: &FoundFragment<'_>,
        threads: usize,
        buffer: &mut Vec<u8>,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> std::result::Result<u64, Failure> {
        if found
            .entry
            .is_some_and(|entry| found.stored_size > entry.stored_size.saturating_mul(2).max(MAX_SMALL_FRAGMENT_BYTES))
        {
            // Do not read it: a huge sparse file would take hours.
            found.check_size()?;
        }
        let fragment = self.open(&self.object(found)?, found, None, threads, interrupt)?;
        let Some(entry) = found.entry else {
            fragment.read_through(buffer, interrupt, |_| Ok(()))?;
            return Ok(fragment.size());
        };
        let digest = fragment.blake3(buffer, interrupt)?;
        if entry.proof == Proof::Blake3(digest) {
            return Ok(fragment.size());
        }
        self.check_swapped(found, &digest)?;
        found.check_size()?;
        Err(problem(ProblemKind::Changed, "its contents have changed since the snapshot was sealed"))
    }

    fn check_swapped(&self, found: &FoundFragment<'_>, proof: &[u8; 32]) -> std::result::Result<(), Failure> {
        match self.proofs.get(proof) {
            Some(other) if *other != found.path => {
                Err(problem(ProblemKind::Swapped, format!("it is the fragment that was sealed as {other:?}")))
            }
            _ => Ok(()),
        }
    }
}

impl FoundFragment<'_> {
    fn check_size(&self) -> std::result::Result<(), Failure> {
        let (size, listed) = (self.stored_size, self.entry.map_or(self.stored_size, |entry| entry.stored_size));
        let text = || format!("it is {size} bytes long, but the manifest says {listed} bytes");
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
