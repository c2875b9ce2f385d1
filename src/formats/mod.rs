//! Image formats.
//!
//! Each format is a [`Driver`](crate::block::Driver), most of them by way of
//! [`Format`](crate::block::Format) and its adapter. Formats know nothing of each other, of
//! filters or of how a path becomes a disk: that is the business of [`images`](crate::images).

pub mod addcow;
pub mod qcow2;
pub mod raw;
pub mod vhdx;
