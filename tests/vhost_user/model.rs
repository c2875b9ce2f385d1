//! A disk as a vector of bytes, and random load that is checked against it.
//!
//! Requests that are in flight at the same time never touch the same sectors unless all of them
//! read, so what a read must return is known when it is submitted. What a discard leaves behind is
//! for the device to choose, sector by sector: the old content, or zeros.

use vublk::error::{Error, Result};
use vublk::frontend::Request;
use vublk::frontend::client::feature;
use vublk::frontend::request::{STATUS_OK, kind};

use crate::common::{Done, Driver, Random, soon};

/// Bytes of a sector.
const SECTOR: usize = 512;

/// What the disk must hold.
#[derive(Clone, Debug)]
pub struct Model {
    /// The content.
    bytes: Vec<u8>,
    /// Sectors that a discard may have zeroed.
    discarded: Vec<bool>,
    /// Requests in flight on each sector: how many read it, and whether one changes it.
    busy: Vec<(u16, bool)>,
    /// Smallest unit of a request.
    block: usize,
    /// What is written beyond a first part of the disk is left alone: a hot spot finds writes that
    /// are done twice or in the wrong order.
    range: usize,
    /// Most bytes of a request.
    longest: usize,
    /// Serial that the disk should have.
    serial: Vec<u8>,
    /// Requests that completed.
    pub completed: u64,
}

/// What a request touches: sectors, and whether it changes them.
fn touched(request: &Request) -> Vec<(std::ops::Range<usize>, bool)> {
    let first = request.sector as usize;
    match request.kind {
        kind::IN => vec![(first..first + request.receive as usize / SECTOR, false)],
        kind::OUT => vec![(first..first + request.out.len() / SECTOR, true)],
        kind::DISCARD | kind::WRITE_ZEROES => request
            .out
            .chunks_exact(16)
            .map(|range| {
                let first = u64::from_le_bytes(range[..8].try_into().expect("8 bytes")) as usize;
                let len = u32::from_le_bytes(range[8..12].try_into().expect("4 bytes")) as usize;
                (first..first + len, true)
            })
            .collect(),
        _ => Vec::new(),
    }
}

impl Model {
    /// A disk with this content, used in units of `block` bytes.
    pub fn new(bytes: Vec<u8>, block: usize) -> Model {
        let sectors = bytes.len() / SECTOR;
        let range = bytes.len();
        let mut serial = b"vublk".to_vec();
        serial.resize(20, 0);
        Model {
            bytes,
            discarded: vec![false; sectors],
            busy: vec![(0, false); sectors],
            block,
            range,
            longest: 64 << 10,
            serial,
            completed: 0,
        }
    }

    /// Uses only the first `bytes` of the disk, by requests of at most `longest`.
    pub fn hot(mut self, bytes: usize, longest: usize) -> Model {
        (self.range, self.longest) = (bytes, longest);
        self
    }

    /// A place for a request: where, and how many bytes.
    fn place(&self, random: &mut Random) -> (u64, u64) {
        let blocks = (self.range / self.block) as u64;
        let most = (self.longest / self.block) as u64;
        let longest = if random.one_in(4) { most } else { (4096 / self.block as u64).max(1) * 2 };
        let len = 1 + random.below(longest.min(most));
        let at = random.below(blocks - len + 1);
        (at * self.block as u64, len * self.block as u64)
    }

    /// A random request that collides with none in flight, or `None` if none was found.
    pub fn next(&self, random: &mut Random, features: u64) -> Option<Request> {
        for _ in 0..20 {
            let (offset, len) = self.place(random);
            let request = match random.below(20) {
                0 if features & feature::FLUSH != 0 => Request::flush(),
                1 => Request::get_id(),
                2 if features & feature::DISCARD != 0 => Request::discard(&[(offset, len)]),
                3 if features & feature::WRITE_ZEROES != 0 => {
                    let mut ranges = vec![(offset, len)];
                    while random.one_in(2) && ranges.len() < 8 {
                        let next = self.place(random);
                        let end = next.0 + next.1;
                        if ranges.iter().all(|(at, len)| end <= *at || at + len <= next.0) {
                            ranges.push(next);
                        }
                    }
                    Request::write_zeroes(&ranges, random.one_in(2))
                }
                4..11 => Request::write(offset, random.bytes(len as usize)),
                _ => Request::read(offset, len as u32),
            };
            let free = touched(&request).into_iter().all(|(sectors, changes)| {
                self.busy[sectors].iter().all(|(reads, write)| !(*write || (changes && *reads > 0)))
            });
            if free {
                return Some(request);
            }
        }
        None
    }

    /// A request goes to the device.
    pub fn submitted(&mut self, request: &Request) {
        for (sectors, changes) in touched(request) {
            for (reads, write) in &mut self.busy[sectors] {
                if changes { *write = true } else { *reads += 1 }
            }
        }
    }

    /// Compares a sector with what it may hold, and settles what a discard left open.
    fn check(&mut self, sector: usize, got: &[u8]) -> std::result::Result<(), String> {
        let range = sector * SECTOR..(sector + 1) * SECTOR;
        if got == &self.bytes[range.clone()] {
            self.discarded[sector] &= got.iter().all(|b| *b == 0);
            return Ok(());
        }
        if self.discarded[sector] && got.iter().all(|b| *b == 0) {
            self.bytes[range].fill(0);
            return Ok(());
        }
        let at = got.iter().zip(&self.bytes[range]).position(|(a, b)| a != b);
        Err(format!("sector {sector} differs from byte {at:?}"))
    }

    /// A request has completed: checks it, and takes over what it changed.
    pub fn done(&mut self, done: &Done) -> Result<()> {
        let request = &done.request;
        let wrong = |what: String| Error::corrupt(format!("{what}: {:?}", brief(request)));
        if done.status != STATUS_OK {
            return Err(wrong(format!("status {}", done.status)));
        }
        let expected = match request.kind {
            kind::IN | kind::GET_ID => request.receive + 1,
            _ => 1,
        };
        if done.len != expected {
            return Err(wrong(format!("{} bytes announced, not {expected}", done.len)));
        }
        for (sectors, changes) in touched(request) {
            for (reads, write) in &mut self.busy[sectors] {
                if changes { *write = false } else { *reads -= 1 }
            }
        }
        match request.kind {
            kind::IN => {
                for (i, got) in done.data.chunks_exact(SECTOR).enumerate() {
                    self.check(request.sector as usize + i, got).map_err(wrong)?;
                }
            }
            kind::OUT => {
                let at = request.sector as usize * SECTOR;
                self.bytes[at..at + request.out.len()].copy_from_slice(&request.out);
                for (sectors, _) in touched(request) {
                    self.discarded[sectors].fill(false);
                }
            }
            kind::WRITE_ZEROES => {
                for (sectors, _) in touched(request) {
                    self.bytes[sectors.start * SECTOR..sectors.end * SECTOR].fill(0);
                    self.discarded[sectors].fill(false);
                }
            }
            kind::DISCARD => {
                for (sectors, _) in touched(request) {
                    self.discarded[sectors].fill(true);
                }
            }
            kind::GET_ID if done.data != self.serial => {
                return Err(wrong(format!("serial {:?}", done.data)));
            }
            _ => {}
        }
        self.completed += 1;
        Ok(())
    }

    /// Submits random requests to all queues until none has room or `most` are in flight.
    pub fn load(&mut self, driver: &mut Driver, random: &mut Random, most: usize) -> Result<()> {
        let features = driver.session.features();
        for queue in 0..driver.flights.len() {
            let batch = 1 + random.below(6);
            for _ in 0..batch {
                if driver.in_flight() >= most {
                    break;
                }
                let Some(request) = self.next(random, features) else { break };
                if !driver.prepare(queue, request.clone())? {
                    break;
                }
                self.submitted(&request);
            }
            driver.publish(queue)?;
        }
        Ok(())
    }

    /// Takes all completions that are there; says how many.
    pub fn reap(&mut self, driver: &mut Driver) -> Result<usize> {
        let mut count = 0;
        for queue in 0..driver.flights.len() {
            while let Some(done) = driver.try_take(queue)? {
                self.done(&done)?;
                count += 1;
            }
        }
        Ok(count)
    }

    /// Waits until nothing is in flight.
    pub fn drain(&mut self, driver: &mut Driver) -> Result<()> {
        let deadline = soon();
        for queue in 0..driver.flights.len() {
            while !driver.flights[queue].is_empty() {
                let done = driver.take(queue, deadline)?;
                self.done(&done)?;
            }
            assert!(!driver.session.rings[queue].has_used(), "more completions than requests");
        }
        Ok(())
    }

    /// Runs random requests until so many more have completed, with up to `most` in flight.
    pub fn run(
        &mut self,
        driver: &mut Driver,
        random: &mut Random,
        requests: u64,
        most: usize,
    ) -> Result<()> {
        let end = self.completed + requests;
        while self.completed < end {
            self.load(driver, random, most)?;
            if self.reap(driver)? == 0
                && let Some(queue) = driver.flights.iter().position(|f| !f.is_empty())
            {
                driver.session.rings[queue].wait_used(soon())?;
            }
        }
        self.drain(driver)
    }

    /// Compares with all of an image.
    pub fn compare(&mut self, image: &[u8]) {
        assert_eq!(image.len(), self.bytes.len());
        for (sector, got) in image.chunks_exact(SECTOR).enumerate() {
            self.check(sector, got).unwrap_or_else(|err| panic!("image: {err}"));
        }
    }
}

/// A request without its data.
fn brief(request: &Request) -> (u32, u64, usize, u32) {
    (request.kind, request.sector, request.out.len(), request.receive)
}
