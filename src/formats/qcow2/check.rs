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
    if header.bitmaps.is_some() {
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
    /// Offsets of the refcount blocks, 0 where there is none.
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
                    let mut next = 0;
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
            self.reftable.push(block);
            if let Some(problem) = problem {
                self.found.corrupt(format!("refcount block {index} at {entry:#x} {problem}"));
                continue;
            }
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
        if !offset.is_multiple_of(self.cluster) {
            return Err(Error::corrupt(format!("{offset:#x} is not aligned to a cluster")));
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
        // Refcounts of what lies past the end of the file do not matter.
        let blocks = clusters.div_ceil(per_block).min(self.reftable.len() as u64);
        for index in 0..blocks {
            let first = index * per_block;
            let counts = match self.block(index).await {
                Ok(Some(counts)) => counts,
                Ok(None) => continue,
                Err(err) => {
                    self.found.unread(format!("refcount block {index}: {err}"));
                    // One for each cluster whose refcount is not known.
                    let unknown = clusters.saturating_sub(first).min(per_block);
                    self.found.check_errors += unknown.saturating_sub(1);
                    continue;
                }
            };
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::path::Path;

    use super::*;
    use crate::formats::qcow2::tests::qemu;
    use crate::io::sim::Rng;
    use crate::io::{HostFile, OpenOptions, block_on};

    fn check_file(path: &Path) -> Result<Found> {
        let file: Arc<dyn File> = Arc::new(HostFile::open(path, OpenOptions::default())?);
        block_on(check(&file))
    }

    /// Runs a tool of QEMU's on the image; `false` if it is not installed.
    fn run(tool: &str, args: &[&str], path: &Path) -> bool {
        let Some(mut command) = qemu(tool) else { return false };
        let output = command.args(args).arg(path).output().unwrap();
        assert!(output.status.success(), "{tool} {args:?}: {output:?}");
        true
    }

    /// What qemu-img says, in our terms; `None` if it cannot check the image either.
    fn theirs(path: &Path) -> Option<Found> {
        let mut command = qemu("qemu-img")?;
        // -U, so that it does not mark the image corrupt.
        let args = ["check", "-U", "-f", "qcow2", "--output=json"];
        let output = command.args(args).arg(path).output().unwrap();
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
        let field = |name: &str| json[name].as_u64().unwrap_or(0);
        Some(Found {
            image_end_offset: field("image-end-offset"),
            total_clusters: field("total-clusters"),
            allocated_clusters: field("allocated-clusters"),
            fragmented_clusters: field("fragmented-clusters"),
            compressed_clusters: field("compressed-clusters"),
            check_errors: field("check-errors"),
            corruptions: field("corruptions"),
            leaks: field("leaks"),
            findings: Vec::new(),
        })
    }

    #[track_caller]
    fn agree(path: &Path, what: &str) -> Found {
        let ours = check_file(path).unwrap();
        let findings = ours.findings.clone();
        let without = Found { findings: Vec::new(), ..ours.clone() };
        assert_eq!(Some(without), theirs(path), "{what}: {findings:#?}");
        ours
    }

    /// An image with data of every kind; `None` without QEMU's tools.
    fn image(dir: &Path, options: &str) -> Option<std::path::PathBuf> {
        let path = dir.join("image");
        let _ = std::fs::remove_file(&path);
        let file = path.to_str().unwrap();
        let made = qemu("qemu-img")?
            .args(["create", "-q", "-f", "qcow2", "-o", options, file, "8M"])
            .status();
        assert!(made.unwrap().success());
        let writes = ["-c", "write 0 700k", "-c", "write -c 2M 2M", "-c", "write -z 4M 64k"];
        run("qemu-io", &[&["-f", "qcow2"], &writes[..]].concat(), &path).then_some(())?;
        run("qemu-img", &["snapshot", "-q", "-c", "one"], &path);
        run("qemu-io", &["-f", "qcow2", "-c", "write 64k 300k", "-c", "write 6M 4k"], &path);
        Some(path)
    }

    #[test]
    fn sound_images_are_sound() {
        let dir = tempfile::tempdir().unwrap();
        for options in [
            "cluster_size=64k",
            "cluster_size=4k",
            "cluster_size=512",
            "cluster_size=2M",
            "cluster_size=4k,refcount_bits=1",
            "cluster_size=4k,refcount_bits=64",
            "compat=0.10",
        ] {
            // A refcount of one bit leaves no room for a snapshot.
            let Some(path) = (match options.contains("bits=1") {
                false => image(dir.path(), options),
                true => {
                    let path = dir.path().join("narrow");
                    let create = ["create", "-q", "-f", "qcow2", "-o", options];
                    let Some(mut command) = qemu("qemu-img") else { return };
                    assert!(command.args(create).arg(&path).arg("8M").status().unwrap().success());
                    run("qemu-io", &["-f", "qcow2", "-c", "write 5000k 1M"], &path);
                    Some(path)
                }
            }) else {
                return;
            };
            let found = agree(&path, options);
            assert_eq!((found.corruptions, found.leaks, found.check_errors), (0, 0, 0));
            assert!(found.allocated_clusters > 0);
        }
    }

    #[test]
    fn damage_is_counted_as_qemu_img_counts_it() {
        let dir = tempfile::tempdir().unwrap();
        let Some(path) = image(dir.path(), "cluster_size=4k") else { return };
        let sound = std::fs::read(&path).unwrap();
        let word = |at: usize| u64::from_be_bytes(sound[at..at + 8].try_into().unwrap());
        let cluster = 4096;
        let l1 = word(40) as usize;
        let l2 = (word(l1) & OFFSET) as usize;
        let reftable = word(48) as usize;
        let block = word(reftable) as usize;
        let patch = |at: usize, bytes: &[u8]| {
            std::fs::write(&path, &sound).unwrap();
            let file = std::fs::File::options().write(true).open(&path).unwrap();
            file.write_all_at(bytes, at as u64).unwrap();
        };
        let flipped = |at: usize, bits: u64| (word(at) ^ bits).to_be_bytes();

        // Past the last cluster in use, inside of the file: a leak.
        let free = (0..cluster / 2).find(|i| sound[block + 2 * i..][..2] == [0, 0]).unwrap();
        patch(block + 2 * free, &[0, 1]);
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_len(((free + 1) * cluster) as u64).unwrap();
        let found = agree(&path, "leak");
        assert_eq!((found.corruptions, found.leaks), (0, 1));
        // In use, but free: may be given out again.
        patch(block + 2 * (l2 / cluster), &[0, 0]);
        assert!(agree(&path, "in use but free").corruptions > 0);
        // Two entries for one cluster.
        patch(l2 + 8, &word(l2).to_be_bytes());
        assert!(agree(&path, "shared cluster").corruptions > 0);
        for (what, at, bits) in [
            ("copied flag of L2", l2, COPIED),
            ("copied flag of L1", l1, COPIED),
            ("reserved bit of L2", l2, 4),
            ("reserved bit of L1", l1, 1 << 60),
            ("unaligned data", l2, 512),
            ("data past the end", l2, 1 << 40),
            ("table past the end", l1, 1 << 40),
            ("block past the end", reftable, 1 << 40),
            ("unaligned block", reftable, 512),
            ("reserved bit of the refcount table", reftable, 1),
        ] {
            patch(at, &flipped(at, bits));
            assert!(agree(&path, what).corruptions > 0, "{what}");
        }
        std::fs::write(&path, &sound).unwrap();
        assert_eq!(agree(&path, "as it was").corruptions, 0);
    }

    /// Random bits of metadata: the same verdict as qemu-img's, and no panic.
    #[test]
    fn random_damage_gets_the_same_verdict() {
        let dir = tempfile::tempdir().unwrap();
        let Some(path) = image(dir.path(), "cluster_size=4k") else { return };
        let sound = std::fs::read(&path).unwrap();
        let word = |at: usize| u64::from_be_bytes(sound[at..at + 8].try_into().unwrap());
        let (l1, reftable) = (word(40), word(48));
        let targets = [(0, 104), (l1, 32), (word(l1 as usize) & OFFSET, 512), (reftable, 16)]
            .into_iter()
            .chain([(word(reftable as usize), 512)])
            .collect::<Vec<_>>();
        for seed in 0..200 {
            let mut rng = Rng::new(seed);
            let mut damaged = sound.clone();
            for _ in 0..1 + rng.below(3) {
                let (at, len) = targets[rng.below(targets.len() as u64) as usize];
                let byte = (at + rng.below(len)) as usize;
                damaged[byte] ^= 1 << rng.below(8);
            }
            std::fs::write(&path, &damaged).unwrap();
            let ours = check_file(&path);
            let Ok(ours) = ours else { continue };
            let Some(theirs) = theirs(&path) else { continue };
            let any = |count: u64| count > 0;
            let verdict =
                |found: &Found| [found.corruptions, found.leaks, found.check_errors].map(any);
            assert_eq!(verdict(&ours), verdict(&theirs), "seed {seed}: {:#?}", ours.findings);
        }
    }
}
