//! The place where a snapshot is kept: a directory, a file that is an archive, or a prefix in an object store.

pub(crate) mod archive;
pub(crate) mod bytes;
#[cfg(test)]
mod contract;
pub(crate) mod directory;
pub(crate) mod pipe;
#[cfg(feature = "object-store")]
#[allow(dead_code, unused_imports, reason = "its writers follow")]
pub(crate) mod remote;
mod remote_options;

use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::location::{LocalPath, Location, StoreUrl};
use crate::manifest::Manifest;
use crate::name::SnapshotPath;
#[cfg(feature = "object-store")]
use crate::threads::Interrupt;
use archive::Archive;
use bytes::{NewObject, ReadAt};
use directory::Directory;
#[cfg(feature = "object-store")]
use remote::Remote;

pub(crate) use remote_options::RemoteOptions;
#[cfg(feature = "object-store")]
pub(crate) use remote_options::{CacheOptions, DEFAULT_CACHE_BYTES};

/// A snapshot, opened to be read.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) enum Store {
    Directory(Directory),
    Archive(Archive),
    #[cfg(feature = "object-store")]
    Remote(Remote),
}

/// The two files at the root of a snapshot. Either may be absent.
pub(crate) struct Head {
    pub(crate) key_metadata: Result<Option<Vec<u8>>>,
    pub(crate) manifest: Result<Option<Vec<u8>>>,
}

/// Everything that is stored of a snapshot, as it looks from outside.
#[derive(Default)]
pub(crate) struct Survey {
    /// All namespaces, each after the one that contains it.
    pub(crate) namespaces: Vec<SnapshotPath>,
    /// All fragments; those of one namespace are adjacent.
    pub(crate) fragments: Vec<StoredFragment>,
    /// Everything that a snapshot does not contain.
    pub(crate) strange: Vec<Strange>,
}

/// A stored fragment.
pub(crate) struct StoredFragment {
    pub(crate) path: SnapshotPath,
    pub(crate) stored_size: u64,
    pub(crate) modified: SystemTime,
    /// Whether its writer has finished it. Only staged snapshots record this.
    pub(crate) finished: bool,
}

/// An entry that is neither a fragment nor a namespace, or something between them.
pub(crate) struct Strange {
    /// Its path. Bytes that are not UTF-8 are replaced by U+FFFD.
    pub(crate) path: String,
    pub(crate) kind: StrangeKind,
    /// The error for it, unless readers leave it out.
    pub(crate) refusal: Option<Error>,
}

#[derive(Clone, Copy)]
pub(crate) enum StrangeKind {
    Link,
    SpecialFile,
    NotUtf8,
    ReservedName,
    BadName,
    /// A namespace that cannot be listed.
    Unreadable,
    /// A fragment whose size cannot be found out.
    NotExamined,
    /// Headers or padding of an archive that differ from the computed ones.
    Changed,
}

impl Survey {
    /// Refuses everything that a reader refuses.
    pub(crate) fn strict(mut self) -> Result<Self> {
        let refusal = self.strange.iter_mut().find_map(|strange| strange.refusal.take());
        refusal.map_or(Ok(self), Err)
    }
}

impl Store {
    /// The snapshot at `location`.
    ///
    /// # Errors
    ///
    /// `InvalidArgument` for a URL, if this build has no object storage.
    pub(crate) fn at(location: Location, options: &RemoteOptions) -> Result<Self> {
        match location {
            Location::Path(path) => Ok(Self::at_path(path)),
            Location::Url(url) => Self::at_url(url, options),
        }
    }

    /// The snapshot at a local path: an archive if that is a file.
    pub(crate) fn at_path(path: LocalPath) -> Self {
        if path.path().is_file() {
            Self::Archive(Archive::new(path))
        } else {
            // If nothing is there, opening the directory reports that.
            Self::Directory(Directory::new(path))
        }
    }

    #[cfg(feature = "object-store")]
    fn at_url(url: StoreUrl, options: &RemoteOptions) -> Result<Self> {
        Remote::new(url, options).map(Self::Remote)
    }

    #[cfg(not(feature = "object-store"))]
    #[allow(clippy::needless_pass_by_value, reason = "as with the feature")]
    fn at_url(url: StoreUrl, _options: &RemoteOptions) -> Result<Self> {
        Err(no_object_storage(&url))
    }

    /// The location, as errors show it.
    pub(crate) fn location(&self) -> &dyn fmt::Display {
        match self {
            Self::Directory(directory) => directory.location(),
            Self::Archive(archive) => archive.location(),
            #[cfg(feature = "object-store")]
            Self::Remote(remote) => remote.url(),
        }
    }

    /// The location as a path, or as the text of a URL, which is a path to all callers that name locations by paths.
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::Directory(directory) => directory.location().path(),
            Self::Archive(archive) => archive.location().path(),
            #[cfg(feature = "object-store")]
            Self::Remote(remote) => remote.url().path(),
        }
    }

    /// The same snapshot for a reader that checks all of it or reads it once: it reads the store, not a local copy.
    pub(crate) fn uncached(self) -> Result<Self> {
        match self {
            #[cfg(feature = "object-store")]
            Self::Remote(remote) => remote.uncached().map(Self::Remote),
            other => Ok(other),
        }
    }

    /// Whether a snapshot without a manifest is one that was never completed, or is being written.
    pub(crate) fn is_always_sealed(&self) -> bool {
        !matches!(self, Self::Directory(_))
    }

    /// Whether the snapshot is in the file system of this machine.
    pub(crate) fn is_local(&self) -> bool {
        matches!(self, Self::Directory(_) | Self::Archive(_))
    }

    /// Reads the key metadata and the manifest.
    #[cfg_attr(not(feature = "object-store"), allow(unused_variables, reason = "local files are read at once"))]
    pub(crate) fn head(&self, interrupt: &mut dyn FnMut() -> Result<()>) -> Result<Head> {
        match self {
            Self::Directory(directory) => directory.head(),
            Self::Archive(archive) => archive.head(),
            #[cfg(feature = "object-store")]
            Self::Remote(remote) => remote.head(&mut Interrupt::new(interrupt)),
        }
    }

    /// Checks that the store can have this manifest.
    pub(crate) fn settle(&self, manifest: &Manifest) -> Result<()> {
        match self {
            Self::Directory(_) => Ok(()),
            Self::Archive(archive) => archive.settle(manifest),
            #[cfg(feature = "object-store")]
            Self::Remote(_) => Ok(()),
        }
    }

    /// Whether the snapshot has a manifest. Nothing of it is read.
    pub(crate) fn is_sealed(&self) -> Result<bool> {
        match self {
            Self::Directory(directory) => directory.is_sealed(),
            Self::Archive(_) => Ok(true),
            #[cfg(feature = "object-store")]
            Self::Remote(remote) => remote.is_sealed(),
        }
    }

    /// Opens a fragment. In an archive, its place follows from the manifest; without it, from unauthenticated headers.
    /// In an object store, its size follows from the manifest.
    pub(crate) fn object(&self, path: &SnapshotPath, manifest: Option<&Manifest>) -> Result<Arc<dyn ReadAt>> {
        match self {
            Self::Directory(directory) => Ok(Arc::new(directory.object(path)?)),
            Self::Archive(archive) => Ok(Arc::new(archive.object(path, manifest)?)),
            #[cfg(feature = "object-store")]
            Self::Remote(remote) => Ok(remote.object(path, manifest)?),
        }
    }

    /// Opens a fragment that a survey found, with the stored size that it found.
    #[cfg_attr(not(feature = "object-store"), allow(unused_variables, reason = "a local file says its size"))]
    pub(crate) fn found_object(
        &self,
        path: &SnapshotPath,
        stored_size: u64,
        manifest: Option<&Manifest>,
    ) -> Result<Arc<dyn ReadAt>> {
        match self {
            #[cfg(feature = "object-store")]
            Self::Remote(remote) => Ok(remote.object_of_size(path, stored_size)?),
            _ => self.object(path, manifest),
        }
    }

    /// Begins to read the first bytes of a fragment that is opened soon, if that saves time. The result must live until
    /// then.
    #[cfg_attr(not(feature = "object-store"), allow(unused_variables, reason = "local files are read at once"))]
    pub(crate) fn begin(&self, path: &SnapshotPath, manifest: Option<&Manifest>) -> Option<Arc<dyn ReadAt>> {
        match self {
            #[cfg(feature = "object-store")]
            Self::Remote(remote) => {
                // An error will come back when the fragment is opened.
                let object = remote.object(path, Some(manifest?)).ok()?;
                object.prefetch(0..1);
                Some(object)
            }
            _ => None,
        }
    }

    /// Finds everything that is there. An archive is compared with its manifest, if that is known.
    pub(crate) fn survey(
        &self,
        manifest: Option<&Manifest>,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Survey> {
        match self {
            Self::Directory(directory) => directory.survey(interrupt),
            Self::Archive(archive) => archive.survey(manifest, interrupt),
            #[cfg(feature = "object-store")]
            Self::Remote(remote) => remote.survey(manifest, &mut Interrupt::new(interrupt)),
        }
    }

    /// Replaces the key metadata: at any moment, also after a crash, the old or the new one is there.
    pub(crate) fn replace_key_metadata(&self, wrapped: &[u8], interrupt: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        match self {
            Self::Directory(directory) => directory.replace_key_metadata(wrapped, &mut || ()),
            Self::Archive(archive) => archive.replace_key_metadata(wrapped, interrupt),
            #[cfg(feature = "object-store")]
            Self::Remote(remote) => remote.replace_key_metadata(wrapped, &mut Interrupt::new(interrupt)),
        }
    }

    /// Removes the snapshot. A snapshot at a local path is not checked: the caller has made it.
    #[cfg_attr(not(feature = "object-store"), allow(unused_variables, reason = "local files are removed at once"))]
    pub(crate) fn remove(&self, interrupt: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        match self {
            Self::Directory(directory) => directory.remove(),
            Self::Archive(archive) => archive.remove(),
            #[cfg(feature = "object-store")]
            Self::Remote(remote) => remote.remove(&mut Interrupt::new(interrupt)),
        }
    }

    /// The directory of a snapshot that is not sealed: only that is listed without a manifest, and added to.
    ///
    /// # Errors
    ///
    /// `Sealed` if the snapshot is an archive, or in an object store.
    pub(crate) fn directory(&self) -> Result<&Directory> {
        let kind = match self {
            Self::Directory(directory) => return Ok(directory),
            Self::Archive(_) => "is an archive, which",
            #[cfg(feature = "object-store")]
            Self::Remote(_) => "is in an object store, where it",
        };
        let text = format!(
            "the snapshot {} {kind} is always sealed: nothing can be added to it; write a new snapshot",
            self.location()
        );
        Err(Error::new(Kind::Sealed, text))
    }
}

/// The error for a URL in a build without object storage.
#[cfg(not(feature = "object-store"))]
pub(crate) fn no_object_storage(url: &StoreUrl) -> Error {
    let text = format!("{url} is in an object store, and this build has no object storage: feature object-store");
    Error::invalid_argument(text)
}

/// A snapshot that is being written, as a handle to write into it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Draft {
    /// It is written at its location.
    InPlace(Directory),
    /// It is written in a hidden directory, and absent until it is committed.
    Staged(Directory),
    /// It is written into an object store, and absent until it is committed.
    #[cfg(feature = "object-store")]
    Upload(remote::SnapshotUpload),
}

impl Draft {
    /// The location, as errors show it.
    pub(crate) fn location(&self) -> &dyn fmt::Display {
        match self {
            Self::InPlace(directory) | Self::Staged(directory) => directory.location(),
            #[cfg(feature = "object-store")]
            Self::Upload(upload) => upload.url(),
        }
    }

    /// The location as a path, or as the text of a URL.
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::InPlace(directory) | Self::Staged(directory) => directory.location().path(),
            #[cfg(feature = "object-store")]
            Self::Upload(upload) => upload.url().path(),
        }
    }

    /// Whether the snapshot is complete or absent.
    pub(crate) fn is_staged(&self) -> bool {
        !matches!(self, Self::InPlace(_))
    }

    /// Writes the key metadata of a new, empty snapshot. Removes the directory if that fails.
    pub(crate) fn write_key_metadata(&self, wrapped: &[u8]) -> Result<()> {
        match self {
            Self::InPlace(directory) | Self::Staged(directory) => directory.write_key_metadata(wrapped),
            #[cfg(feature = "object-store")]
            Self::Upload(upload) => {
                upload.write_key_metadata(wrapped);
                Ok(())
            }
        }
    }

    /// Creates a fragment. `most_bytes` is a bound for its stored size, if that is known: an object store needs it for
    /// large fragments.
    #[cfg_attr(not(feature = "object-store"), allow(unused_variables, reason = "a file grows as needed"))]
    pub(crate) fn create(&self, path: &SnapshotPath, most_bytes: Option<u64>) -> Result<Arc<dyn NewObject>> {
        match self {
            Self::InPlace(directory) => Ok(Arc::new(directory.create(path, false)?)),
            Self::Staged(directory) => Ok(Arc::new(directory.create(path, true)?)),
            #[cfg(feature = "object-store")]
            Self::Upload(upload) => upload.create_object(path, most_bytes),
        }
    }

    /// The local directory for files of the process: that of the snapshot or, for a snapshot in an object store,
    /// `TMPDIR` or `/var/tmp`.
    pub(crate) fn scratch_directory(&self) -> PathBuf {
        match self {
            Self::InPlace(directory) | Self::Staged(directory) => directory.location().path().to_owned(),
            #[cfg(feature = "object-store")]
            Self::Upload(_) => std::env::var_os("TMPDIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from),
        }
    }

    /// Whether a file in the scratch directory must be encrypted even if the snapshot is not, because it is elsewhere.
    pub(crate) fn is_scratch_elsewhere(&self) -> bool {
        !matches!(self, Self::InPlace(_) | Self::Staged(_))
    }

    /// Creates a file without a name in the scratch directory. It is gone when it is closed.
    pub(crate) fn create_nameless(&self) -> Result<File> {
        match self {
            Self::InPlace(directory) | Self::Staged(directory) => directory.create_nameless(),
            #[cfg(feature = "object-store")]
            Self::Upload(_) => {
                directory::entries::create_nameless(&directory::entries::open(&self.scratch_directory(), "")?)
            }
        }
    }

    pub(crate) fn add_namespace(&self, namespace: &SnapshotPath) -> Result<()> {
        match self {
            Self::InPlace(directory) | Self::Staged(directory) => directory.add_namespace(namespace),
            #[cfg(feature = "object-store")]
            Self::Upload(upload) => upload.add_namespace(namespace),
        }
    }

    /// Checks that there is such a namespace.
    pub(crate) fn check_namespace(&self, namespace: &SnapshotPath) -> Result<()> {
        match self {
            Self::InPlace(directory) | Self::Staged(directory) => directory.check_namespace(namespace),
            #[cfg(feature = "object-store")]
            Self::Upload(upload) => upload.check_namespace(namespace),
        }
    }
}
