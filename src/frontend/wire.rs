//! vhost-user messages over a Unix socket, as bytes and file descriptors.
//!
//! A message is a header of three native-endian 32-bit words (request, flags, payload size) and a
//! payload; descriptors travel with the header. Nothing is checked on the way out: a test may send
//! any request number, any size and any bytes.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use super::wait_for;
use crate::error::{Error, Result, ResultExt};

/// Bytes of a message's header.
pub const HEADER_LEN: usize = 12;
/// The protocol's version, in the low two bits of the flags.
pub const FLAG_VERSION: u32 = 1;
/// Flag of a reply.
pub const FLAG_REPLY: u32 = 1 << 2;
/// Flag of a message that wants an acknowledgement.
pub const FLAG_NEED_REPLY: u32 = 1 << 3;
/// Most descriptors that may come or go with one message.
pub const MAX_FDS: usize = 32;
/// Largest payload accepted from a peer.
const MAX_PAYLOAD: usize = 64 << 10;

/// Numbers of the front-end's requests.
pub mod id {
    /// Asks for the device's feature bits.
    pub const GET_FEATURES: u32 = 1;
    /// Sets the feature bits in use.
    pub const SET_FEATURES: u32 = 2;
    /// Claims the device.
    pub const SET_OWNER: u32 = 3;
    /// Gives the device up (deprecated).
    pub const RESET_OWNER: u32 = 4;
    /// Replaces the whole memory table.
    pub const SET_MEM_TABLE: u32 = 5;
    /// Shares the bitmap of written pages.
    pub const SET_LOG_BASE: u32 = 6;
    /// Eventfd to signal log updates.
    pub const SET_LOG_FD: u32 = 7;
    /// Size of a ring.
    pub const SET_VRING_NUM: u32 = 8;
    /// Addresses of a ring.
    pub const SET_VRING_ADDR: u32 = 9;
    /// Next available index of a ring.
    pub const SET_VRING_BASE: u32 = 10;
    /// Stops a ring and asks for its next available index.
    pub const GET_VRING_BASE: u32 = 11;
    /// Eventfd by which the driver notifies the device.
    pub const SET_VRING_KICK: u32 = 12;
    /// Eventfd by which the device interrupts the driver.
    pub const SET_VRING_CALL: u32 = 13;
    /// Eventfd by which the device reports a broken ring.
    pub const SET_VRING_ERR: u32 = 14;
    /// Asks for the protocol feature bits.
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    /// Sets the protocol feature bits in use.
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    /// Asks how many queues can be had.
    pub const GET_QUEUE_NUM: u32 = 17;
    /// Enables or disables a ring.
    pub const SET_VRING_ENABLE: u32 = 18;
    /// Hands over the back-end's own channel.
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    /// Reads the configuration space.
    pub const GET_CONFIG: u32 = 24;
    /// Writes the configuration space.
    pub const SET_CONFIG: u32 = 25;
    /// Asks for a new in-flight area.
    pub const GET_INFLIGHT_FD: u32 = 31;
    /// Hands over an in-flight area.
    pub const SET_INFLIGHT_FD: u32 = 32;
    /// Resets the device.
    pub const RESET_DEVICE: u32 = 34;
    /// Asks how many memory regions can be had.
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    /// Adds one memory region.
    pub const ADD_MEM_REG: u32 = 37;
    /// Removes one memory region.
    pub const REM_MEM_REG: u32 = 38;
    /// Writes the virtio status.
    pub const SET_STATUS: u32 = 39;
    /// Reads the virtio status.
    pub const GET_STATUS: u32 = 40;
    /// Begins a transfer of the device's state.
    pub const SET_DEVICE_STATE_FD: u32 = 42;
    /// Ends a transfer of the device's state.
    pub const CHECK_DEVICE_STATE: u32 = 43;
}

/// Number of the back-end's "configuration changed" request, on its own channel.
pub const BACKEND_CONFIG_CHANGE: u32 = 2;

/// A message with everything that came along.
#[derive(Debug)]
pub struct Message {
    /// Number of the request.
    pub request: u32,
    /// Version and flags.
    pub flags: u32,
    /// The payload.
    pub payload: Vec<u8>,
    /// Descriptors that came with it.
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// The payload as one 64-bit number.
    pub fn as_u64(&self) -> Result<u64> {
        let bytes: [u8; 8] = self.payload.as_slice().try_into().map_err(|_| {
            Error::corrupt(format!(
                "answer to request {} has {} bytes, not the 8 of a number",
                self.request,
                self.payload.len()
            ))
        })?;
        Ok(u64::from_ne_bytes(bytes))
    }
}

/// Header of a message with a payload of `size` bytes.
pub fn header(request: u32, flags: u32, size: u32) -> [u8; HEADER_LEN] {
    let mut bytes = [0; HEADER_LEN];
    bytes[0..4].copy_from_slice(&request.to_ne_bytes());
    bytes[4..8].copy_from_slice(&flags.to_ne_bytes());
    bytes[8..12].copy_from_slice(&size.to_ne_bytes());
    bytes
}

/// Builds a payload field by field.
#[derive(Clone, Debug, Default)]
pub struct Payload(Vec<u8>);

impl Payload {
    /// An empty payload.
    pub fn new() -> Self {
        Payload::default()
    }

    /// Appends a 16-bit number.
    pub fn u16(mut self, value: u16) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    /// Appends a 32-bit number.
    pub fn u32(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    /// Appends a 64-bit number.
    pub fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    /// Appends bytes.
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// What was built.
    pub fn build(self) -> Vec<u8> {
        self.0
    }
}

/// Reads fields out of a payload, in order.
#[derive(Debug)]
pub struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    /// Begins at the front of `payload`.
    pub fn new(payload: &'a [u8]) -> Self {
        Fields(payload)
    }

    /// The next `N` bytes.
    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (head, rest) = self
            .0
            .split_first_chunk::<N>()
            .ok_or_else(|| Error::corrupt("message is shorter than its fields"))?;
        self.0 = rest;
        Ok(*head)
    }

    /// The next 16-bit number.
    pub fn u16(&mut self) -> Result<u16> {
        Ok(u16::from_ne_bytes(self.take()?))
    }

    /// The next 32-bit number.
    pub fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_ne_bytes(self.take()?))
    }

    /// The next 64-bit number.
    pub fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_ne_bytes(self.take()?))
    }

    /// Everything that is left.
    pub fn rest(&self) -> &'a [u8] {
        self.0
    }
}

/// One end of a connection.
#[derive(Debug)]
pub struct Wire {
    /// The socket, always used without blocking.
    stream: UnixStream,
}

impl Wire {
    /// Connects once; fails at once when nobody listens.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path)
            .context(|| format!("cannot connect to {}", path.display()))?;
        Ok(Wire { stream })
    }

    /// Connects to a back-end that may still be starting: tries every `interval` until the
    /// deadline.
    pub fn connect_retry(path: &Path, interval: Duration, deadline: Instant) -> Result<Self> {
        loop {
            match Wire::connect(path) {
                Ok(wire) => return Ok(wire),
                Err(err) if matches!(err.errno(), Some(libc::ENOENT | libc::ECONNREFUSED)) => {
                    if Instant::now() >= deadline {
                        return Err(err.context("no back-end came up in time"));
                    }
                    std::thread::sleep(interval);
                }
                Err(err) => return Err(err),
            }
        }
    }

    /// Uses a connected socket.
    pub fn from_stream(stream: UnixStream) -> Self {
        Wire { stream }
    }

    /// Two ends connected to each other.
    pub fn pair() -> Result<(Wire, Wire)> {
        let (a, b) = UnixStream::pair()?;
        Ok((Wire { stream: a }, Wire { stream: b }))
    }

    /// The socket.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// The process at the other end, if it is in this process's view.
    pub fn peer_pid(&self) -> Option<u32> {
        let cred = rustix::net::sockopt::socket_peercred(&self.stream).ok()?;
        u32::try_from(cred.pid.as_raw_nonzero().get()).ok()
    }

    /// Sends bytes as they are, descriptors with the first of them.
    pub fn send_bytes(
        &self,
        bytes: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut sent = 0;
        while sent < bytes.len() {
            let mut control = SendAncillaryBuffer::new(&mut space);
            if sent == 0 && !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(Error::invalid(format!("more than {MAX_FDS} descriptors")));
            }
            let result = rustix::net::sendmsg(
                &self.stream,
                &[IoSlice::new(&bytes[sent..])],
                &mut control,
                SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            );
            match result {
                Ok(n) => sent += n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    wait_for(&self.stream, PollFlags::OUT, deadline, "room in the socket")?;
                }
                Err(Errno::PIPE) => return Err(hung_up()),
                Err(err) => return Err(Error::from(err).context("cannot send to the back-end")),
            }
        }
        Ok(())
    }

    /// Sends one message.
    pub fn send(
        &self,
        request: u32,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> Result<()> {
        let mut bytes = Vec::with_capacity(HEADER_LEN + payload.len());
        bytes.extend_from_slice(&header(request, flags | FLAG_VERSION, payload.len() as u32));
        bytes.extend_from_slice(payload);
        self.send_bytes(&bytes, fds, deadline)
    }

    /// Fills `into`, collecting descriptors.
    fn recv_exact(&self, into: &mut [u8], fds: &mut Vec<OwnedFd>, deadline: Instant) -> Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut filled = 0;
        while filled < into.len() {
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let result = rustix::net::recvmsg(
                &self.stream,
                &mut [IoSliceMut::new(&mut into[filled..])],
                &mut control,
                RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC,
            );
            match result {
                Ok(got) if got.bytes == 0 => return Err(hung_up()),
                Ok(got) => {
                    filled += got.bytes;
                    for message in control.drain() {
                        if let RecvAncillaryMessage::ScmRights(received) = message {
                            fds.extend(received);
                        }
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    wait_for(&self.stream, PollFlags::IN, deadline, "a message of the back-end")?;
                }
                Err(Errno::CONNRESET) => return Err(hung_up()),
                Err(err) => {
                    return Err(Error::from(err).context("cannot receive from the back-end"));
                }
            }
        }
        Ok(())
    }

    /// Receives one message.
    pub fn recv(&self, deadline: Instant) -> Result<Message> {
        let mut head = [0; HEADER_LEN];
        let mut fds = Vec::new();
        self.recv_exact(&mut head, &mut fds, deadline)?;
        let mut fields = Fields::new(&head);
        let (request, flags, size) = (fields.u32()?, fields.u32()?, fields.u32()? as usize);
        if size > MAX_PAYLOAD {
            return Err(Error::corrupt(format!("message {request} announces {size} bytes")));
        }
        let mut payload = vec![0; size];
        self.recv_exact(&mut payload, &mut fds, deadline)?;
        Ok(Message { request, flags, payload, fds })
    }

    /// Whether the peer has hung up.
    pub fn has_hung_up(&self) -> bool {
        use rustix::event::{PollFd, Timespec, poll};
        let mut fds = [PollFd::new(&self.stream, PollFlags::RDHUP)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        matches!(poll(&mut fds, Some(&now)), Ok(n) if n > 0)
    }

    /// Waits until the peer hangs up, throwing away what it still says.
    pub fn wait_hang_up(&self, deadline: Instant) -> Result<()> {
        let mut byte = [0; 256];
        loop {
            match self.recv_exact(&mut byte[..1], &mut Vec::new(), deadline) {
                Ok(()) => {}
                Err(err) if err.errno() == Some(libc::ECONNRESET) => return Ok(()),
                Err(err) => return Err(err),
            }
        }
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// The error of a peer that closed its end.
fn hung_up() -> Error {
    Error::from_errno(libc::ECONNRESET).context("the back-end closed the connection")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    #[test]
    fn a_message_arrives_with_its_descriptors() {
        let (a, b) = Wire::pair().unwrap();
        let fd = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let payload = Payload::new().u64(7).u32(1).u16(2).bytes(&[9]).build();
        a.send(id::SET_VRING_KICK, FLAG_NEED_REPLY, &payload, &[fd.as_fd(), fd.as_fd()], soon())
            .unwrap();
        let got = b.recv(soon()).unwrap();
        assert_eq!(got.request, id::SET_VRING_KICK);
        assert_eq!(got.flags, FLAG_VERSION | FLAG_NEED_REPLY);
        assert_eq!(got.fds.len(), 2);
        let mut fields = Fields::new(&got.payload);
        assert_eq!(fields.u64().unwrap(), 7);
        assert_eq!(fields.u32().unwrap(), 1);
        assert_eq!(fields.u16().unwrap(), 2);
        assert_eq!(fields.rest(), [9]);
        assert!(fields.u16().is_err());
    }

    #[test]
    fn waits_end_at_their_deadline_and_at_a_hang_up() {
        let (a, b) = Wire::pair().unwrap();
        let err = a.recv(Instant::now() + Duration::from_millis(20)).unwrap_err();
        assert_eq!(err.errno(), Some(libc::ETIMEDOUT));
        // Half a message, then silence for good.
        b.send_bytes(&[1, 2, 3], &[], soon()).unwrap();
        assert!(!a.has_hung_up());
        drop(b);
        assert!(a.has_hung_up());
        assert_eq!(a.recv(soon()).unwrap_err().errno(), Some(libc::ECONNRESET));
        a.wait_hang_up(soon()).unwrap();
    }

    #[test]
    fn oversized_answers_are_refused() {
        let (a, b) = Wire::pair().unwrap();
        b.send_bytes(&header(1, 5, u32::MAX), &[], soon()).unwrap();
        assert!(a.recv(soon()).is_err());
    }
}
