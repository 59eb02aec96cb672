//! The client of a store, made of a URL, options and the environment.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::mem;
use std::str::FromStr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::memory::InMemory;
use object_store::multipart::MultipartStore;
use object_store::{BackoffConfig, ClientOptions, HeaderValue, ObjectStore, RetryConfig};

use super::settings::Settings;
use super::transport::Connector;
use super::{credentials, errors};
use crate::error::Result;
use crate::location::Scheme;
use crate::process::{OwnerProcess, PerProcess};
use crate::threads::lock;

/// The most idle connections that a process keeps for later calls. Each has its own pool of sockets.
const MOST_KEPT: usize = 16;

/// A request is repeated this many times, after waits of up to 0.1 s, 0.2 s, 0.4 s, ...: 13 s in all.
const RETRIES: usize = 7;
const FIRST_BACKOFF: Duration = Duration::from_millis(if cfg!(test) { 1 } else { 100 });
const LONGEST_BACKOFF: Duration = Duration::from_secs(10);
const LONGEST_RETRYING: Duration = Duration::from_secs(180);

/// A store with uploads whose parts may come in any order.
pub(crate) trait PartStore: ObjectStore + MultipartStore {}

impl<T: ObjectStore + MultipartStore> PartStore for T {}

/// The client of one bucket in this process.
pub(super) struct Connection {
    store: Arc<dyn PartStore>,
    pub(super) settings: Settings,
    owner: OwnerProcess,
}

impl Connection {
    pub(super) fn store(&self) -> &dyn PartStore {
        &*self.store
    }

    pub(super) fn is_usable(&self) -> bool {
        self.owner.is_current()
    }
}

/// In a forked child the client is leaked: it would talk to threads that are not there.
impl Drop for Connection {
    fn drop(&mut self) {
        if !self.owner.is_current() {
            mem::forget(Arc::clone(&self.store));
        }
    }
}

/// The connections of this process; the one used last is the last.
static CONNECTIONS: PerProcess<Mutex<Vec<Arc<Connection>>>> = PerProcess::new();

/// The stores of `memory://`, which live as long as the process.
static MEMORY: PerProcess<Mutex<BTreeMap<String, Arc<InMemory>>>> = PerProcess::new();

/// The connection with these settings. Nothing is sent.
///
/// # Errors
///
/// `Io` with `EACCES` if there are no credentials; `InvalidArgument` for settings that cannot work.
pub(super) fn connection(settings: &Settings) -> Result<Arc<Connection>> {
    let Ok(connections) = CONNECTIONS.get(|| Ok::<_, Infallible>(Mutex::default()));
    let mut connections = lock(connections);
    if let Some(at) = connections.iter().position(|other| other.settings == *settings) {
        let found = connections.remove(at);
        connections.push(Arc::clone(&found));
        return Ok(found);
    }
    let made =
        Arc::new(Connection { store: client(settings)?, settings: settings.clone(), owner: OwnerProcess::current() });
    if connections.len() >= MOST_KEPT
        && let Some(idle) = connections.iter().position(|other| Arc::strong_count(other) == 1)
    {
        connections.remove(idle);
    }
    connections.push(Arc::clone(&made));
    Ok(made)
}

fn client(settings: &Settings) -> Result<Arc<dyn PartStore>> {
    credentials::check(settings)?;
    let failed = |error| errors::of_settings(&error, settings);
    let options = ClientOptions::new()
        .with_user_agent(HeaderValue::from_static(concat!("vmsnap/", env!("CARGO_PKG_VERSION"))))
        .with_allow_http(settings.allow_http);
    let retry = RetryConfig {
        backoff: BackoffConfig {
            init_backoff: FIRST_BACKOFF,
            max_backoff: LONGEST_BACKOFF,
            ..BackoffConfig::default()
        },
        max_retries: RETRIES,
        retry_timeout: LONGEST_RETRYING,
    };
    let connector = Connector { region: (settings.scheme == Scheme::S3).then(|| settings.region().to_owned()) };
    Ok(match settings.scheme {
        Scheme::S3 => {
            let builder = AmazonS3Builder::new()
                .with_client_options(options)
                .with_retry(retry)
                .with_http_connector(connector)
                .with_bucket_name(&settings.bucket);
            let configured = configured(builder, settings, AmazonS3Builder::with_config);
            Arc::new(configured.build().map_err(failed)?)
        }
        Scheme::Gs => {
            let builder = GoogleCloudStorageBuilder::new()
                .with_client_options(options)
                .with_retry(retry)
                .with_http_connector(connector)
                .with_bucket_name(&settings.bucket);
            let configured = configured(builder, settings, GoogleCloudStorageBuilder::with_config);
            Arc::new(configured.build().map_err(failed)?)
        }
        Scheme::Az => {
            let builder = MicrosoftAzureBuilder::new()
                .with_client_options(options)
                .with_retry(retry)
                .with_http_connector(connector)
                .with_container_name(&settings.bucket);
            let configured = configured(builder, settings, MicrosoftAzureBuilder::with_config);
            Arc::new(configured.build().map_err(failed)?)
        }
        Scheme::Memory => {
            let Ok(stores) = MEMORY.get(|| Ok::<_, Infallible>(Mutex::default()));
            lock(stores).entry(settings.bucket.clone()).or_default().clone() as Arc<dyn PartStore>
        }
    })
}

/// Gives the settings to a builder. Their names were parsed before, so each is one of its keys.
fn configured<B, K: FromStr>(builder: B, settings: &Settings, with: impl Fn(B, K, String) -> B) -> B {
    let values = settings.values.iter().filter_map(|(name, value)| Some((name.parse().ok()?, value.clone())));
    values.fold(builder, |builder, (key, value)| with(builder, key, value))
}
