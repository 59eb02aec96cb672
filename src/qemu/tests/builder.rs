//! [`Stream`]: a builder of migration streams.

use std::io::{self, Read};

pub(super) const PAGE: usize = 4096;

/// A stream of the bytes that QEMU would send.
#[derive(Clone)]
pub(super) struct Stream(pub(super) Vec<u8>);

impl Stream {
    pub(super) fn new() -> Self {
        Self(b"QEVM\0\0\0\x03".to_vec())
    }

    pub(super) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    pub(super) fn u32(self, number: u32) -> Self {
        self.bytes(&number.to_be_bytes())
    }

    pub(super) fn u64(self, number: u64) -> Self {
        self.bytes(&number.to_be_bytes())
    }

    pub(super) fn name(self, name: &str) -> Self {
        self.bytes(&[u8::try_from(name.len()).unwrap()]).bytes(name.as_bytes())
    }

    pub(super) fn configured(self) -> Self {
        self.bytes(&[7]).u32(9).bytes(b"pc-q35-10")
    }

    pub(super) fn subsection(self, name: &str) -> Self {
        self.bytes(&[5]).name(name).u32(1)
    }

    pub(super) fn start(self, name: &str) -> Self {
        self.bytes(&[1]).u32(2).name(name).u32(0).u32(4)
    }

    pub(super) fn listed(self, blocks: &[(&str, u64)]) -> Self {
        let sum: u64 = blocks.iter().map(|(_, size)| size).sum();
        blocks.iter().fold(self.u64(sum | 4), |stream, (name, size)| stream.name(name).u64(*size))
    }

    pub(super) fn end_section(self) -> Self {
        self.u64(0x10).footer(2)
    }

    pub(super) fn footer(self, id: u32) -> Self {
        self.bytes(&[0x7e]).u32(id)
    }

    pub(super) fn part(self) -> Self {
        self.bytes(&[2]).u32(2)
    }

    pub(super) fn end(self) -> Self {
        self.bytes(&[3]).u32(2)
    }

    pub(super) fn page(self, block: &str, page: u64, fill: u8) -> Self {
        self.u64(page << 12 | 8).name(block).bytes(&[fill; PAGE])
    }

    pub(super) fn next_page(self, page: u64, fill: u8) -> Self {
        self.u64(page << 12 | 0x28).bytes(&[fill; PAGE])
    }

    pub(super) fn zero(self, block: &str, page: u64) -> Self {
        self.u64(page << 12 | 2).name(block).bytes(&[0])
    }

    pub(super) fn next_zero(self, page: u64) -> Self {
        self.u64(page << 12 | 0x22).bytes(&[0])
    }

    /// The early state of a virtio-mem device, without its footer.
    pub(super) fn early(self, path: &str, size: u64, unit: u64) -> Self {
        let words = (size / unit.max(1)).div_ceil(64).min(8);
        let head = self.bytes(&[4]).u32(9).name(&format!("{path}virtio-mem-device-early")).u32(0).u32(1);
        let fields = head.u64(1 << 32).u64(size).u64(unit).u32(0).u64(unit);
        (0..words).fold(fields, |stream, word| stream.u64(u64::from(word == 0) << 56))
    }

    pub(super) fn devices(self) -> Self {
        self.bytes(&[4]).u32(3).name("timer").u32(0).u32(2).u64(0x0600).footer(3)
    }

    pub(super) fn described(self) -> Self {
        self.bytes(&[0, 6]).u32(17).bytes(b"{\"devices\":[1,2]}")
    }

    pub(super) fn begun(blocks: &[(&str, u64)]) -> Self {
        Self::new().configured().start("ram").listed(blocks)
    }
}

pub(super) const BLOCKS: [(&str, u64); 3] = [("pc.ram", 8 << 12), ("pc.bios", 2 << 12), ("/objects/hot", 4 << 12)];

/// A live migration: a page comes three times, and pages of two blocks of guest memory and of a ROM take turns.
pub(super) fn live() -> Stream {
    Stream::begun(&BLOCKS)
        .end_section()
        .part()
        .page("pc.ram", 0, 1)
        .next_zero(1)
        .page("pc.bios", 0, 0xb0)
        .page("pc.ram", 2, 2)
        .next_page(3, 3)
        .end_section()
        .part()
        .next_page(3, 4)
        .page("pc.bios", 1, 0xb1)
        .page("/objects/hot", 3, 7)
        .zero("pc.bios", 1)
        .end_section()
        .part()
        .page("pc.ram", 2, 0)
        .end_section()
        .bytes(&[8, 0, 11, 0, 0])
        .end()
        .page("pc.ram", 3, 5)
        .next_zero(0)
        .end_section()
        .devices()
        .described()
}

/// The fragment with the rest of it.
pub(super) fn thinned() -> Stream {
    Stream::begun(&BLOCKS)
        .end_section()
        .part()
        .page("pc.bios", 0, 0xb0)
        .end_section()
        .part()
        .next_page(1, 0xb1)
        .next_zero(1)
        .end_section()
        .bytes(&[8, 0, 11, 0, 0])
        .end()
        .end_section()
        .devices()
        .described()
}

/// Returns a few bytes at a time, and a wait in between.
pub(super) struct Trickle<'a>(pub(super) &'a [u8], pub(super) usize, pub(super) bool);

impl Read for Trickle<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.2 = !self.2;
        if self.2 {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let count = self.1.min(self.0.len()).min(buf.len());
        let (now, later) = self.0.split_at(count);
        buf[..count].copy_from_slice(now);
        self.0 = later;
        Ok(count)
    }
}
