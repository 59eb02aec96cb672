//! An object that is written at any offset, and sent in parts.
//!
//! All parts have the same size, except the last one; Cloudflare R2 requires that. A part is sent when it is full, in
//! any order. An object that fits one part is sent in one request when it is finished.
//!
//! In memory are the parts that are under way, which [`Flights`] limits for all objects together, and the parts that
//! are not full. Threads take their batches in order, so of these there is at most one more than there are threads.

use std::fs::File;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use object_store::Attributes;

use super::flights::{Flights, Permit};
use super::objects::{Objects, Part, Upload};
use super::parts::{Stage, State, padded};
use super::patience::patience;
use super::runtime;
use crate::error::{Error, Kind, Result};
use crate::process::OwnerProcess;
use crate::store::bytes::{NewObject, WriteAt};
use crate::threads::{Interrupt, lock};

/// The size of a part, unless 10,000 of them are too few.
pub(crate) const MIN_PART_BYTES: usize = 8 << 20;

/// All clouds take at least as many parts as this, and parts of this size.
const MAX_PARTS: u64 = 10_000;
const MAX_PART_BYTES: u64 = 4 << 30;

/// Larger parts are multiples of this.
const PART_UNIT_BYTES: u64 = 1 << 20;

/// The longest wait for the end of a request that cannot be taken back.
const LONGEST_SETTLING: Duration = Duration::from_secs(30);

/// An object that is being written.
pub(crate) struct UploadedObject(Arc<Inner>);

struct Inner {
    objects: Objects,
    name: String,
    attributes: Attributes,
    part_bytes: usize,
    flights: Arc<Flights>,
    /// Begins the upload on first use, once. It is not cancelled with the part that began it.
    upload: Shared<BoxFuture<'static, Begun>>,
    state: Mutex<State>,
    changed: Condvar,
    owner: OwnerProcess,
}

/// An error of the beginning belongs to the first part that sees it.
type Begun = std::result::Result<Arc<Upload>, Arc<Mutex<Option<Error>>>>;

/// The remains of an object in the store.
pub(crate) struct Remains {
    object: Arc<Inner>,
    /// Whether there may be an upload that was not completed.
    is_begun: bool,
}

/// The size of the parts of an object that has at most so many bytes.
fn part_bytes(most_bytes: Option<u64>) -> Result<usize> {
    let needed = most_bytes.unwrap_or(0).div_ceil(MAX_PARTS).next_multiple_of(PART_UNIT_BYTES);
    if needed > MAX_PART_BYTES {
        let text = format!(
            "cannot be stored: an object in a bucket has at most {MAX_PARTS} parts of {MAX_PART_BYTES} bytes; split it"
        );
        return Err(Error::invalid_argument(text));
    }
    Ok(usize::try_from(needed).map_or(MIN_PART_BYTES, |needed| needed.max(MIN_PART_BYTES)))
}

impl UploadedObject {
    /// An object with at most `most_bytes`, if that is known. Nothing is sent yet.
    ///
    /// # Errors
    ///
    /// `InvalidArgument` if a store cannot have such a name, or so large an object.
    pub(crate) fn new(
        objects: Objects,
        name: &str,
        attributes: Attributes,
        most_bytes: Option<u64>,
        flights: &Arc<Flights>,
    ) -> Result<Self> {
        Self::with_parts(objects, name, attributes, part_bytes(most_bytes)?, flights)
    }

    fn with_parts(
        objects: Objects,
        name: &str,
        attributes: Attributes,
        part_bytes: usize,
        flights: &Arc<Flights>,
    ) -> Result<Self> {
        objects.check_name(name)?;
        let (begun_by, begun_name, begun_attributes) = (objects.clone(), name.to_owned(), attributes.clone());
        let upload = async move {
            let begun = begun_by.begin_upload(&begun_name, begun_attributes).await;
            begun.map(Arc::new).map_err(|error| Arc::new(Mutex::new(Some(error))))
        };
        Ok(Self(Arc::new(Inner {
            objects,
            name: name.to_owned(),
            attributes,
            part_bytes,
            flights: Arc::clone(flights),
            upload: upload.boxed().shared(),
            state: Mutex::new(State::new()),
            changed: Condvar::new(),
            owner: OwnerProcess::current(),
        })))
    }

    /// Another handle of the object.
    pub(crate) fn share(&self) -> Self {
        Self(Arc::clone(&self.0))
    }

    /// Whether the object is complete in the store; `None` while it is still being written.
    pub(super) fn is_finished(&self) -> Option<bool> {
        match lock(&self.0.state).stage {
            Stage::Writing | Stage::Finishing { .. } | Stage::Completing => None,
            Stage::Finished => Some(true),
            Stage::Failed(_) | Stage::Abandoned | Stage::Discarded => Some(false),
        }
    }

    pub(super) fn is_discarded(&self) -> bool {
        matches!(lock(&self.0.state).stage, Stage::Discarded)
    }

    /// Sends the rest, and does not wait until it is stored. [`NewObject::finish`] waits.
    pub(crate) fn begin_finish(&self, interrupt: &mut Interrupt<'_>) -> Result<()> {
        self.0.fail_unless(self.0.begin_finish(interrupt))
    }

    /// Stops everything that can be stopped, and waits for the rest. Nothing more is written.
    pub(crate) fn stop(&self) -> Remains {
        let inner = &self.0;
        let deadline = Instant::now() + LONGEST_SETTLING;
        let mut state = lock(&inner.state);
        // A request that makes an object might still be carried out after it was cancelled.
        let go_on = &mut || Ok(());
        let interrupt = &mut Interrupt::new(go_on);
        while matches!(state.stage, Stage::Completing) && Instant::now() < deadline {
            state = match interrupt.wait(&inner.changed, state, &inner.state) {
                Ok(state) => state,
                Err(_) => lock(&inner.state),
            };
        }
        let is_begun = state.is_begun && !matches!(state.stage, Stage::Finished);
        state.stage = Stage::Discarded;
        let tasks = state.clear();
        drop(state);
        drop(tasks);
        inner.changed.notify_all();
        Remains { object: Arc::clone(inner), is_begun }
    }
}

impl Remains {
    pub(super) fn name(&self) -> &str {
        &self.object.name
    }

    /// Gives an upload up that was not completed.
    pub(super) async fn abort(&self) -> Result<()> {
        if self.is_begun
            && let Ok(upload) = self.object.upload.clone().await
        {
            self.object.objects.abort_upload(&upload).await?;
        }
        Ok(())
    }
}

/// Gives up uploads that were not completed.
pub(crate) fn abort_all(remains: Vec<Remains>) -> Result<()> {
    let aborting = async move {
        let mut result = Ok(());
        for object in remains {
            result = result.and(object.abort().await);
        }
        result
    };
    runtime::run(aborting, &mut Interrupt::new(&mut patience()))
}

impl Inner {
    /// Marks the object as failed if a call has failed.
    fn fail_unless<T>(&self, result: Result<T>) -> Result<T> {
        result.inspect_err(|_| self.fail(None))
    }

    fn fail(&self, error: Option<Error>) {
        let mut state = lock(&self.state);
        match &mut state.stage {
            Stage::Writing | Stage::Finishing { .. } | Stage::Completing => state.stage = Stage::Failed(error),
            // The error of a request that another error has cancelled says nothing.
            Stage::Failed(known) if known.as_ref().is_some_and(Error::is_interrupted) => *known = error,
            Stage::Failed(_) | Stage::Finished | Stage::Abandoned | Stage::Discarded => {}
        }
        state.filling.clear();
        drop(state);
        self.changed.notify_all();
    }

    fn write(self: &Arc<Self>, mut bytes: &[u8], mut offset: u64, interrupt: &mut Interrupt<'_>) -> Result<()> {
        let part_bytes = self.part_bytes as u64;
        while !bytes.is_empty() {
            let (index, within) = (offset / part_bytes, offset % part_bytes);
            let (index, within) = match (usize::try_from(index), usize::try_from(within)) {
                (Ok(number), Ok(within)) if index < MAX_PARTS => (number, within),
                _ => return Err(self.too_large()),
            };
            let (now, later) = bytes.split_at(bytes.len().min(self.part_bytes - within));
            offset += now.len() as u64;
            bytes = later;
            let full = {
                let mut state = lock(&self.state);
                state.check_writing()?;
                state.fill(index, within, now, self.part_bytes)?;
                state.end = state.end.max(offset);
                state.written += now.len() as u64;
                state.take_full(self.part_bytes)
            };
            for (index, part) in full {
                self.send(index, part, interrupt)?;
            }
        }
        Ok(())
    }

    fn too_large(&self) -> Error {
        let part_bytes = self.part_bytes as u64;
        Error::invalid_argument(format!(
            "cannot be stored: an object in a bucket has at most {MAX_PARTS} parts, here of {part_bytes} bytes, so {} bytes \
             in all; create the fragment with its size (raw_fragment_with_size), so that the parts are larger",
            part_bytes * MAX_PARTS
        ))
    }

    /// Sends a part as soon as there is a connection for it.
    fn send(self: &Arc<Self>, index: usize, part: Vec<u8>, interrupt: &mut Interrupt<'_>) -> Result<()> {
        let permit = self.flights.permit(part.len(), interrupt)?;
        let inner = Arc::clone(self);
        self.start(async move { inner.send_part(index, part.into(), permit).await })
    }

    fn start(&self, sending: impl Future<Output = ()> + Send + 'static) -> Result<()> {
        let task = runtime::spawn(async move {
            sending.await;
            Ok(())
        })?;
        let mut state = lock(&self.state);
        state.tasks.retain(|task| !task.is_ended());
        state.tasks.push(task);
        Ok(())
    }

    async fn send_part(&self, index: usize, part: Bytes, permit: Permit) {
        lock(&self.state).is_begun = true;
        let sent = match self.upload.clone().await {
            Ok(upload) => self.objects.put_part(&upload, index, part.into()).await.map(|part| (upload, part)),
            Err(error) => Err(lock(&error).take().unwrap_or_else(Error::interrupted)),
        };
        drop(permit);
        match sent {
            Ok((upload, part)) => {
                let complete = {
                    let mut state = lock(&self.state);
                    state.sent.insert(index, part);
                    state.complete()
                };
                if let Some((parts, size)) = complete {
                    self.complete(&upload, parts, size).await;
                }
            }
            Err(error) => self.fail(Some(error)),
        }
    }

    async fn complete(&self, upload: &Upload, parts: Vec<Part>, size: u64) {
        self.end(self.objects.complete_upload(upload, parts, size).await);
    }

    /// Sends a small object in one request.
    async fn send_whole(&self, bytes: Bytes, permit: Permit) {
        let sent = self.objects.put(&self.name, bytes, self.attributes.clone(), None).await;
        drop(permit);
        self.end(sent.map(drop));
    }

    /// Ends the request that makes the object.
    fn end(&self, result: Result<()>) {
        if let Err(error) = result {
            return self.fail(Some(error));
        }
        let mut state = lock(&self.state);
        if matches!(state.stage, Stage::Completing) {
            state.stage = Stage::Finished;
        }
        drop(state);
        self.changed.notify_all();
    }

    fn begin_finish(self: &Arc<Self>, interrupt: &mut Interrupt<'_>) -> Result<()> {
        let mut rest = Vec::new();
        let size = {
            let mut state = lock(&self.state);
            state.check_writing()?;
            let size = state.size.unwrap_or(state.end);
            if state.size.is_none() && state.written != size {
                return Err(Error::new(Kind::State, "has a gap: some of its bytes were never written"));
            }
            if size > self.part_bytes as u64 {
                let parts = usize::try_from(size.div_ceil(self.part_bytes as u64)).unwrap_or(usize::MAX);
                rest.extend((0..parts).filter(|index| !state.taken.contains(index)));
                state.taken.extend(&rest);
                state.stage = Stage::Finishing { parts, size };
            }
            size
        };
        if size <= self.part_bytes as u64 {
            return self.put_whole(size, interrupt);
        }
        let is_empty = rest.is_empty();
        for index in rest {
            let start = index as u64 * self.part_bytes as u64;
            let length = usize::try_from(size - start).map_or(self.part_bytes, |left| left.min(self.part_bytes));
            let part = lock(&self.state).filling.remove(&index).map_or_else(Vec::new, |part| part.bytes);
            self.send(index, padded(part, length)?, interrupt)?;
        }
        // The last part may be there already.
        let complete = if is_empty { lock(&self.state).complete() } else { None };
        if let Some((parts, size)) = complete {
            let inner = Arc::clone(self);
            return self.start(async move {
                if let Ok(upload) = inner.upload.clone().await {
                    inner.complete(&upload, parts, size).await;
                }
            });
        }
        Ok(())
    }

    fn put_whole(self: &Arc<Self>, size: u64, interrupt: &mut Interrupt<'_>) -> Result<()> {
        let permit = self.flights.permit(usize::try_from(size).unwrap_or(self.part_bytes), interrupt)?;
        let bytes = {
            let mut state = lock(&self.state);
            state.check_writing()?;
            state.stage = Stage::Completing;
            state.filling.remove(&0).map_or_else(Vec::new, |part| part.bytes)
        };
        let bytes = padded(bytes, usize::try_from(size).unwrap_or(self.part_bytes))?;
        let inner = Arc::clone(self);
        self.start(async move { inner.send_whole(bytes.into(), permit).await })
    }

    fn wait(&self, interrupt: &mut Interrupt<'_>) -> Result<()> {
        let mut state = lock(&self.state);
        loop {
            match state.stage {
                Stage::Finished => return Ok(()),
                Stage::Finishing { .. } | Stage::Completing => {}
                _ => return state.check_writing(),
            }
            state = interrupt.wait(&self.changed, state, &self.state)?;
        }
    }
}

impl WriteAt for UploadedObject {
    fn write_runs_at(&self, runs: &[&[u8]], mut offset: u64, interrupt: &mut Interrupt<'_>) -> Result<()> {
        for run in runs {
            self.0.fail_unless(self.0.write(run, offset, interrupt))?;
            offset += run.len() as u64;
        }
        Ok(())
    }
}

impl NewObject for UploadedObject {
    fn finish(&self, interrupt: &mut Interrupt<'_>) -> Result<()> {
        if matches!(lock(&self.0.state).stage, Stage::Writing | Stage::Failed(_)) {
            self.begin_finish(interrupt)?;
        }
        self.0.wait(interrupt)
    }

    fn discard(&self) -> Result<()> {
        if !self.0.owner.is_current() || self.is_discarded() {
            return Ok(());
        }
        let remains = self.stop();
        let removal = async move {
            remains.abort().await?;
            remains.object.objects.delete(std::slice::from_ref(&remains.object.name)).await
        };
        runtime::run(removal, &mut Interrupt::new(&mut patience()))
    }

    fn unname(&self) -> Result<File> {
        Err(Error::invalid_argument("an object that is sent to a store cannot be read back"))
    }

    fn abandon(&self) {
        let mut state = lock(&self.0.state);
        if !matches!(state.stage, Stage::Finished | Stage::Completing | Stage::Discarded) {
            state.stage = Stage::Abandoned;
        }
        let tasks = if matches!(state.stage, Stage::Abandoned) { state.clear() } else { Vec::new() };
        drop(state);
        drop(tasks);
        self.0.changed.notify_all();
    }

    fn stored_size(&self) -> Result<u64> {
        let state = lock(&self.0.state);
        Ok(state.size.unwrap_or(state.end))
    }

    fn set_size(&self, size: u64) -> Result<()> {
        if size.div_ceil(self.0.part_bytes as u64) > MAX_PARTS {
            return Err(self.0.too_large());
        }
        let mut state = lock(&self.0.state);
        state.check_writing()?;
        if size < state.end {
            return Err(Error::invalid_argument("cannot become shorter while it is sent"));
        }
        state.size = Some(size);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
