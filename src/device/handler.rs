//! What each vhost-user message means to the device.
//!
//! [`Device`] is a served disk as front-ends see it, for the life of the process; [`Handler`] is
//! one connection's view of it. The `vhost` crate decodes a message, calls the handler, and sends
//! the answer; [`connection`](super::connection) runs that loop.
//!
//! # When a ring lives
//!
//! ```text
//!          NUM ADDR BASE KICK ENABLE, in any order            the last of them
//! unset ───────────────────────────────────────────► ready ───────────────────► live
//!            ▲      ▲                                 ▲  ▲                        │
//!            │      └── GET_VRING_BASE (forgets KICK) ┼──┼────────────────────────┤
//!            │                          ENABLE(0) ────┘  │                        │
//!            │                memory of the ring gone ───┘ (ready again with it)  │
//!            └── RESET_DEVICE, RESET_OWNER (forget all but CALL and ERR) ─────────┘
//! ```
//!
//! Every way out of *live* drains: the message is answered when what was popped has completed and
//! is published. The position in the ring is kept, so a ring that is enabled again goes on where it
//! was.
//!
//! # How a message fails
//!
//! * Where the front-end can be told (REPLY_ACK, or an answer with an error in it) a refused message
//!   leaves everything as it was, the front-end is told, and the connection goes on.
//! * GET_VRING_BASE, GET_QUEUE_NUM, GET_MAX_MEM_SLOTS and the feature messages cannot fail: a ring
//!   that does not exist has base 0.
//! * GET_INFLIGHT_FD answers a failure with a region of size 0: QEMU takes that as "no region", and
//!   SET_INFLIGHT_FD of size 0 is understood the same way.
//! * SET_LOG_BASE has no harmless answer: success without a log would corrupt the migrated guest.
//!   The connection ends.
//!
//! # Invariants
//!
//! * `ring.live` is true exactly while the workers have the ring.
//! * A refused message changes nothing, but for one whose only fault is that the ring it completes
//!   cannot start: what it said is kept, and the next message for the ring tries again.
//! * Nothing here is indexed by a number of the front-end that was not checked.

mod messages;
mod ring_setup;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};

use vhost::vhost_user::{Error as WireError, Result as WireResult};

use self::ring_setup::{Kick, Ring};
use super::backend_channel::{BackendChannel, Notified};
use super::device_state::{self, DeviceState};
use super::dirty_log::DirtyLog;
use super::features;
use super::inflight::InflightRegion;
use super::lines::{Lines, limited};
use super::memory::GuestMemory;
use super::rings::{RingStart, Rings, Session};
use crate::error::{Error, ErrorKind, Result, ResultExt};

/// A served disk, as front-ends see it: lives as long as the process, through all clients.
///
/// Shared between the message thread and whoever wants to tell the guest about a change; nothing
/// here is locked for longer than a few instructions.
pub struct Device {
    /// What log lines call it.
    name: String,
    rings: Arc<dyn Rings>,
    /// The channel of the client that is connected.
    client: Mutex<Option<Arc<BackendChannel>>>,
    /// Size of the disk, in sectors, that a front-end was told last.
    told_capacity: Mutex<Option<u64>>,
    /// Whether a new guest finds the write cache on.
    default_writeback: bool,
    /// What front-ends may put into the log.
    lines: Lines,
}

impl Device {
    /// A device called `name` in log lines, served by `rings`.
    pub fn new(name: impl Into<String>, rings: Arc<dyn Rings>) -> Arc<Device> {
        Arc::new(Device {
            name: name.into(),
            default_writeback: rings.config().writeback(),
            rings,
            client: Mutex::new(None),
            told_capacity: Mutex::new(None),
            lines: Lines::new(),
        })
    }

    /// What log lines call this device.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What front-ends may put into the log.
    pub(super) fn lines(&self) -> &Lines {
        &self.lines
    }

    /// Tells the guest that the config space (the size of the disk) has changed: now, or when its
    /// rings run. Any thread; never blocks. A front-end without a back-end channel (Firecracker)
    /// is not told: its operator must. Without a client nothing needs to be done: the next one
    /// reads the config space, or is told once its rings run.
    pub fn notify_config_change(&self) {
        let channel = lock(&self.client).clone();
        let Some(channel) = channel else { return };
        self.log_notified(Some(channel.notify()));
    }

    /// Whether a front-end is connected.
    pub fn is_connected(&self) -> bool {
        lock(&self.client).is_some()
    }

    /// Size of the disk, in sectors, that a front-end was told last.
    #[cfg(test)]
    pub(super) fn told_capacity(&self) -> Option<u64> {
        *lock(&self.told_capacity)
    }

    fn log_notified(&self, notified: Option<Notified>) {
        match notified {
            Some(Notified::Sent) => {
                limited!(
                    self.lines,
                    info,
                    "{}: front-end told that the config space changed",
                    self.name
                );
            }
            Some(Notified::Broken) => {
                limited!(
                    self.lines,
                    warn,
                    "{}: back-end channel broken, the front-end will not learn of changes of size",
                    self.name
                );
            }
            Some(Notified::Deferred) | None => {}
        }
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Device({})", self.name)
    }
}

/// One connection's side of the device: the state that the front-end's messages build up.
///
/// Used by one message thread; the mutex makes that visible to the compiler and is never waited
/// for.
pub struct Handler {
    device: Arc<Device>,
    channel: Arc<BackendChannel>,
    state: Mutex<State>,
}

struct State {
    features: u64,
    memory: Arc<GuestMemory>,
    /// The migration log that the front-end gave us; used while LOG_ALL is negotiated.
    log: Option<Arc<DirtyLog>>,
    inflight: Option<Arc<InflightRegion>>,
    /// Nonce of the in-flight region that this connection created last, until its session begins.
    created: Option<u128>,
    /// What the workers were told last.
    told_session: Option<Session>,
    told_write_through: Option<bool>,
    rings: Vec<Ring>,
    /// The pipe of a SET_DEVICE_STATE_FD(LOAD), read at CHECK_DEVICE_STATE.
    load: Option<File>,
    /// How a save went, for CHECK_DEVICE_STATE.
    save_failed: bool,
    /// Whether the front-end has read the size of the disk on this connection, or was told that
    /// it should.
    config_read: bool,
    /// Whether the write cache's mode was set or loaded on this connection.
    writeback_set: bool,
    /// Whether it is too late to give the guest the mode of a new guest: it was set, loaded or
    /// read on this connection, or a ring has run.
    writeback_settled: bool,
    /// A duplicate of the socket that the message being handled carries, if it carries one.
    peeked_socket: Option<OwnedFd>,
    /// Why the connection has to end.
    failure: Option<Error>,
}

impl Handler {
    /// The handler of a new connection. It becomes the one that [`Device::notify_config_change`]
    /// speaks to.
    pub fn new(device: Arc<Device>) -> Handler {
        let queues = device.rings.max_queues();
        let channel = Arc::new(BackendChannel::default());
        *lock(&device.client) = Some(channel.clone());
        Handler {
            channel,
            state: Mutex::new(State {
                features: 0,
                memory: GuestMemory::new(),
                log: None,
                inflight: None,
                created: None,
                told_session: None,
                told_write_through: None,
                rings: (0..queues).map(|_| Ring::default()).collect(),
                load: None,
                save_failed: false,
                config_read: false,
                writeback_set: false,
                writeback_settled: false,
                peeked_socket: None,
                failure: None,
            }),
            device,
        }
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The next message carries this socket: SET_BACKEND_REQ_FD, whose own file the codec keeps to
    /// itself.
    pub fn set_peeked_socket(&self, socket: Option<OwnedFd>) {
        self.state().peeked_socket = socket;
    }

    /// Why the handler wanted the connection to end.
    pub fn take_failure(&self) -> Option<Error> {
        self.state().failure.take()
    }

    /// The connection has ended: drains and stops all rings, gives memory and log back, and has
    /// the workers flush.
    pub fn close(&self) {
        let mut state = self.state();
        self.stop_all(&mut state);
        state.memory = GuestMemory::new();
        self.rings().set_memory(state.memory.clone());
        state.log = None;
        self.rings().set_dirty_log(None);
        state.inflight = None;
        state.load = None;
        {
            let mut client = lock(&self.device.client);
            if client.as_ref().is_some_and(|c| Arc::ptr_eq(c, &self.channel)) {
                *client = None;
            }
        }
        self.rings().disconnected();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn rings(&self) -> &dyn Rings {
        &*self.device.rings
    }

    fn name(&self) -> &str {
        &self.device.name
    }

    fn offered(&self) -> u64 {
        self.rings().features() | features::LOG_ALL | features::PROTOCOL_FEATURES
    }

    /// The ring's index, or what is wrong with it.
    fn index(&self, state: &State, index: u32) -> Result<usize> {
        let queues = state.rings.len();
        usize::try_from(index).ok().filter(|i| *i < queues).ok_or_else(|| {
            Error::invalid(format!(
                "queue {index}: the front-end asks for more queues than the {queues} served \
                 (num-queues here, or fewer there)"
            ))
        })
    }

    /// Starts a ring if nothing is missing and it is not live.
    fn try_start(&self, state: &mut State, index: usize) -> Result<()> {
        let ring = &state.rings[index];
        if ring.live || !ring.is_ready() {
            return Ok(());
        }
        let what = || format!("queue {index} cannot start");
        self.start(state, index).context(what)
    }

    fn start(&self, state: &mut State, index: usize) -> Result<()> {
        let ring = &state.rings[index];
        if ring.size == 0 {
            return Err(Error::invalid("the front-end has not said how large it is"));
        }
        if state.memory.is_empty() {
            return Err(Error::invalid(
                "no memory shared by the front-end (QEMU: a memory-backend with share=on; \
                 Cloud Hypervisor: --memory shared=on)",
            ));
        }
        ring.check_areas(&state.memory, state.features)?;
        let areas = ring.areas.expect("a ready ring has areas");
        let inflight = match &state.inflight {
            None => None,
            Some(region) if region.queue_size() < ring.size => {
                return Err(Error::invalid(format!(
                    "its in-flight region tracks {} requests, the ring holds {}",
                    region.queue_size(),
                    ring.size
                )));
            }
            Some(region) => {
                let queue = u16::try_from(index).ok().and_then(|index| region.queue(index));
                if queue.is_none() {
                    limited!(
                        self.device.lines,
                        warn,
                        "{}: queue {index}: not in the in-flight region, so its requests will not \
                         survive our death",
                        self.name()
                    );
                }
                queue
            }
        };
        self.sync_session(state)?;
        self.sync_write_through(state);
        let ring = &mut state.rings[index];
        let start = RingStart {
            size: ring.size,
            desc: areas.desc,
            avail: areas.avail,
            used: areas.used,
            base: ring.base,
            features: state.features,
            kick: match &ring.kick {
                Kick::Notifier(notifier) => Some(notifier.clone()),
                Kick::Poll | Kick::Unset => None,
            },
            call: ring.call.clone(),
            err: ring.err.clone(),
            inflight,
            log_used: ring.log_used(&state.memory, state.features),
            memory: state.memory.clone(),
            dirty_log: effective_log(state.features, &state.log),
        };
        ring.features = start.features;
        self.device.rings.start(index, start)?;
        ring.live = true;
        tracing::debug!("{}: queue {index}: live, size {}", self.name(), ring.size);
        self.tell_live(state);
        Ok(())
    }

    /// Drains and stops a ring if it is live; it keeps its position.
    fn stop(&self, state: &mut State, index: usize) {
        let ring = &mut state.rings[index];
        if !ring.live {
            return;
        }
        if let Some(base) = self.device.rings.stop(index) {
            ring.base = base;
        }
        ring.live = false;
        tracing::debug!("{}: queue {index}: stopped at {}", self.name(), ring.base);
        self.tell_live(state);
    }

    fn stop_all(&self, state: &mut State) {
        for index in 0..state.rings.len() {
            self.stop(state, index);
        }
    }

    /// Tells the back-end channel whether rings run, and, where they do, makes up for a front-end
    /// that did not read the config space on this connection (QEMU does not when it reconnects)
    /// and may therefore believe in an old size.
    fn tell_live(&self, state: &mut State) {
        let live = state.any_live();
        if live && !state.config_read {
            state.config_read = true;
            let now = capacity_sectors(self.rings());
            if *lock(&self.device.told_capacity) != Some(now) {
                self.channel.notify();
            }
        }
        self.device.log_notified(self.channel.set_live(live));
    }

    /// Tells the workers whose requests come, if that is not what they know.
    fn sync_session(&self, state: &mut State) -> Result<()> {
        let session = match state.inflight.as_ref().and_then(|region| region.session_nonce()) {
            None => Session::Anonymous,
            Some(nonce) if state.created == Some(nonce) => Session::New(nonce),
            Some(nonce) => Session::Returned(nonce),
        };
        if state.told_session.is_none_or(|told| told.nonce() != session.nonce()) {
            if state.any_live() {
                return Err(Error::new(
                    ErrorKind::Busy,
                    "the in-flight region is not the one of the queues that run; stop them first",
                ));
            }
            // The one before may be over even if this one cannot begin.
            state.told_session = None;
            self.device.rings.session(session, state.inflight.as_ref())?;
            state.told_session = Some(session);
            // Who comes back to it finds what it has left.
            state.created = None;
        }
        state.writeback_settled = true;
        let Some(region) = &state.inflight else { return Ok(()) };
        // A front-end that reconnects does not repeat what the guest did with the write cache.
        // This goes before what it has read of us meanwhile: the guest has not.
        if let (Session::Returned(_), Some(on), false) =
            (session, region.write_cache(), state.writeback_set)
            && self.rings().config().writeback() != on
        {
            self.device.rings.set_writeback(on);
        }
        region.note_write_cache(self.rings().config().writeback());
        Ok(())
    }

    /// Sets the write cache byte, here and for the process after us. What completes under the old
    /// mode is the workers' business.
    fn set_writeback(&self, state: &mut State, on: bool) {
        state.writeback_set = true;
        state.writeback_settled = true;
        let region = state.inflight.clone();
        // "Off" before the drain and the flush that it takes, "on" after: a process that is killed
        // in between leaves the mode in which nothing can be lost.
        if let Some(region) = region.as_ref().filter(|_| !on) {
            region.note_write_cache(false);
        }
        self.device.rings.set_writeback(on);
        if state.any_live() {
            self.sync_write_through(state);
        }
        if let Some(region) = region {
            region.note_write_cache(on);
        }
    }

    /// Tells the workers whether completed writes must be durable, if that is not what they know.
    fn sync_write_through(&self, state: &mut State) {
        let on = write_through(state.features, self.rings().config().writeback());
        if state.told_write_through != Some(on) {
            self.device.rings.set_write_through(on);
            state.told_write_through = Some(on);
        }
    }

    /// Makes `memory` the table of all rings. Rings that it leaves without their areas are stopped
    /// before; rings that it gives them back are started.
    fn replace_memory(&self, state: &mut State, memory: Arc<GuestMemory>) {
        for index in 0..state.rings.len() {
            if state.rings[index].live
                && let Err(err) =
                    state.rings[index].check_areas(&memory, state.rings[index].features)
            {
                limited!(self.device.lines, warn, "{}: queue {index}: stopped: {err}", self.name());
                self.stop(state, index);
            }
        }
        state.memory = memory;
        self.device.rings.set_memory(state.memory.clone());
        for index in 0..state.rings.len() {
            let ring = &state.rings[index];
            if ring.live {
                self.device.rings.set_log_used(index, ring.log_used(&state.memory, ring.features));
            } else if ring.is_ready()
                && ring.size != 0
                && ring.check_areas(&state.memory, state.features).is_ok()
                && let Err(err) = self.try_start(state, index)
            {
                // The memory was taken over, so the message has succeeded.
                limited!(self.device.lines, warn, "{}: {err}", self.name());
            }
        }
    }

    /// Drains and forgets all that the guest set up. Memory stays: QEMU sends it only once. CALL
    /// and ERR stay: QEMU sends ERR once per connection.
    fn reset(&self) {
        let mut state = self.state();
        self.stop_all(&mut state);
        for ring in &mut state.rings {
            *ring = Ring { call: ring.call.take(), err: ring.err.take(), ..Ring::default() };
        }
        state.inflight = None;
        state.features = 0;
        self.device.rings.set_dirty_log(None);
    }

    /// Runs a step that may be refused with an error ack.
    fn step<T>(&self, step: impl FnOnce(&mut State) -> Result<T>) -> WireResult<T> {
        let mut state = self.state();
        step(&mut state).map_err(refused)
    }

    /// The message has no answer that says "no", and none that is harmless.
    fn fail(&self, err: Error) -> WireError {
        self.state().failure = Some(err);
        WireError::BackendInternalError
    }

    /// Where the device is, for a saved state.
    fn device_state(&self) -> DeviceState {
        DeviceState {
            writeback: self.rings().config().writeback(),
            capacity_sectors: capacity_sectors(self.rings()),
            identity: self.rings().identity(),
        }
    }

    /// Takes over a state that the front-end has written into `pipe`.
    fn load_state(&self, pipe: File) -> Result<()> {
        let Some(saved) = device_state::load(pipe, device_state::LOAD_TIMEOUT)? else {
            limited!(self.device.lines, info, "{}: empty device state loaded", self.name());
            return Ok(());
        };
        saved.check_against(&self.device_state())?;
        let mut state = self.state();
        self.set_writeback(&mut state, saved.writeback);
        Ok(())
    }
}

impl State {
    fn any_live(&self) -> bool {
        self.rings.iter().any(|ring| ring.live)
    }
}

/// A refusal that the codec turns into an error ack, after which the connection goes on.
fn refused(err: Error) -> WireError {
    WireError::ReqHandlerError(io::Error::other(err))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("a lock of the message thread is poisoned")
}

/// The log to mark, which is none before LOG_ALL is negotiated and after it is taken back.
fn effective_log(features: u64, log: &Option<Arc<DirtyLog>>) -> Option<Arc<DirtyLog>> {
    log.clone().filter(|_| features & features::LOG_ALL != 0)
}

/// Whether a completed write must be durable (virtio 5.2.6.2): the guest cannot flush, or it has
/// switched the cache off. Without CONFIG_WCE the byte means nothing, and FLUSH means writeback.
fn write_through(features: u64, writeback: bool) -> bool {
    let flush = features & features::FLUSH != 0;
    let wce = features & features::CONFIG_WCE != 0;
    !flush || (wce && !writeback)
}

/// Size of the disk as the config space has it.
fn capacity_sectors(rings: &dyn Rings) -> u64 {
    match rings.config().read(0, 8).as_deref() {
        Ok(&[a, b, c, d, e, f, g, h]) => u64::from_le_bytes([a, b, c, d, e, f, g, h]),
        _ => 0,
    }
}
