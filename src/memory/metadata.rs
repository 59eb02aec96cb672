//! The fragment `mem_metadata` in the format of crosvm, and the offsets in `mem` that follow from it.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;

use serde::de::{Deserializer, Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

use super::lz4;
use super::options::MemoryReport;
use crate::buffer;
use crate::error::{Error, Result};
#[cfg(any(test, fuzzing))]
use crate::serialization;
use crate::snapshot::SnapshotReader;

/// The names of the fragments and their fields come from crosvm.
pub(super) const MEMORY: &str = "mem";
pub(super) const METADATA: &str = "mem_metadata";

/// An upper limit of the memory that a list takes in practice. The size of the file is not trusted.
const MAX_PROBED_BYTES: usize = 256 << 20;

/// The contents of the fragment `mem_metadata`.
#[derive(Serialize, Deserialize)]
pub(crate) struct Metadata {
    #[serde(deserialize_with = "list")]
    pub(super) regions: Vec<RegionMetadata>,
    pub(super) compressed: bool,
    /// An addition of vmsnap, which crosvm's reader ignores.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) lz4: Option<BlockIndex>,
}

/// A guest region in `mem_metadata`.
#[derive(Serialize, Deserialize)]
pub(super) struct RegionMetadata {
    pub(super) guest_base: u64,
    pub(super) size: u64,
    #[serde(deserialize_with = "list")]
    pub(super) data_ranges: Vec<Range<u64>>,
}

/// Deserializes a list with memory for the elements that are present, not for the number that its head announces.
fn list<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> std::result::Result<Vec<T>, D::Error> {
    struct List<T>(PhantomData<T>);

    impl<'de, T: Deserialize<'de>> Visitor<'de> for List<T> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> std::result::Result<Vec<T>, A::Error> {
            let mut list = Vec::new();
            while let Some(element) = sequence.next_element()? {
                buffer::reserve(&mut list, 1).map_err(|_| A::Error::custom(buffer::OUT_OF_MEMORY))?;
                list.push(element);
            }
            Ok(list)
        }
    }

    deserializer.deserialize_seq(List(PhantomData))
}

/// The stored lengths of all LZ4 blocks, so that a random read finds its block.
#[derive(Serialize, Deserialize)]
pub(super) struct BlockIndex {
    pub(super) block_size: u64,
    /// A little-endian u32 for each block: its stored length without the size word.
    #[serde(with = "serde_bytes")]
    pub(super) block_lengths: Vec<u8>,
}

/// A guest region with the places of its data in `mem`.
#[derive(Debug)]
pub(super) struct Region {
    pub(super) guest_base: u64,
    pub(super) size: u64,
    pub(super) ranges: Vec<StoredRange>,
}

/// A data range, in bytes from the start of its region.
#[derive(Clone, Copy, Debug)]
pub(super) struct StoredRange {
    pub(super) start: u64,
    pub(super) end: u64,
    /// Offset in the stream of all data.
    pub(super) data: u64,
}

/// The regions and ranges of a snapshot, after all checks.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) regions: Vec<Region>,
    /// Total length of all data ranges.
    pub(super) data_bytes: u64,
}

impl Region {
    /// Returns the first guest-physical address after the region.
    pub(super) fn end(&self) -> u64 {
        self.guest_base + self.size
    }
}

/// Checks that regions, given as base and size, do not overlap and end within 64 bits of addresses.
pub(super) fn check_apart(regions: impl Iterator<Item = (u64, u64)>) -> std::result::Result<(), String> {
    let mut ends = Vec::new();
    for (base, size) in regions {
        let end = base
            .checked_add(size)
            .ok_or_else(|| format!("the region at {base:#x} extends past the last 64-bit address"))?;
        ends.push((base, end));
    }
    ends.sort_unstable();
    match ends.windows(2).find(|pair| pair[1].0 < pair[0].1) {
        Some(pair) => Err(format!("the regions at {:#x} and {:#x} overlap", pair[0].0, pair[1].0)),
        None => Ok(()),
    }
}

impl Metadata {
    /// Decodes and checks the bytes of the fragment.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self> {
        let metadata: Self = serialization::decode(bytes, None, METADATA)?;
        metadata.check().map(|_| metadata)
    }

    /// Reads the fragment of a snapshot.
    pub(super) fn read(reader: &SnapshotReader, interrupt: &mut dyn FnMut() -> Result<()>) -> Result<Self> {
        let fragment = reader.raw_fragment_interruptible(METADATA, interrupt)?;
        // Serde allocates the list of block lengths and cannot report a failure; a guest of a terabyte takes 64 MiB. So
        // the same amount is allocated and freed first.
        let bytes = usize::try_from(fragment.size()).unwrap_or(usize::MAX).saturating_mul(2);
        buffer::probe(bytes.min(MAX_PROBED_BYTES)).map_err(|error| error.context(METADATA))?;
        reader.decode(METADATA, fragment, interrupt)
    }

    /// Returns the sizes of the memory.
    pub(super) fn report(&self) -> MemoryReport {
        let ranges = || self.regions.iter().flat_map(|region| &region.data_ranges);
        MemoryReport {
            logical_bytes: self.regions.iter().map(|region| region.size).sum(),
            data_bytes: ranges().map(|range| range.end - range.start).sum(),
            ranges: ranges().count(),
            ..MemoryReport::default()
        }
    }

    /// Checks everything that can be checked without the data.
    pub(super) fn check(&self) -> Result<Layout> {
        check_apart(self.regions.iter().map(|region| (region.guest_base, region.size))).map_err(Error::corrupt)?;
        let mut data_bytes = 0_u64;
        let mut regions = Vec::new();
        buffer::reserve(&mut regions, self.regions.len())?;
        for region in &self.regions {
            let mut ranges = Vec::new();
            buffer::reserve(&mut ranges, region.data_ranges.len())?;
            let mut last = 0;
            for &Range { start, end } in &region.data_ranges {
                if start < last || start >= end || end > region.size {
                    return Err(Error::corrupt(format!(
                        "data range {start:#x} to {end:#x} of the region at {:#x} is empty, out of order, or not within \
                         the {:#x} bytes of the region",
                        region.guest_base, region.size
                    )));
                }
                ranges.push(StoredRange { start, end, data: data_bytes });
                data_bytes = data_bytes
                    .checked_add(end - start)
                    .filter(|bytes| i64::try_from(*bytes).is_ok())
                    .ok_or_else(|| Error::corrupt("the data ranges are longer than any file"))?;
                last = end;
            }
            regions.push(Region { guest_base: region.guest_base, size: region.size, ranges });
        }
        if let Some(index) = &self.lz4 {
            index.check(data_bytes)?;
        }
        Ok(Layout { regions, data_bytes })
    }
}

impl BlockIndex {
    fn check(&self, data_bytes: u64) -> Result<()> {
        let blocks = self.block_lengths.len() / 4;
        let known = lz4::BLOCK_SIZES.iter().any(|size| *size as u64 == self.block_size);
        if known && self.block_lengths.len().is_multiple_of(4) && data_bytes.div_ceil(self.block_size) == blocks as u64
        {
            return Ok(());
        }
        Err(Error::corrupt(format!(
            "the index has {blocks} blocks of {} bytes, which do not fit {data_bytes} bytes of data",
            self.block_size
        )))
    }

    /// Iterates over the stored lengths, without size words.
    pub(super) fn lengths(&self) -> impl Iterator<Item = u32> + '_ {
        self.block_lengths.as_chunks().0.iter().map(|length| u32::from_le_bytes(*length))
    }
}
