//! Work that may take long, so that its caller can be interrupted meanwhile.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::error::{Error, Kind, Result};
use crate::threads::{INTERRUPT_INTERVAL, lock};

/// Does `work` in a thread of its own; none where that takes longer than `limit`. The thread is left alone then, as it is when
/// `interrupt` says to stop.
///
/// Where the system allows no more threads, this one does it, and neither can be kept.
pub(super) fn in_background<T: Send + 'static>(
    limit: Option<Duration>,
    interrupt: &mut dyn FnMut() -> Result<()>,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<Option<T>> {
    let panicked = || Error::new(Kind::Provider, "what opens or wraps the key panicked");
    let (sender, receiver) = sync_channel(1);
    // Shared, for the closure of a thread that does not start is lost.
    let work = Arc::new(Mutex::new(Some(work)));
    let handed = Arc::clone(&work);
    let started = std::thread::Builder::new().name("vmsnap-key".to_owned()).spawn(move || {
        let work = lock(&handed).take();
        if let Some(work) = work {
            // Nobody listens any more where it took too long.
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
