//! The two headers: which one is current, and how the next one is written.
//!
//! A header is replaced by writing the other slot with a greater sequence number, so that there is
//! a valid one at every instant. [`HeaderSlots::update`] does it twice, so that both slots say the
//! same in the end.

use std::sync::Arc;

use zerocopy::{FromBytes, IntoBytes};

use super::disk;
use super::layout::{
    FIRST_ALLOCATION, Guid, HEADER_FIELDS_LEN, HEADER_LEN, HEADER_OFFSETS, HEADER_SIGNATURE,
    HEADER_VERSION, MAX_LOG_LEN, RawHeader, checksum,
};
use crate::error::{Error, Result, ResultExt};
use crate::io::File;
use crate::units::{ByteRange, MIB};

/// How often a header must still be replaceable for an image to be written: more often than any
/// session does it.
const SEQUENCE_ROOM: u64 = 1 << 32;

/// What the current header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The greater one is current.
    pub sequence: u64,
    /// Changes with the first write of each opening.
    pub file_write_guid: Guid,
    /// Changes before the disk's content does.
    pub data_write_guid: Guid,
    /// Which log entries count; zero if the log is empty.
    pub log_guid: Guid,
    /// Where the log is; empty if there is none.
    pub log: ByteRange,
}

impl Header {
    /// The 4 KiB of a header with its checksum.
    pub fn encode(&self) -> Vec<u8> {
        let raw = RawHeader {
            signature: *HEADER_SIGNATURE,
            checksum: 0.into(),
            sequence: self.sequence.into(),
            file_write_guid: self.file_write_guid,
            data_write_guid: self.data_write_guid,
            log_guid: self.log_guid,
            log_version: 0.into(),
            version: HEADER_VERSION.into(),
            log_length: (self.log.len as u32).into(),
            log_offset: self.log.offset.into(),
        };
        let mut bytes = vec![0; HEADER_LEN];
        bytes[..HEADER_FIELDS_LEN].copy_from_slice(raw.as_bytes());
        let sum = checksum(&bytes, 4);
        bytes[4..8].copy_from_slice(&sum.to_le_bytes());
        bytes
    }
}

/// Both slots, and which of them is current.
#[derive(Clone, Copy, Debug)]
pub struct HeaderSlots {
    /// The current header.
    pub current: Header,
    /// Which slot it is in, 0 or 1.
    pub slot: usize,
    /// Which of the slots hold a valid header.
    pub valid: [bool; 2],
    /// The sequence numbers of those.
    pub sequences: [u64; 2],
}

impl HeaderSlots {
    /// Reads both headers and picks the current one.
    ///
    /// # Errors
    /// Says why neither can be believed, and what is wrong with the fields of the current one.
    pub async fn read(file: &Arc<dyn File>) -> Result<HeaderSlots> {
        let mut slots = [None, None];
        for (slot, offset) in slots.iter_mut().zip(HEADER_OFFSETS) {
            let bytes = disk::read(file, offset, HEADER_LEN as u64).await?;
            *slot = parse(&bytes);
        }
        let valid = slots.map(|slot| slot.is_some());
        let sequences = slots.map(|slot| slot.map_or(0, |raw| raw.sequence.get()));
        let (slot, raw) = match slots {
            [None, None] => {
                return Err(Error::corrupt(
                    "neither of the two headers (at 65536 and 131072) has the right signature and \
                     checksum; the file is damaged beyond what its own copies can repair",
                ));
            }
            [Some(raw), None] => (0, raw),
            [None, Some(raw)] => (1, raw),
            [Some(first), Some(second)] if first.sequence == second.sequence => {
                if first != second {
                    return Err(Error::corrupt(format!(
                        "the two headers (at 65536 and 131072) differ, but have the same sequence \
                         number {}; which of them counts cannot be told",
                        first.sequence
                    )));
                }
                (0, first)
            }
            [Some(first), Some(second)] if first.sequence > second.sequence => (0, first),
            [_, Some(second)] => (1, second),
        };
        let context = || format!("header at {}", HEADER_OFFSETS[slot]);
        let current = believe(&raw, file.len()?).context(context)?;
        Ok(HeaderSlots { current, slot, valid, sequences })
    }

    /// Checks that the sequence number can grow as often as a session may want it to.
    ///
    /// # Errors
    /// Says that it cannot, and what can still be done.
    pub fn check_room(&self) -> Result<()> {
        let sequence = self.current.sequence;
        if u64::MAX - sequence >= SEQUENCE_ROOM {
            return Ok(());
        }
        Err(Error::corrupt(format!(
            "the header's sequence number is {sequence} and cannot grow any further, so nothing \
             can be written; open the image read-only, or copy it (vublk convert)"
        )))
    }

    /// Makes `header` current in both slots, with sequence numbers of its own; durable on return.
    ///
    /// # Errors
    /// After one the old or the new header is current; which, a new read would tell.
    pub async fn update(&mut self, file: &Arc<dyn File>, header: Header) -> Result<()> {
        for _ in 0..2 {
            self.write_next(file, header).await?;
            file.flush().await?;
        }
        Ok(())
    }

    /// Makes `header` current in the other slot, with a sequence number of its own. The caller flushes
    /// before the next one is written, as that goes over the one that was current until now.
    ///
    /// # Errors
    /// As those of [`HeaderSlots::update`].
    pub async fn write_next(&mut self, file: &Arc<dyn File>, header: Header) -> Result<()> {
        let sequence = self.current.sequence.checked_add(1).ok_or_else(|| {
            Error::corrupt("the header's sequence number cannot grow any further")
        })?;
        let next = Header { sequence, ..header };
        let slot = 1 - self.slot;
        disk::write(file, HEADER_OFFSETS[slot], &next.encode()).await?;
        self.current = next;
        self.slot = slot;
        self.valid[slot] = true;
        self.sequences[slot] = next.sequence;
        Ok(())
    }
}

/// The fields of a header whose signature and checksum are right.
fn parse(bytes: &[u8]) -> Option<RawHeader> {
    let (raw, _) = RawHeader::read_from_prefix(bytes).ok()?;
    let valid = raw.signature == *HEADER_SIGNATURE && raw.checksum.get() == checksum(bytes, 4);
    // The checksums of two headers differ with what follows the fields, which means nothing.
    valid.then_some(RawHeader { checksum: 0.into(), ..raw })
}

/// Checks the fields of the current header.
fn believe(raw: &RawHeader, file_len: u64) -> Result<Header> {
    if raw.version != HEADER_VERSION {
        return Err(Error::unsupported(format!(
            "version {} of the format; only {HEADER_VERSION} is known",
            raw.version
        )));
    }
    if !raw.log_guid.is_zero() && raw.log_version != 0 {
        return Err(Error::unsupported(format!(
            "version {} of the log; only 0 is known",
            raw.log_version
        )));
    }
    let (offset, len) = (raw.log_offset.get(), u64::from(raw.log_length.get()));
    let bad = |why: &str| Error::corrupt(format!("the log of {len} bytes at {offset} {why}"));
    if len == 0 && raw.log_guid.is_zero() {
        let log = ByteRange::default();
        return Ok(Header { log, ..fields(raw) });
    }
    if len == 0 {
        return Err(bad("is empty, but its GUID says that it must be replayed"));
    }
    if !offset.is_multiple_of(MIB) || !len.is_multiple_of(MIB) || offset < FIRST_ALLOCATION {
        return Err(bad("does not start and end at multiples of 1 MiB after the first"));
    }
    if len > MAX_LOG_LEN {
        return Err(bad("is longer than the 1 GiB that is believed"));
    }
    let log = ByteRange::new(offset, len).ok_or_else(|| bad("has no end"))?;
    if log.end() > file_len {
        return Err(bad("ends beyond the end of the file; the file is truncated"));
    }
    Ok(Header { log, ..fields(raw) })
}

fn fields(raw: &RawHeader) -> Header {
    Header {
        sequence: raw.sequence.get(),
        file_write_guid: raw.file_write_guid,
        data_write_guid: raw.data_write_guid,
        log_guid: raw.log_guid,
        log: ByteRange::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::block_on;
    use crate::io::sim::SimFile;

    fn header(sequence: u64) -> Header {
        Header {
            sequence,
            file_write_guid: Guid([1; 16]),
            data_write_guid: Guid([2; 16]),
            log_guid: Guid::ZERO,
            log: ByteRange { offset: MIB, len: MIB },
        }
    }

    fn file_with(first: Option<Vec<u8>>, second: Option<Vec<u8>>) -> Arc<dyn File> {
        let mut content = vec![0; 2 << 20];
        for (bytes, offset) in [first, second].into_iter().zip(HEADER_OFFSETS) {
            let bytes = bytes.unwrap_or_default();
            content[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
        }
        Arc::new(SimFile::from_bytes("test.vhdx", content))
    }

    fn read(first: Option<Vec<u8>>, second: Option<Vec<u8>>) -> Result<HeaderSlots> {
        block_on(HeaderSlots::read(&file_with(first, second)))
    }

    #[test]
    fn the_greater_sequence_is_current() {
        let (old, new) = (header(7), header(8));
        let slots = read(Some(old.encode()), Some(new.encode())).unwrap();
        assert_eq!((slots.current, slots.slot), (new, 1));
        let slots = read(Some(new.encode()), Some(old.encode())).unwrap();
        assert_eq!((slots.current, slots.slot), (new, 0));
        let slots = read(Some(old.encode()), None).unwrap();
        assert_eq!((slots.current, slots.valid), (old, [true, false]));
    }

    #[test]
    fn equal_sequences_must_agree() {
        // Disk2vhd writes such files.
        assert_eq!(read(Some(header(3).encode()), Some(header(3).encode())).unwrap().slot, 0);
        let other = Header { data_write_guid: Guid([9; 16]), ..header(3) };
        let err = read(Some(header(3).encode()), Some(other.encode())).unwrap_err();
        assert!(err.to_string().contains("same sequence number 3"), "{err}");
    }

    #[test]
    fn a_damaged_header_does_not_count() {
        let mut torn = header(9).encode();
        torn[4000] ^= 1;
        let slots = read(Some(torn.clone()), Some(header(1).encode())).unwrap();
        assert_eq!(slots.current, header(1));
        let err = read(Some(torn), None).unwrap_err();
        assert!(err.to_string().contains("neither of the two headers"), "{err}");
    }

    #[test]
    fn fields_are_checked() {
        let refused = |change: fn(&mut RawHeader), words: &str| {
            let mut bytes = header(1).encode();
            let (raw, _) = RawHeader::mut_from_prefix(&mut bytes).unwrap();
            change(raw);
            let sum = checksum(&bytes, 4);
            bytes[4..8].copy_from_slice(&sum.to_le_bytes());
            let err = read(Some(bytes), None).unwrap_err().to_string();
            assert!(err.contains(words), "{err}");
        };
        refused(|raw| raw.version = 2.into(), "version 2 of the format");
        refused(
            |raw| {
                raw.log_guid = Guid([1; 16]);
                raw.log_version = 1.into();
            },
            "version 1 of the log",
        );
        refused(|raw| raw.log_offset = 4096.into(), "multiples of 1 MiB");
        refused(|raw| raw.log_offset = 0.into(), "multiples of 1 MiB");
        refused(|raw| raw.log_offset = (u64::MAX - MIB + 1).into(), "has no end");
        refused(|raw| raw.log_offset = (64 * MIB).into(), "truncated");
        refused(|raw| raw.log_length = (2 << 30).into(), "longer than the 1 GiB");
        refused(
            |raw| {
                raw.log_guid = Guid([1; 16]);
                raw.log_length = 0.into();
            },
            "is empty, but its GUID",
        );
    }

    #[test]
    fn an_update_reaches_both_slots() {
        let file = file_with(Some(header(5).encode()), None);
        block_on(async {
            let mut slots = HeaderSlots::read(&file).await.unwrap();
            let changed = Header { log_guid: Guid([7; 16]), ..slots.current };
            slots.update(&file, changed).await.unwrap();
            let again = HeaderSlots::read(&file).await.unwrap();
            assert_eq!(again.current, Header { sequence: 7, ..changed });
            assert_eq!(again.valid, [true, true]);
        });
        let file = file_with(Some(header(u64::MAX).encode()), None);
        let mut slots = block_on(HeaderSlots::read(&file)).unwrap();
        assert!(slots.check_room().unwrap_err().to_string().contains("vublk convert"));
        let same = slots.current;
        assert!(block_on(slots.update(&file, same)).is_err());
    }
}
