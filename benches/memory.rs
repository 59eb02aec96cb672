//! Guest memory dumped and restored, as ratios to how it is done today, in the same run.
//!
//! The stand-in for today: one thread, `SEEK_DATA`, one `write_all` from the mapping for each range, with and without
//! `lz4_flex::frame::FrameEncoder` of crosvm's version at its defaults, plain; and back by `read_exact` into a fresh mapping.
//! Every figure is the median of the ratios of interleaved pairs after a warm-up that is thrown away.
//!
//! Arguments: `[--folder DIR] [--mib N] [--pairs N] [--threads N] [--only TEXT] [--min-gap BYTES] [--sync]`; `VMSNAP_BENCH_RAM` names
//! a RAM image.

#![allow(clippy::unwrap_used, clippy::cast_precision_loss, reason = "a benchmark stops where something fails")]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "numbers of its own")]
#![allow(clippy::needless_for_each, reason = "as short as it can be")]
#![allow(unsafe_code, reason = "maps memory as a monitor does")]

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use lz4_flex_of_crosvm::frame::{FrameDecoder, FrameEncoder};
use rustix::fs::{MemfdFlags, SeekFrom, memfd_create, seek};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vmsnap::{FileMemory, GuestDestination, GuestRegion, MemoryOptions, SecretKey, SnapshotOptions};

const PAGE: usize = 4096;

struct Arguments {
    folder: PathBuf,
    bytes: usize,
    pairs: usize,
    threads: usize,
    only: String,
    min_gap: u64,
    sync: bool,
}

fn arguments() -> Arguments {
    let mut parsed = Arguments {
        folder: "/dev/shm".into(),
        bytes: 1 << 30,
        pairs: 5,
        threads: 2,
        only: String::new(),
        min_gap: 4096,
        sync: false,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut number = || words.next().and_then(|text| text.parse::<usize>().ok()).expect("a number");
        match word.as_str() {
            "--mib" => parsed.bytes = number() << 20,
            "--pairs" => parsed.pairs = number(),
            "--threads" => parsed.threads = number(),
            "--min-gap" => parsed.min_gap = number() as u64,
            "--only" => parsed.only = words.next().expect("a part of a row's name"),
            "--folder" => parsed.folder = words.next().expect("a folder").into(),
            "--sync" => parsed.sync = true,
            _ => {} // cargo bench adds words of its own
        }
    }
    parsed
}

/// Not for secrets: the same numbers in every run (xorshift64, Marsaglia 2003).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// From 0 to 1.
    fn part(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// Guest memory: a memfd and its mapping.
struct Guest {
    file: File,
    bytes: usize,
    mapping: *mut u8,
    /// As `SEEK_DATA` tells them.
    ranges: Vec<(usize, usize)>,
    data_bytes: usize,
}

impl Guest {
    fn new(bytes: usize) -> Self {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(bytes as u64).unwrap();
        let mapping = map(&file, bytes);
        Self { file, bytes, mapping, ranges: Vec::new(), data_bytes: 0 }
    }

    fn slice(&mut self) -> &mut [u8] {
        // SAFETY: mapped for so many bytes, and nobody else writes to it.
        unsafe { std::slice::from_raw_parts_mut(self.mapping, self.bytes) }
    }

    /// 60 % never touched, 10 % touched but zero, 15 % random, 15 % text-like, in runs of so many pages on average.
    fn made(bytes: usize, run: usize) -> Self {
        let mut guest = Self::new(bytes);
        let mut numbers = Numbers(42);
        // 2,000 words of 2 to 11 letters; the small numbers are the frequent ones.
        let words: Vec<Vec<u8>> = (0..2000)
            .map(|_| (0..2 + numbers.next() % 10).map(|_| b'a' + (numbers.next() % 26) as u8).chain([b' ']).collect())
            .collect();
        let mut page = 0;
        while page < bytes / PAGE {
            // Geometric, of that mean.
            let length = if run == 1 { 1 } else { 1 + (-numbers.part().ln() * (run - 1) as f64) as usize };
            let end = (page + length).min(bytes / PAGE);
            let kind = numbers.part();
            for place in guest.slice()[page * PAGE..end * PAGE].chunks_mut(PAGE) {
                if (0.6..0.7).contains(&kind) {
                    place.fill(0);
                } else if (0.7..0.85).contains(&kind) {
                    place.chunks_mut(8).for_each(|word| word.copy_from_slice(&numbers.next().to_le_bytes()));
                } else if kind >= 0.85 {
                    let mut filled = 0;
                    while filled < PAGE {
                        let word = &words[(numbers.part().powi(3) * 2000.0) as usize];
                        let length = word.len().min(PAGE - filled);
                        place[filled..filled + length].copy_from_slice(&word[..length]);
                        filled += length;
                    }
                }
            }
            page = end;
        }
        guest.look();
        guest
    }

    fn of(image: &Path) -> Self {
        let mut source = File::open(image).unwrap();
        let bytes = usize::try_from(source.metadata().unwrap().len()).unwrap();
        let mut guest = Self::new(bytes);
        let mut page = [0; PAGE];
        for number in 0..bytes / PAGE {
            source.read_exact(&mut page).unwrap();
            if page != [0; PAGE] {
                guest.slice()[number * PAGE..(number + 1) * PAGE].copy_from_slice(&page);
            }
        }
        guest.look();
        guest
    }

    fn look(&mut self) {
        self.ranges = ranges(&self.file, self.bytes);
        self.data_bytes = self.ranges.iter().map(|(start, end)| end - start).sum();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length.
        unsafe { munmap(self.mapping.cast(), self.bytes).unwrap() };
    }
}

fn map(file: &File, bytes: usize) -> *mut u8 {
    // SAFETY: a new shared mapping at an address of the kernel's choice.
    let mapping =
        unsafe { mmap(std::ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, file, 0) };
    mapping.unwrap().cast()
}

fn ranges(file: &File, bytes: usize) -> Vec<(usize, usize)> {
    let mut ranges = Vec::new();
    let mut at = 0;
    loop {
        let start = match seek(file, SeekFrom::Data(at as u64)) {
            Err(Errno::NXIO) => return ranges,
            start => start.unwrap() as usize,
        };
        let end = (seek(file, SeekFrom::Hole(start as u64)).unwrap() as usize).min(bytes);
        ranges.push((start, end));
        at = end;
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
    folder: PathBuf,
    key: SecretKey,
    title: String,
}

impl Bench {
    fn reference(&self) -> PathBuf {
        self.folder.join("reference")
    }

    fn snapshot(&self) -> PathBuf {
        self.folder.join("snapshot")
    }

    /// So many bytes of memory that were used a moment ago: what is free for seconds may go to the host, and costs several times as
    /// much when it comes back.
    fn warm(&self, bytes: usize) {
        let path = self.folder.join("warm");
        let mut file = File::create(&path).unwrap();
        let piece = vec![1; 1 << 20];
        (0..bytes >> 20).for_each(|_| file.write_all(&piece).unwrap());
        std::fs::remove_file(&path).unwrap();
    }

    /// The stand-in's dump.
    fn stand_in(&self, guest: &mut Guest, compress: bool) -> f64 {
        let path = self.reference();
        let _ = std::fs::remove_file(&path);
        self.warm(guest.data_bytes);
        seconds(|| {
            let ranges = ranges(&guest.file, guest.bytes);
            let memory = &*guest.slice();
            let mut file = File::create(&path).unwrap();
            if compress {
                let mut encoder = FrameEncoder::new(&mut file);
                ranges.iter().for_each(|(start, end)| encoder.write_all(&memory[*start..*end]).unwrap());
                encoder.finish().unwrap();
            } else {
                ranges.iter().for_each(|(start, end)| file.write_all(&memory[*start..*end]).unwrap());
            }
            if self.arguments.sync {
                file.sync_all().unwrap();
            }
        })
    }

    /// write(2) of the data bytes, all from one buffer.
    fn write_data(&self, guest: &mut Guest) -> f64 {
        let ranges = guest.ranges.clone();
        let memory = &*guest.slice();
        let data: Vec<u8> = ranges.iter().flat_map(|(start, end)| &memory[*start..*end]).copied().collect();
        let path = self.reference();
        let _ = std::fs::remove_file(&path);
        self.warm(guest.data_bytes);
        seconds(|| {
            let mut file = File::create(&path).unwrap();
            data.chunks(1 << 20).for_each(|piece| file.write_all(piece).unwrap());
            if self.arguments.sync {
                file.sync_all().unwrap();
            }
        })
    }

    fn options(&self, encrypted: bool) -> SnapshotOptions {
        let options = SnapshotOptions::new().threads(self.arguments.threads);
        if encrypted { options.key(self.key.clone()) } else { options }
    }

    fn dump(&self, guest: &Guest, encrypted: bool, compress: bool) -> f64 {
        let root = self.snapshot();
        let _ = std::fs::remove_dir_all(&root);
        let options = self.options(encrypted);
        self.warm(guest.data_bytes);
        seconds(|| {
            let source = FileMemory::new(&guest.file, 0, None).unwrap();
            let regions = [GuestRegion::new(0, source)];
            let how = MemoryOptions::new().compress(compress).min_gap_bytes(self.arguments.min_gap);
            if self.arguments.sync {
                let mut staged = options.stage(&root).unwrap();
                staged.writer().write_memory(&regions, &how).unwrap();
                staged.commit().unwrap();
            } else {
                options.create(&root).unwrap().write_memory(&regions, &how).unwrap();
            }
        })
    }

    /// The stand-in's restore, into a fresh mapping.
    fn stand_in_back(&self, guest: &Guest, compress: bool) -> f64 {
        let mut fresh = Guest::new(guest.bytes);
        let file = File::open(self.reference()).unwrap();
        let memory = fresh.slice();
        self.warm(guest.data_bytes);
        seconds(|| {
            if compress {
                let mut decoder = FrameDecoder::new(file);
                guest.ranges.iter().for_each(|(start, end)| decoder.read_exact(&mut memory[*start..*end]).unwrap());
            } else {
                let mut file = file;
                guest.ranges.iter().for_each(|(start, end)| file.read_exact(&mut memory[*start..*end]).unwrap());
            }
        })
    }

    fn restore(&self, guest: &mut Guest, encrypted: bool, into_file: bool) -> f64 {
        let mut fresh = Guest::new(guest.bytes);
        let options = self.options(encrypted);
        let spent = {
            let file = fresh.file.try_clone().unwrap();
            let memory = fresh.slice();
            self.warm(guest.data_bytes);
            seconds(|| {
                let stored = options.open(self.snapshot()).unwrap().memory().unwrap();
                let destination =
                    if into_file { GuestDestination::file(&file, None) } else { GuestDestination::buffer(memory) };
                stored.restore(&mut [destination]).unwrap();
            })
        };
        assert!(fresh.slice() == guest.slice(), "what was restored is not what was dumped");
        spent
    }

    fn row(name: &str, bytes: usize, pairs: &[(f64, f64)]) {
        let gib = bytes as f64 / f64::from(1 << 30);
        let ratio = median(pairs.iter().map(|(reference, own)| reference / own).collect());
        let reference = gib / median(pairs.iter().map(|pair| pair.0).collect());
        let own = gib / median(pairs.iter().map(|pair| pair.1).collect());
        let all: Vec<_> = pairs.iter().map(|(reference, own)| format!("{:.2}", reference / own)).collect();
        println!("{name:<44} {ratio:>6.2} {own:>7.2} GiB/s, reference {reference:>6.2} GiB/s   [{}]", all.join(" "));
    }

    fn pairs(&self, name: &str, bytes: usize, mut pair: impl FnMut() -> (f64, f64)) {
        let name = format!("{}: {name}", self.title);
        if name.contains(&self.arguments.only) {
            let pairs: Vec<_> = (0..=self.arguments.pairs).map(|_| pair()).skip(1).collect();
            Self::row(&name, bytes, &pairs);
        }
    }

    fn all(&self, guest: &mut Guest) {
        let bytes = guest.data_bytes;
        println!("{}: {} ranges, {} MiB of data", self.title, guest.ranges.len(), bytes >> 20);
        for (name, encrypted) in [("dump", false), ("dump, encrypted", true)] {
            self.pairs(&format!("{name}, to write(2)"), bytes, || {
                (self.write_data(guest), self.dump(guest, encrypted, false))
            });
            if self.arguments.sync {
                continue;
            }
            self.pairs(&format!("{name}, to stand-in"), bytes, || {
                (self.stand_in(guest, false), self.dump(guest, encrypted, false))
            });
            let name = name.replace("dump", "dump lz4");
            self.pairs(&format!("{name}, to stand-in"), bytes, || {
                (self.stand_in(guest, true), self.dump(guest, encrypted, true))
            });
        }
        if self.arguments.sync {
            return;
        }
        self.others(guest);
        self.zeros(guest);
        for (compress, encrypted) in [(false, false), (false, true), (true, false), (true, true)] {
            for into_file in [false, true] {
                let words = [("lz4", compress), ("encrypted", encrypted), ("memfd", into_file)];
                let words: Vec<_> = words.into_iter().filter_map(|(word, said)| said.then_some(word)).collect();
                let name = format!("restore {}", words.join(" "));
                if format!("{}: {name}", self.title).contains(&self.arguments.only) {
                    self.stand_in(guest, compress);
                    self.dump(guest, encrypted, compress);
                }
                self.pairs(&name, bytes, || {
                    (self.stand_in_back(guest, compress), self.restore(guest, encrypted, into_file))
                });
            }
        }
        for (compress, encrypted) in [(false, false), (false, true), (true, false), (true, true)] {
            self.random(guest, encrypted, compress);
        }
    }

    /// 4 KiB at a random address.
    fn random(&self, guest: &mut Guest, encrypted: bool, compress: bool) {
        let name = format!("{}: random read lz4={compress} encrypted={encrypted}", self.title);
        if !name.contains(&self.arguments.only) {
            return;
        }
        self.dump(guest, encrypted, compress);
        let memory = self.options(encrypted).open(self.snapshot()).unwrap().memory().unwrap();
        let mut numbers = Numbers(7);
        let mut page = [0; PAGE];
        let mut times = Vec::new();
        for _ in 0..4000 {
            // Where there is data: a hole costs nothing.
            let (start, end) = guest.ranges[numbers.next() as usize % guest.ranges.len()];
            let at = start + numbers.next() as usize % ((end - start) / PAGE) * PAGE;
            times.push(seconds(|| memory.read_at(at as u64, &mut page).unwrap()) * 1e6);
            assert!(page == guest.slice()[at..at + PAGE]);
        }
        println!(
            "{name:<60} median {:.1} us, mean {:.1} us",
            median(times.clone()),
            times.iter().sum::<f64>() / 4000.0
        );
    }

    /// Ways of telling pages of zeros, on the guest's data; and what looking for them costs a dump, or saves it.
    fn zeros(&self, guest: &mut Guest) {
        type Way = fn(&[u8]) -> bool;
        let ways: [(&str, Way); 4] = [
            ("byte by byte", |page| page.iter().all(|byte| *byte == 0)),
            ("memcmp", |page| page == [0; PAGE]),
            ("words of 64 bits", |page| page.as_chunks().0.iter().all(|word| u64::from_ne_bytes(*word) == 0)),
            ("256 bytes OR-ed, vmsnap's", |page| {
                page.as_chunks::<256>().0.iter().all(|step| step.iter().fold(0, |bits, byte| bits | byte) == 0)
            }),
        ];
        let ranges = guest.ranges.clone();
        for (name, way) in ways {
            let name = format!("{}: pages of zeros, {name}", self.title);
            if name.contains(&self.arguments.only) {
                let gib = guest.data_bytes as f64 / f64::from(1 << 30);
                let memory = &*guest.slice();
                let times = (0..=self.arguments.pairs).map(|_| {
                    let mut zero = 0;
                    let spent = seconds(|| {
                        for (start, end) in &ranges {
                            zero += memory[*start..*end]
                                .chunks(PAGE)
                                .filter(|page| way(std::hint::black_box(page)))
                                .count();
                        }
                    });
                    assert!(zero > 0);
                    spent
                });
                println!("{name:<60} {:.1} GiB/s", gib / median(times.collect()));
            }
        }
        for detect in [false, true] {
            let name = if detect { "dump, zeros looked for, to stand-in" } else { "dump, zeros stored, to stand-in" };
            self.pairs(name, guest.data_bytes, || (self.stand_in(guest, false), self.dump_with(guest, detect)));
        }
    }

    fn dump_with(&self, guest: &Guest, detect_zeros: bool) -> f64 {
        let root = self.snapshot();
        let _ = std::fs::remove_dir_all(&root);
        let writer = self.options(false).create(&root).unwrap();
        let how = MemoryOptions::new().detect_zeros(detect_zeros);
        self.warm(guest.data_bytes);
        seconds(|| {
            let source = FileMemory::new(&guest.file, 0, None).unwrap();
            writer.write_memory(&[GuestRegion::new(0, source)], &how).unwrap();
        })
    }

    /// What else there is: `cp --sparse=always`, and `tar --sparse | lz4 | age`.
    fn others(&self, guest: &mut Guest) {
        let source = format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(&guest.file));
        let target = self.reference();
        let shell = |text: &str| {
            let done = Command::new("sh").arg("-c").arg(text).stderr(Stdio::null()).status().unwrap();
            assert!(done.success(), "{text}");
        };
        self.pairs("dump encrypted, to cp --sparse=always", guest.data_bytes, || {
            let _ = std::fs::remove_file(&target);
            let copy = format!("cp --sparse=always {source} {}", target.display());
            self.warm(guest.data_bytes);
            (seconds(|| shell(&copy)), self.dump(guest, true, false))
        });
        let have = |program: &str| Command::new(program).arg("--version").stdout(Stdio::null()).status().is_ok();
        if !have("age") || !have("lz4") || !have("tar") {
            println!("{}: no tar, lz4 and age here to compare with", self.title);
            return;
        }
        // tar takes files, not descriptors: a file in memory that is as sparse.
        let image = self.folder.join("image");
        let file = File::create(&image).unwrap();
        file.set_len(guest.bytes as u64).unwrap();
        for (start, end) in guest.ranges.clone() {
            file.write_all_at(&guest.slice()[start..end], start as u64).unwrap();
        }
        let identity = self.folder.join("identity");
        let _ = std::fs::remove_file(&identity);
        shell(&format!("age-keygen -o {}", identity.display()));
        let pipe = format!(
            "tar -C {0} --sparse -cf - image | lz4 -1 -c | age -e -i {1} > {2}",
            self.folder.display(),
            identity.display(),
            target.display()
        );
        for (name, compress) in [("dump encrypted", false), ("dump lz4 encrypted", true)] {
            self.pairs(&format!("{name}, to tar | lz4 | age"), guest.data_bytes, || {
                let _ = std::fs::remove_file(&target);
                self.warm(guest.data_bytes);
                (seconds(|| shell(&pipe)), self.dump(guest, true, compress))
            });
        }
        std::fs::remove_file(&image).unwrap();
    }
}

fn main() {
    let arguments = arguments();
    let folder = tempfile::Builder::new().prefix("vmsnap-bench-").tempdir_in(&arguments.folder).unwrap();
    println!(
        "{} MiB of guest memory into {}, {} threads, {} pairs, aead {}",
        arguments.bytes >> 20,
        arguments.folder.display(),
        arguments.threads,
        arguments.pairs,
        vmsnap::aead_provider().unwrap()
    );
    let (bytes, only) = (arguments.bytes, arguments.only.clone());
    let key = SecretKey::generate().unwrap();
    let mut bench = Bench { arguments, folder: folder.path().to_owned(), key, title: String::new() };
    for (title, run) in [("runs", 64), ("pages", 1)] {
        title.clone_into(&mut bench.title);
        if only.is_empty() || only.starts_with(title) || !(only.starts_with("runs") || only.starts_with("pages")) {
            bench.all(&mut Guest::made(bytes, run));
        }
    }
    if let Some(image) = std::env::var_os("VMSNAP_BENCH_RAM") {
        "image".clone_into(&mut bench.title);
        bench.all(&mut Guest::of(Path::new(&image)));
    }
}
