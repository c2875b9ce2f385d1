//! Write logs in dm-log-writes format: what a disk was told to write, in the order in which it
//! became durable.
//!
//! ```text
//! layout     sizes, fields and bits
//! reader     Log: superblock and entries, streamed, every number checked
//! selection  a part of a log, by entry numbers, marks and flushes
//! sidecar    what vublk knows of entries and the log has no place for
//! builder    a log in memory, from the writes it is to hold
//! ```
//!
//! A log plus the disk as it was when logging began gives the disk as it was after any entry. The
//! kernel's `log-writes` target and QEMU's `blklogwrites` write the same format, and `replay-log`
//! of xfstests reads it.
//!
//! What a reader relies on, and every writer must keep:
//! * The superblock's count is the truth. Entries beyond it may be torn, or left over from an
//!   earlier run, and look perfectly valid.
//! * An entry's size is known from its header alone, so the only way to the next is past this one.
//! * The order of entries is an order in which the disk may have become durable: replaying the
//!   first N gives a disk that a power cut could have left.

pub mod builder;
pub mod fuzzing;
pub mod layout;
pub mod reader;
pub mod selection;
pub mod sidecar;

pub use builder::LogBuilder;
pub use layout::{Flags, Superblock};
pub use reader::{Entry, Index, Kind, Log, Mark, Walk};
pub use selection::{Start, Stop, Stopped};
