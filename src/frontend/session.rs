//! A whole disk, as a virtual machine has it: queues, buffers, and requests that can be waited
//! for.
//!
//! ```text
//!  open ─► connect sequence ─► start sequence ─► submit / wait … ─► stop ─► start …
//!                                                      │
//!                                         back-end dies ▼
//!                                              reconnect: rings, memory, in-flight area are kept
//! ```
//!
//! The parts are public, so that a test can step aside and do one thing wrong. Submitted requests
//! are remembered by head: a completion of a head that is not in flight is an error, which is how
//! a test learns that a request completed twice.

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::client::Client;
use super::inflight::Inflight;
use super::memory::{Arena, Memory, Pages};
use super::personality::Personality;
use super::request::{Config, Layout, Request, STATUS_OK, STATUS_UNTOUCHED};
use super::ring::{DESC_LEN, Ring, RingLayout, UsedElement, chain};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::units::MIB;

/// What a [`Session`] is to be like.
#[derive(Clone, Debug)]
pub struct SessionOptions {
    /// Whose sequences to play.
    pub personality: Personality,
    /// Number of queues.
    pub queues: u16,
    /// Descriptors of each queue.
    pub queue_size: u16,
    /// First guest address of the first region.
    pub guest_addr: u64,
    /// Bytes of the first region.
    pub memory: u64,
    /// Pages of the first region.
    pub pages: Pages,
    /// Feature bits to take if offered.
    pub features: u64,
    /// Protocol bits to take if offered.
    pub protocol: u64,
    /// How long to wait for the back-end to come up, and for each answer.
    pub timeout: Duration,
}

impl SessionOptions {
    /// One queue of 128, 64 MiB of memory, everything the personality would take.
    pub fn new(personality: Personality) -> Self {
        SessionOptions {
            personality,
            queues: 1,
            queue_size: 128,
            guest_addr: 16 * MIB,
            memory: 64 * MIB,
            pages: Pages::Small,
            features: personality.features(),
            protocol: personality.protocol(),
            timeout: Duration::from_secs(10),
        }
    }

    /// The same with another number of queues.
    pub fn queues(mut self, queues: u16) -> Self {
        self.queues = queues;
        self
    }
}

impl Default for SessionOptions {
    fn default() -> Self {
        SessionOptions::new(Personality::Qemu)
    }
}

/// Where a request in flight has its buffers.
#[derive(Clone, Copy, Debug)]
pub struct Pending {
    /// Guest address of the readable stream.
    pub out: u64,
    /// Bytes of it.
    pub out_len: u32,
    /// Guest address of the writable stream; the status byte is its last.
    pub into: u64,
    /// Bytes of it.
    pub into_len: u32,
    /// Guest address of the indirect table and bytes of it.
    pub table: Option<(u64, u64)>,
}

/// A request that the back-end is done with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Head of its chain.
    pub head: u16,
    /// The status byte.
    pub status: u8,
    /// Bytes the device says it wrote, the status byte included.
    pub len: u32,
    /// The data the device wrote (for a read, the blocks).
    pub data: Vec<u8>,
}

impl Completion {
    /// The data, if the status says that all is well.
    pub fn ok(self) -> Result<Vec<u8>> {
        match self.status {
            STATUS_OK => Ok(self.data),
            status => Err(Error::new(ErrorKind::Io, format!("request ended with status {status}"))),
        }
    }
}

/// A disk in use.
#[derive(Debug)]
pub struct Session {
    /// What it was opened with.
    pub options: SessionOptions,
    /// The back-end's socket.
    pub path: PathBuf,
    /// The connection.
    pub client: Client,
    /// Guest memory.
    pub memory: Memory,
    /// Buffers in the first region.
    pub arena: Arena,
    /// The queues.
    pub rings: Vec<Ring>,
    /// Index each queue starts from.
    pub bases: Vec<u16>,
    /// The in-flight area, once there is one.
    pub inflight: Option<Inflight>,
    /// The configuration space, as last read.
    pub config: Config,
    /// Requests in flight of each queue, by head.
    pending: Vec<HashMap<u16, Pending>>,
    /// Completions that somebody else's wait came across.
    done: Vec<VecDeque<Completion>>,
}

impl Session {
    /// Connects and starts all queues.
    pub fn open(path: &Path, options: SessionOptions) -> Result<Self> {
        let mut session = Session::connect(path, options)?;
        session.start().context(|| "cannot start the queues")?;
        Ok(session)
    }

    /// Connects and reads the configuration; the queues are not started.
    pub fn connect(path: &Path, options: SessionOptions) -> Result<Self> {
        let client = Client::connect_retry(path, options.timeout)?;
        Session::negotiate(client, path, options)
    }

    /// Reads the configuration over a connection on which nothing has been said; the queues are
    /// not started.
    pub fn negotiate(client: Client, path: &Path, options: SessionOptions) -> Result<Self> {
        let mut session = Session::with_client(client, path, options)?;
        let personality = session.options.personality;
        personality.connect(&mut session).context(|| "cannot negotiate with the back-end")?;
        Ok(session)
    }

    /// Lays out memory and queues around a connection on which nothing has been said.
    pub fn with_client(client: Client, path: &Path, options: SessionOptions) -> Result<Self> {
        let memory = Memory::with_region(options.guest_addr, options.memory, options.pages)?;
        let mut next = options.guest_addr;
        let mut rings = Vec::new();
        for index in 0..options.queues {
            let layout = RingLayout::contiguous(next, options.queue_size);
            rings.push(Ring::new(&memory, index, layout)?);
            next = layout.end();
        }
        let queues = usize::from(options.queues);
        Ok(Session {
            client,
            path: path.to_owned(),
            arena: Arena::new(next, memory.end()),
            memory,
            rings,
            bases: vec![0; queues],
            inflight: None,
            config: Config::default(),
            pending: vec![HashMap::new(); queues],
            done: vec![VecDeque::new(); queues],
            options,
        })
    }

    /// Feature bits in use.
    pub fn features(&self) -> u64 {
        self.client.features()
    }

    /// When a wait that begins now ends.
    pub fn deadline(&self) -> Instant {
        Instant::now() + self.options.timeout
    }

    /// Heads in flight of a queue, in no order.
    pub fn pending(&self, queue: usize) -> Vec<u16> {
        self.pending[queue].keys().copied().collect()
    }

    /// Where a request in flight has its buffers.
    pub fn buffers(&self, queue: usize, head: u16) -> Option<Pending> {
        self.pending[queue].get(&head).copied()
    }

    /// Stops the queues as the personality does.
    pub fn stop(&mut self) -> Result<()> {
        self.options.personality.stop(self)
    }

    /// Starts the queues again as the personality does.
    pub fn start(&mut self) -> Result<()> {
        self.options.personality.start(self)
    }

    /// Carries on with a back-end that was restarted (or is just starting) on the same socket.
    pub fn reconnect(&mut self) -> Result<()> {
        self.client = Client::connect_retry(&self.path, self.options.timeout)?;
        self.options.personality.reconnect(self).context(|| "cannot reconnect")
    }

    /// Empties the rings and forgets what was in flight, as after a reset of the guest.
    pub fn reset_rings(&mut self) {
        for queue in 0..self.rings.len() {
            for pending in std::mem::take(&mut self.pending[queue]).into_values() {
                self.release(pending);
            }
            self.done[queue].clear();
            self.rings[queue].reset();
            self.bases[queue] = 0;
        }
    }

    /// Gives the buffers of a request back.
    fn release(&mut self, pending: Pending) {
        self.arena.free(pending.out, u64::from(pending.out_len));
        self.arena.free(pending.into, u64::from(pending.into_len));
        if let Some((table, len)) = pending.table {
            self.arena.free(table, len);
        }
    }

    /// Lays a request into a queue and pushes its head, without showing it to the device.
    pub fn prepare(&mut self, queue: usize, request: &Request, layout: &Layout) -> Result<u16> {
        let readable = request.readable();
        let out_len = readable.len() as u32;
        let into_len = request.writable();
        let out = self.arena.alloc(u64::from(out_len))?;
        let into = self.arena.alloc(u64::from(into_len))?;
        self.memory.write(out, &readable)?;
        self.memory.write(into + u64::from(into_len) - 1, &[STATUS_UNTOUCHED])?;
        let segments = layout.cut(out, out_len, into, into_len);
        let (head, table) = if layout.indirect {
            let len = DESC_LEN * segments.len() as u64;
            let table = self.arena.alloc(len)?;
            let bytes: Vec<u8> =
                chain(&segments, 0).into_iter().flat_map(|d| d.to_bytes()).collect();
            self.memory.write(table, &bytes)?;
            let head = self.rings[queue].add_indirect(table, segments.len() as u16)?;
            (head, Some((table, len)))
        } else {
            (self.rings[queue].add_chain(&segments)?, None)
        };
        self.pending[queue].insert(head, Pending { out, out_len, into, into_len, table });
        self.rings[queue].push(head);
        Ok(head)
    }

    /// Shows everything prepared in a queue to the device, and kicks if it wants that.
    pub fn publish(&mut self, queue: usize) -> Result<()> {
        self.rings[queue].publish();
        self.rings[queue].kick_if_wanted()?;
        Ok(())
    }

    /// Submits one request in the usual layout and returns its head.
    pub fn submit(&mut self, queue: usize, request: &Request) -> Result<u16> {
        self.submit_as(queue, request, &Layout::default())
    }

    /// Submits one request in any layout and returns its head.
    pub fn submit_as(&mut self, queue: usize, request: &Request, layout: &Layout) -> Result<u16> {
        let head = self.prepare(queue, request, layout)?;
        self.publish(queue)?;
        Ok(head)
    }

    /// Takes a completion that is there already.
    pub fn try_wait(&mut self, queue: usize) -> Result<Option<Completion>> {
        if let Some(completion) = self.done[queue].pop_front() {
            return Ok(Some(completion));
        }
        self.take(queue)
    }

    /// Waits for the next completion of a queue.
    pub fn wait(&mut self, queue: usize, deadline: Instant) -> Result<Completion> {
        loop {
            if let Some(completion) = self.try_wait(queue)? {
                return Ok(completion);
            }
            self.rings[queue].wait_used(deadline)?;
        }
    }

    /// Waits for the completion of one head; others that come first are kept for
    /// [`Session::wait`].
    pub fn wait_head(&mut self, queue: usize, head: u16, deadline: Instant) -> Result<Completion> {
        if let Some(at) = self.done[queue].iter().position(|c| c.head == head) {
            return Ok(self.done[queue].remove(at).expect("the position was just found"));
        }
        loop {
            match self.take(queue)? {
                Some(completion) if completion.head == head => return Ok(completion),
                Some(completion) => self.done[queue].push_back(completion),
                None => self.rings[queue].wait_used(deadline)?,
            }
        }
    }

    /// Takes the next used element and the buffers of its request.
    fn take(&mut self, queue: usize) -> Result<Option<Completion>> {
        let Some(UsedElement { id, len }) = self.rings[queue].take_used() else {
            return Ok(None);
        };
        let pending = u16::try_from(id)
            .ok()
            .and_then(|head| Some((head, self.pending[queue].remove(&head)?)));
        let Some((head, pending)) = pending else {
            return Err(Error::corrupt(format!(
                "the back-end completed head {id} of queue {queue}, which is not in flight"
            )));
        };
        let mut data = self.memory.read_vec(pending.into, pending.into_len as usize)?;
        let status = data.pop().unwrap_or(STATUS_UNTOUCHED);
        self.rings[queue].free_chain(id);
        self.release(pending);
        Ok(Some(Completion { head, status, len, data }))
    }

    /// Submits a request and waits for it.
    pub fn execute(&mut self, queue: usize, request: &Request) -> Result<Completion> {
        self.execute_as(queue, request, &Layout::default())
    }

    /// Submits a request in any layout and waits for it.
    pub fn execute_as(
        &mut self,
        queue: usize,
        request: &Request,
        layout: &Layout,
    ) -> Result<Completion> {
        let head = self.submit_as(queue, request, layout)?;
        self.wait_head(queue, head, self.deadline())
    }

    /// Reads `len` bytes at `offset`.
    pub fn read(&mut self, queue: usize, offset: u64, len: u32) -> Result<Vec<u8>> {
        self.execute(queue, &Request::read(offset, len))?.ok()
    }

    /// Writes `data` at `offset`.
    pub fn write(&mut self, queue: usize, offset: u64, data: &[u8]) -> Result<()> {
        self.execute(queue, &Request::write(offset, data))?.ok().map(|_| ())
    }

    /// Makes completed writes durable.
    pub fn flush(&mut self, queue: usize) -> Result<()> {
        self.execute(queue, &Request::flush())?.ok().map(|_| ())
    }

    /// Discards `len` bytes at `offset`.
    pub fn discard(&mut self, queue: usize, offset: u64, len: u64) -> Result<()> {
        self.execute(queue, &Request::discard(&[(offset, len)]))?.ok().map(|_| ())
    }

    /// Zeroes `len` bytes at `offset`.
    pub fn write_zeroes(&mut self, queue: usize, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.execute(queue, &Request::write_zeroes(&[(offset, len)], unmap))?.ok().map(|_| ())
    }

    /// Reads the serial number.
    pub fn serial(&mut self, queue: usize) -> Result<String> {
        let bytes = self.execute(queue, &Request::get_id())?.ok()?;
        let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
        Ok(String::from_utf8_lossy(&bytes[..end]).into_owned())
    }

    /// Adds a region of guest memory while the queues run. Buffers in it are the caller's to
    /// place.
    pub fn hot_add(&mut self, guest_addr: u64, len: u64) -> Result<()> {
        let region = super::Region::new(guest_addr, len, Pages::Small)?;
        let region = self.memory.add(region)?;
        if self.client.has_protocol(super::client::protocol::CONFIGURE_MEM_SLOTS) {
            self.client.add_mem_reg(&region)
        } else {
            self.client.set_mem_table(&self.memory)
        }
    }

    /// Removes a region of guest memory while the queues run.
    pub fn hot_remove(&mut self, guest_addr: u64) -> Result<()> {
        let region = self
            .memory
            .remove(guest_addr)
            .ok_or_else(|| Error::invalid(format!("no region at {guest_addr:#x}")))?;
        if self.client.has_protocol(super::client::protocol::CONFIGURE_MEM_SLOTS) {
            self.client.rem_mem_reg(&region)
        } else {
            self.client.set_mem_table(&self.memory)
        }
    }
}
