//! Guest memory dumped and restored, as ratios to how it is done elsewhere, in the same run.
//!
//! ```text
//! guest.rs      guest memory: a memfd and its mapping
//! bench.rs      pairs, medians, goals; vmsnap's dump and restore
//! reference.rs  write(2), read(2), the C library of LZ4
//! crosvm.rs     what crosvm does
//! real.rs       the memory of a real Linux guest
//! disk.rs       the same to a disk, past the page cache
//! shapes.rs     guests that are hard in one way each
//! synthetic.rs  guests of random and text-like pages; what else there is: cp, tar | lz4 | age
//! ```
//!
//! Every figure is the median of the ratios of interleaved pairs, after a round that is thrown away. A ratio of 2 is twice as fast
//! as the reference.
//!
//! Arguments: `[real] [disk] [shapes] [synthetic]`, all of them where none is named, and `[--folder DIR] [--mib N] [--pairs N] [--threads N]
//! [--only TEXT] [--min-gap BYTES] [--sync]`. `VMSNAP_BENCH_RAM` names a raw image of a guest's memory; without it, it is the one
//! that `make guest` makes.

#![allow(clippy::unwrap_used, clippy::cast_precision_loss, reason = "a benchmark stops where something fails")]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "numbers of its own")]
#![allow(clippy::needless_for_each, reason = "as short as it can be")]
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
        folder: "/dev/shm".into(),
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
            "--only" => parsed.only = words.next().expect("a part of a row's name"),
            "--folder" => parsed.folder = words.next().expect("a directory").into(),
            "--sync" => parsed.sync = true,
            "--bench" => {} // cargo bench adds it
            part if PARTS.contains(&part) => parts.push(word),
            _ => panic!("{word} is neither an option nor one of {PARTS:?}"),
        }
    }
    (parsed, parts)
}

/// The memory of a real guest: where the environment says, or where `make guest` puts it.
fn image() -> Option<PathBuf> {
    let named = std::env::var_os("VMSNAP_BENCH_RAM").map(PathBuf::from);
    named.or_else(|| {
        Some(Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guest/ram.img")).filter(|path| path.exists())
    })
}

fn main() {
    let (arguments, parts) = arguments();
    let folder = tempfile::Builder::new().prefix("vmsnap-bench-").tempdir_in(&arguments.folder).unwrap();
    println!(
        "into {}, {} threads, {} pairs, aead {}",
        arguments.folder.display(),
        arguments.threads,
        arguments.pairs,
        vmsnap::aead_provider().unwrap()
    );
    println!(
        "each line: the ratio, the ratio of one thread, the time and speed of all threads, the ratios of all pairs"
    );
    let mut bench = Bench::new(arguments, folder.path().to_owned(), SecretKey::generate().unwrap());
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
