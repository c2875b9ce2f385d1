//! What each message means, one method a message; see [`handler`](super::handler) for the rules.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Backend, GpuBackend, Result as WireResult, VhostUserBackendReqHandler};

use super::ring_setup::{Areas, Kick};
use super::{Handler, effective_log, lock, refused};
use crate::device::device_state;
use crate::device::dirty_log::DirtyLog;
use crate::device::features;
use crate::device::inflight::InflightRegion;
use crate::device::lines::limited;
use crate::device::memory::{GuestMemory, MAX_MEMORY_SLOTS, MemoryRegion};
use crate::device::rings::Notifier;
use crate::error::{Error, ErrorKind, Result, ResultExt};

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
                limited!(
                    self.device.lines,
                    warn,
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
            let mut started = Ok(());
            if features & features::PROTOCOL_FEATURES == 0 {
                // Such a front-end knows no SET_VRING_ENABLE: nothing else would start those that
                // come after one that cannot.
                for index in 0..state.rings.len() {
                    state.rings[index].enabled = true;
                    started = started.and(self.try_start(state, index));
                }
            }
            started
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
            self.device.rings.set_log_used(index, ring.log_used(&state.memory, ring.features));
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
            limited!(
                self.device.lines,
                warn,
                "{}: GET_VRING_BASE: no queue {index}, answered 0",
                self.name()
            );
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
            None => limited!(
                self.device.lines,
                warn,
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
                limited!(
                    self.device.lines,
                    warn,
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
            limited!(self.device.lines, warn, "{}: SET_DEVICE_STATE_FD: {err}", self.name());
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
            limited!(self.device.lines, warn, "{}: CHECK_DEVICE_STATE: {err}", self.name());
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
