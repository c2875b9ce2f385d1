//! The other end of the wire: a vhost-user-blk front-end.
//!
//! It plays the virtual machine's part for `vublk bench` and for the tests, against any
//! vhost-user-blk back-end. It shares nothing with the device half of this library, so that a
//! misunderstanding of the protocol cannot hide by being made on both sides.
//!
//! ```text
//!  Session        a whole disk: queues, buffers, blocking read/write/flush/…, reconnect
//!    │
//!    ├─ personality   the message sequences of QEMU, Cloud Hypervisor and Firecracker
//!    ├─ Client        one method for each vhost-user message, replies and acknowledgements
//!    │    └─ Wire     messages and file descriptors over a socket; also sends pure nonsense
//!    ├─ Ring          the driver's side of one split virtqueue, kicks and interrupts counted
//!    ├─ Slots         requests laid out beforehand, for load without allocation
//!    ├─ request       virtio-blk requests in any descriptor layout; the configuration space
//!    ├─ Memory        guest memory: one memfd for each region; arena for buffers
//!    └─ Inflight, DirtyLog   the areas shared for recovery and for migration
//!  process        what a back-end process costs: CPU time, memory, context switches
//! ```
//!
//! Each level is public and can be used alone: a hostile test writes descriptors through
//! [`Ring::write_descriptor`], a rude one sends bytes through [`Wire::send_bytes`].
//!
//! # Invariants
//!
//! * Every wait ends at a deadline; a wait that runs out is an error whose
//!   [`errno`](crate::Error::errno) is `ETIMEDOUT`.
//! * A peer that hangs up is an error whose `errno` is `ECONNRESET`.
//! * Nothing a back-end writes to shared memory can make the front-end read outside of it.
//! * Guest memory is written by another process at any time, so it is only ever touched through
//!   raw pointers and atomics, never through references.

pub mod client;
pub mod inflight;
pub mod memory;
pub mod personality;
pub mod process;
pub mod request;
pub mod ring;
pub mod session;
pub mod slots;
pub mod wire;

pub use client::Client;
pub use inflight::{DirtyLog, Inflight};
pub use memory::{Arena, Memory, Pages, Region};
pub use personality::Personality;
pub use request::{Config, Layout, Request};
pub use ring::{Descriptor, Ring, RingLayout, Segment, UsedElement};
pub use session::{Completion, Session, SessionOptions};
pub use slots::{SlotKind, SlotShape, Slots};
pub use wire::{Message, Wire};

use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// The error of a wait for `what` that ran into its deadline.
fn timed_out(what: &str) -> Error {
    Error::from_errno(libc::ETIMEDOUT).context(format!("waiting for {what}"))
}

/// Waits until `fd` reports one of `events`, or hangs up, or the deadline passes.
fn wait_for(
    fd: impl std::os::fd::AsFd,
    events: rustix::event::PollFlags,
    deadline: Instant,
    what: &str,
) -> Result<()> {
    use rustix::event::{PollFd, Timespec, poll};
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout =
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        let mut fds = [PollFd::new(&fd, events)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) if left == Duration::ZERO => return Err(timed_out(what)),
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(err) => return Err(err.into()),
        }
    }
}
