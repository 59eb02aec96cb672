//! The location of a snapshot: a path, or a URL in an object store.

mod local;
mod url;

use std::fmt;
use std::path::Path;

use crate::error::{Error, Result};

pub(crate) use local::LocalPath;
#[cfg(feature = "object-store")]
pub(crate) use url::Scheme;
pub(crate) use url::StoreUrl;

/// The location of a snapshot, as a caller names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Location {
    Path(LocalPath),
    Url(StoreUrl),
}

impl Location {
    /// The location that a caller names by a path, or by a text that begins with `scheme://`. A `file` URL is a path.
    pub(crate) fn new(named: &Path) -> Result<Self> {
        match url::split_scheme(named) {
            None => LocalPath::new(named).map(Self::Path),
            Some(("file", rest)) => LocalPath::new(&url::file_path(rest)?).map(Self::Path),
            Some((scheme, rest)) => StoreUrl::parse(scheme, rest).map(Self::Url),
        }
    }

    /// The location as a path, or as the text of a URL, which names the same location again.
    pub(crate) fn as_path(&self) -> &Path {
        match self {
            Self::Path(path) => path.path(),
            Self::Url(url) => url.path(),
        }
    }

    /// The path in the local file system, where only that will do: `what` is done with files.
    ///
    /// # Errors
    ///
    /// `InvalidArgument` for a URL.
    pub(crate) fn local(self, what: &str) -> Result<LocalPath> {
        match self {
            Self::Path(path) => Ok(path),
            Self::Url(url) => {
                let text = format!("{url} is in an object store: {what} needs a snapshot at a local path");
                Err(Error::invalid_argument(text))
            }
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.fmt(f),
            Self::Url(url) => url.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::url::Scheme;
    use super::*;

    fn refused(text: &str) -> String {
        let error = Location::new(Path::new(text)).unwrap_err();
        assert!(error.is_invalid_argument(), "{error}");
        error.to_string()
    }

    #[test]
    fn a_text_with_a_scheme_is_a_url_and_all_else_is_a_path() {
        for text in ["s3://bucket/vm1", "gs://b/a/b", "az://container/x y/%41", "memory://tests/vm1"] {
            let Location::Url(url) = Location::new(Path::new(text)).unwrap() else { panic!("{text}") };
            assert_eq!(url.to_string(), text);
            assert_eq!(url.path(), Path::new(text));
        }
        for (text, path) in [("/a/s3:/x", "/a/s3:/x"), ("file:///a/b", "/a/b"), ("file://localhost/a/%20b", "/a/ b")] {
            let location = Location::new(Path::new(text)).unwrap();
            assert_eq!(location.local("a test").unwrap().path(), Path::new(path));
        }
        let relative = Location::new(Path::new("s3:/bucket")).unwrap().local("a test").unwrap();
        assert!(relative.path().ends_with("s3:/bucket") && relative.path().is_absolute());
    }

    #[test]
    fn a_url_is_normalised() {
        let Location::Url(url) = Location::new(Path::new("S3://bucket/a/b/")).unwrap() else { panic!() };
        assert_eq!((url.scheme(), url.bucket(), url.prefix()), (Scheme::S3, "bucket", "a/b"));
        assert_eq!(url.to_string(), "s3://bucket/a/b");
    }

    #[test]
    fn a_url_with_a_secret_is_refused_and_not_shown() {
        for text in ["s3://key:secret@bucket/vm1", "az://c/vm1?sig=secret", "gs://b/vm1#secret", "file://u:secret@/x"] {
            assert!(!refused(text).contains("secret"), "{text}");
        }
    }

    #[test]
    fn a_url_that_names_no_place_is_refused() {
        assert!(refused("https://host/vm1").contains("s3://"));
        assert!(refused("s3://bucket").contains("prefix"));
        assert!(refused("s3:///vm1").contains("bucket"));
        assert!(refused("s3://bucket/a//b").contains("empty"));
        assert!(refused("s3://bucket/a/../b").contains(".."));
        assert!(refused("s3://bucket/a\nb").contains("control"));
        assert!(refused("s3://bucket:9000/a").contains("endpoint"));
        assert!(refused("file://host/a").contains("host"));
        assert!(refused("file:///a%00b").contains("NUL"));
        assert!(refused("file:///a%zz").contains('%'));
    }

    #[test]
    fn only_a_path_is_local() {
        let error = Location::new(Path::new("s3://bucket/vm1")).unwrap().local("sealing").unwrap_err();
        assert!(error.is_invalid_argument() && error.to_string().contains("sealing needs"), "{error}");
    }
}
