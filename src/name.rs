//! Names of fragments and namespaces, and their paths in a snapshot.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// A name must fit one file name on every common file system: 255 bytes.
const NAME_MAX_BYTES: usize = 255;

/// The prefix of vmsnap's own names: staged directories, temporary files, and files of later versions.
const RESERVED_PREFIX: &str = ".vmsnap";

/// The file with the wrapped data key, at the root of an encrypted snapshot.
pub(crate) const KEY_METADATA: &str = "enc_metadata";

/// A larger file is not valid key metadata.
pub(crate) const MAX_KEY_METADATA_BYTES: u64 = 1 << 20;

/// The file with the list of all fragments, at the root of a sealed snapshot.
pub(crate) const MANIFEST: &str = "vmsnap_manifest";

/// Whether `name` is reserved for vmsnap's own files: lists leave it out, and fragments cannot have it.
pub(crate) fn is_reserved(name: &str) -> bool {
    name.starts_with(RESERVED_PREFIX) || name.eq_ignore_ascii_case(KEY_METADATA) || name.eq_ignore_ascii_case(MANIFEST)
}

/// Checks the name of a fragment or a namespace.
///
/// # Errors
///
/// [`Error::is_invalid_argument`] if the name is empty, `.`, `..`, longer than 255 bytes of UTF-8 or reserved, or
/// contains `/`, `\` or NUL.
pub(crate) fn check(name: &str) -> Result<()> {
    let reason = if name.is_empty() {
        "it is empty"
    } else if name == "." || name == ".." {
        "it is a relative path"
    } else if name.len() > NAME_MAX_BYTES {
        "it is longer than 255 bytes of UTF-8"
    } else if name.contains(['/', '\\', '\0']) {
        "it contains '/', '\\' or NUL; nest with add_namespace()"
    } else if is_reserved(name) {
        "it is reserved for vmsnap's own files ('.vmsnap…', 'enc_metadata', 'vmsnap_manifest')"
    } else {
        return Ok(());
    };
    let text = format!("{} cannot be the name of a fragment or namespace: {reason}", shown(name));
    Err(Error::invalid_argument(text))
}

/// A text in quotes, for errors. A text longer than any name is cut off, because it may be a gigabyte long.
pub(crate) fn shown(text: &str) -> String {
    match text.char_indices().nth(NAME_MAX_BYTES) {
        None => format!("{text:?}"),
        Some((end, _)) => format!("{:?}…", &text[..end]),
    }
}

/// The path of a fragment or namespace: checked names joined with `/`, empty for the root itself.
///
/// An encrypted fragment is bound to this text, in UTF-8.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct SnapshotPath(String);

impl SnapshotPath {
    pub(crate) fn join(&self, name: &str) -> Result<Self> {
        check(name)?;
        Ok(if self.0.is_empty() { Self(name.to_owned()) } else { Self(format!("{}/{name}", self.0)) })
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// The path of the namespace that contains it, and its own name.
    pub(crate) fn split(&self) -> (&str, &str) {
        self.0.rsplit_once('/').unwrap_or(("", &self.0))
    }
}

impl TryFrom<String> for SnapshotPath {
    type Error = Error;

    /// Checks a path from outside, of a deserialized handle, like a name.
    fn try_from(text: String) -> Result<Self> {
        if !text.is_empty() {
            text.split('/').try_for_each(check)?;
        }
        Ok(Self(text))
    }
}

impl From<SnapshotPath> for String {
    fn from(path: SnapshotPath) -> Self {
        path.0
    }
}

/// The form in error messages: `fragment "sda" in namespace "disks"`.
impl fmt::Display for SnapshotPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (namespace, name) = self.split();
        if namespace.is_empty() {
            write!(f, "fragment {name:?}")
        } else {
            write!(f, "fragment {name:?} in namespace {namespace:?}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usual_and_unusual_names_are_allowed() {
        for name in ["mem", "vcpu0", "pci 00:1f.2", "...", ".hidden", "é", "e\u{301}", "-x", "a b", "enc_metadata2"] {
            check(name).unwrap();
        }
        check(&"x".repeat(255)).unwrap();
    }

    #[test]
    fn names_that_escape_or_collide_are_refused() {
        let long = "é".repeat(128);
        let bad = [
            "",
            ".",
            "..",
            "/",
            "a/b",
            "/etc",
            "../x",
            "a\\b",
            "a\0b",
            ".vmsnap",
            ".vmsnap-0",
            "enc_metadata",
            "ENC_Metadata",
            "vmsnap_manifest",
            "VMSNAP_MANIFEST",
            &long,
        ];
        for name in bad {
            assert!(check(name).unwrap_err().is_invalid_argument(), "{name:?}");
        }
    }

    #[test]
    fn a_path_from_outside_is_checked_part_by_part() {
        assert_eq!(SnapshotPath::try_from(String::new()).unwrap(), SnapshotPath::default());
        assert_eq!(SnapshotPath::try_from("a/b".to_owned()).unwrap().split(), ("a", "b"));
        for bad in ["../a", "a//b", "/a", "a/", "a/enc_metadata"] {
            assert!(SnapshotPath::try_from(bad.to_owned()).is_err(), "{bad:?}");
        }
    }
}
