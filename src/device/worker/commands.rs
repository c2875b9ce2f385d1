//! What the message thread tells a worker: rings start and stop, memory and logs change.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use super::Worker;
use super::served::Served;
use crate::device::dirty_log::DirtyLog;
use crate::device::features;
use crate::device::memory::GuestMemory;
use crate::device::pool::Command;
use crate::device::request::Limits;
use crate::device::ring::{Ring, RingConfig};
use crate::device::rings::RingStart;
use crate::error::{Error, Result};
use crate::io::engine::WATCH;

impl Worker {
    pub(super) fn obey(&mut self, command: Command) {
        match command {
            Command::Start { index, start, reply } => {
                let _ = reply.send(self.start(index, *start));
            }
            Command::Stop { index, reply } => match self.find(index) {
                Some(at) => self.rings[at].stopping = Some(reply),
                // The sender learns from the closed channel that the ring was not live.
                None => drop(reply),
            },
            Command::SetCall { index, call } => {
                if let Some(at) = self.find(index) {
                    let served = &mut self.rings[at];
                    served.call = call;
                    // A completion may have been announced on the old one, where nobody listens
                    // any more.
                    served.interrupt();
                }
            }
            Command::SetError { index, err } => {
                if let Some(at) = self.find(index) {
                    self.rings[at].err = err;
                }
            }
            Command::SetLogUsed { index, log_used } => {
                if let Some(at) = self.find(index) {
                    let served = &mut self.rings[at];
                    served.log_used = log_used;
                    let log = served.ring.dirty_log().cloned();
                    served.ring.set_dirty_log(log, log_used);
                }
            }
            Command::SetMemory { memory, reply } => {
                for at in 0..self.rings.len() {
                    self.set_memory(at, &memory);
                }
                let _ = reply.send(());
            }
            Command::SetDirtyLog { log, reply } => {
                for at in 0..self.rings.len() {
                    self.set_dirty_log(at, &log);
                }
                let _ = reply.send(());
            }
            Command::Quit => self.quit = true,
        }
    }

    fn find(&self, index: usize) -> Option<usize> {
        self.rings.iter().position(|r| r.index == index)
    }

    fn start(&mut self, index: usize, start: RingStart) -> Result<()> {
        let limits = Limits::new(
            self.capacity,
            self.export.options.block_size,
            self.read_only,
            start.features & features::device_features(self.read_only),
        );
        let memory = Arc::clone(&start.memory);
        let (ring, resubmit) = Ring::new(RingConfig {
            size: start.size,
            desc_addr: start.desc,
            avail_addr: start.avail,
            used_addr: start.used,
            base: start.base,
            features: start.features,
            memory,
            dirty_log: start.dirty_log,
            log_used_addr: start.log_used,
            inflight: start.inflight,
        })
        .map_err(|err| Error::from(err).context(format!("queue {index}")))?;
        if !resubmit.is_empty() {
            tracing::info!(
                export = self.export.name(),
                queue = index,
                "taking up {} requests that an earlier process left in flight",
                resubmit.len()
            );
        }
        self.next_watch += 1;
        let watch = WATCH | self.next_watch;
        if let Some(kick) = &start.kick {
            self.reactor.engine().watch(kick.as_raw_fd(), watch);
        }
        let mut served = Served {
            index,
            ring,
            limits,
            kick: start.kick,
            call: start.call,
            bell: Arc::clone(self.mailbox.bell()),
            err: start.err,
            watch,
            in_flight_here: 0,
            table: 0,
            retired: Vec::new(),
            log_used: start.log_used,
            resubmit: resubmit.into(),
            stopping: None,
            unpublished: 0,
            reported: false,
            early_kicks: 0,
        };
        // The process before us may have published without an interrupt.
        served.interrupt();
        self.rings.push(served);
        Ok(())
    }

    /// Lets rings go that are to stop and have nothing left in flight.
    #[inline]
    pub(super) fn settle_stops(&mut self) {
        if self.rings.iter().all(|r| r.stopping.is_none()) {
            return;
        }
        let mut at = 0;
        while at < self.rings.len() {
            let served = &mut self.rings[at];
            let drained = served.in_flight_here == 0
                && served.retired.is_empty()
                && served.resubmit.is_empty();
            if served.stopping.is_none() || !drained {
                at += 1;
                continue;
            }
            self.publish(at);
            let served = self.rings.swap_remove(at);
            if served.kick.is_some() {
                self.reactor.engine().unwatch(served.watch);
            }
            if let Some(reply) = served.stopping {
                let _ = reply.send(served.ring.last_avail());
            }
        }
        if self.in_flight == 0 && self.rings.is_empty() {
            // Slots keep the longest lists their guest ever made them hold.
            self.slots = Vec::new();
            self.free_slots = Vec::new();
        }
    }

    fn set_memory(&mut self, at: usize, memory: &Arc<GuestMemory>) {
        let served = &mut self.rings[at];
        let old = Arc::clone(served.ring.memory());
        if let Err(err) = served.ring.set_memory(Arc::clone(memory)) {
            return self.report_broken(at, &err.to_string());
        }
        if served.in_flight_here > 0 {
            served.retired.push((served.table, served.in_flight_here, old));
            served.in_flight_here = 0;
        }
        served.table = served.table.wrapping_add(1);
    }

    fn set_dirty_log(&mut self, at: usize, log: &Option<Arc<DirtyLog>>) {
        let served = &mut self.rings[at];
        served.ring.set_dirty_log(log.clone(), served.log_used);
    }
}
