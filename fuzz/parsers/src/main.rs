//! libFuzzer on every parser of metadata: `make fuzz` sets the flags of rustc that it needs.

#![no_main]

use vmsnap::fuzzing::{Counting, parse_all};

#[global_allocator]
static COUNTING: Counting = Counting;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| parse_all(bytes));
