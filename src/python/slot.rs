//! One caller at a time.
//!
//! A thread that waits does so without the interpreter's lock, and goes on obeying signals. In a forked child the lock
//! may be held for ever by a thread that does not exist there, so that is looked at first.

use std::sync::{Condvar, Mutex, PoisonError};
use std::thread::{self, ThreadId};

use super::Callback;
use crate::error::{Error, Kind, Result};
use crate::process::OwnerProcess;
use crate::threads::{INTERRUPT_INTERVAL, Interrupt, lock};

pub(super) struct Slot<T> {
    owner: OwnerProcess,
    place: Mutex<Place<T>>,
    returned: Condvar,
}

enum Place<T> {
    Free(Box<T>),
    Taken(ThreadId),
}

impl<T> Slot<T> {
    pub(super) fn new(value: T) -> Self {
        Self {
            owner: OwnerProcess::current(),
            place: Mutex::new(Place::Free(Box::new(value))),
            returned: Condvar::new(),
        }
    }

    pub(super) fn owner(&self) -> OwnerProcess {
        self.owner
    }

    /// Lets `work` have the value alone.
    pub(super) fn with<R>(
        &self,
        interrupt: Callback<'_>,
        work: impl FnOnce(&mut T, Callback<'_>) -> Result<R>,
    ) -> Result<R> {
        let mut held = Held { slot: self, value: Some(self.take(interrupt)?) };
        match &mut held.value {
            Some(value) => work(value, interrupt),
            None => unreachable!("put there above"),
        }
    }

    /// As [`Slot::with`] where nobody has to be waited for; none where somebody has.
    pub(super) fn try_with<R>(&self, work: impl FnOnce(&mut T) -> R) -> Option<R> {
        self.owner.check_fragment().ok()?;
        match &mut *self.place.try_lock().ok()? {
            Place::Free(value) => Some(work(value)),
            Place::Taken(_) => None,
        }
    }

    /// The value, where nobody else can have it any more.
    pub(super) fn get_mut(&mut self) -> Option<&mut T> {
        match self.place.get_mut().unwrap_or_else(PoisonError::into_inner) {
            Place::Free(value) => Some(value),
            Place::Taken(_) => None,
        }
    }

    fn take(&self, interrupt: Callback<'_>) -> Result<Box<T>> {
        self.owner.check_fragment()?;
        let own = thread::current().id();
        let mut interrupt = Interrupt::new(interrupt);
        let mut place = lock(&self.place);
        loop {
            match std::mem::replace(&mut *place, Place::Taken(own)) {
                Place::Free(value) => return Ok(value),
                Place::Taken(owner) => *place = Place::Taken(owner),
            }
            if matches!(*place, Place::Taken(owner) if owner == own) {
                // It would wait for itself.
                let text = "the fragment is in a call of this very thread's: a signal handler cannot use it";
                return Err(Error::new(Kind::State, text));
            }
            drop(self.returned.wait_timeout(place, INTERRUPT_INTERVAL));
            interrupt.check()?;
            place = lock(&self.place);
        }
    }
}

/// The value while it is out; it goes back also where `work` panics.
struct Held<'a, T> {
    slot: &'a Slot<T>,
    value: Option<Box<T>>,
}

impl<T> Drop for Held<'_, T> {
    fn drop(&mut self) {
        if let Some(value) = self.value.take() {
            *lock(&self.slot.place) = Place::Free(value);
            self.slot.returned.notify_one();
        }
    }
}
