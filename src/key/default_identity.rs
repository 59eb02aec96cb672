//! The default identity: found in the environment or in a file of the user.

use std::ffi::OsString;
use std::fs::{DirBuilder, File};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};
use rustix::io::Errno;
use zeroize::Zeroizing;

use super::age;
use super::background::in_background;
use super::identity::plain_text;
use super::new_identity::OnNewIdentity;
use super::secret_file::{OTHERS, STRANGERS, read_secret};
use crate::cipher::fill_random;
use crate::durability;
use crate::error::{Error, Kind, Result};

const TEXT_VARIABLE: &str = "VMSNAP_IDENTITY";
const FILE_VARIABLE: &str = "VMSNAP_IDENTITY_FILE";
const CREDENTIALS_VARIABLE: &str = "CREDENTIALS_DIRECTORY";

type Interrupt<'a> = &'a mut dyn FnMut() -> Result<()>;

/// A text with one or more identities.
pub(crate) struct Found {
    pub(super) content: Zeroizing<Vec<u8>>,
    /// Its name in errors.
    pub(super) place: String,
}

impl Found {
    fn new(content: Zeroizing<Vec<u8>>, place: String) -> Result<Self> {
        match plain_text(content) {
            Ok(content) => Ok(Self { content, place }),
            Err(error) => Err(error.context(place)),
        }
    }
}

/// The default identity. Without one, the error names all places that were searched.
pub(super) fn find(interrupt: Interrupt<'_>) -> Result<Found> {
    look(interrupt)?.ok_or_else(|| {
        let own = own_file().map_or_else(|_| "the home directory".to_owned(), |path| path.display().to_string());
        Error::new(
            Kind::KeyUnavailable,
            format!(
                "no key was passed, and there is no identity in ${TEXT_VARIABLE}, ${FILE_VARIABLE}, \
                 ${CREDENTIALS_VARIABLE}/vmsnap-identity or {own}; pass the key that the snapshot was written with"
            ),
        )
    })
}

/// The default identity, which is made if it does not exist.
pub(super) fn find_or_make(on_new_identity: &OnNewIdentity, interrupt: Interrupt<'_>) -> Result<Found> {
    match look(interrupt)? {
        Some(found) => Ok(found),
        None => make(&own_file()?, on_new_identity, interrupt),
    }
}

fn look(interrupt: Interrupt<'_>) -> Result<Option<Found>> {
    if let Some(text) = variable_of_ours(TEXT_VARIABLE)? {
        let place = format!("${TEXT_VARIABLE}");
        let text = text.into_string().map_err(|_| Error::invalid_argument(format!("{place} is not UTF-8")))?;
        return Found::new(Zeroizing::new(text.into_bytes()), place).map(Some);
    }
    if let Some(path) = variable_of_ours(FILE_VARIABLE)? {
        let path = PathBuf::from(path);
        let place = format!("{} (from ${FILE_VARIABLE})", place(&path));
        let content = read_secret(&path, OTHERS, interrupt).map_err(|error| error.context(&place))?;
        return Found::new(content, place).map(Some);
    }
    // A credential belongs to the service, even if its mode has bits of the group, which stand for an access control
    // list.
    if let Some(folder) = variable(CREDENTIALS_VARIABLE)
        && let Some(found) = read_if_there(&Path::new(&folder).join("vmsnap-identity"), STRANGERS, interrupt)?
    {
        return Ok(Some(found));
    }
    match own_file() {
        Ok(path) => read_if_there(&path, OTHERS, interrupt),
        Err(_) => Ok(None),
    }
}

/// A variable of the system; an empty one counts as unset.
fn variable(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

/// A variable of vmsnap. An empty one is an error: it may come from a command that failed, and another identity must
/// not be used instead.
fn variable_of_ours(name: &str) -> Result<Option<OsString>> {
    match std::env::var_os(name) {
        Some(value) if value.is_empty() => {
            Err(Error::invalid_argument(format!("${name} is set but empty; set it to an identity, or unset it")))
        }
        value => Ok(value),
    }
}

fn place(path: &Path) -> String {
    format!("the identity file {}", path.display())
}

fn read_if_there(path: &Path, forbidden: u32, interrupt: Interrupt<'_>) -> Result<Option<Found>> {
    match read_secret(path, forbidden, interrupt) {
        Ok(content) => Found::new(content, place(path)).map(Some),
        Err(error)
            if [Errno::NOENT, Errno::NOTDIR]
                .map(|errno| Some(errno.raw_os_error()))
                .contains(&error.raw_os_error()) =>
        {
            Ok(None)
        }
        Err(error) => Err(error.context(place(path))),
    }
}

/// `$XDG_CONFIG_HOME/vmsnap/identity.txt`, or the same below `~/.config`.
fn own_file() -> Result<PathBuf> {
    // The XDG specification says to ignore a relative path.
    let set = |name| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let config = set("XDG_CONFIG_HOME").or_else(|| Some(set("HOME")?.join(".config"))).ok_or_else(|| {
        Error::new(
            Kind::KeyUnavailable,
            format!(
                "there is no place for an identity: set $XDG_CONFIG_HOME, $HOME or ${FILE_VARIABLE}, or pass a key"
            ),
        )
    })?;
    Ok(config.join("vmsnap").join("identity.txt"))
}

/// Makes an identity at `path`, or returns the one that another process has made there meanwhile. The callback comes
/// first: if it returns an error, nothing is made.
fn make(path: &Path, on_new_identity: &OnNewIdentity, interrupt: Interrupt<'_>) -> Result<Found> {
    let failed = |error: std::io::Error| {
        Error::io(format!("cannot create {}; set ${FILE_VARIABLE}, or pass a key", place(path)), error)
    };
    let folder = path.parent().unwrap_or(path);
    let missing: Vec<_> = folder.ancestors().take_while(|folder| !folder.exists()).collect();
    // One process at a time, so that only one calls back.
    let mut attempts = 0..100;
    let locked = loop {
        DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
        let locked = lock(File::open(folder).map_err(failed)?, interrupt)?;
        // The previous process may have failed and removed the directory again.
        if is_at(&locked, folder) || attempts.next().is_none() {
            break locked;
        }
    };
    let made = match read_if_there(path, OTHERS, interrupt) {
        Ok(None) => on_new_identity.call(path).and_then(|()| make_in(folder, &locked, path, failed, interrupt)),
        Ok(Some(found)) => Ok(found),
        Err(error) => Err(error),
    };
    if made.is_err() {
        for folder in missing {
            // A directory that is not empty by now stays.
            let _ = std::fs::remove_dir(folder);
        }
    }
    // Explicitly, because a process that was forked meanwhile keeps the descriptor open.
    let _ = flock(&locked, FlockOperation::Unlock);
    made
}

fn make_in(
    folder: &Path,
    locked: &File,
    path: &Path,
    failed: impl Fn(std::io::Error) -> Error,
    interrupt: Interrupt<'_>,
) -> Result<Found> {
    let (identity, recipient) = age::generate()?;
    let content = Zeroizing::new(age::identity_file(&identity, &recipient).into_bytes());
    // Under a temporary name until it is complete, so that no process reads a part of it.
    let mut number = [0; 8];
    fill_random(&mut number)?;
    let unfinished = folder.join(format!(".vmsnap-{:016x}", u64::from_ne_bytes(number)));
    let written = write_new(&unfinished, &content).and_then(|()| {
        match renameat_with(CWD, &unfinished, CWD, path, RenameFlags::NOREPLACE) {
            // The file system does not support this rename.
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => std::fs::hard_link(&unfinished, path),
            renamed => renamed.map_err(Into::into),
        }
    });
    let _ = std::fs::remove_file(&unfinished);
    match written {
        Ok(()) => {
            durability::sync_directory(locked).map_err(|errno| failed(errno.into()))?;
            Found::new(content, place(path))
        }
        // Another process was faster, on a file system without locks.
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            let content = read_secret(path, OTHERS, interrupt).map_err(|error| error.context(place(path)))?;
            Found::new(content, place(path))
        }
        Err(error) => Err(failed(error)),
    }
}

/// Waits for the lock of the directory. Some network file systems have no locks, so several processes may continue.
fn lock(folder: File, interrupt: Interrupt<'_>) -> Result<File> {
    let locked = in_background(None, interrupt, move || {
        let _ = rustix::io::retry_on_intr(|| flock(&folder, FlockOperation::LockExclusive));
        folder
    })?;
    locked.ok_or_else(|| Error::new(Kind::Provider, "a lock took too long"))
}

fn is_at(folder: &File, path: &Path) -> bool {
    match (folder.metadata(), path.metadata()) {
        (Ok(own), Ok(there)) => (own.dev(), own.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

fn write_new(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(content)?;
    file.sync_all()
}
