//! Moves the image on disk from one consistent state to the next, whatever the power does.
//!
//! Let A be the metadata on disk and B what imago has made of it since. Payload is written in
//! place all the time; the clusters that B uses and A does not are free in A, so that harms
//! nothing. A checkpoint writes B over A in phases, each durable before the next starts:
//!
//! ```text
//! 1  what A does not refer to: new tables, new refcount blocks; and in A's refcount blocks, of
//!    each count the higher of A's and B's                   │ the same flush makes all payload
//!                                                           │ durable that B's mappings show
//! 2  refcount table entries; the header's pointer to it     │ now every cluster of A and B counts
//! 3  L2 tables and L1 entries of A; the rest of the header  │ now mappings are B's, one by one
//! 4  refcounts that are lower in B                          │ now B; needs no flush: until the
//!                                                           │ next one there are leaks at worst
//! ```
//!
//! At every moment each cluster that the disk's mappings refer to has a count of at least one, and
//! each mapping is A's or B's, with its data. Entries are 8 bytes and never cross a sector, so torn
//! tables are mixtures of both. Clusters that only A uses are not given out again before phase 3 is
//! durable (see `settle_writes` in [`super::store`]).
//!
//! What is to be written in each phase is computed once, into a [`Snapshot`]. If the future that
//! runs the phases is dropped, or a phase is interrupted, the next checkpoint starts by running all
//! phases of the same snapshot again, which is idempotent: A and what it refers to are still there.

use std::collections::HashSet;
use std::sync::Arc;

use super::disk::{ALL, Disk, Tracker, read_bytes};
use super::header::{Header, field};
use super::store::{Bytes, Store};
use crate::error::Result;
use crate::io::AlignedBuf;
use crate::units::ByteRange;

/// Largest single write of metadata, in bytes.
const MAX_WRITE: usize = 1 << 20;

/// Where the metadata lies in the state on disk.
#[derive(Clone, Debug)]
pub struct Layout {
    cluster_size: u64,
    refcount_order: u32,
    l1: ByteRange,
    reftable: ByteRange,
    /// Offsets of refcount blocks, in the order of the refcount table; 0 where there is none.
    refblocks: Vec<u64>,
    /// The same, to look them up.
    refblock_set: HashSet<u64>,
    /// Offsets of L2 tables that the L1 table refers to (or did).
    l2_tables: HashSet<u64>,
}

/// How a [`Layout`] changes with a snapshot.
#[derive(Debug, Default)]
struct LayoutChange {
    l1: Option<ByteRange>,
    reftable: Option<ByteRange>,
    /// Index in the refcount table, offset of the block.
    refblocks: Vec<(usize, u64)>,
    l2_tables: Vec<u64>,
}

/// A consistent state on its way to the disk.
#[derive(Debug)]
pub struct Snapshot {
    /// What each phase writes, ordered by offset.
    phases: [Vec<(u64, Bytes)>; 4],
    /// The state itself: all granules that differ from the disk.
    blocks: Vec<(u64, Bytes)>,
    change: LayoutChange,
    granule: u64,
}

impl Snapshot {
    /// The granules that are durable once the snapshot is.
    pub fn blocks(&self) -> &[(u64, Bytes)] {
        &self.blocks
    }

    /// Whether the snapshot will still write to any byte of the range.
    pub fn covers(&self, range: ByteRange) -> bool {
        let first = self.blocks.partition_point(|(at, _)| at + self.granule <= range.offset);
        self.blocks.get(first).is_some_and(|(at, _)| *at < range.end())
    }
}

fn entries(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.chunks_exact(8).map(|entry| u64::from_be_bytes(entry.try_into().expect("eight bytes")))
}

/// The offset in an L1 entry; 0 if there is no table.
fn l2_offset(entry: u64) -> u64 {
    entry & 0x00ff_ffff_ffff_fe00
}

/// The offset in a refcount table entry; 0 if there is no block.
fn refblock_offset(entry: u64) -> u64 {
    entry & !0x1ff
}

impl Layout {
    /// Finds the tables of the image on disk.
    pub async fn load(disk: &Disk, header: &Header) -> Result<Layout> {
        let cluster_size = header.cluster_size();
        let l1 = ByteRange { offset: header.l1_offset, len: header.l1_entries * 8 };
        let reftable = ByteRange {
            offset: header.reftable_offset,
            len: header.reftable_clusters * cluster_size,
        };
        let read = async |range: ByteRange| {
            read_bytes(&**disk.file(), range.offset, range.len as usize).await
        };
        let refblocks: Vec<u64> = entries(&read(reftable).await?).map(refblock_offset).collect();
        let l1_bytes = read(l1).await?;
        Ok(Layout {
            cluster_size,
            refcount_order: header.refcount_order,
            l1,
            reftable,
            refblock_set: refblocks.iter().copied().filter(|offset| *offset != 0).collect(),
            refblocks,
            l2_tables: entries(&l1_bytes).map(l2_offset).filter(|offset| *offset != 0).collect(),
        })
    }

    fn apply(&mut self, change: &LayoutChange) {
        self.l1 = change.l1.unwrap_or(self.l1);
        self.reftable = change.reftable.unwrap_or(self.reftable);
        for (index, offset) in &change.refblocks {
            if self.refblocks.len() <= *index {
                self.refblocks.resize(*index + 1, 0);
            }
            self.refblocks[*index] = *offset;
            self.refblock_set.insert(*offset);
        }
        self.l2_tables.extend(&change.l2_tables);
    }

    /// A snapshot is complete: the disk is as it says.
    pub fn advance(&mut self, snapshot: &Snapshot) {
        self.apply(&snapshot.change);
    }

    /// The refcount of the cluster at `offset` as imago last wrote it; 0 if it has none.
    pub async fn refcount(&self, store: &Store, offset: u64) -> Result<u64> {
        let cluster = offset / self.cluster_size;
        let bits = 1u64 << self.refcount_order;
        let per_block = self.cluster_size * 8 / bits;
        let block = self.refblocks.get((cluster / per_block) as usize).copied().unwrap_or(0);
        if block == 0 {
            return Ok(0);
        }
        let bit = cluster % per_block * bits;
        let bytes = store.read(block + bit / 8, bits.div_ceil(8) as usize).await?;
        Ok(get_count(&bytes, bit % 8, self.refcount_order))
    }

    /// Sorts what has changed into phases. Nothing may change the store meanwhile.
    pub async fn snapshot(&self, store: &Store) -> Result<Snapshot> {
        let dirty = store.dirty();
        let mut phases: [Vec<(u64, Bytes)>; 4] = Default::default();
        let mut change = LayoutChange::default();
        for (at, new, base) in &dirty {
            let cluster = at - at % self.cluster_size;
            let granule = ByteRange { offset: *at, len: new.len() as u64 };
            if cluster == 0 {
                let old = self.on_disk(store, *at, base).await?;
                if *at == 0 {
                    self.header_change(store, &old, new, &mut phases, &mut change).await?;
                }
                phases[2].push((*at, new.clone()));
            } else if self.refblock_set.contains(&cluster) {
                let old = self.on_disk(store, *at, base).await?;
                let highest: Bytes = highest_counts(&old, new, self.refcount_order).into();
                if highest[..] != new[..] {
                    phases[3].push((*at, new.clone()));
                }
                phases[0].push((*at, highest));
            } else if self.reftable.overlaps(&granule) {
                self.refblock_change(self.reftable.offset, *at, new, &mut change);
                phases[1].push((*at, new.clone()));
            } else if self.l1.overlaps(&granule) {
                self.l1_change(new, &mut change);
                phases[2].push((*at, new.clone()));
            } else if self.l2_tables.contains(&cluster) {
                phases[2].push((*at, new.clone()));
            } else {
                phases[0].push((*at, new.clone()));
            }
        }
        let granule = store.granule();
        let blocks = dirty.into_iter().map(|(at, new, _)| (at, new)).collect();
        Ok(Snapshot { phases, blocks, change, granule })
    }

    /// What the file holds of a granule.
    async fn on_disk(&self, store: &Store, at: u64, base: &Option<Bytes>) -> Result<Bytes> {
        match base {
            Some(base) => Ok(base.clone()),
            None => {
                let file = store.disk().file();
                Ok(read_bytes(&**file, at, store.granule() as usize).await?.into())
            }
        }
    }

    /// The header's first sector: the pointer to the refcount table goes out before the rest.
    async fn header_change(
        &self,
        store: &Store,
        old: &[u8],
        new: &[u8],
        phases: &mut [Vec<(u64, Bytes)>; 4],
        change: &mut LayoutChange,
    ) -> Result<()> {
        let word = |at: usize| u64::from_be_bytes(new[at..at + 8].try_into().expect("8 bytes"));
        let half = |at: usize| u32::from_be_bytes(new[at..at + 4].try_into().expect("4 bytes"));
        let pointer = field::REFTABLE_OFFSET..field::REFTABLE_END;
        if old[pointer.clone()] != new[pointer.clone()] {
            let mut early = old.to_vec();
            early[pointer.clone()].copy_from_slice(&new[pointer]);
            phases[1].push((0, early.into()));
            let reftable = ByteRange {
                offset: word(field::REFTABLE_OFFSET),
                len: u64::from(half(56)) * self.cluster_size,
            };
            change.reftable = Some(reftable);
            let table = store.read(reftable.offset, reftable.len as usize).await?;
            self.refblock_change(reftable.offset, reftable.offset, &table, change);
        }
        let l1 = ByteRange { offset: word(field::L1_OFFSET), len: u64::from(half(36)) * 8 };
        if l1 != self.l1 {
            change.l1 = Some(l1);
            let table = store.read(l1.offset, l1.len as usize).await?;
            self.l1_change(&table, change);
        }
        Ok(())
    }

    /// Notes the blocks that a part of the refcount table at `at` refers to.
    fn refblock_change(&self, table: u64, at: u64, bytes: &[u8], change: &mut LayoutChange) {
        let first = (at.saturating_sub(table) / 8) as usize;
        for (i, entry) in entries(bytes).enumerate() {
            let (index, offset) = (first + i, refblock_offset(entry));
            if offset != 0 && self.refblocks.get(index) != Some(&offset) {
                change.refblocks.push((index, offset));
            }
        }
    }

    /// Notes the L2 tables that a part of the L1 table refers to.
    fn l1_change(&self, bytes: &[u8], change: &mut LayoutChange) {
        let tables = entries(bytes).map(l2_offset).filter(|offset| *offset != 0);
        change.l2_tables.extend(tables.filter(|offset| !self.l2_tables.contains(offset)));
    }
}

impl Snapshot {
    /// Runs all phases. When this returns, the snapshot's state and all payload that was written
    /// before are durable. `writes` tracks the writes, so that those of a dropped run can be
    /// waited for.
    pub async fn write_out(&self, disk: &Disk, writes: &Arc<Tracker>) -> Result<()> {
        // What an earlier, dropped run of the phases left under way must not land later.
        writes.settle(ALL).await;
        write_blocks(disk, writes, &self.phases[0]).await?;
        disk.file().flush().await?;
        for phase in &self.phases[1..3] {
            if !phase.is_empty() {
                write_blocks(disk, writes, phase).await?;
                disk.file().flush().await?;
            }
        }
        write_blocks(disk, writes, &self.phases[3]).await
    }
}

/// Writes a new image: everything but the header's sector, then that.
pub async fn write_new(disk: &Disk, store: &Store) -> Result<()> {
    let blocks: Vec<_> = store.dirty().into_iter().map(|(at, new, _)| (at, new)).collect();
    let writes = Arc::default();
    let header = blocks.partition_point(|(at, _)| *at == 0);
    write_blocks(disk, &writes, &blocks[header..]).await?;
    disk.file().flush().await?;
    write_blocks(disk, &writes, &blocks[..header]).await?;
    disk.file().flush().await
}

/// Writes granules, neighbours together.
async fn write_blocks(disk: &Disk, writes: &Arc<Tracker>, blocks: &[(u64, Bytes)]) -> Result<()> {
    let mut rest = blocks;
    while let Some((start, first)) = rest.first() {
        let mut end = start + first.len() as u64;
        let mut count = 1;
        while let Some((at, bytes)) = rest.get(count)
            && *at == end
            && end - start < MAX_WRITE as u64
        {
            end += bytes.len() as u64;
            count += 1;
        }
        let align = disk.file().alignment().memory.max(512);
        let buf = AlignedBuf::zeroed((end - start) as usize, align);
        for (at, bytes) in &rest[..count] {
            buf.buffers().slice(at - start, bytes.len() as u64).copy_from_slice(bytes);
        }
        let token = writes.begin(ByteRange::between(*start, end));
        disk.write(*start, buf.buffers(), token).await?;
        rest = &rest[count..];
    }
    Ok(())
}

/// A refcount at a bit offset below 8 in `bytes`.
pub(super) fn get_count(bytes: &[u8], bit: u64, order: u32) -> u64 {
    match order {
        0..=2 => {
            let mask = (1u16 << (1 << order)) - 1;
            u64::from((u16::from(bytes[0]) >> bit) & mask)
        }
        _ => bytes.iter().fold(0, |count, byte| count << 8 | u64::from(*byte)),
    }
}

/// Of each refcount in two versions of a piece of a refcount block the higher.
fn highest_counts(old: &[u8], new: &[u8], order: u32) -> Vec<u8> {
    match order {
        0..=2 => {
            let bits = 1u32 << order;
            let mask = ((1u16 << bits) - 1) as u8;
            let max = |(old, new): (&u8, &u8)| {
                (0..8).step_by(bits as usize).fold(0, |out, shift| {
                    let mask = mask << shift;
                    out | (old & mask).max(new & mask)
                })
            };
            old.iter().zip(new).map(max).collect()
        }
        // Big-endian numbers compare like their bytes.
        _ => {
            let width = (1usize << order) / 8;
            let pairs = old.chunks_exact(width).zip(new.chunks_exact(width));
            pairs.flat_map(|(old, new)| old.max(new)).copied().collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_higher_count_wins_at_every_width() {
        assert_eq!(highest_counts(&[0b1010_0001], &[0b0110_0000], 0), [0b1110_0001]);
        assert_eq!(highest_counts(&[0b10_01_00_11], &[0b01_10_11_00], 1), [0b10_10_11_11]);
        assert_eq!(highest_counts(&[0x3a], &[0xa3], 2), [0xaa]);
        assert_eq!(highest_counts(&[1, 0, 0, 255], &[0, 255, 1, 0], 4), [1, 0, 1, 0]);
        assert_eq!(get_count(&[0b0010_0000], 5, 0), 1);
        assert_eq!(get_count(&[0xa3], 4, 2), 10);
        assert_eq!(get_count(&[1, 2], 0, 4), 258);
    }
}
