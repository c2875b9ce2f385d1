//! The region tables: where the BAT and the metadata are, and what else lies in the file.

use std::sync::Arc;

use zerocopy::{FromBytes, IntoBytes};

use super::disk;
use super::layout::{
    FIRST_ALLOCATION, Guid, MAX_FILE_LEN, MAX_REGION_ENTRIES, REGION_REQUIRED, REGION_SIGNATURE,
    REGION_TABLE_LEN, REGION_TABLE_OFFSETS, RawRegionEntry, RawRegionHeader, checksum, guid,
};
use crate::error::{Error, Result};
use crate::io::File;
use crate::units::{ByteRange, MIB};

/// A region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// What it holds.
    pub guid: Guid,
    /// Where it is.
    pub range: ByteRange,
    /// Whether whoever opens the file must know it.
    pub required: bool,
}

/// The table that is believed.
#[derive(Clone, Debug)]
pub struct Regions {
    /// All regions, in the order of the table.
    pub all: Vec<Region>,
    /// The block allocation table.
    pub bat: ByteRange,
    /// The metadata.
    pub metadata: ByteRange,
    /// Which of the two copies are valid.
    pub valid: [bool; 2],
    /// Whether both are valid, but say different things.
    pub differ: bool,
}

impl Regions {
    /// Reads the first valid table and checks it. `log` is where the log lies.
    ///
    /// # Errors
    /// Says which entry is wrong, and how.
    pub async fn read(file: &Arc<dyn File>, log: ByteRange) -> Result<Regions> {
        let mut tables = [None, None];
        for (table, offset) in tables.iter_mut().zip(REGION_TABLE_OFFSETS) {
            let bytes = disk::read(file, offset, REGION_TABLE_LEN as u64).await?;
            *table = parse(&bytes)?;
        }
        let valid = [tables[0].is_some(), tables[1].is_some()];
        let [first, second] = tables;
        let differ = valid == [true; 2] && first != second;
        let Some(all) = first.or(second) else {
            return Err(Error::corrupt(
                "neither of the two region tables (at 196608 and 262144) has the right signature \
                 and checksum",
            ));
        };
        check(&all, log, file.len()?)?;
        let find = |wanted: Guid, name: &str| {
            let region = all.iter().find(|region| region.guid == wanted);
            let missing = || Error::corrupt(format!("the region table names no {name} region"));
            region.map(|region| region.range).ok_or_else(missing)
        };
        let bat = find(guid::BAT_REGION, "BAT")?;
        let metadata = find(guid::METADATA_REGION, "metadata")?;
        Ok(Regions { all, bat, metadata, valid, differ })
    }
}

/// The 64 KiB of a region table with its checksum.
pub fn encode(regions: &[Region]) -> Vec<u8> {
    let mut bytes = vec![0; REGION_TABLE_LEN];
    let header = RawRegionHeader {
        signature: *REGION_SIGNATURE,
        checksum: 0.into(),
        entry_count: (regions.len() as u32).into(),
        reserved: 0.into(),
    };
    bytes[..16].copy_from_slice(header.as_bytes());
    for (i, region) in regions.iter().enumerate() {
        let entry = RawRegionEntry {
            guid: region.guid,
            offset: region.range.offset.into(),
            length: (region.range.len as u32).into(),
            flags: if region.required { REGION_REQUIRED } else { 0 }.into(),
        };
        bytes[16 + 32 * i..][..32].copy_from_slice(entry.as_bytes());
    }
    let sum = checksum(&bytes, 4);
    bytes[4..8].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// The entries of a table; `None` if its signature or checksum is wrong.
fn parse(bytes: &[u8]) -> Result<Option<Vec<Region>>> {
    let Ok((header, rest)) = RawRegionHeader::ref_from_prefix(bytes) else { return Ok(None) };
    if header.signature != *REGION_SIGNATURE || header.checksum.get() != checksum(bytes, 4) {
        return Ok(None);
    }
    let count = header.entry_count.get();
    if count > MAX_REGION_ENTRIES {
        return Err(Error::corrupt(format!(
            "the region table has {count} entries; {MAX_REGION_ENTRIES} fit"
        )));
    }
    let Ok((entries, _)) = <[RawRegionEntry]>::ref_from_prefix_with_elems(rest, count as usize)
    else {
        return Err(Error::corrupt("the region table is shorter than its entries"));
    };
    let region = |entry: &RawRegionEntry| {
        let (offset, len) = (entry.offset.get(), u64::from(entry.length.get()));
        let range = ByteRange::new(offset, len).ok_or_else(|| {
            Error::corrupt(format!("region {} of {len} bytes at {offset} has no end", entry.guid))
        })?;
        Ok(Region { guid: entry.guid, range, required: entry.flags.get() & REGION_REQUIRED != 0 })
    };
    entries.iter().map(region).collect::<Result<_>>().map(Some)
}

fn check(all: &[Region], log: ByteRange, file_len: u64) -> Result<()> {
    if file_len > MAX_FILE_LEN {
        return Err(Error::corrupt(format!(
            "the file has {file_len} bytes, more than any VHDX image can need"
        )));
    }
    for (i, region) in all.iter().enumerate() {
        let Region { guid: id, range, required } = region;
        if range.is_empty() || !range.is_aligned(MIB) || range.offset < FIRST_ALLOCATION {
            return Err(Error::corrupt(format!(
                "region {id} of {range} does not start and end at multiples of 1 MiB after the first"
            )));
        }
        if range.end() > MAX_FILE_LEN {
            return Err(Error::corrupt(format!(
                "region {id} of {range} lies further back than any VHDX image can reach"
            )));
        }
        let known = [guid::BAT_REGION, guid::METADATA_REGION].contains(id);
        if !known && *required {
            return Err(Error::unsupported(format!(
                "the file needs region {id} to be understood, which is unknown"
            )));
        }
        if known && range.end() > file_len {
            return Err(Error::corrupt(format!(
                "region {id} of {range} ends beyond the {file_len} bytes of the file, which is \
                 truncated"
            )));
        }
        if range.overlaps(&log) {
            return Err(Error::corrupt(format!(
                "region {id} of {range} overlaps the log of {log}"
            )));
        }
        if all[..i].iter().any(|other| other.guid == *id) {
            return Err(Error::corrupt(format!("region {id} is in the region table twice")));
        }
    }
    let mut sorted: Vec<_> = all.iter().collect();
    sorted.sort_by_key(|region| region.range.offset);
    match sorted.windows(2).find(|pair| pair[0].range.overlaps(&pair[1].range)) {
        Some(pair) => Err(Error::corrupt(format!(
            "region {} of {} overlaps region {} of {}",
            pair[0].guid, pair[0].range, pair[1].guid, pair[1].range
        ))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::block_on;
    use crate::io::sim::SimFile;

    fn region(guid: Guid, mib: u64, len_mib: u64) -> Region {
        let range = ByteRange { offset: mib * MIB, len: len_mib * MIB };
        Region { guid, range, required: true }
    }

    fn usual() -> Vec<Region> {
        vec![region(guid::BAT_REGION, 3, 1), region(guid::METADATA_REGION, 2, 1)]
    }

    fn read(first: &[u8], second: &[u8]) -> Result<Regions> {
        let mut content = vec![0; 6 << 20];
        for (bytes, offset) in [first, second].into_iter().zip(REGION_TABLE_OFFSETS) {
            content[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        }
        let file: Arc<dyn File> = Arc::new(SimFile::from_bytes("test.vhdx", content));
        block_on(Regions::read(&file, ByteRange { offset: MIB, len: MIB }))
    }

    #[test]
    fn either_copy_will_do() {
        let table = encode(&usual());
        for (first, second) in [(&table[..], &[][..]), (&[], &table)] {
            let regions = read(first, second).unwrap();
            assert_eq!(regions.bat, ByteRange { offset: 3 * MIB, len: MIB });
            assert_eq!(regions.metadata, ByteRange { offset: 2 * MIB, len: MIB });
        }
        let err = read(&[], &[]).unwrap_err().to_string();
        assert!(err.contains("neither of the two region tables"), "{err}");
    }

    #[test]
    fn unknown_regions_are_kept_or_refused() {
        let mut all = usual();
        all.push(Region { required: false, ..region(Guid([3; 16]), 4, 1) });
        assert_eq!(read(&encode(&all), &[]).unwrap().all, all);
        all[2].required = true;
        let err = read(&encode(&all), &[]).unwrap_err().to_string();
        assert!(err.contains("which is unknown"), "{err}");
    }

    #[test]
    fn tables_are_checked() {
        let refused = |all: &[Region], words: &str| {
            let err = read(&encode(all), &[]).unwrap_err().to_string();
            assert!(err.contains(words), "{err}");
        };
        refused(&usual()[..1], "names no metadata region");
        refused(&usual()[1..], "names no BAT region");
        refused(&[usual(), usual()].concat(), "twice");
        let with = |range| [Region { range, ..usual()[0] }, usual()[1]];
        refused(&with(ByteRange { offset: 2 * MIB, len: 2 * MIB }), "overlaps region");
        refused(&with(ByteRange { offset: MIB, len: MIB }), "overlaps the log");
        refused(&with(ByteRange { offset: 3 * MIB + 4096, len: MIB }), "multiples of 1 MiB");
        refused(&with(ByteRange { offset: 3 * MIB, len: 4096 }), "multiples of 1 MiB");
        refused(&with(ByteRange { offset: 0, len: MIB }), "multiples of 1 MiB");
        refused(&with(ByteRange { offset: 3 * MIB, len: 0 }), "multiples of 1 MiB");
        refused(&with(ByteRange { offset: 9 * MIB, len: MIB }), "truncated");
        refused(&with(ByteRange { offset: u64::MAX - MIB + 1, len: MIB }), "has no end");
        let mut many = encode(&usual());
        many[8..12].copy_from_slice(&2048u32.to_le_bytes());
        let sum = checksum(&many, 4);
        many[4..8].copy_from_slice(&sum.to_le_bytes());
        let err = read(&many, &[]).unwrap_err().to_string();
        assert!(err.contains("2048 entries"), "{err}");
    }
}
