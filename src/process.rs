//! The owner process: distinguishes a process from the parent that it was forked from.
//!
//! A forked child inherits nonce batches, locks, and pools whose threads do not exist in it. A value with such state
//! remembers its [`OwnerProcess`] and asks whether it is the current one. The process ID cannot identify the owner,
//! because the first process of every PID namespace has the number 1. Linux clears a page marked `MADV_WIPEONFORK` in
//! every forked child, so a check costs one load.

#![allow(unsafe_code, reason = "maps a page, and hands out references to values that are never freed")]

use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::error::{self, Error, Kind};

const PAGE_BYTES: usize = 4096;

/// The page that a fork clears; null before it is mapped.
static PAGE: AtomicPtr<AtomicU64> = AtomicPtr::new(ptr::null_mut());

/// Set if such a page cannot be mapped.
static NO_PAGE: AtomicBool = AtomicBool::new(false);

/// The last token given out. A child inherits it, so its own tokens differ from those of all its ancestors.
static LAST_TOKEN: AtomicU64 = AtomicU64::new(0);

/// A number that stays the same while this process lives, and differs in a child forked from it.
fn token() -> u64 {
    let Some(cell) = page() else {
        // The kernel, sandbox or emulator lacks MADV_WIPEONFORK (Linux before 4.14): use the process ID.
        return u64::from(std::process::id());
    };
    match cell.load(Ordering::Acquire) {
        0 => {
            let fresh = LAST_TOKEN.fetch_add(1, Ordering::Relaxed) + 1;
            match cell.compare_exchange(0, fresh, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => fresh,
                Err(other_threads) => other_threads,
            }
        }
        token => token,
    }
}

/// The process that made a value. Only there its cipher state, locks and threads may be used.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OwnerProcess(u64);

impl OwnerProcess {
    pub(crate) fn current() -> Self {
        Self(token())
    }

    /// Whether this process is the owner: false in a child forked from it.
    pub(crate) fn is_current(self) -> bool {
        self.0 == token()
    }

    /// Refuses a staged snapshot in a forked child.
    pub(crate) fn check_snapshot(self) -> error::Result<()> {
        if self.is_current() {
            return Ok(());
        }
        let text =
            "the snapshot was created before this process was forked; only its own process can commit or discard it";
        Err(Error::new(Kind::State, text))
    }

    /// Refuses a fragment in a forked child.
    pub(crate) fn check_fragment(self) -> error::Result<()> {
        if self.is_current() {
            return Ok(());
        }
        Err(Error::new(
            Kind::State,
            "the fragment was opened before this process was forked; open it again in this process",
        ))
    }
}

fn page() -> Option<&'static AtomicU64> {
    let mut mapped = PAGE.load(Ordering::Acquire);
    if mapped.is_null() {
        if NO_PAGE.load(Ordering::Relaxed) {
            return None;
        }
        let Some(fresh) = map_page() else {
            NO_PAGE.store(true, Ordering::Relaxed);
            return None;
        };
        // If two threads map at once, one page stays unused while the process lives.
        mapped = match PAGE.compare_exchange(ptr::null_mut(), fresh, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => fresh,
            Err(theirs) => theirs,
        };
    }
    // SAFETY: `mapped` came from map_page(), which maps a readable, writable, page-aligned and zeroed page; it is never
    // unmapped, and an AtomicU64 may hold any bytes.
    Some(unsafe { &*mapped })
}

fn map_page() -> Option<*mut AtomicU64> {
    // SAFETY: the kernel chooses the address of a new private anonymous mapping, so it touches no other memory.
    let page = unsafe {
        mmap_anonymous(ptr::null_mut(), PAGE_BYTES, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE).ok()?
    };
    // SAFETY: the range is exactly the mapping made above, and nothing else refers to it yet. The first call passes
    // invalid advice, which must be refused; BoringSSL makes the same check.
    let wiped = unsafe {
        libc::madvise(page, PAGE_BYTES, -1) != 0 && madvise(page, PAGE_BYTES, Advice::LinuxWipeOnFork).is_ok()
    };
    if wiped {
        return Some(page.cast());
    }
    // SAFETY: the range is the mapping made above, and nothing refers to it.
    let _ = unsafe { munmap(page, PAGE_BYTES) };
    None
}

/// Whether `madvise` does its work if it reports success. QEMU's user-mode emulation does not: it reports success for
/// advice that it does not know.
pub(crate) fn advice_is_taken() -> bool {
    page().is_some()
}

/// A value that each process makes for itself: a forked child leaks its parent's value and makes a new one.
///
/// It uses no lock, because a lock that another thread holds during the fork stays held in the child forever.
pub(crate) struct PerProcess<T: 'static>(AtomicPtr<(u64, T)>);

impl<T: Send + Sync> PerProcess<T> {
    pub(crate) const fn new() -> Self {
        Self(AtomicPtr::new(ptr::null_mut()))
    }

    /// The value of this process, made by `make` on first use.
    pub(crate) fn get<E>(&self, make: impl FnOnce() -> Result<T, E>) -> Result<&'static T, E> {
        let token = token();
        let current = self.0.load(Ordering::Acquire);
        // SAFETY: a non-null pointer was made from a leaked Box below and is never freed.
        if let Some((owner, value)) = unsafe { current.as_ref() }
            && *owner == token
        {
            return Ok(value);
        }
        let fresh = Box::into_raw(Box::new((token, make()?)));
        match self.0.compare_exchange(current, fresh, Ordering::AcqRel, Ordering::Acquire) {
            // SAFETY: leaked just now and never freed from here on.
            Ok(_) => Ok(unsafe { &(*fresh).1 }),
            Err(theirs) => {
                // SAFETY: `fresh` was not published, so this is its only owner.
                drop(unsafe { Box::from_raw(fresh) });
                // SAFETY: another thread of this process published it, and it is never freed.
                Ok(unsafe { &(*theirs).1 })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_stays_the_same_in_all_threads() {
        let here = token();
        assert_eq!(std::thread::spawn(token).join().unwrap(), here);
        assert_ne!(here, 0);
    }

    #[test]
    fn the_kernel_takes_advice_and_refuses_invalid_advice() {
        assert!(advice_is_taken());
    }

    #[test]
    fn a_value_is_made_once() {
        static VALUE: PerProcess<String> = PerProcess::new();
        let first = VALUE.get(|| Ok::<_, ()>("made".to_owned())).unwrap();
        let second = VALUE.get(|| Err("made again")).unwrap();
        assert!(std::ptr::eq(first, second));
    }
}
