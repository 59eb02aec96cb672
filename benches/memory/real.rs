//! Measures the memory of a real Linux guest, with goals.

use std::path::Path;

use crate::bench::{Bench, ENCRYPTED, FORMS, Form, LZ4, LZ4_ENCRYPTED, PLAIN, Place, Source};
use crate::crosvm;
use crate::guest::{Guest, Mapping};
use crate::reference::{read_data, write_data, write_lz4};

pub(crate) fn run(bench: &mut Bench, guest: &Guest, image: &Path) {
    "real".clone_into(&mut bench.title);
    println!(
        "real: {}, {} MiB of memory, {} ranges, {} MiB of data",
        image.display(),
        guest.bytes >> 20,
        guest.ranges.len(),
        guest.data_bytes >> 20
    );
    to_the_kernel(bench, guest);
    if bench.arguments.sync {
        return;
    }
    to_crosvm(bench, guest);
    for (form, goal) in [(PLAIN, Some(2.0)), (ENCRYPTED, Some(12.0)), (LZ4, None), (LZ4_ENCRYPTED, Some(30.0))] {
        bench.random_row(guest, form, goal);
    }
}

fn to_the_kernel(bench: &mut Bench, guest: &Guest) {
    let sync = bench.arguments.sync;
    for (form, goal) in [(PLAIN, 0.95), (ENCRYPTED, 0.9)] {
        bench.dump_row(guest, (form, Source::Memfd), "write(2)", Some(goal), |bench| {
            write_data(guest, &bench.reference(), sync);
        });
    }
    if sync {
        return;
    }
    bench.dump_row(guest, (LZ4_ENCRYPTED, Source::Memfd), "C LZ4", Some(1.8), |bench| {
        write_lz4(guest, &bench.reference());
    });
    for (form, goal) in [(PLAIN, 1.5), (ENCRYPTED, 1.3)] {
        for place in [Place::Memfd, Place::Shared, Place::Private] {
            let prepare = |bench: &Bench| write_data(guest, &bench.reference(), false);
            bench.restore_row(guest, (form, place), "read(2)", Some(goal), prepare, |bench| read(bench, guest, place));
        }
    }
}

/// Measures `read(2)` to fresh memory of the kind that vmsnap restores to.
fn read(bench: &Bench, guest: &Guest, place: Place) -> f64 {
    let mut memory = match place {
        Place::Memfd | Place::Shared => Guest::fresh(guest.bytes).mapping,
        Place::Private => Mapping::private(guest.bytes),
    };
    bench.reference_restore(guest, || read_data(guest, &bench.reference(), memory.slice_mut()))
}

fn to_crosvm(bench: &mut Bench, guest: &Guest) {
    let of_dumps = |form: Form, source: Source| match (form, source) {
        (PLAIN, Source::Buffer) => 1.2,
        (PLAIN, Source::Memfd) | (ENCRYPTED, Source::Buffer) => 1.0,
        (ENCRYPTED, Source::Memfd) => 0.9,
        _ => 2.1,
    };
    for form in FORMS {
        for source in [Source::Buffer, Source::Memfd] {
            bench.dump_row(guest, (form, source), "crosvm", Some(of_dumps(form, source)), |bench| {
                crosvm::dump(guest, &bench.reference(), form.compress);
            });
        }
    }
    for (form, goal) in [(PLAIN, 1.7), (ENCRYPTED, 1.5), (LZ4, 2.0), (LZ4_ENCRYPTED, 1.8)] {
        for place in [Place::Memfd, Place::Shared] {
            let prepare = |bench: &Bench| crosvm::dump(guest, &bench.reference(), form.compress);
            bench.restore_row(guest, (form, place), "crosvm", Some(goal), prepare, |bench| {
                let mut fresh = Guest::fresh(guest.bytes);
                let spent = bench.reference_restore(guest, || {
                    crosvm::restore(guest, &bench.reference(), form.compress, &mut fresh);
                });
                assert!(guest.is_data(fresh.memory()), "the reference is wrong");
                spent
            });
        }
    }
}
