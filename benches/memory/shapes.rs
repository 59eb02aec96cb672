//! Measures guests that are difficult in one way each. Their cost must grow only with their data.

use crate::bench::{Bench, FORMS, PLAIN, Place, Source, median};
use crate::crosvm;
use crate::guest::{Guest, PAGE, full};
use crate::reference::write_data;

/// Single pages of data, each followed by a hole.
const SCATTERED: usize = 195_000;

pub(crate) fn run(bench: &mut Bench) {
    halves(bench);
    one_page(bench);
    "scattered".clone_into(&mut bench.title);
    compared(bench, || Guest::filled(2 * SCATTERED * PAGE, |memory| touch(memory, 2)));
    "full".clone_into(&mut bench.title);
    compared(bench, || full(1 << 30));
}

/// Writes to each `step`th page.
fn touch(memory: &mut [u8], step: usize) {
    for (number, page) in memory.chunks_mut(PAGE).step_by(step).enumerate() {
        page[..8].copy_from_slice(&(number as u64 + 1).to_le_bytes());
    }
}

/// Measures guests of which one half is a hole, and the other half was written page by page.
fn halves(bench: &mut Bench) {
    "halves".clone_into(&mut bench.title);
    let mut first = None;
    for gib in [1, 2, 4, 8] {
        let name = format!("{gib} GiB");
        // Memory for the guest, and for the dump or its warm-up.
        if !bench.wants(&name) || !there_are(bench, &name, gib << 30) {
            continue;
        }
        let guest = Guest::filled(gib << 30, |memory| touch(&mut memory[gib << 29..], 1));
        let mut times = Vec::new();
        bench.row(
            &format!("{name}: dump plain from a memfd, to write(2)"),
            None,
            guest.data_bytes,
            |bench| bench.reference_dump(&guest, || write_data(&guest, &bench.reference(), false)),
            |bench, threads| {
                let spent = bench.dump(&guest, PLAIN, Source::Memfd, threads);
                if threads == bench.arguments.threads {
                    times.push(spent);
                }
                spent
            },
        );
        if times.is_empty() {
            continue;
        }
        let a_gib = median(times.split_off(1)) * 1e3 / gib as f64;
        let of_first = a_gib / *first.get_or_insert(a_gib);
        println!("{:<64} {a_gib:.0} ms a GiB, {of_first:.2} of the first", format!("halves: {name}"));
        clear(bench);
    }
}

fn one_page(bench: &mut Bench) {
    "one page in 16 TiB".clone_into(&mut bench.title);
    if !bench.wants("dump") {
        return;
    }
    // Not mapped, because a process cannot have so many addresses.
    let file = tempfile::tempfile_in(&bench.directory).unwrap();
    file.set_len(16 << 40).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[7; PAGE], 9 << 40).unwrap();
    let guest = Guest { file, ..Guest::fresh(PAGE) };
    for form in FORMS {
        let times =
            (0..=bench.arguments.pairs).map(|_| bench.dump(&guest, form, Source::Memfd, bench.arguments.threads));
        let name = format!("{}: dump {} from a file", bench.title, form.name());
        println!("{name:<64} {:.1} ms", median(times.skip(1).collect()) * 1e3);
    }
    let stored = bench.stored(FORMS[3], 1);
    assert_eq!((stored.data_bytes(), stored.regions()[0].end), (PAGE as u64, 16 << 40));
}

/// Measures all forms against crosvm.
fn compared(bench: &mut Bench, make: impl FnOnce() -> Guest) {
    let guest = make();
    println!("{}: {} ranges, {} MiB of data", bench.title, guest.ranges.len(), guest.data_bytes >> 20);
    for form in FORMS {
        bench.dump_row(&guest, (form, Source::Memfd), "crosvm", None, |bench| {
            crosvm::dump(&guest, &bench.reference(), form.compress);
        });
    }
    for form in FORMS {
        for place in [Place::Memfd, Place::Shared] {
            let prepare = |bench: &Bench| crosvm::dump(&guest, &bench.reference(), form.compress);
            bench.restore_row(&guest, (form, place), "crosvm", None, prepare, |bench| {
                let mut fresh = Guest::fresh(guest.bytes);
                bench.reference_restore(&guest, || {
                    crosvm::restore(&guest, &bench.reference(), form.compress, &mut fresh);
                })
            });
        }
        bench.random_row(&guest, form, None);
    }
    clear(bench);
}

/// Removes the files of the last row.
fn clear(bench: &Bench) {
    let _ = std::fs::remove_file(bench.reference());
    let _ = std::fs::remove_dir_all(bench.snapshot());
}

/// Whether so many bytes of memory are available, and half as many more.
fn there_are(bench: &Bench, name: &str, bytes: usize) -> bool {
    let told = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = told.lines().find_map(|line| line.strip_prefix("MemAvailable:")).unwrap();
    let available = line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10;
    let enough = available > bytes + bytes / 2;
    if !enough {
        println!("{}: {name}: skipped: {} MiB of memory are available", bench.title, available >> 20);
    }
    enough
}
