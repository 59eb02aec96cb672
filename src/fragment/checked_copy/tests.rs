//! Every kind of input and output, sizes at all borders, and damage everywhere.

use std::io;
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};

mod objects;

use objects::{AT, Failing, Object, Slow, Stuck};

use super::super::batches::BATCH_BYTES;
use super::*;
use crate::cipher::{MAX_CHUNK_SIZE_BYTES, encrypt_message};
use crate::store::pipe::Pipe;

/// Where the fragment begins in a positioned output.
const TO: u64 = 512;

/// The bytes of a stream behind the fragment.
const NEXT: &[u8] = b"the next member";

/// A fragment of a snapshot.
struct Sealed {
    stored: Vec<u8>,
    entry: Entry,
    key: Option<SecretKey>,
}

fn path() -> SnapshotPath {
    SnapshotPath::try_from("devices/disk".to_owned()).unwrap()
}

fn pattern(length: usize) -> Vec<u8> {
    (0_u32..).flat_map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes()).take(length).collect()
}

impl Sealed {
    fn plain(contents: Vec<u8>) -> Self {
        let size = contents.len() as u64;
        let proof = Proof::Blake3(*blake3::hash(&contents).as_bytes());
        Self { stored: contents, entry: Entry { size, stored_size: size, proof }, key: None }
    }

    fn encrypted(contents: &[u8], chunk_size_bytes: usize) -> Self {
        let key = SecretKey::from([7; 32]);
        let stored = encrypt_message(&key, &aad(&path()), chunk_size_bytes, contents).unwrap();
        let tag = header_tag(stored.first_chunk().unwrap());
        let proof = Proof::HeaderTag { chunk_size_bytes: chunk_size_bytes as u64, tag };
        let entry = Entry { size: contents.len() as u64, stored_size: stored.len() as u64, proof };
        Self { stored, entry, key: Some(key) }
    }

    fn copy(&self, input: Input<'_>, output: Output<'_>, threads: usize) -> Result<()> {
        let mut go_on = || Ok(());
        self.copy_with(input, output, threads, &mut go_on)
    }

    fn copy_with(
        &self,
        input: Input<'_>,
        output: Output<'_>,
        threads: usize,
        callback: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let interrupt = &mut Interrupt::new(callback);
        copy_checked(input, output, &path(), &self.entry, self.key.as_ref(), threads, interrupt)
    }

    /// Copies `stored` through every pair of an input and an output; all must agree.
    fn copy_everywhere(&self, stored: &[u8]) -> Result<()> {
        let length = self.stored.len();
        let object = Object::holding(stored);
        let piped = [stored, NEXT].concat();
        let mut results = Vec::new();
        for threads in [1, 3] {
            let results_before = results.len();
            for sparse in [true, false] {
                let copy = Object::new_output(sparse);
                results.push(self.copy(Input::At(&object, AT), Output::At(&copy, TO), threads));
                if results.last().unwrap().is_ok() {
                    assert_eq!(copy.contents(TO, length), self.stored);
                }
                let copy = Object::new_output(sparse);
                let mut stream = Slow::new(&piped[..]);
                results.push(self.copy(Input::Stream(&mut stream), Output::At(&copy, TO), threads));
                if results.last().unwrap().is_ok() {
                    assert_eq!(copy.contents(TO, length), self.stored);
                    assert_eq!(stream.stream, NEXT);
                }
            }
            let mut copy = Slow::new(Vec::new());
            results.push(self.copy(Input::At(&object, AT), Output::Stream(&mut copy), threads));
            if results.last().unwrap().is_ok() {
                assert_eq!(copy.stream, self.stored);
            }
            let (mut stream, mut copy) = (&piped[..], Vec::new());
            results.push(self.copy(Input::Stream(&mut stream), Output::Stream(&mut copy), threads));
            if results.last().unwrap().is_ok() {
                assert_eq!((stream, copy), (NEXT, self.stored.clone()));
            }
            results.push(self.copy(Input::At(&object, AT), Output::Nowhere, threads));
            results.push(self.copy(Input::Stream(&mut &piped[..]), Output::Nowhere, threads));
            assert_eq!(results.len() - results_before, 8);
        }
        let texts: Vec<_> = results.iter().map(|result| format!("{result:?}")).collect();
        assert!(texts.iter().all(|text| *text == texts[0]), "{texts:#?}");
        results.pop().unwrap()
    }

    /// Checks that a change of one bit is found, wherever it is.
    fn is_damage_found(&self, at: usize) -> Error {
        let mut damaged = self.stored.clone();
        damaged[at] ^= 1;
        self.copy_everywhere(&damaged).unwrap_err()
    }
}

/// A number of bytes and its neighbours.
fn around(bytes: usize) -> [usize; 3] {
    [bytes - 1, bytes, bytes + 1]
}

#[test]
fn a_plain_fragment_of_any_size_is_copied() {
    let window = 3 * WINDOW_BYTES_PER_THREAD;
    for length in [0, 1].into_iter().chain([SUBTREE_BYTES, BATCH_BYTES, 3 * BATCH_BYTES, window].map(around).concat()) {
        Sealed::plain(pattern(length)).copy_everywhere(&pattern(length)).unwrap();
    }
}

#[test]
fn an_encrypted_fragment_of_any_size_and_chunk_size_is_copied() {
    for chunk in [32, 4096, 65_536, 1_000_003] {
        let batch = batch_bytes(segment_size(chunk)) / segment_size(chunk) * chunk;
        let mut lengths = [chunk, 2 * chunk, batch, 2 * batch].map(around).concat();
        lengths.extend([0, 1]);
        for length in lengths {
            let sealed = Sealed::encrypted(&pattern(length), chunk);
            sealed.copy_everywhere(&sealed.stored).unwrap();
        }
    }
    for chunk in [4096, 1 << 20] {
        let sealed = Sealed::encrypted(&pattern(3 * WINDOW_BYTES_PER_THREAD + 5), chunk);
        sealed.copy_everywhere(&sealed.stored).unwrap();
    }
}

#[test]
fn the_largest_chunks_are_copied_one_by_one() {
    let sealed = Sealed::encrypted(&pattern(MAX_CHUNK_SIZE_BYTES + 1), MAX_CHUNK_SIZE_BYTES);
    let (object, copy) = (Object::holding(&sealed.stored), Object::new_output(true));
    sealed.copy(Input::At(&object, AT), Output::At(&copy, TO), 2).unwrap();
    assert_eq!(copy.contents(TO, sealed.stored.len()), sealed.stored);
    let mut copy = Vec::new();
    sealed.copy(Input::Stream(&mut &sealed.stored[..]), Output::Stream(&mut copy), 2).unwrap();
    assert_eq!(copy, sealed.stored);
}

#[test]
fn damage_anywhere_is_found() {
    for length in [1, 1000, SUBTREE_BYTES, 3 * BATCH_BYTES + 1] {
        let plain = Sealed::plain(pattern(length));
        for at in [0, length / 2, length - 1] {
            let error = plain.is_damage_found(at);
            assert!(error.is_corrupt() && error.to_string().contains("have changed since"), "{error}");
        }
    }
    for chunk in [64, 4096, 300_000] {
        let encrypted = Sealed::encrypted(&pattern(700_000), chunk);
        let length = encrypted.stored.len();
        for at in [10, HEADER_BYTES, HEADER_BYTES + 40, length / 2, length - 1] {
            let error = encrypted.is_damage_found(at);
            assert!(error.is_authentication(), "{at}: {error}");
        }
        for at in [0, 5, HEADER_BYTES - 1] {
            let error = encrypted.is_damage_found(at);
            assert!(error.is_corrupt(), "{at}: {error}");
        }
    }
}

#[test]
fn a_fragment_that_is_authentic_and_another_one_is_refused() {
    let sealed = Sealed::encrypted(&pattern(5000), 4096);
    // A later version of the fragment, and one with other chunks.
    for chunk in [4096, 4095] {
        let other = Sealed::encrypted(&pattern(5000), chunk);
        let error = sealed.copy_everywhere(&other.stored).unwrap_err();
        assert!(error.is_corrupt() && error.to_string().contains("differs from the manifest"), "{error}");
    }
    let error = sealed.copy_everywhere(&pattern(sealed.stored.len())).unwrap_err();
    assert!(error.is_corrupt() && error.to_string().contains("no FLOE header"), "{error}");
    // The chunk size of the entry counts, even if the tag is right.
    let proof = Proof::HeaderTag { chunk_size_bytes: 8192, tag: header_tag(sealed.stored.first_chunk().unwrap()) };
    let other = Sealed { entry: Entry { proof, ..sealed.entry }, ..sealed };
    assert!(other.copy_everywhere(&other.stored).unwrap_err().is_corrupt());
}

#[test]
fn an_encrypted_fragment_needs_its_own_key_and_path() {
    let sealed = Sealed::encrypted(b"secret", 4096);
    let other = Sealed { key: Some(SecretKey::from([8; 32])), ..sealed };
    assert!(other.copy_everywhere(&other.stored).unwrap_err().is_authentication());
    let without = Sealed { key: None, ..other };
    assert!(without.copy_everywhere(&without.stored).unwrap_err().is_key_unavailable());
    let moved = Sealed { key: Some(SecretKey::from([7; 32])), ..without };
    let (mut stream, elsewhere) = (&moved.stored[..], SnapshotPath::try_from("disk".to_owned()).unwrap());
    let (mut go_on, key) = (|| Ok(()), moved.key.as_ref());
    let interrupt = &mut Interrupt::new(&mut go_on);
    let copied = copy_checked(Input::Stream(&mut stream), Output::Nowhere, &elsewhere, &moved.entry, key, 2, interrupt);
    assert!(copied.unwrap_err().is_authentication());
}

#[test]
fn a_truncated_fragment_ends_too_early() {
    for sealed in [
        Sealed::plain(pattern(1)),
        Sealed::plain(pattern(3 * BATCH_BYTES)),
        Sealed::encrypted(&[], 4096),
        Sealed::encrypted(&pattern(3 * BATCH_BYTES), 4096),
    ] {
        let length = sealed.stored.len();
        for left in [0, length / 2, length - 1] {
            let left = &sealed.stored[..left];
            let said = format!("ends before its {length} bytes");
            let object = Object::holding(left);
            for threads in [1, 3] {
                for error in [
                    sealed.copy(Input::At(&object, AT), Output::Nowhere, threads).unwrap_err(),
                    sealed.copy(Input::Stream(&mut Slow::new(left)), Output::Nowhere, threads).unwrap_err(),
                ] {
                    assert!(error.is_corrupt(), "{error}");
                    assert_eq!(error.to_string(), said);
                }
            }
        }
    }
    // An offset of a forged archive.
    let object = Object::holding(&[]);
    assert!(Sealed::plain(vec![1]).copy(Input::At(&object, u64::MAX), Output::Nowhere, 1).unwrap_err().is_corrupt());
}

#[test]
fn a_segment_is_not_written_before_it_is_checked() {
    let sealed = Sealed::encrypted(&pattern(3 * BATCH_BYTES), 4096);
    let mut damaged = sealed.stored.clone();
    damaged[HEADER_BYTES + 50] ^= 1;
    let mut copy = Vec::new();
    sealed.copy(Input::Stream(&mut &damaged[..]), Output::Stream(&mut copy), 2).unwrap_err();
    assert_eq!(copy, sealed.stored[..HEADER_BYTES]);
    let (object, copy) = (Object::holding(&damaged), Object::new_output(true));
    sealed.copy(Input::At(&object, AT), Output::At(&copy, 0), 1).unwrap_err();
    assert_eq!(copy.moved(), HEADER_BYTES as u64);
}

#[test]
fn holes_stay_holes_and_are_not_read() {
    const SIZE: u64 = 64 << 20;
    let file = tempfile::tempfile().unwrap();
    // The data begins in the middle of a batch, after a part of the hole.
    file.write_all_at(&pattern(100_000), AT + SIZE / 2 + 200_000).unwrap();
    file.set_len(AT + SIZE).unwrap();
    let mut contents = vec![0; usize::try_from(SIZE).unwrap()];
    file.read_exact_at(&mut contents, AT).unwrap();
    let sealed = Sealed::plain(contents);

    let (object, copy) = (Object::new(file), Object::new_output(true));
    sealed.copy(Input::At(&object, AT), Output::At(&copy, TO), 3).unwrap();
    // At most one batch on each side of the data.
    assert!(object.moved() <= 100_000 + 2 * BATCH_BYTES as u64, "{}", object.moved());
    let mut piped = Vec::new();
    sealed.copy(Input::At(&object, AT), Output::Stream(&mut piped), 3).unwrap();
    assert!(piped == sealed.stored);
    let unpiped = Object::new_output(true);
    sealed.copy(Input::Stream(&mut &piped[..]), Output::At(&unpiped, TO), 3).unwrap();
    for copy in [copy, unpiped] {
        assert!(copy.moved() <= 100_000 + 2 * BATCH_BYTES as u64, "{}", copy.moved());
        // The owner sets the size.
        copy.file.set_len(TO + SIZE).unwrap();
        assert!(copy.file.metadata().unwrap().blocks() * 512 < SIZE / 16);
        assert!(copy.contents(TO, sealed.stored.len()) == sealed.stored);
    }
    let full = Object::new_output(false);
    sealed.copy(Input::At(&object, AT), Output::At(&full, TO), 3).unwrap();
    assert_eq!(full.moved(), SIZE);
}

#[test]
fn an_error_of_the_input_or_output_ends_the_copy_with_its_errno() {
    let contents = pattern(4 * WINDOW_BYTES_PER_THREAD);
    for sealed in [Sealed::encrypted(&contents, 4096), Sealed::plain(contents)] {
        for threads in [1, 2] {
            let object = Object::holding(&sealed.stored);
            let errno = |input: Input<'_>, output: Output<'_>| {
                sealed.copy(input, output, threads).unwrap_err().raw_os_error().unwrap()
            };
            let mut stream = &sealed.stored[..];
            assert_eq!(errno(Input::At(&object, AT), Output::At(&Failing, 0)), libc::ENOSPC);
            assert!(object.moved() <= (threads * 2 * BATCH_BYTES) as u64, "{}", object.moved());
            assert_eq!(errno(Input::Stream(&mut stream), Output::Stream(&mut Failing)), libc::EPIPE);
            assert!(stream.len() >= sealed.stored.len() - threads * WINDOW_BYTES_PER_THREAD - HEADER_BYTES);
            assert_eq!(errno(Input::Stream(&mut Failing), Output::Nowhere), libc::EIO);
        }
    }
}

#[test]
fn an_interrupt_ends_a_copy_that_waits() {
    let contents = pattern(4 * BATCH_BYTES);
    for sealed in [Sealed::encrypted(&contents, 4096), Sealed::plain(contents)] {
        let object = Object::holding(&sealed.stored);
        for threads in [1, 3] {
            let stopped = |input: Input<'_>, output: Output<'_>| {
                let mut calls = 0;
                let copied = sealed.copy_with(input, output, threads, &mut || {
                    calls += 1;
                    if calls == 2 { Err(Error::interrupted()) } else { Ok(()) }
                });
                assert!(copied.unwrap_err().is_interrupted());
                assert_eq!(calls, 2);
            };
            stopped(Input::At(&Stuck, 0), Output::Nowhere);
            stopped(Input::At(&object, AT), Output::At(&Stuck, 0));
            stopped(Input::At(&object, AT), Output::Stream(&mut Stuck));
            stopped(Input::Stream(&mut Stuck), Output::At(&Stuck, 0));
            stopped(Input::Stream(&mut &sealed.stored[..]), Output::At(&Stuck, 0));
            stopped(Input::Stream(&mut &sealed.stored[..]), Output::Stream(&mut Stuck));
        }
    }
}

#[test]
fn a_pipe_can_be_interrupted_while_it_is_empty_or_full() {
    // More than the capacity of a pipe.
    let sealed = Sealed::plain(pattern(2 << 20));
    let stop_at_once = &mut || Err(Error::interrupted());
    let (reader, writer) = io::pipe().unwrap();
    let (mut empty, mut full) = (Pipe::new(OwnedFd::from(reader).into()), Pipe::new(OwnedFd::from(writer).into()));
    let copied = sealed.copy_with(Input::Stream(&mut empty), Output::Nowhere, 2, stop_at_once);
    assert!(copied.unwrap_err().is_interrupted());
    let copied = sealed.copy_with(Input::Stream(&mut &sealed.stored[..]), Output::Stream(&mut full), 2, stop_at_once);
    assert!(copied.unwrap_err().is_interrupted());
}

#[test]
fn a_signal_is_acted_on_although_the_callback_was_called_just_now() {
    /// A signal ends the first call, and the stream fails in the next.
    struct Signalled(bool);

    impl Read for Signalled {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            let again = std::mem::replace(&mut self.0, true);
            Err(if again { ErrorKind::BrokenPipe } else { ErrorKind::Interrupted }.into())
        }
    }

    let stop_at_once = &mut || Err(Error::interrupted());
    let input = Input::Stream(&mut Signalled(false));
    let copied = Sealed::plain(vec![1]).copy_with(input, Output::Nowhere, 1, stop_at_once);
    assert!(copied.unwrap_err().is_interrupted());
}
