//! The message thread against scripted front-ends: the message sequences of QEMU, Cloud Hypervisor
//! and Firecracker as traced or read, and one test for each behaviour that they rely on. Numbers in
//! brackets are the points of the protocol sheet. The workers are a mock that also watches the
//! rules of [`super::rings`].

use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
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
        let thread = std::thread::spawn({
            let (device, stop) = (device.clone(), stop.clone());
            move || connection::serve(theirs, &device, &stop)
        });
        FrontEnd {
            socket,
            rings: rings.clone(),
            device: device.clone(),
            stop,
            thread,
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

// The front-ends.

/// The trace of QEMU with SeaBIOS: connect, machine reset, start, stop, start with another driver.
#[test]
fn qemu_from_firmware_to_os() {
    let fe = FrontEnd::new(2);
    // Connect. SET_OWNER is the seventh message [3].
    let offered = long(&fe.ask(R::GET_FEATURES, &[]));
    let protocol = fe.ask(R::GET_PROTOCOL_FEATURES, &[]);
    assert_eq!(long(&protocol), features::protocol_features().bits());
    fe.tell(R::SET_PROTOCOL_FEATURES, &protocol, &[]);
    assert_eq!(long(&fe.ask(R::GET_QUEUE_NUM, &[])), 2);
    assert_eq!(long(&fe.ask(R::GET_MAX_MEM_SLOTS, &[])), 509);
    let channel = fe.channel();
    fe.tell(R::SET_OWNER, &[], &[]);
    assert_eq!(long(&fe.ask(R::GET_FEATURES, &[])), offered);
    for queue in 0..2 {
        fe.tell(R::SET_VRING_CALL, &longs(&[queue]), &[event().as_fd()]);
        fe.tell(R::SET_VRING_ERR, &longs(&[queue]), &[event().as_fd()]);
    }
    assert_eq!(fe.config(0, 57).len(), 57);
    // Machine reset, before any SET_FEATURES, without NEED_REPLY [23].
    fe.tell(R::RESET_DEVICE, &[], &[]);
    fe.tell(R::RESET_DEVICE, &[], &[]);
    // SeaBIOS starts the disk: no FLUSH, no EVENT_IDX.
    let seabios = 0x1_4000_0044;
    let start = |features: u64, region: &Region, add_memory: bool| {
        fe.tell(R::SET_FEATURES, &longs(&[features]), &[]);
        assert!(fe.set_inflight(region));
        fe.tell(R::SET_VRING_CALL, &longs(&[0]), &[event().as_fd()]);
        fe.tell(R::SET_FEATURES, &longs(&[features]), &[]);
        if add_memory {
            fe.add_memory();
        }
        fe.set_ring(0, 0);
    };
    let region = fe.get_inflight(TWO_OF_128);
    start(seabios, &region, true);
    assert!(fe.rings.live().is_empty(), "not enabled yet");
    // ENABLE for all queues, though SeaBIOS never set up queue 1 [18].
    assert!(fe.enable(0, true));
    assert!(fe.enable(1, true));
    assert_eq!(fe.rings.live(), [0]);
    fe.rings.with_ring(0, |ring| {
        assert!(ring.call.is_some() && ring.err.is_some() && ring.kick.is_some());
        assert!(ring.inflight.is_some() && ring.dirty_log.is_none());
        assert_eq!(ring.features, seabios);
    });
    let calls = fe.calls();
    assert!(matches!(
        calls[..],
        [
            Call::DirtyLog(false),
            Call::DirtyLog(false),
            Call::Memory(1),
            Call::Session(Session::New(_)),
            Call::WriteThrough(true),
            Call::Start { index: 0, size: 128, base: 0 },
        ]
    ));
    // Stop: ENABLE(0) for all, GET_VRING_BASE for what ran.
    fe.rings.set_popped(17);
    assert!(fe.enable(0, false) && fe.enable(1, false));
    assert_eq!(fe.vring_base(0), 17);
    assert_eq!(fe.calls(), [Call::Stop(0)]);
    // Guest reset, and the OS with another region and other features [24].
    fe.tell(R::RESET_DEVICE, &[], &[]);
    let region = fe.get_inflight(TWO_OF_128);
    start(FEATURES, &region, false);
    fe.set_ring(1, 0);
    assert!(fe.enable(0, true) && fe.enable(1, true));
    assert_eq!(fe.rings.live(), [0, 1]);
    let calls = fe.calls();
    assert_eq!(starts(&calls), [(0, 0), (1, 0)]);
    assert!(calls.contains(&Call::WriteThrough(false)));
    assert!(calls.iter().any(|call| matches!(call, Call::Session(Session::New(_)))));
    // It had read the config space: nothing to tell.
    assert_eq!(changes(&channel), 0);
    let rings = fe.rings.clone();
    assert_eq!(fe.leave().unwrap(), Ended::FrontEndLeft);
    assert_eq!(
        rings.take_calls(),
        [Call::Stop(0), Call::Stop(1), Call::Memory(0), Call::DirtyLog(false), Call::Disconnected]
    );
}

/// QEMU with `reconnect`: no GET_CONFIG, no GET_INFLIGHT_FD, its kept region, BASE from used index.
#[test]
fn qemu_reconnects() {
    let fe = FrontEnd::new(1);
    fe.negotiate(FEATURES);
    fe.config(0, 57);
    let region = fe.get_inflight((1, 128));
    assert!(fe.set_inflight(&region));
    fe.add_memory();
    fe.set_ring(0, 0);
    assert!(fe.enable(0, true));
    let calls = fe.calls();
    let Some(Call::Session(Session::New(nonce))) =
        calls.iter().find(|call| matches!(call, Call::Session(_)))
    else {
        panic!("{calls:?}");
    };
    let (device, rings) = (fe.device.clone(), fe.rings.clone());
    fe.leave().unwrap();

    // Same size: nothing to tell. Another size: told once rings run [40].
    for (capacity, told) in [(1 << 20, 0), (2 << 20, 1), (2 << 20, 1)] {
        rings.set_capacity(capacity);
        let fe = FrontEnd::connect(&device, &rings);
        fe.negotiate(FEATURES);
        let channel = fe.channel();
        assert!(fe.set_inflight(&region));
        fe.add_memory();
        fe.set_ring(0, 40);
        fe.sync();
        assert_eq!(changes(&channel), 0, "not before rings run");
        rings.take_calls();
        assert!(fe.enable(0, true));
        let calls = fe.calls();
        assert_eq!(calls[0], Call::Session(Session::Returned(*nonce)));
        assert_eq!(starts(&calls), [(0, 40)]);
        // A front-end that was told and did not look is told again by the next connection.
        assert_eq!(changes(&channel), told);
        fe.leave().unwrap();
    }

    // A new process knows nothing of what was told.
    let rings = MockRings::new(1);
    let fe = FrontEnd::connect(&Device::new("test", rings.clone()), &rings);
    fe.negotiate(FEATURES);
    let channel = fe.channel();
    assert!(fe.set_inflight(&region));
    fe.add_memory();
    fe.set_ring(0, 40);
    assert!(fe.enable(0, true));
    assert_eq!(changes(&channel), 1);
    assert!(rings.take_calls().contains(&Call::Session(Session::Returned(*nonce))));
}

/// Cloud Hypervisor: memory as a table, NUM of all rings first, the channel last; pause, snapshot,
/// restore [17, 21, 22].
#[test]
fn cloud_hypervisor() {
    let fe = FrontEnd::new(2);
    fe.tell(R::SET_OWNER, &[], &[]);
    let offered = long(&fe.ask(R::GET_FEATURES, &[]));
    let protocol = fe.ask(R::GET_PROTOCOL_FEATURES, &[]);
    fe.tell(R::SET_PROTOCOL_FEATURES, &protocol, &[]);
    assert_eq!(long(&fe.ask(R::GET_QUEUE_NUM, &[])), 2);
    // Versions up to 50 count the config space from 0x100.
    assert_eq!(fe.config(0x100, 60), fe.config(0, 60));
    let features = FEATURES | CONFIG_WCE;
    assert_eq!(features & !offered, 0);
    let start = |fe: &FrontEnd, region: &Region, base: u32| {
        assert!(fe.accepts(R::SET_FEATURES, &longs(&[features]), &[]));
        let mut table = words(&[1, 0]);
        table.extend(longs(&[0, MEMORY, BASE, 0]));
        assert!(fe.accepts(R::SET_MEM_TABLE, &table, &[fe.memory.as_fd()]));
        for queue in 0..2 {
            assert!(fe.accepts(R::SET_VRING_NUM, &words(&[queue, 128]), &[]));
        }
        assert!(fe.set_inflight(region));
        for queue in 0..2u32 {
            let index = longs(&[queue.into()]);
            assert!(fe.accepts(R::SET_VRING_ADDR, &areas(queue, None), &[]));
            assert!(fe.accepts(R::SET_VRING_BASE, &words(&[queue, base]), &[]));
            assert!(fe.accepts(R::SET_VRING_CALL, &index, &[event().as_fd()]));
            assert!(fe.accepts(R::SET_VRING_KICK, &index, &[event().as_fd()]));
        }
        assert!(fe.enable(0, true) && fe.enable(1, true));
        assert_eq!(fe.rings.live(), [0, 1]);
    };
    let region = fe.get_inflight(TWO_OF_128);
    start(&fe, &region, 0);
    let channel = fe.channel();
    assert_eq!(changes(&channel), 0);
    fe.rings.take_calls();
    // Pause and resume: positions are kept.
    fe.rings.set_popped(9);
    assert!(fe.enable(0, false) && fe.enable(1, false));
    assert!(fe.rings.live().is_empty());
    assert!(fe.enable(0, true) && fe.enable(1, true));
    let calls = fe.calls();
    assert_eq!(starts(&calls), [(0, 9), (1, 9)]);
    assert!(!calls.iter().any(|call| matches!(call, Call::Session(_))), "the same session");
    // A running device is not saved.
    let (read, write) = std::io::pipe().unwrap();
    fe.tell(R::SET_DEVICE_STATE_FD, &words(&[0, 0]), &[write.as_fd()]);
    assert_eq!(long(&fe.answer(R::SET_DEVICE_STATE_FD).0), 0x101);
    // Snapshot.
    *fe.rings.identity.lock().unwrap() =
        DiskIdentity { content: Some([5; 4]), ..DiskIdentity::default() };
    assert!(fe.set_config(32, &[0]));
    assert!(fe.enable(0, false) && fe.enable(1, false));
    assert_eq!((fe.vring_base(0), fe.vring_base(1)), (18, 18));
    fe.tell(R::SET_DEVICE_STATE_FD, &words(&[0, 0]), &[write.as_fd()]);
    assert_eq!(long(&fe.answer(R::SET_DEVICE_STATE_FD).0), 0x100);
    drop(write);
    let mut blob = Vec::new();
    File::from(OwnedFd::from(read)).read_to_end(&mut blob).unwrap();
    assert_eq!(long(&fe.ask(R::CHECK_DEVICE_STATE, &[])), 0);
    let saved = DeviceState::from_bytes(&blob).unwrap().unwrap();
    assert!(!saved.writeback);
    assert_eq!(saved.identity.content, Some([5; 4]));
    fe.leave().unwrap();

    // Restore, before SET_FEATURES and memory. The pipe is filled after our answer.
    let restore = |blob: &[u8], identity: DiskIdentity| {
        let fe = FrontEnd::new(2);
        *fe.rings.identity.lock().unwrap() = identity;
        fe.ask(R::GET_FEATURES, &[]);
        let (read, mut write) = std::io::pipe().unwrap();
        fe.tell(R::SET_DEVICE_STATE_FD, &words(&[1, 0]), &[read.as_fd()]);
        assert_eq!(long(&fe.answer(R::SET_DEVICE_STATE_FD).0), 0x100);
        write.write_all(blob).unwrap();
        drop(write);
        let result = long(&fe.ask(R::CHECK_DEVICE_STATE, &[]));
        (fe, result)
    };
    let (fe, result) = restore(&blob, saved.identity);
    assert_eq!(result, 0);
    assert_eq!(fe.calls(), [Call::Writeback(false)]);
    let protocol = fe.ask(R::GET_PROTOCOL_FEATURES, &[]);
    fe.tell(R::SET_PROTOCOL_FEATURES, &protocol, &[]);
    assert_eq!(fe.config(32, 1), [0]);
    let region = fe.get_inflight(TWO_OF_128);
    start(&fe, &region, 18);
    assert!(fe.calls().contains(&Call::WriteThrough(true)));
    // An empty state is legal; one of another disk, or broken, is not.
    assert_eq!(restore(&[], saved.identity).1, 0);
    let other = DiskIdentity { content: Some([6; 4]), ..saved.identity };
    assert_eq!(restore(&blob, other).1, 1);
    assert_eq!(restore(&blob[..20], saved.identity).1, 1);
    // Asked without a transfer, there is nothing to complain about.
    assert_eq!(long(&fe.ask(R::CHECK_DEVICE_STATE, &[])), 0);
}

/// Firecracker: CONFIG only, no acks, and each ring enabled as it is set up.
#[test]
fn firecracker() {
    let fe = FrontEnd::new(1);
    fe.tell(R::SET_OWNER, &[], &[]);
    fe.ask(R::GET_FEATURES, &[]);
    fe.ask(R::GET_PROTOCOL_FEATURES, &[]);
    fe.tell(R::SET_PROTOCOL_FEATURES, &longs(&[1 << 9]), &[]);
    let features = VERSION_1 | PROTOCOL_FEATURES | features::EVENT_IDX;
    fe.tell(R::SET_FEATURES, &longs(&[features]), &[]);
    assert_eq!(fe.config(0, 60).len(), 60);
    let mut table = words(&[1, 0]);
    table.extend(longs(&[0, MEMORY, BASE, 0]));
    fe.tell(R::SET_MEM_TABLE, &table, &[fe.memory.as_fd()]);
    fe.tell(R::SET_VRING_NUM, &words(&[0, 256]), &[]);
    fe.tell(R::SET_VRING_ADDR, &areas(0, None), &[]);
    fe.tell(R::SET_VRING_BASE, &words(&[0, 0]), &[]);
    fe.tell(R::SET_VRING_CALL, &longs(&[0]), &[event().as_fd()]);
    fe.tell(R::SET_VRING_KICK, &longs(&[0]), &[event().as_fd()]);
    fe.tell(R::SET_VRING_ENABLE, &words(&[0, 1]), &[]);
    assert_eq!(
        fe.calls(),
        [
            Call::Memory(1),
            Call::Session(Session::Anonymous),
            // Its default cache type negotiates no FLUSH [15].
            Call::WriteThrough(true),
            Call::Start { index: 0, size: 256, base: 0 }
        ]
    );
    // A change of size has no way to it, and disturbs nothing.
    fe.device.notify_config_change();
    fe.sync();
    assert_eq!(fe.leave().unwrap(), Ended::FrontEndLeft);
}

/// The front-end half of the `vhost` crate, as Cloud Hypervisor and Firecracker use it.
#[test]
fn front_end_of_the_vhost_crate() {
    use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag};
    use vhost::vhost_user::{Frontend, VhostUserFrontend};
    use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
    use vmm_sys_util::eventfd::EventFd;

    let fe = FrontEnd::new(1);
    let mut front = Frontend::from_stream(fe.socket.try_clone().unwrap(), 1);
    front.set_owner().unwrap();
    front.get_features().unwrap();
    let protocol = front.get_protocol_features().unwrap();
    front.set_protocol_features(protocol).unwrap();
    front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    front.set_features(FEATURES).unwrap();
    assert_eq!(front.get_queue_num().unwrap(), 1);
    assert_eq!(front.get_max_mem_slots().unwrap(), 509);
    let (_, config) = front.get_config(0, 60, VhostUserConfigFlags::WRITABLE, &[0; 60]).unwrap();
    assert_eq!(config[..8], 2048u64.to_le_bytes());
    front.set_config(32, VhostUserConfigFlags::WRITABLE, &[0]).unwrap();
    assert!(front.set_config(33, VhostUserConfigFlags::WRITABLE, &[0]).is_err());
    let memory = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: MEMORY,
        userspace_addr: BASE,
        mmap_offset: 0,
        mmap_handle: std::os::fd::AsRawFd::as_raw_fd(&fe.memory),
    };
    front.add_mem_region(&memory).unwrap();
    front.set_vring_num(0, 128).unwrap();
    let config = VringConfigData {
        queue_max_size: 256,
        queue_size: 128,
        flags: 0,
        desc_table_addr: BASE,
        used_ring_addr: BASE + 0x2000,
        avail_ring_addr: BASE + 0x1000,
        log_addr: None,
    };
    front.set_vring_addr(0, &config).unwrap();
    front.set_vring_base(0, 3).unwrap();
    let event = EventFd::new(0).unwrap();
    front.set_vring_call(0, &event).unwrap();
    front.set_vring_kick(0, &event).unwrap();
    front.set_vring_enable(0, true).unwrap();
    assert_eq!(fe.rings.live(), [0]);
    assert_eq!(front.get_vring_base(0).unwrap(), 3);
    assert!(fe.rings.live().is_empty());
    front.remove_mem_region(&memory).unwrap();
    front.reset_device().unwrap();
}

// Negotiation.

#[test]
fn features_that_were_not_offered_are_refused_and_nothing_else() {
    let fe = FrontEnd::new(1);
    fe.negotiate(FEATURES);
    // NOTIFICATION_DATA, RING_RESET, ACCESS_PLATFORM, IN_ORDER, RING_PACKED, SIZE_MAX [6, 7, 12].
    for bit in [38, 40, 33, 35, 34, 1] {
        assert!(!fe.accepts(R::SET_FEATURES, &longs(&[FEATURES | 1 << bit]), &[]), "bit {bit}");
    }
    // STATUS, PAGEFAULT and whatever comes after [1].
    for bit in [16, 8, 40] {
        let bits = features::protocol_features().bits() | 1 << bit;
        assert!(!fe.accepts(R::SET_PROTOCOL_FEATURES, &longs(&[bits]), &[]), "bit {bit}");
    }
    assert!(fe.accepts(R::SET_FEATURES, &longs(&[FEATURES]), &[]));
}

#[test]
fn set_features_and_log_all_stop_no_ring() {
    let fe = FrontEnd::new(2);
    fe.run(2);
    let log = memfd_create("log", 4096, false).unwrap();
    let base = longs(&[4096, 0]);
    fe.tell(R::SET_LOG_BASE, &base, &[log.as_fd()]);
    assert_eq!(fe.answer(R::SET_LOG_BASE).0, base);
    assert_eq!(fe.calls(), [], "no log before LOG_ALL");
    for _ in 0..2 {
        assert!(fe.accepts(R::SET_FEATURES, &longs(&[FEATURES | LOG_ALL]), &[]));
    }
    assert_eq!(fe.calls(), [Call::DirtyLog(true)]);
    // QEMU says for each live ring where its used ring is to be marked.
    for (log, told) in [(Some(0x2000), 0x2000), (None, 0x2000), (Some(0x5000), 0x5000)] {
        assert!(fe.accepts(R::SET_VRING_ADDR, &areas(0, log), &[]));
        assert_eq!(fe.calls(), [Call::SetLogUsed(0, Some(told))]);
    }
    assert!(fe.accepts(R::SET_FEATURES, &longs(&[FEATURES]), &[]));
    assert_eq!(fe.calls(), [Call::DirtyLog(false)]);
    assert_eq!(fe.rings.live(), [0, 1]);
}

#[test]
fn without_protocol_features_rings_start_enabled() {
    let fe = FrontEnd::new(2);
    let mut table = words(&[1, 0]);
    table.extend(longs(&[0, MEMORY, BASE, 0]));
    fe.tell(R::SET_MEM_TABLE, &table, &[fe.memory.as_fd()]);
    fe.set_ring(0, 0);
    fe.sync();
    assert!(fe.rings.live().is_empty());
    fe.tell(R::SET_FEATURES, &longs(&[VERSION_1 | FLUSH]), &[]);
    fe.sync();
    assert_eq!(fe.rings.live(), [0], "a ring that was set up before");
    fe.set_ring(1, 0);
    fe.sync();
    assert_eq!(fe.rings.live(), [0, 1], "and one after");
}

#[test]
fn durability_follows_flush_and_the_write_cache() {
    let fe = FrontEnd::new(1);
    fe.run(1);
    let set = |features: u64| {
        assert!(fe.accepts(
            R::SET_FEATURES,
            &longs(&[VERSION_1 | PROTOCOL_FEATURES | features]),
            &[]
        ));
        fe.calls()
    };
    assert_eq!(set(0), [Call::WriteThrough(true)]);
    assert_eq!(set(FLUSH), [Call::WriteThrough(false)]);
    assert_eq!(set(FLUSH | CONFIG_WCE), []);
    assert!(fe.set_config(32, &[0]));
    assert_eq!(fe.calls(), [Call::Writeback(false), Call::WriteThrough(true)]);
    assert!(fe.set_config(0x120, &[1]));
    assert_eq!(fe.calls(), [Call::Writeback(true), Call::WriteThrough(false)]);
    // Without CONFIG_WCE the byte means nothing.
    assert!(fe.set_config(32, &[0]));
    fe.calls();
    assert_eq!(set(FLUSH), [Call::WriteThrough(false)]);
}

// The config space.

#[test]
fn config_reads_are_as_long_as_asked() {
    let fe = FrontEnd::new(1);
    fe.negotiate(FEATURES);
    for size in [1, 8, 36, 57, 60, 64, 256, 0xf00] {
        for offset in [0, 0x100] {
            let bytes = fe.config(offset, size);
            assert_eq!(bytes.len(), size as usize);
            if size >= 8 {
                assert_eq!(bytes[..8], 2048u64.to_le_bytes());
            }
        }
    }
}

#[test]
fn config_writes_other_than_the_cache_mode_are_refused_without_an_end() {
    let fe = FrontEnd::new(1);
    fe.negotiate(FEATURES);
    for (offset, bytes) in [(0, &[1u8][..]), (32, &[1, 0]), (33, &[0]), (32, &[7]), (0xf00, &[0])] {
        assert!(!fe.set_config(offset, bytes), "{bytes:?} at {offset}");
    }
    assert_eq!(fe.calls(), []);
    assert!(fe.set_config(32, &[1]));
    fe.rings.features.fetch_and(!CONFIG_WCE, Ordering::SeqCst);
    assert!(!fe.set_config(32, &[1]));
}

#[test]
fn a_change_of_size_is_told_while_rings_run_and_not_before() {
    let fe = FrontEnd::new(1);
    fe.negotiate(FEATURES);
    let channel = fe.channel();
    fe.config(0, 57);
    fe.device.notify_config_change();
    assert_eq!(changes(&channel), 0);
    fe.add_memory();
    fe.set_ring(0, 0);
    assert!(fe.enable(0, true));
    assert_eq!(changes(&channel), 1);
    // From another thread, while the message thread is in a drain [16].
    let (entered, in_drain) = mpsc::channel();
    let (release, released) = mpsc::channel::<()>();
    let released = std::sync::Mutex::new(released);
    *fe.rings.on_stop.lock().unwrap() = Some(Box::new(move |_| {
        entered.send(()).unwrap();
        released.lock().unwrap().recv().unwrap();
    }));
    fe.tell(R::GET_VRING_BASE, &words(&[0, 0]), &[]);
    in_drain.recv().unwrap();
    fe.device.notify_config_change();
    assert_eq!(changes(&channel), 1);
    release.send(()).unwrap();
    fe.answer(R::GET_VRING_BASE);
    // Stopped: remembered again, unless the front-end reads it itself.
    fe.device.notify_config_change();
    fe.config(0, 57);
    *fe.rings.on_stop.lock().unwrap() = None;
    fe.set_ring(0, 0);
    fe.sync();
    assert_eq!(fe.rings.live(), [0]);
    assert_eq!(changes(&channel), 0);
}

// Rings.

/// All orders of NUM, BASE, ADDR, KICK, ENABLE and memory: live with the last of them [17].
#[test]
fn a_ring_lives_when_everything_is_there_in_any_order() {
    fn permutations(items: &[usize]) -> Vec<Vec<usize>> {
        if items.is_empty() {
            return vec![Vec::new()];
        }
        let mut all = Vec::new();
        for (at, item) in items.iter().enumerate() {
            let mut rest = items.to_vec();
            rest.remove(at);
            for mut tail in permutations(&rest) {
                tail.insert(0, *item);
                all.push(tail);
            }
        }
        all
    }
    let fe = FrontEnd::new(1);
    fe.negotiate(FEATURES);
    let kick = event();
    for order in permutations(&[0, 1, 2, 3, 4]) {
        for (n, step) in order.iter().enumerate() {
            assert!(fe.rings.live().is_empty(), "{order:?}: live before step {n}");
            match step {
                0 => fe.tell(R::SET_VRING_NUM, &words(&[0, 64]), &[]),
                1 => fe.tell(R::SET_VRING_ADDR, &areas(0, None), &[]),
                2 => fe.tell(R::SET_VRING_KICK, &longs(&[0]), &[kick.as_fd()]),
                3 => fe.tell(R::SET_VRING_ENABLE, &words(&[0, 1]), &[]),
                _ => fe.add_memory(),
            }
            fe.sync();
        }
        assert_eq!(fe.rings.live(), [0], "{order:?}");
        // Back to the beginning; memory is the only thing that a reset leaves.
        fe.tell(R::RESET_DEVICE, &[], &[]);
        assert!(fe.accepts(R::REM_MEM_REG, &region(0, MEMORY, 0), &[]));
        assert!(fe.rings.live().is_empty());
        // Its features went too; the ring started in between took what was there.
        assert!(fe.accepts(R::SET_FEATURES, &longs(&[FEATURES]), &[]));
    }
}

#[test]
fn numbers_that_make_no_ring_are_refused_without_an_end() {
    let fe = FrontEnd::new(2);
    fe.negotiate(FEATURES);
    for size in [0, 3, 100, 2048, 65536, u32::MAX] {
        assert!(!fe.accepts(R::SET_VRING_NUM, &words(&[0, size]), &[]), "size {size}");
    }
    for size in [1, 2, 1024] {
        assert!(fe.accepts(R::SET_VRING_NUM, &words(&[0, size]), &[]), "size {size}");
    }
    assert!(!fe.accepts(R::SET_VRING_BASE, &words(&[0, 0x1_0000]), &[]));
    // More queues asked for than served.
    for index in [2, 64, 255, u32::MAX] {
        assert!(!fe.accepts(R::SET_VRING_NUM, &words(&[index, 64]), &[]));
        assert!(!fe.accepts(R::SET_VRING_BASE, &words(&[index, 0]), &[]));
        assert!(!fe.accepts(R::SET_VRING_ENABLE, &words(&[index, 1]), &[]));
        assert!(!fe.accepts(R::SET_VRING_ADDR, &areas(index, None), &[]));
        assert_eq!(fe.vring_base(index), 0, "answered, as there is no way to refuse");
    }
    for request in [R::SET_VRING_KICK, R::SET_VRING_CALL, R::SET_VRING_ERR] {
        assert!(!fe.accepts(request, &longs(&[2]), &[event().as_fd()]));
        // What is no notifier.
        assert!(!fe.accepts(request, &longs(&[0]), &[fe.memory.as_fd()]));
        assert!(!fe.accepts(request, &longs(&[0]), &[File::open("/dev/zero").unwrap().as_fd()]));
    }
    assert_eq!(fe.calls(), []);
}

#[test]
fn base_of_a_ring_that_never_ran() {
    let fe = FrontEnd::new(2);
    fe.negotiate(FEATURES);
    assert_eq!(fe.vring_base(1), 0);
    assert!(fe.accepts(R::SET_VRING_BASE, &words(&[1, 77]), &[]));
    assert_eq!(fe.vring_base(1), 77);
    assert_eq!(fe.calls(), []);
}

/// The answer means that memory is quiet: it comes after the drain [20, 21].
#[test]
fn stop_and_disable_are_answered_after_the_drain() {
    for request in [R::GET_VRING_BASE, R::SET_VRING_ENABLE] {
        let fe = FrontEnd::new(1);
        fe.run(1);
        let (release, released) = mpsc::channel::<()>();
        let released = std::sync::Mutex::new(released);
        *fe.rings.on_stop.lock().unwrap() = Some(Box::new(move |_| {
            released.lock().unwrap().recv().unwrap();
        }));
        send_message(&fe.socket, request as u32, 9, &words(&[0, 0]), &[]).unwrap();
        fe.socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let early = (&fe.socket).read(&mut [0]);
        assert!(early.is_err(), "{request:?} answered before the drain");
        fe.socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        release.send(()).unwrap();
        fe.answer(request);
        assert!(fe.rings.live().is_empty());
    }
}

#[test]
fn get_vring_base_forgets_kick_and_call() {
    let fe = FrontEnd::new(1);
    fe.run(1);
    fe.rings.set_popped(5);
    assert_eq!(fe.vring_base(0), 5);
    // Enabled still; it waits for a kick.
    assert!(fe.enable(0, true));
    assert!(fe.rings.live().is_empty());
    assert!(fe.accepts(R::SET_VRING_KICK, &longs(&[0]), &[event().as_fd()]));
    assert_eq!(starts(&fe.calls()), [(0, 5)], "goes on where it was");
    fe.rings.with_ring(0, |ring| assert!(ring.call.is_none()));
}

#[test]
fn notifiers_come_go_and_stay_away() {
    let fe = FrontEnd::new(1);
    fe.run(1);
    for (value, present) in [(0, true), (0, true), (0x100, false), (0, true)] {
        let event = event();
        let files = [event.as_fd()];
        let files = if present { &files[..] } else { &[] };
        assert!(fe.accepts(R::SET_VRING_CALL, &longs(&[value]), files));
        assert!(fe.accepts(R::SET_VRING_ERR, &longs(&[value]), files));
        assert_eq!(fe.calls(), [Call::SetCall(0, present), Call::SetErr(0, present)]);
    }
    // A new kick for a live ring: drained, and on with it. No kick: polled.
    fe.rings.set_popped(3);
    assert!(fe.accepts(R::SET_VRING_KICK, &longs(&[0x100]), &[]));
    assert_eq!(fe.calls(), [Call::Stop(0), Call::Start { index: 0, size: 128, base: 3 }]);
    fe.rings.with_ring(0, |ring| assert!(ring.kick.is_none() && ring.call.is_some()));
    // Notifiers survive a pause.
    assert!(fe.enable(0, false) && fe.enable(0, true));
    fe.rings.with_ring(0, |ring| assert!(ring.call.is_some() && ring.err.is_some()));
}

#[test]
fn a_live_ring_keeps_size_base_and_addresses() {
    let fe = FrontEnd::new(1);
    fe.run(1);
    assert!(!fe.accepts(R::SET_VRING_NUM, &words(&[0, 64]), &[]));
    assert!(fe.accepts(R::SET_VRING_NUM, &words(&[0, 128]), &[]));
    assert!(!fe.accepts(R::SET_VRING_BASE, &words(&[0, 1]), &[]));
    let mut elsewhere = areas(0, None);
    elsewhere[9] ^= 0x10;
    assert!(!fe.accepts(R::SET_VRING_ADDR, &elsewhere, &[]));
    assert_eq!(fe.calls(), []);
}

#[test]
fn a_ring_that_cannot_start_is_refused_and_tried_again() {
    let fe = FrontEnd::new(1);
    fe.negotiate(FEATURES);
    // No memory shared by the front-end.
    fe.set_ring(0, 0);
    assert!(!fe.enable(0, true));
    fe.add_memory();
    assert_eq!(fe.rings.live(), [0], "memory was all it lacked");
    assert!(fe.enable(0, false));
    fe.rings.take_calls();
    // Refused by the workers, as a ring and as a session.
    fe.rings.refuse_start.store(true, Ordering::SeqCst);
    assert!(!fe.enable(0, true));
    fe.rings.refuse_start.store(false, Ordering::SeqCst);
    assert!(fe.enable(0, true));
    assert!(fe.enable(0, false));
    let region = fe.get_inflight(TWO_OF_128);
    assert!(fe.set_inflight(&region));
    fe.rings.refuse_session.store(true, Ordering::SeqCst);
    assert!(!fe.enable(0, true));
    fe.rings.refuse_session.store(false, Ordering::SeqCst);
    assert!(fe.enable(0, true));
    // Addresses outside of memory.
    assert!(fe.enable(0, false));
    let mut outside = areas(0, None);
    outside[8..16].copy_from_slice(&(BASE + MEMORY - 16).to_ne_bytes());
    assert!(!fe.accepts(R::SET_VRING_ADDR, &outside, &[]) || !fe.enable(0, true));
    assert!(fe.rings.live().is_empty());
}

#[test]
fn reset_at_any_time() {
    for request in [R::RESET_DEVICE, R::RESET_OWNER] {
        let fe = FrontEnd::new(2);
        fe.run(2);
        assert!(fe.accepts(R::SET_VRING_ERR, &longs(&[0]), &[event().as_fd()]));
        fe.rings.take_calls();
        assert!(fe.accepts(request, &[], &[]));
        assert!(fe.accepts(request, &[], &[]));
        let calls = fe.calls();
        assert_eq!(calls[..2], [Call::Stop(0), Call::Stop(1)]);
        // Nothing of the rings is left but ERR; memory is, as QEMU does not send it again.
        assert!(fe.enable(0, true));
        assert!(fe.rings.live().is_empty());
        assert!(fe.accepts(R::SET_FEATURES, &longs(&[FEATURES]), &[]));
        fe.set_ring(0, 0);
        fe.sync();
        assert_eq!(fe.rings.live(), [0]);
        fe.rings.with_ring(0, |ring| {
            assert!(ring.err.is_some());
            assert_eq!((ring.base, ring.features), (0, FEATURES));
        });
    }
}

// Memory.

#[test]
fn regions_come_and_go_while_rings_run() {
    let fe = FrontEnd::new(1);
    fe.run(1);
    let more = memfd_create("hotplug", MEMORY, false).unwrap();
    let hotplug = region(4 * MEMORY, MEMORY, 0);
    assert!(fe.accepts(R::ADD_MEM_REG, &hotplug, &[more.as_fd()]));
    assert!(!fe.accepts(R::ADD_MEM_REG, &hotplug, &[more.as_fd()]), "there is one already");
    // REM_MEM_REG may carry a file [29].
    assert!(fe.accepts(R::REM_MEM_REG, &hotplug, &[more.as_fd()]));
    assert!(!fe.accepts(R::REM_MEM_REG, &hotplug, &[]), "it is gone");
    let calls = fe.calls();
    assert_eq!(
        calls,
        [
            Call::Memory(2),
            Call::SetLogUsed(0, Some(0x2000)),
            Call::Memory(1),
            Call::SetLogUsed(0, Some(0x2000))
        ],
        "the ring was not disturbed"
    );
    // The table as a whole, with the ring's memory at another guest address.
    let mut table = words(&[1, 0]);
    table.extend(longs(&[2 * MEMORY, MEMORY, BASE, 0]));
    assert!(fe.accepts(R::SET_MEM_TABLE, &table, &[fe.memory.as_fd()]));
    assert_eq!(fe.calls(), [Call::Memory(1), Call::SetLogUsed(0, Some(2 * MEMORY + 0x2000))]);
}

#[test]
fn a_ring_whose_memory_goes_is_stopped_first_and_comes_back_with_it() {
    let fe = FrontEnd::new(2);
    fe.negotiate(FEATURES);
    fe.add_memory();
    // Ring 1 lies in a region of its own.
    fe.set_ring(0, 0);
    fe.tell(R::SET_VRING_NUM, &words(&[1, 64]), &[]);
    let at = BASE + 4 * MEMORY;
    let mut body = words(&[1, 0]);
    body.extend(longs(&[at, at + 0x2000, at + 0x1000, 0]));
    fe.tell(R::SET_VRING_ADDR, &body, &[]);
    fe.tell(R::SET_VRING_KICK, &longs(&[1]), &[event().as_fd()]);
    let more = memfd_create("hotplug", MEMORY, false).unwrap();
    let hotplug = region(4 * MEMORY, MEMORY, 0);
    assert!(fe.accepts(R::ADD_MEM_REG, &hotplug, &[more.as_fd()]));
    assert!(fe.enable(0, true) && fe.enable(1, true));
    fe.rings.take_calls();
    fe.rings.set_popped(6);
    assert!(fe.accepts(R::REM_MEM_REG, &hotplug, &[]));
    let calls = fe.calls();
    assert_eq!(calls[..2], [Call::Stop(1), Call::Memory(1)]);
    assert_eq!(fe.rings.live(), [0]);
    assert!(fe.accepts(R::ADD_MEM_REG, &hotplug, &[more.as_fd()]));
    assert_eq!(starts(&fe.calls()), [(1, 6)]);
}

#[test]
fn regions_that_lie_are_refused_without_an_end() {
    let fe = FrontEnd::new(1);
    fe.negotiate(FEATURES);
    let file = [fe.memory.as_fd()];
    assert!(!fe.accepts(R::ADD_MEM_REG, &region(0, MEMORY + 1, 0), &file), "larger than its file");
    assert!(!fe.accepts(R::ADD_MEM_REG, &region(0, MEMORY, 4096), &file), "past its end");
    let mut table = words(&[2, 0]);
    table.extend(longs(&[0, MEMORY, BASE, 0, 0x1000, 0x1000, BASE + MEMORY, 0]));
    let files = [fe.memory.as_fd(), fe.memory.as_fd()];
    assert!(!fe.accepts(R::SET_MEM_TABLE, &table, &files), "overlap");
    assert_eq!(fe.calls(), []);
    // The slots that were announced can be had, and no more.
    for slot in 0..509 {
        let body = region(slot * 0x2000, 0x1000, 0);
        assert!(fe.accepts(R::ADD_MEM_REG, &body, &file), "slot {slot}");
    }
    assert!(!fe.accepts(R::ADD_MEM_REG, &region(MEMORY * 64, 0x1000, 0), &file));
}

#[test]
fn regions_without_a_file_end_the_connection_with_a_reason() {
    let fe = FrontEnd::new(1);
    fe.negotiate(FEATURES);
    let mut table = words(&[1, 0]);
    table.extend(longs(&[0, MEMORY, BASE, 0]));
    fe.tell(R::SET_MEM_TABLE, &table, &[]);
    fe.ended_with("no memory shared by the front-end");
    let fe = FrontEnd::new(1);
    fe.negotiate(FEATURES);
    fe.tell(R::ADD_MEM_REG, &region(0, MEMORY, 0), &[]);
    fe.ended_with("no memory shared by the front-end");
}

// In flight.

#[test]
fn sessions_follow_the_region() {
    let fe = FrontEnd::new(1);
    fe.negotiate(FEATURES);
    fe.add_memory();
    let session = |fe: &FrontEnd| {
        fe.set_ring(0, 0);
        assert!(fe.enable(0, true));
        fe.vring_base(0);
        let calls = fe.calls();
        calls.iter().find_map(|call| match call {
            Call::Session(session) => Some(*session),
            _ => None,
        })
    };
    assert_eq!(session(&fe), Some(Session::Anonymous));
    let first = fe.get_inflight(TWO_OF_128);
    assert!(fe.set_inflight(&first));
    let Some(Session::New(nonce)) = session(&fe) else { panic!() };
    // The same region again, as QEMU gives it at each start: the same session.
    assert!(fe.set_inflight(&first));
    assert_eq!(session(&fe), None);
    // A new one after a guest reset.
    let second = fe.get_inflight(TWO_OF_128);
    assert!(fe.set_inflight(&second));
    assert!(matches!(session(&fe), Some(Session::New(other)) if other != nonce));
    // Another back-end's region has no nonce.
    let foreign =
        Region { file: memfd_create("foreign", 1 << 16, false).unwrap(), size: 1 << 16, ..second };
    assert!(fe.set_inflight(&foreign));
    assert_eq!(session(&fe), Some(Session::Anonymous));
    let (device, rings) = (fe.device.clone(), fe.rings.clone());
    fe.leave().unwrap();
    let fe = FrontEnd::connect(&device, &rings);
    fe.negotiate(FEATURES);
    fe.add_memory();
    assert!(fe.set_inflight(&first));
    assert_eq!(session(&fe), Some(Session::Returned(nonce)));
}

/// A guest that has switched the write cache off sends no FLUSH; a process that takes over has to
/// know, and no front-end repeats it.
#[test]
fn the_write_cache_mode_comes_back_with_the_region_and_with_nothing_else() {
    let features = FEATURES | CONFIG_WCE;
    let start = |fe: &FrontEnd, region: &Region| {
        fe.negotiate(features);
        fe.add_memory();
        assert!(fe.set_inflight(region));
        fe.set_ring(0, 0);
        assert!(fe.enable(0, true));
    };
    let fe = FrontEnd::new(1);
    fe.negotiate(features);
    let region = fe.get_inflight((1, 128));
    start(&fe, &region);
    assert!(fe.calls().contains(&Call::WriteThrough(false)));
    assert!(fe.set_config(32, &[0]));
    let (device, rings) = (fe.device.clone(), fe.rings.clone());
    fe.leave().unwrap();
    // Another process, the same guest; whether or not the front-end looks at the config space.
    for looks in [false, true] {
        let fe = FrontEnd::new(1);
        if looks {
            fe.negotiate(features);
            assert_eq!(fe.config(32, 1), [1]);
        }
        start(&fe, &region);
        let calls = fe.calls();
        assert!(calls.contains(&Call::Writeback(false)), "{calls:?}");
        assert!(calls.contains(&Call::WriteThrough(true)), "{calls:?}");
    }
    // The same process, a new guest, which reads the config space first.
    rings.take_calls();
    let fe = FrontEnd::connect(&device, &rings);
    fe.negotiate(features);
    assert_eq!(fe.config(32, 1), [1]);
    let new = fe.get_inflight((1, 128));
    start(&fe, &new);
    let calls = fe.calls();
    assert!(calls.contains(&Call::WriteThrough(false)), "{calls:?}");
    // Reading later changes nothing.
    assert!(fe.set_config(32, &[0]));
    assert_eq!(fe.config(32, 1), [0]);
    // What this connection has set goes before what a region remembers.
    let fe = FrontEnd::new(1);
    fe.negotiate(features);
    assert!(fe.set_config(32, &[1]));
    start(&fe, &region);
    assert!(!fe.calls().contains(&Call::Writeback(false)));
}

#[test]
fn inflight_regions_that_do_not_fit() {
    let fe = FrontEnd::new(2);
    fe.negotiate(FEATURES);
    fe.add_memory();
    // What cannot be made is answered with none, and none can be set.
    let none = fe.get_inflight((65, 128));
    assert_eq!(none.size, 0);
    assert!(fe.set_inflight(&none));
    // Larger than its file, smaller than its queues.
    let region = fe.get_inflight(TWO_OF_128);
    let file = memfd_create("short", 4096, false).unwrap();
    assert!(!fe.set_inflight(&Region { file, ..fe.get_inflight(TWO_OF_128) }));
    assert!(!fe.set_inflight(&Region { size: 64, ..fe.get_inflight(TWO_OF_128) }));
    assert!(fe.set_inflight(&region));
    // A ring larger than its part does not start; one outside of the region does, untracked.
    let small = fe.get_inflight((1, 64));
    assert!(fe.set_inflight(&small));
    fe.set_ring(0, 0);
    assert!(!fe.enable(0, true));
    fe.set_ring(1, 0);
    assert!(!fe.enable(1, true), "128 is more than 64");
    fe.tell(R::SET_VRING_NUM, &words(&[1, 64]), &[]);
    fe.sync();
    assert_eq!(fe.rings.live(), [1]);
    fe.rings.with_ring(1, |ring| assert!(ring.inflight.is_none()));
}

// Migration.

/// Each iteration of Cloud Hypervisor brings a new log and reads the old one after our answer [42].
#[test]
fn the_log_is_swapped_before_the_answer() {
    let fe = FrontEnd::new(1);
    fe.run(1);
    assert!(fe.accepts(R::SET_FEATURES, &longs(&[FEATURES | LOG_ALL]), &[]));
    assert!(!fe.rings.mark(0, 1));
    let logs = [0, 1].map(|_| memfd_create("log", 4096, false).unwrap());
    let base = longs(&[4096, 0]);
    for (log, page) in logs.iter().zip([0u64, 1]) {
        fe.tell(R::SET_LOG_BASE, &base, &[log.as_fd()]);
        assert_eq!(fe.answer(R::SET_LOG_BASE).0, base);
        assert!(fe.rings.mark(page * 4096, 1));
    }
    for (log, bits) in logs.iter().zip([1, 2]) {
        let mut byte = [0];
        log.read_exact_at(&mut byte, 0).unwrap();
        assert_eq!(byte, [bits]);
    }
    assert_eq!(fe.rings.live(), [0]);
    // A ring that starts now starts with the log.
    assert!(fe.enable(0, false) && fe.enable(0, true));
    fe.rings.with_ring(0, |ring| assert!(ring.dirty_log.is_some()));
}

#[test]
fn a_log_that_cannot_be_mapped_ends_the_connection() {
    let fe = FrontEnd::new(1);
    fe.run(1);
    let log = memfd_create("log", 100, false).unwrap();
    fe.tell(R::SET_LOG_BASE, &longs(&[4096, 0]), &[log.as_fd()]);
    fe.ended_with("SET_LOG_BASE: the migration would miss pages");
}

// The connection.

/// 32 files are what the protocol's implementations take.
#[test]
fn as_many_files_as_there_may_be() {
    let fe = FrontEnd::new(1);
    fe.negotiate(FEATURES);
    let mut table = words(&[32, 0]);
    for slot in 0..32 {
        table.extend(longs(&[slot * 0x2000, 0x1000, BASE + slot * 0x2000, 0]));
    }
    assert!(fe.accepts(R::SET_MEM_TABLE, &table, &[fe.memory.as_fd(); 32]));
    assert_eq!(fe.calls(), [Call::Memory(32)]);
}

#[test]
fn messages_in_pieces() {
    let fe = FrontEnd::new(1);
    fe.negotiate(FEATURES);
    let mut message = words(&[R::SET_VRING_NUM as u32, 9, 8]);
    message.extend(words(&[0, 64]));
    let pause = || std::thread::sleep(Duration::from_millis(20));
    for cut in [1, 11, 12, 13, 19] {
        send_bytes(&fe.socket, &message[..cut], &[]).unwrap();
        pause();
        send_bytes(&fe.socket, &message[cut..], &[]).unwrap();
        assert_eq!(long(&fe.answer(R::SET_VRING_NUM).0), 0, "cut at {cut}");
    }
    // Byte by byte.
    for byte in &message {
        send_bytes(&fe.socket, &[*byte], &[]).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(long(&fe.answer(R::SET_VRING_NUM).0), 0);
}

#[test]
fn what_cannot_be_understood_ends_the_connection_with_a_reason() {
    type Script = fn(&FrontEnd);
    let cases: [(&str, Script); 6] = [
        ("message 99 ends the connection", |fe| {
            send_message(&fe.socket, 99, 1, &[], &[]).unwrap();
        }),
        ("GET_STATUS ends the connection", |fe| fe.tell(R::GET_STATUS, &[], &[])),
        ("SET_VRING_ENABLE ends the connection: it needs VHOST_USER_F_PROTOCOL_FEATURES", |fe| {
            fe.tell(R::SET_FEATURES, &longs(&[VERSION_1]), &[]);
            fe.tell(R::SET_VRING_ENABLE, &words(&[0, 1]), &[]);
        }),
        ("the front-end left in the middle", |fe| {
            send_bytes(&fe.socket, &words(&[1, 1]), &[]).unwrap();
            fe.socket.shutdown(std::net::Shutdown::Write).unwrap();
        }),
        ("carries more than 32 files", |fe| {
            let event = event();
            fe.tell(R::SET_VRING_KICK, &longs(&[0]), &[event.as_fd(); 33]);
        }),
        ("SET_BACKEND_REQ_FD ends the connection: invalid AF_UNIX SOCK_STREAM", |fe| {
            let file = fe.memory.try_clone().unwrap();
            fe.tell(R::SET_BACKEND_REQ_FD, &[], &[file.as_fd()]);
        }),
    ];
    for (words, script) in cases {
        let fe = FrontEnd::new(1);
        fe.run(1);
        script(&fe);
        match fe.thread.join().unwrap() {
            Err(err) => assert!(err.to_string().contains(words), "{words}: {err}"),
            Ok(ended) => panic!("{words}: {ended:?}"),
        }
    }
}

#[test]
fn stop_drains_and_closes() {
    let fe = FrontEnd::new(2);
    fe.run(2);
    fe.stop.request();
    assert_eq!(fe.thread.join().unwrap().unwrap(), Ended::Stopped);
    assert!(fe.rings.live().is_empty());
    assert_eq!((&fe.socket).read(&mut [0]).unwrap(), 0, "closed");
    // During a drain, whose answer still gets out.
    let fe = FrontEnd::new(1);
    fe.run(1);
    let (entered, in_drain) = mpsc::channel();
    *fe.rings.on_stop.lock().unwrap() = Some(Box::new(move |_| {
        entered.send(()).unwrap();
        std::thread::sleep(Duration::from_millis(50));
    }));
    fe.tell(R::GET_VRING_BASE, &words(&[0, 0]), &[]);
    in_drain.recv().unwrap();
    fe.stop.request();
    fe.answer(R::GET_VRING_BASE);
    assert_eq!(fe.thread.join().unwrap().unwrap(), Ended::Stopped);
}

#[test]
fn somebody_who_only_looks() {
    let fe = FrontEnd::new(1);
    assert_eq!(fe.leave().unwrap(), Ended::Silent);
}

/// With no file descriptors left a message is not misread: the connection ends and says why, and
/// the process goes on. The limit is the process's, so this runs in one of its own.
#[test]
fn out_of_file_descriptors() {
    let status = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--ignored", "device::message_tests::out_of_file_descriptors_child"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&status.stdout);
    assert!(status.status.success() && text.contains("1 passed"), "{text}");
}

#[test]
#[ignore = "out_of_file_descriptors runs it, in a process of its own"]
fn out_of_file_descriptors_child() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let fe = FrontEnd::new(1);
    fe.run(1);
    let event = event();
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, rustix::process::Rlimit { current: Some(64), ..limit }).unwrap();
    let mut hoard = Vec::new();
    while let Ok(file) = File::open("/dev/null") {
        hoard.push(file);
    }
    fe.tell(R::SET_VRING_CALL, &longs(&[0]), &[event.as_fd()]);
    let err = fe.thread.join().unwrap().unwrap_err().to_string();
    assert!(err.contains("SET_VRING_CALL") && err.contains("out of file descriptors"), "{err}");
    assert!(fe.rings.live().is_empty());
    // The next client, when there is room again.
    drop(hoard);
    let again = FrontEnd::connect(&fe.device, &fe.rings);
    again.run(1);
}

/// Thousands of connections leave no file behind.
#[test]
fn connections_leak_no_files() {
    let count = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let once = || {
        let fe = FrontEnd::new(1);
        fe.run(1);
        let region = fe.get_inflight(TWO_OF_128);
        assert!(fe.set_inflight(&region));
        let _channel = fe.channel();
        let event = event();
        for request in [R::SET_VRING_CALL, R::SET_VRING_ERR, R::SET_VRING_KICK] {
            assert!(fe.accepts(request, &longs(&[0]), &[event.as_fd()]));
        }
        fe.leave().unwrap();
    };
    once();
    let before = count();
    for _ in 0..300 {
        once();
    }
    // Other tests run beside this one and have files of their own.
    assert!(count() < before + 250, "{before} files before, {} after", count());
}

/// A real QEMU with SeaBIOS, as far as a disk that never answers gets it: start, change of size,
/// death of the back-end and reconnection, pause, reset.
#[test]
fn real_qemu() {
    use super::server::{Server, ServerSocket};
    use std::process::{Command, Stdio};

    if !Command::new("qemu-system-x86_64")
        .arg("--version")
        .output()
        .is_ok_and(|o| o.status.success())
    {
        assert!(std::env::var_os("VUBLK_REQUIRE_GUESTS").is_none(), "no qemu-system-x86_64");
        eprintln!("SKIPPED: qemu-system-x86_64 is not installed");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.sock");
    let start = |capacity: u64| {
        let rings = MockRings::new(2);
        rings.set_capacity(capacity);
        let device = Device::new("disk", rings.clone());
        let socket = ServerSocket::bind(&path, None).unwrap();
        (Server::start(socket, device.clone()).unwrap(), device, rings)
    };
    let wait = |what: &str, ready: &dyn Fn() -> bool| {
        for _ in 0..1500 {
            if ready() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("waited in vain for {what}");
    };
    let (server, device, rings) = start(1 << 20);
    /// Leaves no QEMU behind, whatever fails.
    struct Killed(std::process::Child);
    impl Drop for Killed {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
    let qemu = Command::new("qemu-system-x86_64")
        .args(["-M", "q35,memory-backend=mem", "-m", "128", "-display", "none", "-nodefaults"])
        .args(["-object", "memory-backend-memfd,id=mem,size=128M,share=on", "-qmp", "stdio"])
        .args(["-chardev", &format!("socket,id=c,path={},reconnect-ms=100", path.display())])
        .args(["-device", "vhost-user-blk-pci,chardev=c,num-queues=2,bootindex=1"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut qemu = Killed(qemu);
    let mut stdin = qemu.0.stdin.take().unwrap();
    let mut qmp = |command: &str| writeln!(stdin, "{{\"execute\":\"{command}\"}}").unwrap();
    qmp("qmp_capabilities");
    wait("SeaBIOS", &|| rings.live() == [0]);
    let calls = rings.take_calls();
    println!("start: {calls:?}");
    assert!(calls.iter().any(|call| matches!(call, Call::Session(Session::New(_)))));
    rings.with_ring(0, |ring| assert!(ring.inflight.is_some() && ring.call.is_some()));
    // A change of size: QEMU comes and looks.
    std::thread::sleep(Duration::from_millis(300));
    rings.set_capacity(3 << 20);
    device.notify_config_change();
    wait("GET_CONFIG", &|| device.told_capacity() == Some(3 << 11));
    assert_eq!(rings.live(), [0], "and the ring runs on");
    // Pause and go on.
    rings.set_popped(1);
    qmp("stop");
    wait("the pause", &|| rings.live().is_empty());
    qmp("cont");
    wait("going on", &|| rings.live() == [0]);
    println!("pause: {:?}", rings.take_calls());
    // Another process takes over.
    server.stop();
    let (server, device, rings) = start(4 << 20);
    wait("the reconnection", &|| rings.live() == [0]);
    wait("GET_CONFIG", &|| device.told_capacity() == Some(4 << 11));
    let calls = rings.take_calls();
    println!("reconnect: {calls:?}");
    assert!(calls.iter().any(|call| matches!(call, Call::Session(Session::Returned(_)))));
    // Reset: everything from the beginning, with a new region.
    qmp("system_reset");
    wait("the end of the ring", &|| rings.live().is_empty());
    wait("SeaBIOS again", &|| rings.live() == [0]);
    let calls = rings.take_calls();
    println!("reset: {calls:?}");
    assert!(calls.iter().any(|call| matches!(call, Call::Session(Session::New(_)))));
    qmp("quit");
    assert!(qemu.0.wait().unwrap().success());
    wait("the end", &|| rings.take_calls().contains(&Call::Disconnected));
    server.stop();
}
