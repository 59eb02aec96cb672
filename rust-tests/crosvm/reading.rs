//! Ways to read with crosvm's API.

use vmsnap::crosvm::{SnapshotReader, SnapshotWriter};

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write, copy};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context, Result, anyhow};
use serde::de::DeserializeOwned;

use crate::place;

/// Returns the contents of a fragment outside of namespaces.
pub(crate) fn bytes(root: &Path, name: &str) -> Result<Vec<u8>> {
    let mut content = Vec::new();
    SnapshotReader::new(root, false)?.raw_fragment(name)?.read_to_end(&mut content)?;
    Ok(content)
}

/// Writes a snapshot with a value and bytes, and both again in the namespace `devices`.
fn written() -> Result<(tempfile::TempDir, PathBuf, bool)> {
    let (directory, root, encrypt) = place();
    let writer = SnapshotWriter::new(root.clone(), encrypt)?;
    for writer in [writer.clone(), writer.add_namespace("devices")?] {
        writer.write_fragment("clock", &12_u64)?;
        writer.raw_fragment("disk")?.write_all(b"line 1\nline 2\n")?;
    }
    Ok((directory, root, encrypt))
}

#[test]
fn paths_by_rc_by_string_and_by_as_ref() -> Result<()> {
    fn generic<P: AsRef<Path>>(root: P, encrypted: bool) -> Result<SnapshotReader> {
        SnapshotReader::new(root.as_ref(), encrypted)
    }
    let (_directory, root, encrypted) = written()?;
    SnapshotReader::new(&root, encrypted)?;
    SnapshotReader::new(root.as_path(), encrypted)?;
    let text: String = root.to_str().context("not UTF-8")?.to_owned();
    SnapshotReader::new(text.as_ref(), encrypted)?;
    SnapshotReader::new(Path::new(&text), encrypted)?;
    generic(&text, encrypted)?;
    let shared: Rc<PathBuf> = Rc::new(root);
    SnapshotReader::new(&shared, encrypted)?;
    let boxed: Box<Path> = shared.as_path().into();
    SnapshotReader::new(&boxed, encrypted)?;
    Ok(())
}

#[test]
fn encryption_that_is_required_and_not_there() -> Result<()> {
    let (_directory, root, _) = place();
    SnapshotWriter::new(root.clone(), false)?;
    assert!(SnapshotReader::new(&root, true).is_err());
    assert!(SnapshotReader::new(&root, true).context("failed to open").unwrap_err().chain().count() > 1);
    Ok(())
}

#[test]
fn values_by_turbofish_by_annotation_and_by_return_type() -> Result<()> {
    fn clock(reader: &SnapshotReader) -> Result<u64> {
        reader.read_fragment("clock")
    }
    fn field<T: DeserializeOwned>(reader: &SnapshotReader, name: &str) -> Result<T> {
        reader.read_fragment(name).with_context(|| format!("failed to restore {name}"))
    }
    let (_directory, root, encrypted) = written()?;
    let reader = SnapshotReader::new(&root, encrypted)?;
    let annotated: u64 = reader.read_fragment("clock")?;
    assert_eq!([annotated, clock(&reader)?, field(&reader, "clock")?, reader.read_fragment::<u64>("clock")?], [12; 4]);
    let error = field::<String>(&reader, "clock").unwrap_err();
    assert_eq!(error.to_string(), "failed to restore clock");
    Ok(())
}

#[test]
fn boxes_in_a_vector_in_a_field_and_in_branches() -> Result<()> {
    struct Disk {
        source: Box<dyn Read>,
    }
    let (_directory, root, encrypted) = written()?;
    let reader = SnapshotReader::new(&root, encrypted)?;
    let mut all: Vec<Box<dyn Read>> = vec![reader.raw_fragment("disk")?, Box::new(std::io::empty())];
    all.push(Disk { source: reader.raw_fragment("disk")? }.source);
    for there in [true, false] {
        all.push(if there { reader.raw_fragment("disk")? } else { Box::new(std::io::empty()) });
    }
    let mut content = String::new();
    for mut source in all {
        source.read_to_string(&mut content)?;
    }
    assert_eq!(content, "line 1\nline 2\n".repeat(3));
    Ok(())
}

#[test]
fn a_box_that_is_the_tail_of_a_function() -> Result<()> {
    fn disk(reader: &SnapshotReader, blank: bool) -> Result<Box<dyn Read>> {
        if blank { Ok(Box::new(std::io::empty())) } else { reader.raw_fragment("disk") }
    }
    let (_directory, root, encrypted) = written()?;
    let reader = SnapshotReader::new(&root, encrypted)?;
    let mut content = Vec::new();
    disk(&reader, true)?.chain(disk(&reader, false)?).read_to_end(&mut content)?;
    assert_eq!(content.len(), 14);
    Ok(())
}

#[test]
fn a_box_in_a_buffer_by_lines_and_by_pieces() -> Result<()> {
    fn first<R: Read>(mut r: R) -> std::io::Result<[u8; 4]> {
        let mut buffer = [0; 4];
        r.read_exact(&mut buffer)?;
        Ok(buffer)
    }
    let (_directory, root, encrypted) = written()?;
    let reader = SnapshotReader::new(&root, encrypted)?;
    let lines = BufReader::new(reader.raw_fragment("disk")?).lines().collect::<std::io::Result<Vec<_>>>()?;
    assert_eq!(lines, ["line 1", "line 2"]);
    let mut r = reader.raw_fragment("disk")?;
    assert_eq!((&first(&mut r)?, &first(r)?), (b"line", b" 1\nl"));
    assert!(first(reader.raw_fragment("disk")?.take(3)).is_err());
    Ok(())
}

#[test]
fn a_copy_from_one_snapshot_into_another() -> Result<()> {
    let (_directory, root, encrypted) = written()?;
    let other = root.with_extension("copy");
    let (reader, writer) = (SnapshotReader::new(&root, encrypted)?, SnapshotWriter::new(other.clone(), encrypted)?);
    for name in reader.list_fragments()?.iter().filter(|name| *name != "enc_metadata") {
        copy(&mut reader.raw_fragment(name)?, &mut writer.raw_fragment(name)?)?;
    }
    assert_eq!(bytes(&other, "disk")?, b"line 1\nline 2\n");
    Ok(())
}

#[test]
fn lists_and_namespaces_walked() -> Result<()> {
    fn walk(reader: &SnapshotReader, path: &str, found: &mut BTreeMap<String, usize>) -> Result<()> {
        for name in reader.list_fragments()? {
            let mut content = Vec::new();
            reader.raw_fragment(&name)?.read_to_end(&mut content)?;
            found.insert(format!("{path}{name}"), content.len());
        }
        for name in &reader.list_namespaces()? {
            walk(&reader.namespace(name)?, &format!("{path}{name}/"), found)?;
        }
        Ok(())
    }
    let (_directory, root, encrypted) = written()?;
    let mut found = BTreeMap::new();
    walk(&SnapshotReader::new(&root, encrypted)?, "", &mut found)?;
    let expected = [("clock", 1), ("devices/clock", 1), ("devices/disk", 14), ("disk", 14)];
    assert_eq!(found, expected.map(|(name, size)| (name.to_owned(), size)).into());
    Ok(())
}

#[test]
fn a_fragment_that_is_looked_for_in_the_list() -> Result<()> {
    let (_directory, root, encrypted) = written()?;
    let reader = SnapshotReader::new(&root, encrypted)?.namespace("devices")?;
    assert!(reader.list_fragments()?.contains(&"clock".to_owned()));
    let missing = ["clock", "nic"].into_iter().find(|name| !reader.list_fragments().unwrap().iter().any(|n| n == name));
    assert_eq!(missing, Some("nic"));
    Ok(())
}

#[test]
fn a_fragment_that_may_be_missing() -> Result<()> {
    let (_directory, root, encrypted) = written()?;
    let reader = SnapshotReader::new(&root, encrypted)?;
    let optional: Option<u64> = reader.read_fragment("nic").ok();
    assert_eq!(optional.or(reader.read_fragment("clock").ok()), Some(12));
    assert_eq!(reader.read_fragment::<u64>("nic").unwrap_or_default(), 0);
    let error = reader.raw_fragment("nic").err().ok_or_else(|| anyhow!("there"))?;
    assert_eq!(error.downcast_ref::<std::io::Error>().map(std::io::Error::kind), Some(std::io::ErrorKind::NotFound));
    Ok(())
}

#[test]
fn a_reader_in_threads_in_clones_and_in_closures() -> Result<()> {
    let (_directory, root, encrypted) = written()?;
    let reader = SnapshotReader::new(&root, encrypted)?;
    let threads: Vec<_> = (0..2)
        .map(|_| reader.clone())
        .map(|reader| std::thread::spawn(move || reader.read_fragment::<u64>("clock")))
        .collect();
    for thread in threads {
        assert_eq!(thread.join().unwrap()?, 12);
    }
    let clocks = || -> Result<Vec<u64>> {
        reader.list_namespaces()?.iter().map(|name| reader.namespace(name)?.read_fragment("clock")).collect()
    };
    assert_eq!(clocks()?, [12]);
    Ok(())
}
