//! A pipe, or anything else that is read or written in order: standard input, standard output, a file.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::error::{Error, Result};
use crate::threads::{INTERRUPT_INTERVAL, Interrupt};

/// A pipe with room for anything takes this many bytes without waiting (`PIPE_BUF` of linux/limits.h).
const PIPE_BUF: usize = 4096;

/// A stream whose calls do not wait longer than 50 ms: then they fail with [`ErrorKind::Interrupted`], and the caller
/// checks the interrupt and tries again.
///
/// The file stays in blocking mode, because other processes may share that mode.
pub(crate) struct Pipe(File);

impl Pipe {
    pub(crate) fn new(file: File) -> Self {
        Self(file)
    }

    /// Waits until a call does not block, but only for a moment.
    fn wait(&self, event: PollFlags) -> io::Result<()> {
        let timeout = Timespec { tv_sec: 0, tv_nsec: INTERRUPT_INTERVAL.subsec_nanos().into() };
        // A signal ends the wait with an error of this kind too. The call itself reports an end or an error of the stream.
        if poll(&mut [PollFd::new(&self.0, event)], Some(&timeout))? == 0 {
            return Err(ErrorKind::Interrupted.into());
        }
        Ok(())
    }
}

impl Read for Pipe {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.wait(PollFlags::IN)?;
        self.0.read(buf)
    }
}

impl Write for Pipe {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.wait(PollFlags::OUT)?;
        self.0.write(&data[..data.len().min(PIPE_BUF)])
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// The most bytes of one call: a pipe with the usual capacity takes so many at once.
const CALL_BYTES: usize = 64 << 10;

/// Fills `buf` with the next bytes of a stream; returns their number, which is less than asked for only at the end.
pub(crate) fn read_full(stream: &mut dyn Read, buf: &mut [u8], interrupt: &mut Interrupt<'_>) -> Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        interrupt.check()?;
        let end = buf.len().min(done + CALL_BYTES);
        match stream.read(&mut buf[done..end]) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => interrupt.check_now()?,
            Err(error) => return Err(Error::io("the stream cannot be read", error)),
        }
    }
    Ok(done)
}

/// Writes all of `data` to a stream.
pub(crate) fn write_all(stream: &mut dyn Write, mut data: &[u8], interrupt: &mut Interrupt<'_>) -> Result<()> {
    while !data.is_empty() {
        interrupt.check()?;
        let most = data.len().min(CALL_BYTES);
        match stream.write(&data[..most]) {
            Ok(0) => return Err(Error::io("the stream cannot be written", ErrorKind::WriteZero)),
            Ok(count) => data = &data[count..],
            Err(error) if error.kind() == ErrorKind::Interrupted => interrupt.check_now()?,
            Err(error) => return Err(Error::io("the stream cannot be written", error)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;

    fn pipe() -> (Pipe, Pipe) {
        let (reader, writer) = io::pipe().unwrap();
        (Pipe::new(OwnedFd::from(reader).into()), Pipe::new(OwnedFd::from(writer).into()))
    }

    #[test]
    fn bytes_pass_in_order_until_the_end() {
        let (mut reader, mut writer) = pipe();
        let bytes: Vec<u8> = (0..300_000_u32).map(|number| number.to_le_bytes()[1]).collect();
        let mut passed = Vec::new();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                writer.write_all(&bytes).unwrap();
                drop(writer);
            });
            reader.read_to_end(&mut passed).unwrap();
        });
        assert!(passed == bytes);
    }

    #[test]
    fn a_pipe_that_is_empty_or_full_does_not_hold_its_caller() {
        let (mut reader, mut writer) = pipe();
        assert_eq!(reader.read(&mut [0]).unwrap_err().kind(), ErrorKind::Interrupted);
        // A blocking write of more than fits would wait for a reader.
        let full = loop {
            if let Err(error) = writer.write(&[7; 3 * PIPE_BUF]) {
                break error;
            }
        };
        assert_eq!(full.kind(), ErrorKind::Interrupted);
        assert_eq!(reader.read(&mut [0; 10]).unwrap(), 10);
    }

    #[test]
    fn an_end_is_reported_by_the_call() {
        let (mut reader, writer) = pipe();
        drop(writer);
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
        let (reader, mut writer) = pipe();
        drop(reader);
        assert_eq!(writer.write(&[0]).unwrap_err().kind(), ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_file_never_waits() {
        let mut file = Pipe::new(tempfile::tempfile().unwrap());
        file.write_all(&[7; 3 * PIPE_BUF]).unwrap();
        assert_eq!(file.0.metadata().unwrap().len(), 3 * PIPE_BUF as u64);
        assert_eq!(file.read(&mut [0]).unwrap(), 0);
    }
}
