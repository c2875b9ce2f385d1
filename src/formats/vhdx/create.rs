//! Making new images, laid out as Hyper-V does.
//!
//! ```text
//! 0      identifier, headers, region tables
//! 1 MiB  log, empty
//!  …     metadata: parameters, sizes, identity, parent locator
//!  …     BAT
//!  …     payload blocks (fixed images only), one after the other
//! ```
//!
//! Everything else is durable before the headers and the identifier are written, so that a file
//! whose creation was cut short is not taken for an image. A fixed image has all its blocks, as
//! holes of the file.

use std::sync::Arc;

use zerocopy::IntoBytes;

use super::Structure;
use super::disk;
use super::geometry::{Geometry, Slot};
use super::header::Header;
use super::layout::{
    BLOCK_SIZES, CREATOR_LEN, FILE_SIGNATURE, FIRST_ALLOCATION, Guid, HEADER_OFFSETS,
    MAX_DISK_SIZE, MAX_LOG_LEN, MAX_METADATA_ENTRIES, MAX_METADATA_LEN, METADATA_IS_DISK,
    METADATA_IS_REQUIRED, METADATA_IS_USER, METADATA_ITEMS, METADATA_SIGNATURE, PAGE,
    PARAMETERS_FIXED, PARAMETERS_HAS_PARENT, REGION_TABLE_OFFSETS, RawMetadataEntry,
    RawMetadataHeader, guid, payload,
};
use super::locator::Locator;
use super::region::{self, Region};
use crate::error::{Error, Result, ResultExt};
use crate::io::File;
use crate::units::{ByteRange, MIB, align_down, align_up};

/// Size of the log, if nobody says otherwise.
pub const DEFAULT_LOG_SIZE: u64 = MIB;
/// How much of the BAT is written at once, in bytes.
const CHUNK: u64 = MIB;
/// What the file says made it.
const CREATOR: &str = concat!("vublk ", env!("CARGO_PKG_VERSION"));

/// What to create.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Size of the disk, a multiple of the logical sector size.
    pub size: u64,
    /// Size of a payload block, a power of two.
    pub block_size: u64,
    /// Size of the log, a multiple of 1 MiB.
    pub log_size: u64,
    /// Whether all blocks are there from the start.
    pub is_fixed: bool,
    /// Whether absent blocks are said to be zeros instead of never written. Both read as zeros,
    /// in images without a parent.
    pub block_state_zero: bool,
    /// Size of a logical sector, 512 or 4096.
    pub logical_sector: u64,
    /// Size of a physical sector, 512 or 4096.
    pub physical_sector: u64,
    /// What the image stands on.
    pub parent: Option<Parent>,
}

/// What a new differencing image takes from its parent.
#[derive(Clone, Debug)]
pub struct Parent {
    /// How to find it, and which it is.
    pub locator: Locator,
    /// Metadata items that describe the disk, with their flags: they go to children.
    pub items: Vec<(Guid, u32, Vec<u8>)>,
}

impl Parent {
    /// Reads from an image what its child needs. `relative` is the parent's path from the child's
    /// directory, `absolute` its path on this host.
    ///
    /// # Errors
    /// If a path is too long for the format, or the parent cannot be read.
    pub async fn of(parent: &Structure, relative: &str, absolute: &str) -> Result<Parent> {
        let linkage = format!("{{{}}}", parent.headers.current.data_write_guid);
        let mut relative = relative.replace('/', "\\");
        if !relative.starts_with("..\\") {
            relative.insert_str(0, ".\\");
        }
        let entries = [
            ("parent_linkage", linkage.as_str()),
            ("parent_linkage2", "{00000000-0000-0000-0000-000000000000}"),
            ("relative_path", &relative),
            ("absolute_win32_path", absolute),
        ];
        for (_, value) in entries {
            if value.encode_utf16().count() > usize::from(u16::MAX / 2) {
                return Err(Error::invalid(format!(
                    "the parent's path has {} characters, too many for a parent locator",
                    value.len()
                )));
            }
        }
        let own = |(key, value): (&str, &str)| (key.to_string(), value.to_string());
        let locator = Locator { entries: entries.map(own).to_vec() };
        let mut items = Vec::new();
        for item in &parent.metadata.items {
            let is_own = item.flags & METADATA_IS_USER == 0 && OWN_ITEMS.contains(&item.guid);
            let goes_on = item.flags & METADATA_IS_DISK != 0 || item.guid == guid::PAGE_83;
            if !goes_on || is_own {
                continue;
            }
            let start = align_down(item.range.offset, PAGE);
            let end = align_up(item.range.end(), PAGE).unwrap_or(start);
            let bytes = disk::read(&parent.file, start, end - start).await?;
            let from = (item.range.offset - start) as usize;
            let content = bytes[from..from + item.range.len as usize].to_vec();
            items.push((item.guid, item.flags, content));
        }
        Ok(Parent { locator, items })
    }
}

/// Items that each image writes by itself. (The identity goes to children as it is.)
const OWN_ITEMS: [Guid; 3] = [guid::DISK_SIZE, guid::LOGICAL_SECTOR, guid::PHYSICAL_SECTOR];

/// What the block size is if nobody says: as Windows has it.
pub fn default_block_size(is_fixed: bool, has_parent: bool) -> u64 {
    if is_fixed || has_parent { 2 * MIB } else { 32 * MIB }
}

impl CreateOptions {
    /// An image of this size with all else as usual.
    pub fn new(size: u64) -> CreateOptions {
        CreateOptions {
            size,
            block_size: default_block_size(false, false),
            log_size: DEFAULT_LOG_SIZE,
            is_fixed: false,
            block_state_zero: false,
            logical_sector: 512,
            physical_sector: 4096,
            parent: None,
        }
    }

    /// Checks the options against each other and the format.
    ///
    /// # Errors
    /// Says what is allowed.
    pub fn check(&self) -> Result<()> {
        let blocks = u64::from(*BLOCK_SIZES.start())..=u64::from(*BLOCK_SIZES.end());
        if !blocks.contains(&self.block_size) || !self.block_size.is_power_of_two() {
            return Err(Error::invalid(format!(
                "a block size of {} is not a power of two from 1M to 256M",
                self.block_size
            )));
        }
        let log = self.log_size;
        if log == 0 || log > MAX_LOG_LEN || !log.is_multiple_of(MIB) {
            return Err(Error::invalid(format!(
                "a log size of {log} is not a multiple of 1M up to 1G"
            )));
        }
        for (name, size) in [("logical", self.logical_sector), ("physical", self.physical_sector)] {
            if size != 512 && size != 4096 {
                return Err(Error::invalid(format!(
                    "a {name} sector size of {size} is neither 512 nor 4096"
                )));
            }
        }
        if self.size == 0 || self.size > MAX_DISK_SIZE {
            return Err(Error::invalid(format!(
                "a size of {} bytes cannot be: VHDX allows from one sector ({}) to 64T",
                self.size, self.logical_sector
            )));
        }
        if !self.size.is_multiple_of(self.logical_sector) {
            return Err(Error::invalid(format!(
                "a size of {} bytes is not a multiple of the logical sector size of {}",
                self.size, self.logical_sector
            )));
        }
        if self.parent.is_some() && self.is_fixed {
            return Err(Error::invalid("a fixed image cannot have a backing file"));
        }
        if self.parent.is_some() && self.block_state_zero {
            return Err(Error::invalid(
                "block_state_zero would hide all of the backing file; leave it out",
            ));
        }
        if self.is_fixed && self.block_state_zero {
            return Err(Error::invalid("a fixed image has no absent blocks (block_state_zero)"));
        }
        Ok(())
    }

    fn geometry(&self) -> Geometry {
        Geometry::of(self.size, self.block_size, self.logical_sector, self.parent.is_some())
    }

    /// Lays out the file.
    fn plan(&self) -> Result<Layout> {
        self.check()?;
        let metadata = self.metadata()?;
        let log = ByteRange { offset: FIRST_ALLOCATION, len: self.log_size };
        let whole = |len: u64| len.next_multiple_of(MIB);
        let metadata_len = whole(metadata.len() as u64);
        if metadata_len > u64::from(MAX_METADATA_LEN) {
            return Err(Error::unsupported(format!(
                "the metadata that goes with the backing file's disk takes {metadata_len} bytes, \
                 more than {MAX_METADATA_LEN}"
            )));
        }
        let metadata_range = ByteRange { offset: log.end(), len: metadata_len };
        let bat_len = whole(self.geometry().bat_entries() * 8);
        let bat = ByteRange { offset: metadata_range.end(), len: bat_len };
        Ok(Layout { log, metadata_range, metadata, bat })
    }

    /// The content of the metadata region.
    fn metadata(&self) -> Result<Vec<u8>> {
        let (system, of_disk) = (METADATA_IS_REQUIRED, METADATA_IS_REQUIRED | METADATA_IS_DISK);
        let mut flags = if self.is_fixed { PARAMETERS_FIXED } else { 0 };
        flags |= if self.parent.is_some() { PARAMETERS_HAS_PARENT } else { 0 };
        let parameters = [(self.block_size as u32).to_le_bytes(), flags.to_le_bytes()].concat();
        let sector = |size: u64| (size as u32).to_le_bytes().to_vec();
        let mut items = vec![
            (guid::FILE_PARAMETERS, system, parameters),
            (guid::DISK_SIZE, of_disk, self.size.to_le_bytes().to_vec()),
            (guid::LOGICAL_SECTOR, of_disk, sector(self.logical_sector)),
            (guid::PHYSICAL_SECTOR, of_disk, sector(self.physical_sector)),
        ];
        let inherited = self.parent.iter().flat_map(|parent| parent.items.iter().cloned());
        items.extend(inherited);
        if !items.iter().any(|(id, ..)| *id == guid::PAGE_83) {
            items.push((guid::PAGE_83, of_disk, Guid::random().0.to_vec()));
        }
        if let Some(parent) = &self.parent {
            items.push((guid::PARENT_LOCATOR, system, parent.locator.encode()));
        }
        if items.len() > usize::from(MAX_METADATA_ENTRIES) {
            return Err(Error::unsupported(format!(
                "{} items of metadata go with the backing file's disk; {MAX_METADATA_ENTRIES} fit",
                items.len()
            )));
        }
        Ok(encode_metadata(&items))
    }
}

/// The table of the metadata region and its items, one behind the other.
fn encode_metadata(items: &[(Guid, u32, Vec<u8>)]) -> Vec<u8> {
    let header = RawMetadataHeader {
        signature: *METADATA_SIGNATURE,
        reserved: 0.into(),
        entry_count: (items.len() as u16).into(),
        reserved2: [0; 20],
    };
    let mut table = header.as_bytes().to_vec();
    let mut content = Vec::new();
    for (id, flags, bytes) in items {
        let offset = match bytes.is_empty() {
            true => 0,
            false => METADATA_ITEMS + content.len() as u32,
        };
        let entry = RawMetadataEntry {
            guid: *id,
            offset: offset.into(),
            length: (bytes.len() as u32).into(),
            flags: (*flags).into(),
            reserved: 0.into(),
        };
        table.extend_from_slice(entry.as_bytes());
        content.extend_from_slice(bytes);
    }
    table.resize(METADATA_ITEMS as usize, 0);
    table.extend(content);
    table.resize(table.len().next_multiple_of(PAGE as usize), 0);
    table
}

/// Where things go in a new file.
struct Layout {
    log: ByteRange,
    metadata_range: ByteRange,
    metadata: Vec<u8>,
    bat: ByteRange,
}

/// How large the file of a new image would be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Before the first block is written.
    pub empty: u64,
    /// With all blocks.
    pub full: u64,
}

/// Says how large the file of a new image would be.
///
/// # Errors
/// If there can be no such image.
pub fn measure(options: &CreateOptions) -> Result<Size> {
    let end = options.plan()?.bat.end();
    let geometry = options.geometry();
    let blocks = geometry.payload_blocks() * geometry.block_size();
    let bitmaps = if geometry.has_parent { geometry.chunks() * MIB } else { 0 };
    let full = end + blocks + bitmaps;
    Ok(Size { empty: if options.is_fixed { full } else { end }, full })
}

/// Writes a new image into an empty file; durable on return.
///
/// # Errors
/// Names the file and the step. What was written by then is not an image.
pub async fn create(file: &Arc<dyn File>, options: &CreateOptions) -> Result<()> {
    let layout = options.plan()?;
    write_all(file, options, &layout).await.context(|| file.name().to_string())
}

async fn write_all(file: &Arc<dyn File>, options: &CreateOptions, layout: &Layout) -> Result<()> {
    let len = measure(options)?;
    file.set_len(len.empty).await.context(|| format!("making it {} bytes long", len.empty))?;
    write_bat(file, options, layout.bat).await.context(|| "writing the BAT")?;
    disk::write(file, layout.metadata_range.offset, &layout.metadata)
        .await
        .context(|| "writing the metadata")?;
    let regions = [
        Region { guid: guid::BAT_REGION, range: layout.bat, required: true },
        Region { guid: guid::METADATA_REGION, range: layout.metadata_range, required: true },
    ];
    for offset in REGION_TABLE_OFFSETS {
        disk::write(file, offset, &region::encode(&regions)).await?;
    }
    file.flush().await?;
    let header = Header {
        sequence: 1,
        file_write_guid: Guid::random(),
        data_write_guid: Guid::random(),
        log_guid: Guid::ZERO,
        log: layout.log,
    };
    for (sequence, offset) in (1..).zip(HEADER_OFFSETS) {
        disk::write(file, offset, &Header { sequence, ..header }.encode()).await?;
    }
    file.flush().await?;
    disk::write(file, 0, &identifier()).await?;
    file.flush().await
}

/// The file identifier.
pub(super) fn identifier() -> Vec<u8> {
    let mut bytes = FILE_SIGNATURE.to_vec();
    bytes.extend(CREATOR.encode_utf16().flat_map(u16::to_le_bytes).take(CREATOR_LEN - 2));
    bytes.resize(PAGE as usize, 0);
    bytes
}

/// Writes those entries of a new BAT that are not zero.
async fn write_bat(file: &Arc<dyn File>, options: &CreateOptions, bat: ByteRange) -> Result<()> {
    let geometry = options.geometry();
    let entry = |index: u64| match geometry.slot(index) {
        Slot::Payload(block) if options.is_fixed => {
            let offset = bat.end() + block * geometry.block_size();
            offset | payload::FULLY_PRESENT
        }
        Slot::Payload(_) if options.block_state_zero => payload::ZERO,
        _ => 0,
    };
    if !options.is_fixed && !options.block_state_zero {
        // The file is new, and so the BAT is zeros already.
        return Ok(());
    }
    let entries = geometry.bat_entries();
    for first in (0..entries).step_by((CHUNK / 8) as usize) {
        let last = entries.min(first + CHUNK / 8);
        let mut bytes: Vec<u8> = (first..last).flat_map(|at| entry(at).to_le_bytes()).collect();
        bytes.resize(bytes.len().next_multiple_of(PAGE as usize), 0);
        disk::write(file, bat.offset + first * 8, &bytes).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::{OpenOptions, Vhdx};
    use super::*;
    use crate::block::{ExtentKind, Format};
    use crate::io::block_on;
    use crate::io::sim::SimFile;
    use crate::units::{GIB, TIB};

    fn created(options: &CreateOptions) -> (SimFile, Arc<dyn File>) {
        let sim = SimFile::from_bytes("new.vhdx", Vec::new());
        let file: Arc<dyn File> = Arc::new(sim.clone());
        block_on(create(&file, options)).unwrap();
        (sim, file)
    }

    fn opened(file: &Arc<dyn File>) -> Vhdx {
        let structure = block_on(Structure::read(file)).unwrap();
        block_on(Vhdx::open(structure, OpenOptions { read_only: true, ..Default::default() }))
            .unwrap()
    }

    #[test]
    fn layouts_are_those_of_hyper_v() {
        let options =
            CreateOptions { is_fixed: true, block_size: 2 * MIB, ..CreateOptions::new(10 * MIB) };
        let (_, file) = created(&options);
        // As Windows makes it, byte for byte in length.
        assert_eq!(file.len().unwrap(), 14_680_064);
        let image = opened(&file);
        let regions = image.structure().regions;
        assert_eq!(regions.metadata, ByteRange { offset: 2 * MIB, len: MIB });
        assert_eq!(regions.bat, ByteRange { offset: 3 * MIB, len: MIB });
        assert_eq!(image.structure().headers.current.sequence, 2);
        assert_eq!(image.structure().headers.valid, [true; 2]);
        assert!(image.structure().metadata.is_fixed);
        let whole = ByteRange { offset: 0, len: 10 * MIB };
        let extent = block_on(image.map(whole)).unwrap();
        assert_eq!(extent.range, whole);
        assert!(matches!(extent.kind, ExtentKind::Data { offset: 4_194_304, .. }));
    }

    #[test]
    fn all_sizes_open_again() {
        let sizes = [(512, MIB, 512), (5 * GIB, 256 * MIB, 512), (9 * GIB, MIB, 4096)];
        for (size, block_size, logical_sector) in sizes {
            for block_state_zero in [false, true] {
                let options = CreateOptions {
                    block_size,
                    logical_sector,
                    block_state_zero,
                    log_size: 3 * MIB,
                    ..CreateOptions::new(size)
                };
                let (_, file) = created(&options);
                assert_eq!(file.len().unwrap(), measure(&options).unwrap().empty);
                let image = opened(&file);
                assert_eq!(image.limits().size, size);
                assert_eq!(image.structure().headers.current.log.len, 3 * MIB);
                let last = ByteRange { offset: size - logical_sector, len: logical_sector };
                let extent = block_on(image.map(last)).unwrap();
                let ExtentKind::Zero { explicit } = extent.kind else { panic!("{extent:?}") };
                assert_eq!(explicit, block_state_zero);
            }
        }
    }

    #[test]
    fn entries_of_bitmaps_stay_zero_past_4_gib() {
        let options = CreateOptions {
            block_size: 256 * MIB,
            block_state_zero: true,
            ..CreateOptions::new(5 * GIB)
        };
        let (_, file) = created(&options);
        let bytes = block_on(disk::read(&file, 3 * MIB, PAGE)).unwrap();
        let entries: Vec<_> = bytes.chunks_exact(8).map(|entry| entry[0]).collect();
        assert_eq!((entries[15], entries[16], entries[17]), (2, 0, 2));
        assert_eq!((entries[20], entries[21]), (2, 0));
    }

    #[test]
    fn a_creation_cut_short_is_no_image_or_a_whole_one() {
        let options =
            CreateOptions { is_fixed: true, block_size: MIB, ..CreateOptions::new(3 * MIB) };
        // Each operation that might be the last.
        for after in 0..20 {
            let sim = SimFile::from_bytes("new.vhdx", Vec::new());
            let fault = crate::io::sim::Fault { op: None, after, errno: 5, for_good: true };
            sim.fail(fault);
            let file: Arc<dyn File> = Arc::new(sim.clone());
            let result = block_on(create(&file, &options));
            for seed in 0..5 {
                let left = SimFile::from_bytes("left.vhdx", sim.power_cut(seed));
                let left: Arc<dyn File> = Arc::new(left);
                match block_on(Structure::read(&left)) {
                    Ok(_) => {
                        let image = opened(&left);
                        assert_eq!(image.limits().size, 3 * MIB);
                    }
                    Err(err) => assert!(result.is_err(), "{err}"),
                }
            }
        }
    }

    #[test]
    fn what_the_format_does_not_have_is_refused() {
        let refused = |change: fn(&mut CreateOptions), words: &str| {
            let mut options = CreateOptions::new(GIB);
            change(&mut options);
            let err = options.check().unwrap_err().to_string();
            assert!(err.contains(words), "{err}");
        };
        refused(|o| o.block_size = 3 * MIB, "a power of two from 1M to 256M");
        refused(|o| o.block_size = 512 << 20, "a power of two from 1M to 256M");
        refused(|o| o.log_size = 0, "a multiple of 1M");
        refused(|o| o.log_size = MIB + 512, "a multiple of 1M");
        refused(|o| o.log_size = 2 * GIB, "a multiple of 1M");
        refused(|o| o.logical_sector = 1024, "neither 512 nor 4096");
        refused(|o| o.physical_sector = 0, "neither 512 nor 4096");
        refused(|o| o.size = 0, "from one sector");
        refused(|o| o.size = 65 * TIB, "64T");
        refused(|o| (o.size, o.logical_sector) = (512, 4096), "not a multiple of the logical");
        refused(|o| (o.is_fixed, o.block_state_zero) = (true, true), "no absent blocks");
    }

    #[test]
    fn sizes_are_told_without_a_file() {
        let size = measure(&CreateOptions::new(64 * TIB)).unwrap();
        assert_eq!(size.empty, 4 * MIB + 16 * MIB, "2 Mi blocks, their bitmaps' slots");
        assert_eq!(size.full, size.empty + 64 * TIB);
    }
}
