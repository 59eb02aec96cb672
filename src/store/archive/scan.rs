//! The members of an archive by their headers, for a reader without the key. Nothing of it is authenticated.

use std::collections::BTreeMap;
use std::fs::File;

use super::front::{FrontShape, truncated};
use super::member::{BLOCK_BYTES, END_BYTES, Member, MemberKind, Section, foreign, headers_bytes_from};
use super::read_at_most;
use crate::buffer;
use crate::error::{Error, Result};

/// The namespaces, and the fragments with the offset of their data and their size.
#[derive(Default)]
pub(super) struct Scan {
    pub(super) namespaces: Vec<String>,
    pub(super) fragments: BTreeMap<String, (u64, u64)>,
}

impl Scan {
    /// Reads the headers of all members. They must be as vmsnap computes them from the paths, sizes and times in them,
    /// in the order of an archive, and end with the file.
    pub(super) fn of(file: &File, size: u64, shape: &FrontShape) -> Result<Self> {
        let mut scan = Self::default();
        let (mut at, mut last) = (shape.end, None::<(Section, String)>);
        loop {
            let Some(headers) = headers_at(file, at)? else { break };
            let member = Member::parse(at, &headers)?;
            let (section, path) = member.order();
            let ascends = last.as_ref().is_none_or(|(before, other)| (*before, other.as_str()) < (section, path));
            if !ascends || section < Section::Namespaces || member.mtime != shape.mtime {
                return Err(foreign(at));
            }
            let parent = path.rsplit_once('/').map(|(parent, _)| parent);
            let is_known = |parent: &str| scan.namespaces.binary_search_by(|known| (**known).cmp(parent)).is_ok();
            let is_fragment = member.kind == MemberKind::File;
            if parent.is_some_and(|parent| !is_known(parent)) || (is_fragment && is_known(path)) {
                return Err(foreign(at));
            }
            last = Some((section, path.to_owned()));
            at = member.end();
            match member.kind {
                MemberKind::Namespace => scan.namespaces.push(path.to_owned()),
                MemberKind::File => {
                    if scan.fragments.insert(path.to_owned(), (member.data().start, member.size)).is_some() {
                        return Err(foreign(member.start));
                    }
                }
            }
        }
        if size != at + END_BYTES {
            return Err(super::wrong_length(size, at + END_BYTES));
        }
        Ok(scan)
    }

    /// The offset of the data of a fragment, and its size.
    pub(super) fn fragment(&self, path: &str) -> Option<(u64, u64)> {
        self.fragments.get(path).copied()
    }
}

/// Reads all headers of the member at `at`; `None` at the end of the archive.
fn headers_at(file: &File, at: u64) -> Result<Option<Vec<u8>>> {
    let failed = |error| Error::io("its headers cannot be read", error);
    let mut first = [0; BLOCK_BYTES];
    if read_at_most(file, &mut first, at).map_err(failed)? < BLOCK_BYTES {
        return Err(truncated(at));
    }
    let Some(length) = headers_bytes_from(at, &first)? else { return Ok(None) };
    let mut headers = Vec::new();
    buffer::fit(&mut headers, length)?;
    if read_at_most(file, &mut headers, at).map_err(failed)? < length {
        return Err(truncated(at));
    }
    Ok(Some(headers))
}
