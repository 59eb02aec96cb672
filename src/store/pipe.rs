//! A pipe, or anything else that is read or written in order: standard input, standard output, a file.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags, fcntl_getfl, fstat};
use rustix::pipe::fcntl_setpipe_size;

use crate::error::{Error, Result};
use crate::threads::{INTERRUPT_INTERVAL, Interrupt};

/// A pipe with room for anything takes this many bytes without waiting (`PIPE_BUF` of linux/limits.h).
const PIPE_BUF: usize = 4096;

/// The capacity that a pipe gets: the most that users may ask for (`/proc/sys/fs/pipe-max-size`). With the usual 64 KiB,
/// both sides wait for each other most of the time.
const CAPACITY_BYTES: usize = 1 << 20;

/// A stream whose calls do not wait longer than 50 ms: then they fail with [`ErrorKind::Interrupted`], and the caller
/// checks the interrupt and tries again.
///
/// The given file stays in blocking mode, because other processes may share that mode.
pub(crate) struct Pipe {
    file: File,
    /// Whether a call of any size returns at once.
    is_prompt: bool,
}

impl Pipe {
    pub(crate) fn new(file: File) -> Self {
        match fstat(&file).map(|stat| FileType::from_raw_mode(stat.st_mode)) {
            Ok(FileType::RegularFile) => Self { file, is_prompt: true },
            Ok(FileType::Fifo) => {
                // The kernel may refuse it: users have a limit for all their pipes.
                let _ = fcntl_setpipe_size(&file, CAPACITY_BYTES);
                match reopen(&file) {
                    Ok(file) => Self { file, is_prompt: true },
                    Err(_) => Self { file, is_prompt: false },
                }
            }
            _ => Self { file, is_prompt: false },
        }
    }

    /// Waits until a call does not block, but only for a moment.
    fn wait(&self, event: PollFlags) -> io::Result<()> {
        let timeout = Timespec { tv_sec: 0, tv_nsec: INTERRUPT_INTERVAL.subsec_nanos().into() };
        // A signal ends the wait with an error of this kind too. The call itself reports an end or an error of the stream.
        if poll(&mut [PollFd::new(&self.file, event)], Some(&timeout))? == 0 {
            return Err(ErrorKind::Interrupted.into());
        }
        Ok(())
    }

    /// Calls `transfer` at once or when it does not block.
    fn when_ready(
        &mut self,
        event: PollFlags,
        mut transfer: impl FnMut(&mut File) -> io::Result<usize>,
    ) -> io::Result<usize> {
        if self.is_prompt {
            match transfer(&mut self.file) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                result => return result,
            }
        }
        self.wait(event)?;
        transfer(&mut self.file).map_err(|error| match error.kind() {
            // Another process was faster.
            ErrorKind::WouldBlock => ErrorKind::Interrupted.into(),
            _ => error,
        })
    }
}

/// Opens a pipe again, in non-blocking mode: that mode belongs to the open file, not to the pipe.
fn reopen(file: &File) -> io::Result<File> {
    let flags = (fcntl_getfl(file)? & OFlags::RWMODE) | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(rustix::fs::open(path, flags, Mode::empty())?.into())
}

impl Read for Pipe {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.when_ready(PollFlags::IN, |file| file.read(buf))
    }
}

impl Write for Pipe {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let most = if self.is_prompt { data.len() } else { data.len().min(PIPE_BUF) };
        self.when_ready(PollFlags::OUT, |file| file.write(&data[..most]))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// The most bytes of one read: a pipe with the usual capacity holds so many.
const READ_BYTES: usize = 64 << 10;

/// The most bytes of one write. If it filled the pipe, both sides would only take turns.
const WRITE_BYTES: usize = 16 << 10;

/// Fills `buf` with the next bytes of a stream; returns their number, which is less than asked for only at the end.
pub(crate) fn read_full(stream: &mut dyn Read, buf: &mut [u8], interrupt: &mut Interrupt<'_>) -> Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        interrupt.check()?;
        let end = buf.len().min(done + READ_BYTES);
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
        let most = data.len().min(WRITE_BYTES);
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
    use std::os::unix::net::UnixStream;

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
    fn a_call_of_any_size_returns_at_once_where_the_pipe_could_be_opened_again() {
        let (reader, writer) = io::pipe().unwrap();
        let given = writer.try_clone().unwrap();
        let mut writer = Pipe::new(OwnedFd::from(writer).into());
        // A writer that is not prompt would write less.
        assert!(writer.write(&[7; 3 * PIPE_BUF]).unwrap() == 3 * PIPE_BUF);
        while writer.write(&[7; 3 * PIPE_BUF]).is_ok() {}
        assert!(!fcntl_getfl(&given).unwrap().contains(OFlags::NONBLOCK));
        assert!(fcntl_getfl(&writer.file).unwrap().contains(OFlags::NONBLOCK));
        drop(reader);
        assert_eq!(writer.write(&[7]).unwrap_err().kind(), ErrorKind::BrokenPipe);
    }

    #[test]
    fn what_cannot_be_opened_again_takes_as_much_as_never_waits() {
        let (reader, writer) = UnixStream::pair().unwrap();
        let mut reader = Pipe::new(OwnedFd::from(reader).into());
        let mut writer = Pipe::new(OwnedFd::from(writer).into());
        assert_eq!(reader.read(&mut [0]).unwrap_err().kind(), ErrorKind::Interrupted);
        assert_eq!(writer.write(&[7; 3 * PIPE_BUF]).unwrap(), PIPE_BUF);
        assert_eq!(reader.read(&mut [0; 3 * PIPE_BUF]).unwrap(), PIPE_BUF);
        // A process without /proc has such a pipe.
        let (_reader, writer) = io::pipe().unwrap();
        let mut writer = Pipe { file: OwnedFd::from(writer).into(), is_prompt: false };
        while writer.write(&[7; 3 * PIPE_BUF]).is_ok_and(|count| count == PIPE_BUF) {}
        assert_eq!(writer.write(&[7]).unwrap_err().kind(), ErrorKind::Interrupted);
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
        assert_eq!(file.file.metadata().unwrap().len(), 3 * PIPE_BUF as u64);
        assert_eq!(file.read(&mut [0]).unwrap(), 0);
    }
}
