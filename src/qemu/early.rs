//! [`pass_early`]: the state of a device that QEMU sends before the pages of guest memory.
//!
//! A section has no length, so vmsnap passes only a section whose fields it knows. Up to QEMU 10.0, only virtio-mem has
//! such a section (hw/virtio/virtio-mem.c), in machine types from 8.0 on. It tells which memory is plugged in:
//!
//! ```text
//! 4 | u32 id | "PATH/virtio-mem-device-early" | u32 instance | u32 version
//! u64 address | u64 size of the memory | u64 size of a unit | u32 node | u64 plugged in
//! a bit for each unit, in words of 64
//! 7e | u32 id
//! ```
//!
//! QEMU writes these sections between the list of RAM blocks and the pages, and loads them in this order.

use super::format::{MAX_MEMORY_BYTES, malformed, refused, section};
use super::front::{Front, early, push_name};
use super::input::Input;
use super::kept::Kept;
use crate::error::Result;
use crate::name::shown;
use crate::threads::Interrupt;

/// The name of the section, after the path of the device.
const VIRTIO_MEM: &str = "virtio-mem-device-early";
const VIRTIO_MEM_VERSION: u32 = 1;

/// The smallest unit of memory that is plugged in: `VIRTIO_MEM_MIN_BLOCK_SIZE` of QEMU.
const MIN_UNIT_BYTES: u64 = 1 << 20;

const WHAT: &str = "the early state of a virtio-mem device";

/// Passes a section of kind FULL. None of its bytes was taken.
pub(super) fn pass_early(
    input: &mut Input<'_>,
    kept: &mut Kept<'_>,
    front: &Front,
    interrupt: &mut Interrupt<'_>,
) -> Result<()> {
    let offset = input.offset();
    let mut head = vec![input.byte(WHAT, interrupt)?];
    let id = *input.array::<4>(WHAT, interrupt)?;
    let name = input.name("the name of a section", interrupt)?.to_owned();
    if name.rsplit('/').next() != Some(VIRTIO_MEM) {
        return Err(early(offset, &name));
    }
    head.extend(id);
    push_name(&mut head, &name);
    head.extend(input.array::<4>(WHAT, interrupt)?);
    let version = input.u32(WHAT, interrupt)?;
    if version != VIRTIO_MEM_VERSION {
        let text = format!("version {version}, and vmsnap reads version {VIRTIO_MEM_VERSION}");
        return Err(refused(offset, format_args!("the section {} has {text}", shown(&name))));
    }
    head.extend(version.to_be_bytes());
    head.extend(input.array::<8>(WHAT, interrupt)?);
    let size = input.u64(WHAT, interrupt)?;
    let unit = input.u64(WHAT, interrupt)?;
    head.extend(size.to_be_bytes());
    head.extend(unit.to_be_bytes());
    head.extend(input.array::<12>(WHAT, interrupt)?);
    let has_units = unit.is_power_of_two() && unit >= MIN_UNIT_BYTES && size.is_multiple_of(unit);
    // The memory of the device is a block. Its size limits how much follows.
    if !has_units || size > MAX_MEMORY_BYTES || front.blocks.iter().all(|block| block.size != size) {
        let text = format!("{size} bytes of memory in units of {unit} bytes, which no RAM block has");
        return Err(malformed(offset, format_args!("the section {} describes {text}", shown(&name))));
    }
    kept.put(&head, interrupt)?;
    let mut left = (size / unit).div_ceil(64);
    while left > 0 {
        kept.put(input.array::<8>(WHAT, interrupt)?, interrupt)?;
        left -= 1;
    }
    if kept.has_footers {
        let offset = input.offset();
        let footer = *input.array::<5>("the footer of a section", interrupt)?;
        let [kind, rest @ ..] = footer;
        if (kind, rest) != (section::FOOTER, id) {
            return Err(malformed(offset, format_args!("the section {} does not end with its footer", shown(&name))));
        }
        kept.put(&footer, interrupt)?;
    }
    Ok(())
}
