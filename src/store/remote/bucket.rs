//! The objects of one snapshot, for threads that wait.

use bytes::Bytes;
use object_store::Attributes;
use serde::{Deserialize, Serialize};

use super::objects::{Created, Got, Headed, Listed, Objects, Version, Wanted};
use super::runtime;
use super::settings::Settings;
use crate::error::{Error, Result};
use crate::location::StoreUrl;
use crate::store::RemoteOptions;
use crate::threads::Interrupt;

/// The most requests with a body that a caller may ask for at once.
const MOST_CONNECTIONS: usize = 256;

/// The objects below one prefix. The name of an object does not include the prefix: `vmsnap_manifest`, `devices/vcpu0`.
///
/// It connects on first use, once a process, and works in a forked child and in another process. Errors do not name the
/// snapshot; they name the bucket where that is the cause.
#[derive(Clone, Serialize, Deserialize)]
#[serde(try_from = "Named", into = "Named")]
pub(crate) struct Bucket {
    url: StoreUrl,
    options: RemoteOptions,
    settings: Settings,
}

/// The form in which it is serialized. Another process reads its own environment.
#[derive(Serialize, Deserialize)]
struct Named {
    url: StoreUrl,
    options: RemoteOptions,
}

impl Bucket {
    /// Checks the options. Nothing is sent.
    ///
    /// # Errors
    ///
    /// `InvalidArgument` for an option that is unknown or does not fit the others.
    pub(crate) fn new(url: StoreUrl, options: RemoteOptions) -> Result<Self> {
        if !(1..=MOST_CONNECTIONS).contains(&options.connections) {
            let text = format!("the number of connections must be from 1 to {MOST_CONNECTIONS}");
            return Err(Error::invalid_argument(text));
        }
        let settings = Settings::new(&url, &options)?;
        Ok(Self { url, options, settings })
    }

    pub(crate) fn url(&self) -> &StoreUrl {
        &self.url
    }

    pub(crate) fn options(&self) -> &RemoteOptions {
        &self.options
    }

    /// The same objects for tasks of the runtime. Connects if this process has no connection yet.
    ///
    /// # Errors
    ///
    /// `Io` with `EACCES` if there are no credentials, `InvalidArgument` for settings that cannot work.
    pub(crate) fn objects(&self) -> Result<Objects> {
        Objects::new(&self.url, &self.settings)
    }

    /// Reads an object or a part of it.
    ///
    /// # Errors
    ///
    /// `Io` with `ENOENT` if it is absent. `Corrupt` if it is another version than the expected one, or if the server
    /// sent another range than the wanted one.
    pub(crate) fn get(
        &self,
        name: &str,
        wanted: Wanted,
        version: Option<&Version>,
        interrupt: &mut Interrupt<'_>,
    ) -> Result<Got> {
        let (objects, name, version) = (self.objects()?, name.to_owned(), version.cloned());
        runtime::run(async move { objects.get(&name, wanted, version.as_ref()).await }, interrupt)
    }

    /// Reads several objects at once. An absent one is `None`.
    pub(crate) fn get_many(
        &self,
        wanted: &[(&str, Wanted)],
        interrupt: &mut Interrupt<'_>,
    ) -> Result<Vec<Result<Option<Got>>>> {
        let objects = self.objects()?;
        let tasks = wanted.iter().map(|(name, wanted)| {
            let (objects, name, wanted) = (objects.clone(), (*name).to_owned(), wanted.clone());
            runtime::spawn(async move { objects.get_if_present(&name, wanted).await })
        });
        let tasks = tasks.collect::<Result<Vec<_>>>()?;
        let mut answers = Vec::with_capacity(tasks.len());
        for task in tasks {
            match task.wait(interrupt) {
                Err(error) if error.is_interrupted() => return Err(error),
                answer => answers.push(answer),
            }
        }
        Ok(answers)
    }

    /// Looks an object up without reading it. `None` if it is absent.
    pub(crate) fn head(&self, name: &str, interrupt: &mut Interrupt<'_>) -> Result<Option<Headed>> {
        let (objects, name) = (self.objects()?, name.to_owned());
        runtime::run(async move { objects.head(&name).await }, interrupt)
    }

    /// Creates an object that must not exist yet, in one exclusive step.
    pub(crate) fn create(&self, name: &str, bytes: Bytes, interrupt: &mut Interrupt<'_>) -> Result<Created> {
        let (objects, name) = (self.objects()?, name.to_owned());
        runtime::run(async move { objects.create(&name, bytes).await }, interrupt)
    }

    /// Writes an object in one step, over an existing one. With `replaced`, only over that version.
    ///
    /// # Errors
    ///
    /// `State` if the object is not that version any more.
    pub(crate) fn put(
        &self,
        name: &str,
        bytes: Bytes,
        attributes: Attributes,
        replaced: Option<&Version>,
        interrupt: &mut Interrupt<'_>,
    ) -> Result<Version> {
        let (objects, name, replaced) = (self.objects()?, name.to_owned(), replaced.cloned());
        runtime::run(async move { objects.put(&name, bytes, attributes, replaced).await }, interrupt)
    }

    /// Lists everything below the prefix.
    pub(crate) fn list(&self, interrupt: &mut Interrupt<'_>) -> Result<Vec<Listed>> {
        let objects = self.objects()?;
        runtime::run(async move { objects.list().await }, interrupt)
    }

    /// Removes objects, in no order. An absent one is removed already.
    pub(crate) fn delete(&self, names: &[String], interrupt: &mut Interrupt<'_>) -> Result<()> {
        let (objects, names) = (self.objects()?, names.to_vec());
        runtime::run(async move { objects.delete(&names).await }, interrupt)
    }
}

impl From<Bucket> for Named {
    fn from(bucket: Bucket) -> Self {
        Self { url: bucket.url, options: bucket.options }
    }
}

impl TryFrom<Named> for Bucket {
    type Error = Error;

    fn try_from(named: Named) -> Result<Self> {
        Self::new(named.url, named.options)
    }
}

impl std::fmt::Debug for Bucket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bucket").field("url", &self.url).field("options", &self.options).finish_non_exhaustive()
    }
}
