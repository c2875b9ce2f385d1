//! Looks for inconsistencies in an image's metadata, without changing anything.
//!
//! References to clusters are counted by walking all that can refer to one, and compared with the
//! refcounts that the image stores:
//!
//! ```text
//! header ─► L1 ─► L2 ─► data, compressed data        ┐
//!        ─► snapshot table ─► L1 ─► L2 ─► data       ├─ references  ⟷  refcounts
//!        ─► refcount table ─► refcount blocks        ┘
//! ```
//!
//! A cluster with more references than its refcount says is a *corruption*: it may be given out
//! again while in use. One with fewer is a *leak*. Entries that make no sense, point past the end
//! of the file, or claim wrongly that their cluster is theirs alone, are corruptions as well. The
//! counts are those of `qemu-img check`.
//!
//! # Limits
//!
//! Images that cannot be served (encrypted, with external data, …) and images with persistent
//! bitmaps are refused: what refers to a cluster there is not known here. Memory grows with the
//! number of clusters that are in use.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::checkpoint::get_count;
use super::header::Header;
use super::{disk, snapshots};
use crate::error::{Error, Result, ResultExt};
use crate::io::File;
use crate::units::ByteRange;

/// The entry's cluster is referred to by nothing else.
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
/// The offset in an L1 or standard L2 entry.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits of an entry that mean nothing and must be zero.
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
const REFTABLE_RESERVED: u64 = 0x1ff;
/// Most findings that are put into words.
const MAX_FINDINGS: usize = 1000;
/// Clusters that are counted together.
const CHUNK: u64 = 1024;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// End of the last cluster in use, in bytes.
    pub image_end_offset: u64,
    /// Clusters of the disk.
    pub total_clusters: u64,
    /// How many of them have a place in the file.
    pub allocated_clusters: u64,
    /// How many of those do not follow the one before.
    pub fragmented_clusters: u64,
    /// How many of those are compressed.
    pub compressed_clusters: u64,
    /// Things that could not be checked.
    pub check_errors: u64,
    /// Inconsistencies that can lose data.
    pub corruptions: u64,
    /// Clusters that are not in use, but not free either.
    pub leaks: u64,
    /// A sentence for each, up to a limit.
    pub findings: Vec<String>,
}

impl Found {
    fn say(&mut self, sentence: String) {
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(sentence);
        } else if self.findings.len() == MAX_FINDINGS {
            self.findings.push("There is more, which is not listed.".into());
        }
    }

    fn corrupt(&mut self, sentence: String) {
        self.corruptions += 1;
        self.say(format!("ERROR {sentence}"));
    }

    fn unread(&mut self, sentence: String) {
        self.check_errors += 1;
        self.say(format!("ERROR {sentence}"));
    }
}

/// Checks an image.
///
/// # Errors
/// If the header cannot be understood, or the image has something that cannot be checked.
pub async fn check(file: &Arc<dyn File>) -> Result<Found> {
    let name = || file.name().to_string();
    let header = Header::read(file).await?;
    header.check_supported(true).context(name)?;
    if header.has_bitmaps {
        return Err(Error::unsupported(format!(
            "{}: the image has persistent bitmaps, which are not checked here; use qemu-img check",
            file.name()
        )));
    }
    let mut check = Check {
        file,
        cluster: header.cluster_size(),
        file_len: file.len().context(name)?,
        reftable: Vec::new(),
        references: References::default(),
        found: Found::default(),
        header: &header,
    };
    check.run().await.context(name)?;
    Ok(check.found)
}

/// How often each cluster is referred to.
#[derive(Default)]
struct References {
    chunks: BTreeMap<u64, Box<[u32]>>,
}

impl References {
    fn add(&mut self, cluster: u64) {
        let chunk = self.chunks.entry(cluster / CHUNK);
        let chunk = chunk.or_insert_with(|| vec![0; CHUNK as usize].into());
        let count = &mut chunk[(cluster % CHUNK) as usize];
        *count = count.saturating_add(1);
    }

    fn get(&self, cluster: u64) -> u64 {
        self.chunks
            .get(&(cluster / CHUNK))
            .map_or(0, |chunk| u64::from(chunk[(cluster % CHUNK) as usize]))
    }

    /// The clusters that are referred to, in order.
    fn clusters(&self) -> impl Iterator<Item = u64> {
        self.chunks.iter().flat_map(|(number, chunk)| {
            let used = chunk.iter().enumerate().filter(|(_, count)| **count > 0);
            used.map(move |(i, _)| number * CHUNK + i as u64)
        })
    }
}

/// A check under way.
struct Check<'a> {
    file: &'a Arc<dyn File>,
    header: &'a Header,
    /// Cluster size in bytes.
    cluster: u64,
    file_len: u64,
    /// Offsets of the refcount blocks, 0 where there is none or none that can be read.
    reftable: Vec<u64>,
    references: References,
    found: Found,
}

impl Check<'_> {
    async fn run(&mut self) -> Result<()> {
        let header = self.header;
        self.found.total_clusters = header.size.div_ceil(self.cluster);
        self.refer(0, self.cluster);
        self.count_tables(header.l1_offset, header.l1_entries, true).await?;
        self.count_snapshots().await?;
        self.count_refcount_structures().await?;
        let last = self.compare().await?;
        self.check_copied().await?;
        self.found.image_end_offset = (last + 1) * self.cluster;
        Ok(())
    }

    async fn table(&self, offset: u64, entries: u64) -> Result<Vec<u64>> {
        let bytes = disk::read_bytes(&**self.file, offset, (entries * 8) as usize).await?;
        let word = |word: &[u8]| u64::from_be_bytes(word.try_into().expect("8 bytes"));
        Ok(bytes.chunks_exact(8).map(word).collect())
    }

    /// Counts a reference to each cluster of a range of the file.
    fn refer(&mut self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        let range = ByteRange::new(offset, len);
        // The last cluster of the file need not be there in full.
        let inside = range.filter(|range| range.end() < self.file_len.saturating_add(self.cluster));
        let Some(range) = inside else {
            self.found.corrupt(format!(
                "{len} bytes at {offset:#x} are referred to, which lie past the end of the file"
            ));
            return;
        };
        for cluster in range.offset / self.cluster..=(range.end() - 1) / self.cluster {
            self.references.add(cluster);
        }
    }

    /// Counts what an L1 table and all that it leads to refer to. With `is_active`, the statistics
    /// are taken.
    async fn count_tables(&mut self, offset: u64, entries: u64, is_active: bool) -> Result<()> {
        self.refer(offset, entries * 8);
        let l1 =
            self.table(offset, entries).await.context(|| format!("L1 table at {offset:#x}"))?;
        let mut next = 0;
        for (index, entry) in l1.into_iter().enumerate().filter(|(_, entry)| *entry != 0) {
            if entry & L1_RESERVED != 0 {
                self.found.corrupt(format!("L1 entry {index} has reserved bits set: {entry:#x}"));
            }
            let l2_offset = entry & OFFSET;
            self.refer(l2_offset, self.cluster);
            if !l2_offset.is_multiple_of(self.cluster) {
                self.found.corrupt(format!(
                    "L1 entry {index}: the table at {l2_offset:#x} is not aligned to a cluster"
                ));
            }
            match self.table(l2_offset, self.cluster / 8).await {
                Ok(l2) => {
                    for entry in l2 {
                        self.count_entry(entry, is_active, &mut next);
                    }
                }
                Err(err) => self.found.unread(format!("L2 table at {l2_offset:#x}: {err}")),
            }
        }
        Ok(())
    }

    /// Counts what an L2 entry refers to. `next` is where the cluster would lie that follows the
    /// last one.
    fn count_entry(&mut self, mut entry: u64, is_active: bool, next: &mut u64) {
        if entry & COMPRESSED != 0 {
            if entry & COPIED != 0 {
                self.found.corrupt(format!("compressed L2 entry {entry:#x} has the copied flag"));
                entry &= !COPIED;
            }
            let offset_bits = 62 - (self.header.cluster_bits - 8);
            let offset = entry & ((1 << offset_bits) - 1);
            let sectors = ((entry & !COMPRESSED) >> offset_bits) + 1;
            self.refer(offset, sectors * 512 - offset % 512);
            if is_active {
                self.found.allocated_clusters += 1;
                self.found.compressed_clusters += 1;
                self.found.fragmented_clusters += 1;
            }
            return;
        }
        if entry & L2_RESERVED != 0 {
            self.found.corrupt(format!("L2 entry {entry:#x} has reserved bits set"));
        }
        let offset = entry & OFFSET;
        if offset == 0 {
            return;
        }
        if is_active {
            self.found.allocated_clusters += 1;
            if *next != 0 && offset != *next {
                self.found.fragmented_clusters += 1;
            }
            *next = offset + self.cluster;
        }
        if !offset.is_multiple_of(self.cluster) {
            let what = if entry & ZERO != 0 { "preallocated" } else { "data" };
            self.found.corrupt(format!("{what} cluster at {offset:#x} is not aligned"));
        }
        self.refer(offset, self.cluster);
    }

    async fn count_snapshots(&mut self) -> Result<()> {
        let (snapshots, table_len) = snapshots::read(self.file, self.header).await?;
        for (index, snapshot) in snapshots.iter().enumerate() {
            let (offset, entries) = (snapshot.l1_offset, snapshot.l1_entries);
            if !offset.is_multiple_of(self.cluster) || entries > 4 << 20 {
                self.found.corrupt(format!(
                    "snapshot {index}: its L1 table of {entries} entries at {offset:#x} is not \
                     aligned or too large"
                ));
                continue;
            }
            self.count_tables(offset, entries, false).await?;
        }
        self.refer(self.header.snapshots_offset, table_len);
        Ok(())
    }

    async fn count_refcount_structures(&mut self) -> Result<()> {
        let offset = self.header.reftable_offset;
        let entries = self.header.reftable_clusters * self.cluster / 8;
        self.refer(offset, entries * 8);
        let table = self.table(offset, entries).await.context(|| "refcount table")?;
        for (index, entry) in table.into_iter().enumerate() {
            let block = entry & !REFTABLE_RESERVED;
            let problem = if entry & REFTABLE_RESERVED != 0 {
                Some("has reserved bits set")
            } else if !block.is_multiple_of(self.cluster) {
                Some("is not aligned to a cluster")
            } else if block >= self.file_len.next_multiple_of(self.cluster) {
                Some("lies past the end of the file")
            } else {
                None
            };
            if let Some(problem) = problem {
                self.found.corrupt(format!("refcount block {index} at {entry:#x} {problem}"));
                self.reftable.push(0);
                continue;
            }
            self.reftable.push(block);
            if block == 0 {
                continue;
            }
            self.refer(block, self.cluster);
            let count = self.references.get(block / self.cluster);
            if count != 1 {
                self.found.corrupt(format!(
                    "refcount block {index} at {block:#x} has {count} references instead of one"
                ));
            }
        }
        Ok(())
    }

    /// How many refcounts a block holds.
    fn per_block(&self) -> u64 {
        (self.cluster * 8) >> self.header.refcount_order
    }

    /// The highest refcount there can be.
    fn max_count(&self) -> u64 {
        u64::MAX >> (64 - (1u64 << self.header.refcount_order))
    }

    /// The refcounts of block `index`; `None` if there is none.
    async fn block(&self, index: u64) -> Result<Option<Vec<u64>>> {
        let offset = self.reftable.get(index as usize).copied().unwrap_or(0);
        if offset == 0 {
            return Ok(None);
        }
        let bytes = disk::read_bytes(&**self.file, offset, self.cluster as usize).await?;
        let (order, bits) = (self.header.refcount_order, 1usize << self.header.refcount_order);
        let count = |i: usize| {
            let bit = i * bits;
            let bytes = &bytes[bit / 8..(bit / 8 + bits.div_ceil(8))];
            get_count(bytes, (bit % 8) as u64, order)
        };
        Ok(Some((0..self.per_block() as usize).map(count).collect()))
    }

    /// Compares references and refcounts; returns the last cluster in use.
    async fn compare(&mut self) -> Result<u64> {
        let clusters = self.file_len.div_ceil(self.cluster);
        let per_block = self.per_block();
        let mut last = 0;
        for index in 0..self.reftable.len() as u64 {
            let counts = match self.block(index).await {
                Ok(Some(counts)) => counts,
                Ok(None) => continue,
                Err(err) => {
                    self.found.unread(format!("refcount block {index}: {err}"));
                    continue;
                }
            };
            let first = index * per_block;
            for (cluster, count) in (first..clusters).zip(counts) {
                let references = self.references.get(cluster).min(self.max_count());
                if count > 0 || references > 0 {
                    last = last.max(cluster);
                }
                if count == references {
                    continue;
                }
                let text = format!("cluster {cluster} refcount={count} reference={references}");
                if count < references {
                    self.found.corrupt(text);
                } else {
                    self.found.leaks += 1;
                    self.found.say(format!("Leaked {text}"));
                }
            }
        }
        // What no block counts is free as far as the image knows.
        let block_of = |cluster: u64| self.reftable.get((cluster / per_block) as usize);
        let uncounted: Vec<u64> = (self.references.clusters())
            .filter(|cluster| block_of(*cluster).is_none_or(|block| *block == 0))
            .collect();
        for cluster in uncounted {
            last = last.max(cluster);
            let references = self.references.get(cluster);
            self.found.corrupt(format!("cluster {cluster} refcount=0 reference={references}"));
        }
        Ok(last)
    }

    /// Checks that the copied flag stands exactly where the refcount is one.
    async fn check_copied(&mut self) -> Result<()> {
        let (offset, entries) = (self.header.l1_offset, self.header.l1_entries);
        let mut counts = Counts::default();
        for (index, entry) in self.table(offset, entries).await?.into_iter().enumerate() {
            let l2_offset = entry & OFFSET;
            if l2_offset == 0 {
                continue;
            }
            if let Some(count) = counts.get(self, l2_offset).await
                && (count == 1) != (entry & COPIED != 0)
            {
                self.found.corrupt(format!(
                    "L1 entry {index} {entry:#x}: copied flag and refcount {count} disagree"
                ));
            }
            // That it cannot be read was said before.
            let Ok(l2) = self.table(l2_offset, self.cluster / 8).await else { continue };
            for entry in l2 {
                let offset = entry & OFFSET;
                if entry & COMPRESSED != 0 || offset == 0 {
                    continue;
                }
                if let Some(count) = counts.get(self, offset).await
                    && (count == 1) != (entry & COPIED != 0)
                {
                    self.found.corrupt(format!(
                        "L2 entry {entry:#x}: copied flag and refcount {count} disagree"
                    ));
                }
            }
        }
        Ok(())
    }
}

/// The refcount block looked at last: neighbours come in a row.
#[derive(Default)]
struct Counts {
    block: Option<(u64, Option<Vec<u64>>)>,
}

impl Counts {
    /// The refcount of the cluster at `offset`; `None` if it cannot be read.
    async fn get(&mut self, check: &Check<'_>, offset: u64) -> Option<u64> {
        let cluster = offset / check.cluster;
        let index = cluster / check.per_block();
        if self.block.as_ref().is_none_or(|(number, _)| *number != index) {
            self.block = Some((index, check.block(index).await.ok()?));
        }
        let (_, counts) = self.block.as_ref()?;
        Some(counts.as_ref().map_or(0, |counts| counts[(cluster % check.per_block()) as usize]))
    }
}
