//! The line between messages and rings: what the message thread asks of the workers.
//!
//! ```text
//! front-end ── socket ──► message thread ── Rings ──► workers ──► guest memory, disk
//!                          (may block here)            (never wait for it)
//! ```
//!
//! The message thread of a connection decides *when* a ring lives: it collects size, addresses,
//! notifiers and the enabled flag in whatever order the front-end sends them, and calls
//! [`Rings::start`] when the last of them has come. The workers decide *how* it lives.
//!
//! # What holds on this line
//!
//! * All methods but [`Rings::features`] and [`Rings::config`] are called from
//!   the message thread of the one connection there is, never two at a time. They may block that
//!   thread (a drain does); nothing they wait for may wait for that thread.
//! * A ring is started only while it is not live, and only with a size that is a power of two up
//!   to 1024, an index below [`Rings::max_queues`], and three areas that lie in `memory`.
//! * A new memory table never takes the areas of a live ring away: such a ring is stopped before.
//! * [`Rings::session`] precedes the first [`Rings::start`] of a connection, and every start after
//!   the in-flight region has changed. No ring is live then.
//! * A connection that ends stops every ring, takes memory and log back (an empty table, no log),
//!   and calls [`Rings::disconnected`] last.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::config_space::ConfigSpace;
use super::dirty_log::DirtyLog;
use super::features;
use super::identity::DiskIdentity;
use super::inflight::{InflightQueue, InflightRegion};
use super::memory::GuestMemory;
use crate::error::Result;

/// A notifier that the front-end gave us. Shared, not duplicated, between the message thread
/// (which needs it again when a disabled ring is enabled) and the worker, so that a full table of
/// file descriptors cannot make a ring fail to restart.
pub type Notifier = Arc<OwnedFd>;

/// Whose in-flight region a connection works with, hence which metadata kept outside of the image
/// (design rule 7) belongs to the guest that is there now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Session {
    /// We have just created the region with this nonce: whatever was kept for another guest or an
    /// earlier life of this one is of no use any more.
    New(u128),
    /// The front-end brought a region that an earlier connection (of this process or of one before
    /// it) had created: what was kept under this nonce is the guest's, and must be honoured.
    Returned(u128),
    /// No region, or one without a nonce of ours. Nothing can be attributed to this guest.
    Anonymous,
}

impl Session {
    /// The nonce, if there is one.
    pub fn nonce(&self) -> Option<u128> {
        match self {
            Session::New(nonce) | Session::Returned(nonce) => Some(*nonce),
            Session::Anonymous => None,
        }
    }
}

/// Everything a ring needs to live.
///
/// Addresses are as the front-end sent them (its own address space). They are not sent again when
/// memory changes, so a worker translates them here and once more at each [`Rings::set_memory`].
#[derive(Debug)]
pub struct RingStart {
    /// Number of descriptors; a power of two, 1 to 1024.
    pub size: u16,
    /// Descriptor table.
    pub desc: u64,
    /// Available ring.
    pub avail: u64,
    /// Used ring.
    pub used: u64,
    /// Next index to pop from the available ring. **Not to be used** when `inflight` has a past
    /// (version 1): then it is the used index plus the number of requests in flight (item 34).
    pub base: u16,
    /// Negotiated virtio features. They stay as they are until the ring is stopped.
    pub features: u64,
    /// Where the guest's kicks arrive; `None`: there are none, the ring has to be polled. The
    /// worker must also look at the ring once by itself (item 25): what was kicked before may have
    /// been eaten by the process before us. The file is of the front-end's choosing: reading it
    /// may fail, or end.
    pub kick: Option<Notifier>,
    /// Where to send interrupts; `None`: the guest polls.
    pub call: Option<Notifier>,
    /// Where to report that the ring is broken.
    pub err: Option<Notifier>,
    /// The ring's part of the in-flight region, at least `size` entries.
    pub inflight: Option<InflightQueue>,
    /// Guest address of the used ring, if writes to it are to be marked in the dirty log.
    pub log_used: Option<u64>,
    /// The memory table of now.
    pub memory: Arc<GuestMemory>,
    /// The dirty log of now; `None` if the front-end wants no marks.
    pub dirty_log: Option<Arc<DirtyLog>>,
}

/// What the message thread asks of the workers. See the module's documentation for threads.
pub trait Rings: Send + Sync {
    /// Number of queues served.
    fn max_queues(&self) -> usize;

    /// Largest size of a queue, a power of two up to 1024. Any thread.
    fn max_queue_size(&self) -> u16 {
        features::MAX_QUEUE_SIZE
    }

    /// Virtio features that the disk offers; LOG_ALL and PROTOCOL_FEATURES are added if missing.
    /// Any thread.
    fn features(&self) -> u64;

    /// The config space as it is now. Any thread.
    fn config(&self) -> ConfigSpace;

    /// Which disk this is, for a saved device state: looks at the disk, with no ring live.
    fn identity(&self) -> DiskIdentity;

    /// Makes everything that completed durable, with no ring live: a saved device state goes with
    /// the disk of that moment, which must not be lost to a power cut or to our own death.
    fn settle(&self) -> Result<()>;

    /// Says whose requests the next rings carry, and in which in-flight region it is noted whether
    /// completed writes are kept outside of the image. Refused if what was kept for a returned
    /// guest cannot be honoured; then no ring starts.
    fn session(&self, session: Session, region: Option<&Arc<InflightRegion>>) -> Result<()>;

    /// Makes a ring live: it is popped until stopped. Requests that `inflight` says are owed come
    /// first, in the order they were popped.
    ///
    /// # Errors
    /// If an area cannot be used as a ring; then the ring is not live.
    fn start(&self, index: usize, start: RingStart) -> Result<()>;

    /// Stops popping, waits until everything in flight has completed and is published, and forgets
    /// the ring. Returns the next index to pop, by then equal to the used index; `None` if the ring
    /// was not live.
    fn stop(&self, index: usize) -> Option<u16>;

    /// Replaces the interrupt of a live ring. One interrupt is to be sent on the new one, as a
    /// completion may have been announced on the old one after the front-end stopped listening.
    fn set_call(&self, index: usize, call: Option<Notifier>);

    /// Replaces the error notifier of a live ring.
    fn set_error_fd(&self, index: usize, err: Option<Notifier>);

    /// Says where a live ring's used ring is to be marked in the log.
    fn set_log_used(&self, index: usize, log_used: Option<u64>);

    /// Publishes a memory table; returns when every live ring uses it for what it pops from now
    /// on. Requests in flight keep the table they began with.
    fn set_memory(&self, memory: Arc<GuestMemory>);

    /// Publishes a dirty log; returns when every live ring marks in it, and none in the one before:
    /// the front-end reads and frees that one after our answer.
    fn set_dirty_log(&self, log: Option<Arc<DirtyLog>>);

    /// Whether a completed write must be durable (the guest has no FLUSH, or has switched the write
    /// cache off). When it goes on, what was completed before must be made durable first.
    fn set_write_through(&self, on: bool);

    /// Sets the write cache byte of the config space. Its effect comes by
    /// [`Rings::set_write_through`].
    fn set_writeback(&self, on: bool);

    /// The client has gone. All rings are stopped; flush.
    fn disconnected(&self);
}
