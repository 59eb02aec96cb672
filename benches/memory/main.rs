//! Dumps and restores guest memory, and compares the times with those of other ways in the same run.
//!
//! ```text
//! guest.rs      guest memory: a memfd and its mapping
//! bench.rs      pairs, medians, goals; vmsnap's dump and restore
//! reference.rs  write(2), read(2), the C library of LZ4
//! crosvm.rs     dump and restore as in crosvm
//! real.rs       the memory of a real Linux guest
//! disk.rs       the same guest to a disk, past the page cache and through it
//! shapes.rs     guests that are difficult in one way each
//! synthetic.rs  guests of random and text-like pages; other tools: cp, tar | lz4 | age
//! ```
//!
//! Reference and vmsnap alternate. The first round is not counted, and a figure is the median of the ratios of the
//! other rounds. A ratio of 2 means twice as fast as the reference.
//!
//! Arguments: `[real] [disk] [shapes] [synthetic]`, by default all of them, and `[--directory DIR] [--mib N] [--pairs N]
//! [--threads N] [--only TEXT] [--min-gap BYTES] [--sync]`. `VMSNAP_BENCH_RAM` names a raw image of guest memory; by
//! default it is the one that `make guest` makes.

#![allow(clippy::unwrap_used, clippy::cast_precision_loss, reason = "a benchmark stops at the first failure")]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the numbers are known to fit")]
#![allow(clippy::needless_for_each, reason = "shorter than a loop")]
#![allow(unsafe_code, reason = "maps memory as a monitor does")]

mod bench;
mod crosvm;
mod disk;
mod guest;
mod real;
mod reference;
mod shapes;
mod synthetic;

use std::path::{Path, PathBuf};

use bench::{Arguments, Bench};
use guest::Guest;
use vmsnap::SecretKey;

const PARTS: [&str; 4] = ["real", "disk", "shapes", "synthetic"];

fn arguments() -> (Arguments, Vec<String>) {
    let mut parsed = Arguments {
        directory: "/dev/shm".into(),
        bytes: 1 << 30,
        pairs: 5,
        threads: 2,
        only: String::new(),
        min_gap: 4096,
        sync: false,
    };
    let mut parts = Vec::new();
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut number = || words.next().and_then(|text| text.parse::<usize>().ok()).expect("a number");
        match word.as_str() {
            "--mib" => parsed.bytes = number() << 20,
            "--pairs" => parsed.pairs = number(),
            "--threads" => parsed.threads = number(),
            "--min-gap" => parsed.min_gap = number() as u64,
            "--only" => parsed.only = words.next().expect("a part of the name of a row"),
            "--directory" => parsed.directory = words.next().expect("a directory").into(),
            "--sync" => parsed.sync = true,
            "--bench" => {} // cargo bench adds it
            part if PARTS.contains(&part) => parts.push(word),
            _ => panic!("{word} is neither an option nor one of {PARTS:?}"),
        }
    }
    (parsed, parts)
}

/// Returns the memory of a real guest: the image that the environment names, or the one that `make guest` makes.
fn image() -> Option<PathBuf> {
    let named = std::env::var_os("VMSNAP_BENCH_RAM").map(PathBuf::from);
    named.or_else(|| {
        Some(Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guest/ram.img")).filter(|path| path.exists())
    })
}

fn main() {
    let (arguments, parts) = arguments();
    let directory = tempfile::Builder::new().prefix("vmsnap-bench-").tempdir_in(&arguments.directory).unwrap();
    println!(
        "into {}, {} threads, {} pairs, aead {}",
        arguments.directory.display(),
        arguments.threads,
        arguments.pairs,
        vmsnap::aead_provider().unwrap()
    );
    println!(
        "each line: the ratio, the ratio of one thread, the time and speed of all threads, the ratios of all pairs"
    );
    let mut bench = Bench::new(arguments, directory.path().to_owned(), SecretKey::generate().unwrap());
    let wanted = |part: &str| parts.is_empty() || parts.iter().any(|named| named == part);
    if wanted("real") || wanted("disk") {
        match image() {
            Some(image) => {
                let guest = Guest::of(&image);
                if wanted("real") {
                    real::run(&mut bench, &guest, &image);
                }
                if wanted("disk") {
                    disk::run(&mut bench, &guest);
                }
            }
            None => {
                println!("skipped: no target/guest/ram.img, which `make guest` makes, and no VMSNAP_BENCH_RAM");
            }
        }
    }
    if wanted("shapes") {
        shapes::run(&mut bench);
    }
    if wanted("synthetic") {
        synthetic::run(&mut bench);
    }
    bench.summary();
}
