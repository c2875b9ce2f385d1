//! Image formats. Each is a [`Driver`](crate::block::Driver), most of them by way of
//! [`Format`](crate::block::Format) and its adapter.

pub mod qcow2;
pub mod raw;
