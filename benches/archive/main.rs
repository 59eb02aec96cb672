//! Measures archives: packing and unpacking against GNU tar, a dump into an archive against one into a directory, opening
//! a large archive, and random reads from an archive and from a directory.
//!
//! The snapshot is like that of a machine: guest memory, 256 MiB of a disk, 200 small values in nested namespaces. The
//! memory comes from a real guest if `VMSNAP_BENCH_RAM` or `make guest` provides one, otherwise 1 GiB of synthetic pages.
//! tar writes and reads the same files, and checks none of them. An encrypted archive of many GiB would have no holes, so
//! the large archive is plain.
//!
//! Reference and vmsnap alternate. The first pair is not counted, and a figure is the median of the ratios of the other
//! pairs. A ratio of 2 means twice as fast as the reference. Outputs are removed outside the measured time.
//!
//! Arguments: `[--directory DIR]... [--xfs] [--gib N] [--pairs N] [--threads N] [--only TEXT]`. The default directories
//! are /dev/shm and one below the target directory, which should be on a disk. `--xfs` adds a loop-mounted image of XFS
//! with shared blocks, for which the user must be root. `--gib` is the size of the large archive.

#![allow(clippy::unwrap_used, clippy::cast_precision_loss, reason = "a benchmark stops at the first failure")]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the numbers are known to fit")]
#![allow(clippy::needless_for_each, reason = "shorter than a loop")]
#![allow(dead_code, reason = "the other benchmark uses all of guest.rs")]
#![allow(unsafe_code, reason = "maps memory as a monitor does")]

mod files;
#[path = "../memory/guest.rs"]
mod guest;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use files::{Xfs, discard, drop_pages, feed, remove, run, sync_file_system};
use guest::{Guest, Numbers, PAGE, mixed};
use vmsnap::{FileMemory, GuestRegion, MemoryOptions, SecretKey, SnapshotOptions};

const GIB: u64 = 1 << 30;
const DISK_BYTES: usize = 256 << 20;

struct Arguments {
    directories: Vec<PathBuf>,
    xfs: bool,
    large_bytes: u64,
    pairs: usize,
    threads: usize,
    only: String,
}

fn arguments() -> Arguments {
    let mut parsed = Arguments {
        directories: Vec::new(),
        xfs: false,
        large_bytes: 64 * GIB,
        pairs: 5,
        threads: 2,
        only: String::new(),
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut number = || words.next().and_then(|text| text.parse::<usize>().ok()).expect("a number");
        match word.as_str() {
            "--gib" => parsed.large_bytes = number() as u64 * GIB,
            "--pairs" => parsed.pairs = number(),
            "--threads" => parsed.threads = number(),
            "--only" => parsed.only = words.next().expect("a part of the name of a row"),
            "--directory" => parsed.directories.push(words.next().expect("a directory").into()),
            "--xfs" => parsed.xfs = true,
            "--bench" => {} // cargo bench adds it
            _ => panic!("{word} is not an option"),
        }
    }
    if parsed.directories.is_empty() {
        parsed.directories = vec!["/dev/shm".into(), env!("CARGO_TARGET_TMPDIR").into()];
    }
    parsed
}

fn image() -> Option<PathBuf> {
    let named = std::env::var_os("VMSNAP_BENCH_RAM").map(PathBuf::from);
    named.or_else(|| {
        Some(Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guest/ram.img")).filter(|path| path.exists())
    })
}

#[derive(Clone, Copy)]
enum Form {
    Plain,
    Encrypted,
    Lz4Encrypted,
}

use Form::{Encrypted, Lz4Encrypted, Plain};

impl Form {
    fn name(self) -> &'static str {
        match self {
            Plain => "plain",
            Encrypted => "encrypted",
            Lz4Encrypted => "lz4 encrypted",
        }
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

struct Bench {
    arguments: Arguments,
    guest: Guest,
    disk: Vec<u8>,
    key: SecretKey,
    /// The place that is measured, and its name.
    directory: PathBuf,
    title: String,
}

impl Bench {
    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn wants(&self, name: &str) -> bool {
        format!("{}: {name}", self.title).contains(&self.arguments.only)
    }

    fn options(&self, form: Form) -> SnapshotOptions {
        let options = SnapshotOptions::new().threads(self.arguments.threads).durable(false);
        if matches!(form, Plain) { options } else { options.key(self.key.clone()) }
    }

    /// Measures pairs and prints a line. Each closure prepares, measures, cleans up and returns the time it measured.
    fn row(&self, name: &str, bytes: u64, reference: impl Fn() -> f64, own: impl Fn() -> f64) {
        if !self.wants(name) {
            return;
        }
        let mut pairs: Vec<_> = (0..=self.arguments.pairs).map(|_| (reference(), own())).collect();
        pairs.remove(0);
        let ratio = median(pairs.iter().map(|(reference, own)| reference / own).collect());
        let theirs = median(pairs.iter().map(|pair| pair.0).collect());
        let ours = median(pairs.iter().map(|pair| pair.1).collect());
        let all: Vec<_> = pairs.iter().map(|(reference, own)| format!("{:.2}", reference / own)).collect();
        let figures = if bytes == 0 {
            format!("{:>9.1} µs, reference {:>9.1} µs", ours * 1e6, theirs * 1e6)
        } else {
            let gib = bytes as f64 / GIB as f64;
            format!("{:>5.0} ms {:>5.2} GiB/s, reference {:>5.0} ms", ours * 1e3, gib / ours, theirs * 1e3)
        };
        println!("{:<64} {ratio:>6.2} {figures}   [{}]", format!("{}: {name}", self.title), all.join(" "));
    }

    fn write_memory(&self, form: Form, options: &SnapshotOptions, path: &Path) -> f64 {
        let how = MemoryOptions::new().compress(matches!(form, Lz4Encrypted));
        seconds(|| {
            let mut staged = options.create(path).unwrap();
            let regions = [GuestRegion::new(0, FileMemory::new(&self.guest.file, 0, None).unwrap())];
            staged.writer().write_memory(&regions, &how).unwrap();
            staged.commit().unwrap();
        })
    }

    /// Writes the snapshot of a machine as a directory and as an archive, and returns both and the size of the archive.
    fn machine(&self, form: Form) -> (PathBuf, PathBuf, u64) {
        let (directory, archive) = (self.path("machine"), self.path("machine.vmsnap.tar"));
        remove(&directory);
        remove(&archive);
        let mut staged = self.options(form).create(&directory).unwrap();
        let writer = staged.writer();
        let how = MemoryOptions::new().compress(matches!(form, Lz4Encrypted));
        let regions = [GuestRegion::new(0, FileMemory::new(&self.guest.file, 0, None).unwrap())];
        writer.write_memory(&regions, &how).unwrap();
        let mut disk = writer.raw_fragment("disk").unwrap();
        disk.write_all(&self.disk).unwrap();
        disk.finish().unwrap();
        for bus in 0..10 {
            let bus = writer.add_namespace(&format!("bus{bus}")).unwrap();
            for device in 0..10 {
                let device = bus.add_namespace(&format!("device{device}")).unwrap();
                device.write_fragment("registers", &vec![7_u64; 300]).unwrap();
                device.write_fragment("queues", &("virtio", [1_u32; 20])).unwrap();
            }
        }
        staged.commit().unwrap();
        self.options(form).pack(&directory, &archive).unwrap();
        let bytes = std::fs::metadata(&archive).unwrap().len();
        (directory, archive, bytes)
    }

    #[allow(clippy::too_many_lines, reason = "a reference and a measurement for each of six rows")]
    fn pack_and_unpack(&self, form: Form) {
        let kind = form.name();
        if !["pack", "unpack"].iter().any(|what| {
            ["file", "file, durable", "pipe"].iter().any(|how| self.wants(&format!("{what} {kind}, {how}, to tar")))
        }) {
            return;
        }
        let (directory, archive, bytes) = self.machine(form);
        let (out, other) = (self.path("out"), self.path("out.tar"));
        let clean = |spent| {
            remove(&out);
            remove(&other);
            spent
        };
        let tar_pack = || {
            let mut command = Command::new("tar");
            command.arg("--sort=name").arg("-C").arg(&directory);
            command
        };
        let fresh = || {
            std::fs::create_dir(&out).unwrap();
            let mut command = Command::new("tar");
            command.arg("-C").arg(&out);
            command
        };
        for durable in [false, true] {
            let options = self.options(form).durable(durable);
            let how = if durable { "file, durable" } else { "file" };
            // Earlier writes must not be synced within the measured time.
            let settle = || {
                if durable {
                    sync_file_system(&self.directory);
                }
            };
            self.row(
                &format!("pack {kind}, {how}, to tar"),
                bytes,
                || {
                    settle();
                    clean(seconds(|| {
                        run(tar_pack().arg("-cf").arg(&other).arg("."));
                        if durable {
                            File::open(&other).unwrap().sync_all().unwrap();
                        }
                    }))
                },
                || {
                    settle();
                    clean(seconds(|| _ = options.pack(&directory, &other).unwrap()))
                },
            );
            self.row(
                &format!("unpack {kind}, {how}, to tar"),
                bytes,
                || {
                    settle();
                    let mut command = fresh();
                    clean(seconds(|| {
                        run(command.arg("-xf").arg(&archive));
                        if durable {
                            sync_file_system(&out);
                        }
                    }))
                },
                || {
                    settle();
                    clean(seconds(|| _ = options.unpack(&archive, &out).unwrap()))
                },
            );
        }
        let options = self.options(form);
        self.row(
            &format!("pack {kind}, pipe, to tar"),
            bytes,
            || {
                seconds(|| {
                    let mut child = tar_pack().args(["-cf", "-", "."]).stdout(Stdio::piped()).spawn().unwrap();
                    let pipe: std::os::fd::OwnedFd = child.stdout.take().unwrap().into();
                    discard(pipe.into());
                    assert!(child.wait().unwrap().success());
                })
            },
            || {
                seconds(|| {
                    let (reader, mut writer) = pipe();
                    std::thread::scope(|scope| {
                        scope.spawn(|| discard(reader));
                        options.pack_to(&directory, &mut writer).unwrap();
                        drop(writer);
                    });
                })
            },
        );
        self.row(
            &format!("unpack {kind}, pipe, to tar"),
            bytes,
            || {
                let mut command = fresh();
                clean(seconds(|| {
                    let mut child = command.args(["-xf", "-"]).stdin(Stdio::piped()).spawn().unwrap();
                    let pipe: std::os::fd::OwnedFd = child.stdin.take().unwrap().into();
                    feed(&archive, pipe.into());
                    assert!(child.wait().unwrap().success());
                }))
            },
            || {
                clean(seconds(|| {
                    let (mut reader, writer) = pipe();
                    std::thread::scope(|scope| {
                        scope.spawn(|| feed(&archive, writer));
                        options.unpack_from(&mut reader, &out).unwrap();
                    });
                }))
            },
        );
        remove(&directory);
        remove(&archive);
    }

    /// Measures a dump and its commit, into an archive and into a directory.
    fn create(&self, form: Form) {
        let (directory, archive) = (self.path("dump"), self.path("dump.vmsnap.tar"));
        let bytes = self.guest.data_bytes as u64;
        for durable in [false, true] {
            let options = self.options(form).durable(durable);
            let name = format!("dump {}{}, to a directory", form.name(), if durable { ", durable" } else { "" });
            let measure = |path: &Path| {
                if durable {
                    sync_file_system(&self.directory);
                }
                let spent = self.write_memory(form, &options, path);
                remove(path);
                spent
            };
            self.row(&name, bytes, || measure(&directory), || measure(&archive));
        }
    }

    /// Measures the first read of a large snapshot, from the moment before it is opened.
    fn open(&self) {
        let names = ["open and read 4 KiB of a fragment", "open and read 4 KiB of guest memory"];
        if !names.iter().any(|name| self.wants(name)) {
            return;
        }
        let (directory, archive) = (self.path("large"), self.path("large.vmsnap.tar"));
        let size = self.arguments.large_bytes;
        println!("{}: makes an archive of {} GiB of holes ...", self.title, size / GIB);
        let spent = seconds(|| {
            let options = self.options(Plain);
            let writer = options.create_in_place(&directory).unwrap();
            // A page of data in each 64 MiB.
            let sparse = Guest::fresh(size as usize);
            for start in (0..size).step_by(64 << 20) {
                std::os::unix::fs::FileExt::write_all_at(&sparse.file, &[7; PAGE], start).unwrap();
            }
            let regions = [GuestRegion::new(0, FileMemory::new(&sparse.file, 0, None).unwrap())];
            writer.write_memory(&regions, &MemoryOptions::new()).unwrap();
            for number in 0..200 {
                writer.write_fragment(&format!("device{number}"), &vec![7_u64; 300]).unwrap();
            }
            drop(writer);
            // A plain fragment is a file with its contents. Written by a program, its zeros would take space.
            File::create(directory.join("disk")).unwrap().set_len(size).unwrap();
            options.seal(&directory).unwrap();
            options.pack(&directory, &archive).unwrap();
        });
        println!("{}: took {spent:.0} s, {} GiB long", self.title, std::fs::metadata(&archive).unwrap().len() / GIB);
        sync_file_system(&self.directory);
        let numbers = std::cell::RefCell::new(Numbers(7));
        let options = self.options(Plain);
        for (index, name) in names.into_iter().enumerate() {
            let measure = |path: &Path| {
                drop_pages(path);
                let mut page = [1; PAGE];
                let block = numbers.borrow_mut().next() % (size / (64 << 20)) * (64 << 20);
                seconds(|| {
                    let reader = options.open(path).unwrap();
                    if index == 0 {
                        assert_eq!(reader.raw_fragment("disk").unwrap().read_at(block, &mut page).unwrap(), PAGE);
                        assert!(page == [0; PAGE]);
                    } else {
                        reader.memory().unwrap().read_at(block, &mut page).unwrap();
                        assert!(page == [7; PAGE]);
                    }
                })
            };
            self.row(name, 0, || measure(&directory), || measure(&archive));
        }
        remove(&directory);
        remove(&archive);
    }

    /// Measures reads of 4 KiB at random offsets, from an archive and from a directory.
    fn random(&self, form: Form) {
        const READS: usize = 4000;
        let kind = form.name();
        let (memory_name, disk_name) =
            (format!("random read, {kind} guest memory"), format!("random read, {kind} fragment"));
        if !self.wants(&memory_name) && !self.wants(&disk_name) {
            return;
        }
        let (directory, archive, _) = self.machine(form);
        let options = self.options(form);
        let opened = [&directory, &archive].map(|path| options.open(path).unwrap());
        let memories = opened.each_ref().map(|reader| reader.memory().unwrap());
        let disks = opened.each_ref().map(|reader| reader.raw_fragment("disk").unwrap());
        // Only pages with data, because a hole takes no time.
        let pages: Vec<_> = self.guest.ranges.iter().flat_map(|(start, end)| (*start..*end).step_by(PAGE)).collect();
        let measure = |count: usize, read: &dyn Fn(usize, &mut [u8])| {
            let (mut numbers, mut page) = (Numbers(7), [0; PAGE]);
            let spent = seconds(|| (0..READS).for_each(|_| read(numbers.next() as usize % count, &mut page)));
            spent / READS as f64
        };
        let read_memory = |which: usize| {
            measure(pages.len(), &|number, page| memories[which].read_at(pages[number] as u64, page).unwrap())
        };
        let read_disk = |which: usize| {
            measure(DISK_BYTES / PAGE, &|number, page| {
                assert_eq!(disks[which].read_at((number * PAGE) as u64, page).unwrap(), PAGE);
            })
        };
        self.row(&memory_name, 0, || read_memory(0), || read_memory(1));
        self.row(&disk_name, 0, || read_disk(0), || read_disk(1));
        remove(&directory);
        remove(&archive);
    }

    fn run(&mut self, directory: &Path, title: &str) {
        directory.clone_into(&mut self.directory);
        title.clone_into(&mut self.title);
        println!("{title}: {}", directory.display());
        let forms = [Plain, Encrypted, Lz4Encrypted];
        forms.into_iter().for_each(|form| self.pack_and_unpack(form));
        forms.into_iter().for_each(|form| self.create(form));
        forms.into_iter().for_each(|form| self.random(form));
        self.open();
    }
}

fn main() {
    let arguments = arguments();
    let guest = image().map_or_else(|| mixed(GIB as usize, 64), |image| Guest::of(&image));
    let mut numbers = Numbers(42);
    let mut disk = vec![0; DISK_BYTES];
    // Half of it is empty, as on a disk.
    disk[..DISK_BYTES / 2].chunks_mut(8).for_each(|word| word.copy_from_slice(&numbers.next().to_le_bytes()));
    let key = SecretKey::generate().unwrap();
    let mut bench = Bench { arguments, guest, disk, key, directory: PathBuf::new(), title: String::new() };
    println!(
        "{} MiB of memory, {} threads, {} pairs, aead {}",
        bench.guest.data_bytes >> 20,
        bench.arguments.threads,
        bench.arguments.pairs,
        vmsnap::aead_provider().unwrap()
    );
    println!("each line: the ratio, the time of vmsnap and of the reference, the ratios of all pairs");
    let temporary = |directory: &Path| tempfile::Builder::new().prefix("vmsnap-bench-").tempdir_in(directory).unwrap();
    for directory in bench.arguments.directories.clone() {
        let kept = temporary(&directory);
        let is_default = directory == Path::new(env!("CARGO_TARGET_TMPDIR"));
        bench.run(kept.path(), &if is_default { "disk".to_owned() } else { directory.display().to_string() });
    }
    if bench.arguments.xfs {
        let kept = temporary(Path::new(env!("CARGO_TARGET_TMPDIR")));
        let xfs = Xfs::mount(kept.path());
        bench.run(&xfs.mount, "xfs");
    }
}

/// A pipe with the capacity that the command line gives to its own.
fn pipe() -> (std::io::PipeReader, std::io::PipeWriter) {
    let (reader, writer) = std::io::pipe().unwrap();
    let _ = rustix::pipe::fcntl_setpipe_size(&writer, 1 << 20);
    (reader, writer)
}
