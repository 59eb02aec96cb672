//! The objects of one snapshot, for tasks of the runtime.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::StreamExt;
use object_store::path::Path;
use object_store::{
    Attribute, Attributes, GetOptions, GetRange, GetResult, MultipartId, PutMode, PutMultipartOptions, PutOptions,
    PutPayload, PutResult, UpdateVersion,
};

use super::connect::{Connection, PartStore, connection};
use super::errors::{self, Event};
use super::settings::Settings;
use crate::error::{Error, Kind, Result};
use crate::location::{Scheme, StoreUrl};
use crate::name::shown;

pub(crate) use object_store::multipart::PartId as Part;

/// All three clouds limit the name of an object, which includes the prefix.
const MAX_KEY_BYTES: usize = 1024;

/// More objects than any snapshot has. A longer list is not read to its end.
const MAX_LISTED: usize = 1 << 20;

/// The attempts to create an object that seems to exist, and is not there.
const CREATE_ATTEMPTS: u32 = 5;
const CREATE_PAUSE: Duration = Duration::from_millis(if cfg!(test) { 1 } else { 100 });

/// An object that another process created is read up to this size.
const MAX_OTHER_BYTES: u64 = 1 << 20;

/// The objects below one prefix.
#[derive(Clone)]
pub(crate) struct Objects {
    connection: Arc<Connection>,
    prefix: Arc<str>,
    scheme: Scheme,
}

/// The part of an object to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// These bytes, all of which must be there.
    Range(Range<u64>),
    /// All bytes, if they are not more than this.
    Whole { max_bytes: u64 },
}

/// The version of an object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Version {
    pub(crate) etag: Option<String>,
    /// The generation, in stores that have that.
    pub(super) version: Option<String>,
}

/// An object or a part of it, as it was read.
#[derive(Clone, Debug)]
pub(crate) struct Got {
    pub(crate) bytes: Bytes,
    /// The size of the whole object.
    pub(crate) size: u64,
    pub(crate) version: Version,
}

/// An object, without its contents.
#[derive(Clone, Debug)]
pub(crate) struct Headed {
    pub(crate) size: u64,
    pub(crate) version: Version,
    attributes: Attributes,
}

/// An object in a list. Its name is not checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listed {
    pub(crate) name: String,
    pub(crate) size: u64,
    pub(crate) modified: SystemTime,
}

/// The outcome of an exclusive step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Created {
    /// The object is new.
    New,
    /// An object with the same bytes is there. Usually an earlier attempt made it, whose answer was lost.
    Same,
    /// Another object is there. Its bytes, unless they are more than 1 MiB.
    Other(Option<Bytes>),
}

/// An object that is written in parts.
#[derive(Clone, Debug)]
pub(crate) struct Upload {
    path: Path,
    id: MultipartId,
    attributes: Attributes,
}

impl Headed {
    /// The value that a writer gave the object under this name.
    pub(crate) fn metadata(&self, name: &'static str) -> Option<&str> {
        self.attributes.get(&Attribute::Metadata(name.into())).map(|value| &**value)
    }
}

impl Objects {
    pub(super) fn new(url: &StoreUrl, settings: &Settings) -> Result<Self> {
        Ok(Self { connection: connection(settings)?, prefix: url.prefix().into(), scheme: url.scheme() })
    }

    fn store(&self) -> Result<&dyn PartStore> {
        if !self.connection.is_usable() {
            let text = "the connection was made before this process was forked; open the snapshot again";
            return Err(Error::new(Kind::State, text));
        }
        Ok(self.connection.store())
    }

    fn failed(&self, doing: &str, error: &object_store::Error) -> Error {
        errors::of_request(doing, error, &self.connection.settings)
    }

    /// Checks that an object can have this name, before anything is sent.
    ///
    /// # Errors
    ///
    /// `InvalidArgument` for a name that a store changes or cannot list.
    pub(crate) fn check_name(&self, name: &str) -> Result<()> {
        self.key(name).map(drop)
    }

    fn key(&self, name: &str) -> Result<Path> {
        let key = format!("{}/{name}", self.prefix);
        let reason = if key.chars().any(char::is_control) {
            "it contains a control character"
        } else if key.len() > MAX_KEY_BYTES {
            "with its prefix it is longer than 1024 bytes"
        } else if self.scheme == Scheme::Az && key.split('/').any(|part| part.ends_with('.') || part.contains('\\')) {
            "Azure drops a '.' at the end, and takes '\\' for '/'"
        } else if name.is_empty() || name.ends_with('/') {
            "it ends without a name"
        } else {
            match Path::parse(&key) {
                Ok(path) if path.as_ref() == key => return Ok(path),
                _ => "the store would change it",
            }
        };
        let text = format!("{} cannot be the name of an object in a bucket: {reason}", shown(name));
        Err(Error::invalid_argument(text))
    }

    /// Reads an object or a part of it.
    pub(crate) async fn get(&self, name: &str, wanted: Wanted, version: Option<&Version>) -> Result<Got> {
        let key = self.key(name)?;
        match self.try_get(&key, &wanted, version).await {
            Ok(got) => Ok(got),
            Err(Failure::Client(error)) => Err(self.failed("cannot be read", &error)),
            Err(Failure::Own(error)) => Err(error),
        }
    }

    /// Reads an object or a part of it. `None` if it is absent.
    pub(crate) async fn get_if_present(&self, name: &str, wanted: Wanted) -> Result<Option<Got>> {
        let key = self.key(name)?;
        match self.try_get(&key, &wanted, None).await {
            Ok(got) => Ok(Some(got)),
            Err(Failure::Client(error)) if errors::event(&error) == Event::Absent => Ok(None),
            Err(Failure::Client(error)) => Err(self.failed("cannot be read", &error)),
            Err(Failure::Own(error)) => Err(error),
        }
    }

    async fn try_get(
        &self,
        key: &Path,
        wanted: &Wanted,
        version: Option<&Version>,
    ) -> std::result::Result<Got, Failure> {
        let store = self.store()?;
        let etag = version.and_then(|version| version.etag.as_ref());
        let range = match wanted {
            Wanted::Range(range) if range.is_empty() => {
                return Err(Error::invalid_argument("an empty range cannot be read").into());
            }
            Wanted::Range(range) => Some(GetRange::Bounded(range.clone())),
            Wanted::Whole { .. } => None,
        };
        let result =
            store.get_opts(key, GetOptions { range, if_match: etag.cloned(), ..GetOptions::default() }).await?;
        let (size, found) = (result.meta.size, Version::of_object(&result));
        // A server may ignore If-Match.
        if etag.is_some() && found.etag.as_ref() != etag {
            return Err(Error::corrupt("cannot be read: it was replaced by another version meanwhile").into());
        }
        let expected = match wanted {
            Wanted::Range(range) if result.range == *range => range.end - range.start,
            Wanted::Range(_) => {
                return Err(Error::corrupt(format!("cannot be read: it has only {size} bytes")).into());
            }
            Wanted::Whole { max_bytes } if size > *max_bytes => {
                let text = format!("cannot be read: it has {size} bytes, and at most {max_bytes} are allowed");
                return Err(Error::corrupt(text).into());
            }
            Wanted::Whole { .. } => size,
        };
        Ok(Got { bytes: collect(result, expected).await?, size, version: found })
    }

    /// Looks an object up without reading it. `None` if it is absent, or if the bucket is.
    pub(crate) async fn head(&self, name: &str) -> Result<Option<Headed>> {
        let key = self.key(name)?;
        let options = GetOptions { head: true, ..GetOptions::default() };
        match self.store()?.get_opts(&key, options).await {
            Ok(result) => Ok(Some(Headed {
                size: result.meta.size,
                version: Version::of_object(&result),
                attributes: result.attributes,
            })),
            Err(error) if errors::event(&error) == Event::Absent => Ok(None),
            Err(error) => Err(self.failed("cannot be looked up", &error)),
        }
    }

    /// Creates an object that must not exist yet, in one exclusive step.
    ///
    /// The client repeats a request whose answer was lost, and then finds its own object; and S3 reports a conflict of two
    /// requests as if the object existed. So the existing object is read and compared.
    pub(crate) async fn create(&self, name: &str, bytes: Bytes) -> Result<Created> {
        const DOING: &str = "cannot be created";
        let key = self.key(name)?;
        let mut attempt = 1;
        loop {
            let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
            let put = self.store()?.put_opts(&key, PutPayload::from(bytes.clone()), options).await;
            let Err(error) = put else { return Ok(Created::New) };
            if !matches!(errors::event(&error), Event::Exists | Event::Transient) {
                return Err(self.failed(DOING, &error));
            }
            match self.head(name).await? {
                Some(found) if found.size > MAX_OTHER_BYTES.max(bytes.len() as u64) => return Ok(Created::Other(None)),
                Some(found) => {
                    let got = self.get_if_present(name, Wanted::Whole { max_bytes: found.size }).await?;
                    match got {
                        Some(got) if got.bytes == bytes => return Ok(Created::Same),
                        Some(got) if got.size > MAX_OTHER_BYTES => return Ok(Created::Other(None)),
                        Some(got) => return Ok(Created::Other(Some(got.bytes))),
                        None => {}
                    }
                }
                None => {}
            }
            if attempt == CREATE_ATTEMPTS {
                return Err(match errors::event(&error) {
                    Event::Exists => {
                        let text =
                            format!("{DOING}: the store says that it exists, and does not find it; try again later");
                        Error::transient(text, rustix::io::Errno::IO)
                    }
                    _ => self.failed(DOING, &error),
                });
            }
            tokio::time::sleep(CREATE_PAUSE * 2_u32.pow(attempt)).await;
            attempt += 1;
        }
    }

    /// Writes an object in one step, over an existing one. With `replaced`, only over that version.
    pub(crate) async fn put(
        &self,
        name: &str,
        bytes: Bytes,
        attributes: Attributes,
        replaced: Option<Version>,
    ) -> Result<Version> {
        const DOING: &str = "cannot be written";
        let key = self.key(name)?;
        let is_conditional = replaced.is_some();
        let mode = replaced.map_or(PutMode::Overwrite, |version| {
            PutMode::Update(UpdateVersion { e_tag: version.etag, version: version.version })
        });
        let options = PutOptions { mode, attributes, ..PutOptions::default() };
        let error = match self.store()?.put_opts(&key, PutPayload::from(bytes.clone()), options).await {
            Ok(result) => return Ok(Version::of_put(result)),
            Err(error) => error,
        };
        let event = errors::event(&error);
        // The answer of an attempt that succeeded may have been lost.
        if is_conditional && matches!(event, Event::Changed | Event::Exists | Event::Transient) {
            let whole = Wanted::Whole { max_bytes: bytes.len() as u64 };
            if let Ok(Some(got)) = self.get_if_present(name, whole).await
                && got.bytes == bytes
            {
                return Ok(got.version);
            }
            if event != Event::Transient {
                return Err(errors::replaced(DOING));
            }
        }
        Err(self.failed(DOING, &error))
    }

    /// Lists everything below the prefix.
    pub(crate) async fn list(&self) -> Result<Vec<Listed>> {
        const DOING: &str = "the objects cannot be listed";
        let prefix = Path::parse(&*self.prefix)
            .map_err(|_| Error::invalid_argument(format!("{} cannot be a prefix in a bucket", shown(&self.prefix))))?;
        let mut stream = self.store()?.list(Some(&prefix));
        let mut listed = Vec::new();
        while let Some(meta) = stream.next().await {
            let meta = meta.map_err(|error| self.failed(DOING, &error))?;
            let name = meta.location.as_ref().strip_prefix(&*self.prefix).and_then(|name| name.strip_prefix('/'));
            // An object with the name of the prefix itself stands for a directory, in stores that show some.
            let Some(name) = name.filter(|name| !name.is_empty()) else { continue };
            if listed.len() == MAX_LISTED {
                return Err(Error::corrupt(format!("{DOING}: there are more than {MAX_LISTED} below the prefix")));
            }
            listed.push(Listed { name: name.to_owned(), size: meta.size, modified: meta.last_modified.into() });
        }
        Ok(listed)
    }

    /// Removes objects, in no order. An absent one is removed already.
    pub(crate) async fn delete(&self, names: &[String]) -> Result<()> {
        let keys = names.iter().map(|name| self.key(name)).collect::<Result<Vec<_>>>()?;
        let mut stream = self.store()?.delete_stream(futures_util::stream::iter(keys.into_iter().map(Ok)).boxed());
        let mut first_error = None;
        while let Some(removed) = stream.next().await {
            if let Err(error) = removed
                && errors::event(&error) != Event::Absent
            {
                first_error.get_or_insert(error);
            }
        }
        first_error.map_or(Ok(()), |error| Err(self.failed("an object cannot be removed", &error)))
    }

    /// Begins an object that is written in parts. It exists once the upload is completed.
    pub(crate) async fn begin_upload(&self, name: &str, attributes: Attributes) -> Result<Upload> {
        let path = self.key(name)?;
        // The client does not store attributes of an object in parts in Azure. Then a push cannot tell that it is whole.
        let attributes = if self.scheme == Scheme::Az { Attributes::new() } else { attributes };
        let options = PutMultipartOptions { attributes: attributes.clone(), ..PutMultipartOptions::default() };
        let id = self.store()?.create_multipart_opts(&path, options).await;
        let id = id.map_err(|error| self.failed("an upload cannot be begun", &error))?;
        Ok(Upload { path, id, attributes })
    }

    /// Sends one part, in any order. All parts but the last have the same size.
    pub(crate) async fn put_part(&self, upload: &Upload, index: usize, data: PutPayload) -> Result<Part> {
        let sent = self.store()?.put_part(&upload.path, &upload.id, index, data).await;
        sent.map_err(|error| self.failed("a part cannot be written", &error))
    }

    /// Makes the object of its parts; `size` is the sum of their sizes.
    pub(crate) async fn complete_upload(&self, upload: &Upload, parts: Vec<Part>, size: u64) -> Result<()> {
        let completed = self.store()?.complete_multipart(&upload.path, &upload.id, parts).await;
        let Err(error) = completed else { return Ok(()) };
        // The answer of an attempt that succeeded may have been lost: then the store does not know the upload any more.
        if matches!(errors::event(&error), Event::Absent | Event::Transient) {
            let options = GetOptions { head: true, ..GetOptions::default() };
            if let Ok(found) = self.store()?.get_opts(&upload.path, options).await
                && found.meta.size == size
                && upload.attributes.iter().all(|(name, value)| found.attributes.get(name) == Some(value))
            {
                return Ok(());
            }
        }
        Err(self.failed("an upload cannot be completed", &error))
    }

    /// Gives an upload up. The store removes its parts.
    pub(crate) async fn abort_upload(&self, upload: &Upload) -> Result<()> {
        match self.store()?.abort_multipart(&upload.path, &upload.id).await {
            Err(error) if errors::event(&error) != Event::Absent => {
                Err(self.failed("an upload cannot be given up", &error))
            }
            _ => Ok(()),
        }
    }
}

impl Version {
    fn of_object(result: &GetResult) -> Self {
        Self { etag: result.meta.e_tag.clone(), version: result.meta.version.clone() }
    }

    fn of_put(result: PutResult) -> Self {
        Self { etag: result.e_tag, version: result.version }
    }
}

/// Why an object was not read: an error of the client, which may mean that it is absent, or another error.
enum Failure {
    Client(object_store::Error),
    Own(Error),
}

impl From<object_store::Error> for Failure {
    fn from(error: object_store::Error) -> Self {
        Self::Client(error)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Own(error)
    }
}

/// Reads exactly the expected number of bytes.
async fn collect(result: GetResult, expected: u64) -> std::result::Result<Bytes, Failure> {
    let length = usize::try_from(expected).map_err(|_| Error::corrupt("cannot be read: it is too large"))?;
    let mut stream = result.into_stream();
    let mut first = Bytes::new();
    let mut rest = Vec::new();
    while let Some(chunk) = stream.next().await {
        let chunk = chunk?;
        if chunk.len() > length - first.len().max(rest.len()) {
            return Err(Error::corrupt("cannot be read: the server sent more than was asked for").into());
        }
        if rest.is_empty() && first.is_empty() {
            // A small answer is one chunk, which need not be copied.
            first = chunk;
            continue;
        }
        if rest.is_empty() {
            crate::buffer::reserve(&mut rest, length)?;
            rest.extend_from_slice(&first);
        }
        rest.extend_from_slice(&chunk);
    }
    let bytes = if rest.is_empty() { first } else { Bytes::from(rest) };
    if bytes.len() == length {
        return Ok(bytes);
    }
    let text = format!("cannot be read: the answer ended after {} of {length} bytes; try again", bytes.len());
    Err(Error::transient(text, rustix::io::Errno::IO).into())
}
