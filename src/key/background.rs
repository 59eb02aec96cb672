//! Work that may take long, so that its caller can be interrupted meanwhile.

use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use crate::error::{Error, Kind, Result};
use crate::threads::POLL_INTERVAL;

/// Does `work` in a thread of its own; none where that takes longer than `limit`. The thread is left alone then, as it is when
/// `poll` says to stop.
pub(super) fn in_background<T: Send + 'static>(
    limit: Option<Duration>,
    poll: &mut dyn FnMut() -> Result<()>,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<Option<T>> {
    let (sender, receiver) = sync_channel(1);
    std::thread::Builder::new()
        .name("vmsnap-key".to_owned())
        .spawn(move || {
            // Nobody listens any more where it took too long.
            let _ = sender.send(work());
        })
        .map_err(|error| Error::io("cannot start a thread", error))?;
    let end = limit.and_then(|limit| Instant::now().checked_add(limit));
    loop {
        let left = end.map_or(POLL_INTERVAL, |end| end.saturating_duration_since(Instant::now()).min(POLL_INTERVAL));
        match receiver.recv_timeout(left) {
            Ok(result) => return Ok(Some(result)),
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Error::new(Kind::Provider, "what opens or wraps the key panicked"));
            }
            Err(RecvTimeoutError::Timeout) if end.is_some_and(|end| Instant::now() >= end) => return Ok(None),
            Err(RecvTimeoutError::Timeout) => poll()?,
        }
    }
}
