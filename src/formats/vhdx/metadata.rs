//! The metadata region: a table and the items it points to.

use std::sync::Arc;

use zerocopy::FromBytes;

use super::disk;
use super::layout::{
    BLOCK_SIZES, Guid, MAX_DISK_SIZE, MAX_METADATA_ENTRIES, MAX_METADATA_ITEM, MAX_METADATA_LEN,
    METADATA_IS_REQUIRED, METADATA_IS_USER, METADATA_ITEMS, METADATA_SIGNATURE, PAGE,
    PARAMETERS_FIXED, PARAMETERS_HAS_PARENT, RawMetadataEntry, RawMetadataHeader, guid,
};
use super::locator::Locator;
use crate::error::{Error, Result, ResultExt};
use crate::io::File;
use crate::units::{ByteRange, align_down, align_up};

/// The most entries that belong to the user.
const MAX_USER_ENTRIES: usize = 1024;

/// An entry of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Item {
    /// What it is.
    pub guid: Guid,
    /// Where it is in the file; empty if it has no content.
    pub range: ByteRange,
    /// `METADATA_IS_…`.
    pub flags: u32,
}

/// What the metadata says of the disk.
#[derive(Clone, Debug)]
pub struct Metadata {
    /// All items, in the order of the table.
    pub items: Vec<Item>,
    /// Size of a payload block.
    pub block_size: u64,
    /// Whether blocks stay allocated (a fixed image).
    pub is_fixed: bool,
    /// Size of the disk.
    pub disk_size: u64,
    /// Size of a logical sector, 512 or 4096.
    pub logical_sector: u64,
    /// Size of a physical sector, 512 or 4096.
    pub physical_sector: u64,
    /// The disk's identity on SCSI.
    pub page_83: Option<Guid>,
    /// How to find the parent; there is one if and only if the image is differencing.
    pub parent: Option<Locator>,
}

impl Metadata {
    /// Reads and checks the metadata region.
    ///
    /// # Errors
    /// Names the item, what it says and what is allowed.
    pub async fn read(file: &Arc<dyn File>, region: ByteRange) -> Result<Metadata> {
        if region.len > u64::from(MAX_METADATA_LEN) {
            return Err(Error::corrupt(format!(
                "the metadata region has {} bytes; no more than {MAX_METADATA_LEN} are believed",
                region.len
            )));
        }
        let table = disk::read(file, region.offset, u64::from(METADATA_ITEMS)).await?;
        let items = parse_table(&table, region).context(|| "metadata table")?;
        let reader = Reader { file, items: &items };
        let parameters = reader.fixed::<8>(guid::FILE_PARAMETERS, "file parameters").await?;
        let block_size = u32_at(&parameters, 0);
        let flags = u32_at(&parameters, 4);
        if !BLOCK_SIZES.contains(&block_size) || !block_size.is_power_of_two() {
            return Err(Error::corrupt(format!(
                "block size {block_size} is not a power of two from 1 MiB to 256 MiB"
            )));
        }
        if flags & !(PARAMETERS_FIXED | PARAMETERS_HAS_PARENT) != 0 {
            return Err(Error::unsupported(format!("unknown file parameters {flags:#x}")));
        }
        let logical_sector = reader.sector(guid::LOGICAL_SECTOR, "logical sector size").await?;
        let physical_sector = reader.sector(guid::PHYSICAL_SECTOR, "physical sector size").await?;
        let disk_size =
            u64::from_le_bytes(reader.fixed::<8>(guid::DISK_SIZE, "virtual disk size").await?);
        check_disk_size(disk_size, logical_sector)?;
        let page_83 = match reader.find(guid::PAGE_83) {
            Some(_) => Some(Guid(reader.fixed::<16>(guid::PAGE_83, "page 83 data").await?)),
            None => None,
        };
        let parent = match flags & PARAMETERS_HAS_PARENT != 0 {
            true => Some(reader.locator().await?),
            false => None,
        };
        Ok(Metadata {
            block_size: block_size.into(),
            is_fixed: flags & PARAMETERS_FIXED != 0,
            disk_size,
            logical_sector,
            physical_sector,
            page_83,
            parent,
            items,
        })
    }
}

/// Checks that a disk may have this size.
///
/// # Errors
/// Says what sizes there are.
pub fn check_disk_size(size: u64, logical_sector: u64) -> Result<()> {
    if size == 0 || size > MAX_DISK_SIZE || !size.is_multiple_of(logical_sector) {
        return Err(Error::corrupt(format!(
            "virtual disk size {size} is not a multiple of {logical_sector} from one sector to 64 \
             TiB"
        )));
    }
    Ok(())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

fn parse_table(table: &[u8], region: ByteRange) -> Result<Vec<Item>> {
    let Ok((header, rest)) = RawMetadataHeader::ref_from_prefix(table) else {
        return Err(Error::corrupt("too short"));
    };
    if header.signature != *METADATA_SIGNATURE {
        return Err(Error::corrupt(format!(
            "at {}: has the signature {:02x?} instead of \"metadata\"",
            region.offset, header.signature
        )));
    }
    let count = header.entry_count.get();
    if count > MAX_METADATA_ENTRIES {
        return Err(Error::corrupt(format!("{count} entries; {MAX_METADATA_ENTRIES} fit")));
    }
    let Ok((entries, _)) = <[RawMetadataEntry]>::ref_from_prefix_with_elems(rest, count.into())
    else {
        return Err(Error::corrupt("shorter than its entries"));
    };
    let items = entries.iter().map(|entry| item(entry, region)).collect::<Result<Vec<_>>>()?;
    check_items(&items)?;
    Ok(items)
}

fn item(entry: &RawMetadataEntry, region: ByteRange) -> Result<Item> {
    let (offset, length) = (entry.offset.get(), entry.length.get());
    let flags = entry.flags.get();
    let id = entry.guid;
    if flags & METADATA_IS_USER != 0 && flags & METADATA_IS_REQUIRED != 0 {
        return Err(Error::corrupt(format!("item {id} is the user's, but required")));
    }
    if length == 0 && offset == 0 {
        return Ok(Item { guid: id, range: ByteRange::default(), flags });
    }
    let end = u64::from(offset) + u64::from(length);
    if length == 0 || offset < METADATA_ITEMS || end > region.len {
        return Err(Error::corrupt(format!(
            "item {id} of {length} bytes at {offset} of the region lies outside of it"
        )));
    }
    if length > MAX_METADATA_ITEM {
        return Err(Error::corrupt(format!(
            "item {id} has {length} bytes; no more than {MAX_METADATA_ITEM} are allowed"
        )));
    }
    let range = ByteRange { offset: region.offset + u64::from(offset), len: length.into() };
    Ok(Item { guid: id, range, flags })
}

fn check_items(items: &[Item]) -> Result<()> {
    let is_user = |item: &Item| item.flags & METADATA_IS_USER;
    let mut keys: Vec<_> = items.iter().map(|item| (item.guid.0, is_user(item))).collect();
    keys.sort_unstable();
    if let Some(pair) = keys.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Error::corrupt(format!("item {} is there twice", Guid(pair[0].0))));
    }
    let users = items.iter().filter(|item| is_user(item) != 0).count();
    if users > MAX_USER_ENTRIES {
        return Err(Error::corrupt(format!("{users} items of the user; 1024 are allowed")));
    }
    let mut ranges: Vec<_> = items.iter().filter(|item| !item.range.is_empty()).collect();
    ranges.sort_by_key(|item| item.range.offset);
    if let Some(pair) = ranges.windows(2).find(|pair| pair[0].range.overlaps(&pair[1].range)) {
        return Err(Error::corrupt(format!(
            "item {} overlaps item {}",
            pair[0].guid, pair[1].guid
        )));
    }
    for item in items.iter().filter(|item| is_user(item) == 0) {
        if item.guid == guid::INCOMPLETE_FILE {
            return Err(Error::corrupt(
                "whoever created this file marked it as incomplete and did not finish; create it \
                 again",
            ));
        }
        if item.flags & METADATA_IS_REQUIRED != 0 && !KNOWN.contains(&item.guid) {
            return Err(Error::unsupported(format!(
                "the file needs item {} to be understood, which is unknown",
                item.guid
            )));
        }
    }
    Ok(())
}

const KNOWN: [Guid; 8] = [
    guid::FILE_PARAMETERS,
    guid::DISK_SIZE,
    guid::LOGICAL_SECTOR,
    guid::PHYSICAL_SECTOR,
    guid::PAGE_83,
    guid::PARENT_LOCATOR,
    guid::CHS,
    guid::PMEM_LABEL,
];

struct Reader<'a> {
    file: &'a Arc<dyn File>,
    items: &'a [Item],
}

impl Reader<'_> {
    fn find(&self, id: Guid) -> Option<&Item> {
        self.items.iter().find(|item| item.guid == id && item.flags & METADATA_IS_USER == 0)
    }

    async fn bytes(&self, id: Guid, name: &str) -> Result<Vec<u8>> {
        let item = self.find(id);
        let item = item.ok_or_else(|| Error::corrupt(format!("there is no {name} item")))?;
        let start = align_down(item.range.offset, PAGE);
        let end = align_up(item.range.end(), PAGE).unwrap_or(u64::MAX);
        let bytes = disk::read(self.file, start, end - start).await.context(|| name)?;
        let from = (item.range.offset - start) as usize;
        Ok(bytes[from..from + item.range.len as usize].to_vec())
    }

    async fn fixed<const N: usize>(&self, id: Guid, name: &str) -> Result<[u8; N]> {
        let bytes = self.bytes(id, name).await?;
        <[u8; N]>::try_from(bytes.as_slice()).map_err(|_| {
            Error::corrupt(format!("the {name} item has {} bytes instead of {N}", bytes.len()))
        })
    }

    async fn sector(&self, id: Guid, name: &str) -> Result<u64> {
        let size = u32::from_le_bytes(self.fixed::<4>(id, name).await?);
        if size != 512 && size != 4096 {
            return Err(Error::corrupt(format!("{name} {size} is neither 512 nor 4096")));
        }
        Ok(size.into())
    }

    async fn locator(&self) -> Result<Locator> {
        let bytes = self.bytes(guid::PARENT_LOCATOR, "parent locator").await?;
        Locator::parse(&bytes).context(|| "parent locator")
    }
}
