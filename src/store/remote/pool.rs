//! The blocks in memory, and the requests for them, of all readers of a bucket in this process.
//!
//! A thread that needs a block starts a task that fetches it, or waits for the task that another thread has started.
//! The number of requests under way and the number of blocks in memory are bounded.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, Weak};

use bytes::Bytes;

use super::Bucket;
use super::cache::{BlockCache, BlockName};
use super::runtime::{self, Task};
use crate::error::{Error, Kind, Result};
use crate::location::Scheme;
use crate::process::PerProcess;
use crate::store::RemoteOptions;
use crate::threads::{Interrupt, lock};

/// The size of a block. The last block of an object may be shorter.
pub(super) const BLOCK_BYTES: usize = 2 << 20;

/// The blocks in memory, for each connection: 8 MiB.
const BLOCKS_PER_CONNECTION: usize = 4;

/// A reader and the number of a block in its object.
pub(super) type BlockKey = (u64, u64);

pub(super) struct Pool {
    /// The bucket and the options; equal ones share a pool.
    bucket: (Scheme, String),
    options: RemoteOptions,
    pub(super) cache: Option<BlockCache>,
    state: Mutex<State>,
    changed: Condvar,
    /// The fetches under way.
    running: Arc<AtomicUsize>,
    /// The blocks that exist or are being fetched. A block exists until the last thread has copied from it.
    existing: Arc<AtomicUsize>,
}

#[derive(Default)]
struct State {
    slots: BTreeMap<BlockKey, Slot>,
    /// Counts uses, to find the block that was used least recently.
    uses: u64,
    readers: u64,
}

enum Slot {
    Fetching(Arc<Fetch>),
    Held { block: Arc<Block>, last_use: u64, was_read: bool },
}

/// A block in memory.
pub(super) struct Block {
    pub(super) bytes: Bytes,
    _place: Place,
}

/// A place within a bound, counted until it is dropped.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(taken: &Arc<AtomicUsize>) -> Self {
        taken.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(taken))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A fetch of a block, for all threads that wait for it. If nobody wants the block any more, the task is cancelled.
#[derive(Default)]
struct Fetch {
    result: OnceLock<Result<Arc<Block>>>,
    task: OnceLock<Task<()>>,
}

/// The pools of this process.
static POOLS: PerProcess<Mutex<Vec<Weak<Pool>>>> = PerProcess::new();

impl Pool {
    /// The pool of a bucket.
    ///
    /// # Errors
    ///
    /// `InvalidArgument` if the directory of the cache belongs to others.
    pub(super) fn of(bucket: &Bucket) -> Result<Arc<Self>> {
        let (url, options) = (bucket.url(), bucket.options());
        let Ok(pools) = POOLS.get(|| Ok::<_, Infallible>(Mutex::default()));
        let mut pools = lock(pools);
        pools.retain(|pool| pool.strong_count() > 0);
        let is_same =
            |pool: &Arc<Self>| pool.bucket == (url.scheme(), url.bucket().to_owned()) && pool.options == *options;
        if let Some(pool) = pools.iter().filter_map(Weak::upgrade).find(is_same) {
            return Ok(pool);
        }
        let pool = Arc::new(Self {
            bucket: (url.scheme(), url.bucket().to_owned()),
            options: options.clone(),
            cache: options.cache.as_ref().map(BlockCache::open).transpose()?.flatten(),
            state: Mutex::default(),
            changed: Condvar::new(),
            running: Arc::default(),
            existing: Arc::default(),
        });
        pools.push(Arc::downgrade(&pool));
        Ok(pool)
    }

    /// The number of a new reader.
    pub(super) fn new_reader(&self) -> u64 {
        let mut state = lock(&self.state);
        state.readers += 1;
        state.readers
    }

    #[cfg(test)]
    pub(super) fn existing(&self) -> usize {
        self.existing.load(Ordering::Relaxed)
    }

    pub(super) fn connections(&self) -> usize {
        self.options.connections
    }

    /// The block, which is fetched if it is not there. `fetch` makes the future that fetches it.
    ///
    /// # Errors
    ///
    /// The errors of the fetch, for all threads that waited for it, and of the interrupt.
    pub(super) fn block<F: Future<Output = Result<Bytes>> + Send + 'static>(
        self: &Arc<Self>,
        key: BlockKey,
        fetch: impl Fn() -> F,
        interrupt: &mut Interrupt<'_>,
    ) -> Result<Arc<Block>> {
        let mut state = lock(&self.state);
        let fetch = loop {
            match state.slots.get(&key) {
                Some(Slot::Held { block, .. }) => {
                    let block = Arc::clone(block);
                    state.was_read(key);
                    return Ok(block);
                }
                Some(Slot::Fetching(fetch)) => break Arc::clone(fetch),
                None => {}
            }
            if self.has_room(&mut state, false) {
                let fetch = self.start(state, key, fetch())?;
                state = lock(&self.state);
                break fetch;
            }
            // It has to wait for a connection, or for memory.
            state = interrupt.wait(&self.changed, state, &self.state)?;
        };
        loop {
            match fetch.result.get() {
                Some(Ok(block)) => {
                    state.was_read(key);
                    return Ok(Arc::clone(block));
                }
                Some(Err(error)) => return Err(error.duplicate()),
                None => match interrupt.wait(&self.changed, state, &self.state) {
                    Ok(again) => state = again,
                    Err(error) => {
                        self.give_up(key, fetch);
                        return Err(error);
                    }
                },
            }
        }
    }

    /// Cancels a fetch for which nobody waits any more, so that it does not make a later reader wait.
    fn give_up(&self, key: BlockKey, fetch: Arc<Fetch>) {
        let mut state = lock(&self.state);
        drop(fetch);
        let is_alone = matches!(state.slots.get(&key), Some(Slot::Fetching(fetch)) if Arc::strong_count(fetch) == 1);
        let cancelled = is_alone.then(|| state.slots.remove(&key));
        drop(state);
        drop(cancelled);
    }

    /// Fetches a block in advance, unless it is there. Returns whether there was a connection and memory for it.
    pub(super) fn prefetch<F: Future<Output = Result<Bytes>> + Send + 'static>(
        self: &Arc<Self>,
        key: BlockKey,
        fetch: impl FnOnce() -> F,
    ) -> bool {
        let mut state = lock(&self.state);
        state.slots.contains_key(&key) || (self.has_room(&mut state, true) && self.start(state, key, fetch()).is_ok())
    }

    /// Drops a block from memory and from the cache. Returns whether it was in the cache.
    pub(super) fn drop_block(&self, key: BlockKey, name: &BlockName) -> bool {
        lock(&self.state).slots.remove(&key);
        self.cache.as_ref().is_some_and(|cache| cache.remove(name))
    }

    /// Drops the blocks of a reader, and cancels its fetches.
    pub(super) fn drop_reader(&self, reader: u64) {
        let mut state = lock(&self.state);
        let mut own = state.slots.split_off(&(reader, 0));
        let mut others = own.split_off(&(reader + 1, 0));
        state.slots.append(&mut others);
        drop(state);
        drop(own);
        self.changed.notify_all();
    }

    /// Whether a fetch can be started; drops the block that was used least recently, if that is necessary. In advance
    /// of a read, blocks that were fetched in advance and not read yet are not dropped.
    fn has_room(&self, state: &mut State, in_advance: bool) -> bool {
        if self.running.load(Ordering::Relaxed) >= self.options.connections {
            return false;
        }
        if self.existing.load(Ordering::Relaxed) < self.options.connections * BLOCKS_PER_CONNECTION {
            return true;
        }
        let unused = state.slots.iter().filter_map(|(key, slot)| match slot {
            // Dropping a block from which a thread copies at this moment would not free memory.
            Slot::Held { block, last_use, was_read } if Arc::strong_count(block) == 1 && (*was_read || !in_advance) => {
                Some((*last_use, *key))
            }
            _ => None,
        });
        unused.min().is_some_and(|(_, key)| state.slots.remove(&key).is_some())
    }

    fn start(
        self: &Arc<Self>,
        mut state: MutexGuard<'_, State>,
        key: BlockKey,
        future: impl Future<Output = Result<Bytes>> + Send + 'static,
    ) -> Result<Arc<Fetch>> {
        let fetch = Arc::new(Fetch::default());
        let places = Some((Place::take(&self.running), Place::take(&self.existing)));
        let mut end = End { pool: Arc::clone(self), key, fetch: Arc::downgrade(&fetch), places };
        state.slots.insert(key, Slot::Fetching(Arc::clone(&fetch)));
        drop(state);
        let task = runtime::spawn(async move {
            let result = future.await;
            end.end(result);
            Ok(())
        })?;
        let _ = fetch.task.set(task);
        Ok(fetch)
    }
}

impl State {
    /// Notes that a block was read, if it is still there.
    fn was_read(&mut self, key: BlockKey) {
        self.uses += 1;
        if let Some(Slot::Held { last_use, was_read, .. }) = self.slots.get_mut(&key) {
            (*last_use, *was_read) = (self.uses, true);
        }
    }
}

/// Ends a fetch, also if the task panics or is cancelled: everybody who waits for it is woken.
struct End {
    pool: Arc<Pool>,
    key: BlockKey,
    fetch: Weak<Fetch>,
    /// The place of the fetch, and the place of its block.
    places: Option<(Place, Place)>,
}

impl End {
    fn end(&mut self, result: Result<Bytes>) {
        let Some((running, place)) = self.places.take() else { return };
        drop(running);
        let result = result.map(|bytes| Arc::new(Block { bytes, _place: place }));
        let mut state = lock(&self.pool.state);
        if let Some(fetch) = self.fetch.upgrade() {
            let is_ours =
                matches!(state.slots.get(&self.key), Some(Slot::Fetching(other)) if Arc::ptr_eq(other, &fetch));
            state.uses += 1;
            match &result {
                Ok(block) if is_ours => {
                    let slot = Slot::Held { block: Arc::clone(block), last_use: state.uses, was_read: false };
                    state.slots.insert(self.key, slot);
                }
                // A failure is not kept: a later reader tries again.
                Err(_) if is_ours => drop(state.slots.remove(&self.key)),
                _ => {}
            }
            let _ = fetch.result.set(result);
        }
        drop(state);
        self.pool.changed.notify_all();
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.end(Err(Error::new(Kind::State, "the transfer ended without a result")));
    }
}
