//! [`Slot`]: a value that one thread uses at a time.
//!
//! A thread waits without the interpreter's lock, and handles signals meanwhile. In a forked child a thread that does
//! not exist there may hold the lock, so the owner process is checked first.

use std::sync::{Condvar, Mutex, PoisonError};
use std::thread::{self, ThreadId};

use super::call::Callback;
use crate::error::{Error, Kind, Result};
use crate::process::OwnerProcess;
use crate::threads::{INTERRUPT_INTERVAL, Interrupt, lock};

pub(super) struct Slot<T> {
    owner: OwnerProcess,
    state: Mutex<SlotState<T>>,
    returned: Condvar,
}

enum SlotState<T> {
    Free(Box<T>),
    Taken(ThreadId),
}

impl<T> Slot<T> {
    pub(super) fn new(value: T) -> Self {
        Self {
            owner: OwnerProcess::current(),
            state: Mutex::new(SlotState::Free(Box::new(value))),
            returned: Condvar::new(),
        }
    }

    pub(super) fn owner(&self) -> OwnerProcess {
        self.owner
    }

    /// Waits for the value, and calls `work` with it.
    pub(super) fn with<R>(
        &self,
        interrupt: Callback<'_>,
        work: impl FnOnce(&mut T, Callback<'_>) -> Result<R>,
    ) -> Result<R> {
        let mut borrowed = Borrowed { slot: self, value: Some(self.take(interrupt)?) };
        match &mut borrowed.value {
            Some(value) => work(value, interrupt),
            None => unreachable!("put there above"),
        }
    }

    /// Calls `work` with the value, or returns `None` if another thread has it.
    pub(super) fn try_with<R>(&self, work: impl FnOnce(&mut T) -> R) -> Option<R> {
        self.owner.check_fragment().ok()?;
        match &mut *self.state.try_lock().ok()? {
            SlotState::Free(value) => Some(work(value)),
            SlotState::Taken(_) => None,
        }
    }

    /// Returns the value, which no other thread can have any more.
    pub(super) fn get_mut(&mut self) -> Option<&mut T> {
        match self.state.get_mut().unwrap_or_else(PoisonError::into_inner) {
            SlotState::Free(value) => Some(value),
            SlotState::Taken(_) => None,
        }
    }

    fn take(&self, interrupt: Callback<'_>) -> Result<Box<T>> {
        self.owner.check_fragment()?;
        let own = thread::current().id();
        let mut interrupt = Interrupt::new(interrupt);
        let mut state = lock(&self.state);
        loop {
            match std::mem::replace(&mut *state, SlotState::Taken(own)) {
                SlotState::Free(value) => return Ok(value),
                SlotState::Taken(owner) => *state = SlotState::Taken(owner),
            }
            if matches!(*state, SlotState::Taken(owner) if owner == own) {
                // The thread would wait for itself.
                let text = "this thread is in a call that uses the fragment: a signal handler cannot use it";
                return Err(Error::new(Kind::State, text));
            }
            drop(self.returned.wait_timeout(state, INTERRUPT_INTERVAL));
            interrupt.check()?;
            state = lock(&self.state);
        }
    }
}

/// The value while a thread uses it. It returns to the slot even after a panic.
struct Borrowed<'a, T> {
    slot: &'a Slot<T>,
    value: Option<Box<T>>,
}

impl<T> Drop for Borrowed<'_, T> {
    fn drop(&mut self) {
        if let Some(value) = self.value.take() {
            *lock(&self.slot.state) = SlotState::Free(value);
            self.slot.returned.notify_one();
        }
    }
}
