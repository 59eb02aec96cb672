//! Ways to pass values, handles and erased values around.

use vmsnap::crosvm as snapshot;
use vmsnap::crosvm::{AnySnapshot, SnapshotReader, SnapshotWriter};

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::place;

trait Suspendable {
    fn snapshot(&mut self) -> anyhow::Result<AnySnapshot> {
        anyhow::bail!("snapshot not implemented for {}", std::any::type_name::<Self>())
    }

    fn restore(&mut self, _data: AnySnapshot) -> anyhow::Result<()> {
        anyhow::bail!("restore not implemented for {}", std::any::type_name::<Self>())
    }
}

#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
struct Serial {
    baud: u32,
    queue: VecDeque<u8>,
}

impl Suspendable for Serial {
    fn snapshot(&mut self) -> anyhow::Result<AnySnapshot> {
        AnySnapshot::to_any(self).context("failed to serialize Serial")
    }

    fn restore(&mut self, data: AnySnapshot) -> anyhow::Result<()> {
        *self = AnySnapshot::from_any(data).context("failed to deserialize Serial")?;
        Ok(())
    }
}

struct Stateless;

impl Suspendable for Stateless {
    fn snapshot(&mut self) -> anyhow::Result<AnySnapshot> {
        AnySnapshot::to_any(())
    }

    fn restore(&mut self, data: AnySnapshot) -> anyhow::Result<()> {
        let () = AnySnapshot::from_any(data)?;
        Ok(())
    }
}

struct Unfinished;

impl Suspendable for Unfinished {}

#[test]
fn a_trait_object_that_hands_out_its_state() -> Result<()> {
    let serial = Serial { baud: 9600, queue: [1, 2].into() };
    let mut devices: Vec<Arc<Mutex<dyn Suspendable>>> =
        vec![Arc::new(Mutex::new(serial.clone())), Arc::new(Mutex::new(Stateless))];
    let saved = devices.iter().map(|device| device.lock().unwrap().snapshot()).collect::<Result<Vec<_>>>()?;
    for (device, state) in devices.iter().zip(saved.clone()) {
        device.lock().unwrap().restore(state)?;
    }
    devices.push(Arc::new(Mutex::new(Unfinished)));
    assert!(devices[2].lock().unwrap().snapshot().is_err());
    let mut fresh = Serial::default();
    fresh.restore(saved[0].clone())?;
    assert_eq!(fresh, serial);
    assert!(fresh.restore(saved[1].clone()).unwrap_err().to_string().contains("Serial"));
    Ok(())
}

#[test]
fn erased_values_in_the_fields_of_a_struct_that_is_written() -> Result<()> {
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Bus {
        devices: BTreeMap<u32, Vec<AnySnapshot>>,
        irqchip: Option<AnySnapshot>,
        rest: Box<AnySnapshot>,
    }
    let (_directory, root, encrypt) = place();
    let state = AnySnapshot::to_any(Serial { baud: 9600, queue: [0; 3].into() })?;
    let bus = Bus {
        devices: BTreeMap::from([(1, vec![state.clone(), AnySnapshot::to_any("text")?])]),
        irqchip: Some(AnySnapshot::to_any((1, 2.5))?),
        rest: Box::new(state),
    };
    SnapshotWriter::new(root.clone(), encrypt)?.write_fragment("bus", &bus)?;
    let read: Bus = SnapshotReader::new(&root, encrypt)?.read_fragment("bus")?;
    assert_eq!(read, bus);
    assert_eq!(AnySnapshot::from_any::<Serial>(*read.rest)?.baud, 9600);
    Ok(())
}

#[test]
fn an_erased_value_as_a_fragment_and_read_as_its_type() -> Result<()> {
    let (_directory, root, encrypt) = place();
    let serial = Serial { baud: 1, queue: VecDeque::new() };
    let writer = SnapshotWriter::new(root.clone(), encrypt)?;
    writer.write_fragment("serial", &serial.clone().snapshot()?)?;
    let reader = SnapshotReader::new(&root, encrypt)?;
    assert_eq!(reader.read_fragment::<Serial>("serial")?, serial);
    assert_eq!(AnySnapshot::from_any::<Serial>(reader.read_fragment("serial")?)?, serial);
    Ok(())
}

#[test]
fn a_value_s_result_as_a_tail_and_by_map_err() -> Result<()> {
    fn erased<T: Serialize>(value: &T) -> std::result::Result<AnySnapshot, String> {
        AnySnapshot::to_any(value).map_err(|error: anyhow::Error| format!("{error:#}"))
    }
    fn back<T: DeserializeOwned>(value: AnySnapshot) -> anyhow::Result<T> {
        AnySnapshot::from_any(value)
    }
    let (status, state): (u8, String) = back(erased(&(3_u8, "on")).map_err(anyhow::Error::msg)?)?;
    assert_eq!((status, state.as_str()), (3, "on"));
    assert!(back::<u8>(AnySnapshot::to_any("text")?).is_err());
    Ok(())
}

#[test]
fn the_handles_in_messages_to_another_process() -> Result<()> {
    #[derive(Debug, Clone, Serialize, Deserialize)]
    enum Request {
        Snapshot { writer: SnapshotWriter },
        Restore(SnapshotReader),
    }
    fn sent<T: Serialize + DeserializeOwned>(value: &T) -> Result<T> {
        let mut message = Vec::new();
        ciborium::into_writer(value, &mut message)?;
        Ok(ciborium::from_reader(message.as_slice())?)
    }
    let (_directory, root, encrypt) = place();
    let writer = SnapshotWriter::new(root.clone(), encrypt)?.add_namespace("gpu")?;
    if let Request::Snapshot { writer } = sent(&Request::Snapshot { writer })? {
        writer.write_fragment("state", &7)?;
    }
    if let Request::Restore(reader) = sent(&Request::Restore(SnapshotReader::new(&root, encrypt)?))? {
        assert_eq!(reader.namespace("gpu")?.read_fragment::<u8>("state")?, 7);
    }
    let json = serde_json::to_string(&SnapshotReader::new(&root, encrypt)?)?;
    assert!(serde_json::from_str::<SnapshotReader>(&json)?.namespace("gpu").is_ok());
    Ok(())
}

#[test]
fn the_traits_of_the_types() -> Result<()> {
    fn handle<
        T: Clone + Debug + Serialize + DeserializeOwned + Send + Sync + Unpin + std::panic::UnwindSafe + 'static,
    >(
        handle: &T,
    ) -> String {
        format!("{handle:?} {:#?}", handle.clone())
    }
    fn value<T: Clone + Debug + PartialEq + Serialize + DeserializeOwned + Send + Sync + 'static>(value: &T) -> bool {
        value.clone() == *value
    }
    let (_directory, root, encrypt) = place();
    assert!(handle(&SnapshotWriter::new(root.clone(), encrypt)?).contains("SnapshotWriter"));
    assert!(handle(&SnapshotReader::new(&root, encrypt)?).contains("vm1"));
    assert!(value(&AnySnapshot::to_any(vec![1.5])?));
    Ok(())
}

#[test]
fn the_crate_named_in_paths() -> anyhow::Result<()> {
    struct Vm {
        writer: snapshot::SnapshotWriter,
    }
    impl Vm {
        fn save(&self, state: &snapshot::AnySnapshot) -> anyhow::Result<()> {
            self.writer.write_fragment::<snapshot::AnySnapshot>("state", state)
        }
    }
    let (_directory, root, encrypt) = place();
    Vm { writer: snapshot::SnapshotWriter::new(root.clone(), encrypt)? }
        .save(&snapshot::AnySnapshot::to_any([1, 2])?)?;
    let reader: snapshot::SnapshotReader = snapshot::SnapshotReader::new(&root, encrypt)?;
    assert_eq!(reader.read_fragment::<[u8; 2]>("state")?, [1, 2]);
    Ok(())
}
