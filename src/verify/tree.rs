//! Lists the files of a snapshot and compares the list with the manifest, without reading contents.

use std::collections::BTreeSet;

use rustix::fs::FileType;

use super::{ProblemKind, Verifier};
use crate::error::{Error, Result};
use crate::fragment::folder;
use crate::name::{self, KEY_METADATA, MANIFEST, SnapshotPath};
use crate::open_manifest::OpenManifest;
use crate::staging::SealId;

impl Verifier {
    /// Finds all fragments and namespaces; returns the namespaces.
    pub(super) fn walk(&mut self, interrupt: &mut dyn FnMut() -> Result<()>) -> Result<BTreeSet<Box<str>>> {
        let mut namespaces = BTreeSet::new();
        let mut pending = vec![SnapshotPath::default()];
        while let Some(namespace) = pending.pop() {
            interrupt()?;
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
                        self.problem(&shown, ProblemKind::Link, "it is a symbolic link, which vmsnap never follows");
                        continue;
                    }
                    FileType::RegularFile | FileType::Directory => {}
                    _ => {
                        self.problem(&shown, ProblemKind::SpecialFile, "it is neither a file nor a directory");
                        continue;
                    }
                }
                if namespace.as_str().is_empty() && (name == KEY_METADATA || name == MANIFEST) {
                    continue;
                }
                let Ok(path) = namespace.join(&name) else {
                    let text = if name::is_reserved(&name) {
                        "its name is reserved for vmsnap; if a killed process left it, clean() removes it"
                    } else {
                        "a snapshot cannot contain this name"
                    };
                    self.problem(&shown, ProblemKind::Extra, text);
                    continue;
                };
                if kind == FileType::Directory {
                    namespaces.insert(path.as_str().into());
                    pending.push(path);
                } else {
                    let size = folder::stat(&opened, &name).ok().and_then(|stat| u64::try_from(stat.st_size).ok());
                    self.found.insert(path.into(), size.unwrap_or(0));
                }
            }
        }
        Ok(namespaces)
    }

    /// Compares the manifest with the files that were found.
    pub(super) fn compare(&mut self, open_manifest: &OpenManifest, namespaces: &BTreeSet<Box<str>>) {
        let Ok(manifest) = open_manifest.manifest(&self.root, None) else { return };
        self.report.seal = Some(SealId { snapshot_id: manifest.snapshot_id, seal_digest: *open_manifest.digest() });
        let said: BTreeSet<_> = self.report.problems.iter().map(|problem| problem.path.clone()).collect();
        let mut problems = Vec::new();
        for path in manifest.fragments.keys().filter(|path| !self.found.contains_key(*path)) {
            problems.push((path.clone(), ProblemKind::Missing, "the manifest lists it, but it does not exist"));
        }
        for path in self.found.keys().filter(|path| !manifest.fragments.contains_key(*path)) {
            problems.push((path.clone(), ProblemKind::Extra, "the manifest does not list it"));
        }
        for path in manifest.namespaces.difference(namespaces) {
            let text = "the manifest lists the namespace, but it does not exist";
            problems.push((path.to_string(), ProblemKind::Missing, text));
        }
        for path in namespaces.difference(&manifest.namespaces) {
            problems.push((path.to_string(), ProblemKind::Extra, "the manifest does not list this namespace"));
        }
        for (path, kind, text) in problems {
            // If a special file is at this path, that was reported already.
            if !said.contains(&path) {
                self.problem(&path, kind, text);
            }
            if manifest.fragments.contains_key(&path) || self.found.contains_key(&path) {
                self.report.fragments.insert(path, Some(kind));
            }
        }
    }
}
