//! The qcow2 header, read by ourselves before imago sees the file.
//!
//! imago checks less than a stranger's image deserves (it does not look at the encryption method,
//! or at whether tables lie inside the file), and it must not be asked to open files. So the
//! header is read here: to refuse what cannot be served with a message that names the feature, to
//! tell callers which backing file to open, and to answer `info`.
//!
//! Field offsets are those of QEMU's `docs/interop/qcow2.txt`; all numbers are big-endian.

use std::sync::Arc;

use super::disk;
use crate::error::{Error, Result, ResultExt};
use crate::io::File;

/// `QFI\xfb`.
pub const MAGIC: [u8; 4] = [0x51, 0x46, 0x49, 0xfb];

/// Length of a version 2 header in bytes.
const V2_LEN: usize = 72;
/// Length of the smallest version 3 header in bytes.
const V3_LEN: usize = 104;
/// Most entries an L1 or refcount table may have: imago's limit, and 32 MiB of memory.
const MAX_TABLE_ENTRIES: u64 = 4 << 20;

/// Incompatible feature bits.
const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;
/// Compatible feature bit.
const LAZY_REFCOUNTS: u64 = 1 << 0;

/// Autoclear feature bit: the bitmaps are of the disk as it is.
const BITMAPS: u64 = 1 << 0;
/// Length of the header extension about bitmaps in bytes.
const BITMAPS_LEN: usize = 24;
/// Autoclear feature bit: the external data file is a raw image by itself.
const DATA_FILE_RAW: u64 = 1 << 1;

/// Header extensions.
const EXT_END: u32 = 0;
const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
const EXT_CRYPTO: u32 = 0x0537_be77;
const EXT_BITMAPS: u32 = 0x2385_2875;
const EXT_DATA_FILE: u32 = 0x4441_5441;

/// Byte offsets of header fields that are also written.
pub(super) mod field {
    /// Offset and length of the backing file's name.
    pub const BACKING: usize = 8;
    pub const BACKING_LEN: usize = 12;
    pub const L1_OFFSET: usize = 40;
    pub const REFTABLE_OFFSET: usize = 48;
    pub const REFTABLE_END: usize = 60;
    pub const INCOMPATIBLE: usize = 72;
    pub const AUTOCLEAR: usize = 88;
}

/// The file below an image, as the image names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// The name, as stored: relative names are relative to the directory of the image.
    pub file: String,
    /// Its format, if the image says; guessing it from content is dangerous.
    pub format: Option<String>,
}

impl From<(&str, &str)> for Backing {
    fn from((file, format): (&str, &str)) -> Backing {
        Backing { file: file.into(), format: Some(format.into()) }
    }
}

/// What a qcow2 header says.
#[derive(Clone, Debug)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Base-2 logarithm of the cluster size.
    pub cluster_bits: u32,
    /// Base-2 logarithm of the width of a refcount in bits.
    pub refcount_order: u32,
    /// The backing file, if any.
    pub backing: Option<Backing>,
    /// Number of internal snapshots.
    pub snapshots: u32,
    pub(super) l1_offset: u64,
    pub(super) l1_entries: u64,
    pub(super) reftable_offset: u64,
    pub(super) reftable_clusters: u64,
    pub(super) incompatible: u64,
    pub(super) compatible: u64,
    pub(super) autoclear: u64,
    /// Where the snapshot table lies.
    pub(super) snapshots_offset: u64,
    /// How many persistent bitmaps the image has, and where their directory lies.
    pub(super) bitmaps: Option<(u32, u64)>,
    crypt_method: u32,
    has_crypto_header: bool,
    /// 0 is zlib, 1 zstd.
    compression: u8,
    /// The external data file's name, if the image says.
    data_file: Option<String>,
    /// Names of incompatible feature bits, as the image gives them.
    feature_names: Vec<(u8, String)>,
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

impl Header {
    /// Reads the header of an image. Checks what is needed to understand it, not whether it can
    /// be served ([`Header::check_supported`]).
    ///
    /// # Errors
    /// Names the file, the field, what was found and what is allowed.
    pub async fn read(file: &Arc<dyn File>) -> Result<Header> {
        Header::read_unnamed(file).await.context(|| file.name().to_string())
    }

    pub(super) async fn read_unnamed(file: &Arc<dyn File>) -> Result<Header> {
        let file_len = file.len()?;
        if file_len < V2_LEN as u64 {
            return Err(Error::corrupt(format!(
                "file of {file_len} bytes is too short for a qcow2 header ({V2_LEN} bytes)"
            )));
        }
        let start = disk::read_bytes(&**file, 0, V3_LEN).await?;
        if start[..4] != MAGIC {
            return Err(Error::corrupt("not a qcow2 image (no 'QFI\\xfb' at offset 0)"));
        }
        let version = be32(&start, 4);
        if !(2..=3).contains(&version) {
            return Err(Error::unsupported(format!(
                "qcow2 version {version} is not supported, only 2 and 3 are (header offset 4)"
            )));
        }
        let cluster_bits = be32(&start, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(Error::corrupt(format!(
                "cluster bits {cluster_bits} at header offset 20 are not in 9..=21"
            )));
        }
        let v3 = version == 3;
        let mut header = Header {
            version,
            size: be64(&start, 24),
            cluster_bits,
            refcount_order: if v3 { be32(&start, 96) } else { 4 },
            backing: None,
            snapshots: be32(&start, 60),
            l1_offset: be64(&start, field::L1_OFFSET),
            l1_entries: u64::from(be32(&start, 36)),
            reftable_offset: be64(&start, field::REFTABLE_OFFSET),
            reftable_clusters: u64::from(be32(&start, 56)),
            incompatible: if v3 { be64(&start, field::INCOMPATIBLE) } else { 0 },
            compatible: if v3 { be64(&start, 80) } else { 0 },
            autoclear: if v3 { be64(&start, field::AUTOCLEAR) } else { 0 },
            snapshots_offset: be64(&start, 64),
            bitmaps: None,
            crypt_method: be32(&start, 32),
            has_crypto_header: false,
            compression: 0,
            data_file: None,
            feature_names: Vec::new(),
        };
        let cluster = disk::read_bytes(&**file, 0, header.cluster_size() as usize).await?;
        let header_len = if v3 { be32(&start, 100) as usize } else { V2_LEN };
        if v3 && !(V3_LEN..=cluster.len()).contains(&header_len) {
            return Err(Error::corrupt(format!(
                "header length {header_len} at header offset 100 is not in {V3_LEN}..={}",
                cluster.len()
            )));
        }
        if header_len > V3_LEN {
            header.compression = cluster[V3_LEN];
        }
        let format = header.read_extensions(&cluster, header_len)?;
        header.backing = read_backing(&cluster, format)?;
        header.check_tables(file_len)?;
        Ok(header)
    }

    /// Walks the header extensions; returns the backing format.
    fn read_extensions(&mut self, cluster: &[u8], mut at: usize) -> Result<Option<String>> {
        let mut format = None;
        let end = match be64(cluster, 8) {
            0 => cluster.len(),
            // The backing file's name ends the extensions of a version 2 header.
            name => cluster.len().min(usize::try_from(name).unwrap_or(usize::MAX)),
        };
        while at + 8 <= end {
            let (kind, len) = (be32(cluster, at), be32(cluster, at + 4) as usize);
            if kind == EXT_END {
                break;
            }
            let start = at + 8;
            let Some(data) = start.checked_add(len).and_then(|end| cluster.get(start..end)) else {
                return Err(Error::corrupt(format!(
                    "header extension {kind:#x} at {at} has {len} bytes and runs past the first \
                     cluster"
                )));
            };
            match kind {
                EXT_BACKING_FORMAT => format = Some(text(data, "backing format")?),
                EXT_CRYPTO => self.has_crypto_header = true,
                EXT_BITMAPS if len == BITMAPS_LEN => {
                    self.bitmaps = Some((be32(data, 0), be64(data, 16)));
                }
                EXT_BITMAPS => {
                    return Err(Error::corrupt(format!(
                        "header extension {kind:#x} (bitmaps) at {at} has {len} bytes and not \
                         {BITMAPS_LEN}"
                    )));
                }
                EXT_DATA_FILE => self.data_file = Some(text(data, "data file name")?),
                EXT_FEATURE_NAMES => {
                    for entry in data.chunks_exact(48).filter(|entry| entry[0] == 0) {
                        let name = entry[2..].split(|byte| *byte == 0).next().unwrap_or(&[]);
                        let name = String::from_utf8_lossy(name).into_owned();
                        self.feature_names.push((entry[1], name));
                    }
                }
                _ => {}
            }
            at = (start + len).next_multiple_of(8);
        }
        Ok(format)
    }

    /// Tables must lie inside the file: nothing is allocated for a lie.
    fn check_tables(&self, file_len: u64) -> Result<()> {
        let cluster = self.cluster_size();
        if self.refcount_order > 6 {
            return Err(Error::corrupt(format!(
                "refcount order {} at header offset 96 is not in 0..=6",
                self.refcount_order
            )));
        }
        if !self.size.is_multiple_of(512) {
            return Err(Error::unsupported(format!(
                "disk size {} at header offset 24 is not a multiple of 512",
                self.size
            )));
        }
        let file_end = file_len.next_multiple_of(cluster);
        let tables = [
            ("L1 table", self.l1_offset, self.l1_entries, 1),
            ("refcount table", self.reftable_offset, self.reftable_clusters, cluster / 8),
        ];
        for (name, offset, count, entries_each) in tables {
            let entries = count * entries_each;
            let inside = offset.checked_add(entries * 8).is_some_and(|end| end <= file_end);
            if offset % cluster != 0 || entries > MAX_TABLE_ENTRIES || (entries > 0 && !inside) {
                return Err(Error::corrupt(format!(
                    "{name} of {entries} entries at {offset} is not aligned to the cluster size \
                     {cluster}, has more than {MAX_TABLE_ENTRIES} entries or does not lie inside \
                     the file of {file_len} bytes"
                )));
            }
        }
        let covered_by_entry = u128::from(cluster) * u128::from(cluster / 8);
        let needed = u128::from(self.size).div_ceil(covered_by_entry);
        if u128::from(self.l1_entries) < needed {
            return Err(Error::corrupt(format!(
                "L1 table has {} entries, but the disk of {} bytes needs {needed}",
                self.l1_entries, self.size
            )));
        }
        if self.reftable_offset == 0 || self.reftable_clusters == 0 {
            return Err(Error::corrupt("no refcount table (header offsets 48 and 56)"));
        }
        Ok(())
    }

    /// Refuses what this program cannot serve, naming the feature and the way out.
    pub fn check_supported(&self, read_only: bool) -> Result<()> {
        if self.crypt_method != 0 || self.has_crypto_header {
            let method = match self.crypt_method {
                1 => "AES",
                2 => "LUKS",
                _ => "unknown",
            };
            return Err(Error::unsupported(format!(
                "the image is encrypted ({method}), which is not supported; decrypt it with \
                 qemu-img convert"
            )));
        }
        let refused = [
            (EXTERNAL_DATA, "an external data file", "qemu-img convert"),
            (COMPRESSION, "a compression type other than zlib (zstd)", "qemu-img convert"),
            (EXTENDED_L2, "extended L2 entries (subclusters)", "qemu-img convert"),
        ];
        for (bit, what, way_out) in refused {
            if self.incompatible & bit != 0 {
                return Err(Error::unsupported(format!(
                    "the image uses {what}, which is not supported; {way_out} makes one without"
                )));
            }
        }
        let known = DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION | EXTENDED_L2;
        let unknown = self.incompatible & !known;
        if unknown != 0 {
            let bit = u64::from(unknown.trailing_zeros());
            let name = self.feature_names.iter().find(|(number, _)| u64::from(*number) == bit);
            let name = name.map_or("which the image does not name", |(_, name)| name.as_str());
            return Err(Error::unsupported(format!(
                "the image uses incompatible feature {bit} ({name}), which is not known here"
            )));
        }
        if !read_only && self.is_corrupt() {
            return Err(Error::corrupt(
                "the image is marked corrupt and may not be written; repair it with \
                 'qemu-img check -r all', or open it read-only",
            ));
        }
        if !read_only && self.is_dirty() {
            return Err(Error::corrupt(
                "the image was not closed in order and its refcounts are out of date (dirty bit); \
                 repair it with 'qemu-img check -r all', or open it read-only",
            ));
        }
        Ok(())
    }

    /// Cluster size in bytes.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Whether refcounts may be out of date.
    pub fn is_dirty(&self) -> bool {
        self.incompatible & DIRTY != 0
    }

    /// Whether somebody found the image corrupt.
    pub fn is_corrupt(&self) -> bool {
        self.incompatible & CORRUPT != 0
    }

    /// The number of persistent bitmaps that are of the disk as it is, and where their directory lies.
    pub(super) fn current_bitmaps(&self) -> Option<(u32, u64)> {
        self.bitmaps.filter(|_| self.autoclear & BITMAPS != 0)
    }

    /// Format-specific facts, named as `qemu-img info --output=json` names them.
    pub fn details(&self) -> serde_json::Value {
        let v3 = self.version > 2;
        let mut details = serde_json::json!({
            "compat": if v3 { "1.1" } else { "0.10" },
            "compression-type": if self.compression == 1 { "zstd" } else { "zlib" },
            "refcount-bits": 1u64 << self.refcount_order,
            "dirty-flag": self.is_dirty(),
            "cluster-size": self.cluster_size(),
        });
        if v3 {
            details["lazy-refcounts"] = (self.compatible & LAZY_REFCOUNTS != 0).into();
            details["corrupt"] = self.is_corrupt().into();
            details["extended-l2"] = (self.incompatible & EXTENDED_L2 != 0).into();
        }
        if self.crypt_method != 0 {
            details["encrypted"] = true.into();
        }
        if self.incompatible & EXTERNAL_DATA != 0 {
            details["data-file-raw"] = (self.autoclear & DATA_FILE_RAW != 0).into();
            details["data-file"] = self.data_file.clone().into();
        }
        if let Some(backing) = &self.backing {
            details["backing-filename"] = backing.file.clone().into();
            if let Some(format) = &backing.format {
                details["backing-filename-format"] = format.clone().into();
            }
        }
        details
    }
}

/// How a header is made to name another backing file. What counts at once changes within the first sector,
/// which a disk writes whole or not at all; what nobody looks at yet is written before.
#[derive(Debug)]
pub(super) struct Renaming {
    /// The new name; and the format, where the image has no backing file so far.
    pub before: Vec<(u64, Vec<u8>)>,
    /// The extension with the format, if that changes while there is a backing file.
    pub format: Option<(u64, Vec<u8>)>,
    /// The fields that point to the name.
    pub field: [u8; field::BACKING_LEN],
}

impl Renaming {
    /// Finds the places, in the first cluster of an image.
    ///
    /// # Errors
    /// If there is no room, or the header is laid out in a way that cannot be changed in place.
    pub(super) fn new(cluster: &[u8], backing: Option<&Backing>) -> Result<Renaming> {
        const SECTOR: usize = 512;
        let no_room = || {
            Error::unsupported(
                "its header has no room for another backing file name; use qemu-img rebase while it \
                 is not in use",
            )
        };
        let header_len = if be32(cluster, 4) > 2 { be32(cluster, 100) as usize } else { V2_LEN };
        let mut at = header_len;
        let mut old_format = None;
        loop {
            if at + 8 > cluster.len() {
                return Err(no_room());
            }
            let (kind, len) = (be32(cluster, at), be32(cluster, at + 4) as usize);
            if kind == EXT_END {
                break;
            }
            if kind == EXT_BACKING_FORMAT {
                old_format = Some((at, len));
            }
            at = at.saturating_add(8).saturating_add(len).next_multiple_of(8);
        }
        let old_name = match be64(cluster, field::BACKING) as usize {
            0 => 0..0,
            start => start..start + be32(cluster, field::BACKING + 8) as usize,
        };
        let Some(backing) = backing else {
            let field = [0; field::BACKING_LEN];
            return Ok(Renaming { before: Vec::new(), format: None, field });
        };
        let mut format = Vec::new();
        let name = backing.format.as_deref().unwrap_or("raw");
        format.extend(EXT_BACKING_FORMAT.to_be_bytes());
        format.extend((name.len() as u32).to_be_bytes());
        format.extend(name.as_bytes());
        format.resize(16.max(format.len().next_multiple_of(8)), 0);
        let mut end = at + 8;
        let (place, bytes) = match old_format {
            Some((place, len)) if format.len() == 8 + len.next_multiple_of(8) => (place, format),
            Some(_) => return Err(no_room()),
            None => {
                format.resize(format.len() + 8, 0);
                end = at + format.len();
                if old_name.start < end && at < old_name.end {
                    return Err(no_room());
                }
                (at, format)
            }
        };
        let mut before = Vec::new();
        let format = match cluster.get(place..place + bytes.len()) {
            Some(old) if old == bytes => None,
            // Without a name the format is of nothing. (Behind the table of feature names it lies beyond
            // the first sector.)
            Some(_) if old_name.is_empty() => {
                before.push((place as u64, bytes));
                None
            }
            Some(_) if place + bytes.len() <= SECTOR => Some((place as u64, bytes)),
            _ => return Err(no_room()),
        };
        let name = backing.file.as_bytes();
        let mut start = end.next_multiple_of(8);
        if start < old_name.end && old_name.start < start + name.len() {
            start = old_name.end.next_multiple_of(8);
        }
        if start + name.len() > cluster.len() || !(1..=1023).contains(&name.len()) {
            return Err(no_room());
        }
        let mut field = [0; field::BACKING_LEN];
        field[..8].copy_from_slice(&(start as u64).to_be_bytes());
        field[8..].copy_from_slice(&(name.len() as u32).to_be_bytes());
        before.push((start as u64, name.to_vec()));
        Ok(Renaming { before, format, field })
    }
}

/// The backing file's name, from the first cluster.
fn read_backing(cluster: &[u8], format: Option<String>) -> Result<Option<Backing>> {
    let (offset, len) = (be64(cluster, 8), be32(cluster, 16) as usize);
    if offset == 0 {
        return Ok(None);
    }
    let name = usize::try_from(offset)
        .ok()
        .and_then(|start| cluster.get(start..start.checked_add(len)?))
        .filter(|_| (1..=1023).contains(&len));
    let Some(name) = name else {
        return Err(Error::corrupt(format!(
            "backing file name of {len} bytes at {offset} is not 1 to 1023 bytes inside the first \
             cluster"
        )));
    };
    Ok(Some(Backing { file: text(name, "backing file name")?, format }))
}

fn text(bytes: &[u8], what: &str) -> Result<String> {
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text.to_string()),
        _ => Err(Error::corrupt(format!("{what} is not valid text"))),
    }
}
