//! What tells a disk, as it is now, from any other: for the device's saved state.
//!
//! The saved state of a device goes with the memory of a guest, and that knows what is on the disk:
//! mounted file systems, caches. Continued on another disk, or on this one at another time, the
//! guest destroys what it finds. So the state says which disk it was, and a restore compares.
//!
//! Neither path nor inode will do: the disk may have been copied, converted to another format, or
//! be reached by another path, and be the right one all the same. Most formats carry no identifier,
//! and one that is copied along tells nothing of the time. What must be equal is what the guest
//! sees: the serial number, and the content. The guest stands still from the moment when its state
//! is saved to that when it is restored, so not a byte of its disk may differ.
//!
//! The whole content would take too long to read. [`DiskIdentity::of`] reads samples from where
//! partition tables and the superblocks of file systems lie, which hold identifiers (GPT, UUIDs)
//! and, in file systems that have been used in between, counts and times:
//!
//! ```text
//! 0 … 64 KiB          MBR and GPT · superblocks of ext4, xfs, ntfs on a disk without partitions
//! 64 … 128 KiB        btrfs on a disk without partitions
//! 1 MiB … 1 MiB + 128 KiB   the same for the first partition
//! the last 64 KiB     GPT's copy, and whatever ends with the disk
//! ```
//!
//! A disk that differs elsewhere only is not found out.

use crate::block::Node;
use crate::crc32c;
use crate::error::{Error, Result, ResultExt};
use crate::io::{AlignedBuf, block_on};
use crate::units::{ByteRange, align_down};

/// Room for a serial number: what a GET_ID request has.
pub const SERIAL_LEN: usize = 20;
/// Number of samples.
pub const SAMPLES: usize = 4;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// A disk at a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskIdentity {
    /// The serial number, as GET_ID answers it.
    pub serial: [u8; SERIAL_LEN],
    /// CRC32C of each sample; `None` where the disk could not be read, which equals anything.
    pub content: Option<[u32; SAMPLES]>,
}

impl DiskIdentity {
    /// Looks at a disk. Waits for it, so only for threads that may.
    pub fn of(node: &Node, serial: &str) -> DiskIdentity {
        let mut identity = DiskIdentity::default();
        let len = serial.len().min(SERIAL_LEN);
        identity.serial[..len].copy_from_slice(&serial.as_bytes()[..len]);
        match sample(node) {
            Ok(content) => identity.content = Some(content),
            Err(err) => tracing::warn!(
                "{}: a saved state will not tell whether it goes with this disk: {err}",
                node.name()
            ),
        }
        identity
    }

    /// Refuses a state that was saved with `self` for the disk that is there `now`.
    pub fn check_against(&self, now: &DiskIdentity) -> Result<()> {
        if self.serial != now.serial {
            return Err(Error::invalid(format!(
                "device state of another disk: its serial number was '{}', this one has '{}' \
                 (--serial)",
                text(&self.serial),
                text(&now.serial)
            )));
        }
        match (self.content, now.content) {
            (Some(saved), Some(found)) if saved != found => Err(Error::invalid(
                "device state of another disk or another time: the content is not what it was \
                 when the state was saved; bring the disk back as it was then",
            )),
            _ => Ok(()),
        }
    }
}

fn text(serial: &[u8]) -> String {
    String::from_utf8_lossy(serial).trim_end_matches('\0').to_string()
}

/// Where the samples of a disk of `size` bytes lie; empty ones lie behind its end.
fn places(size: u64) -> [ByteRange; SAMPLES] {
    let end = align_down(size.saturating_sub(64 * KIB), 4 * KIB);
    [(0, 64 * KIB), (64 * KIB, 64 * KIB), (MIB, 128 * KIB), (end, 64 * KIB + 4 * KIB)].map(
        |(offset, len)| ByteRange::between(offset.min(size), offset.saturating_add(len).min(size)),
    )
}

fn sample(node: &Node) -> Result<[u32; SAMPLES]> {
    let mut content = [0; SAMPLES];
    for (crc, place) in content.iter_mut().zip(places(node.size())) {
        if place.is_empty() {
            continue;
        }
        let alignment = node.limits().memory_alignment.max(4096);
        let buf = AlignedBuf::zeroed(place.len as usize, alignment);
        block_on(node.read(place.offset, buf.buffers())).context(|| format!("reading {place}"))?;
        *crc = crc32c::crc32c(&buf.to_vec());
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::block::NodeOptions;
    use crate::formats::raw::Raw;
    use crate::io::Alignment;
    use crate::io::sim::SimFile;

    fn of(content: &[u8], serial: &str) -> DiskIdentity {
        let file = SimFile::with_alignment("disk", content.to_vec(), Alignment::NONE);
        let raw = Raw::open(Arc::new(file), true).unwrap();
        let options =
            NodeOptions { name: "disk".into(), read_only: true, ..NodeOptions::default() };
        DiskIdentity::of(&Node::new(Arc::new(raw), options), serial)
    }

    #[test]
    fn a_copy_is_the_same_disk_and_a_change_makes_another() {
        let disk: Vec<u8> = (0..3 * MIB + 512).map(|at| (at / 512 * 7) as u8).collect();
        let saved = of(&disk, "db0");
        saved.check_against(&of(&disk, "db0")).unwrap();
        let err = saved.check_against(&of(&disk, "db1")).unwrap_err().to_string();
        assert!(err.contains("'db0'") && err.contains("'db1'"), "{err}");
        // A byte where things are that identify a disk.
        for at in [0, 0x1b8, 1080, 65536 + 64, MIB + 1080, MIB + 65536, 3 * MIB + 511] {
            let mut other = disk.clone();
            other[at as usize] ^= 1;
            let err = saved.check_against(&of(&other, "db0")).unwrap_err().to_string();
            assert!(err.contains("the content is not what it was"), "{at}: {err}");
        }
    }

    #[test]
    fn disks_of_any_size_have_samples_inside_of_them() {
        for size in [512, 4096, 65536, 65536 + 512, MIB, MIB + 512, 2 * MIB, 1 << 40, u64::MAX] {
            let places = places(size);
            assert!(places.iter().all(|place| place.end() <= size), "{size}: {places:?}");
            assert!(places.iter().any(|place| !place.is_empty() && place.end() == size), "{size}");
        }
        let small = of(&[1; 512], "");
        assert!(small.check_against(&of(&[2; 512], "")).is_err());
    }

    #[test]
    fn what_cannot_be_read_is_not_compared() {
        let known = of(&[1; 4096], "x");
        let unknown = DiskIdentity { content: None, ..known };
        known.check_against(&unknown).unwrap();
        unknown.check_against(&known).unwrap();
    }
}
