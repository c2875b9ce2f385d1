//! Small images for tests, put together from the structures they consist of.

use std::cell::RefCell;
use std::sync::Arc;

use zerocopy::IntoBytes;

use super::header::Header;
use super::layout::{
    Guid, HEADER_OFFSETS, METADATA_IS_DISK, METADATA_IS_REQUIRED, METADATA_ITEMS,
    METADATA_SIGNATURE, REGION_TABLE_OFFSETS, RawMetadataEntry, RawMetadataHeader, guid, payload,
};
use super::locator::Locator;
use super::region::{self, Region};
use super::{OpenOptions, Structure, Vhdx};
use crate::block::{Driver, FormatDriver, Keep, Node, NodeOptions};
use crate::error::Result;
use crate::formats::raw::Raw;
use crate::io::sim::SimFile;
use crate::io::{AlignedBuf, File, block_on};
use crate::units::{ByteRange, MIB};

/// A moment at which another thread may come in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// A block without a place has been looked up, and not those behind it.
    LookedUp,
    /// A plan for a write has seen that nothing waits for a commit, and has not looked at the mapping.
    Planning,
    /// All that has changed was made durable, as a session begins.
    Saved,
    /// A change of the mapping is kept, or needs not to be, and does not show yet.
    Kept,
    /// A change of the mapping shows, and the one who made it goes on.
    Changed,
}

/// When somebody comes, and what he does.
type Visit = (Moment, Box<dyn FnOnce()>);

thread_local! {
    /// What this thread does at a moment, in place of another thread.
    static VISITOR: RefCell<Option<Visit>> = const { RefCell::new(None) };
}

/// Has `visitor` come in between when this thread reaches that moment next.
pub fn visit_at(moment: Moment, visitor: impl FnOnce() + 'static) {
    VISITOR.set(Some((moment, Box::new(visitor))));
}

/// This thread has reached a moment.
pub fn reached(moment: Moment) {
    let due = VISITOR.with_borrow_mut(|visitor| visitor.take_if(|(at, _)| *at == moment));
    if let Some((_, visitor)) = due {
        visitor();
    }
}

/// An image to be made.
#[derive(Clone, Debug)]
pub struct Fixture {
    /// Size of the disk.
    pub size: u64,
    /// Size of a block.
    pub block: u64,
    /// Size of a logical sector.
    pub sector: u64,
    /// Whether it names a parent.
    pub has_parent: bool,
    /// Whether all blocks are in the file from the start.
    pub is_fixed: bool,
    /// Length of the log.
    pub log: u64,
}

impl Fixture {
    /// A dynamic image in blocks of 1 MiB.
    pub fn new(size: u64) -> Fixture {
        Fixture { size, block: MIB, sector: 512, has_parent: false, is_fixed: false, log: MIB }
    }

    /// The file: log, metadata, BAT, and blocks of zeros if it is fixed.
    pub fn bytes(&self) -> Vec<u8> {
        let log = ByteRange { offset: MIB, len: self.log };
        let metadata = ByteRange { offset: log.end(), len: MIB };
        let geometry =
            super::geometry::Geometry::of(self.size, self.block, self.sector, self.has_parent);
        let bat_len = (geometry.bat_entries() * 8).next_multiple_of(MIB);
        let bat = ByteRange { offset: metadata.end(), len: bat_len };
        let mut file = vec![0; bat.end() as usize];
        let mut put = |at: u64, bytes: &[u8]| {
            file[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
        };
        put(0, b"vhdxfile");
        for (sequence, at) in HEADER_OFFSETS.into_iter().enumerate() {
            let header = Header {
                sequence: 1 + sequence as u64,
                file_write_guid: Guid([1; 16]),
                data_write_guid: Guid([2; 16]),
                log_guid: Guid::ZERO,
                log,
            };
            put(at, &header.encode());
        }
        let table = region::encode(&[
            Region { guid: guid::BAT_REGION, range: bat, required: true },
            Region { guid: guid::METADATA_REGION, range: metadata, required: true },
        ]);
        REGION_TABLE_OFFSETS.into_iter().for_each(|at| put(at, &table));
        put(metadata.offset, &self.metadata());
        if self.is_fixed {
            for block in 0..geometry.payload_blocks() {
                let place = bat.end() + block * self.block;
                let at = bat.offset + geometry.payload_index(block) * 8;
                put(at, &(place | payload::FULLY_PRESENT).to_le_bytes());
            }
            file.resize((bat.end() + geometry.payload_blocks() * self.block) as usize, 0);
        }
        file
    }

    fn metadata(&self) -> Vec<u8> {
        let flags = u32::from(self.is_fixed) | u32::from(self.has_parent) << 1;
        let parameters = [(self.block as u32).to_le_bytes(), flags.to_le_bytes()].concat();
        let system = METADATA_IS_REQUIRED;
        let disk = METADATA_IS_REQUIRED | METADATA_IS_DISK;
        let mut items = vec![
            (guid::FILE_PARAMETERS, parameters, system),
            (guid::DISK_SIZE, self.size.to_le_bytes().to_vec(), disk),
            (guid::LOGICAL_SECTOR, (self.sector as u32).to_le_bytes().to_vec(), disk),
            (guid::PHYSICAL_SECTOR, 4096u32.to_le_bytes().to_vec(), disk),
            (guid::PAGE_83, vec![3; 16], disk),
        ];
        if self.has_parent {
            let entry = |key: &str, value: &str| (key.to_string(), value.to_string());
            let linkage = format!("{{{}}}", Guid([2; 16]));
            let entries =
                vec![entry("parent_linkage", &linkage), entry("relative_path", ".\\parent.vhdx")];
            items.push((guid::PARENT_LOCATOR, Locator { entries }.encode(), system));
        }
        let header = RawMetadataHeader {
            signature: *METADATA_SIGNATURE,
            reserved: 0.into(),
            entry_count: (items.len() as u16).into(),
            reserved2: [0; 20],
        };
        let mut table = header.as_bytes().to_vec();
        let mut content = Vec::new();
        for (id, bytes, flags) in items {
            let entry = RawMetadataEntry {
                guid: id,
                offset: (METADATA_ITEMS + content.len() as u32).into(),
                length: (bytes.len() as u32).into(),
                flags: flags.into(),
                reserved: 0.into(),
            };
            table.extend_from_slice(entry.as_bytes());
            content.extend(bytes);
        }
        table.resize(METADATA_ITEMS as usize, 0);
        table.extend(content);
        table
    }
}

/// The driver that tests talk to.
pub type Driven = FormatDriver<Vhdx>;

/// Opens an image on a simulated file for writing.
pub fn open_image(file: &SimFile, backing: Option<Node>, keep: Option<Keep>) -> Result<Driven> {
    let options = OpenOptions { backing, keep, ..OpenOptions::default() };
    open_with(file, options)
}

/// Opens an image on a simulated file.
pub fn open_with(file: &SimFile, options: OpenOptions) -> Result<Driven> {
    let file: Arc<dyn File> = Arc::new(file.clone());
    let structure = block_on(Structure::read(&file))?;
    FormatDriver::new(block_on(Vhdx::open(structure, options))?)
}

/// A raw disk with this content, as a parent.
pub fn parent_node(content: &[u8]) -> Node {
    let file = Arc::new(SimFile::from_bytes("parent", content.to_vec()));
    let raw = Raw::open(file, true).unwrap();
    Node::new(Arc::new(raw), NodeOptions { name: "parent".into(), ..NodeOptions::default() })
}

/// Reads from a driver.
pub async fn read(driver: &dyn Driver, offset: u64, len: u64) -> Vec<u8> {
    let mut buf = AlignedBuf::zeroed(len as usize, 4096);
    driver.read(offset, buf.buffers()).await.unwrap();
    buf.as_slice().to_vec()
}

/// Writes to a driver.
pub async fn write(driver: &dyn Driver, offset: u64, data: &[u8], fua: bool) -> Result<()> {
    let buf = AlignedBuf::from_slice(data, 4096);
    driver.write(offset, buf.buffers(), fua).await
}
