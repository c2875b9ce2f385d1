//! A ring in service, and the memory that requests in flight still use.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::device::bell::Bell;
use crate::device::memory::GuestMemory;
use crate::device::pool::Stopped;
use crate::device::request::Limits;
use crate::device::ring::Ring;
use crate::device::rings::Notifier;

/// A ring in service.
pub(super) struct Served {
    pub(super) index: usize,
    pub(super) ring: Ring,
    pub(super) limits: Limits,
    /// Never read; kept open for the watch.
    pub(super) kick: Option<Notifier>,
    pub(super) call: Option<Notifier>,
    /// What interrupts are sent with.
    pub(super) bell: Arc<Bell>,
    pub(super) err: Option<Notifier>,
    /// User number of the kick's watch.
    pub(super) watch: u64,
    /// Requests in flight that use the current memory table.
    pub(super) in_flight_here: usize,
    /// Number of the current memory table.
    pub(super) table: u32,
    /// Earlier memory tables that requests in flight still use, and how many do.
    pub(super) retired: Vec<(u32, usize, Arc<GuestMemory>)>,
    /// Guest address of the used ring, for the dirty log.
    pub(super) log_used: Option<u64>,
    /// Heads that were in flight when an earlier back-end died, oldest first.
    pub(super) resubmit: VecDeque<u16>,
    /// Who waits for the ring to stop.
    pub(super) stopping: Option<Stopped>,
    /// Completed since the last publication.
    pub(super) unpublished: usize,
    /// Whether the ring has been reported as broken.
    pub(super) reported: bool,
    /// Kicks that came before anything was ever made available.
    pub(super) early_kicks: u32,
}

impl Served {
    /// Sends an interrupt, if the guest has asked to be told.
    #[inline]
    pub(super) fn interrupt(&mut self) {
        if let Some(call) = &self.call
            && !self.bell.ring(call)
        {
            self.lose_call();
        }
    }

    /// The interrupt's descriptor blocks.
    #[cold]
    fn lose_call(&mut self) {
        self.call = None;
        tracing::error!(
            queue = self.index,
            "the front-end lets the queue's call descriptor block: no interrupts until it sets another"
        );
    }

    /// Kicks cannot be heard any more.
    #[cold]
    pub(super) fn lose_kick(&mut self) {
        self.kick = None;
        tracing::warn!(
            queue = self.index,
            "the queue is looked at all the time until the front-end sets another kick descriptor"
        );
    }

    /// The memory table of that number.
    pub(super) fn table_of(&self, table: u32) -> &GuestMemory {
        match self.retired.iter().find(|(number, ..)| *number == table) {
            Some((.., memory)) => memory,
            None => self.ring.memory(),
        }
    }

    /// A request that used the memory table has completed.
    #[inline]
    pub(super) fn release_table(&mut self, table: u32) {
        if table == self.table {
            self.in_flight_here -= 1;
            return;
        }
        let at = self.retired.iter().position(|(number, ..)| *number == table);
        let at = at.expect("a table stays until its last request is done");
        self.retired[at].1 -= 1;
        if self.retired[at].1 == 0 {
            self.retired.swap_remove(at);
        }
    }
}
