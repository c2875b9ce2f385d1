//! Black box tests of `vublk serve` over its socket, driven by this library's own front-end, which
//! shares no code with the device, and by the `virtio-driver` crate.
//!
//! Random tests print their seed; `VUBLK_TEST_SEED` repeats it. Tests that need a right or a tool
//! that is missing say `SKIPPED` and pass. Every wait has a deadline.

#[path = "../common/mod.rs"]
mod common;

mod bench;
mod clients;
mod features;
mod hand;
mod host_errors;
mod independent;
mod malice;
mod memory;
mod migration;
mod model;
mod model_test;
mod process;
mod recovery;
mod sequences;
mod throttled;
