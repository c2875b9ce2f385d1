//! A driver that cuts requests into any descriptors, places each piece anywhere in guest memory
//! between guard bytes, and checks everything that the device may and may not have written.

use std::collections::HashMap;
use std::time::Instant;

use vublk::error::{Error, Result};
use vublk::frontend::client::feature;
use vublk::frontend::request::{STATUS_UNTOUCHED, kind};
use vublk::frontend::ring::{DESC_LEN, chain};
use vublk::frontend::{Arena, Request, Segment, Session};

use super::Random;

/// Bytes behind each piece that nobody may write.
const GUARD: u64 = 8;
/// What they hold.
const GUARD_BYTE: u8 = 0xa5;

/// How requests are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Header, data, status; the data at a page.
    Plain,
    /// At random, at any address.
    Random,
}

/// A request in flight.
#[derive(Debug)]
pub struct Flight {
    /// What was asked.
    pub request: Request,
    /// Pieces that the device reads.
    pub readable: Vec<Segment>,
    /// Pieces that the device writes; the last byte is the status.
    pub writable: Vec<Segment>,
    /// The indirect table, if there is one: address and bytes.
    table: Option<(u64, u64)>,
    /// Buffers to give back: address and bytes.
    buffers: Vec<(u64, u64)>,
}

/// A request that is done.
#[derive(Debug)]
pub struct Done {
    /// What was asked.
    pub request: Request,
    /// The status byte.
    pub status: u8,
    /// Bytes that the device says it wrote.
    pub len: u32,
    /// The data that the device wrote.
    pub data: Vec<u8>,
    /// Pages of guest memory that the device must have written: data of a read, and status.
    pub pages: Vec<u64>,
}

/// Drives a session's queues. The session's own `submit` and `wait` must not be mixed in.
#[derive(Debug)]
pub struct Driver {
    /// The disk.
    pub session: Session,
    /// Where buffers come from.
    pub arena: Arena,
    /// Requests in flight of each queue, by head.
    pub flights: Vec<HashMap<u16, Flight>>,
    /// How requests are cut.
    pub cut: Cut,
    random: Random,
}

impl Driver {
    /// Takes a session over.
    pub fn new(mut session: Session, cut: Cut, random: Random) -> Driver {
        let arena = std::mem::replace(&mut session.arena, Arena::new(0, 0));
        let flights = session.rings.iter().map(|_| HashMap::new()).collect();
        Driver { session, arena, flights, cut, random }
    }

    /// Requests in flight on all queues.
    pub fn in_flight(&self) -> usize {
        self.flights.iter().map(HashMap::len).sum()
    }

    /// Cuts `len` bytes into pieces.
    fn pieces(&mut self, len: u64, keep_last: u64) -> Vec<u64> {
        if self.cut == Cut::Plain {
            let body = len - keep_last;
            return [body, keep_last].into_iter().filter(|len| *len > 0).collect();
        }
        let mut left = len;
        let mut pieces = Vec::new();
        while left > 0 {
            let piece = match self.random.below(4) {
                0 => 1 + self.random.below(left.min(20)),
                1 => left.min(512),
                2 => 1 + self.random.below(left),
                _ if pieces.len() > 12 => left,
                _ => left.min(4096),
            };
            // A chain must fit a small ring.
            let piece = if pieces.len() >= 14 { left } else { piece };
            pieces.push(piece);
            left -= piece;
        }
        pieces
    }

    /// Places pieces in guest memory.
    fn place(
        &mut self,
        pieces: &[u64],
        writable: bool,
        buffers: &mut Vec<(u64, u64)>,
    ) -> Result<Vec<Segment>> {
        let mut segments = Vec::new();
        for len in pieces {
            let shift = match self.cut {
                Cut::Plain => 0,
                Cut::Random if self.random.one_in(3) => 0,
                Cut::Random => self.random.below(64),
            };
            let room = shift + len + GUARD;
            let base = self.arena.alloc(room)?;
            buffers.push((base, room));
            let addr = base + shift;
            self.session.memory.write(addr + len, &[GUARD_BYTE; GUARD as usize])?;
            segments.push(Segment { addr, len: *len as u32, writable });
        }
        Ok(segments)
    }

    /// Lays a request into a queue, without showing it to the device; false if the ring is full.
    pub fn prepare(&mut self, queue: usize, request: Request) -> Result<bool> {
        let bytes = request.readable();
        let header_first = self.cut == Cut::Plain;
        let mut buffers = Vec::new();
        let out = if header_first {
            let rest = bytes.len() as u64 - 16;
            [16, rest].into_iter().filter(|len| *len > 0).collect()
        } else {
            self.pieces(bytes.len() as u64, 0)
        };
        let into = self.pieces(u64::from(request.writable()), 1);
        let negotiated = self.session.features() & feature::INDIRECT_DESC != 0;
        let indirect = negotiated && (self.cut == Cut::Plain || self.random.one_in(2));
        let needed = if indirect { 1 } else { out.len() + into.len() };
        if self.session.rings[queue].free_descriptors() < needed {
            return Ok(false);
        }
        let readable = self.place(&out, false, &mut buffers)?;
        let writable = self.place(&into, true, &mut buffers)?;
        let mut at = 0;
        for segment in &readable {
            let end = at + segment.len as usize;
            self.session.memory.write(segment.addr, &bytes[at..end])?;
            at = end;
        }
        for segment in &writable {
            self.session
                .memory
                .write(segment.addr, &vec![STATUS_UNTOUCHED; segment.len as usize])?;
        }
        let all: Vec<Segment> = readable.iter().chain(&writable).copied().collect();
        let (head, table) = if indirect {
            let len = DESC_LEN * all.len() as u64;
            let table = self.arena.alloc(len)?;
            let bytes: Vec<u8> = chain(&all, 0).into_iter().flat_map(|d| d.to_bytes()).collect();
            self.session.memory.write(table, &bytes)?;
            let head = self.session.rings[queue].add_indirect(table, all.len() as u16)?;
            (head, Some((table, len)))
        } else {
            (self.session.rings[queue].add_chain(&all)?, None)
        };
        self.session.rings[queue].push(head);
        let flight = Flight { request, readable, writable, table, buffers };
        let before = self.flights[queue].insert(head, flight);
        assert!(before.is_none(), "head {head} was in flight");
        Ok(true)
    }

    /// Shows what was prepared to the device.
    pub fn publish(&mut self, queue: usize) -> Result<()> {
        self.session.rings[queue].publish();
        self.session.rings[queue].kick_if_wanted()?;
        Ok(())
    }

    /// Takes a completion that is there.
    ///
    /// # Errors
    /// If the head is not in flight, or the device wrote where it must not.
    pub fn try_take(&mut self, queue: usize) -> Result<Option<Done>> {
        let Some(used) = self.session.rings[queue].take_used() else { return Ok(None) };
        let flight = u16::try_from(used.id).ok().and_then(|id| self.flights[queue].remove(&id));
        let Some(flight) = flight else {
            return Err(Error::corrupt(format!(
                "queue {queue} completed head {}, which is not in flight",
                used.id
            )));
        };
        self.session.rings[queue].free_chain(used.id);
        let memory = &self.session.memory;
        for segment in flight.readable.iter().chain(&flight.writable) {
            let guard = memory.read_vec(segment.addr + u64::from(segment.len), GUARD as usize)?;
            if guard != [GUARD_BYTE; GUARD as usize] {
                return Err(Error::corrupt(format!("written behind {segment:?}")));
            }
        }
        let mut out = Vec::new();
        for segment in &flight.readable {
            out.extend(memory.read_vec(segment.addr, segment.len as usize)?);
        }
        if out != flight.request.readable() {
            return Err(Error::corrupt("the device wrote to a readable descriptor"));
        }
        let mut data = Vec::new();
        for segment in &flight.writable {
            data.extend(memory.read_vec(segment.addr, segment.len as usize)?);
        }
        let status = data.pop().expect("a status byte");
        let mut pages = Vec::new();
        let mut skip = match flight.request.kind {
            kind::IN | kind::GET_ID => 0,
            _ => data.len() as u64,
        };
        for segment in &flight.writable {
            let len = u64::from(segment.len);
            let from = skip.min(len);
            skip -= from;
            if from < len {
                let (first, last) = (segment.addr + from, segment.addr + len - 1);
                pages.extend((first / 4096..=last / 4096).map(|page| page * 4096));
            }
        }
        for (addr, len) in flight.buffers.into_iter().chain(flight.table) {
            self.arena.free(addr, len);
        }
        Ok(Some(Done { request: flight.request, status, len: used.len, data, pages }))
    }

    /// Waits for a completion.
    pub fn take(&mut self, queue: usize, deadline: Instant) -> Result<Done> {
        loop {
            if let Some(done) = self.try_take(queue)? {
                return Ok(done);
            }
            self.session.rings[queue].wait_used(deadline)?;
        }
    }
}
