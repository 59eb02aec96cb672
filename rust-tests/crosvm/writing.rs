//! Ways to write with crosvm's API.

use vmsnap::crosvm::SnapshotWriter;

use std::collections::BTreeMap;
use std::io::{BufWriter, Cursor, Seek, SeekFrom, Write, copy};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::Serialize;

use crate::place;
use crate::reading::bytes;

#[test]
fn the_constructor_and_a_value() -> Result<()> {
    let (_directory, root, encrypt) = place();
    let writer = SnapshotWriter::new(root, encrypt)?;
    writer.write_fragment("clock", &12_u64)
}

#[test]
fn a_constructor_s_error_in_context() {
    fn create(path: PathBuf, encrypt: bool) -> Result<SnapshotWriter> {
        SnapshotWriter::new(path, encrypt).context("failed to create the snapshot")
    }
    let (_directory, root, encrypt) = place();
    create(root.clone(), encrypt).unwrap();
    let error = create(root, encrypt).unwrap_err();
    assert_eq!(error.to_string(), "failed to create the snapshot");
    assert!(error.chain().count() > 1);
}

#[test]
fn an_error_s_kind_by_downcast() {
    let (_directory, root, encrypt) = place();
    let kind = |result: Result<SnapshotWriter>| result.unwrap_err().downcast_ref::<std::io::Error>().unwrap().kind();
    assert_eq!(kind(SnapshotWriter::new(root.join("deeper"), encrypt)), std::io::ErrorKind::NotFound);
    SnapshotWriter::new(root.clone(), encrypt).unwrap();
    assert_eq!(kind(SnapshotWriter::new(root, encrypt)), std::io::ErrorKind::AlreadyExists);
}

#[test]
fn paths_by_rc_by_arc_by_string_and_by_as_ref() -> Result<()> {
    let (_directory, root, encrypt) = place();
    let shared: Rc<PathBuf> = Rc::new(root);
    SnapshotWriter::new(shared.to_path_buf(), encrypt)?;
    let shared: Arc<Path> = Arc::from(shared.join("a"));
    SnapshotWriter::new(shared.to_path_buf(), encrypt)?;
    let text: String = shared.join("b").to_str().context("not UTF-8")?.to_owned();
    SnapshotWriter::new(AsRef::<Path>::as_ref(&text).join("c").parent().context("no parent")?.into(), encrypt)?;
    SnapshotWriter::new((text + "2").into(), encrypt)?;
    SnapshotWriter::new(PathBuf::from(shared.as_ref()).join("d"), encrypt)?;
    Ok(())
}

#[test]
fn a_box_in_a_variable_that_is_dropped() -> Result<()> {
    let (_directory, root, encrypt) = place();
    let writer = SnapshotWriter::new(root.clone(), encrypt)?;
    let mut w: Box<dyn Write> = writer.raw_fragment("a")?;
    w.write_all(b"one ")?;
    w.write_all(b"two")?;
    drop(w);
    assert_eq!(bytes(&root, "a")?, b"one two");
    Ok(())
}

#[test]
fn a_box_that_is_the_tail_of_a_function() -> Result<()> {
    fn fragment(writer: &SnapshotWriter) -> Result<Box<dyn Write>> {
        writer.raw_fragment("a")
    }
    let (_directory, root, encrypt) = place();
    fragment(&SnapshotWriter::new(root.clone(), encrypt)?)?.write_all(b"tail")?;
    assert_eq!(bytes(&root, "a")?, b"tail");
    Ok(())
}

#[test]
fn boxes_in_a_vector_and_in_a_map() -> Result<()> {
    let (_directory, root, encrypt) = place();
    let writer = SnapshotWriter::new(root.clone(), encrypt)?;
    let mut all: Vec<Box<dyn Write>> = vec![writer.raw_fragment("a")?];
    all.push(Box::new(std::io::sink()));
    let mut named: BTreeMap<&str, Box<dyn Write>> = BTreeMap::from([("b", writer.raw_fragment("b")?)]);
    for w in all.iter_mut().chain(named.values_mut()) {
        w.write_all(b"same")?;
    }
    drop((all, named));
    assert_eq!((bytes(&root, "a")?, bytes(&root, "b")?), (b"same".to_vec(), b"same".to_vec()));
    Ok(())
}

#[test]
fn boxes_collected_from_results() -> Result<()> {
    let (_directory, root, encrypt) = place();
    let writer = SnapshotWriter::new(root.clone(), encrypt)?;
    let all = (0..3).map(|n| writer.raw_fragment(&format!("vcpu{n}"))).collect::<Result<Vec<Box<dyn Write>>>>()?;
    for (n, mut w) in all.into_iter().enumerate() {
        write!(w, "state of {n}")?;
    }
    assert_eq!(bytes(&root, "vcpu2")?, b"state of 2");
    Ok(())
}

#[test]
fn a_box_in_a_struct_s_field() -> Result<()> {
    struct Sink {
        inner: Box<dyn Write>,
        written: usize,
    }
    impl Write for Sink {
        fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
            let written = self.inner.write(buf)?;
            self.written += written;
            Ok(written)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            self.inner.flush()
        }
    }
    let (_directory, root, encrypt) = place();
    let inner = SnapshotWriter::new(root.clone(), encrypt)?.raw_fragment("a")?;
    let mut sink = Sink { inner, written: 0 };
    sink.write_all(&[7; 5000])?;
    sink.flush()?;
    assert_eq!(sink.written, 5000);
    drop(sink);
    assert_eq!(bytes(&root, "a")?, [7; 5000]);
    Ok(())
}

#[test]
fn boxes_of_both_branches_of_an_if() -> Result<()> {
    let (_directory, root, encrypt) = place();
    let writer = SnapshotWriter::new(root.clone(), encrypt)?;
    for save in [true, false] {
        let mut w: Box<dyn Write> = if save { writer.raw_fragment("a")? } else { Box::new(std::io::sink()) };
        w.write_all(b"branch")?;
        let mut w = if save { writer.raw_fragment("b")? } else { Box::new(BufWriter::new(Vec::new())) };
        w.write_all(b"branch")?;
    }
    assert_eq!(bytes(&root, "b")?, b"branch");
    Ok(())
}

#[test]
fn boxes_of_the_arms_of_a_match_without_a_question_mark() -> Result<()> {
    fn open(writer: &SnapshotWriter, chunk: Option<usize>) -> Result<Box<dyn Write>> {
        match chunk {
            None => writer.raw_fragment("a"),
            Some(0) => bail!("no chunk"),
            Some(1) => Ok(Box::new(std::io::sink())),
            Some(size) => writer.raw_fragment_with_chunk_size("a", size),
        }
    }
    let (_directory, root, encrypt) = place();
    let writer = SnapshotWriter::new(root.clone(), encrypt)?;
    assert!(open(&writer, Some(0)).is_err());
    open(&writer, Some(1))?.write_all(b"nowhere")?;
    open(&writer, Some(64 << 10))?.write_all(b"match")?;
    assert!(open(&writer, None).is_err());
    assert_eq!(bytes(&root, "a")?, b"match");
    Ok(())
}

#[test]
fn a_box_in_an_option() -> Result<()> {
    let (_directory, root, encrypt) = place();
    let writer = Some(SnapshotWriter::new(root.clone(), encrypt)?);
    let mut w: Option<Box<dyn Write>> = writer.as_ref().map(|writer| writer.raw_fragment("a")).transpose()?;
    if let Some(w) = w.as_mut() {
        w.write_all(b"option")?;
    }
    w.take();
    assert_eq!(bytes(&root, "a")?, b"option");
    Ok(())
}

#[test]
fn anyhow_s_error_in_map_err() {
    #[derive(Debug)]
    enum SaveError {
        Fragment(anyhow::Error),
        Write(std::io::Error),
    }
    fn save(writer: &SnapshotWriter, name: &str) -> std::result::Result<(), SaveError> {
        let mut w = writer.raw_fragment(name).map_err(SaveError::Fragment)?;
        w.write_all(b"a").map_err(SaveError::Write)?;
        writer.write_fragment("b", &1).map_err(|error: anyhow::Error| SaveError::Fragment(error))
    }
    let (_directory, root, encrypt) = place();
    let writer = SnapshotWriter::new(root, encrypt).unwrap();
    save(&writer, "a").unwrap();
    match save(&writer, "a") {
        Err(SaveError::Fragment(error)) => assert!(format!("{error:#}").contains("\"a\""), "{error:#}"),
        Err(SaveError::Write(error)) => panic!("{error}"),
        Ok(()) => panic!("written twice"),
    }
}

#[test]
fn context_and_with_context_on_each_call() -> Result<()> {
    let (_directory, root, encrypt) = place();
    let writer = SnapshotWriter::new(root, encrypt).context("failed to create")?;
    let devices = writer.add_namespace("devices").with_context(|| format!("failed to add {}", "devices"))?;
    devices.raw_fragment("a").context("failed to open")?.write_all(b"a").context("failed to write")?;
    writer.write_fragment("b", &1).context("failed to save b")?;
    let error = devices.write_fragment("a", &1).context("failed to save a").unwrap_err();
    assert!(format!("{error:?}").contains("Caused by"), "{error:?}");
    Ok(())
}

#[test]
fn results_combined_by_and_then_and_ensure() -> Result<()> {
    let (_directory, root, encrypt) = place();
    let (first, second) = (root.with_extension("1"), root);
    SnapshotWriter::new(first, encrypt).and_then(|writer| writer.write_fragment("a", &1))?;
    let writer = SnapshotWriter::new(second, encrypt).map_err(|error| anyhow!("no snapshot: {error:#}"))?;
    ensure!(writer.write_fragment("a", &1).is_ok(), "a");
    Ok(())
}

#[test]
fn a_box_given_to_a_function_that_takes_it() -> Result<()> {
    fn fill(mut w: Box<dyn Write>) -> Result<()> {
        w.write_all(b"moved")?;
        Ok(())
    }
    let (_directory, root, encrypt) = place();
    fill(SnapshotWriter::new(root.clone(), encrypt)?.raw_fragment("a")?)?;
    assert_eq!(bytes(&root, "a")?, b"moved");
    Ok(())
}

#[test]
fn a_box_given_to_generic_functions() -> Result<()> {
    fn by_value<W: Write>(mut w: W) -> std::io::Result<()> {
        w.write_all(b"value ")
    }
    fn by_reference<W: Write + ?Sized>(w: &mut W) -> std::io::Result<()> {
        w.write_all(b"reference ")
    }
    fn dynamic(w: &mut dyn Write) -> std::io::Result<()> {
        w.write_all(b"dynamic")
    }
    let (_directory, root, encrypt) = place();
    let mut w = SnapshotWriter::new(root.clone(), encrypt)?.raw_fragment("a")?;
    by_value(&mut w)?;
    by_reference(&mut w)?;
    by_reference(w.as_mut())?;
    dynamic(&mut *w)?;
    drop(w);
    assert_eq!(bytes(&root, "a")?, b"value reference reference dynamic");
    Ok(())
}

#[test]
fn a_buffer_flushed_and_written_on() -> Result<()> {
    let (_directory, root, encrypt) = place();
    let mut w = BufWriter::new(SnapshotWriter::new(root.clone(), encrypt)?.raw_fragment("a")?);
    w.write_all(b"before ")?;
    w.flush()?;
    w.write_all(b"after")?;
    w.flush()?;
    drop(w);
    assert_eq!(bytes(&root, "a")?, b"before after");
    Ok(())
}

#[test]
fn a_frame_of_lz4_around_a_box() -> Result<()> {
    let (_directory, root, encrypt) = place();
    let writer = SnapshotWriter::new(root.clone(), encrypt)?;
    let mut w = lz4_flex_of_crosvm::frame::FrameEncoder::new(writer.raw_fragment_with_chunk_size("mem", 1 << 20)?);
    w.write_all(&vec![7; 300_000])?;
    w.finish()?;
    let mut memory = Vec::new();
    copy(&mut lz4_flex_of_crosvm::frame::FrameDecoder::new(bytes(&root, "mem")?.as_slice()), &mut memory)?;
    assert!(memory == vec![7; 300_000]);
    Ok(())
}

#[test]
fn a_copy_from_a_file_into_a_box() -> Result<()> {
    let (_directory, root, encrypt) = place();
    let mut file = tempfile::tempfile()?;
    file.write_all(&vec![9; 100_000])?;
    file.seek(SeekFrom::Start(0))?;
    let mut w = SnapshotWriter::new(root.clone(), encrypt)?.raw_fragment("disk")?;
    assert_eq!(copy(&mut file, &mut w)?, 100_000);
    assert_eq!(copy(&mut Cursor::new([1; 10]), w.as_mut())?, 10);
    drop(w);
    assert_eq!(bytes(&root, "disk")?.len(), 100_010);
    Ok(())
}

#[test]
fn values_written_by_ciborium_and_by_write_macros() -> Result<()> {
    let (_directory, root, encrypt) = place();
    let writer = SnapshotWriter::new(root.clone(), encrypt)?;
    let mut w = BufWriter::new(writer.raw_fragment("a")?);
    ciborium::into_writer(&("value", 12), &mut w)?;
    w.flush()?;
    drop(w);
    let mut w = writer.raw_fragment("b")?;
    writeln!(w, "{:>4}", 12)?;
    drop(w);
    assert_eq!(ciborium::from_reader::<(String, u8), _>(bytes(&root, "a")?.as_slice())?, ("value".to_owned(), 12));
    assert_eq!(bytes(&root, "b")?, b"  12\n");
    Ok(())
}

#[test]
fn a_fragment_that_nothing_is_written_to() -> Result<()> {
    let (_directory, root, encrypt) = place();
    let writer = SnapshotWriter::new(root.clone(), encrypt)?;
    let _ = writer.raw_fragment("a")?;
    writer.raw_fragment("b")?.flush()?;
    assert_eq!(bytes(&root, "a")?.len() + bytes(&root, "b")?.len(), 0);
    Ok(())
}

#[test]
fn many_open_boxes_at_once() -> Result<()> {
    let (_directory, root, encrypt) = place();
    let writer = SnapshotWriter::new(root.clone(), encrypt)?;
    let (mut a, mut b) = (writer.raw_fragment("a")?, writer.raw_fragment("b")?);
    for _ in 0..100 {
        a.write_all(b"a")?;
        b.write_all(b"b")?;
    }
    drop((a, b));
    assert_eq!((bytes(&root, "a")?, bytes(&root, "b")?), (vec![b'a'; 100], vec![b'b'; 100]));
    Ok(())
}

#[test]
fn namespaces_nested_in_one_expression() -> Result<()> {
    let (_directory, root, encrypt) = place();
    let writer = SnapshotWriter::new(root.clone(), encrypt)?;
    writer.add_namespace("devices")?.add_namespace("pci")?.write_fragment("nic", &1)?;
    assert!(writer.add_namespace("devices").is_err());
    Ok(())
}

#[test]
fn a_writer_passed_by_reference_by_clone_and_by_closure() -> Result<()> {
    fn vcpus(writer: &SnapshotWriter, count: u8) -> Result<()> {
        (0..count).try_for_each(|n| writer.write_fragment(&format!("vcpu{n}"), &n))
    }
    let (_directory, root, encrypt) = place();
    let writer = SnapshotWriter::new(root.clone(), encrypt)?;
    vcpus(&writer.add_namespace("vcpu")?, 2)?;
    let copy = writer.clone();
    let devices = || -> Result<()> { copy.write_fragment("devices", &1) };
    devices()?;
    let save: Box<dyn FnOnce(SnapshotWriter) -> Result<()>> = Box::new(|writer| writer.write_fragment("late", &1));
    save(writer)
}

#[test]
fn a_writer_in_other_threads() -> Result<()> {
    let (_directory, root, encrypt) = place();
    let writer = SnapshotWriter::new(root.clone(), encrypt)?;
    let thread = std::thread::spawn({
        let writer = writer.clone();
        move || writer.raw_fragment("a")?.write_all(b"thread").context("failed to write")
    });
    thread.join().map_err(|_| anyhow!("panicked"))??;
    let shared = Arc::new(Mutex::new(writer));
    std::thread::scope(|scope| scope.spawn(|| shared.lock().unwrap().write_fragment("b", &1)).join().unwrap())?;
    assert_eq!(bytes(&root, "a")?, b"thread");
    Ok(())
}

#[test]
fn a_chunk_size_of_any_number_in_a_plain_snapshot() -> Result<()> {
    let (_directory, root, _) = place();
    let writer = SnapshotWriter::new(root, false)?;
    for (n, size) in [0, 1, 4096, usize::MAX].into_iter().enumerate() {
        writer.raw_fragment_with_chunk_size(&n.to_string(), size)?.write_all(b"a")?;
    }
    Ok(())
}

#[test]
fn a_generic_function_that_saves_whatever_is_serializable() -> Result<()> {
    fn save<T: Serialize>(writer: &SnapshotWriter, name: impl AsRef<str>, value: T) -> Result<()> {
        writer.write_fragment(name.as_ref(), &value)
    }
    fn save_all<T>(writer: &SnapshotWriter, values: &[T]) -> Result<()>
    where
        T: Serialize,
    {
        writer.write_fragment::<[&T; 1]>("first", &[&values[0]])?;
        writer.write_fragment("all", &values)
    }
    let (_directory, root, encrypt) = place();
    let writer = SnapshotWriter::new(root, encrypt)?;
    save(&writer, "a", 1)?;
    save(&writer, String::from("b"), vec![Some("text"), None])?;
    save(&writer, "c", ())?;
    save_all(&writer, &[1, 2])
}
