//! Runs every parser of metadata under libFuzzer. `make fuzz` sets the required flags of rustc.

#![no_main]

use vmsnap::fuzzing::{Counting, parse_all};

#[global_allocator]
static COUNTING: Counting = Counting;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| parse_all(bytes));
