//! What can be said of an image before anything of it is changed: headers, log, regions, metadata.
//!
//! A log that is not empty is replayed in memory first ([`Replayed`]), and everything behind it is
//! read through that, whether the image is to be written or not. So a refused image is never
//! modified.

use std::sync::Arc;

use super::disk;
use super::geometry::Geometry;
use super::header::HeaderSlots;
use super::layout::{CREATOR_LEN, FILE_SIGNATURE, FIRST_ALLOCATION, PAGE};
use super::log::LogReader;
use super::metadata::Metadata;
use super::region::Regions;
use super::replay::{Replay, Replayed};
use super::salvage::Report;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::io::File;
use crate::units::ByteRange;

/// An image's fixed structures.
#[derive(Clone, Debug)]
pub struct Structure {
    /// What the file says it was made by.
    pub creator: String,
    /// The file as it is.
    pub raw_file: Arc<dyn File>,
    /// The file as it is after a replay of the log; the same if the log is empty.
    pub file: Arc<dyn File>,
    /// The headers.
    pub headers: HeaderSlots,
    /// What is in the log, if it is not empty.
    pub replay: Option<Arc<Replay>>,
    /// The region table.
    pub regions: Regions,
    /// The metadata.
    pub metadata: Metadata,
    /// The sizes that follow from it.
    pub geometry: Geometry,
    /// What is missing, if the image is being salvaged.
    pub salvaged: Option<Arc<Report>>,
}

impl Structure {
    /// Reads and checks the structures of a file. Changes nothing.
    ///
    /// # Errors
    /// Names the file, the place and what is wrong.
    pub async fn read(file: &Arc<dyn File>) -> Result<Structure> {
        Structure::read_unnamed(file, true).await.context(|| file.name().to_string())
    }

    /// As [`Structure::read`], of an image that this process has open, and may be writing to. Then
    /// its log may not be in order at this instant, but has nothing of what is read here: whoever
    /// writes has replayed it first, and logs parts of the BAT and sector bitmaps only.
    ///
    /// # Errors
    /// As those of [`Structure::read`].
    pub async fn read_in_use(file: &Arc<dyn File>) -> Result<Structure> {
        let structure = match Structure::read_unnamed(file, true).await {
            Err(err) if err.kind() == ErrorKind::Corrupt => {
                Structure::read_unnamed(file, false).await
            }
            structure => structure,
        };
        structure.context(|| file.name().to_string())
    }

    /// As [`Structure::read`], for who names the file; the log is ignored if not `with_log`.
    pub(super) async fn read_unnamed(
        raw_file: &Arc<dyn File>,
        with_log: bool,
    ) -> Result<Structure> {
        let len = raw_file.len()?;
        let mut creator = String::new();
        if len >= PAGE {
            let start = disk::read(raw_file, 0, PAGE).await?;
            if !start.starts_with(FILE_SIGNATURE) {
                return Err(Error::corrupt("is not a VHDX image (\"vhdxfile\" is missing)"));
            }
            creator = creator_of(&start);
        }
        if len < FIRST_ALLOCATION {
            return Err(Error::corrupt(format!(
                "has only {len} bytes; the headers of a VHDX image alone take 1 MiB, so it is \
                 truncated, or none"
            )));
        }
        let headers = HeaderSlots::read(raw_file).await?;
        let header = headers.current;
        let mut file = Arc::clone(raw_file);
        let mut replay = None;
        if with_log && !header.log_guid.is_zero() {
            let reader = LogReader::new(raw_file, header.log, header.log_guid);
            let found = Arc::new(Replay::read(reader, header.log, len).await?);
            file = Arc::new(Replayed::new(Arc::clone(raw_file), Arc::clone(&found))?);
            replay = Some(found);
        }
        let regions = Regions::read(&file, header.log).await?;
        let metadata = Metadata::read(&file, regions.metadata).await?;
        let geometry = Geometry::new(&metadata);
        let (have, need) = (regions.bat.len / 8, geometry.bat_entries());
        if have < need {
            return Err(Error::corrupt(format!(
                "the BAT holds {have} entries, and {need} are needed for a disk of {} bytes",
                geometry.disk_size
            )));
        }
        let raw_file = Arc::clone(raw_file);
        let salvaged = None;
        Ok(Structure {
            creator,
            raw_file,
            file,
            headers,
            replay,
            regions,
            metadata,
            geometry,
            salvaged,
        })
    }

    /// Checks that nothing in the log is out of reach of a replay.
    ///
    /// # Errors
    /// If whole entries lie behind a damaged one. What they hold is not lost before the image is
    /// written to.
    pub fn check_log(&self) -> Result<()> {
        match self.replay.as_ref().and_then(|replay| replay.cut_off()) {
            None => Ok(()),
            Some((first, last)) => Err(Error::corrupt(format!(
                "the log is damaged: entries {first} to {last} are whole, but one before them is not, so \
                 the disk is as it was before. Read-only it can be used like that. To write to it, copy the \
                 file first, then give up what those entries hold with check -r all"
            ))),
        }
    }

    /// The ranges of the file that no block may lie in.
    pub fn reserved(&self) -> Vec<ByteRange> {
        let mut reserved = vec![ByteRange { offset: 0, len: FIRST_ALLOCATION }];
        reserved.push(self.headers.current.log);
        reserved.extend(self.regions.all.iter().map(|region| region.range));
        reserved.retain(|range| !range.is_empty());
        reserved.sort_by_key(|range| range.offset);
        reserved
    }
}

/// The creator in the identifier at the start of a file: anybody's text, to be shown.
fn creator_of(start: &[u8]) -> String {
    let text = &start[FILE_SIGNATURE.len()..][..CREATOR_LEN];
    let units = text.chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]]));
    char::decode_utf16(units.take_while(|unit| *unit != 0))
        .map(|c| c.ok().filter(|c| !c.is_control()).unwrap_or(char::REPLACEMENT_CHARACTER))
        .collect()
}
