//! vublk: a virtio-blk vhost-user back-end.
//!
//! One process serves a guest's virtqueues straight from shared memory into a stack of image
//! formats and filters.
//!
//! # Rooms
//!
//! ```text
//! error units crc32c words everybody uses
//!    ▲
//! io                 engine (io_uring or threads), local executor, buffers, host files, sim files
//!    ▲
//! block              Node, Driver, Format, the adapter, gate, rights, locks, open gate, keep
//!    ▲
//! formats filters    raw, qcow2 (a bridge to the imago crate); guess guard
//!    ▲
//! images             open, create, check: from a path to a node, with locks and the open gate
//!    ▲
//! jobs               what all long work on disks has in common: states, pause, speed, completion
//!    ▲
//! control            QMP: the wire, the commands, the events
//!    ▲
//! cli                serve create info check map measure convert compare resize log qmp top bench
//!                    completions man
//!
//! write_log          the dm-log-writes format (reading, sidecar); sees io only
//! crash              the disks that a power cut could have left; sees block, io and write_log
//!
//! device             sees block and io only: messages, rings, requests, workers
//! frontend           the other end of the wire, for `vublk bench` and for tests; knows nothing
//!                    of device
//! ```
//!
//! # Life of a request
//!
//! ```text
//! guest ── virtqueue ──► device::ring       pop a chain, walk its descriptors
//!                          │  device::request   parse it as a byte stream, translate to iovecs
//!                          ▼
//!                        device::worker     one thread per queue (or fewer), one io_uring each
//!                          │
//!            planned path  │  anything else
//!        ┌─────────────────┴──────────────────┐
//!        ▼                                    ▼
//!   Driver::plan()                      a local async task:
//!   answers with file extents           Driver::read/write/discard/… of the same stack
//!        │                                    │
//!        ▼                                    ▼
//!   io::Engine: readv/writev on guest memory, completion switches on a slot number
//!        │
//! guest ◄── used ring ── device::ring       status byte, used elements, one index store and at
//!                                           most one interrupt a batch
//! ```
//!
//! A request that needs no change of metadata takes the *planned path*: one synchronous
//! [`block::Driver::plan`] down the layers, no future, no lock held, no allocation. When a layer
//! answers "not now", the same request becomes an ordinary asynchronous task on the worker's own
//! executor.

pub mod bitmap;
pub mod block;
pub mod cli;
pub mod control;
pub mod crash;
pub mod crc32c;
pub mod device;
pub mod error;
pub mod filters;
pub mod formats;
pub mod frontend;
pub mod images;
pub mod io;
pub mod jobs;
pub mod terminal;
pub mod units;
pub mod write_log;

pub use error::{Error, ErrorKind, Result};
