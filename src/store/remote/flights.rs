//! The requests with a body that are under way at once: how much memory uploads take.

use std::sync::{Arc, Condvar, Mutex};

use super::upload::MIN_PART_BYTES;
use crate::error::Result;
use crate::threads::{Interrupt, lock};

/// Limits the parts that are under way at once: as many as there are connections, and as many bytes as that many of the
/// smallest parts have, or else two parts.
pub(crate) struct Flights {
    connections: usize,
    under_way: Mutex<UnderWay>,
    landed: Condvar,
}

#[derive(Default)]
struct UnderWay {
    parts: usize,
    bytes: usize,
}

/// The right to send one part. Dropping it lets the next one go.
pub(crate) struct Permit {
    flights: Arc<Flights>,
    bytes: usize,
}

impl Flights {
    pub(crate) fn new(connections: usize) -> Arc<Self> {
        Arc::new(Self { connections: connections.max(1), under_way: Mutex::default(), landed: Condvar::new() })
    }

    /// Waits until a part of so many bytes may be sent.
    pub(super) fn permit(self: &Arc<Self>, bytes: usize, interrupt: &mut Interrupt<'_>) -> Result<Permit> {
        let most_bytes = self.connections.saturating_mul(MIN_PART_BYTES);
        let mut under_way = lock(&self.under_way);
        while under_way.parts >= self.connections
            || (under_way.parts >= 2 && under_way.bytes.saturating_add(bytes) > most_bytes)
        {
            under_way = interrupt.wait(&self.landed, under_way, &self.under_way)?;
        }
        under_way.parts += 1;
        under_way.bytes += bytes;
        Ok(Permit { flights: Arc::clone(self), bytes })
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut under_way = lock(&self.flights.under_way);
        under_way.parts -= 1;
        under_way.bytes -= self.bytes;
        drop(under_way);
        self.flights.landed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn a_part_waits_for_its_turn_and_can_be_stopped() {
        let flights = Flights::new(3);
        let stop = &mut || Err(Error::interrupted());
        let interrupt = &mut Interrupt::new(stop);
        let full: Vec<_> = (0..3).map(|_| flights.permit(MIN_PART_BYTES, interrupt).unwrap()).collect();
        assert!(flights.permit(1, interrupt).err().unwrap().is_interrupted());
        drop(full);
        // Two parts may always be sent.
        let large: Vec<_> = (0..2).map(|_| flights.permit(MIN_PART_BYTES * 10, interrupt).unwrap()).collect();
        assert!(flights.permit(1, interrupt).err().unwrap().is_interrupted());
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| flights.permit(1, &mut Interrupt::new(&mut || Ok(()))).map(drop));
            drop(large);
            waiting.join().unwrap().unwrap();
        });
    }
}
