//! [`Bench`]: measures pairs, prints medians and checks goals; it also dumps and restores with vmsnap.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use vmsnap::{FileMemory, GuestDestination, GuestMemory, GuestRegion, MemoryOptions, SecretKey, SnapshotOptions};

use crate::guest::{Guest, Mapping, Numbers, PAGE, ranges};

pub(crate) struct Arguments {
    pub(crate) directory: PathBuf,
    pub(crate) bytes: usize,
    pub(crate) pairs: usize,
    pub(crate) threads: usize,
    pub(crate) only: String,
    pub(crate) min_gap: u64,
    pub(crate) sync: bool,
}

/// The form in which memory is stored.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Form {
    pub(crate) compress: bool,
    pub(crate) encrypted: bool,
}

pub(crate) const PLAIN: Form = Form { compress: false, encrypted: false };
pub(crate) const ENCRYPTED: Form = Form { compress: false, encrypted: true };
pub(crate) const LZ4: Form = Form { compress: true, encrypted: false };
pub(crate) const LZ4_ENCRYPTED: Form = Form { compress: true, encrypted: true };
pub(crate) const FORMS: [Form; 4] = [PLAIN, ENCRYPTED, LZ4, LZ4_ENCRYPTED];

impl Form {
    pub(crate) fn name(self) -> &'static str {
        match (self.compress, self.encrypted) {
            (false, false) => "plain",
            (false, true) => "encrypted",
            (true, false) => "lz4",
            (true, true) => "lz4 encrypted",
        }
    }
}

/// The source of a dump.
#[derive(Clone, Copy)]
pub(crate) enum Source {
    Memfd,
    /// The populated mapping, with a region for each data range that the memfd reports, as in crosvm.
    Buffer,
}

impl Source {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Memfd => "from a memfd",
            Self::Buffer => "from a buffer",
        }
    }
}

/// The destination of a restore. All destinations are fresh: no page was used before.
#[derive(Clone, Copy)]
pub(crate) enum Place {
    Memfd,
    /// The mapping of a memfd.
    Shared,
    /// An anonymous mapping.
    Private,
}

impl Place {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Memfd => "into a memfd",
            Self::Shared => "into a shared mapping",
            Self::Private => "into a private mapping",
        }
    }
}

pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

pub(crate) fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

pub(crate) struct Bench {
    pub(crate) arguments: Arguments,
    pub(crate) directory: PathBuf,
    pub(crate) title: String,
    key: SecretKey,
    goals: usize,
    missed: Vec<String>,
}

impl Bench {
    pub(crate) fn new(arguments: Arguments, directory: PathBuf, key: SecretKey) -> Self {
        Self { arguments, directory, title: String::new(), key, goals: 0, missed: Vec::new() }
    }

    pub(crate) fn reference(&self) -> PathBuf {
        self.directory.join("reference")
    }

    pub(crate) fn snapshot(&self) -> PathBuf {
        self.directory.join("snapshot")
    }

    /// Whether the row was requested.
    pub(crate) fn wants(&self, name: &str) -> bool {
        format!("{}: {name}", self.title).contains(&self.arguments.only)
    }

    /// Uses and frees `bytes` of memory. Memory that is free for some seconds may return to the host, and is then
    /// several times as slow at its next use.
    fn warm(&self, bytes: usize) {
        let path = self.directory.join("warm");
        let mut file = File::create(&path).unwrap();
        let batch = vec![1; 1 << 20];
        (0..bytes >> 20).for_each(|_| file.write_all(&batch).unwrap());
        std::fs::remove_file(&path).unwrap();
    }

    /// Measures `work`, which writes the file of the reference again.
    pub(crate) fn reference_dump(&self, guest: &Guest, work: impl FnOnce()) -> f64 {
        let _ = std::fs::remove_file(self.reference());
        self.warm(guest.data_bytes);
        seconds(work)
    }

    /// Measures `work`, which fills fresh memory.
    pub(crate) fn reference_restore(&self, guest: &Guest, work: impl FnOnce()) -> f64 {
        self.warm(guest.data_bytes);
        seconds(work)
    }

    pub(crate) fn options(&self, form: Form, threads: usize) -> SnapshotOptions {
        let options = SnapshotOptions::new().threads(threads);
        if form.encrypted { options.key(self.key.clone()) } else { options }
    }

    pub(crate) fn stored(&self, form: Form, threads: usize) -> GuestMemory {
        self.options(form, threads).open(self.snapshot()).unwrap().memory().unwrap()
    }

    pub(crate) fn dump(&self, guest: &Guest, form: Form, source: Source, threads: usize) -> f64 {
        let how = MemoryOptions::new().compress(form.compress).min_gap_bytes(self.arguments.min_gap);
        self.dump_as(guest, &how, form, source, threads)
    }

    pub(crate) fn dump_as(
        &self,
        guest: &Guest,
        how: &MemoryOptions,
        form: Form,
        source: Source,
        threads: usize,
    ) -> f64 {
        let root = self.snapshot();
        let _ = std::fs::remove_dir_all(&root);
        let options = self.options(form, threads);
        self.warm(guest.data_bytes);
        seconds(|| {
            let regions: Vec<_> = match source {
                Source::Memfd => vec![GuestRegion::new(0, FileMemory::new(&guest.file, 0, None).unwrap())],
                Source::Buffer => ranges(&guest.file, guest.bytes)
                    .into_iter()
                    .map(|(start, end)| GuestRegion::new(start as u64, &guest.memory()[start..end]))
                    .collect(),
            };
            if self.arguments.sync {
                let mut staged = options.create(&root).unwrap();
                staged.writer().write_memory(&regions, how).unwrap();
                staged.commit().unwrap();
            } else {
                options.create_in_place(&root).unwrap().write_memory(&regions, how).unwrap();
            }
        })
    }

    /// Stops if the data in the snapshot differs from the guest.
    fn check(&self, guest: &Guest, form: Form) {
        let memory = self.stored(form, self.arguments.threads);
        let mut batch = vec![0; 4 << 20];
        for (start, end) in &guest.ranges {
            for at in (*start..*end).step_by(batch.len()) {
                let batch = &mut batch[..(4 << 20).min(end - at)];
                memory.read_at(at as u64, batch).unwrap();
                assert!(*batch == guest.memory()[at..at + batch.len()], "the dump differs from the guest");
            }
        }
    }

    pub(crate) fn restore(&self, guest: &Guest, form: Form, place: Place, threads: usize) -> f64 {
        let options = self.options(form, threads);
        let mut fresh = Guest::fresh(guest.bytes);
        let mut private = Mapping::private(guest.bytes);
        self.warm(guest.data_bytes);
        let spent = seconds(|| {
            let stored = options.open(self.snapshot()).unwrap().memory().unwrap();
            let destination = match place {
                Place::Memfd => GuestDestination::file(&fresh.file, None),
                Place::Shared => GuestDestination::buffer(fresh.mapping.slice_mut()),
                Place::Private => GuestDestination::buffer(private.slice_mut()),
            };
            stored.restore(&mut [destination]).unwrap();
        });
        // In a very scattered guest, short holes are stored as data.
        let are_holes_kept = self.stored(form, 1).data_bytes() <= guest.data_bytes as u64;
        assert!(!are_holes_kept || guest.covers(&fresh.file), "a hole was filled");
        let memory = if matches!(place, Place::Private) { private.slice() } else { fresh.memory() };
        assert!(guest.is_data(memory), "the restored memory differs from the guest");
        spent
    }

    /// Measures rounds of the reference, of vmsnap with all threads, and of vmsnap with one, and prints a line. `goal`
    /// is the ratio to reach.
    pub(crate) fn row(
        &mut self,
        name: &str,
        goal: Option<f64>,
        bytes: usize,
        mut reference: impl FnMut(&Self) -> f64,
        mut own: impl FnMut(&Self, usize) -> f64,
    ) {
        if !self.wants(name) {
            return;
        }
        let threads = self.arguments.threads;
        let mut rounds = Vec::new();
        for _ in 0..=self.arguments.pairs {
            let alone = |bench: &Self, own: &mut dyn FnMut(&Self, usize) -> f64| (threads > 1).then(|| own(bench, 1));
            rounds.push((reference(self), own(self, threads), alone(self, &mut own)));
        }
        rounds.remove(0);
        let gib = bytes as f64 / f64::from(1 << 30);
        let ratio = median(rounds.iter().map(|round| round.0 / round.1).collect());
        let alone: Vec<_> = rounds.iter().filter_map(|round| round.2.map(|alone| round.0 / alone)).collect();
        let alone = if alone.is_empty() { String::new() } else { format!("{:.2}", median(alone)) };
        let theirs = median(rounds.iter().map(|round| round.0).collect());
        let ours = median(rounds.iter().map(|round| round.1).collect());
        let all: Vec<_> = rounds.iter().map(|round| format!("{:.2}", round.0 / round.1)).collect();
        let goal = goal.map(|goal| self.judge(name, ratio, goal, ratio >= goal)).unwrap_or_default();
        println!(
            "{:<64} {ratio:>6.2} {alone:>6} {goal:<16} {:>5.0} ms {:>5.2} GiB/s, reference {:>5.0} ms   [{}]",
            format!("{}: {name}", self.title),
            ours * 1e3,
            gib / ours,
            theirs * 1e3,
            all.join(" ")
        );
    }

    /// Counts a goal, and returns the text for its line.
    fn judge(&mut self, name: &str, figure: f64, goal: f64, met: bool) -> String {
        self.goals += 1;
        if !met {
            self.missed.push(format!("{}: {name}: {figure:.2}, goal {goal}", self.title));
        }
        format!("goal {goal} {}", if met { "met" } else { "MISSED" })
    }

    /// Measures a row of dumps, and checks the last one.
    pub(crate) fn dump_row(
        &mut self,
        guest: &Guest,
        (form, source): (Form, Source),
        to: &str,
        goal: Option<f64>,
        reference: impl Fn(&Self),
    ) {
        let name = format!("dump {} {}, to {to}", form.name(), source.name());
        self.row(
            &name,
            goal,
            guest.data_bytes,
            |bench| bench.reference_dump(guest, || reference(bench)),
            |bench, threads| bench.dump(guest, form, source, threads),
        );
        if self.wants(&name) {
            self.check(guest, form);
        }
    }

    /// Measures a row of restores. `prepare` writes the file that `reference` reads.
    pub(crate) fn restore_row(
        &mut self,
        guest: &Guest,
        (form, place): (Form, Place),
        to: &str,
        goal: Option<f64>,
        prepare: impl FnOnce(&Self),
        reference: impl Fn(&Self) -> f64,
    ) {
        let name = format!("restore {} {}, to {to}", form.name(), place.name());
        if self.wants(&name) {
            prepare(self);
            self.dump(guest, form, Source::Memfd, self.arguments.threads);
        }
        self.row(&name, goal, guest.data_bytes, reference, |bench, threads| bench.restore(guest, form, place, threads));
    }

    /// Measures reads of 4 KiB at random addresses, in microseconds. The goal is the maximum.
    pub(crate) fn random_row(&mut self, guest: &Guest, form: Form, goal: Option<f64>) {
        let name = format!("random read {}", form.name());
        if !self.wants(&name) {
            return;
        }
        self.dump(guest, form, Source::Memfd, self.arguments.threads);
        let memory = self.stored(form, self.arguments.threads);
        let mut numbers = Numbers(7);
        let mut page = [0; PAGE];
        let mut times = Vec::new();
        // Only pages with data, because a hole takes no time. Every page is equally likely.
        let pages: Vec<_> = guest.ranges.iter().flat_map(|(start, end)| (*start..*end).step_by(PAGE)).collect();
        for _ in 0..4000 {
            let at = pages[numbers.next() as usize % pages.len()];
            times.push(seconds(|| memory.read_at(at as u64, &mut page).unwrap()) * 1e6);
            assert!(page == guest.memory()[at..at + PAGE]);
        }
        let (middle, mean) = (median(times.clone()), times.iter().sum::<f64>() / 4000.0);
        let goal = goal.map(|goal| self.judge(&name, middle, goal, middle <= goal)).unwrap_or_default();
        let name = format!("{}: {name}", self.title);
        println!("{name:<64} median {middle:.1} us, mean {mean:.1} us   {goal}");
    }

    pub(crate) fn summary(&self) {
        if self.goals > 0 {
            println!("goals: {} of {} met", self.goals - self.missed.len(), self.goals);
            self.missed.iter().for_each(|missed| println!("  missed: {missed}"));
        }
    }
}
