//! A connection to a back-end: one method for each vhost-user message.
//!
//! [`Client`] sends, waits for the reply where the protocol has one, and checks the
//! acknowledgement where one was asked for. It imposes no order: the sequences that real
//! front-ends use are in [`super::personality`]. It holds no ring and no memory, so it can be
//! dropped and another one connected while both live on.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use super::inflight::{DirtyLog, Inflight};
use super::memory::{Memory, Region};
use super::ring::Ring;
use super::wire::{self, Fields, Message, Payload, Wire, id};
use crate::error::{Error, ErrorKind, Result, ResultExt};

/// Virtio and virtio-blk feature bits that a front-end may accept.
pub mod feature {
    /// Largest number of data segments is in the configuration space.
    pub const SEG_MAX: u64 = 1 << 2;
    /// Disk geometry is in the configuration space.
    pub const GEOMETRY: u64 = 1 << 4;
    /// The disk is read-only.
    pub const RO: u64 = 1 << 5;
    /// Block size is in the configuration space.
    pub const BLK_SIZE: u64 = 1 << 6;
    /// The FLUSH request exists.
    pub const FLUSH: u64 = 1 << 9;
    /// Topology is in the configuration space.
    pub const TOPOLOGY: u64 = 1 << 10;
    /// The cache mode can be read and changed.
    pub const CONFIG_WCE: u64 = 1 << 11;
    /// More than one queue.
    pub const MQ: u64 = 1 << 12;
    /// The DISCARD request exists.
    pub const DISCARD: u64 = 1 << 13;
    /// The WRITE_ZEROES request exists.
    pub const WRITE_ZEROES: u64 = 1 << 14;
    /// Every write to guest memory is to be logged.
    pub const LOG_ALL: u64 = 1 << 26;
    /// Indirect descriptor tables.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Notification suppression by index.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// The back-end speaks protocol features.
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    /// Virtio 1.
    pub const VERSION_1: u64 = 1 << 32;
}

/// vhost-user protocol feature bits.
pub mod protocol {
    /// Several queues.
    pub const MQ: u64 = 1 << 0;
    /// Migration log in shared memory.
    pub const LOG_SHMFD: u64 = 1 << 1;
    /// Acknowledgements.
    pub const REPLY_ACK: u64 = 1 << 3;
    /// The back-end's own channel.
    pub const BACKEND_REQ: u64 = 1 << 5;
    /// Configuration space messages.
    pub const CONFIG: u64 = 1 << 9;
    /// In-flight tracking.
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    /// Device reset.
    pub const RESET_DEVICE: u64 = 1 << 13;
    /// Memory regions one by one.
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    /// Virtio status messages.
    pub const STATUS: u64 = 1 << 16;
    /// Transfer of the device's state.
    pub const DEVICE_STATE: u64 = 1 << 19;
}

/// Bit in the payload of SET_VRING_KICK and SET_VRING_CALL that says "no descriptor".
const NO_FD: u64 = 1 << 8;

/// A connection to a back-end.
#[derive(Debug)]
pub struct Client {
    /// The socket.
    wire: Wire,
    /// How long to wait for each answer.
    timeout: Duration,
    /// Whether commands ask for an acknowledgement where the protocol allows.
    acknowledge: bool,
    /// Feature bits the back-end offered.
    offered: u64,
    /// Feature bits in use.
    features: u64,
    /// Protocol bits in use.
    protocol: u64,
    /// Our end of the back-end's own channel.
    backend_channel: Option<Wire>,
}

impl Client {
    /// Connects to a listening back-end. `timeout` bounds each later wait for an answer.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self> {
        Ok(Client::new(Wire::connect(path)?, timeout))
    }

    /// Connects to a back-end that may still be starting, for at most `timeout`.
    pub fn connect_retry(path: &Path, timeout: Duration) -> Result<Self> {
        let deadline = Instant::now() + timeout;
        Ok(Client::new(Wire::connect_retry(path, Duration::from_micros(200), deadline)?, timeout))
    }

    /// Uses a connection.
    pub fn new(wire: Wire, timeout: Duration) -> Self {
        Client {
            wire,
            timeout,
            acknowledge: true,
            offered: 0,
            features: 0,
            protocol: 0,
            backend_channel: None,
        }
    }

    /// The socket, to send what no method here would.
    pub fn wire(&self) -> &Wire {
        &self.wire
    }

    /// Our end of the back-end's own channel, after [`Client::set_backend_channel`].
    pub fn backend_channel(&self) -> Option<&Wire> {
        self.backend_channel.as_ref()
    }

    /// Changes how long to wait for each answer.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Whether commands ask for an acknowledgement once REPLY_ACK is in use (they do at first).
    pub fn set_acknowledge(&mut self, acknowledge: bool) {
        self.acknowledge = acknowledge;
    }

    /// Feature bits the back-end offered last.
    pub fn offered(&self) -> u64 {
        self.offered
    }

    /// Feature bits in use.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Protocol bits in use.
    pub fn protocol(&self) -> u64 {
        self.protocol
    }

    /// Whether all of the protocol bits are in use.
    pub fn has_protocol(&self, bits: u64) -> bool {
        self.protocol & bits == bits
    }

    /// When a wait that begins now ends.
    fn deadline(&self) -> Instant {
        Instant::now() + self.timeout
    }

    /// Sends a message that has no reply; asks for an acknowledgement and checks it, if
    /// acknowledgements are in use and wanted.
    pub fn command(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        if self.acknowledge && self.has_protocol(protocol::REPLY_ACK) {
            self.command_acknowledged(request, payload, fds)
        } else {
            self.wire.send(request, 0, payload, fds, self.deadline())
        }
    }

    /// Sends a message that asks for an acknowledgement, whatever was negotiated.
    pub fn command_acknowledged(
        &self,
        request: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<()> {
        self.wire.send(request, wire::FLAG_NEED_REPLY, payload, fds, self.deadline())?;
        match self.answer(request)?.as_u64()? {
            0 => Ok(()),
            code => Err(Error::new(
                ErrorKind::InvalidArgument,
                format!("the back-end refused request {request} (answer {code})"),
            )),
        }
    }

    /// Sends a message that has a reply of its own and waits for it.
    pub fn query(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<Message> {
        self.wire.send(request, 0, payload, fds, self.deadline())?;
        self.answer(request)
    }

    /// Waits for the reply to `request`.
    fn answer(&self, request: u32) -> Result<Message> {
        let message = self
            .wire
            .recv(self.deadline())
            .context(|| format!("no answer to vhost-user request {request}"))?;
        if message.request != request || message.flags & 7 != wire::FLAG_VERSION | wire::FLAG_REPLY
        {
            return Err(Error::corrupt(format!(
                "answer to request {request} is a message {} with flags {:#x}",
                message.request, message.flags
            )));
        }
        Ok(message)
    }

    /// Asks for the feature bits.
    pub fn get_features(&mut self) -> Result<u64> {
        self.offered = self.query(id::GET_FEATURES, &[], &[])?.as_u64()?;
        Ok(self.offered)
    }

    /// Sets the feature bits in use.
    pub fn set_features(&mut self, bits: u64) -> Result<()> {
        self.command(id::SET_FEATURES, &bits.to_ne_bytes(), &[])?;
        self.features = bits;
        Ok(())
    }

    /// Asks for the protocol feature bits.
    pub fn get_protocol_features(&self) -> Result<u64> {
        self.query(id::GET_PROTOCOL_FEATURES, &[], &[])?.as_u64()
    }

    /// Sets the protocol feature bits in use. Never acknowledged: the bit that allows it is only
    /// being set.
    pub fn set_protocol_features(&mut self, bits: u64) -> Result<()> {
        self.wire.send(id::SET_PROTOCOL_FEATURES, 0, &bits.to_ne_bytes(), &[], self.deadline())?;
        self.protocol = bits;
        Ok(())
    }

    /// Claims the device.
    pub fn set_owner(&self) -> Result<()> {
        self.command(id::SET_OWNER, &[], &[])
    }

    /// Resets the device.
    pub fn reset_device(&self) -> Result<()> {
        self.command(id::RESET_DEVICE, &[], &[])
    }

    /// Asks how many queues can be had.
    pub fn get_queue_num(&self) -> Result<u64> {
        self.query(id::GET_QUEUE_NUM, &[], &[])?.as_u64()
    }

    /// Asks how many memory regions can be had.
    pub fn get_max_mem_slots(&self) -> Result<u64> {
        self.query(id::GET_MAX_MEM_SLOTS, &[], &[])?.as_u64()
    }

    /// Reads `size` bytes of the configuration space.
    pub fn get_config(&self, offset: u32, size: u32) -> Result<Vec<u8>> {
        let payload =
            Payload::new().u32(offset).u32(size).u32(0).bytes(&vec![0; size as usize]).build();
        let message = self.query(id::GET_CONFIG, &payload, &[])?;
        let mut fields = Fields::new(&message.payload);
        if message.payload.is_empty() {
            return Err(Error::invalid(format!("the back-end has no {size} bytes at {offset}")));
        }
        let (got_offset, got_size, _flags) = (fields.u32()?, fields.u32()?, fields.u32()?);
        if got_offset != offset || got_size != size || fields.rest().len() != size as usize {
            return Err(Error::corrupt(format!(
                "asked for {size} bytes at {offset} of the configuration space, \
                 got {} ({got_size} announced) at {got_offset}",
                fields.rest().len()
            )));
        }
        Ok(fields.rest().to_vec())
    }

    /// Writes to the configuration space.
    pub fn set_config(&self, offset: u32, bytes: &[u8]) -> Result<()> {
        let payload =
            Payload::new().u32(offset).u32(bytes.len() as u32).u32(0).bytes(bytes).build();
        self.command(id::SET_CONFIG, &payload, &[])
    }

    /// Replaces the whole memory table.
    pub fn set_mem_table(&self, memory: &Memory) -> Result<()> {
        let mut payload = Payload::new().u32(memory.regions().len() as u32).u32(0);
        for region in memory.regions() {
            payload = region_fields(payload, region);
        }
        let fds: Vec<BorrowedFd<'_>> = memory.regions().iter().map(|r| r.fd()).collect();
        self.command(id::SET_MEM_TABLE, &payload.build(), &fds)
    }

    /// Adds one memory region.
    pub fn add_mem_reg(&self, region: &Region) -> Result<()> {
        let payload = region_fields(Payload::new().u64(0), region).build();
        self.command(id::ADD_MEM_REG, &payload, &[region.fd()])
    }

    /// Removes one memory region.
    pub fn rem_mem_reg(&self, region: &Region) -> Result<()> {
        let payload = region_fields(Payload::new().u64(0), region).build();
        self.command(id::REM_MEM_REG, &payload, &[])
    }

    /// Asks for a new in-flight area.
    pub fn get_inflight(&self, queues: u16, queue_size: u16) -> Result<Inflight> {
        let payload = inflight_fields(0, 0, queues, queue_size);
        let mut message = self.query(id::GET_INFLIGHT_FD, &payload, &[])?;
        let mut fields = Fields::new(&message.payload);
        let (size, offset) = (fields.u64()?, fields.u64()?);
        let fd = message
            .fds
            .pop()
            .ok_or_else(|| Error::corrupt("the in-flight area came without its descriptor"))?;
        Inflight::new(fd, size, offset, queues, queue_size)
    }

    /// Hands over an in-flight area, new or kept from an earlier connection.
    pub fn set_inflight(&self, area: &Inflight) -> Result<()> {
        let payload = inflight_fields(area.size(), area.offset(), area.queues(), area.queue_size());
        self.command(id::SET_INFLIGHT_FD, &payload, &[area.fd()])
    }

    /// Shares the migration log; the back-end answers once it has switched over.
    pub fn set_log_base(&self, log: &DirtyLog) -> Result<()> {
        let payload = Payload::new().u64(log.size()).u64(0).build();
        self.query(id::SET_LOG_BASE, &payload, &[log.fd()])?;
        Ok(())
    }

    /// Hands over one end of a new channel for the back-end's own requests and keeps the other.
    pub fn set_backend_channel(&mut self) -> Result<()> {
        let (ours, theirs) = Wire::pair()?;
        self.command(id::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()])?;
        self.backend_channel = Some(ours);
        Ok(())
    }

    /// Waits for the back-end to say that the configuration changed. Acknowledges if asked to.
    pub fn wait_config_change(&self, deadline: Instant) -> Result<()> {
        let channel = self
            .backend_channel
            .as_ref()
            .ok_or_else(|| Error::invalid("no back-end channel was set up"))?;
        let message = channel.recv(deadline)?;
        if message.flags & wire::FLAG_NEED_REPLY != 0 {
            let ok = 0u64.to_ne_bytes();
            channel.send(message.request, wire::FLAG_REPLY, &ok, &[], deadline)?;
        }
        if message.request != wire::BACKEND_CONFIG_CHANGE {
            return Err(Error::corrupt(format!("unexpected back-end request {}", message.request)));
        }
        Ok(())
    }

    /// Sets a ring's size.
    pub fn set_vring_num(&self, index: u32, size: u32) -> Result<()> {
        self.command(id::SET_VRING_NUM, &state(index, size), &[])
    }

    /// Sets a ring's next available index.
    pub fn set_vring_base(&self, index: u32, base: u32) -> Result<()> {
        self.command(id::SET_VRING_BASE, &state(index, base), &[])
    }

    /// Stops a ring; answers with its next available index once it is drained.
    pub fn get_vring_base(&self, index: u32) -> Result<u32> {
        let message = self.query(id::GET_VRING_BASE, &state(index, 0), &[])?;
        let mut fields = Fields::new(&message.payload);
        let (got, base) = (fields.u32()?, fields.u32()?);
        if got != index {
            return Err(Error::corrupt(format!("asked for ring {index}, got ring {got}")));
        }
        Ok(base)
    }

    /// Sets a ring's addresses, which are `user` addresses of this process. `log` is the guest
    /// address at which writes to the used ring are logged, if they are.
    pub fn set_vring_addr(
        &self,
        index: u32,
        descriptors: u64,
        used: u64,
        available: u64,
        log: Option<u64>,
    ) -> Result<()> {
        let payload = Payload::new()
            .u32(index)
            .u32(u32::from(log.is_some()))
            .u64(descriptors)
            .u64(used)
            .u64(available)
            .u64(log.unwrap_or(0))
            .build();
        self.command(id::SET_VRING_ADDR, &payload, &[])
    }

    /// Sets the addresses of `ring`, with its used ring logged if asked for.
    pub fn set_ring_addr(&self, ring: &Ring, log_used: bool) -> Result<()> {
        let (descriptors, available, used) = ring.user_addresses();
        let log = log_used.then(|| ring.layout().used);
        self.set_vring_addr(u32::from(ring.index()), descriptors, used, available, log)
    }

    /// Sends the eventfd by which the driver notifies the device; `None`: the device must poll.
    pub fn set_vring_kick(&self, index: u32, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        self.vring_fd(id::SET_VRING_KICK, index, fd)
    }

    /// Sends the eventfd by which the device interrupts the driver; `None`: the driver polls.
    pub fn set_vring_call(&self, index: u32, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        self.vring_fd(id::SET_VRING_CALL, index, fd)
    }

    /// Sends the eventfd by which the device reports a broken ring.
    pub fn set_vring_err(&self, index: u32, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        self.vring_fd(id::SET_VRING_ERR, index, fd)
    }

    /// Sends a ring's descriptor, or word that there is none.
    fn vring_fd(&self, request: u32, index: u32, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        let word = u64::from(index) | if fd.is_none() { NO_FD } else { 0 };
        self.command(request, &word.to_ne_bytes(), fd.as_slice())
    }

    /// Enables or disables a ring.
    pub fn set_vring_enable(&self, index: u32, enable: bool) -> Result<()> {
        self.command(id::SET_VRING_ENABLE, &state(index, u32::from(enable)), &[])
    }

    /// Begins a transfer of the device's state: `load` reads from `fd`, otherwise it is saved to
    /// it. Returns the descriptor that the back-end prefers, if it has one.
    pub fn set_device_state(
        &self,
        load: bool,
        fd: BorrowedFd<'_>,
    ) -> Result<Option<std::os::fd::OwnedFd>> {
        let payload = Payload::new().u32(u32::from(load)).u32(0).build();
        let mut message = self.query(id::SET_DEVICE_STATE_FD, &payload, &[fd])?;
        match message.as_u64()? & 0xff {
            0 => Ok(message.fds.pop()),
            code => Err(Error::invalid(format!("the back-end refused the state ({code})"))),
        }
    }

    /// Ends a transfer of the device's state and asks how it went.
    pub fn check_device_state(&self) -> Result<()> {
        match self.query(id::CHECK_DEVICE_STATE, &[], &[])?.as_u64()? {
            0 => Ok(()),
            code => Err(Error::invalid(format!("the device's state was refused ({code})"))),
        }
    }
}

/// Payload of the messages that carry a ring's number and one value.
fn state(index: u32, value: u32) -> Vec<u8> {
    Payload::new().u32(index).u32(value).build()
}

/// Appends the description of a region.
fn region_fields(payload: Payload, region: &Region) -> Payload {
    payload.u64(region.guest_addr()).u64(region.size()).u64(region.user_addr()).u64(0)
}

/// Payload of the two in-flight messages, with the padding of the C structure.
fn inflight_fields(size: u64, offset: u64, queues: u16, queue_size: u16) -> Vec<u8> {
    Payload::new().u64(size).u64(offset).u16(queues).u16(queue_size).u32(0).build()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    const SECOND: Duration = Duration::from_secs(5);

    /// Answers each message of `client` with the payload that `reply` gives, until it hangs up.
    fn serve(
        wire: Wire,
        reply: impl Fn(&Message) -> Option<Vec<u8>> + Send + 'static,
    ) -> thread::JoinHandle<Vec<u32>> {
        thread::spawn(move || {
            let mut seen = Vec::new();
            while let Ok(message) = wire.recv(Instant::now() + SECOND) {
                seen.push(message.request);
                if let Some(payload) = reply(&message) {
                    let deadline = Instant::now() + SECOND;
                    wire.send(message.request, wire::FLAG_REPLY, &payload, &[], deadline).unwrap();
                }
            }
            seen
        })
    }

    #[test]
    fn acknowledgements_are_asked_for_only_when_negotiated() {
        let (a, b) = Wire::pair().unwrap();
        let server = serve(b, |message| {
            if message.flags & wire::FLAG_NEED_REPLY != 0 {
                // Refuses rings above 3.
                return Some(u64::from(message.payload[0] > 3).to_ne_bytes().to_vec());
            }
            None
        });
        let mut client = Client::new(a, SECOND);
        client.set_vring_num(9, 128).unwrap();
        client.set_protocol_features(protocol::REPLY_ACK).unwrap();
        client.set_vring_num(3, 128).unwrap();
        assert!(client.set_vring_num(9, 128).is_err());
        client.set_acknowledge(false);
        client.set_vring_num(9, 128).unwrap();
        drop(client);
        assert_eq!(server.join().unwrap(), [8, 16, 8, 8, 8]);
    }

    #[test]
    fn config_answers_are_checked() {
        let (a, b) = Wire::pair().unwrap();
        let server = serve(b, |message| {
            let mut fields = Fields::new(&message.payload);
            let (offset, size) = (fields.u32().unwrap(), fields.u32().unwrap());
            match offset {
                0 => Some(message.payload.clone()),
                1 => Some(Payload::new().u32(1).u32(size).u32(0).build()),
                _ => Some(Vec::new()),
            }
        });
        let client = Client::new(a, SECOND);
        assert_eq!(client.get_config(0, 60).unwrap(), [0; 60]);
        assert!(client.get_config(1, 60).is_err());
        assert!(client.get_config(2, 60).is_err());
        drop(client);
        server.join().unwrap();
    }

    #[test]
    fn a_wrong_answer_is_not_mistaken_for_the_right_one() {
        let (a, b) = Wire::pair().unwrap();
        let mut client = Client::new(a, Duration::from_millis(200));
        b.send(id::GET_QUEUE_NUM, wire::FLAG_REPLY, &[0; 8], &[], Instant::now() + SECOND).unwrap();
        assert!(client.get_features().is_err());
    }
}
