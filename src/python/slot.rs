//! One caller at a time.
//!
//! A thread that waits does so without the interpreter's lock, and goes on obeying signals. In a forked child the lock
//! may be held for ever by a thread that does not exist there, so that is looked at first.

use std::sync::{Condvar, Mutex, PoisonError};
use std::thread::{self, ThreadId};
use std::time::Duration;

use super::Callback;
use crate::error::{Error, Kind, Result};
use crate::fragment::Home;
use crate::threads::lock;

/// A waiting thread looks for signals this often.
const PATIENCE: Duration = Duration::from_millis(50);

pub(super) struct Slot<T> {
    home: Home,
    place: Mutex<Place<T>>,
    returned: Condvar,
}

enum Place<T> {
    Free(Box<T>),
    Taken(ThreadId),
    Closed,
}

impl<T> Slot<T> {
    pub(super) fn new(value: T) -> Self {
        Self { home: Home::here(), place: Mutex::new(Place::Free(Box::new(value))), returned: Condvar::new() }
    }

    /// Lets `work` have the value alone; none where it was closed.
    pub(super) fn with<R>(
        &self,
        poll: Callback<'_>,
        work: impl FnOnce(&mut T, Callback<'_>) -> Result<R>,
    ) -> Result<Option<R>> {
        let Some(mut held) = self.take(poll)? else { return Ok(None) };
        let Some(value) = &mut held.value else { return Ok(None) };
        work(value, poll).map(Some)
    }

    /// As [`Slot::with`], where nobody has to be waited for; none too where somebody has.
    pub(super) fn try_with<R>(&self, work: impl FnOnce(&mut T) -> Option<R>) -> Option<R> {
        self.home.check().ok()?;
        match &mut *self.place.try_lock().ok()? {
            Place::Free(value) => work(value),
            Place::Taken(_) | Place::Closed => None,
        }
    }

    /// Takes the value for good; none where it was closed before.
    pub(super) fn close(&self, poll: Callback<'_>) -> Result<Option<Box<T>>> {
        let Some(mut held) = self.take(poll)? else { return Ok(None) };
        Ok(held.value.take())
    }

    fn take(&self, poll: Callback<'_>) -> Result<Option<Held<'_, T>>> {
        self.home.check()?;
        let own = thread::current().id();
        let mut place = lock(&self.place);
        while let Place::Taken(owner) = *place {
            if owner == own {
                // It would wait for itself.
                let text = "the fragment is in a call of this very thread's: a signal handler cannot use it";
                return Err(Error::new(Kind::State, text));
            }
            let (again, waited) = self.returned.wait_timeout(place, PATIENCE).unwrap_or_else(PoisonError::into_inner);
            place = again;
            if waited.timed_out() {
                drop(place);
                poll()?;
                place = lock(&self.place);
            }
        }
        match std::mem::replace(&mut *place, Place::Taken(own)) {
            Place::Free(value) => Ok(Some(Held { slot: self, value: Some(value) })),
            closed => {
                *place = closed;
                Ok(None)
            }
        }
    }
}

/// The value while it is out; goes back, or closes the slot, also where `work` panics.
struct Held<'a, T> {
    slot: &'a Slot<T>,
    value: Option<Box<T>>,
}

impl<T> Drop for Held<'_, T> {
    fn drop(&mut self) {
        *lock(&self.slot.place) = self.value.take().map_or(Place::Closed, Place::Free);
        self.slot.returned.notify_one();
    }
}
