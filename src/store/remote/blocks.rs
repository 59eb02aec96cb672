//! The stored bytes of one fragment, read in blocks.

use std::future::Future;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;

use super::cache::BlockName;
use super::pool::{BLOCK_BYTES, Pool};
use super::{Bucket, Objects, Version, Wanted};
use crate::error::{Error, Result};
use crate::process::OwnerProcess;
use crate::store::bytes::ReadAt;
use crate::threads::Interrupt;

/// A reader that reads in order asks for at least this much in advance.
const MIN_AHEAD_BYTES: usize = 8 << 20;

/// An object that is read in blocks. Opening it sends no request.
pub(crate) struct BlockReader {
    source: Arc<Source>,
    pool: Arc<Pool>,
    /// The number of this reader in the pool.
    number: u64,
    owner: OwnerProcess,
}

/// Where the blocks come from.
struct Source {
    objects: Objects,
    pool: Arc<Pool>,
    name: String,
    size: u64,
    /// The version of the first answer. All other answers must be of the same one.
    version: OnceLock<Version>,
    /// The digest of the stored manifest. Without it nothing is cached.
    manifest: Option<[u8; 32]>,
}

impl BlockReader {
    /// A reader of the object `name`, which has `size` bytes. `manifest` is the digest of the stored manifest.
    ///
    /// # Errors
    ///
    /// The errors of connecting: `Io` with `EACCES` if there are no credentials.
    pub(super) fn new(bucket: &Bucket, name: &str, size: u64, manifest: Option<[u8; 32]>) -> Result<Self> {
        let (objects, pool) = (bucket.objects()?, Pool::of(bucket)?);
        objects.check_name(name)?;
        let number = pool.new_reader();
        let version = OnceLock::new();
        let source = Source { objects, pool: Arc::clone(&pool), name: name.to_owned(), size, version, manifest };
        Ok(Self { source: Arc::new(source), pool, number, owner: OwnerProcess::current() })
    }

    fn fetch(&self, number: u64) -> impl Future<Output = Result<Bytes>> + Send + use<> {
        let source = Arc::clone(&self.source);
        async move { source.fetch(number).await }
    }

    /// The numbers of the blocks of a range.
    fn blocks(range: &Range<u64>) -> Range<u64> {
        if range.is_empty() {
            return 0..0;
        }
        range.start / BLOCK_BYTES as u64..(range.end - 1) / BLOCK_BYTES as u64 + 1
    }
}

impl ReadAt for BlockReader {
    fn size(&self) -> u64 {
        self.source.size
    }

    fn read_exact_at(&self, mut buf: &mut [u8], mut offset: u64, interrupt: &mut Interrupt<'_>) -> Result<()> {
        self.owner.check_fragment()?;
        let end = offset.checked_add(buf.len() as u64).filter(|end| *end <= self.source.size);
        let end = end.ok_or_else(|| Error::corrupt("became shorter while it was read"))?;
        if Self::blocks(&(offset..end)).count() > 1 {
            self.prefetch(offset..end);
        }
        while !buf.is_empty() {
            let number = offset / BLOCK_BYTES as u64;
            let block = self.pool.block((self.number, number), || self.fetch(number), interrupt)?;
            let from = usize::try_from(offset % BLOCK_BYTES as u64).unwrap_or(usize::MAX);
            let length = buf.len().min(block.bytes.len() - from);
            let (now, later) = std::mem::take(&mut buf).split_at_mut(length);
            now.copy_from_slice(&block.bytes[from..from + length]);
            (buf, offset) = (later, offset + length as u64);
        }
        Ok(())
    }

    /// One block for each connection is fetched in advance, because a single connection does not fill a network.
    fn prefetch(&self, range: Range<u64>) {
        if !self.owner.is_current() {
            return;
        }
        let most = MIN_AHEAD_BYTES.max(self.pool.connections() * BLOCK_BYTES) as u64;
        let end = range.end.min(self.source.size).min(range.start.saturating_add(most));
        for number in Self::blocks(&(range.start..end)) {
            if !self.pool.prefetch((self.number, number), || self.fetch(number)) {
                break;
            }
        }
    }

    fn is_remote(&self) -> bool {
        true
    }

    fn distrust(&self, range: Range<u64>) -> bool {
        let Some(manifest) = self.source.manifest.as_ref().filter(|_| self.owner.is_current()) else { return false };
        let drop_block = |number| {
            let name = BlockName::new(manifest, &self.source.name, number);
            self.pool.drop_block((self.number, number), &name)
        };
        Self::blocks(&range).filter(|number| drop_block(*number)).count() > 0
    }
}

/// In a forked child nothing is touched: another thread may have held the lock.
impl Drop for BlockReader {
    fn drop(&mut self) {
        if self.owner.is_current() {
            self.pool.drop_reader(self.number);
        }
    }
}

impl Source {
    /// Fetches a block: from the cache, or else from the store.
    async fn fetch(self: Arc<Self>, number: u64) -> Result<Bytes> {
        let start = number * BLOCK_BYTES as u64;
        let range = start..(start + BLOCK_BYTES as u64).min(self.size);
        let cached = self.manifest.filter(|_| self.pool.cache.is_some());
        let Some(name) = cached.map(|manifest| BlockName::new(&manifest, &self.name, number)) else {
            return self.request(range).await;
        };
        let length = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
        let source = Arc::clone(&self);
        let load = move || source.pool.cache.as_ref().and_then(|cache| cache.load(&name, length));
        if let Ok(Some(bytes)) = tokio::task::spawn_blocking(load).await {
            return Ok(bytes);
        }
        let bytes = self.request(range).await?;
        let (source, copy) = (Arc::clone(&self), bytes.clone());
        let store = move || source.pool.cache.iter().for_each(|cache| cache.store(&name, &copy));
        // Awaited, so that a process that ends at once has filled the cache. If that failed, it is not an error.
        let _ = tokio::task::spawn_blocking(store).await;
        Ok(bytes)
    }

    async fn request(&self, range: Range<u64>) -> Result<Bytes> {
        let known = self.version.get();
        let got = match self.objects.get(&self.name, Wanted::Range(range), known).await {
            Ok(got) => got,
            Err(error) if error.is_not_found() => {
                let text = match known {
                    None => format!("is missing, but the manifest lists it ({error})"),
                    Some(_) => format!("was removed while it was read ({error})"),
                };
                return Err(Error::corrupt(text));
            }
            Err(error) => return Err(error),
        };
        if got.size != self.size {
            let text = format!("is {} bytes long, but the manifest says {} bytes", got.size, self.size);
            return Err(Error::corrupt(text));
        }
        // Several first requests may be under way at once.
        if *self.version.get_or_init(|| got.version.clone()) != got.version {
            return Err(Error::corrupt("cannot be read: it was replaced by another version meanwhile"));
        }
        Ok(got.bytes)
    }
}
