//! Lists everything that a directory contains.

use std::os::fd::OwnedFd;
use std::time::{Duration, UNIX_EPOCH};

use rustix::fs::{FileType, Stat};

use super::{Directory, entries};
use crate::error::{Error, Result};
use crate::name::{self, KEY_METADATA, MANIFEST, SnapshotPath};
use crate::store::{StoredFragment, Strange, StrangeKind, Survey};

/// The entries of one directory.
#[derive(Default)]
struct Entries {
    fragments: Vec<String>,
    namespaces: Vec<String>,
    strange: Vec<Strange>,
}

impl Directory {
    /// Lists the names of the fragments and of the namespaces in a namespace, sorted, without vmsnap's own files.
    pub(crate) fn list(&self, namespace: &SnapshotPath) -> Result<(Vec<String>, Vec<String>)> {
        let Entries { fragments, namespaces, strange } = self.read(namespace)?.0;
        strange.into_iter().find_map(|strange| strange.refusal).map_or(Ok((fragments, namespaces)), Err)
    }

    /// Finds everything that is there, each namespace after the one that contains it. It goes on after a namespace that
    /// cannot be read. Only an interrupt is an error.
    pub(crate) fn survey(&self, interrupt: &mut dyn FnMut() -> Result<()>) -> Result<Survey> {
        let mut survey = Survey::default();
        let mut pending = vec![SnapshotPath::default()];
        while let Some(namespace) = pending.pop() {
            interrupt()?;
            let (found, opened) = match self.read(&namespace) {
                Ok(read) => read,
                Err(error) => {
                    let path = namespace.as_str().to_owned();
                    survey.strange.push(Strange { path, kind: StrangeKind::Unreadable, refusal: Some(error) });
                    continue;
                }
            };
            survey.strange.extend(found.strange);
            for name in found.fragments {
                let path = namespace.join(&name)?;
                survey.fragments.push(match entries::stat(&opened, &name) {
                    Ok(stat) => of_stat(path, &stat),
                    Err(errno) => {
                        // It was there a moment ago; reading it will tell more.
                        let error = Error::io(format!("{path} of {} cannot be examined", self.location()), errno);
                        let (kind, shown) = (StrangeKind::NotExamined, path.as_str().to_owned());
                        survey.strange.push(Strange { path: shown, kind, refusal: Some(error) });
                        StoredFragment { path, stored_size: 0, modified: UNIX_EPOCH, finished: true }
                    }
                });
            }
            for name in found.namespaces.iter().rev() {
                pending.push(namespace.join(name)?);
            }
            if !namespace.as_str().is_empty() {
                survey.namespaces.push(namespace);
            }
        }
        Ok(survey)
    }

    /// Reads the entries of one namespace, sorted.
    fn read(&self, namespace: &SnapshotPath) -> Result<(Entries, OwnedFd)> {
        let opened = entries::open(self.root(), namespace.as_str())?;
        let is_root = namespace.as_str().is_empty();
        let place = format!("{} of {}", if is_root { "the root" } else { namespace.as_str() }, self.location());
        let all = entries::entries(&opened).map_err(|errno| Error::io(format!("cannot list {place}"), errno))?;
        let mut found = Entries::default();
        for (bytes, file_type) in all {
            let lossy = String::from_utf8_lossy(&bytes);
            let path = if is_root { lossy.into_owned() } else { format!("{}/{lossy}", namespace.as_str()) };
            let mut strange = |kind, refusal: Option<Error>| {
                let refusal = refusal.map(|error| error.context(&place));
                found.strange.push(Strange { path: path.clone(), kind, refusal });
            };
            let Ok(name) = std::str::from_utf8(&bytes) else {
                let error = Error::corrupt(format!("\"{}\" is not UTF-8", bytes.escape_ascii()));
                strange(StrangeKind::NotUtf8, Some(error));
                continue;
            };
            // A reader leaves out entries of any kind with a name of vmsnap's own.
            let reserved = name::is_reserved(name);
            let refused = |error| (!reserved).then_some(error);
            match file_type {
                FileType::RegularFile | FileType::Directory => {}
                FileType::Symlink => {
                    strange(StrangeKind::Link, refused(entries::stray_named(name, file_type)));
                    continue;
                }
                _ => {
                    strange(StrangeKind::SpecialFile, refused(entries::stray_named(name, file_type)));
                    continue;
                }
            }
            if reserved {
                if !(is_root && (name == KEY_METADATA || name == MANIFEST)) {
                    strange(StrangeKind::ReservedName, None);
                }
            } else if name::check(name).is_err() {
                let error = Error::corrupt(format!("a snapshot cannot contain the name {name:?}"));
                strange(StrangeKind::BadName, Some(error));
            } else if file_type == FileType::RegularFile {
                found.fragments.push(name.to_owned());
            } else {
                found.namespaces.push(name.to_owned());
            }
        }
        found.fragments.sort_unstable();
        found.namespaces.sort_unstable();
        Ok((found, opened))
    }
}

fn of_stat(path: SnapshotPath, stat: &Stat) -> StoredFragment {
    // 64 bits of seconds before or after 1970 may be more than the system's time can be.
    let nanos = Duration::from_nanos(stat.st_mtime_nsec);
    let modified = match u64::try_from(stat.st_mtime) {
        Ok(seconds) => UNIX_EPOCH.checked_add(Duration::from_secs(seconds)),
        Err(_) => UNIX_EPOCH.checked_sub(Duration::from_secs(stat.st_mtime.unsigned_abs())),
    };
    StoredFragment {
        path,
        stored_size: u64::try_from(stat.st_size).unwrap_or(0),
        modified: modified.and_then(|time| time.checked_add(nanos)).unwrap_or(UNIX_EPOCH),
        finished: !entries::is_unfinished(stat),
    }
}
