//! The end of the patience with a store that does not answer, where nobody can interrupt.

use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::error::{Error, Result};

/// The longest removal of the objects that were written.
const LONGEST_REMOVAL: Duration = Duration::from_secs(60);

/// An interrupt for a removal of objects, which nobody can stop: it ends if the store does not answer.
pub(crate) fn patience() -> impl FnMut() -> Result<()> {
    let deadline = Instant::now() + LONGEST_REMOVAL;
    move || {
        if Instant::now() < deadline {
            return Ok(());
        }
        Err(Error::transient("the store does not answer; vmsnap clean removes the rest", Errno::TIMEDOUT))
    }
}
