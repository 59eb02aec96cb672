//! The process's pool of threads, and one way to use it: items handed out one after the other to whoever is free.
//!
//! The pool is ours (rayon's global one hangs in a forked child) and is made on first use, anew after a fork. The calling
//! thread always works too, and it is the caller that looks for an interruption.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Kind, Result};
use crate::process::{self, PerProcess};

/// How many threads to use where nothing else is said.
const THREADS_VARIABLE: &str = "VMSNAP_THREADS";

const ALLOWED: std::ops::RangeInclusive<usize> = 1..=1024;

/// A callback is asked this often at most: well within the 200 ms in which Ctrl-C is to work.
pub(crate) const POLL_INTERVAL: Duration = Duration::from_millis(50);

static POOL: PerProcess<rayon::ThreadPool> = PerProcess::new();

/// The number of threads to use: as many as the pool has, or `wanted` if that is less.
pub(crate) fn resolve(wanted: Option<usize>) -> Result<usize> {
    match wanted {
        None => most(),
        Some(wanted) if ALLOWED.contains(&wanted) => Ok(clamp(wanted)),
        Some(_) => Err(Error::invalid_argument("threads must be a number from 1 to 1024")),
    }
}

/// A number from a handle that may come from another machine.
pub(crate) fn clamp(threads: usize) -> usize {
    most().map_or(threads, |most| threads.min(most)).max(1)
}

/// The size of the pool: `VMSNAP_THREADS`, or as many threads as the process may run on. Looked at once a process.
fn most() -> Result<usize> {
    static MOST: OnceLock<std::result::Result<usize, String>> = OnceLock::new();
    MOST.get_or_init(|| match std::env::var_os(THREADS_VARIABLE) {
        None => Ok(std::thread::available_parallelism().map_or(1, usize::from)),
        Some(text) => text
            .to_str()
            .and_then(|text| text.parse().ok())
            .filter(|count| ALLOWED.contains(count))
            .ok_or_else(|| format!("{THREADS_VARIABLE}={} must be a number from 1 to 1024", text.display())),
    })
    .clone()
    .map_err(Error::invalid_argument)
}

/// Asks a caller's callback whether to go on, from time to time.
pub(crate) struct Poll<'a> {
    callback: &'a mut dyn FnMut() -> Result<()>,
    next: Instant,
    home: u64,
}

impl<'a> Poll<'a> {
    pub(crate) fn new(callback: &'a mut dyn FnMut() -> Result<()>) -> Self {
        Self { callback, next: Instant::now() + POLL_INTERVAL, home: process::token() }
    }

    pub(crate) fn tick(&mut self) -> Result<()> {
        let now = Instant::now();
        if now < self.next {
            return Ok(());
        }
        self.next = now + POLL_INTERVAL;
        let result = (self.callback)();
        if self.is_elsewhere() {
            // The callback forked, and this is the child: cipher state must not be used here.
            return Err(Error::new(Kind::State, "the process was forked in the middle of the call"));
        }
        result
    }

    fn is_elsewhere(&self) -> bool {
        self.home != process::token()
    }
}

/// Does `work` for every item, one worker a thread: the first on the calling thread, the others in the pool.
///
/// # Errors
///
/// The first error of `work` or of the poll; items not begun by then are left out.
pub(crate) fn for_each<W, I>(
    workers: &mut [W],
    items: I,
    poll: &mut Poll<'_>,
    work: impl Fn(&mut W, I::Item) -> Result<()> + Sync,
) -> Result<()>
where
    W: Send,
    I: Iterator + Send,
    I::Item: Send,
{
    let helpers = items.size_hint().1.map_or(workers.len(), |most| workers.len().min(most)).saturating_sub(1);
    let Some((own, others)) = workers.split_first_mut() else {
        // Only a forged handle has no threads; its work must not count as done.
        return match items.into_iter().next() {
            None => Ok(()),
            Some(_) => Err(Error::invalid_argument("there is no thread to do the work")),
        };
    };
    let pool = if helpers == 0 { None } else { pool() };
    let Some(pool) = pool else {
        for item in items {
            poll.tick()?;
            work(own, item)?;
        }
        return Ok(());
    };

    let items = Mutex::new(items);
    let failure = Mutex::new(None);
    let stop = AtomicBool::new(false);
    let run = |worker: &mut W, mut poll: Option<&mut Poll<'_>>| {
        while !stop.load(Ordering::Relaxed) {
            let step = poll.as_mut().map_or(Ok(()), |poll| poll.tick()).and_then(|()| {
                let item = lock(&items).next();
                item.map(|item| work(worker, item)).transpose()
            });
            match step {
                Ok(Some(())) => {}
                Ok(None) => break,
                Err(error) => {
                    stop.store(true, Ordering::Relaxed);
                    lock(&failure).get_or_insert(error);
                }
            }
        }
    };
    pool.in_place_scope(|scope| {
        for worker in &mut others[..helpers] {
            scope.spawn(|_| run(worker, None));
        }
        run(own, Some(&mut *poll));
        if poll.is_elsewhere() {
            // A child forked by the callback, in which the other threads do not exist: waiting for them would be for ever.
            let text = "forked in the middle of a call that uses several threads; this child cannot go on";
            let _ = writeln!(std::io::stderr(), "vmsnap: {text}");
            std::process::abort();
        }
    });
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// The pool; none where the process may not start threads, in which case the caller does all the work.
pub(crate) fn pool() -> Option<&'static rayon::ThreadPool> {
    POOL.get(|| {
        let threads = resolve(None).unwrap_or(1);
        rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|index| format!("vmsnap-{index}")).build()
    })
    .ok()
}

/// Takes a lock whose holder cannot leave half-done state behind.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn squares(workers: usize, count: u64, stop_at: Option<u64>) -> (Result<()>, u64) {
        let mut workers = vec![0_u64; workers];
        let mut callback = || Ok(());
        let result =
            for_each(&mut workers, 0..usize::try_from(count).unwrap(), &mut Poll::new(&mut callback), |sum, item| {
                if stop_at == Some(item as u64) {
                    return Err(Error::interrupted());
                }
                *sum += (item * item) as u64;
                Ok(())
            });
        (result, workers.iter().sum())
    }

    #[test]
    fn every_item_is_done_once_by_any_number_of_workers() {
        let expected: u64 = (0..1000).map(|item| item * item).sum();
        for workers in [1, 2, 3, 50] {
            let (result, sum) = squares(workers, 1000, None);
            result.unwrap();
            assert_eq!(sum, expected);
        }
    }

    #[test]
    fn the_first_error_stops_the_others() {
        for workers in [1, 3] {
            let (result, sum) = squares(workers, 1_000_000, Some(10));
            assert!(result.unwrap_err().is_interrupted());
            assert!(sum < (0..1_000_000_u64).map(|item| item * item).sum());
        }
    }
}
