//! One stream of bytes, brought by several threads.
//!
//! Each thread brings the bytes of an item, when it is that item's turn. What is handed back begins and ends where `unit`
//! divides the stream: the bytes left over at the end of an item are copied in front of the next one's. Only that is done in
//! turn; what a thread then does with its units, it does while the others do the same.

use std::ops::Range;
use std::sync::{Condvar, Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::threads::lock;

pub(super) struct Turns {
    unit: usize,
    /// The most that is ever carried over.
    room: usize,
    turn: Mutex<Turn>,
    changed: Condvar,
}

#[derive(Default)]
struct Turn {
    next: usize,
    /// Bytes of whole units handed back.
    offset: u64,
    /// What follows them: at least a byte, once there was one.
    carry: Vec<u8>,
    failed: bool,
}

/// The bytes of an item, with room in front for what is carried over.
pub(super) struct Item {
    room: usize,
    bytes: Vec<u8>,
    length: usize,
}

impl Item {
    pub(super) fn new(turns: &Turns, capacity: usize) -> Self {
        Self { room: turns.room, bytes: vec![0; turns.room + capacity], length: 0 }
    }

    pub(super) fn clear(&mut self) {
        self.length = 0;
    }

    /// What is not filled yet.
    pub(super) fn spare(&mut self) -> &mut [u8] {
        &mut self.bytes[self.room + self.length..]
    }

    /// Counts bytes of [`Item::spare`] as filled.
    pub(super) fn grow(&mut self, count: usize) {
        self.length += count;
    }

    #[cfg(test)]
    fn push(&mut self, bytes: &[u8]) {
        self.spare()[..bytes.len()].copy_from_slice(bytes);
        self.grow(bytes.len());
    }

    fn get(&self, units: &Range<usize>) -> &[u8] {
        &self.bytes[units.clone()]
    }
}

/// What is left of a stream.
pub(super) struct Rest {
    pub(super) offset: u64,
    pub(super) carry: Vec<u8>,
}

impl Turns {
    pub(super) fn new(unit: usize, start: &[u8]) -> Self {
        let turn = Turn { carry: start.to_vec(), ..Turn::default() };
        Self { unit, room: unit.max(start.len()), turn: Mutex::new(turn), changed: Condvar::new() }
    }

    /// Puts the item into the stream when it is its turn, and does `also` in that turn. Returns the units that are whole now,
    /// and where in the stream they are.
    pub(super) fn take<'a>(&self, number: usize, item: &'a mut Item, also: impl FnOnce()) -> Result<(u64, &'a [u8])> {
        let mut turn = lock(&self.turn);
        while turn.next != number {
            if turn.failed {
                return Err(Error::interrupted());
            }
            turn = self.changed.wait(turn).unwrap_or_else(PoisonError::into_inner);
        }
        also();
        let start = item.room - turn.carry.len();
        item.bytes[start..item.room].copy_from_slice(&turn.carry);
        let bytes = &item.bytes[start..item.room + item.length];
        // A byte always stays: whether a unit is the last shows only when more follows.
        let whole = bytes.len().saturating_sub(1) / self.unit * self.unit;
        turn.carry.clear();
        turn.carry.extend_from_slice(&bytes[whole..]);
        let offset = turn.offset;
        turn.offset += whole as u64;
        turn.next += 1;
        drop(turn);
        self.changed.notify_all();
        Ok((offset, item.get(&(start..start + whole))))
    }

    /// Lets nobody wait for a turn that never comes, where this thread panics.
    pub(super) fn guard(&self) -> impl Drop {
        PanicGuard(self)
    }

    /// Lets nobody wait for a turn that never comes.
    pub(super) fn fail(&self) {
        lock(&self.turn).failed = true;
        self.changed.notify_all();
    }

    pub(super) fn rest(self) -> Rest {
        let Turn { offset, carry, .. } = self.turn.into_inner().unwrap_or_else(PoisonError::into_inner);
        Rest { offset, carry }
    }
}

struct PanicGuard<'a>(&'a Turns);

impl Drop for PanicGuard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_the_threads_do_the_stream_is_in_order() {
        for unit in [1, 3, 8, 64] {
            let turns = Turns::new(unit, b"start");
            let taken = Mutex::new(Vec::new());
            let next = Mutex::new(0..200_usize);
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        let _guard = turns.guard();
                        let mut item = Item::new(&turns, 100);
                        while let Some(number) = { lock(&next).next() } {
                            item.clear();
                            (0..number % 50).for_each(|at| item.push(&[u8::try_from(number ^ at).unwrap()]));
                            let (offset, units) = turns.take(number, &mut item, || ()).unwrap();
                            assert_eq!((offset % unit as u64, units.len() % unit), (0, 0));
                            lock(&taken).push((offset, units.to_vec()));
                        }
                    });
                }
            });
            let mut taken = taken.into_inner().unwrap();
            taken.sort();
            let Rest { offset, carry } = turns.rest();
            let mut stream: Vec<u8> = taken.into_iter().flat_map(|(_, bytes)| bytes).collect();
            assert_eq!(offset, stream.len() as u64);
            assert!((1..=unit.max(5)).contains(&carry.len()));
            stream.extend(carry);
            let items =
                (0..200_usize).flat_map(|number| (0..number % 50).map(move |at| u8::try_from(number ^ at).unwrap()));
            assert_eq!(stream, b"start".iter().copied().chain(items).collect::<Vec<_>>());
        }
    }

    #[test]
    fn nobody_waits_for_an_item_that_failed() {
        let turns = Turns::new(4, b"");
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| turns.take(1, &mut Item::new(&turns, 0), || ()).map(|_| ()));
            turns.fail();
            assert!(waiting.join().unwrap().unwrap_err().is_interrupted());
        });
    }
}
