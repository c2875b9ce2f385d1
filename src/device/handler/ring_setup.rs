//! What a front-end has told about a ring, in whatever order, until it can live.

use crate::device::features;
use crate::device::memory::GuestMemory;
use crate::device::rings::Notifier;
use crate::error::{Error, ErrorKind, Result};

/// Where a ring's kicks come from.
#[derive(Clone, Debug, Default)]
pub(super) enum Kick {
    /// Not said yet.
    #[default]
    Unset,
    /// The front-end does not kick: poll.
    Poll,
    /// This notifier.
    Notifier(Notifier),
}

/// The areas of a ring, in the front-end's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Areas {
    pub(super) desc: u64,
    pub(super) avail: u64,
    pub(super) used: u64,
    /// Guest address of the used ring for the dirty log, if the front-end gave one.
    pub(super) log: Option<u64>,
}

/// What the front-end has told about a ring.
#[derive(Debug, Default)]
pub(super) struct Ring {
    /// Number of descriptors; 0 until told.
    pub(super) size: u16,
    pub(super) areas: Option<Areas>,
    /// Next index to pop when the ring starts.
    pub(super) base: u16,
    pub(super) kick: Kick,
    pub(super) call: Option<Notifier>,
    pub(super) err: Option<Notifier>,
    pub(super) enabled: bool,
    /// The features that it was started with, if it ever was. They are its own while it is live.
    pub(super) features: u64,
    /// Whether the workers have it.
    pub(super) live: bool,
}

impl Ring {
    /// Whether everything is there that makes a ring live.
    pub(super) fn is_ready(&self) -> bool {
        self.enabled && self.areas.is_some() && !matches!(self.kick, Kick::Unset)
    }

    /// Refuses a ring whose areas are not in `memory`, with these features.
    pub(super) fn check_areas(&self, memory: &GuestMemory, features: u64) -> Result<()> {
        let Some(areas) = self.areas else { return Ok(()) };
        let n = u64::from(self.size);
        let event = event_index_len(features);
        for (what, addr, len) in [
            ("descriptor table", areas.desc, 16 * n),
            ("available ring", areas.avail, 4 + 2 * n + event),
            ("used ring", areas.used, 4 + 8 * n + event),
        ] {
            memory.front_end_ptr(addr, len).map_err(|_| {
                Error::new(
                    ErrorKind::OutOfRange,
                    format!("{what} at {addr:#x} is not in the memory that the front-end shares"),
                )
            })?;
        }
        Ok(())
    }

    /// Where writes to the used ring show in a dirty log. Cloud Hypervisor sets the log flag of no
    /// ring and expects the marks all the same, so they are made whether it is set or not.
    pub(super) fn log_used(&self, memory: &GuestMemory, features: u64) -> Option<u64> {
        let areas = self.areas?;
        let len = 4 + 8 * u64::from(self.size) + event_index_len(features);
        areas.log.or_else(|| memory.front_end_to_guest(areas.used, len))
    }
}

/// Length of the event index at the end of the available and of the used ring. It is there only if it
/// was negotiated, and rings at the end of memory count on that.
fn event_index_len(features: u64) -> u64 {
    if features & features::EVENT_IDX != 0 { 2 } else { 0 }
}
