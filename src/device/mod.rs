//! The device: vhost-user messages, rings, requests and the workers that serve them.
//!
//! ```text
//! exports ► one of all this for each disk
//! server ─► connection ─► handler ─► rings (trait) ◄┄┄ workers
//! socket,    one thread,  what a     where messages end and rings begin
//! clients    the codec    message means
//!              handler ─► backend_channel, device_state
//!
//! sigbus ◄── mapping ◄── memory      what the front-end shares, mapped and survivable
//!                  ▲──── dirty_log   pages we wrote, for migration
//!                  ▲──── inflight    requests we owe, for the process after us
//! chain ─► ring                      descriptors to iovecs; heads in, used elements out
//! request                            iovecs to a checked virtio-blk request
//! bell                               interrupts, and who waits for a worker that sends one
//! lines                              the log is not a front-end's to fill
//! features, config_space             what the device says about itself
//! ```
//!
//! The modules of the upper part run on the message thread, which may wait: for a message, or in a
//! drain. Nothing in those of the lower part waits, locks on the data path, or trusts a byte of
//! shared memory.

pub mod backend_channel;
mod bell;
pub mod chain;
pub mod config_space;
pub mod connection;
pub mod device_state;
pub mod dirty_log;
pub mod export;
pub mod exports;
pub mod features;
#[doc(hidden)]
pub mod fuzzing;
pub mod handler;
pub mod identity;
pub mod inflight;
pub mod latency;
mod lines;
pub mod mapping;
pub mod memory;
#[doc(hidden)]
pub mod message_fuzzing;
#[cfg(test)]
mod message_tests;
mod pace;
mod patience;
pub mod pool;
#[cfg(test)]
mod pool_tests;
pub mod request;
pub mod ring;
#[cfg(test)]
mod ring_tests;
pub mod rings;
pub mod server;
pub mod sigbus;
#[cfg(test)]
pub(crate) mod testing;
mod worker;
