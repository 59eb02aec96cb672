//! Runs long work in a thread of its own, so that the caller can be interrupted.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::error::{Error, Kind, Result};
use crate::threads::{INTERRUPT_INTERVAL, lock};

/// Runs `work` in a thread of its own; returns `None` if that takes longer than `limit`. In this case, and if
/// `interrupt` returns an error, the thread continues unobserved.
///
/// If the system refuses another thread, the calling thread does the work, without a limit and without interruption.
pub(super) fn in_background<T: Send + 'static>(
    limit: Option<Duration>,
    interrupt: &mut dyn FnMut() -> Result<()>,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<Option<T>> {
    let panicked = || Error::new(Kind::Provider, "wrapping or unwrapping the key panicked");
    let (sender, receiver) = sync_channel(1);
    // Shared, because a thread that does not start drops its closure.
    let work = Arc::new(Mutex::new(Some(work)));
    let handed = Arc::clone(&work);
    let started = std::thread::Builder::new().name("vmsnap-key".to_owned()).spawn(move || {
        let work = lock(&handed).take();
        if let Some(work) = work {
            // The receiver is gone if the work took too long.
            let _ = sender.send(work());
        }
    });
    if started.is_err() {
        let work = lock(&work).take();
        return work.map(|work| catch_unwind(AssertUnwindSafe(work)).map_err(|_| panicked())).transpose();
    }
    let end = limit.and_then(|limit| Instant::now().checked_add(limit));
    loop {
        let left =
            end.map_or(INTERRUPT_INTERVAL, |end| end.saturating_duration_since(Instant::now()).min(INTERRUPT_INTERVAL));
        match receiver.recv_timeout(left) {
            Ok(result) => return Ok(Some(result)),
            Err(RecvTimeoutError::Disconnected) => return Err(panicked()),
            Err(RecvTimeoutError::Timeout) if end.is_some_and(|end| Instant::now() >= end) => return Ok(None),
            Err(RecvTimeoutError::Timeout) => interrupt()?,
        }
    }
}
