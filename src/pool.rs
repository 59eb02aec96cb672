//! The thread pool of the process, and the jobs that its threads take turns at.
//!
//! Each thread takes the job that has waited longest, gives it one turn, and queues it again if there is more to do. So
//! every job makes progress, even beside long ones. A job whose turn has not begun can be withdrawn, so a caller never
//! waits for a thread that is busy with another job.
//!
//! The pool is made on first use, and again in a forked child, which does not have its parent's threads. If the system
//! allows fewer threads, or none, there are fewer turns, and callers do the rest of the work themselves.

#![allow(unsafe_code, reason = "a shared call lends its closure to threads that outlive it")]

use std::any::Any;
use std::cell::Cell;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use crate::process::PerProcess;
use crate::threads::{INTERRUPT_INTERVAL, lock, resolve};

static POOL: PerProcess<Pool> = PerProcess::new();

thread_local! {
    static NUMBER: Cell<usize> = const { Cell::new(0) };
}

/// Work that threads of the pool do in turns.
pub(crate) trait Job: Send + Sync {
    /// Does a part of the work; returns whether there is more. A turn must not panic, and ends soon once
    /// [`Pool::is_wanted`].
    fn turn(&self) -> bool;
}

pub(crate) struct Pool {
    most: usize,
    state: Mutex<State>,
    /// Notified when a job is added.
    added: Condvar,
}

#[derive(Default)]
struct State {
    /// The queue of turns.
    jobs: VecDeque<Arc<dyn Job>>,
    threads: usize,
}

/// The pool of this process.
pub(crate) fn pool() -> &'static Pool {
    let Ok(pool) = POOL.get(|| {
        let most = resolve(None).unwrap_or(1);
        Ok::<_, Infallible>(Pool { most, state: Mutex::default(), added: Condvar::new() })
    });
    pool
}

/// The number of this thread in the pool, from 1 on; 0 for a thread outside the pool.
pub(crate) fn thread_number() -> usize {
    NUMBER.get()
}

impl Pool {
    /// Asks up to `count` threads for turns at a job; returns how many were asked: 0 if no thread can be started.
    pub(crate) fn invite(&'static self, job: &Arc<dyn Job>, count: usize) -> usize {
        let mut state = lock(&self.state);
        while state.threads < self.most && self.start(state.threads) {
            state.threads += 1;
        }
        let count = count.min(state.threads);
        state.jobs.extend(std::iter::repeat_n(job, count).map(Arc::clone));
        drop(state);
        (0..count).for_each(|_| self.added.notify_one());
        count
    }

    /// Withdraws all turns at a job that have not begun.
    pub(crate) fn withdraw(&self, job: &Arc<dyn Job>) {
        lock(&self.state).jobs.retain(|other| !Arc::ptr_eq(other, job));
    }

    /// Whether a job waits for a thread.
    pub(crate) fn is_wanted(&self) -> bool {
        !lock(&self.state).jobs.is_empty()
    }

    fn start(&'static self, index: usize) -> bool {
        let thread = std::thread::Builder::new().name(format!("vmsnap-{index}"));
        let started = thread.spawn(move || {
            NUMBER.set(index + 1);
            self.serve();
        });
        started.is_ok()
    }

    fn serve(&self) {
        let mut state = lock(&self.state);
        loop {
            let Some(job) = state.jobs.pop_front() else {
                state = self.added.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(state);
            let unfinished = job.turn().then_some(job);
            state = lock(&self.state);
            state.jobs.extend(unfinished);
        }
    }

    /// Calls `own` on this thread and, at the same time, `help` on up to `helpers` threads of the pool, repeatedly
    /// while it returns true. When this function returns or panics, no thread runs `help` any more.
    ///
    /// # Panics
    ///
    /// If `own` or a call of `help` panics, with the same panic.
    pub(crate) fn share(&'static self, helpers: usize, help: &(dyn Fn() -> bool + Sync), own: impl FnOnce(&Helpers)) {
        // SAFETY: only the lifetime changes. Only `Call::turn` uses the reference. It begins only while `Lent::help` is
        // set, and counts itself as running meanwhile. `Helpers::wait` clears `Lent::help`, and returns when no thread
        // is running. The drop of `helpers` calls it, so this function does not end before that, not even by a panic.
        let help =
            unsafe { std::mem::transmute::<&(dyn Fn() -> bool + Sync), &'static (dyn Fn() -> bool + Sync)>(help) };
        let lent = Lent { help: Some(help), running: 0, panic: None };
        let call = Arc::new(Call { lent: Mutex::new(lent), ended: Condvar::new() });
        let job: Arc<dyn Job> = Arc::<Call>::clone(&call);
        let invited = Helpers { pool: self, job, call: Arc::clone(&call) };
        self.invite(&invited.job, helpers);
        own(&invited);
        drop(invited);
        let panic = lock(&call.lent).panic.take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

/// The threads that help in [`Pool::share`].
pub(crate) struct Helpers {
    pool: &'static Pool,
    job: Arc<dyn Job>,
    call: Arc<Call>,
}

impl Helpers {
    /// Withdraws the turns that have not begun, and waits for the others; calls `meanwhile` repeatedly.
    pub(crate) fn wait(&self, mut meanwhile: impl FnMut()) {
        lock(&self.call.lent).help = None;
        self.pool.withdraw(&self.job);
        loop {
            let lent = lock(&self.call.lent);
            if lent.running == 0 {
                return;
            }
            drop(self.call.ended.wait_timeout(lent, INTERRUPT_INTERVAL));
            meanwhile();
        }
    }
}

impl Drop for Helpers {
    fn drop(&mut self) {
        self.wait(|| ());
    }
}

/// A closure that [`Pool::share`] lends to threads of the pool.
struct Call {
    lent: Mutex<Lent>,
    /// Notified when a turn ends.
    ended: Condvar,
}

struct Lent {
    /// The closure. Its real lifetime is shorter than `'static`: it ends when [`Helpers::wait`] clears this field.
    help: Option<&'static (dyn Fn() -> bool + Sync)>,
    /// The number of threads that run the closure.
    running: usize,
    panic: Option<Box<dyn Any + Send>>,
}

impl Job for Call {
    fn turn(&self) -> bool {
        let help = {
            let mut lent = lock(&self.lent);
            let Some(help) = lent.help else { return false };
            lent.running += 1;
            help
        };
        let turn = catch_unwind(AssertUnwindSafe(help));
        let mut lent = lock(&self.lent);
        lent.running -= 1;
        let more = turn.unwrap_or_else(|panic| {
            lent.panic.get_or_insert(panic);
            false
        });
        drop(lent);
        self.ended.notify_all();
        more
    }
}
