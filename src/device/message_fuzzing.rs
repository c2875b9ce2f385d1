//! Stand-in workers, and the body of the fuzz target `messages`.
//!
//! [`MockRings`] writes down what it is asked and panics when a rule of [`rings`](super::rings) is
//! broken, so a stream of messages that makes the message thread break one is found by tests and
//! fuzzer alike. It is in the library, not in the tests, because the fuzz targets are a crate of
//! their own.

#![allow(unsafe_code)]

use std::fs::File;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::config_space::{ConfigParams, ConfigSpace};
use super::connection::{self, Stop};
use super::dirty_log::DirtyLog;
use super::features;
use super::handler::Device;
use super::identity::DiskIdentity;
use super::inflight::InflightRegion;
use super::mapping::memfd_create;
use super::memory::GuestMemory;
use super::rings::{Notifier, RingStart, Rings, Session};
use crate::error::{Error, Result};

/// One call of a [`Rings`] method, as far as tests care.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Call {
    Session(Session),
    Start {
        index: usize,
        size: u16,
        base: u16,
    },
    Stop(usize),
    SetCall(usize, bool),
    SetErr(usize, bool),
    SetLogUsed(usize, Option<u64>),
    /// Number of regions.
    Memory(usize),
    DirtyLog(bool),
    WriteThrough(bool),
    Writeback(bool),
    Disconnected,
}

/// What is called at the start of each stop, to make a drain take its time.
type StopHook = Box<dyn Fn(usize) + Send + Sync>;
type WriteThroughHook = Box<dyn Fn(bool) + Send + Sync>;

/// Workers that work nothing and watch the message thread.
pub struct MockRings {
    state: Mutex<MockState>,
    /// Bits to offer.
    pub features: AtomicU64,
    /// Makes the next starts fail.
    pub refuse_start: AtomicBool,
    /// Makes the next sessions fail.
    pub refuse_session: AtomicBool,
    /// Runs in each stop, before it answers.
    pub on_stop: Mutex<Option<StopHook>>,
    /// Runs whenever completed writes are to be durable or need not be.
    pub on_write_through: Mutex<Option<WriteThroughHook>>,
    /// Identity to report.
    pub identity: Mutex<DiskIdentity>,
}

struct MockState {
    calls: Vec<Call>,
    config: ConfigSpace,
    live: Vec<Option<RingStart>>,
    /// How many requests each ring pops between start and stop.
    popped: u16,
    session: Option<Session>,
    memory: Arc<GuestMemory>,
    dirty_log: Option<Arc<DirtyLog>>,
}

impl MockRings {
    /// Workers for `queues` queues of a disk of 1 MiB.
    pub fn new(queues: usize) -> Arc<MockRings> {
        let config = ConfigSpace::new(&ConfigParams {
            capacity: 1 << 20,
            block_size: 512,
            physical_block_size: 4096,
            min_io: 4096,
            opt_io: 0,
            seg_max: 126,
            num_queues: queues as u16,
            discard_granularity: 4096,
            may_unmap: true,
            writeback: true,
        });
        Arc::new(MockRings {
            state: Mutex::new(MockState {
                calls: Vec::new(),
                config,
                live: (0..queues).map(|_| None).collect(),
                popped: 0,
                session: None,
                memory: GuestMemory::new(),
                dirty_log: None,
            }),
            features: AtomicU64::new(features::device_features(false)),
            refuse_start: AtomicBool::new(false),
            refuse_session: AtomicBool::new(false),
            on_stop: Mutex::new(None),
            on_write_through: Mutex::new(None),
            identity: Mutex::new(DiskIdentity::default()),
        })
    }

    fn state(&self) -> MutexGuard<'_, MockState> {
        self.state.lock().expect("mock")
    }

    fn note(&self, call: Call) -> MutexGuard<'_, MockState> {
        let mut state = self.state();
        state.calls.push(call);
        state
    }

    /// The calls since the last time this was asked.
    pub fn take_calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.state().calls)
    }

    /// Indexes of the rings that live.
    pub fn live(&self) -> Vec<usize> {
        let state = self.state();
        (0..state.live.len()).filter(|i| state.live[*i].is_some()).collect()
    }

    /// What a live ring was started with.
    pub fn with_ring<T>(&self, index: usize, look: impl FnOnce(&RingStart) -> T) -> T {
        look(self.state().live[index].as_ref().expect("ring is not live"))
    }

    /// Lets each ring pop so many requests between start and stop.
    pub fn set_popped(&self, popped: u16) {
        self.state().popped = popped;
    }

    /// Resizes the disk, in bytes.
    pub fn set_capacity(&self, capacity: u64) {
        self.state().config.set_capacity(capacity);
    }

    /// Number of memory regions that the workers have.
    pub fn regions(&self) -> usize {
        self.state().memory.len()
    }

    /// Marks as a worker would, in the log of now. False if there is none.
    pub fn mark(&self, addr: u64, len: u64) -> bool {
        let state = self.state();
        state.dirty_log.as_ref().inspect(|log| log.mark(addr, len)).is_some()
    }
}

/// Whether all three areas of a ring are in memory.
fn areas_in(start: &RingStart, memory: &GuestMemory) -> bool {
    let n = u64::from(start.size);
    let event = if start.features & features::EVENT_IDX != 0 { 2 } else { 0 };
    [(start.desc, 16 * n), (start.avail, 4 + 2 * n + event), (start.used, 4 + 8 * n + event)]
        .into_iter()
        .all(|(addr, len)| memory.front_end_ptr(addr, len).is_ok())
}

impl Rings for MockRings {
    fn max_queues(&self) -> usize {
        self.state().live.len()
    }

    fn features(&self) -> u64 {
        self.features.load(Ordering::SeqCst)
    }

    fn config(&self) -> ConfigSpace {
        self.state().config.clone()
    }

    fn identity(&self) -> DiskIdentity {
        *self.identity.lock().expect("mock")
    }

    fn settle(&self) -> Result<()> {
        assert!(self.live().is_empty(), "settled while rings run");
        Ok(())
    }

    fn session(&self, session: Session, _region: Option<&Arc<InflightRegion>>) -> Result<()> {
        let mut state = self.note(Call::Session(session));
        assert!(state.live.iter().all(Option::is_none), "a session begins while rings run");
        assert_ne!(state.session, Some(session), "the same session twice");
        if self.refuse_session.load(Ordering::SeqCst) {
            state.session = None;
            return Err(Error::corrupt("mock refuses the session"));
        }
        state.session = Some(session);
        Ok(())
    }

    fn start(&self, index: usize, start: RingStart) -> Result<()> {
        let (size, base) = (start.size, start.base);
        let mut state = self.note(Call::Start { index, size, base });
        assert!(state.live[index].is_none(), "ring {index} is started twice");
        assert!(size.is_power_of_two() && size <= 1024);
        assert!(areas_in(&start, &start.memory), "areas outside of memory");
        assert!(Arc::ptr_eq(&start.memory, &state.memory), "another table than published");
        assert!(state.session.is_some(), "ring {index} starts without a session");
        if self.refuse_start.load(Ordering::SeqCst) {
            return Err(Error::corrupt("mock refuses to start"));
        }
        state.dirty_log = start.dirty_log.clone();
        state.live[index] = Some(start);
        Ok(())
    }

    fn stop(&self, index: usize) -> Option<u16> {
        if let Some(hook) = &*self.on_stop.lock().expect("mock") {
            hook(index);
        }
        let mut state = self.note(Call::Stop(index));
        let popped = state.popped;
        let start = state.live[index].take();
        assert!(start.is_some(), "ring {index} is stopped but not live");
        start.map(|start| start.base.wrapping_add(popped))
    }

    fn set_call(&self, index: usize, call: Option<Notifier>) {
        let mut state = self.note(Call::SetCall(index, call.is_some()));
        state.live[index].as_mut().expect("ring is not live").call = call;
    }

    fn set_error_fd(&self, index: usize, err: Option<Notifier>) {
        let mut state = self.note(Call::SetErr(index, err.is_some()));
        state.live[index].as_mut().expect("ring is not live").err = err;
    }

    fn set_log_used(&self, index: usize, log_used: Option<u64>) {
        let mut state = self.note(Call::SetLogUsed(index, log_used));
        state.live[index].as_mut().expect("ring is not live").log_used = log_used;
    }

    fn set_memory(&self, memory: Arc<GuestMemory>) {
        let mut state = self.note(Call::Memory(memory.len()));
        for start in state.live.iter().flatten() {
            assert!(areas_in(start, &memory), "a live ring loses its memory");
        }
        state.memory = memory;
    }

    fn set_dirty_log(&self, log: Option<Arc<DirtyLog>>) {
        let mut state = self.note(Call::DirtyLog(log.is_some()));
        state.dirty_log = log;
    }

    fn set_write_through(&self, on: bool) {
        if let Some(hook) = &*self.on_write_through.lock().expect("mock") {
            hook(on);
        }
        drop(self.note(Call::WriteThrough(on)));
    }

    fn set_writeback(&self, on: bool) {
        self.note(Call::Writeback(on)).config.set_writeback(on);
    }

    fn disconnected(&self) {
        let mut state = self.note(Call::Disconnected);
        assert!(state.live.iter().all(Option::is_none), "a ring outlives its connection");
        assert!(state.memory.is_empty() && state.dirty_log.is_none());
        state.session = None;
    }
}

/// Sends a message as a front-end does, in one piece.
pub fn send_message(
    socket: &UnixStream,
    request: u32,
    flags: u32,
    body: &[u8],
    files: &[BorrowedFd<'_>],
) -> rustix::io::Result<usize> {
    let mut message = Vec::with_capacity(12 + body.len());
    for word in [request, flags, body.len() as u32] {
        message.extend_from_slice(&word.to_ne_bytes());
    }
    message.extend_from_slice(body);
    send_bytes(socket, &message, files)
}

/// Sends bytes with files attached.
pub fn send_bytes(
    socket: &UnixStream,
    bytes: &[u8],
    files: &[BorrowedFd<'_>],
) -> rustix::io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(files)));
    }
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)
}

/// A reader of the fuzzer's bytes; zeros when they have run out.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((first, rest)) => {
                self.0 = rest;
                *first
            }
            None => 0,
        }
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[usize::from(self.byte()) % from.len()]
    }

    /// Zero for the most part.
    fn rarely(&mut self) -> u64 {
        match self.byte() {
            0..230 => 0,
            _ => self.number(),
        }
    }

    /// A number that is often small, sometimes one that matters, sometimes wild.
    fn number(&mut self) -> u64 {
        match self.byte() % 8 {
            0..=3 => u64::from(self.byte() % 4),
            4 => 1 << (self.byte() % 64),
            5 => u64::from(self.byte()) << 12,
            6 => u64::MAX - u64::from(self.byte()),
            _ => u64::from_le_bytes(std::array::from_fn(|_| self.byte())),
        }
    }
}

/// The files that a fuzzed message may carry.
struct Files {
    event: OwnedFd,
    memory: File,
    small: File,
    socket: UnixStream,
    pipe: OwnedFd,
    null: File,
    inflight: File,
}

impl Files {
    fn new() -> Files {
        let inflight = InflightRegion::create(2, 64).expect("in-flight region");
        let (pipe, _) = std::io::pipe().expect("pipe");
        Files {
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("eventfd"),
            memory: memfd_create("fuzz", FUZZ_MEMORY, false).expect("memfd"),
            small: memfd_create("fuzz-small", 17, false).expect("memfd"),
            socket: UnixStream::pair().expect("socket").0,
            pipe: pipe.into(),
            null: File::open("/dev/null").expect("null"),
            inflight: inflight.file,
        }
    }

    fn pick(&self, which: u8) -> BorrowedFd<'_> {
        match which % 7 {
            0 => self.event.as_fd(),
            1 => self.memory.as_fd(),
            2 => self.small.as_fd(),
            3 => self.socket.as_fd(),
            4 => self.pipe.as_fd(),
            5 => self.null.as_fd(),
            _ => self.inflight.as_fd(),
        }
    }
}

const FUZZ_MEMORY: u64 = 0x10_0000;
/// Where the fuzzed front-end has its memory.
const FUZZ_ADDR: u64 = 0x7f00_0000_0000;

/// Sends the messages that `input` describes, well-formed ones for the most part, into a
/// connection, with answers read away, and waits for its end. Panics if a rule of
/// [`Rings`] is broken or the connection does not end after its front-end has left. Returns what
/// the workers were asked.
pub fn messages(input: &[u8]) -> Vec<Call> {
    // A program in Rust starts like this; a fuzzer's does not. A device state may be saved into a
    // pipe that nobody reads.
    // SAFETY: no handler is installed, the signal is only ignored.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    let (ours, theirs) = UnixStream::pair().expect("socket pair");
    let rings = MockRings::new(2);
    let device = Device::new("fuzz", rings.clone());
    let server = std::thread::spawn({
        let device = device.clone();
        move || connection::serve(theirs, &device, &Stop::default())
    });
    // Answers are read away, so that a full socket is not taken for a hang.
    let reader = std::thread::spawn({
        let mut ours = ours.try_clone().expect("clone socket");
        move || {
            let mut sink = [0; 4096];
            while ours.read(&mut sink).is_ok_and(|n| n != 0) {}
        }
    });
    let files = Files::new();
    let mut input = Bytes(input);
    if input.byte() & 3 != 0 {
        negotiate(&ours);
    }
    while !input.0.is_empty() && send_one(&ours, &mut input, &files).is_ok() {
        if input.byte() == 7 {
            device.notify_config_change();
        }
    }
    ours.shutdown(std::net::Shutdown::Write).expect("shut down");
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while !server.is_finished() {
        assert!(std::time::Instant::now() < deadline, "the connection hangs");
        std::thread::sleep(Duration::from_micros(50));
    }
    // How it ended is the fuzzer's business; that it did not panic is ours.
    let _ = server.join().expect("the message thread has panicked");
    assert!(rings.live().is_empty() && rings.regions() == 0);
    drop(ours);
    reader.join().expect("reader");
    rings.take_calls()
}

/// The usual beginning, after which all messages are open.
fn negotiate(socket: &UnixStream) {
    let protocol = features::protocol_features().bits();
    let virtio = features::device_features(false);
    for (request, body) in
        [(1, None), (15, None), (16, Some(protocol)), (2, Some(virtio)), (3, None)]
    {
        let body = body.map(u64::to_ne_bytes);
        let body = body.as_ref().map_or(&[][..], |b| &b[..]);
        let _ = send_message(socket, request, 1, body, &[]);
    }
}

/// Sends all that makes a ring live, as chance alone would not.
fn send_ring(socket: &UnixStream, ring: u32, files: &Files) -> rustix::io::Result<()> {
    let words = |words: &[u32]| -> Vec<u8> { words.iter().flat_map(|w| w.to_ne_bytes()).collect() };
    let longs = |longs: &[u64]| -> Vec<u8> { longs.iter().flat_map(|w| w.to_ne_bytes()).collect() };
    let mut addr = words(&[ring, 0]);
    addr.extend(longs(&[0, 0x800, 0x400, 0].map(|offset| FUZZ_ADDR + offset)));
    let memory = longs(&[0, 0, 0x8_0000, FUZZ_ADDR, 0]);
    for (request, body, file) in [
        (37, memory, Some(files.memory.as_fd())),
        (8, words(&[ring, 32]), None),
        (9, addr, None),
        (12, longs(&[ring.into()]), Some(files.event.as_fd())),
        (18, words(&[ring, 1]), None),
    ] {
        send_message(socket, request, 1, &body, file.as_slice())?;
    }
    Ok(())
}

/// Sends one message of the fuzzer's making.
fn send_one(socket: &UnixStream, input: &mut Bytes<'_>, files: &Files) -> rustix::io::Result<()> {
    // Those that build rings come more often than those that break connections.
    const REQUESTS: [u32; 48] = [
        1, 2, 2, 3, 4, 5, 5, 6, 8, 8, 8, 9, 9, 9, 9, 10, 10, 11, 11, 12, 12, 12, 12, 13, 13, 14,
        15, 16, 17, 18, 18, 18, 18, 18, 21, 24, 25, 31, 32, 32, 34, 36, 37, 37, 37, 38, 42, 43,
    ];
    let request = match input.byte() {
        255 => u32::from(input.byte()),
        n @ 215..255 => return send_ring(socket, u32::from(n) % 2, files),
        n => REQUESTS[usize::from(n) % REQUESTS.len()],
    };
    let mut body = Vec::new();
    let mut attached = Vec::new();
    let event = input.pick(&[0, 0, 0, 0, 0, 0, 1, 4, 5]);
    let memory = input.pick(&[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 3]);
    let ring = u64::from(input.byte() % 8 / 3);
    let mut word = |value: u64| body.extend_from_slice(&(value as u32).to_ne_bytes());
    match request {
        2 => {
            let features = features::device_features(false) & !input.rarely();
            return finish(socket, request, &features.to_ne_bytes(), &[], input, files);
        }
        8 => [ring, input.pick(&[1, 16, 64, 64, 64, 256, 1024, 2048, 3])]
            .into_iter()
            .for_each(&mut word),
        10 | 11 => [ring, input.number()].into_iter().for_each(&mut word),
        18 => [ring, u64::from(!input.byte().is_multiple_of(5))].into_iter().for_each(&mut word),
        9 => {
            word(ring);
            word(u64::from(input.byte() & 1));
            let page = u64::from(input.byte()) << 12;
            for offset in [0, 0x800, 0x400, 0x800] {
                let addr = FUZZ_ADDR + page + offset;
                body.extend_from_slice(&addr.to_ne_bytes());
            }
        }
        12..=14 => {
            let none = input.byte().is_multiple_of(4);
            let value = ring | if none { 0x100 } else { 0 };
            body.extend_from_slice(&value.to_ne_bytes());
            if !none {
                attached.push(event);
            }
        }
        5 => {
            let count = 1 + input.byte() % 2;
            word(count.into());
            word(0);
            for index in 0..u64::from(count) {
                let skip = index << 19;
                for value in [skip, 0x8_0000, FUZZ_ADDR + skip, skip] {
                    body.extend_from_slice(&value.to_ne_bytes());
                }
                attached.push(memory);
            }
        }
        37 | 38 => {
            let half = u64::from(input.byte() % 4) << 19;
            let len = input.pick(&[0x8_0000, 0x8_0000, 0x8_0000, 0x8_0000, 0x10_0000, 1, 0x7000]);
            for value in [0, half, len, FUZZ_ADDR + half, half] {
                body.extend_from_slice(&u64::to_ne_bytes(value));
            }
            if request == 37 || input.byte() & 1 != 0 {
                attached.push(memory);
            }
        }
        6 => {
            for value in [input.pick(&[4096, 4096, 4096, 4096, 4096, 64, 1, 0]), 0] {
                body.extend_from_slice(&u64::to_ne_bytes(value));
            }
            attached.push(memory);
        }
        21 => attached.push(input.pick(&[3, 3, 3, 3, 3, 3, 0])),
        24 | 25 => {
            let offset = input.pick(&[0, 0, 32, 32, 0x100, 0x120, 0x200]);
            let size = input.pick(&[1, 36, 57, 60, 256, 8]);
            [offset, size, 0].into_iter().for_each(&mut word);
            let value = input.byte() & 1;
            body.resize(12 + size as usize, value);
        }
        31 | 32 => {
            for value in [input.pick(&[0x3000, 0x2000, 0x2000, 0, 1 << 40]), 0] {
                body.extend_from_slice(&u64::to_ne_bytes(value));
            }
            for value in
                [input.pick(&[2, 2, 2, 2, 1, 64, 65]), input.pick(&[64u16, 64, 64, 64, 32, 256, 3])]
            {
                body.extend_from_slice(&value.to_ne_bytes());
            }
            body.extend_from_slice(&[0; 4]);
            if request == 32 {
                attached.push(input.pick(&[6, 6, 6, 6, 6, 1, 2, 3]));
            }
        }
        42 => {
            [u64::from(input.byte() & 1), 0].into_iter().for_each(&mut word);
            attached.push(input.pick(&[4, 5, 2]));
        }
        16 => {
            let bits = features::protocol_features().bits() & !input.rarely();
            body.extend_from_slice(&bits.to_ne_bytes());
        }
        1 | 3 | 4 | 15 | 17 | 34 | 36 | 43 => {}
        _ => {
            for _ in 0..input.byte() % 40 {
                body.push(input.byte());
            }
        }
    }
    finish(socket, request, &body, &attached, input, files)
}

/// Sends it, now and then broken.
fn finish(
    socket: &UnixStream,
    request: u32,
    body: &[u8],
    attached: &[u8],
    input: &mut Bytes<'_>,
    files: &Files,
) -> rustix::io::Result<()> {
    let mut body = body.to_vec();
    let mut attached: Vec<_> = attached.iter().map(|which| files.pick(*which)).collect();
    let mut flags = if input.byte() & 1 != 0 { 1 } else { 9 };
    match input.byte() {
        255 => flags = u32::from(input.byte()),
        254 => attached.push(files.pick(input.byte())),
        253 if input.byte() < 64 => drop(attached.pop()),
        252 if input.byte() < 64 => body.push(input.byte()),
        251 if input.byte() < 64 => drop(body.pop()),
        250 | 249 => {
            let at = usize::from(input.byte()) % body.len().max(1);
            if let Some(byte) = body.get_mut(at) {
                *byte ^= input.byte();
            }
        }
        248 => attached.extend((0..40).map(|_| files.event.as_fd())),
        _ => {}
    }
    send_message(socket, request, flags, &body, &attached).map(drop)
}

#[cfg(test)]
mod tests {
    use super::{Call, Session};

    /// SplitMix64, to need no crate for a stream of numbers.
    fn random(seed: &mut u64) -> u64 {
        *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = *seed;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    #[test]
    fn any_stream_of_messages_is_survived() {
        let mut calls = Vec::new();
        for seed in 0..3000u64 {
            let mut state = seed;
            let len = random(&mut state) % 600;
            let input: Vec<u8> = (0..len).map(|_| random(&mut state) as u8).collect();
            let done = std::panic::catch_unwind(|| super::messages(&input));
            calls.extend(done.unwrap_or_else(|_| panic!("seed {seed}")));
        }
        // The streams are of use only if they get somewhere.
        let count = |wanted: fn(&Call) -> bool| calls.iter().filter(|call| wanted(call)).count();
        for (count, what) in [
            (count(|c| matches!(c, Call::Start { .. })), "starts"),
            (count(|c| matches!(c, Call::Stop(_))), "stops"),
            (
                count(|c| matches!(c, Call::Session(Session::New(_) | Session::Returned(_)))),
                "regions",
            ),
            (count(|c| matches!(c, Call::SetCall(..))), "interrupts replaced"),
            (count(|c| matches!(c, Call::DirtyLog(true))), "logs"),
            (count(|c| matches!(c, Call::Memory(1..))), "memory tables"),
        ] {
            println!("{count} {what}");
            assert!(count > 50, "only {count} {what}");
        }
    }
}
