//! The identity of somebody who did not say which: looked for in the environment and in a file of the user's own.

use std::ffi::OsString;
use std::fs::{DirBuilder, File};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use zeroize::Zeroizing;

use super::age;
use super::identity::{OTHERS, read_file};
use crate::cipher::fill_random;
use crate::durability;
use crate::error::{Error, Kind, Result};

const TEXT_VARIABLE: &str = "VMSNAP_IDENTITY";
const FILE_VARIABLE: &str = "VMSNAP_IDENTITY_FILE";
const CREDENTIALS_VARIABLE: &str = "CREDENTIALS_DIRECTORY";

/// A credential of systemd's belongs to the service; an access control list shows as bits of the group.
const STRANGERS: u32 = 0o007;

/// An identity, or several, as a text.
pub(crate) struct Found {
    pub(super) content: Zeroizing<Vec<u8>>,
    /// As errors name it.
    pub(super) place: String,
    /// Where it has just been made.
    pub(crate) made_at: Option<PathBuf>,
}

impl Found {
    fn at(path: &Path, content: Zeroizing<Vec<u8>>) -> Self {
        Self { content, place: place(path), made_at: None }
    }
}

/// The default identity; an error that tells all places where there is none.
pub(super) fn find() -> Result<Found> {
    look()?.ok_or_else(|| {
        let own = own_file().map_or_else(|_| "a home folder".to_owned(), |path| path.display().to_string());
        Error::new(
            Kind::KeyUnavailable,
            format!(
                "no key was passed, and there is no identity in ${TEXT_VARIABLE}, ${FILE_VARIABLE}, \
                 ${CREDENTIALS_VARIABLE}/vmsnap-identity or {own}: pass what it was written with"
            ),
        )
    })
}

/// The default identity, made where there is none.
pub(super) fn find_or_make() -> Result<Found> {
    match look()? {
        Some(found) => Ok(found),
        None => make(&own_file()?),
    }
}

fn look() -> Result<Option<Found>> {
    if let Some(text) = variable(TEXT_VARIABLE) {
        let place = format!("${TEXT_VARIABLE}");
        let text = text.into_string().map_err(|_| Error::invalid_argument(format!("{place} is not UTF-8")))?;
        return Ok(Some(Found { content: Zeroizing::new(text.into_bytes()), place, made_at: None }));
    }
    if let Some(path) = variable(FILE_VARIABLE) {
        let path = PathBuf::from(path);
        let place = format!("{} (from ${FILE_VARIABLE})", place(&path));
        let content = read_file(&path, OTHERS).map_err(|error| error.context(&place))?;
        return Ok(Some(Found { content, place, made_at: None }));
    }
    if let Some(folder) = variable(CREDENTIALS_VARIABLE)
        && let Some(found) = read_if_there(&Path::new(&folder).join("vmsnap-identity"), STRANGERS)?
    {
        return Ok(Some(found));
    }
    match own_file() {
        Ok(path) => read_if_there(&path, OTHERS),
        Err(_) => Ok(None),
    }
}

fn variable(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

fn place(path: &Path) -> String {
    format!("the identity file {}", path.display())
}

fn read_if_there(path: &Path, forbidden: u32) -> Result<Option<Found>> {
    match read_file(path, forbidden) {
        Ok(content) => Ok(Some(Found::at(path, content))),
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
    // The specification of these folders tells to ignore a relative one.
    let set = |name| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let config = set("XDG_CONFIG_HOME").or_else(|| Some(set("HOME")?.join(".config"))).ok_or_else(|| {
        Error::new(
            Kind::KeyUnavailable,
            format!("neither $XDG_CONFIG_HOME nor $HOME says where an identity may be kept: set ${FILE_VARIABLE}, or pass a key"),
        )
    })?;
    Ok(config.join("vmsnap").join("identity.txt"))
}

/// Makes an identity at `path`, or finds the one that another process has made there meanwhile.
fn make(path: &Path) -> Result<Found> {
    let failed = |error: std::io::Error| {
        Error::io(format!("cannot make {}; set ${FILE_VARIABLE}, or pass a key", place(path)), error)
    };
    let (identity, recipient) = age::generate()?;
    let content = Zeroizing::new(age::identity_file(&identity, &recipient).into_bytes());
    let folder = path.parent().unwrap_or(path);
    DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;

    // Under a name of its own until it is whole, so that nobody reads a part of it.
    let mut number = [0; 8];
    fill_random(&mut number)?;
    let unfinished = folder.join(format!(".vmsnap-{:016x}", u64::from_ne_bytes(number)));
    let written = write_new(&unfinished, &content).and_then(|()| {
        match renameat_with(CWD, &unfinished, CWD, path, RenameFlags::NOREPLACE) {
            // A file system that does not know how to.
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => std::fs::hard_link(&unfinished, path),
            renamed => renamed.map_err(Into::into),
        }
    });
    let _ = std::fs::remove_file(&unfinished);
    match written {
        Ok(()) => {
            File::open(folder).and_then(|opened| Ok(durability::sync_directory(opened)?)).map_err(failed)?;
            Ok(Found { made_at: Some(path.to_owned()), ..Found::at(path, content) })
        }
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            read_file(path, OTHERS).map(|content| Found::at(path, content)).map_err(|error| error.context(place(path)))
        }
        Err(error) => Err(failed(error)),
    }
}

fn write_new(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(content)?;
    file.sync_all()
}
