//! The places of all members of an archive, computed from the manifest: an archive does not need an index.

use std::cmp::Ordering;
use std::ops::Range;
use std::time::UNIX_EPOCH;

use crate::error::{Error, Kind, Result};
use crate::manifest::Manifest;
use crate::name::{KEY_METADATA, MANIFEST};

use super::member::{END_BYTES, GLOBAL_HEADER_BYTES, MAX_MTIME, Member, MemberKind, is_large};

/// All members of an archive, in the order of the file.
///
/// Of each member it keeps only its path and 24 bytes, because there may be millions of members.
pub(crate) struct Layout {
    /// The paths of all members, one after the other.
    paths: String,
    places: Vec<Place>,
    mtime: u64,
    /// The index of the manifest: 1 after `enc_metadata`, otherwise 0.
    manifest: usize,
    /// The indexes of the first small fragment and of the first large one.
    small: usize,
    large: usize,
}

struct Place {
    start: u64,
    size: u64,
    path_end: u32,
    kind: MemberKind,
}

impl Layout {
    /// Computes all places. `key_metadata_bytes` is the size of `enc_metadata`, if there is one. `manifest_bytes` is
    /// the size of the manifest as it is stored.
    ///
    /// # Errors
    ///
    /// - `Corrupt` if only the manifest or only `enc_metadata` says that the snapshot is encrypted, or if the archive
    ///   would be longer than a file can be.
    /// - `Unsupported` if a path is too long for an archive.
    /// - `OutOfMemory` if there is not enough memory for the list.
    pub(crate) fn new(manifest: &Manifest, key_metadata_bytes: Option<u64>, manifest_bytes: u64) -> Result<Self> {
        if manifest.encrypted != key_metadata_bytes.is_some() {
            let is = if manifest.encrypted { "encrypted, but it does not have" } else { "plain, but it has" };
            let text = format!("the snapshot is {is} {KEY_METADATA}: the archive was put together from two others");
            return Err(Error::corrupt(text));
        }
        let mut layout = Self::with_room_for(manifest)?;
        if let Some(bytes) = key_metadata_bytes {
            layout.push(KEY_METADATA, MemberKind::File, bytes)?;
        }
        layout.manifest = layout.places.len();
        layout.push(MANIFEST, MemberKind::File, manifest_bytes)?;
        for path in &manifest.namespaces {
            layout.push(path, MemberKind::Namespace, 0)?;
        }
        layout.small = layout.places.len();
        for (path, entry) in manifest.fragments.iter().filter(|(_, entry)| !is_large(entry.stored_size)) {
            layout.push(path, MemberKind::File, entry.stored_size)?;
        }
        layout.large = layout.places.len();
        for (path, entry) in manifest.fragments.iter().filter(|(_, entry)| is_large(entry.stored_size)) {
            layout.push(path, MemberKind::File, entry.stored_size)?;
        }
        Ok(layout)
    }

    /// An empty layout whose lists do not grow, because a failure to grow would abort.
    fn with_room_for(manifest: &Manifest) -> Result<Self> {
        let namespaces = manifest.namespaces.iter().map(|path| path.len());
        let path_bytes: usize = namespaces.chain(manifest.fragments.keys().map(String::len)).sum();
        let mut paths = String::new();
        let mut places = Vec::new();
        paths
            .try_reserve_exact(KEY_METADATA.len() + MANIFEST.len() + path_bytes)
            .and_then(|()| places.try_reserve_exact(2 + manifest.namespaces.len() + manifest.fragments.len()))
            .map_err(|_| Error::new(Kind::OutOfMemory, "there is not enough memory for the list of all members"))?;
        let mtime = mtime_of(&manifest.created)?;
        Ok(Self { paths, places, mtime, manifest: 0, small: 0, large: 0 })
    }

    fn push(&mut self, path: &str, kind: MemberKind, size: u64) -> Result<()> {
        let start = self.members_end();
        Member::new(path, kind, size, self.mtime, start)?;
        self.paths.push_str(path);
        let path_end =
            u32::try_from(self.paths.len()).map_err(|_| Error::corrupt("the paths have more than 2^32 bytes"))?;
        self.places.push(Place { start, size, path_end, kind });
        Ok(())
    }

    /// The end of the last member.
    fn members_end(&self) -> u64 {
        self.places.len().checked_sub(1).map_or(GLOBAL_HEADER_BYTES as u64, |last| self.member(last).end())
    }

    /// The length of the archive.
    pub(crate) fn total_bytes(&self) -> u64 {
        self.members_end() + END_BYTES
    }

    /// `enc_metadata`, which only an encrypted snapshot has.
    pub(crate) fn key_metadata(&self) -> Option<Member<'_>> {
        (self.manifest == 1).then(|| self.member(0))
    }

    pub(crate) fn manifest(&self) -> Member<'_> {
        self.member(self.manifest)
    }

    /// The fragment with this path, found by a binary search.
    pub(crate) fn fragment(&self, path: &str) -> Option<Member<'_>> {
        self.search(self.small..self.large, path).or_else(|| self.search(self.large..self.places.len(), path))
    }

    /// A binary search in a part of the list that is sorted by path.
    fn search(&self, mut indexes: Range<usize>, path: &str) -> Option<Member<'_>> {
        while !indexes.is_empty() {
            let middle = indexes.start + indexes.len() / 2;
            match self.path(middle).cmp(path) {
                Ordering::Less => indexes.start = middle + 1,
                Ordering::Equal => return Some(self.member(middle)),
                Ordering::Greater => indexes.end = middle,
            }
        }
        None
    }

    /// All members, in the order of the file.
    pub(crate) fn members(&self) -> impl ExactSizeIterator<Item = Member<'_>> {
        (0..self.places.len()).map(|index| self.member(index))
    }

    /// All members after the manifest.
    pub(crate) fn members_after_manifest(&self) -> impl ExactSizeIterator<Item = Member<'_>> {
        (self.manifest + 1..self.places.len()).map(|index| self.member(index))
    }

    /// All fragments.
    pub(crate) fn fragments(&self) -> impl ExactSizeIterator<Item = Member<'_>> {
        (self.small..self.places.len()).map(|index| self.member(index))
    }

    fn member(&self, index: usize) -> Member<'_> {
        let Place { start, size, kind, .. } = self.places[index];
        Member { path: self.path(index), kind, size, mtime: self.mtime, start }
    }

    fn path(&self, index: usize) -> &str {
        let end_of = |index: usize| self.places[index].path_end as usize;
        &self.paths[index.checked_sub(1).map_or(0, end_of)..end_of(index)]
    }
}

/// `created` of a manifest as Unix time, in the range of a tar header.
fn mtime_of(created: &str) -> Result<u64> {
    let seconds = created.split(['.', 'Z']).next().unwrap_or_default();
    if seconds.ends_with(":60") {
        // Unix time does not have leap seconds, and parsers disagree about them.
        return Err(Error::corrupt("'created' of the manifest has second 60, which an archive cannot represent"));
    }
    let time = humantime::parse_rfc3339(&format!("{seconds}Z"))
        .map_err(|error| Error::with_source(Kind::Corrupt, "'created' of the manifest is not a date", error))?;
    Ok(time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs().min(MAX_MTIME)))
}

#[cfg(test)]
mod tests;
