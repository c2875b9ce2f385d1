//! What an add-cow file looks like, version 1.
//!
//! ```text
//! 0      magic "ADD_COW\xff"
//! 8      version, big-endian, 1
//! 12     backing_file   1024 bytes, zero padded
//! 1036   image_file     1024 bytes, zero padded
//! 2060   reserved       500 zero bytes
//! 2560   bitmap         one bit for each sector of 512 bytes, least significant bit first
//! ```
//!
//! A bit of 1: the sector is in the image file, at the same offset. 0: it is the backing file's.
//! The disk has as many whole sectors as the image file.

use crate::error::{Error, Result};
use crate::units::SECTOR_SIZE;

/// Length of the header, which is where the bitmap starts.
pub const HEADER_LEN: u64 = 2560;
/// The longest name that a header can hold, in bytes: one of them is the terminator's.
pub const MAX_NAME: usize = NAME_FIELD - 1;

const MAGIC: &[u8; 8] = b"ADD_COW\xff";
/// Of the revisions that came after version 1 and have another layout.
const LATER_MAGIC: &[u8; 4] = b"ACOW";
const VERSION: u32 = 1;
const NAME_FIELD: usize = 1024;
const AT_VERSION: usize = 8;
const AT_BACKING: usize = 12;
const AT_IMAGE: usize = AT_BACKING + NAME_FIELD;
const AT_RESERVED: usize = AT_IMAGE + NAME_FIELD;

const _: () = assert!(AT_RESERVED + 500 == HEADER_LEN as usize);

/// A header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The backing file as it is named; `None` if it is not.
    pub backing: Option<String>,
    /// The image file as it is named.
    pub image: String,
}

impl Header {
    /// Reads a header.
    ///
    /// # Errors
    /// Says which field is wrong, and how.
    pub fn parse(bytes: &[u8]) -> Result<Header> {
        if bytes.starts_with(LATER_MAGIC) {
            return Err(Error::unsupported(
                "add-cow revision without version field (ACOW) is not supported",
            ));
        }
        if !bytes.starts_with(MAGIC) {
            return Err(Error::corrupt("is not an add-cow file (wrong magic)"));
        }
        let Some(bytes) = bytes.get(..HEADER_LEN as usize) else {
            return Err(Error::corrupt(format!(
                "truncated add-cow header: {} of {HEADER_LEN} bytes",
                bytes.len()
            )));
        };
        let field = |at: usize, len: usize| &bytes[at..at + len];
        let version = u32::from_be_bytes(field(AT_VERSION, 4).try_into().expect("four bytes"));
        if version != VERSION {
            return Err(Error::unsupported(format!(
                "add-cow version {version} is not supported, only {VERSION}"
            )));
        }
        let backing = parse_name("backing_file", field(AT_BACKING, NAME_FIELD))?;
        let image = parse_name("image_file", field(AT_IMAGE, NAME_FIELD))?;
        let Some(image) = image else {
            return Err(Error::corrupt("image_file: name is empty"));
        };
        Ok(Header { backing, image })
    }

    /// The bytes of the header.
    ///
    /// # Errors
    /// Names that do not fit, or that [`Header::parse`] would refuse.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; HEADER_LEN as usize];
        bytes[..MAGIC.len()].copy_from_slice(MAGIC);
        bytes[AT_VERSION..AT_VERSION + 4].copy_from_slice(&VERSION.to_be_bytes());
        let mut put = |field: &str, at: usize, name: &str| {
            check_name(field, name)?;
            bytes[at..at + name.len()].copy_from_slice(name.as_bytes());
            Ok::<_, Error>(())
        };
        if let Some(backing) = &self.backing {
            put("backing_file", AT_BACKING, backing)?;
        }
        if self.image.is_empty() {
            return Err(Error::invalid("image_file: name is empty"));
        }
        put("image_file", AT_IMAGE, &self.image)?;
        Ok(bytes)
    }
}

/// Whether the reserved bytes of a whole header are all zero, as writers leave them.
pub fn reserved_is_zero(header: &[u8]) -> bool {
    header[AT_RESERVED..HEADER_LEN as usize].iter().all(|byte| *byte == 0)
}

/// How long the bitmap of a disk with so many sectors is, in bytes.
pub fn bitmap_len(sectors: u64) -> u64 {
    sectors.div_ceil(8)
}

/// How long the add-cow file of a disk of so many bytes is.
pub fn file_len(size: u64) -> u64 {
    HEADER_LEN + bitmap_len(size.div_ceil(SECTOR_SIZE))
}

/// How many sectors an image file of this many bytes gives the disk.
pub fn sectors_of(image_len: u64) -> u64 {
    image_len / SECTOR_SIZE
}

fn parse_name(field: &str, bytes: &[u8]) -> Result<Option<String>> {
    let Some(end) = bytes.iter().position(|byte| *byte == 0) else {
        return Err(Error::corrupt(format!(
            "{field}: name is not terminated (none of its {NAME_FIELD} bytes is 0)"
        )));
    };
    if end == 0 {
        return Ok(None);
    }
    let name = std::str::from_utf8(&bytes[..end])
        .map_err(|_| Error::unsupported(format!("{field}: name is not UTF-8")))?;
    check_name(field, name)?;
    Ok(Some(name.to_string()))
}

fn check_name(field: &str, name: &str) -> Result<()> {
    if name.len() > MAX_NAME {
        return Err(Error::invalid(format!(
            "{field}: a name of {} bytes is too long, {MAX_NAME} fit",
            name.len()
        )));
    }
    if name.chars().any(char::is_control) {
        return Err(Error::corrupt(format!(
            "{field}: '{}': control characters are not allowed in names",
            name.escape_debug()
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header { backing: Some("base.raw".into()), image: "disk.raw".into() }
    }

    fn refusal(change: impl FnOnce(&mut Vec<u8>)) -> String {
        let mut bytes = header().encode().unwrap();
        change(&mut bytes);
        Header::parse(&bytes).unwrap_err().to_string()
    }

    #[test]
    fn headers_go_both_ways() {
        for backing in [None, Some("b".to_string()), Some("ü".repeat(511))] {
            let header = Header { backing, image: "i".repeat(MAX_NAME) };
            assert_eq!(Header::parse(&header.encode().unwrap()).unwrap(), header);
        }
    }

    #[test]
    fn every_field_is_checked() {
        assert!(refusal(|h| h.truncate(2559)).contains("truncated add-cow header: 2559 of 2560"));
        assert!(refusal(|h| h.truncate(8)).contains("truncated"));
        assert!(refusal(|h| h[7] = 0).contains("wrong magic"));
        assert!(refusal(|h| h[..4].copy_from_slice(b"ACOW")).contains("(ACOW) is not supported"));
        assert_eq!(refusal(|h| h[11] = 2), "add-cow version 2 is not supported, only 1");
        // The number as it stands in the file, not with its bytes swapped.
        assert!(refusal(|h| h[8] = 1).starts_with("add-cow version 16777217 "));
        let fill = |at: usize| move |h: &mut Vec<u8>| h[at..at + 1024].fill(b'x');
        assert!(refusal(fill(12)).contains("backing_file: name is not terminated"));
        assert!(refusal(fill(1036)).contains("image_file: name is not terminated"));
        assert!(refusal(|h| h[1036] = 0).contains("image_file: name is empty"));
        assert!(refusal(|h| h[13] = b'\n').contains("control characters"));
        assert!(refusal(|h| h[13] = 0xff).contains("not UTF-8"));
        assert!(Header::parse(b"").is_err());
    }

    #[test]
    fn names_that_do_not_fit_are_not_written() {
        let long = Header { image: "x".repeat(1024), ..header() };
        assert!(long.encode().unwrap_err().to_string().contains("1023 fit"));
        assert!(Header { image: String::new(), ..header() }.encode().is_err());
        assert!(Header { backing: Some("a\tb".into()), ..header() }.encode().is_err());
    }

    #[test]
    fn the_reserved_bytes_are_those_behind_the_names() {
        let mut bytes = header().encode().unwrap();
        assert!(reserved_is_zero(&bytes));
        bytes[2059] = 1;
        assert!(reserved_is_zero(&bytes));
        bytes[2060] = 1;
        assert!(!reserved_is_zero(&bytes));
    }
}
