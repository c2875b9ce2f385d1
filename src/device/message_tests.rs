//! The message thread against scripted front-ends: the message sequences of QEMU, Cloud Hypervisor
//! and Firecracker as traced or read, and one test for each behaviour that they rely on. Numbers in
//! brackets are the points of the protocol sheet. The workers are a mock that also watches the
//! rules of [`super::rings`].

mod config;
mod front_ends;
mod memory;
mod rings;
mod wire;

use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use vhost::vhost_user::message::FrontendReq as R;

use super::connection::{self, Ended, Stop};
use super::device_state::DeviceState;
use super::features::{self, CONFIG_WCE, FLUSH, LOG_ALL, PROTOCOL_FEATURES, VERSION_1};
use super::handler::Device;
use super::identity::DiskIdentity;
use super::inflight::InflightRegion;
use super::mapping::memfd_create;
use super::message_fuzzing::{Call, MockRings, send_bytes, send_message};
use super::rings::Session;
use crate::error::Result;

/// Size of the front-end's memory.
const MEMORY: u64 = 1 << 20;
/// Where the front-end has it in its own address space.
const BASE: u64 = 0x7f12_0000_0000;
/// What most tests negotiate.
const FEATURES: u64 = VERSION_1 | PROTOCOL_FEATURES | FLUSH;
/// What GET_INFLIGHT_FD asks for: two queues of 128.
const TWO_OF_128: (u16, u16) = (2, 128);

/// A scripted front-end and the connection that serves it.
struct FrontEnd {
    socket: UnixStream,
    rings: Arc<MockRings>,
    device: Arc<Device>,
    stop: Arc<Stop>,
    thread: JoinHandle<Result<Ended>>,
    memory: File,
    /// Lines that an operator finds in the log.
    lines: Arc<AtomicUsize>,
}

/// Counts them.
struct Lines(Arc<AtomicUsize>);

impl tracing::Subscriber for Lines {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() <= tracing::Level::INFO
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, _: &tracing::Event<'_>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

/// An in-flight region as a front-end keeps it.
struct Region {
    file: File,
    size: u64,
    dimensions: (u16, u16),
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_ne_bytes()).collect()
}

fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|w| w.to_ne_bytes()).collect()
}

fn long(bytes: &[u8]) -> u64 {
    u64::from_ne_bytes(bytes.try_into().expect("a reply of eight bytes"))
}

/// Body of SET_VRING_ADDR; ring `index` has its areas in pages of its own.
fn areas(index: u32, log: Option<u64>) -> Vec<u8> {
    let at = BASE + ring_offset(index);
    let mut body = words(&[index, log.is_some().into()]);
    body.extend(longs(&[at, at + 0x2000, at + 0x1000, log.unwrap_or(0)]));
    body
}

fn ring_offset(index: u32) -> u64 {
    u64::from(index) * 0x4000
}

/// Body of ADD_MEM_REG and REM_MEM_REG.
fn region(gpa: u64, size: u64, offset: u64) -> Vec<u8> {
    longs(&[0, gpa, size, BASE + gpa, offset])
}

impl FrontEnd {
    /// Connects to a new device of `queues` queues.
    fn new(queues: usize) -> FrontEnd {
        let rings = MockRings::new(queues);
        let device = Device::new("test", rings.clone());
        FrontEnd::connect(&device, &rings)
    }

    /// Connects to a device.
    fn connect(device: &Arc<Device>, rings: &Arc<MockRings>) -> FrontEnd {
        let (socket, theirs) = UnixStream::pair().unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let stop = Arc::new(Stop::default());
        let lines = Arc::new(AtomicUsize::new(0));
        let thread = std::thread::spawn({
            let (device, stop, lines) = (device.clone(), stop.clone(), Lines(lines.clone()));
            move || {
                tracing::subscriber::with_default(lines, || {
                    connection::serve(theirs, &device, &stop)
                })
            }
        });
        FrontEnd {
            socket,
            rings: rings.clone(),
            device: device.clone(),
            stop,
            thread,
            lines,
            memory: memfd_create("guest", MEMORY, false).unwrap(),
        }
    }

    /// Sends a message that asks for no answer.
    fn tell(&self, request: R, body: &[u8], files: &[BorrowedFd<'_>]) {
        send_message(&self.socket, request as u32, 1, body, files).unwrap();
    }

    /// Receives an answer: its body, and a file if there is one.
    fn answer(&self, request: R) -> (Vec<u8>, Option<OwnedFd>) {
        let mut header = [0; 12];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got = recvmsg(
            &self.socket,
            &mut [IoSliceMut::new(&mut header)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )
        .unwrap_or_else(|err| panic!("no answer to {request:?}: {err}"));
        assert_eq!(got.bytes, 12, "{request:?}: the connection has ended");
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(4)), (request as u32, 5), "answer to {request:?}");
        let mut body = vec![0; word(8) as usize];
        (&self.socket).read_exact(&mut body).unwrap();
        let mut file = None;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(mut files) = message {
                file = files.next();
            }
        }
        (body, file)
    }

    /// Sends a message that has an answer of its own.
    fn ask(&self, request: R, body: &[u8]) -> Vec<u8> {
        self.tell(request, body, &[]);
        self.answer(request).0
    }

    /// Sends a message with NEED_REPLY; true if it was accepted.
    fn accepts(&self, request: R, body: &[u8], files: &[BorrowedFd<'_>]) -> bool {
        send_message(&self.socket, request as u32, 9, body, files).unwrap();
        long(&self.answer(request).0) == 0
    }

    /// Waits until all messages so far are handled.
    fn sync(&self) {
        self.ask(R::GET_FEATURES, &[]);
    }

    /// What the workers were asked since the last time.
    fn calls(&self) -> Vec<Call> {
        self.sync();
        self.rings.take_calls()
    }

    /// Negotiates everything, without SET_OWNER, which nobody may depend on.
    fn negotiate(&self, features: u64) {
        let offered = long(&self.ask(R::GET_FEATURES, &[]));
        assert_eq!(features & !offered, 0);
        let protocol = self.ask(R::GET_PROTOCOL_FEATURES, &[]);
        self.tell(R::SET_PROTOCOL_FEATURES, &protocol, &[]);
        assert!(self.accepts(R::SET_FEATURES, &longs(&[features]), &[]));
    }

    fn add_memory(&self) {
        assert!(self.accepts(R::ADD_MEM_REG, &region(0, MEMORY, 0), &[self.memory.as_fd()]));
    }

    /// NUM, BASE, ADDR, KICK: all but ENABLE.
    fn set_ring(&self, index: u32, base: u32) {
        self.tell(R::SET_VRING_NUM, &words(&[index, 128]), &[]);
        self.tell(R::SET_VRING_BASE, &words(&[index, base]), &[]);
        self.tell(R::SET_VRING_ADDR, &areas(index, None), &[]);
        self.tell(R::SET_VRING_KICK, &longs(&[index.into()]), &[event().as_fd()]);
    }

    fn enable(&self, index: u32, on: bool) -> bool {
        self.accepts(R::SET_VRING_ENABLE, &words(&[index, on.into()]), &[])
    }

    /// Everything up to live rings.
    fn run(&self, rings: u32) {
        self.negotiate(FEATURES);
        self.add_memory();
        for index in 0..rings {
            self.set_ring(index, 0);
            assert!(self.enable(index, true));
        }
        assert_eq!(self.rings.live().len(), rings as usize);
        self.rings.take_calls();
    }

    fn vring_base(&self, index: u32) -> u32 {
        let body = self.ask(R::GET_VRING_BASE, &words(&[index, 0]));
        let word = |at: usize| u32::from_ne_bytes(body[at..at + 4].try_into().unwrap());
        assert_eq!(word(0), index);
        word(4)
    }

    fn get_inflight(&self, dimensions: (u16, u16)) -> Region {
        self.tell(R::GET_INFLIGHT_FD, &inflight_body(0, dimensions), &[]);
        let (body, file) = self.answer(R::GET_INFLIGHT_FD);
        let size = long(&body[..8]);
        Region { file: file.expect("a file").into(), size, dimensions }
    }

    fn set_inflight(&self, region: &Region) -> bool {
        let body = inflight_body(region.size, region.dimensions);
        self.accepts(R::SET_INFLIGHT_FD, &body, &[region.file.as_fd()])
    }

    fn config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut body = words(&[offset, size, 0]);
        body.resize(12 + size as usize, 0);
        let reply = self.ask(R::GET_CONFIG, &body);
        assert_eq!(reply[..4], offset.to_ne_bytes(), "the offset is echoed");
        assert_eq!(reply[4..8], ((reply.len() - 12) as u32).to_ne_bytes());
        reply[12..].to_vec()
    }

    fn set_config(&self, offset: u32, bytes: &[u8]) -> bool {
        let mut body = words(&[offset, bytes.len() as u32, 0]);
        body.extend_from_slice(bytes);
        self.accepts(R::SET_CONFIG, &body, &[])
    }

    /// Gives the device a back-end channel; the front-end's end of it.
    fn channel(&self) -> UnixStream {
        let (mine, theirs) = UnixStream::pair().unwrap();
        assert!(self.accepts(R::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]));
        mine
    }

    /// Closes the socket and waits for the end of the connection.
    fn leave(self) -> Result<Ended> {
        drop(self.socket);
        self.thread.join().unwrap()
    }

    /// The connection has been ended by the other side, with this in the log.
    fn ended_with(self, words: &str) {
        let err = self.thread.join().unwrap().unwrap_err();
        assert!(err.to_string().contains(words), "{err}");
        assert!(self.rings.live().is_empty());
        assert_eq!(self.rings.take_calls().last(), Some(&Call::Disconnected));
    }
}

fn inflight_body(size: u64, (queues, queue_size): (u16, u16)) -> Vec<u8> {
    let mut body = longs(&[size, 0]);
    for half in [queues, queue_size, 0, 0] {
        body.extend_from_slice(&half.to_ne_bytes());
    }
    body
}

/// Number of CONFIG_CHANGE messages in a back-end channel now.
fn changes(channel: &UnixStream) -> usize {
    channel.set_nonblocking(true).unwrap();
    let mut bytes = Vec::new();
    let _ = (&*channel).read_to_end(&mut bytes);
    for message in bytes.chunks(12) {
        assert_eq!(message, words(&[2, 1, 0]));
    }
    bytes.len() / 12
}

fn starts(calls: &[Call]) -> Vec<(usize, u16)> {
    calls
        .iter()
        .filter_map(|call| match call {
            Call::Start { index, base, .. } => Some((*index, *base)),
            _ => None,
        })
        .collect()
}
