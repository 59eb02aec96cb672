//! Fragments that are finished when they are dropped, and the errors of those that could not be finished.

use std::io::{self, Write};
use std::sync::{Arc, OnceLock};

use crate::error::{Error, Kind, Result};
use crate::fragment::Fragment;

/// The first error of a dropped fragment that could not be finished. All handles of one snapshot in this process share
/// it.
#[derive(Clone, Default)]
pub(super) struct DropError(Arc<OnceLock<Lost>>);

/// The text and errno of an error, which itself cannot be cloned, so that it can be reported many times.
struct Lost {
    text: String,
    errno: Option<i32>,
}

impl DropError {
    /// Fails if a fragment of the snapshot was lost when it was dropped.
    pub(super) fn check(&self) -> Result<()> {
        let Some(Lost { text, errno }) = self.0.get() else { return Ok(()) };
        let text =
            format!("the snapshot is incomplete: a dropped fragment could not be finished: {text}; create it again");
        Err(match errno {
            Some(errno) => Error::with_source(Kind::State, text, io::Error::from_raw_os_error(*errno)),
            None => Error::new(Kind::State, text),
        })
    }

    fn set(&self, error: &Error) {
        // Only the first error is kept, because the snapshot is incomplete already.
        let _ = self.0.set(Lost { text: error.to_string(), errno: error.raw_os_error() });
    }
}

/// A fragment that is finished when it is dropped, because callers written for crosvm do not finish it otherwise.
pub(super) struct DroppedFragment {
    fragment: Fragment,
    error: DropError,
}

impl DroppedFragment {
    pub(super) fn new(fragment: Fragment, error: DropError) -> Self {
        Self { fragment, error }
    }
}

impl Write for DroppedFragment {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let written = self.fragment.write(data)?;
        // A plain fragment would collect small writes, and their error would appear only when it is dropped.
        self.fragment.flush()?;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.fragment.flush()
    }
}

impl Drop for DroppedFragment {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // The fragment is incomplete, and removes its file when it is dropped unfinished.
            return;
        }
        match self.fragment.finish_interruptible(&mut || Ok(())) {
            Ok(()) => {}
            // The caller has the error of an earlier write, or this is a forked process, in which a drop does nothing.
            Err(error) if error.is_state() => {}
            Err(error) => self.error.set(&error),
        }
    }
}
