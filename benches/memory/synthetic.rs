//! Measures guests of random and text-like pages, in long runs and page by page, with tests for zeros and with other
//! tools.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

use vmsnap::MemoryOptions;

use crate::bench::{Bench, ENCRYPTED, FORMS, LZ4_ENCRYPTED, PLAIN, Place, Source, median, seconds};
use crate::crosvm;
use crate::guest::{Guest, PAGE, mixed};
use crate::reference::write_data;

pub(crate) fn run(bench: &mut Bench) {
    let only = bench.arguments.only.clone();
    for (title, run) in [("runs", 64), ("pages", 1)] {
        title.clone_into(&mut bench.title);
        if only.is_empty() || only.starts_with(title) || !(only.starts_with("runs") || only.starts_with("pages")) {
            all(bench, &mixed(bench.arguments.bytes, run));
        }
    }
}

fn all(bench: &mut Bench, guest: &Guest) {
    println!("{}: {} ranges, {} MiB of data", bench.title, guest.ranges.len(), guest.data_bytes >> 20);
    let sync = bench.arguments.sync;
    for form in [PLAIN, ENCRYPTED] {
        bench.dump_row(guest, (form, Source::Memfd), "write(2)", None, |bench| {
            write_data(guest, &bench.reference(), sync);
        });
    }
    if sync {
        return;
    }
    for form in FORMS {
        bench.dump_row(guest, (form, Source::Memfd), "crosvm", None, |bench| {
            crosvm::dump(guest, &bench.reference(), form.compress);
        });
    }
    others(bench, guest);
    zeros(bench, guest);
    for form in FORMS {
        for place in [Place::Memfd, Place::Shared] {
            let prepare = |bench: &Bench| crosvm::dump(guest, &bench.reference(), form.compress);
            bench.restore_row(guest, (form, place), "crosvm", None, prepare, |bench| {
                let mut fresh = Guest::fresh(guest.bytes);
                bench.reference_restore(guest, || {
                    crosvm::restore(guest, &bench.reference(), form.compress, &mut fresh);
                })
            });
        }
    }
    FORMS.into_iter().for_each(|form| bench.random_row(guest, form, None));
}

/// Measures several tests for zeros on the data of the guest, and dumps with and without a test.
fn zeros(bench: &mut Bench, guest: &Guest) {
    type Way = fn(&[u8]) -> bool;
    let ways: [(&str, Way); 4] = [
        ("byte by byte", |page| page.iter().all(|byte| *byte == 0)),
        ("memcmp", |page| page == [0; PAGE]),
        ("words of 64 bits", |page| page.as_chunks().0.iter().all(|word| u64::from_ne_bytes(*word) == 0)),
        ("256 bytes OR-ed, vmsnap's", |page| {
            page.as_chunks::<256>().0.iter().all(|step| step.iter().fold(0, |bits, byte| bits | byte) == 0)
        }),
    ];
    for (name, way) in ways {
        let name = format!("pages of zeros, {name}");
        if bench.wants(&name) {
            let gib = guest.data_bytes as f64 / f64::from(1 << 30);
            let times = (0..=bench.arguments.pairs).map(|_| {
                let mut zero = 0;
                let spent = seconds(|| zero = guest.data(PAGE).filter(|page| way(std::hint::black_box(page))).count());
                assert!(zero > 0);
                spent
            });
            println!("{:<64} {:.1} GiB/s", format!("{}: {name}", bench.title), gib / median(times.collect()));
        }
    }
    for detect in [false, true] {
        let name = if detect { "dump, zeros looked for, to crosvm" } else { "dump, zeros stored, to crosvm" };
        let how = MemoryOptions::new().detect_zeros(detect);
        bench.row(
            name,
            None,
            guest.data_bytes,
            |bench| bench.reference_dump(guest, || crosvm::dump(guest, &bench.reference(), false)),
            |bench, threads| bench.dump_as(guest, &how, PLAIN, Source::Memfd, threads),
        );
    }
}

/// Compares with other tools: `cp --sparse=always`, and `tar --sparse | lz4 | age`.
fn others(bench: &mut Bench, guest: &Guest) {
    let source = format!("/proc/{}/fd/{}", std::process::id(), guest.file.as_raw_fd());
    let copy = format!("cp --sparse=always {source} {}", bench.reference().display());
    bench.dump_row(guest, (ENCRYPTED, Source::Memfd), "cp --sparse=always", None, |_| shell(&copy));
    let have = |program: &str| Command::new(program).arg("--version").stdout(Stdio::null()).status().is_ok();
    if !have("age") || !have("lz4") || !have("tar") {
        println!("{}: no comparison with tar, lz4 and age: they are not installed", bench.title);
        return;
    }
    // tar reads files, not descriptors, so this is a file in memory with the same holes.
    let (image, identity) = (bench.directory.join("image"), bench.directory.join("identity"));
    let file = File::create(&image).unwrap();
    file.set_len(guest.bytes as u64).unwrap();
    for (start, end) in &guest.ranges {
        file.write_all_at(&guest.memory()[*start..*end], *start as u64).unwrap();
    }
    let _ = std::fs::remove_file(&identity);
    shell(&format!("age-keygen -o {}", identity.display()));
    let pipe = format!(
        "tar -C {0} --sparse -cf - image | lz4 -1 -c | age -e -i {1} > {2}",
        bench.directory.display(),
        identity.display(),
        bench.reference().display()
    );
    for form in [ENCRYPTED, LZ4_ENCRYPTED] {
        bench.dump_row(guest, (form, Source::Memfd), "tar | lz4 | age", None, |_| shell(&pipe));
    }
    std::fs::remove_file(&image).unwrap();
}

fn shell(text: &str) {
    let done = Command::new("sh").arg("-c").arg(text).stderr(Stdio::null()).status().unwrap();
    assert!(done.success(), "{text}");
}
