//! [`StoppedProcess`]: stops a live process.
//!
//! The process is stopped as a debugger stops it (ptrace), not with SIGSTOP: its shell and its parent do not notice.
//! The kernel lets it go on if this process ends, even after SIGKILL.

#![allow(unsafe_code, reason = "ptrace and waitid of a thread are in no safe crate we have")]

use std::collections::HashMap;
use std::ffi::c_long;
use std::fs;
use std::io;
use std::ptr;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::process::OwnerProcess;
use crate::threads::INTERRUPT_INTERVAL;

/// The interval at which threads are checked while they stop.
const TICK: Duration = Duration::from_micros(500);

/// The bits of a status above the signal are the event (ptrace(2)).
const EVENT_SHIFT: u32 = 8;

/// The type of a request, which differs between C libraries.
#[cfg(not(target_env = "musl"))]
type Request = std::ffi::c_uint;
#[cfg(target_env = "musl")]
type Request = std::ffi::c_int;

/// A stopped process: none of its threads runs until this value is dropped or the process that made it ends.
///
/// A process that a signal had stopped before remains stopped afterwards. A process that is killed meanwhile ends.
///
/// ```
/// # let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
/// let stopped = vmsnap::StoppedProcess::stop(child.id(), std::time::Duration::from_secs(10))?;
/// // Its memory is that of one moment.
/// let memory = vmsnap::ProcessMemory::open(child.id())?;
/// drop(stopped);
/// # child.kill().unwrap();
/// # child.wait().unwrap();
/// # Ok::<(), vmsnap::Error>(())
/// ```
#[derive(Debug)]
pub struct StoppedProcess {
    /// Closing it ends the tracer.
    hold: Option<Sender<()>>,
    /// Ptrace requires that the same thread makes all requests.
    tracer: Option<JoinHandle<()>>,
    owner: OwnerProcess,
}

impl StoppedProcess {
    /// Stops the process with this PID, within `patience`.
    ///
    /// # Errors
    ///
    /// [`Error::is_io`] if there is no such process, it may not be traced, another process traces it, or one of its
    /// threads does not stop. A thread deep in the kernel (because of an unresponsive network file system, or a vfork)
    /// stops only when it returns.
    pub fn stop(pid: u32, patience: Duration) -> Result<Self> {
        Self::stop_interruptible(pid, patience, &mut || Ok(()))
    }

    /// Stops the process as [`StoppedProcess::stop`] does, and calls `interrupt` every 50 ms. An error of `interrupt`
    /// ends the attempt.
    ///
    /// # Errors
    ///
    /// The errors of [`StoppedProcess::stop`], and the error that `interrupt` returns.
    pub fn stop_interruptible(pid: u32, patience: Duration, interrupt: &mut dyn FnMut() -> Result<()>) -> Result<Self> {
        let (hold, held) = mpsc::channel();
        let (tell, told) = mpsc::channel();
        let tracer = thread::Builder::new().name("vmsnap-tracer".to_owned()).spawn(move || {
            let mut threads = Threads { pid, states: HashMap::new() };
            let stopped = threads.stop(Instant::now() + patience, &held);
            let failed = stopped.is_err();
            if tell.send(stopped).is_ok() && !failed {
                // Until the sender is dropped.
                let _ = held.recv();
            }
            threads.detach();
        });
        let tracer = tracer
            .map_err(|error| Error::io(format!("process {pid}: the thread that stops it cannot be started"), error))?;
        // Dropped after an error, so that threads that were stopped go on.
        let stopped = Self { hold: Some(hold), tracer: Some(tracer), owner: OwnerProcess::current() };
        loop {
            match told.recv_timeout(INTERRUPT_INTERVAL) {
                Ok(result) => return result.map(|()| stopped),
                Err(RecvTimeoutError::Timeout) => interrupt()?,
                Err(RecvTimeoutError::Disconnected) => return Err(Error::interrupted()),
            }
        }
    }

    /// Whether no thread of the process runs: all threads are stopped or traced, apart from those that have ended.
    ///
    /// # Errors
    ///
    /// If there is no such process.
    pub fn is_stopped(pid: u32) -> io::Result<bool> {
        let states = thread_ids(pid)?.into_iter().filter_map(|thread| thread_state(pid, thread)).collect::<Vec<_>>();
        let stopped = |state: &char| matches!(state, 'T' | 't');
        Ok(states.iter().any(stopped) && states.iter().all(|state| stopped(state) || matches!(state, 'Z' | 'X')))
    }
}

impl Drop for StoppedProcess {
    fn drop(&mut self) {
        self.hold = None;
        // A forked child does not have that thread, and the parent still holds the process.
        if let Some(tracer) = self.tracer.take().filter(|_| self.owner.is_current()) {
            let _ = tracer.join();
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Running,
    /// Stopped with a pending signal, or 0.
    Stopped(i32),
    Ended,
}

/// The threads of a process, all traced by the tracer thread.
struct Threads {
    pid: u32,
    states: HashMap<i32, State>,
}

impl Threads {
    fn stop(&mut self, deadline: Instant, held: &Receiver<()>) -> Result<()> {
        loop {
            // A running thread may start others. The list is complete if all threads in it are stopped.
            let all_stopped = !self.states.values().any(|state| *state == State::Running);
            let new = self.seize()?;
            if all_stopped && !new {
                let any = self.states.values().any(|state| matches!(state, State::Stopped(_)));
                return if any { Ok(()) } else { Err(self.failed("it has ended", libc::ESRCH)) };
            }
            self.look();
            if held.try_recv() == Err(TryRecvError::Disconnected) {
                return Err(Error::interrupted());
            }
            if self.states.values().any(|state| *state == State::Running) {
                if Instant::now() >= deadline {
                    return Err(self.failed(&self.why_not_stopped(), libc::ETIMEDOUT));
                }
                thread::sleep(TICK);
            }
        }
    }

    fn failed(&self, why: &str, errno: i32) -> Error {
        Error::io(format!("process {}: {why}", self.pid), io::Error::from_raw_os_error(errno))
    }

    /// Starts to trace the threads that are not traced yet, and tells them to stop. Returns whether there were any.
    fn seize(&mut self) -> Result<bool> {
        let threads = thread_ids(self.pid).map_err(|error| Error::io(format!("process {}", self.pid), error))?;
        let mut new = false;
        for thread in threads {
            if self.states.contains_key(&thread) {
                continue;
            }
            // Without PTRACE_O_EXITKILL the process survives the end of this process.
            match request(libc::PTRACE_SEIZE, thread, 0) {
                Ok(()) => {
                    new = true;
                    self.states.insert(thread, State::Running);
                    // The thread may have ended by now, so an error is ignored.
                    let _ = request(libc::PTRACE_INTERRUPT, thread, 0);
                }
                Err(_) if matches!(thread_state(self.pid, thread), None | Some('Z' | 'X')) => {
                    self.states.insert(thread, State::Ended);
                }
                Err(error) => return Err(self.not_traced(thread, &error)),
            }
        }
        Ok(new)
    }

    fn not_traced(&self, thread: i32, error: &io::Error) -> Error {
        let field = |path: &str, name: &str| {
            let status = fs::read_to_string(path).ok()?;
            status.lines().find_map(|line| Some(line.strip_prefix(name)?.trim().to_owned()))
        };
        // The kernel reports a thread; its process is more useful to the user.
        let tracer = field(&format!("/proc/{}/task/{thread}/status", self.pid), "TracerPid:");
        let tracer = tracer.and_then(|tracer| field(&format!("/proc/{tracer}/status"), "Tgid:"));
        let why = match tracer {
            Some(tracer) => {
                let name = field(&format!("/proc/{tracer}/status"), "Name:").unwrap_or_default();
                format!("process {tracer} ({name}) traces it: stop it there, or let it run (--no-stop)")
            }
            None => {
                format!("it may not be traced: stop it with 'kill -STOP {}', or let it run (--no-stop)", self.pid)
            }
        };
        self.failed(&why, error.raw_os_error().unwrap_or(libc::EPERM))
    }

    fn why_not_stopped(&self) -> String {
        let running = self.states.iter().filter(|(_, state)| **state == State::Running);
        let states = running.filter_map(|(thread, _)| thread_state(self.pid, *thread)).collect::<String>();
        format!("it does not stop (states of its running threads: {states}): let it run (--no-stop)")
    }

    /// Updates the state of the threads that have stopped or ended.
    fn look(&mut self) {
        for (thread, state) in &mut self.states {
            if *state == State::Running {
                *state = look(*thread);
            }
        }
    }

    fn detach(self) {
        for (thread, state) in self.states {
            // A running thread is released when the tracer thread ends.
            if let State::Stopped(signal) = state {
                let _ = request(libc::PTRACE_DETACH, thread, signal);
            }
        }
    }
}

/// Returns the new state of a traced thread that was running. The report is not consumed: if this process is killed,
/// the kernel still has the pending signal that the report contains.
fn look(thread: i32) -> State {
    let Ok(id) = libc::id_t::try_from(thread) else { return State::Ended };
    let options = libc::WSTOPPED | libc::WEXITED | libc::WNOHANG | libc::WNOWAIT | libc::__WALL;
    // SAFETY: zeros are a valid value of every field.
    let mut report: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes only to the report.
    if unsafe { libc::waitid(libc::P_PID, id, &raw mut report, options) } != 0 {
        // There is no such thread, or an exec of another thread has ended it.
        return State::Ended;
    }
    // SAFETY: the fields that waitid fills in, or zeros.
    let (pid, status) = unsafe { (report.si_pid(), report.si_status()) };
    match report.si_code {
        _ if pid == 0 => State::Running,
        libc::CLD_TRAPPED | libc::CLD_STOPPED => {
            // Stopped by ptrace or by a stop of the whole process, or else by a signal that is delivered to it.
            State::Stopped(if status >> EVENT_SHIFT == 0 { status } else { 0 })
        }
        _ => State::Ended,
    }
}

fn request(request: Request, thread: i32, data: i32) -> io::Result<()> {
    let data = ptr::without_provenance_mut::<libc::c_void>(usize::try_from(data).unwrap_or(0));
    // SAFETY: the requests made here do not access memory of this process; the data is a number.
    let result: c_long = unsafe { libc::ptrace(request, thread, ptr::null_mut::<libc::c_void>(), data) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn thread_ids(pid: u32) -> io::Result<Vec<i32>> {
    let names =
        fs::read_dir(format!("/proc/{pid}/task"))?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    Ok(names.filter_map(|name| name.parse().ok()).collect())
}

/// Returns the state letter of `proc_pid_stat(5)`, or `None` if the thread no longer exists.
fn thread_state(pid: u32, thread: i32) -> Option<char> {
    // The name of the program, before the state, is in parentheses and may itself contain some.
    let stat = fs::read(format!("/proc/{pid}/task/{thread}/stat")).ok()?;
    let after = stat.iter().rposition(|byte| *byte == b')')?;
    stat.get(after + 2).copied().map(char::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command, Stdio};

    const PATIENCE: Duration = Duration::from_secs(60);

    struct Sleeper(Child);

    impl Sleeper {
        fn new() -> Self {
            Self(Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap())
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }

    #[test]
    fn a_process_stands_still_until_it_is_let_go() {
        let sleeper = Sleeper::new();
        let pid = sleeper.0.id();
        for _ in 0..3 {
            assert!(!StoppedProcess::is_stopped(pid).unwrap());
            let stopped = StoppedProcess::stop(pid, PATIENCE).unwrap();
            assert!(StoppedProcess::is_stopped(pid).unwrap());
            let refused = StoppedProcess::stop(pid, PATIENCE).unwrap_err();
            assert!(refused.to_string().contains(&format!("process {} (", std::process::id())), "{refused}");
            drop(stopped);
        }
        assert!(!StoppedProcess::is_stopped(pid).unwrap());
    }

    #[test]
    fn what_has_ended_is_told() {
        let mut sleeper = Sleeper::new();
        sleeper.0.kill().unwrap();
        let pid = sleeper.0.id();
        // Ended, but not waited for.
        while thread_state(pid, pid.cast_signed()) != Some('Z') {
            thread::yield_now();
        }
        assert_eq!(StoppedProcess::stop(pid, PATIENCE).unwrap_err().raw_os_error(), Some(libc::ESRCH));
        sleeper.0.wait().unwrap();
        assert!(StoppedProcess::stop(pid, PATIENCE).unwrap_err().is_io());
    }
}
