//! The runtime of the process, and tasks that threads wait for.
//!
//! A runtime does not survive a fork, so each process makes its own on first use. A thread never enters the runtime: it
//! may be a thread of the caller's own runtime, where that would panic.

use std::future::Future;
use std::io;
use std::sync::{Arc, Condvar, Mutex};

use tokio::task::AbortHandle;

use crate::error::{Error, Kind, Result};
use crate::process::{OwnerProcess, PerProcess};
use crate::threads::{Interrupt, lock};

static RUNTIME: PerProcess<Runtime> = PerProcess::new();

/// The threads that drive connections. The work is waiting, copying and TLS.
const WORKERS: usize = 2;

/// The most threads that resolve names, which is a blocking call of the system.
const RESOLVERS: usize = 4;

/// The runtime of this process. `None` only while it is dropped.
struct Runtime(Option<tokio::runtime::Runtime>);

impl Runtime {
    fn start() -> Result<Self> {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(WORKERS)
            .max_blocking_threads(RESOLVERS)
            .thread_name("vmsnap-remote")
            .enable_io()
            .enable_time()
            .build()
            .map(|runtime| Self(Some(runtime)))
            .map_err(|error| Error::io("the threads for object stores cannot be started", error))
    }
}

/// If two threads make a runtime at once, one is dropped. Waiting for its threads is not allowed in a caller's runtime.
impl Drop for Runtime {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// A future that runs in the runtime. Dropping the task cancels it.
pub(crate) struct Task<T> {
    slot: Arc<Slot<T>>,
    abort: AbortHandle,
    owner: OwnerProcess,
}

struct Slot<T> {
    state: Mutex<State<T>>,
    ended: Condvar,
}

enum State<T> {
    Running,
    Ended(Result<T>),
    Taken,
}

/// Sets the result, also if the future panics or is cancelled.
struct Setter<T>(Arc<Slot<T>>);

impl<T> Setter<T> {
    fn set(&self, result: Result<T>) {
        let mut state = lock(&self.0.state);
        if matches!(*state, State::Running) {
            *state = State::Ended(result);
            self.0.ended.notify_all();
        }
    }
}

impl<T> Drop for Setter<T> {
    fn drop(&mut self) {
        self.set(Err(Error::new(Kind::State, "the transfer ended without a result")));
    }
}

/// Starts a future in the runtime of this process.
pub(crate) fn spawn<T: Send + 'static>(future: impl Future<Output = Result<T>> + Send + 'static) -> Result<Task<T>> {
    let Some(runtime) = &RUNTIME.get(Runtime::start)?.0 else {
        return Err(Error::io("the threads for object stores are gone", io::ErrorKind::Other));
    };
    let slot = Arc::new(Slot { state: Mutex::new(State::Running), ended: Condvar::new() });
    let setter = Setter(Arc::clone(&slot));
    let handle = runtime.spawn(async move { setter.set(future.await) });
    Ok(Task { slot, abort: handle.abort_handle(), owner: OwnerProcess::current() })
}

/// Runs a future in the runtime and waits for it.
pub(crate) fn run<T: Send + 'static>(
    future: impl Future<Output = Result<T>> + Send + 'static,
    interrupt: &mut Interrupt<'_>,
) -> Result<T> {
    spawn(future)?.wait(interrupt)
}

impl<T> Task<T> {
    /// Waits for the result. If the caller stops that, the future is cancelled.
    ///
    /// # Errors
    ///
    /// The error of the future or of the interrupt. `State` in a child that was forked after the start.
    pub(crate) fn wait(self, interrupt: &mut Interrupt<'_>) -> Result<T> {
        if !self.owner.is_current() {
            return Err(Error::new(
                Kind::State,
                "the transfer was begun before this process was forked; begin it again",
            ));
        }
        let mut state = lock(&self.slot.state);
        loop {
            match std::mem::replace(&mut *state, State::Taken) {
                State::Ended(result) => return result,
                running => *state = running,
            }
            state = interrupt.wait(&self.slot.ended, state, &self.slot.state)?;
        }
    }

    /// Whether [`Task::wait`] would return at once.
    pub(crate) fn is_ended(&self) -> bool {
        !self.owner.is_current() || !matches!(*lock(&self.slot.state), State::Running)
    }
}

/// In a forked child nothing is touched: the threads of the runtime are not there, and one may have held its locks.
impl<T> Drop for Task<T> {
    fn drop(&mut self) {
        if self.owner.is_current() {
            self.abort.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    fn run_here<T: Send + 'static>(future: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
        run(future, &mut Interrupt::new(&mut || Ok(())))
    }

    #[test]
    fn a_result_comes_back() {
        let slept = run_here(async {
            tokio::time::sleep(Duration::ZERO).await;
            Ok(12)
        });
        assert_eq!(slept.unwrap(), 12);
        assert!(run_here(async { Err::<(), _>(Error::corrupt("of the test")) }).unwrap_err().is_corrupt());
    }

    #[test]
    fn a_caller_may_be_a_thread_of_a_runtime() {
        let own = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
        let inside = own.spawn(async { run_here(async { Ok(7) }).unwrap() });
        let (sender, receiver) = mpsc::channel();
        own.spawn(async move { sender.send(inside.await.unwrap()).unwrap() });
        assert_eq!(receiver.recv().unwrap(), 7);
        own.shutdown_background();
    }

    #[test]
    fn an_interrupt_cancels_the_future() {
        struct Sends(mpsc::Sender<()>);
        impl Drop for Sends {
            fn drop(&mut self) {
                let _ = self.0.send(());
            }
        }
        let (sender, dropped) = mpsc::channel();
        let sends = Sends(sender);
        let never = async move {
            let _sends = sends;
            std::future::pending::<Result<()>>().await
        };
        let error = run(never, &mut Interrupt::new(&mut || Err(Error::interrupted()))).unwrap_err();
        assert!(error.is_interrupted());
        dropped.recv().unwrap();
    }

    #[test]
    fn a_panic_in_a_task_is_an_error_of_its_caller() {
        let error = run_here::<()>(async { std::panic::resume_unwind(Box::new("of the test")) }).unwrap_err();
        assert!(error.is_state(), "{error}");
    }
}
