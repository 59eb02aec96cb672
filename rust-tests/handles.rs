//! Writers and readers: the calls of crosvm, values, and serialized handles.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vmsnap::{AnySnapshot, Format, KeyWrapping, SecretKey, SnapshotOptions, SnapshotReader, SnapshotWriter, inspect};

use crate::{encrypted, place};

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Vcpu {
    registers: Vec<u64>,
    mode: Mode,
    extra: AnySnapshot,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
enum Mode {
    Real,
    Long { cr3: u64 },
}

fn vcpu() -> Vcpu {
    Vcpu {
        registers: vec![0, 1, u64::MAX],
        mode: Mode::Long { cr3: 0x1000 },
        extra: AnySnapshot::to_any((7_u8, "apic")).unwrap(),
    }
}

/// Written like code for crosvm's crate: the same argument types, the same order, and `?` into a boxed error.
fn as_code_for_crosvm(root: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let writer = SnapshotWriter::new(root.to_path_buf(), false)?;
    writer.write_fragment("vcpu0", &vcpu())?;
    let devices: SnapshotWriter = writer.add_namespace("devices")?;
    let mut raw: Box<dyn Write> = Box::new(devices.raw_fragment("blob")?);
    raw.write_all(b"raw")?;
    drop(raw);
    let mut raw = std::io::BufWriter::new(devices.raw_fragment_with_chunk_size("big", 1024)?);
    raw.write_all(b"big")?;
    raw.flush()?;
    drop(raw);

    let reader = SnapshotReader::new(root, false)?;
    assert_eq!(reader.read_fragment::<Vcpu>("vcpu0")?, vcpu());
    assert_eq!(reader.list_namespaces()?, ["devices"]);
    let devices = reader.namespace("devices")?;
    assert_eq!(devices.list_fragments()?, ["big", "blob"]);
    let mut raw: Box<dyn Read> = Box::new(devices.raw_fragment("blob")?);
    let mut text = String::new();
    raw.read_to_string(&mut text)?;
    assert_eq!(text, "raw");
    Ok(())
}

#[test]
fn code_for_crosvm_works_with_the_import_changed() {
    let (_directory, root) = place();
    as_code_for_crosvm(&root).unwrap();
    // The files that crosvm itself would read.
    let stored: Vcpu = ciborium::from_reader(std::fs::File::open(root.join("vcpu0")).unwrap()).unwrap();
    assert_eq!(stored, vcpu());
    assert_eq!(std::fs::read(root.join("devices/big")).unwrap(), b"big");
}

#[test]
fn values_come_back_in_either_format_plain_and_encrypted() {
    for format in [Format::Cbor, Format::Json] {
        for options in [SnapshotOptions::new().format(format), encrypted().format(format)] {
            let (_directory, root) = place();
            options.create_in_place(&root).unwrap().write_fragment("vcpu0", &vcpu()).unwrap();
            assert_eq!(options.open(&root).unwrap().read_fragment::<Vcpu>("vcpu0").unwrap(), vcpu());
        }
    }
}

#[test]
fn a_reader_finds_out_the_format() {
    for written in [SnapshotOptions::new(), encrypted()] {
        let (_directory, root) = place();
        written.clone().format(Format::Json).create_in_place(&root).unwrap().write_fragment("vcpu0", &vcpu()).unwrap();
        assert_eq!(written.open(&root).unwrap().read_fragment::<Vcpu>("vcpu0").unwrap(), vcpu());
        // A format that was requested is not replaced by another.
        let reader = written.format(Format::Cbor).open(&root).unwrap();
        assert!(reader.read_fragment::<Vcpu>("vcpu0").unwrap_err().is_corrupt());
    }
}

#[test]
fn a_number_in_json_has_to_be_asked_for() {
    let (_directory, root) = place();
    let json = SnapshotOptions::new().format(Format::Json);
    json.create_in_place(&root).unwrap().write_fragment("count", &70_000).unwrap();
    assert!(SnapshotReader::new(&root, false).unwrap().read_fragment::<u32>("count").unwrap_err().is_corrupt());
    assert_eq!(json.open(&root).unwrap().read_fragment::<u32>("count").unwrap(), 70_000);
}

#[test]
fn a_value_that_cannot_be_serialized_leaves_no_file() {
    let (_directory, root) = place();
    let writer = SnapshotOptions::new().format(Format::Json).create_in_place(&root).unwrap();
    let keyed_by_bytes = std::collections::BTreeMap::from([(vec![1_u8], 1)]);
    assert!(writer.write_fragment("odd", &keyed_by_bytes).unwrap_err().is_serialization());
    assert!(!root.join("odd").exists());
}

#[test]
fn a_fragment_that_holds_something_else_is_corrupt() {
    let (_directory, root) = place();
    let writer = SnapshotOptions::new().create_in_place(&root).unwrap();
    writer.write_fragment("text", "text").unwrap();
    std::fs::write(root.join("more"), [1, 2]).unwrap();
    std::fs::write(root.join("less"), [0x9a, 0xff, 0xff, 0xff, 0xff]).unwrap();
    let reader = SnapshotReader::new(&root, false).unwrap();
    for (name, said) in [("text", "text"), ("more", "bytes follow"), ("less", "less")] {
        let error = reader.read_fragment::<Vec<u64>>(name).unwrap_err();
        assert!(error.is_corrupt(), "{error}");
        if name == "more" {
            let error = reader.read_fragment::<u64>(name).unwrap_err();
            assert!(error.is_corrupt() && error.to_string().contains(said), "{error}");
        }
    }
}

#[test]
fn handles_travel_serialized_and_never_show_their_key() {
    let key = SecretKey::from([0xab; 32]);
    let options = SnapshotOptions::new().key(key);
    let (_directory, root) = place();
    let writer = options.create_in_place(&root).unwrap().add_namespace("disks").unwrap();
    let mut travelling = Vec::new();
    ciborium::into_writer(&writer, &mut travelling).unwrap();
    let arrived: SnapshotWriter = ciborium::from_reader(&travelling[..]).unwrap();
    arrived.write_fragment("sda", &7_u8).unwrap();

    let reader = options.open(&root).unwrap();
    let arrived: SnapshotReader = serde_json::from_str(&serde_json::to_string(&reader).unwrap()).unwrap();
    assert_eq!(arrived.namespace("disks").unwrap().read_fragment::<u8>("sda").unwrap(), 7);

    for shown in [format!("{options:?}"), format!("{writer:?}"), format!("{reader:?}")] {
        assert!(!shown.contains("171") && !shown.to_lowercase().contains("abab"), "{shown}");
    }
    assert!(format!("{writer:?}").contains("disks"));
}

#[test]
fn a_handle_from_outside_cannot_escape_its_root() {
    let (_directory, root) = place();
    SnapshotOptions::new().create_in_place(&root).unwrap();
    let reader = serde_json::to_string(&SnapshotOptions::new().open(&root).unwrap()).unwrap();
    serde_json::from_str::<SnapshotReader>(&reader).unwrap();
    let escaping = reader.replace("\"namespace\":\"\"", "\"namespace\":\"../..\"");
    assert_ne!(reader, escaping);
    assert!(serde_json::from_str::<SnapshotReader>(&escaping).is_err());
}

#[test]
fn a_handle_of_another_version_is_refused_by_name() {
    let (_directory, root) = place();
    let writer = serde_json::to_string(&SnapshotOptions::new().create_in_place(&root).unwrap()).unwrap();
    serde_json::from_str::<SnapshotWriter>(&writer).unwrap();
    let other = writer.replacen("\"version\":2", "\"version\":3", 1);
    assert_ne!(writer, other);
    let error = serde_json::from_str::<SnapshotWriter>(&other).unwrap_err().to_string();
    assert!(error.contains("version 3") && error.contains("the same vmsnap in all processes"), "{error}");
}

#[test]
fn a_snapshot_is_its_owners_alone() {
    let (_directory, root) = place();
    let writer = encrypted().create_in_place(&root).unwrap();
    writer.add_namespace("disks").unwrap().write_fragment("sda", &1).unwrap();
    let mode = |path: PathBuf| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    for (path, expected) in [("", 0o700), ("disks", 0o700), ("enc_metadata", 0o600), ("disks/sda", 0o600)] {
        assert_eq!(mode(root.join(path)), expected, "{path}");
    }
}

#[test]
fn an_existing_snapshot_is_added_to_and_never_written_over() {
    for options in [SnapshotOptions::new(), encrypted()] {
        let (_directory, root) = place();
        options.create_in_place(&root).unwrap().add_namespace("cpu").unwrap().write_fragment("clock", &1).unwrap();

        let writer = options.append(&root).unwrap();
        writer.write_fragment("new", &2).unwrap();
        let cpu = writer.namespace("cpu").unwrap();
        assert_eq!(cpu.namespace_path(), "cpu");
        cpu.write_fragment("timer", &3).unwrap();
        assert_eq!(cpu.write_fragment("clock", &4).unwrap_err().raw_os_error(), Some(17)); // EEXIST
        assert_eq!(writer.add_namespace("cpu").unwrap_err().raw_os_error(), Some(17));
        assert_eq!(writer.namespace("none").unwrap_err().raw_os_error(), Some(2)); // ENOENT
        assert_eq!(writer.namespace("new").unwrap_err().raw_os_error(), Some(20)); // ENOTDIR
        assert!(writer.namespace("..").unwrap_err().is_invalid_argument());

        let reader = options.open(&root).unwrap();
        assert_eq!(reader.read_fragment::<u64>("new").unwrap(), 2);
        let cpu = reader.namespace("cpu").unwrap();
        assert_eq!(["clock", "timer"].map(|name| cpu.read_fragment::<u64>(name).unwrap()), [1, 3]);
    }
}

#[test]
fn adding_needs_a_snapshot_its_key_and_that_it_is_not_sealed() {
    let (_directory, root) = place();
    assert_eq!(SnapshotWriter::open(&root).unwrap_err().raw_os_error(), Some(2));

    let options = encrypted();
    options.create_in_place(&root).unwrap();
    assert!(SnapshotWriter::open(&root).unwrap_err().is_key_unavailable());
    assert!(encrypted().append(&root).unwrap_err().is_authentication());
    std::fs::write(root.join("vmsnap_manifest"), b"").unwrap();
    let sealed = options.append(&root).unwrap_err();
    assert!(sealed.is_sealed());
    assert!(sealed.to_string().contains("sealed"), "{sealed}");

    let (_directory, root) = place();
    SnapshotWriter::new(&root, false).unwrap();
    assert!(encrypted().append(&root).unwrap_err().is_not_encrypted());
    SnapshotWriter::open(&root).unwrap();
}

#[test]
fn what_shows_without_a_key_is_wrapping_names_and_stored_sizes() {
    let (_directory, root) = place();
    assert!(inspect(&root).unwrap_err().is_io());

    let writer = encrypted().create_in_place(&root).unwrap();
    writer.raw_fragment("b").unwrap().finish().unwrap();
    for name in ["z", "a"] {
        writer.add_namespace(name).unwrap().add_namespace("in").unwrap().write_fragment("it", &1).unwrap();
    }
    let outline = inspect(&root).unwrap();
    assert_eq!(outline.namespaces, ["a", "a/in", "z", "z/in"]);
    let sizes: Vec<_> = outline.fragments.iter().map(|each| (each.path.as_str(), each.stored_size_bytes)).collect();
    assert_eq!(sizes, [("b", 106), ("a/in/it", 107), ("z/in/it", 107)]);

    assert_eq!(inspect(&root).unwrap().key_wrapping, Some(KeyWrapping::RawKey));
    for contents in [&b"\xd9\xd9\xf7\xa0"[..], b"foreign", b""] {
        std::fs::write(root.join("enc_metadata"), contents).unwrap();
        let error = inspect(&root).unwrap_err();
        assert!(error.is_corrupt(), "{error}");
    }
    std::fs::remove_file(root.join("enc_metadata")).unwrap();
    assert_eq!(inspect(&root).unwrap().key_wrapping, None);
    std::os::unix::fs::symlink("b", root.join("link")).unwrap();
    assert!(inspect(&root).unwrap_err().is_corrupt());
}

#[test]
fn any_snapshot_says_when_the_type_is_another() {
    let state = AnySnapshot::to_any("text").unwrap();
    assert!(AnySnapshot::from_any::<u64>(state).unwrap_err().is_serialization());
}

#[test]
fn a_float_comes_back_from_json_to_the_last_bit() {
    let options = SnapshotOptions::new().format(Format::Json);
    let (_directory, root) = place();
    let floats = [f64::from(f32::MAX), 1.0 / 3.0, 5e-324, 1e300, 1e16];
    options.create_in_place(&root).unwrap().write_fragment("floats", &floats).unwrap();
    // In the form of crosvm's version of serde_json: an exponent has a sign only if it is negative.
    let text = std::fs::read_to_string(root.join("floats")).unwrap();
    assert_eq!(text, "[3.4028234663852886e38,0.3333333333333333,5e-324,1e300,1e16]");
    let seen: [f64; 5] = options.open(&root).unwrap().read_fragment("floats").unwrap();
    assert_eq!(seen.map(f64::to_bits), floats.map(f64::to_bits));
}

#[test]
fn what_is_in_an_any_snapshot_comes_back_from_json() {
    fn through_json<T: Serialize + serde::de::DeserializeOwned>(value: T) -> vmsnap::Result<T> {
        let options = SnapshotOptions::new().format(Format::Json);
        let (_directory, root) = place();
        options.create_in_place(&root)?.write_fragment("any", &AnySnapshot::to_any(value)?)?;
        AnySnapshot::from_any(options.open(&root)?.read_fragment("any")?)
    }
    let address = std::net::IpAddr::from([127, 0, 0, 1]); // text where a person may read it, bytes elsewhere
    let keyed = std::collections::BTreeMap::from([(-5_i64, "a"), (7, "b")].map(|(key, text)| (key, text.to_owned())));
    assert_eq!(through_json(keyed.clone()).unwrap(), keyed);
    assert_eq!(through_json(address).unwrap(), address);
    // A float of 32 bits would be written as 0.1.
    assert_eq!(through_json(f64::from(0.1_f32)).unwrap().to_bits(), f64::from(0.1_f32).to_bits());
    assert_eq!(through_json(serde_bytes::ByteBuf::from([1, 2, 255])).unwrap(), [1, 2, 255]);
    assert_eq!(through_json((u64::MAX, i64::MIN)).unwrap(), (u64::MAX, i64::MIN));
    for wide in [i128::MIN, -(1 << 64), i128::from(i64::MIN) - 1, i128::MAX] {
        assert!(through_json(wide).unwrap_err().is_serialization());
    }
    assert!(through_json(std::collections::BTreeMap::from([((1, 2), 3)])).unwrap_err().is_serialization());
}
