//! One stream of bytes, brought by several threads.
//!
//! Each thread brings the bytes of an item, when it is that item's turn. What is handed back begins and ends where `unit`
//! divides the stream: the bytes left over at the end of an item are copied in front of the next one's. Only that is done in
//! turn; what a thread then does with its units, it does while the others do the same.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::buffer;
use crate::error::{Error, Result};
use crate::fragment::rope::Rope;
use crate::threads::{INTERRUPT_INTERVAL, Interrupt, PanicGuard, lock};

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

impl Turn {
    /// Puts an item, whose turn it is, into the stream.
    fn join<'a>(&mut self, item: &'a mut Item, unit: usize) -> Result<(u64, &'a [u8])> {
        let start = item.room - self.carry.len();
        item.bytes[start..item.room].copy_from_slice(&self.carry);
        let bytes = &item.bytes[start..item.room + item.length];
        // A byte always stays: whether a unit is the last shows only when more follows.
        let (units, rest) = bytes.split_at(bytes.len().saturating_sub(1) / unit * unit);
        self.carry.clear();
        buffer::reserve(&mut self.carry, rest.len())?;
        self.carry.extend_from_slice(rest);
        let offset = self.offset;
        self.offset += units.len() as u64;
        self.next += 1;
        Ok((offset, units))
    }
}

/// The bytes of an item, with room in front for what is carried over.
pub(super) struct Item {
    room: usize,
    bytes: Vec<u8>,
    length: usize,
}

impl Item {
    fn new(room: usize, capacity: usize) -> Result<Self> {
        Ok(Self { room, bytes: buffer::zeros(room + capacity)?, length: 0 })
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
}

/// An item, and a note about it.
pub(super) type Noted = (Item, Vec<u8>);

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

    /// An empty item for so many bytes.
    pub(super) fn item(&self, capacity: usize) -> Result<Item> {
        Item::new(self.room, capacity)
    }

    /// Puts the item into the stream when it is its turn, and does `also` in that turn. Returns the units that are whole now,
    /// and where in the stream they are.
    pub(super) fn take<'a>(
        &self,
        number: usize,
        item: &'a mut Item,
        interrupt: &mut Interrupt<'_>,
        also: impl FnOnce() -> Result<()>,
    ) -> Result<(u64, &'a [u8])> {
        let mut turn = self.turn_of(number, interrupt)?;
        also()?;
        let units = turn.join(item, self.unit)?;
        drop(turn);
        self.changed.notify_all();
        Ok(units)
    }

    /// As [`Turns::take`], of bytes that stay where they are: only what is carried over is copied, to `head` and from the end.
    pub(super) fn take_in_place<'a>(
        &self,
        number: usize,
        runs: &Rope<'a>,
        head: &'a mut Vec<u8>,
        interrupt: &mut Interrupt<'_>,
        also: impl FnOnce() -> Result<()>,
    ) -> Result<(u64, Rope<'a>)> {
        let mut turn = self.turn_of(number, interrupt)?;
        also()?;
        head.clear();
        std::mem::swap(head, &mut turn.carry);
        let mut rope = Rope::new();
        rope.push(head);
        runs.runs().iter().for_each(|run| rope.push(run));
        let units = rope.len().saturating_sub(1) / self.unit * self.unit;
        buffer::reserve(&mut turn.carry, rope.len() - units)?;
        rope.split_off(units, |rest| turn.carry.extend_from_slice(rest));
        let offset = turn.offset;
        turn.offset += units as u64;
        turn.next += 1;
        drop(turn);
        self.changed.notify_all();
        Ok((offset, rope))
    }

    fn turn_of(&self, number: usize, interrupt: &mut Interrupt<'_>) -> Result<MutexGuard<'_, Turn>> {
        let mut turn = lock(&self.turn);
        while turn.next != number {
            if turn.failed {
                return Err(Error::interrupted());
            }
            turn = wait(&self.changed, turn, &self.turn, interrupt)?;
        }
        Ok(turn)
    }

    /// Lets nobody wait for a turn that never comes, where this thread panics.
    pub(super) fn guard(&self) -> PanicGuard<impl Fn()> {
        PanicGuard(|| self.fail())
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

/// The same for items that take very different times: a thread leaves its item on the shelf and goes on with the next one, and
/// whoever finds that the next in order is there takes it from there.
pub(super) struct Shelf {
    unit: usize,
    room: usize,
    capacity: usize,
    most: usize,
    shelved: Mutex<Shelved>,
    changed: Condvar,
}

#[derive(Default)]
struct Shelved {
    turn: Turn,
    /// Notes of the items so far, in order.
    notes: Vec<u8>,
    waiting: BTreeMap<usize, Noted>,
    idle: Vec<Noted>,
    made: usize,
}

impl Shelf {
    /// For items of at most `capacity` bytes, of which there are not more than `most` at a time.
    pub(super) fn new(unit: usize, start: &[u8], capacity: usize, most: usize) -> Self {
        let turn = Turn { carry: start.to_vec(), ..Turn::default() };
        let shelved = Mutex::new(Shelved { turn, ..Shelved::default() });
        Self { unit, room: unit.max(start.len()), capacity, most, shelved, changed: Condvar::new() }
    }

    /// An empty item, and a note for it; none where there are enough.
    pub(super) fn item(&self) -> Result<Option<Noted>> {
        self.idle(&mut lock(&self.shelved))
    }

    fn idle(&self, shelved: &mut Shelved) -> Result<Option<Noted>> {
        if shelved.idle.is_empty() && shelved.made < self.most {
            shelved.idle.push((Item::new(self.room, self.capacity)?, Vec::new()));
            shelved.made += 1;
        }
        Ok(shelved.idle.pop())
    }

    /// Leaves an item, lets `write` have the units that are whole now, and returns an empty item. A thread has one whenever it
    /// begins with what others may have to wait for.
    pub(super) fn put(
        &self,
        number: usize,
        item: Noted,
        interrupt: &mut Interrupt<'_>,
        mut write: impl FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<Noted> {
        let mut shelved = lock(&self.shelved);
        shelved.waiting.insert(number, item);
        loop {
            if shelved.turn.failed {
                return Err(Error::interrupted());
            }
            let next = shelved.turn.next;
            if let Some((mut item, mut note)) = shelved.waiting.remove(&next) {
                buffer::reserve(&mut shelved.notes, note.len())?;
                shelved.notes.extend_from_slice(&note);
                let (offset, units) = shelved.turn.join(&mut item, self.unit)?;
                drop(shelved);
                write(offset, units)?;
                item.clear();
                note.clear();
                shelved = lock(&self.shelved);
                shelved.idle.push((item, note));
                self.changed.notify_all();
            } else if let Some(idle) = self.idle(&mut shelved)? {
                return Ok(idle);
            } else {
                shelved = wait(&self.changed, shelved, &self.shelved, interrupt)?;
            }
        }
    }

    pub(super) fn guard(&self) -> PanicGuard<impl Fn()> {
        PanicGuard(|| self.fail())
    }

    pub(super) fn fail(&self) {
        lock(&self.shelved).turn.failed = true;
        self.changed.notify_all();
    }

    /// The rest, and all notes.
    pub(super) fn rest(self) -> (Rest, Vec<u8>) {
        let Shelved { turn, notes, .. } = self.shelved.into_inner().unwrap_or_else(PoisonError::into_inner);
        (Rest { offset: turn.offset, carry: turn.carry }, notes)
    }
}

/// Waits for a change, not for long, and asks whether to go on, without the lock.
fn wait<'a, T>(
    changed: &Condvar,
    guard: MutexGuard<'_, T>,
    mutex: &'a Mutex<T>,
    interrupt: &mut Interrupt<'_>,
) -> Result<MutexGuard<'a, T>> {
    drop(changed.wait_timeout(guard, INTERRUPT_INTERVAL));
    interrupt.check()?;
    Ok(lock(mutex))
}

#[cfg(test)]
mod tests {
    use super::*;

    type Taken = Mutex<Vec<(u64, Vec<u8>)>>;

    fn fill(item: &mut Item, number: usize) {
        (0..number % 50).for_each(|at| item.push(&[u8::try_from(number ^ at).unwrap()]));
    }

    fn check(unit: usize, taken: Taken, rest: Rest) {
        let mut taken = taken.into_inner().unwrap();
        taken.sort();
        assert!(taken.iter().all(|(offset, units)| (offset % unit as u64, units.len() % unit) == (0, 0)));
        let mut stream: Vec<u8> = taken.into_iter().flat_map(|(_, bytes)| bytes).collect();
        assert_eq!(rest.offset, stream.len() as u64);
        assert!((1..=unit).contains(&rest.carry.len()));
        stream.extend(rest.carry);
        let items =
            (0..200_usize).flat_map(|number| (0..number % 50).map(move |at| u8::try_from(number ^ at).unwrap()));
        assert_eq!(stream, b"start".iter().copied().chain(items).collect::<Vec<_>>());
    }

    fn four_threads(work: impl Fn(&mut dyn FnMut() -> Option<usize>) + Sync) {
        let next = Mutex::new(0..200_usize);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| work(&mut || lock(&next).next()));
            }
        });
    }

    #[test]
    fn whatever_the_threads_do_the_stream_is_in_order() {
        for unit in [1, 3, 8, 64] {
            let (turns, taken) = (Turns::new(unit, b"start"), Taken::default());
            four_threads(|next| {
                let _guard = turns.guard();
                let mut go_on = || Ok(());
                let mut item = turns.item(100).unwrap();
                while let Some(number) = next() {
                    item.clear();
                    fill(&mut item, number);
                    let (offset, units) =
                        turns.take(number, &mut item, &mut Interrupt::new(&mut go_on), || Ok(())).unwrap();
                    lock(&taken).push((offset, units.to_vec()));
                }
            });
            check(unit, taken, turns.rest());
        }
    }

    #[test]
    fn bytes_that_stay_where_they_are_make_the_same_stream() {
        let items: Vec<Vec<u8>> = (0..200_usize)
            .map(|number| (0..number % 50).map(|at| u8::try_from(number ^ at).unwrap()).collect())
            .collect();
        for unit in [1, 3, 8, 64] {
            let (turns, taken) = (Turns::new(unit, b"start"), Taken::default());
            four_threads(|next| {
                let mut go_on = || Ok(());
                let mut head = Vec::new();
                while let Some(number) = next() {
                    let mut runs = Rope::new();
                    items[number].chunks(7).for_each(|run| runs.push(run));
                    let interrupt = &mut Interrupt::new(&mut go_on);
                    let (offset, rope) = turns.take_in_place(number, &runs, &mut head, interrupt, || Ok(())).unwrap();
                    lock(&taken).push((offset, rope.runs().concat()));
                }
            });
            check(unit, taken, turns.rest());
        }
    }

    #[test]
    fn from_a_shelf_too() {
        for (unit, most) in [(1, 4), (3, 5), (8, 9), (64, 200)] {
            let (shelf, taken) = (Shelf::new(unit, b"start", 100, most), Taken::default());
            let items = Mutex::new((0..4).map(|_| shelf.item().unwrap().unwrap()).collect::<Vec<_>>());
            four_threads(|next| {
                let _guard = shelf.guard();
                let mut go_on = || Ok(());
                let (mut item, mut note) = lock(&items).pop().unwrap();
                while let Some(number) = next() {
                    fill(&mut item, number);
                    note.push(u8::try_from(number).unwrap());
                    if number % 7 == 0 {
                        std::thread::sleep(std::time::Duration::from_micros(300));
                    }
                    let write = |offset, units: &[u8]| {
                        lock(&taken).push((offset, units.to_vec()));
                        Ok(())
                    };
                    (item, note) = shelf.put(number, (item, note), &mut Interrupt::new(&mut go_on), write).unwrap();
                }
            });
            let (rest, notes) = shelf.rest();
            assert_eq!(notes, (0..200).collect::<Vec<u8>>());
            check(unit, taken, rest);
        }
    }

    fn take(turns: &Turns, callback: &mut dyn FnMut() -> Result<()>) -> Error {
        turns.take(1, &mut turns.item(0).unwrap(), &mut Interrupt::new(callback), || Ok(())).unwrap_err()
    }

    fn put(shelf: &Shelf, callback: &mut dyn FnMut() -> Result<()>) -> Error {
        shelf
            .put(1, shelf.item().unwrap().unwrap(), &mut Interrupt::new(callback), |_, _| Ok(()))
            .map(drop)
            .unwrap_err()
    }

    #[test]
    fn nobody_waits_for_an_item_that_failed() {
        let (turns, shelf) = (Turns::new(4, b""), Shelf::new(4, b"", 10, 1));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| take(&turns, &mut || Ok(())));
            let shelving = scope.spawn(|| put(&shelf, &mut || Ok(())));
            turns.fail();
            shelf.fail();
            assert!(waiting.join().unwrap().is_interrupted());
            assert!(shelving.join().unwrap().is_interrupted());
        });
    }

    #[test]
    fn whoever_waits_for_a_turn_asks_whether_to_go_on() {
        let mut asked = 0;
        let mut stop_at_third = || {
            asked += 1;
            if asked % 3 == 0 { Err(Error::corrupt("stop")) } else { Ok(()) }
        };
        assert!(take(&Turns::new(4, b""), &mut stop_at_third).is_corrupt());
        assert!(put(&Shelf::new(4, b"", 10, 1), &mut stop_at_third).is_corrupt());
        assert_eq!(asked, 6);
    }
}
