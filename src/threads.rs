//! A parallel loop: each item goes to the next free thread, the calling thread or one of the [pool](crate::pool).
//!
//! The calling thread always works too, so a call ends even if the pool is busy, and only the calling thread checks for
//! an interruption. A helper returns its thread to the pool after an item if another job waits for a thread.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Kind, Result};
use crate::pool::pool;
use crate::process::OwnerProcess;

/// The variable with the default number of threads.
const THREADS_VARIABLE: &str = "VMSNAP_THREADS";

const ALLOWED: std::ops::RangeInclusive<usize> = 1..=1024;

/// The shortest time between two calls of a callback, well within the 200 ms in which Ctrl-C must work.
pub(crate) const INTERRUPT_INTERVAL: Duration = Duration::from_millis(50);

/// The number of threads to use: `wanted`, but at most the size of the pool.
pub(crate) fn resolve(wanted: Option<usize>) -> Result<usize> {
    match wanted {
        None => most(),
        Some(wanted) if ALLOWED.contains(&wanted) => Ok(clamp(wanted)),
        Some(_) => Err(Error::invalid_argument("threads must be a number from 1 to 1024")),
    }
}

/// Limits the number of threads of a handle, which may come from another machine.
pub(crate) fn clamp(threads: usize) -> usize {
    most().map_or(threads, |most| threads.min(most)).max(1)
}

/// The size of the pool: `VMSNAP_THREADS`, or the number of processors that the process may use. Read once per process.
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

/// Ends long work: on the calling thread its callback may ask for that, and on every thread that shares the work, a
/// failure of another thread. Everything that takes long checks it, and everything that waits does so through it.
pub(crate) struct Interrupt<'a> {
    /// The callback of the caller; only the calling thread has it.
    callback: Option<&'a mut dyn FnMut() -> Result<()>>,
    next: Instant,
    owner: OwnerProcess,
    /// Set when a thread has failed, if several threads share the work.
    stop: Option<&'a AtomicBool>,
}

impl<'a> Interrupt<'a> {
    pub(crate) fn new(callback: &'a mut dyn FnMut() -> Result<()>) -> Self {
        Self {
            callback: Some(callback),
            next: Instant::now() + INTERRUPT_INTERVAL,
            owner: OwnerProcess::current(),
            stop: None,
        }
    }

    /// The interrupt of a thread that helps another one, until `stop` is set.
    pub(crate) fn of_helper(stop: &'a AtomicBool) -> Self {
        Self { callback: None, next: Instant::now(), owner: OwnerProcess::current(), stop: Some(stop) }
    }

    /// The interrupt of the calling thread while other threads help it.
    fn shared<'b>(&'b mut self, stop: &'b AtomicBool) -> Interrupt<'b> {
        let callback = self.callback.as_mut().map(|callback| &mut **callback as &mut dyn FnMut() -> Result<()>);
        Interrupt { callback, next: self.next, owner: self.owner, stop: Some(stop) }
    }

    /// Returns an error if the work must end. Calls the callback at most every 50 ms.
    pub(crate) fn check(&mut self) -> Result<()> {
        if self.stop.is_some_and(|stop| stop.load(Ordering::Relaxed)) {
            return Err(Error::interrupted());
        }
        let Some(callback) = &mut self.callback else { return Ok(()) };
        let now = Instant::now();
        if now < self.next {
            return Ok(());
        }
        self.next = now + INTERRUPT_INTERVAL;
        let result = callback();
        if !self.owner.is_current() {
            // The callback forked, and this is the child, where cipher state must not be used.
            if self.stop.is_some() {
                // The other threads do not exist here, so waiting for them, or for a lock that one held, never ends.
                // The panic reports the reason through the application's panic hook, and unwinds only this closure.
                let _ = std::panic::catch_unwind(|| {
                    panic!("forked in the middle of a call that uses several threads; this child cannot go on")
                });
                std::process::abort();
            }
            return Err(Error::new(Kind::State, "the process was forked during the call"));
        }
        result
    }

    /// Checks at once, after a system call that a signal ended: the callback may be due to act on that signal.
    pub(crate) fn check_now(&mut self) -> Result<()> {
        self.next = Instant::now();
        self.check()
    }

    /// Waits briefly for a notification, and checks while the lock is released. The caller looks whether its condition
    /// holds now, and waits again if not.
    pub(crate) fn wait<'b, T>(
        &mut self,
        changed: &Condvar,
        guard: MutexGuard<'_, T>,
        mutex: &'b Mutex<T>,
    ) -> Result<MutexGuard<'b, T>> {
        drop(changed.wait_timeout(guard, INTERRUPT_INTERVAL));
        self.check()?;
        Ok(lock(mutex))
    }
}

/// Calls `work` for every item, with one worker per thread: the first on the calling thread, the others in the pool.
/// Work that takes long or waits must check the interrupt that it is given.
///
/// # Errors
///
/// The first error of `work` or of the interrupt. Items that were not begun by then are skipped.
///
/// # Panics
///
/// If `work` panics in any thread.
pub(crate) fn for_each<W, I>(
    workers: &mut [W],
    items: I,
    interrupt: &mut Interrupt<'_>,
    work: impl Fn(&mut W, I::Item, &mut Interrupt<'_>) -> Result<()> + Sync,
) -> Result<()>
where
    W: Send,
    I: Iterator + Send,
    I::Item: Send,
{
    let helpers = items.size_hint().1.map_or(workers.len(), |most| workers.len().min(most)).saturating_sub(1);
    let Some((own, others)) = workers.split_first_mut() else {
        // Only a forged handle has 0 threads; its work must not count as done.
        return match items.into_iter().next() {
            None => Ok(()),
            Some(_) => Err(Error::invalid_argument("there is no thread to do the work")),
        };
    };
    if helpers == 0 {
        for item in items {
            interrupt.check()?;
            work(own, item, interrupt)?;
        }
        return Ok(());
    }

    let pool = pool();
    let items = Mutex::new(items);
    let failure = Mutex::new(None);
    let stop = AtomicBool::new(false);
    let fail = |error| {
        lock(&failure).get_or_insert(error);
        stop.store(true, Ordering::Relaxed);
    };
    // Works until no item is left or the thread must be returned; returns whether the latter was the reason.
    let run = |worker: &mut W, interrupt: &mut Interrupt<'_>, give_back: &dyn Fn() -> bool| {
        let _guard = PanicGuard(|| stop.store(true, Ordering::Relaxed));
        while !stop.load(Ordering::Relaxed) {
            let step = interrupt.check().and_then(|()| {
                let item = lock(&items).next();
                item.map(|item| work(worker, item, interrupt)).transpose()
            });
            match step {
                Ok(Some(())) if give_back() => return true,
                Ok(Some(())) => {}
                Ok(None) => break,
                Err(error) => fail(error),
            }
        }
        false
    };
    let idle: Mutex<Vec<_>> = Mutex::new(others[..helpers].iter_mut().collect());
    let help = || {
        let Some(worker) = lock(&idle).pop() else { return false };
        let more = run(worker, &mut Interrupt::of_helper(&stop), &|| pool.is_wanted());
        lock(&idle).push(worker);
        more
    };
    let mut shared = interrupt.shared(&stop);
    pool.share(helpers, &help, |helpers| {
        run(own, &mut shared, &|| false);
        helpers.wait(|| {
            if let Err(error) = shared.check() {
                fail(error);
            }
        });
    });
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// Calls a function if the thread panics.
struct PanicGuard<F: Fn()>(F);

impl<F: Fn()> Drop for PanicGuard<F> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0();
        }
    }
}

/// Takes a lock, also after a panic of its holder: the protected state is always consistent.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    fn squares(workers: usize, count: u64, stop_at: Option<u64>) -> (Result<()>, u64) {
        let mut workers = vec![0_u64; workers];
        let mut callback = || Ok(());
        let result = for_each(
            &mut workers,
            0..usize::try_from(count).unwrap(),
            &mut Interrupt::new(&mut callback),
            |sum, item, _| {
                if stop_at == Some(item as u64) {
                    return Err(Error::interrupted());
                }
                *sum += (item * item) as u64;
                Ok(())
            },
        );
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

    /// Calls `work` for each item, with enough workers to occupy all threads of the pool.
    fn by_all_threads(items: impl Iterator<Item = usize> + Send, work: impl Fn(usize) + Sync) {
        let mut go_on = || Ok(());
        let mut workers = vec![(); most().unwrap() + 1];
        for_each(&mut workers, items, &mut Interrupt::new(&mut go_on), |(), item, _| {
            work(item);
            Ok(())
        })
        .unwrap();
    }

    #[test]
    fn a_call_ends_while_another_has_all_threads() {
        let threads = most().unwrap() + 1;
        let (begun, released) = (Barrier::new(threads + 1), Barrier::new(threads + 1));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                by_all_threads(0..threads, |_| {
                    begun.wait();
                    released.wait();
                });
            });
            begun.wait();
            let (result, sum) = squares(threads, 1000, None);
            result.unwrap();
            assert_eq!(sum, (0..1000_u64).map(|item| item * item).sum::<u64>());
            released.wait();
        });
    }

    #[test]
    fn a_call_without_end_lets_others_have_threads() {
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (begun, is_begun) = std::sync::mpsc::sync_channel(1);
            let done = &done;
            scope.spawn(move || {
                by_all_threads((0..).take_while(|_| !done.load(Ordering::Relaxed)), |_| {
                    let _ = begun.try_send(());
                });
            });
            is_begun.recv().unwrap();
            // Two items must be done at the same time.
            let both = Barrier::new(2);
            by_all_threads(0..2, |_| {
                both.wait();
            });
            done.store(true, Ordering::Relaxed);
        });
    }

    #[test]
    fn a_caller_that_waits_for_its_helpers_asks_whether_to_go_on() {
        let caller = std::thread::current().id();
        let both = Barrier::new(2);
        let (release, released) = std::sync::mpsc::channel();
        let released = Mutex::new(released);
        let mut callback = || {
            release.send(()).unwrap();
            Ok(())
        };
        for_each(&mut [(); 2], 0..2, &mut Interrupt::new(&mut callback), |(), _, _| {
            both.wait();
            if std::thread::current().id() != caller {
                lock(&released).recv().unwrap();
            }
            Ok(())
        })
        .unwrap();
    }

    #[test]
    fn whoever_waits_for_a_thread_that_fails_is_released() {
        // Of two items, one fails and the other waits for it, once on the calling thread and once on a helper.
        for panics in [false, true] {
            for failing in 0..2 {
                let caller = std::thread::current().id();
                let both = Barrier::new(2);
                let (never, changed) = (Mutex::new(()), Condvar::new());
                let ended = std::panic::catch_unwind(|| {
                    let mut go_on = || Ok(());
                    for_each(&mut [(); 2], 0..2, &mut Interrupt::new(&mut go_on), |(), _, interrupt| {
                        both.wait();
                        if (std::thread::current().id() == caller) == (failing == 0) {
                            assert!(!panics, "a panic of the test");
                            return Err(Error::corrupt("a failure of the test"));
                        }
                        loop {
                            drop(interrupt.wait(&changed, lock(&never), &never)?);
                        }
                    })
                });
                assert_eq!(ended.is_err(), panics);
                assert!(ended.is_err() || ended.unwrap().unwrap_err().is_corrupt());
            }
        }
    }

    #[test]
    fn a_helper_that_panics_ends_the_call() {
        let caller = std::thread::current().id();
        let both = Barrier::new(2);
        let panicked = std::panic::catch_unwind(|| {
            let mut go_on = || Ok(());
            for_each(&mut [(); 2], 0.., &mut Interrupt::new(&mut go_on), |(), item, _| {
                if item < 2 {
                    both.wait();
                }
                if std::thread::current().id() != caller {
                    std::panic::resume_unwind(Box::new("a helper's"));
                }
                Ok(())
            })
        });
        assert_eq!(panicked.unwrap_err().downcast_ref(), Some(&"a helper's"));
        // The thread itself survives.
        let (result, _) = squares(2, 100, None);
        result.unwrap();
    }

    #[test]
    fn a_caller_that_panics_leaves_no_helper_behind() {
        let caller = std::thread::current().id();
        let (both, helping) = (Barrier::new(2), std::sync::atomic::AtomicUsize::new(0));
        let panicked = std::panic::catch_unwind(|| {
            let mut go_on = || Ok(());
            for_each(&mut [(); 2], 0.., &mut Interrupt::new(&mut go_on), |(), item, _| {
                if item < 2 {
                    both.wait();
                }
                if std::thread::current().id() == caller {
                    std::panic::resume_unwind(Box::new("the caller's"));
                }
                helping.fetch_add(1, Ordering::Relaxed);
                std::thread::yield_now();
                helping.fetch_sub(1, Ordering::Relaxed);
                Ok(())
            })
        });
        assert_eq!(panicked.unwrap_err().downcast_ref(), Some(&"the caller's"));
        assert_eq!(helping.into_inner(), 0);
    }
}
