//! Consecutive bytes of a fragment that are scattered in memory.

use crate::buffer;
use crate::error::Result;

/// Consecutive runs of bytes, none of them empty.
pub(crate) struct Rope<'a> {
    runs: Vec<&'a [u8]>,
    length: usize,
}

impl<'a> Rope<'a> {
    pub(crate) fn new() -> Self {
        Self { runs: Vec::new(), length: 0 }
    }

    pub(crate) fn push(&mut self, run: &'a [u8]) {
        if !run.is_empty() {
            self.runs.push(run);
            self.length += run.len();
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.length
    }

    pub(crate) fn runs(&self) -> &[&'a [u8]] {
        &self.runs
    }

    /// Keeps the first `length` bytes, and passes the runs of the rest to `take`.
    pub(crate) fn split_off(&mut self, length: usize, mut take: impl FnMut(&[u8])) {
        let mut before = 0;
        let kept = self.runs.iter().take_while(|run| {
            before += run.len();
            before <= length
        });
        let kept = kept.count();
        let whole: usize = self.runs[..kept].iter().map(|run| run.len()).sum();
        for (number, run) in self.runs.split_off(kept).into_iter().enumerate() {
            let (first, rest) = run.split_at(if number == 0 { (length - whole).min(run.len()) } else { 0 });
            if !first.is_empty() {
                self.runs.push(first);
            }
            take(rest);
        }
        self.length = self.length.min(length);
    }

    /// Passes all bytes to `take`, `step` at a time (the last may be fewer). Bytes that are scattered are first copied
    /// to `room`.
    pub(crate) fn in_steps(
        &self,
        step: usize,
        room: &mut Vec<u8>,
        mut take: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        room.clear();
        for run in &self.runs {
            let mut rest = *run;
            if !room.is_empty() {
                let (now, later) = rest.split_at((step - room.len()).min(rest.len()));
                buffer::reserve(room, now.len())?;
                room.extend_from_slice(now);
                rest = later;
                if room.len() < step {
                    continue;
                }
                take(room)?;
                room.clear();
            }
            let (whole, last) = rest.split_at(rest.len() / step * step);
            whole.chunks_exact(step).try_for_each(&mut take)?;
            buffer::reserve(room, last.len())?;
            room.extend_from_slice(last);
        }
        if room.is_empty() { Ok(()) } else { take(room) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_steps_do_not_depend_on_the_runs() {
        let bytes: Vec<u8> = (0..=255).collect();
        for step in [1, 3, 16, 100, 256, 1000] {
            for cuts in [vec![], vec![1], vec![16, 32], vec![0, 15, 17, 100, 100, 255]] {
                let (mut rope, mut at) = (Rope::new(), 0);
                for cut in cuts.into_iter().chain([bytes.len()]) {
                    rope.push(&bytes[at..cut]);
                    at = cut;
                }
                let mut found = Vec::new();
                rope.in_steps(step, &mut Vec::new(), |bytes| {
                    found.push(bytes.to_vec());
                    Ok(())
                })
                .unwrap();
                assert_eq!(found, bytes.chunks(step).map(<[u8]>::to_vec).collect::<Vec<_>>());
                for length in [256, 255, 100, 17, 16, 1, 0] {
                    let mut rest = Vec::new();
                    let before = rope.len();
                    rope.split_off(length, |run| rest.extend_from_slice(run));
                    assert_eq!(rope.runs().concat(), bytes[..length]);
                    assert_eq!((rope.len(), &rest[..]), (length, &bytes[length..before]));
                    assert!(rope.runs().iter().all(|run| !run.is_empty()));
                }
            }
        }
    }
}
