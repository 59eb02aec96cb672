//! Blocks, from a server that counts requests and gives answers that no real store gives.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::super::Bucket;
use super::super::blocks::BlockReader;
use super::super::pool::{BLOCK_BYTES, Pool};
use super::super::settings::tests::url;
use super::super::test_server::{Reply, Server};
use super::{Files, answer, pattern, serve};
use crate::error::{Error, Result};
use crate::store::RemoteOptions;
use crate::store::bytes::ReadAt;
use crate::threads::Interrupt;

/// A reader of an object of two blocks and a byte.
fn reader_of(server: &Server) -> BlockReader {
    BlockReader::new(&server.bucket(), "mem", 2 * BLOCK_BYTES as u64 + 1, None).unwrap()
}

fn object() -> Files {
    [("mem".to_owned(), pattern(2 * BLOCK_BYTES + 1))].into()
}

fn read(reader: &BlockReader, offset: u64, length: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    reader.read_exact_at(&mut bytes, offset, &mut Interrupt::new(&mut || Ok(()))).map(|()| bytes)
}

#[test]
fn every_range_is_read() {
    let (all, size) = (pattern(2 * BLOCK_BYTES + 1), 2 * BLOCK_BYTES + 1);
    let server = serve(object());
    let reader = reader_of(&server);
    for (offset, length) in [
        (0, 0),
        (0, 1),
        (BLOCK_BYTES - 1, 1),
        (BLOCK_BYTES - 1, 2),
        (BLOCK_BYTES, 1),
        (0, size),
        (size - 1, 1),
        (size, 0),
    ] {
        assert!(read(&reader, offset as u64, length).unwrap() == all[offset..offset + length]);
    }
    assert!(read(&reader, size as u64, 1).unwrap_err().is_corrupt());
    assert!(read(&reader, u64::MAX, 1).unwrap_err().is_corrupt());
    let requests = server.requests();
    assert_eq!(requests.len(), 3);
    assert_eq!(requests[0].header("range"), Some("bytes=0-2097151"));
    assert!(requests[0].header("if-match").is_none() && requests[1].header("if-match") == Some("\"1\""));
}

#[test]
fn an_object_that_was_replaced_is_an_error() {
    let files = object();
    // One server checks the condition, and one ignores it.
    for ignores in [false, true] {
        let files = files.clone();
        let server = Server::start(move |number, request| {
            let mut request = request.clone();
            if ignores {
                request.headers.retain(|(name, _)| !name.eq_ignore_ascii_case("if-match"));
            }
            answer(&files, &request, if number == 0 { "\"1\"" } else { "\"2\"" })
        });
        let reader = reader_of(&server);
        read(&reader, 0, 1).unwrap();
        let error = read(&reader, BLOCK_BYTES as u64, 1).unwrap_err();
        assert!(error.is_corrupt() && error.to_string().contains("replaced"), "{error}");
        assert_eq!(read(&reader, 0, 1).unwrap(), pattern(1), "the block in memory is of the first version");
    }
}

#[test]
fn an_answer_that_is_not_the_block_is_an_error() {
    let whole = pattern(2 * BLOCK_BYTES + 1);
    let longer = BLOCK_BYTES * 2 + 2;
    let part = whole[..BLOCK_BYTES].to_vec();
    for (reply, text) in [
        (Reply::object(&whole), "ignores ranges"),
        (Reply::part("bytes 1-2097152/4194305", &part), "ignores ranges"),
        (Reply::part(&format!("bytes 0-2097151/{longer}"), &part), "the manifest says"),
        (Reply::error(404, "NoSuchKey", ""), "the manifest lists it"),
        (Reply::error(416, "InvalidRange", ""), "shorter than expected"),
        (Reply::error(403, "AccessDenied", ""), "AccessDenied"),
    ] {
        let server = Server::start(move |_, _| reply.clone());
        let error = read(&reader_of(&server), 0, 1).unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
        assert!(error.is_corrupt() || error.is_io(), "{error}");
    }
}

#[test]
fn an_answer_that_ends_early_every_time_is_an_error() {
    let files = object();
    let server = Server::start(move |_, request| {
        let Reply::Answer(status, headers, mut body) = answer(&files, request, "\"1\"") else { panic!("no answer") };
        let length = body.len().to_string();
        body.truncate(body.len() / 2);
        Reply::Answer(status, headers, body).with("Content-Length", &length)
    });
    let error = read(&reader_of(&server), 0, 1).unwrap_err();
    assert!(error.is_transient(), "{error}");
}

#[test]
fn a_failed_fetch_is_not_kept() {
    let files = object();
    let server = Server::start(move |number, request| match number {
        0 => Reply::error(403, "AccessDenied", ""),
        _ => answer(&files, request, "\"1\""),
    });
    let reader = reader_of(&server);
    assert!(read(&reader, 0, 1).is_err());
    assert_eq!(read(&reader, 0, 100).unwrap(), pattern(100));
}

#[test]
fn sixteen_threads_that_need_a_block_share_one_request() {
    for fails in [false, true] {
        let (files, begun) = (object(), Arc::new(AtomicUsize::new(0)));
        let counted = Arc::clone(&begun);
        let server = Server::start(move |_, request| {
            while counted.load(Ordering::Acquire) < 16 {
                std::thread::yield_now();
            }
            if fails { Reply::error(403, "AccessDenied", "") } else { answer(&files, request, "\"1\"") }
        });
        let reader = reader_of(&server);
        std::thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| {
                    let mut byte = [0];
                    let mut first = true;
                    let mut waits = || {
                        if std::mem::take(&mut first) {
                            begun.fetch_add(1, Ordering::Release);
                        }
                        Ok(())
                    };
                    let mut interrupt = Interrupt::new(&mut waits);
                    let result = reader.read_exact_at(&mut byte, 0, &mut interrupt);
                    assert_eq!(result.is_err(), fails);
                    assert_eq!(result.err().and_then(|error| error.raw_os_error()), fails.then_some(libc::EACCES));
                });
            }
        });
        assert_eq!(server.requests().len(), 1);
    }
}

#[test]
fn a_reader_that_waits_can_be_stopped_and_does_not_stop_others() {
    let files = object();
    let server = Server::start(move |number, request| match number {
        0 => Reply::Hang,
        _ => answer(&files, request, "\"1\""),
    });
    let reader = reader_of(&server);
    let mut stop = || Err(Error::interrupted());
    let error = reader.read_exact_at(&mut [0], 0, &mut Interrupt::new(&mut stop)).unwrap_err();
    assert!(error.is_interrupted());
    assert_eq!(read(&reader, 0, 1).unwrap(), pattern(1), "the request that hangs was given up");
}

fn with_options(server: &Server, change: impl FnOnce(&mut RemoteOptions)) -> Bucket {
    let mut options = server.bucket().options().clone();
    change(&mut options);
    Bucket::new(url("s3://bucket/vm1"), options).unwrap()
}

#[test]
fn memory_is_bounded_however_slow_the_reader_is() {
    let size = 20 * BLOCK_BYTES;
    let all = pattern(size);
    let files: Files = [("mem".to_owned(), all.clone()), ("other".to_owned(), all.clone())].into();
    let (running, most) = (AtomicUsize::new(0), Arc::new(AtomicUsize::new(0)));
    let seen = Arc::clone(&most);
    let server = Server::start(move |_, request| {
        seen.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        let reply = answer(&files, request, "\"1\"");
        running.fetch_sub(1, Ordering::SeqCst);
        reply
    });
    let bucket = with_options(&server, |options| options.connections = 2);
    let pool = Pool::of(&bucket).unwrap();
    let readers = ["mem", "other"].map(|name| BlockReader::new(&bucket, name, size as u64, None).unwrap());
    for block in 0..20 {
        for reader in &readers {
            let offset = block * BLOCK_BYTES;
            reader.prefetch(offset as u64..size as u64);
            assert_eq!(read(reader, offset as u64, 1).unwrap(), all[offset..=offset]);
            assert!(pool.existing() <= 8, "{}", pool.existing());
        }
    }
    assert!(most.load(Ordering::SeqCst) <= 2);
    assert_eq!(server.requests().len(), 40, "no block is fetched twice");
    drop(readers);
    // A fetch that was cancelled ends soon.
    while pool.existing() > 0 {
        std::thread::yield_now();
    }
}
