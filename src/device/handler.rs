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

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::sync::{Arc, Mutex, MutexGuard};

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Backend, Error as WireError, GpuBackend, Result as WireResult, VhostUserBackendReqHandler,
};

use super::backend_channel::{BackendChannel, Notified};
use super::device_state::{self, DeviceState};
use super::dirty_log::DirtyLog;
use super::features;
use super::inflight::InflightRegion;
use super::memory::{GuestMemory, MAX_MEMORY_SLOTS, MemoryRegion};
use super::rings::{Notifier, RingStart, Rings, Session};
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
        })
    }

    /// What log lines call this device.
    pub fn name(&self) -> &str {
        &self.name
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
                tracing::info!("{}: front-end told that the config space changed", self.name);
            }
            Some(Notified::Broken) => {
                tracing::warn!(
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

/// Where a ring's kicks come from.
#[derive(Clone, Debug, Default)]
enum Kick {
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
struct Areas {
    desc: u64,
    avail: u64,
    used: u64,
    /// Guest address of the used ring for the dirty log, if the front-end gave one.
    log: Option<u64>,
}

/// What the front-end has told about a ring.
#[derive(Debug, Default)]
struct Ring {
    /// Number of descriptors; 0 until told.
    size: u16,
    areas: Option<Areas>,
    /// Next index to pop when the ring starts.
    base: u16,
    kick: Kick,
    call: Option<Notifier>,
    err: Option<Notifier>,
    enabled: bool,
    /// Whether the workers have it.
    live: bool,
}

impl Ring {
    /// Whether everything is there that makes a ring live.
    fn is_ready(&self) -> bool {
        self.enabled && self.areas.is_some() && !matches!(self.kick, Kick::Unset)
    }

    /// Refuses a ring whose areas are not in `memory`.
    fn check_areas(&self, memory: &GuestMemory) -> Result<()> {
        let Some(areas) = self.areas else { return Ok(()) };
        let n = u64::from(self.size);
        for (what, addr, len) in [
            ("descriptor table", areas.desc, 16 * n),
            ("available ring", areas.avail, 6 + 2 * n),
            ("used ring", areas.used, 6 + 8 * n),
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
    fn log_used(&self, memory: &GuestMemory) -> Option<u64> {
        let areas = self.areas?;
        let len = 6 + 8 * u64::from(self.size);
        areas.log.or_else(|| memory.front_end_to_guest(areas.used, len))
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
    /// Nonce of the in-flight region that this connection created last.
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
        ring.check_areas(&state.memory)?;
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
                    tracing::warn!(
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
            log_used: ring.log_used(&state.memory),
            memory: state.memory.clone(),
            dirty_log: effective_log(state.features, &state.log),
        };
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
        if state.told_session != Some(session) {
            self.device.rings.session(session, state.inflight.as_ref())?;
            state.told_session = Some(session);
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
        self.device.rings.set_writeback(on);
        if state.any_live() {
            self.sync_write_through(state);
        }
        if let Some(region) = &state.inflight {
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
                && let Err(err) = state.rings[index].check_areas(&memory)
            {
                tracing::warn!("{}: queue {index}: stopped: {err}", self.name());
                self.stop(state, index);
            }
        }
        state.memory = memory;
        self.device.rings.set_memory(state.memory.clone());
        for index in 0..state.rings.len() {
            let ring = &state.rings[index];
            if ring.live {
                self.device.rings.set_log_used(index, ring.log_used(&state.memory));
            } else if ring.is_ready()
                && ring.size != 0
                && ring.check_areas(&state.memory).is_ok()
                && let Err(err) = self.try_start(state, index)
            {
                // The memory was taken over, so the message has succeeded.
                tracing::warn!("{}: {err}", self.name());
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
            tracing::info!("{}: empty device state loaded", self.name());
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

/// Takes a kick, call or error file. It is the front-end's choice what it is; what cannot be a
/// notifier at all (a file or device whose reads always succeed would keep a worker busy for ever)
/// is refused here.
fn notifier(file: Option<File>) -> Result<Option<Notifier>> {
    let Some(file) = file else { return Ok(None) };
    let kind = file.metadata()?.file_type();
    if kind.is_file() || kind.is_dir() || kind.is_block_device() || kind.is_char_device() {
        return Err(Error::invalid("neither an eventfd nor a pipe"));
    }
    // The codec receives files without it.
    rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::CLOEXEC)?;
    // A worker must not wait for a pipe or a counter that is full. (All front-ends make theirs
    // non-blocking anyhow; the flag belongs to both sides.)
    let flags = rustix::fs::fcntl_getfl(&file)?;
    if !flags.contains(rustix::fs::OFlags::NONBLOCK) {
        rustix::fs::fcntl_setfl(&file, flags | rustix::fs::OFlags::NONBLOCK)?;
    }
    Ok(Some(Arc::new(OwnedFd::from(file))))
}

fn region(from: &VhostUserMemoryRegion) -> MemoryRegion {
    MemoryRegion {
        guest_addr: from.guest_phys_addr,
        size: from.memory_size,
        front_end_addr: from.user_addr,
        mmap_offset: from.mmap_offset,
    }
}

impl VhostUserBackendReqHandler for Handler {
    /// Means nothing: QEMU sends it seventh, and twice is no error.
    fn set_owner(&self) -> WireResult<()> {
        Ok(())
    }

    /// Obsolete; the specification leaves "disable all rings".
    fn reset_owner(&self) -> WireResult<()> {
        self.reset();
        Ok(())
    }

    /// QEMU sends it at every reset of the guest, several times, before anything is negotiated.
    fn reset_device(&self) -> WireResult<()> {
        self.reset();
        Ok(())
    }

    fn get_features(&self) -> WireResult<u64> {
        Ok(self.offered())
    }

    /// Comes twice at each start, and with LOG_ALL toggled while rings run: it stops nothing.
    fn set_features(&self, features: u64) -> WireResult<()> {
        self.step(|state| {
            let unknown = features & !self.offered();
            if unknown != 0 {
                return Err(Error::unsupported(format!(
                    "feature bits {unknown:#x} were not offered"
                )));
            }
            let changed = (state.features ^ features) & !features::LOG_ALL;
            if changed != 0 && state.any_live() {
                tracing::warn!(
                    "{}: feature bits {changed:#x} changed while queues run: they keep theirs \
                     until they start again",
                    self.name()
                );
            }
            let before = effective_log(state.features, &state.log);
            state.features = features;
            let after = effective_log(state.features, &state.log);
            if before.is_some() != after.is_some() {
                self.device.rings.set_dirty_log(after);
            }
            if state.any_live() {
                self.sync_write_through(state);
            }
            if features & features::PROTOCOL_FEATURES == 0 {
                // Such a front-end knows no SET_VRING_ENABLE.
                for index in 0..state.rings.len() {
                    state.rings[index].enabled = true;
                    self.try_start(state, index)?;
                }
            }
            Ok(())
        })
    }

    /// Replaces all memory at once.
    fn set_mem_table(
        &self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> WireResult<Option<Vec<VhostUserMemoryRegionBase>>> {
        self.step(|state| {
            let table = GuestMemory::from_regions(regions.iter().map(region).zip(files))?;
            self.replace_memory(state, table);
            Ok(None)
        })
    }

    fn set_vring_num(&self, index: u32, num: u32) -> WireResult<()> {
        self.step(|state| {
            let index = self.index(state, index)?;
            let size = u16::try_from(num)
                .ok()
                .filter(|n| n.is_power_of_two() && *n <= self.device.rings.max_queue_size())
                .ok_or_else(|| {
                    Error::invalid(format!(
                        "queue {index}: size {num} is not a power of two up to {} (--queue-size)",
                        self.device.rings.max_queue_size()
                    ))
                })?;
            let ring = &mut state.rings[index];
            if ring.live && ring.size != size {
                return Err(live_error(index, "size"));
            }
            ring.size = size;
            self.try_start(state, index)
        })
    }

    /// Also comes for a live ring, to switch marks of the used ring in the dirty log on and off.
    fn set_vring_addr(
        &self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> WireResult<()> {
        self.step(|state| {
            let index = self.index(state, index)?;
            let log = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG).then_some(log);
            let areas = Areas { desc: descriptor, avail: available, used, log };
            let ring = &mut state.rings[index];
            if !ring.live {
                ring.areas = Some(areas);
                return self.try_start(state, index);
            }
            if ring.areas.map(|old| Areas { log, ..old }) != Some(areas) {
                return Err(live_error(index, "addresses"));
            }
            ring.areas = Some(areas);
            self.device.rings.set_log_used(index, ring.log_used(&state.memory));
            Ok(())
        })
    }

    fn set_vring_base(&self, index: u32, base: u32) -> WireResult<()> {
        self.step(|state| {
            let index = self.index(state, index)?;
            let base = u16::try_from(base).map_err(|_| {
                Error::invalid(format!("queue {index}: base {base} is not a 16-bit index"))
            })?;
            let ring = &mut state.rings[index];
            if ring.live {
                return Err(live_error(index, "base"));
            }
            ring.base = base;
            Ok(())
        })
    }

    /// Stops the ring. Answers for a ring that never ran, too, and for one that does not exist:
    /// there is no way to say no, and a front-end without an answer waits for ever.
    fn get_vring_base(&self, index: u32) -> WireResult<VhostUserVringState> {
        let mut state = self.state();
        let Ok(at) = self.index(&state, index) else {
            tracing::warn!("{}: GET_VRING_BASE: no queue {index}, answered 0", self.name());
            return Ok(VhostUserVringState::new(index, 0));
        };
        self.stop(&mut state, at);
        let ring = &mut state.rings[at];
        ring.kick = Kick::Unset;
        ring.call = None;
        Ok(VhostUserVringState::new(index, ring.base.into()))
    }

    /// For a live ring, the ring is drained and goes on with the new kick.
    fn set_vring_kick(&self, index: u8, fd: Option<File>) -> WireResult<()> {
        self.step(|state| {
            let index = self.index(state, index.into())?;
            let kick = notifier(fd).context(|| format!("queue {index}: kick"))?;
            self.stop(state, index);
            state.rings[index].kick = kick.map_or(Kick::Poll, Kick::Notifier);
            self.try_start(state, index)
        })
    }

    fn set_vring_call(&self, index: u8, fd: Option<File>) -> WireResult<()> {
        self.step(|state| {
            let index = self.index(state, index.into())?;
            let call = notifier(fd).context(|| format!("queue {index}: call"))?;
            let ring = &mut state.rings[index];
            ring.call = call;
            if ring.live {
                self.device.rings.set_call(index, ring.call.clone());
            }
            Ok(())
        })
    }

    fn set_vring_err(&self, index: u8, fd: Option<File>) -> WireResult<()> {
        self.step(|state| {
            let index = self.index(state, index.into())?;
            let err = notifier(fd).context(|| format!("queue {index}: error notifier"))?;
            let ring = &mut state.rings[index];
            ring.err = err;
            if ring.live {
                self.device.rings.set_error_fd(index, ring.err.clone());
            }
            Ok(())
        })
    }

    fn get_protocol_features(&self) -> WireResult<VhostUserProtocolFeatures> {
        Ok(features::protocol_features())
    }

    fn set_protocol_features(&self, wanted: u64) -> WireResult<()> {
        let unknown = wanted & !features::protocol_features().bits();
        if unknown != 0 {
            return Err(refused(Error::unsupported(format!(
                "protocol feature bits {unknown:#x} were not offered"
            ))));
        }
        Ok(())
    }

    fn get_queue_num(&self) -> WireResult<u64> {
        Ok(self.rings().max_queues() as u64)
    }

    /// Off means drained: Cloud Hypervisor pauses a guest with nothing but this message, and then
    /// saves its memory.
    fn set_vring_enable(&self, index: u32, enable: bool) -> WireResult<()> {
        self.step(|state| {
            let index = self.index(state, index)?;
            state.rings[index].enabled = enable;
            if enable {
                self.try_start(state, index)
            } else {
                self.stop(state, index);
                Ok(())
            }
        })
    }

    fn get_config(
        &self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> WireResult<Vec<u8>> {
        self.step(|state| {
            // Older Cloud Hypervisor counts from 0x100.
            let whole_capacity = matches!(offset, 0 | 0x100) && size >= 8;
            if whole_capacity {
                // Before the config space is read: a change after that is a new one.
                self.channel.config_was_read();
                state.config_read = true;
            }
            // Who reads before anything has run or was set belongs to a new guest: it finds the
            // cache as it was in the beginning, not as another guest has left it.
            if !std::mem::replace(&mut state.writeback_settled, true)
                && self.rings().config().writeback() != self.device.default_writeback
            {
                self.device.rings.set_writeback(self.device.default_writeback);
            }
            let bytes = self.rings().config().read(offset, size)?;
            if let Some(capacity) = bytes.first_chunk::<8>().filter(|_| whole_capacity) {
                *lock(&self.device.told_capacity) = Some(u64::from_le_bytes(*capacity));
            }
            Ok(bytes)
        })
    }

    fn set_config(
        &self,
        offset: u32,
        bytes: &[u8],
        _flags: VhostUserConfigFlags,
    ) -> WireResult<()> {
        self.step(|state| {
            if self.rings().features() & features::CONFIG_WCE == 0 {
                return Err(Error::unsupported("the write cache of this disk cannot be switched"));
            }
            let on = self.rings().config().write(offset, bytes)?;
            self.set_writeback(state, on);
            Ok(())
        })
    }

    /// The codec's own end of the socket is of no use: it cannot send what we need and waits for
    /// answers. Ours was peeked.
    fn set_backend_req_fd(&self, _backend: Backend) {
        match self.state().peeked_socket.take() {
            Some(socket) => self.device.log_notified(self.channel.set_socket(socket)),
            None => tracing::warn!(
                "{}: SET_BACKEND_REQ_FD came in pieces: the front-end will not learn of changes \
                 of size",
                self.name()
            ),
        }
    }

    fn set_gpu_socket(&self, _gpu_backend: GpuBackend) -> WireResult<()> {
        Err(refused(Error::unsupported("a disk has no screen")))
    }

    /// Never offered, so the codec lets none through; an answer without a file would be sent.
    fn get_shared_object(&self, _uuid: VhostUserSharedMsg) -> WireResult<File> {
        Err(refused(Error::unsupported("no shared objects")))
    }

    /// Creates a region for rings of the size asked for. Where that cannot be, answers a region of
    /// size 0, which QEMU takes as none.
    fn get_inflight_fd(&self, asked: &VhostUserInflight) -> WireResult<(VhostUserInflight, File)> {
        let (queues, size) = (asked.num_queues, asked.queue_size);
        match InflightRegion::create(queues, size) {
            Ok(new) => {
                self.state().created = Some(new.session_nonce);
                Ok((VhostUserInflight::new(new.mmap_size, 0, queues, size), new.file))
            }
            Err(err) => {
                tracing::warn!(
                    "{}: GET_INFLIGHT_FD: no region for {queues} queues of {size}, requests in \
                     flight will not survive our death: {err}",
                    self.name()
                );
                match File::open("/dev/null") {
                    Ok(file) => Ok((VhostUserInflight::new(0, 0, queues, size), file)),
                    Err(err) => Err(self.fail(Error::from(err).context("GET_INFLIGHT_FD"))),
                }
            }
        }
    }

    /// The region is used by rings that start from now on.
    fn set_inflight_fd(&self, given: &VhostUserInflight, file: File) -> WireResult<()> {
        self.step(|state| {
            if given.mmap_size == 0 {
                state.inflight = None;
                return Ok(());
            }
            let region = InflightRegion::from_front_end(
                file,
                given.mmap_size,
                given.mmap_offset,
                given.num_queues,
                given.queue_size,
            )?;
            state.inflight = Some(region);
            Ok(())
        })
    }

    fn get_max_mem_slots(&self) -> WireResult<u64> {
        Ok(MAX_MEMORY_SLOTS as u64)
    }

    fn add_mem_region(
        &self,
        added: &VhostUserSingleMemoryRegion,
        fd: File,
        _postcopy_listening: Option<bool>,
    ) -> WireResult<Option<VhostUserMemoryRegionBase>> {
        self.step(|state| {
            let table = state.memory.with_region(&region(added), fd)?;
            self.replace_memory(state, table);
            Ok(None)
        })
    }

    fn remove_mem_region(&self, removed: &VhostUserSingleMemoryRegion) -> WireResult<()> {
        self.step(|state| {
            let table = state.memory.without_region(&region(removed))?;
            self.replace_memory(state, table);
            Ok(())
        })
    }

    /// Saves at once, into the pipe; loads at CHECK_DEVICE_STATE, as the front-end fills the pipe
    /// only after this answer.
    fn set_device_state_fd(
        &self,
        direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        fd: File,
    ) -> WireResult<Option<File>> {
        let result = self.step(|state| {
            if state.any_live() {
                return Err(Error::invalid("device state: queues are running"));
            }
            state.save_failed = false;
            state.load = None;
            match direction {
                VhostTransferStateDirection::SAVE => {
                    let saved = (self.rings().settle())
                        .and_then(|()| device_state::save(fd, &self.device_state()));
                    state.save_failed = saved.is_err();
                    saved
                }
                VhostTransferStateDirection::LOAD => {
                    state.load = Some(fd);
                    Ok(())
                }
            }
        });
        // The codec answers for us and forgets the reason.
        if let Err(err) = &result {
            tracing::warn!("{}: SET_DEVICE_STATE_FD: {err}", self.name());
        }
        result.map(|()| None)
    }

    fn check_device_state(&self) -> WireResult<()> {
        let (load, save_failed) = {
            let mut state = self.state();
            (state.load.take(), std::mem::take(&mut state.save_failed))
        };
        let result = match load {
            Some(pipe) => self.load_state(pipe),
            None if save_failed => Err(Error::new(ErrorKind::Io, "device state was not saved")),
            None => Ok(()),
        };
        result.map_err(|err| {
            tracing::warn!("{}: CHECK_DEVICE_STATE: {err}", self.name());
            refused(err)
        })
    }

    fn get_shmem_config(&self) -> WireResult<VhostUserShMemConfig> {
        Ok(VhostUserShMemConfig::default())
    }

    /// Swaps the log under running rings; the answer says that the old one is not written any more.
    fn set_log_base(&self, log: &VhostUserLog, file: File) -> WireResult<()> {
        let log = DirtyLog::new(file, log.mmap_offset, log.mmap_size).map_err(|err| {
            self.fail(err.context("SET_LOG_BASE: the migration would miss pages"))
        })?;
        let mut state = self.state();
        state.log = Some(log);
        if let Some(log) = effective_log(state.features, &state.log) {
            self.device.rings.set_dirty_log(Some(log));
        }
        Ok(())
    }
}

fn live_error(index: usize, what: &str) -> Error {
    Error::new(ErrorKind::Busy, format!("queue {index}: its {what} cannot change while it runs"))
}
