//! Whether a disk is still what its log ends with, after the process that recorded it was killed.
//!
//! Whatever is in the log was on the disk before, and the host keeps that when a process dies. So the
//! last entry that touches a place says what is there, unless something was under way there
//! ([`under_way`](super::under_way)). Where it is not, somebody else has written to the disk, or has
//! put an older one in its place: the log goes on no more.
//!
//! That is a sample, not a proof: the last entries only, and a bounded number of bytes. What was
//! recorded before the last process is not looked at, because nobody knows any more what was under
//! way when that one began.

use crate::block::Driver;
use crate::error::Result;
use crate::filters::write_log::under_way::Left;
use crate::io::AlignedBuf;
use crate::units::{ByteRange, MIB, align_down, align_up};
use crate::write_log::sidecar::Sidecar;
use crate::write_log::{Entry, Kind, Log};

/// How many entries are looked at.
const ENTRIES: u64 = 64;
/// How many bytes of the disk.
const BYTES: u64 = 4 * MIB;
/// How many at a time.
const PIECE: u64 = MIB;

/// Where a disk is not what its log says.
#[derive(Debug, PartialEq, Eq)]
pub struct Difference {
    /// The entry that was the last to write there.
    pub entry: u64,
    /// The first byte that differs.
    pub at: u64,
}

/// Looks for a place where `disk` is not what the `end` entries of a log have made of it.
///
/// # Errors
/// If disk, log or sidecar cannot be read.
pub async fn find_difference(
    log: &Log,
    sidecar: &mut Sidecar,
    end: u64,
    left: &Left,
    disk: &dyn Driver,
) -> Result<Option<Difference>> {
    let mut budget = BYTES;
    // Where nothing is to be compared: what was under way, and what later entries have written.
    let mut covered = left.ranges.clone();
    let whole = ByteRange { offset: 0, len: disk.limits().size };
    for number in (left.first.max(end.saturating_sub(ENTRIES))..end).rev() {
        // Entries of others have none, and nobody knows what those have left on the disk.
        let Some(record) = sidecar.record(number).await? else { break };
        let position = record.log_sector.saturating_mul(log.sector_size());
        let Ok(entry) = log.entry_at(number, position).await else { break };
        if !matches!(entry.kind(), Kind::Write | Kind::Discard) {
            continue;
        }
        for mut range in without(entry.target.intersect(&whole), &mut covered) {
            while !range.is_empty() && budget > 0 {
                let piece = ByteRange { len: range.len.min(PIECE).min(budget), ..range };
                if let Some(at) = first_difference(log, &entry, piece, disk).await? {
                    return Ok(Some(Difference { entry: number, at }));
                }
                budget -= piece.len;
                range = ByteRange::between(piece.end(), range.end());
            }
        }
        covered.push(entry.target);
    }
    Ok(None)
}

/// What of `range` is in none of the others, which are put in order.
fn without(range: ByteRange, others: &mut [ByteRange]) -> Vec<ByteRange> {
    others.sort_unstable_by_key(|other| other.offset);
    let mut left = Vec::new();
    let mut start = range.offset;
    for other in others.iter().filter(|other| other.overlaps(&range)) {
        left.push(ByteRange::between(start, other.offset));
        start = start.max(other.end());
    }
    left.push(ByteRange::between(start, range.end()));
    left.retain(|piece| !piece.is_empty());
    left
}

/// The first byte of a part of an entry's range that is not what the entry has put there.
async fn first_difference(
    log: &Log,
    entry: &Entry,
    part: ByteRange,
    disk: &dyn Driver,
) -> Result<Option<u64>> {
    let expected = match entry.data() {
        Some(data) => {
            let offset = data.offset + (part.offset - entry.target.offset);
            log.read_bytes(ByteRange { offset, len: part.len }).await?
        }
        None => vec![0; part.len as usize],
    };
    // The image may be cached in another way than when it was recorded, and ask for larger units.
    let unit = disk.limits().request_alignment;
    let end = align_up(part.end(), unit).unwrap_or(part.end()).min(disk.limits().size);
    let around = ByteRange::between(align_down(part.offset, unit), end);
    let buf = AlignedBuf::zeroed(around.len as usize, disk.limits().memory_alignment.max(4096));
    disk.read(around.offset, buf.buffers()).await?;
    let found = buf.to_vec();
    let found = &found[(part.offset - around.offset) as usize..];
    let differs = expected.iter().zip(found).position(|(a, b)| a != b);
    Ok(differs.map(|at| part.offset + at as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_covered_is_left_out() {
        let range = |start, end| ByteRange::between(start, end);
        let of = |others: &[ByteRange]| without(range(10, 20), &mut others.to_vec());
        assert_eq!(of(&[]), [range(10, 20)]);
        assert_eq!(of(&[range(0, 10), range(20, 30)]), [range(10, 20)]);
        assert_eq!(of(&[range(18, 25), range(0, 12)]), [range(12, 18)]);
        assert_eq!(of(&[range(12, 14), range(13, 16)]), [range(10, 12), range(16, 20)]);
        assert_eq!(of(&[range(11, 19), range(12, 13)]), [range(10, 11), range(19, 20)]);
        assert_eq!(of(&[range(0, u64::MAX)]), []);
    }
}
