//! Joins the batches of several threads into one stream of bytes.
//!
//! A thread adds the bytes of its batch when it is the turn of that batch. In return it gets bytes that begin and end
//! at multiples of `alignment` in the stream: the bytes left over at the end of one batch are copied in front of the
//! next. Only that copy happens in turn. Threads compress, encrypt or write their aligned bytes in parallel.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::buffer;
use crate::error::Result;
use crate::fragment::rope::Rope;
use crate::threads::{Interrupt, lock};

/// Adds batches to the stream in order: a thread waits for the turn of its batch.
pub(super) struct Sequencer {
    alignment: usize,
    /// The maximum number of bytes that are carried over.
    room: usize,
    stream: Mutex<StreamState>,
    changed: Condvar,
}

#[derive(Default)]
struct StreamState {
    next: usize,
    /// The number of aligned bytes that were returned.
    offset: u64,
    /// The bytes after them. Once the stream has a byte, at least one is carried.
    carry: Vec<u8>,
}

impl StreamState {
    /// Adds a batch to the stream, when it is its turn.
    fn join<'a>(&mut self, batch: &'a mut BatchBuffer, alignment: usize) -> Result<(u64, &'a [u8])> {
        let start = batch.room - self.carry.len();
        batch.bytes[start..batch.room].copy_from_slice(&self.carry);
        let bytes = &batch.bytes[start..batch.room + batch.length];
        // At least one byte is carried, because only a later byte shows that the aligned bytes are not the last ones.
        let (aligned, rest) = bytes.split_at(bytes.len().saturating_sub(1) / alignment * alignment);
        self.carry.clear();
        buffer::reserve(&mut self.carry, rest.len())?;
        self.carry.extend_from_slice(rest);
        let offset = self.offset;
        self.offset += aligned.len() as u64;
        self.next += 1;
        Ok((offset, aligned))
    }
}

/// The bytes of a batch, with room in front for the carried bytes.
pub(super) struct BatchBuffer {
    room: usize,
    bytes: Vec<u8>,
    length: usize,
}

impl BatchBuffer {
    fn new(room: usize, capacity: usize) -> Result<Self> {
        Ok(Self { room, bytes: buffer::zeros(room + capacity)?, length: 0 })
    }

    pub(super) fn clear(&mut self) {
        self.length = 0;
    }

    /// Returns the part of the buffer that is not filled yet.
    pub(super) fn spare(&mut self) -> &mut [u8] {
        &mut self.bytes[self.room + self.length..]
    }

    /// Counts the first `count` bytes of [`BatchBuffer::spare`] as filled.
    pub(super) fn grow(&mut self, count: usize) {
        self.length += count;
    }

    #[cfg(test)]
    fn push(&mut self, bytes: &[u8]) {
        self.spare()[..bytes.len()].copy_from_slice(bytes);
        self.grow(bytes.len());
    }
}

/// A batch and its note: bytes about it that are collected in the order of the batches.
pub(super) type AnnotatedBatch = (BatchBuffer, Vec<u8>);

/// The bytes that are left when all batches were added, and their offset in the stream.
pub(super) struct Rest {
    pub(super) offset: u64,
    pub(super) carry: Vec<u8>,
}

impl Sequencer {
    pub(super) fn new(alignment: usize, start: &[u8]) -> Self {
        let stream = StreamState { carry: start.to_vec(), ..StreamState::default() };
        Self { alignment, room: alignment.max(start.len()), stream: Mutex::new(stream), changed: Condvar::new() }
    }

    /// Returns an empty batch for at most `capacity` bytes.
    pub(super) fn batch(&self, capacity: usize) -> Result<BatchBuffer> {
        BatchBuffer::new(self.room, capacity)
    }

    /// Waits for the turn of the batch, calls `also`, and adds the batch to the stream. Returns the aligned bytes, and
    /// their offset in the stream.
    pub(super) fn take<'a>(
        &self,
        number: usize,
        batch: &'a mut BatchBuffer,
        interrupt: &mut Interrupt<'_>,
        also: impl FnOnce() -> Result<()>,
    ) -> Result<(u64, &'a [u8])> {
        let mut stream = self.turn_of(number, interrupt)?;
        also()?;
        let aligned = stream.join(batch, self.alignment)?;
        drop(stream);
        self.changed.notify_all();
        Ok(aligned)
    }

    /// Waits for the turn of the batch, calls `also`, and adds `runs` to the stream without a copy, except for the
    /// carried bytes: those of the previous batch are moved to `head`, and those at the end are copied. Returns the
    /// aligned bytes, and their offset in the stream.
    pub(super) fn take_in_place<'a>(
        &self,
        number: usize,
        runs: &Rope<'a>,
        head: &'a mut Vec<u8>,
        interrupt: &mut Interrupt<'_>,
        also: impl FnOnce() -> Result<()>,
    ) -> Result<(u64, Rope<'a>)> {
        let mut stream = self.turn_of(number, interrupt)?;
        also()?;
        head.clear();
        std::mem::swap(head, &mut stream.carry);
        let mut rope = Rope::new();
        rope.push(head);
        runs.runs().iter().for_each(|run| rope.push(run));
        let aligned = rope.len().saturating_sub(1) / self.alignment * self.alignment;
        buffer::reserve(&mut stream.carry, rope.len() - aligned)?;
        rope.split_off(aligned, |rest| stream.carry.extend_from_slice(rest));
        let offset = stream.offset;
        stream.offset += aligned as u64;
        stream.next += 1;
        drop(stream);
        self.changed.notify_all();
        Ok((offset, rope))
    }

    fn turn_of(&self, number: usize, interrupt: &mut Interrupt<'_>) -> Result<MutexGuard<'_, StreamState>> {
        let mut stream = lock(&self.stream);
        while stream.next != number {
            stream = interrupt.wait(&self.changed, stream, &self.stream)?;
        }
        Ok(stream)
    }

    pub(super) fn rest(self) -> Rest {
        let StreamState { offset, carry, .. } = self.stream.into_inner().unwrap_or_else(PoisonError::into_inner);
        Rest { offset, carry }
    }
}

/// Adds batches to the stream in order when they take very different times. A thread leaves its batch here and goes on
/// with the next one. A thread that finds the next batch in order adds it to the stream.
pub(super) struct ReorderBuffer {
    alignment: usize,
    room: usize,
    capacity: usize,
    most: usize,
    state: Mutex<Reordering>,
    changed: Condvar,
}

#[derive(Default)]
struct Reordering {
    stream: StreamState,
    /// The notes of all batches in the stream, in order.
    notes: Vec<u8>,
    waiting: BTreeMap<usize, AnnotatedBatch>,
    idle: Vec<AnnotatedBatch>,
    made: usize,
}

impl ReorderBuffer {
    /// Creates the buffer for batches of at most `capacity` bytes. At most `most` batches exist at a time.
    pub(super) fn new(alignment: usize, start: &[u8], capacity: usize, most: usize) -> Self {
        let stream = StreamState { carry: start.to_vec(), ..StreamState::default() };
        let state = Mutex::new(Reordering { stream, ..Reordering::default() });
        Self { alignment, room: alignment.max(start.len()), capacity, most, state, changed: Condvar::new() }
    }

    /// Returns an empty batch and its note, or `None` if `most` batches exist.
    pub(super) fn batch(&self) -> Result<Option<AnnotatedBatch>> {
        self.idle(&mut lock(&self.state))
    }

    fn idle(&self, state: &mut Reordering) -> Result<Option<AnnotatedBatch>> {
        if state.idle.is_empty() && state.made < self.most {
            state.idle.push((BatchBuffer::new(self.room, self.capacity)?, Vec::new()));
            state.made += 1;
        }
        Ok(state.idle.pop())
    }

    /// Leaves a batch here, adds the batches that are next to the stream, and passes their aligned bytes to `write`.
    /// Returns an empty batch, so that a thread always has one before it starts work that other threads may wait for.
    pub(super) fn put(
        &self,
        number: usize,
        batch: AnnotatedBatch,
        interrupt: &mut Interrupt<'_>,
        mut write: impl FnMut(u64, &[u8], &mut Interrupt<'_>) -> Result<()>,
    ) -> Result<AnnotatedBatch> {
        let mut state = lock(&self.state);
        state.waiting.insert(number, batch);
        loop {
            let next = state.stream.next;
            if let Some((mut batch, mut note)) = state.waiting.remove(&next) {
                buffer::reserve(&mut state.notes, note.len())?;
                state.notes.extend_from_slice(&note);
                let (offset, aligned) = state.stream.join(&mut batch, self.alignment)?;
                drop(state);
                write(offset, aligned, interrupt)?;
                batch.clear();
                note.clear();
                state = lock(&self.state);
                state.idle.push((batch, note));
                self.changed.notify_all();
            } else if let Some(idle) = self.idle(&mut state)? {
                return Ok(idle);
            } else {
                state = interrupt.wait(&self.changed, state, &self.state)?;
            }
        }
    }

    /// Returns the end of the stream, and all notes.
    pub(super) fn rest(self) -> (Rest, Vec<u8>) {
        let Reordering { stream, notes, .. } = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        (Rest { offset: stream.offset, carry: stream.carry }, notes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    type Taken = Mutex<Vec<(u64, Vec<u8>)>>;

    fn fill(batch: &mut BatchBuffer, number: usize) {
        (0..number % 50).for_each(|at| batch.push(&[u8::try_from(number ^ at).unwrap()]));
    }

    fn check(alignment: usize, taken: Taken, rest: Rest) {
        let mut taken = taken.into_inner().unwrap();
        taken.sort();
        assert!(taken.iter().all(|(offset, aligned)| (offset % alignment as u64, aligned.len() % alignment) == (0, 0)));
        let mut stream: Vec<u8> = taken.into_iter().flat_map(|(_, bytes)| bytes).collect();
        assert_eq!(rest.offset, stream.len() as u64);
        assert!((1..=alignment).contains(&rest.carry.len()));
        stream.extend(rest.carry);
        let batches =
            (0..200_usize).flat_map(|number| (0..number % 50).map(move |at| u8::try_from(number ^ at).unwrap()));
        assert_eq!(stream, b"start".iter().copied().chain(batches).collect::<Vec<_>>());
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
        for alignment in [1, 3, 8, 64] {
            let (sequencer, taken) = (Sequencer::new(alignment, b"start"), Taken::default());
            four_threads(|next| {
                let mut go_on = || Ok(());
                let mut batch = sequencer.batch(100).unwrap();
                while let Some(number) = next() {
                    batch.clear();
                    fill(&mut batch, number);
                    let (offset, aligned) =
                        sequencer.take(number, &mut batch, &mut Interrupt::new(&mut go_on), || Ok(())).unwrap();
                    lock(&taken).push((offset, aligned.to_vec()));
                }
            });
            check(alignment, taken, sequencer.rest());
        }
    }

    #[test]
    fn bytes_that_stay_where_they_are_make_the_same_stream() {
        let batches: Vec<Vec<u8>> = (0..200_usize)
            .map(|number| (0..number % 50).map(|at| u8::try_from(number ^ at).unwrap()).collect())
            .collect();
        for alignment in [1, 3, 8, 64] {
            let (sequencer, taken) = (Sequencer::new(alignment, b"start"), Taken::default());
            four_threads(|next| {
                let mut go_on = || Ok(());
                let mut head = Vec::new();
                while let Some(number) = next() {
                    let mut runs = Rope::new();
                    batches[number].chunks(7).for_each(|run| runs.push(run));
                    let interrupt = &mut Interrupt::new(&mut go_on);
                    let (offset, rope) =
                        sequencer.take_in_place(number, &runs, &mut head, interrupt, || Ok(())).unwrap();
                    lock(&taken).push((offset, rope.runs().concat()));
                }
            });
            check(alignment, taken, sequencer.rest());
        }
    }

    #[test]
    fn batches_that_come_in_any_order_make_the_same_stream() {
        for (alignment, most) in [(1, 4), (3, 5), (8, 9), (64, 200)] {
            let (reordered, taken) = (ReorderBuffer::new(alignment, b"start", 100, most), Taken::default());
            let batches = Mutex::new((0..4).map(|_| reordered.batch().unwrap().unwrap()).collect::<Vec<_>>());
            four_threads(|next| {
                let mut go_on = || Ok(());
                let (mut batch, mut note) = lock(&batches).pop().unwrap();
                while let Some(number) = next() {
                    fill(&mut batch, number);
                    note.push(u8::try_from(number).unwrap());
                    if number % 7 == 0 {
                        std::thread::sleep(std::time::Duration::from_micros(300));
                    }
                    let write = |offset, aligned: &[u8], _: &mut Interrupt<'_>| {
                        lock(&taken).push((offset, aligned.to_vec()));
                        Ok(())
                    };
                    (batch, note) =
                        reordered.put(number, (batch, note), &mut Interrupt::new(&mut go_on), write).unwrap();
                }
            });
            let (rest, notes) = reordered.rest();
            assert_eq!(notes, (0..200).collect::<Vec<u8>>());
            check(alignment, taken, rest);
        }
    }

    fn take(sequencer: &Sequencer, callback: &mut dyn FnMut() -> Result<()>) -> Error {
        sequencer.take(1, &mut sequencer.batch(0).unwrap(), &mut Interrupt::new(callback), || Ok(())).unwrap_err()
    }

    fn put(reordered: &ReorderBuffer, callback: &mut dyn FnMut() -> Result<()>) -> Error {
        reordered
            .put(1, reordered.batch().unwrap().unwrap(), &mut Interrupt::new(callback), |_, _, _| Ok(()))
            .map(drop)
            .unwrap_err()
    }

    #[test]
    fn whoever_waits_for_a_turn_asks_whether_to_go_on() {
        let mut asked = 0;
        let mut stop_at_third = || {
            asked += 1;
            if asked % 3 == 0 { Err(Error::corrupt("stop")) } else { Ok(()) }
        };
        assert!(take(&Sequencer::new(4, b""), &mut stop_at_third).is_corrupt());
        assert!(put(&ReorderBuffer::new(4, b"", 10, 1), &mut stop_at_third).is_corrupt());
        assert_eq!(asked, 6);
    }
}
