//! Measures writes and reads of fragments, as ratios to `write(2)` and `read(2)` of the same bytes in the same run.
//!
//! Reference and vmsnap alternate in pairs. The first pair is a warm-up and is not counted; a figure is the median of
//! the ratios of the other pairs. `benches/compare.py` runs this together with the Python side and prints one table.
//!
//! Arguments: `[--directory DIR] [--mib N] [--pairs N] [--threads N] [--only TEXT] [--json]`

#![allow(clippy::unwrap_used, clippy::cast_precision_loss, reason = "a benchmark stops at the first failure")]

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use vmsnap::{SecretKey, SnapshotOptions};

const REFERENCE_CALL_BYTES: usize = 1 << 20;

struct Arguments {
    directory: PathBuf,
    bytes: usize,
    pairs: usize,
    threads: usize,
    only: String,
    json: bool,
}

fn arguments() -> Arguments {
    let mut parsed = Arguments {
        directory: "/dev/shm".into(),
        bytes: 1 << 30,
        pairs: 5,
        threads: 2,
        only: String::new(),
        json: false,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut number = || words.next().and_then(|text| text.parse::<usize>().ok()).expect("a number");
        match word.as_str() {
            "--mib" => parsed.bytes = number() << 20,
            "--pairs" => parsed.pairs = number(),
            "--threads" => parsed.threads = number(),
            "--only" => parsed.only = words.next().expect("a part of the name of a row"),
            "--json" => parsed.json = true,
            "--directory" => parsed.directory = words.next().expect("a directory").into(),
            _ => {} // cargo bench adds its own arguments
        }
    }
    parsed
}

struct Bench {
    arguments: Arguments,
    directory: PathBuf,
    options: SnapshotOptions,
    data: Vec<u8>,
    back: Vec<u8>,
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

impl Bench {
    fn file(&self) -> PathBuf {
        self.directory.join("reference")
    }

    fn reference_write(&self) -> f64 {
        let path = self.file();
        let _ = std::fs::remove_file(&path);
        let spent = seconds(|| {
            let mut file = File::create(&path).unwrap();
            for call in self.data.chunks(REFERENCE_CALL_BYTES) {
                file.write_all(call).unwrap();
            }
        });
        std::fs::remove_file(&path).unwrap();
        spent
    }

    fn reference_read(&mut self, path: &Path) -> f64 {
        let mut file = File::open(path).unwrap();
        let back = &mut self.back;
        seconds(|| {
            for call in back.chunks_mut(REFERENCE_CALL_BYTES) {
                file.read_exact(call).unwrap();
            }
        })
    }

    fn snapshot(&self) -> PathBuf {
        self.directory.join("snapshot")
    }

    fn options(&self, encrypted: bool) -> SnapshotOptions {
        if encrypted { self.options.clone() } else { SnapshotOptions::new().threads(self.arguments.threads) }
    }

    fn write(&self, encrypted: bool, chunk: usize, call: usize) -> f64 {
        let root = self.snapshot();
        let _ = std::fs::remove_dir_all(&root);
        let writer = self.options(encrypted).create_in_place(&root).unwrap();
        seconds(|| {
            let mut fragment = writer.raw_fragment_with_chunk_size("mem", chunk).unwrap();
            for call in self.data.chunks(call) {
                fragment.write_all(call).unwrap();
            }
            fragment.finish().unwrap();
        })
    }

    fn row(&self, name: &str, pairs: &[(f64, f64)]) {
        let gib = self.arguments.bytes as f64 / f64::from(1 << 30);
        let ratio = median(pairs.iter().map(|(reference, own)| reference / own).collect());
        let reference = gib / median(pairs.iter().map(|pair| pair.0).collect());
        let own = gib / median(pairs.iter().map(|pair| pair.1).collect());
        if self.arguments.json {
            println!(
                "{{\"name\": \"{name}\", \"ratio\": {ratio:.4}, \"gib_s\": {own:.4}, \"reference_gib_s\": {reference:.4}}}"
            );
        } else {
            let all: Vec<_> = pairs.iter().map(|(reference, own)| format!("{:.2}", reference / own)).collect();
            println!(
                "{name:<44} {ratio:>6.2} {own:>7.2} GiB/s, reference {reference:>6.2} GiB/s   [{}]",
                all.join(" ")
            );
        }
    }

    fn writes(&self, name: &str, encrypted: bool, chunk: usize, call: usize) {
        if !name.contains(&self.arguments.only) {
            return;
        }
        let mut pairs = Vec::new();
        for _ in 0..=self.arguments.pairs {
            pairs.push((self.reference_write(), self.write(encrypted, chunk, call)));
            // Removed like the file of the reference, so that both get the same pages, which are no longer fresh.
            std::fs::remove_dir_all(self.snapshot()).unwrap();
        }
        pairs.remove(0);
        self.row(name, &pairs);
    }

    fn reads(&mut self, name: &str, encrypted: bool, chunk: usize) {
        if !name.contains(&self.arguments.only) {
            return;
        }
        self.write(encrypted, chunk, self.data.len());
        let plain = self.file();
        std::fs::write(&plain, &self.data).unwrap();
        let reader = self.options(encrypted).open(self.snapshot()).unwrap().raw_fragment("mem").unwrap();
        let mut pairs = Vec::new();
        for _ in 0..=self.arguments.pairs {
            let reference = self.reference_read(&plain);
            let back = &mut self.back;
            pairs.push((reference, seconds(|| assert_eq!(reader.read_at(0, back).unwrap(), back.len()))));
        }
        pairs.remove(0);
        assert!(self.back == self.data, "read back other bytes");
        self.row(name, &pairs);
        std::fs::remove_file(plain).unwrap();
    }

    /// Prints the time of a 4 KiB read at a random page, in microseconds.
    fn random(&mut self, name: &str, bytes: usize, encrypted: bool) {
        if !name.contains(&self.arguments.only) {
            return;
        }
        let all = std::mem::take(&mut self.data);
        self.data = all[..bytes].to_vec();
        self.write(encrypted, 4096, bytes);
        self.data = all;
        let reader = self.options(encrypted).open(self.snapshot()).unwrap().raw_fragment("mem").unwrap();
        let mut page = [0; 4096];
        let mut state = 1_u64;
        let mut figures = Vec::new();
        for _ in 0..=self.arguments.pairs {
            const READS: u32 = 20_000;
            let spent = seconds(|| {
                for _ in 0..READS {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let number = (state >> 33) % (bytes as u64 / 4096);
                    reader.read_at(number * 4096, &mut page).unwrap();
                }
            });
            figures.push(spent / f64::from(READS) * 1e6);
        }
        figures.remove(0);
        let figure = median(figures);
        if self.arguments.json {
            println!("{{\"name\": \"{name}\", \"microseconds\": {figure:.3}}}");
        } else {
            println!("{name:<44} {figure:>6.2} µs");
        }
    }
}

fn main() {
    let arguments = arguments();
    let directory = arguments.directory.join(format!("vmsnap-bench-{}", std::process::id()));
    std::fs::create_dir(&directory).unwrap();
    let mut data = vec![0; arguments.bytes];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for word in data.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
    let options = SnapshotOptions::new().key(SecretKey::generate().unwrap()).threads(arguments.threads);
    let back = vec![1; data.len()];
    let mut bench = Bench { arguments, directory, options, data, back };

    let whole = bench.data.len();
    let chunks = [(4 << 10, "4 KiB"), (64 << 10, "64 KiB"), (1 << 20, "1 MiB")];
    bench.writes("write plain, one call", false, 4096, whole);
    bench.writes("write plain, 1 MiB a call", false, 4096, 1 << 20);
    bench.writes("write plain, 64 KiB a call", false, 4096, 64 << 10);
    for (chunk, chunk_name) in chunks {
        for (call, call_name) in [(whole, "one call"), (1 << 20, "1 MiB a call"), (64 << 10, "64 KiB a call")] {
            bench.writes(&format!("write encrypted, {chunk_name} chunks, {call_name}"), true, chunk, call);
        }
    }
    bench.reads("read plain", false, 4096);
    for (chunk, name) in chunks {
        bench.reads(&format!("read encrypted, {name} chunks"), true, chunk);
    }
    bench.random("random 4 KiB in 1 MiB, plain", 1 << 20, false);
    bench.random("random 4 KiB in 1 MiB, encrypted", 1 << 20, true);
    bench.random(&format!("random 4 KiB in {} MiB, encrypted", whole >> 20), whole, true);
    std::fs::remove_dir_all(&bench.directory).unwrap();
}
