//! Which parts of a disk: structures without I/O.

pub mod dirty;

pub use dirty::DirtyMap;
