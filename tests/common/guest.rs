//! A guest that writes at random while its disk's process is killed, and knows what it must find.
//!
//! What is expected is kept for each sector: a sector is 64 times one word, which tells who wrote
//! it. The guest is our own front-end, which keeps its in-flight area and reconnects as QEMU does.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use vublk::frontend::{Request, Session};

use super::Random;

/// Length of a sector, in bytes.
pub const SECTOR: u64 = 512;
/// Requests in flight in each queue.
const DEPTH: usize = 12;

/// The bytes of a sector.
pub fn sector(word: u64) -> Vec<u8> {
    word.to_le_bytes().repeat(64)
}

/// The words of whole sectors; a torn one is a failure.
pub fn words(bytes: &[u8]) -> Vec<u64> {
    bytes
        .chunks(SECTOR as usize)
        .map(|sector| whole(sector).unwrap_or_else(|err| panic!("{err}")))
        .collect()
}

/// The word that a sector is full of; else what is in it.
fn whole(sector: &[u8]) -> Result<u64, String> {
    let all: Vec<u64> = parts(sector).collect();
    match all.iter().position(|word| *word != all[0]) {
        None => Ok(all[0]),
        Some(at) => {
            Err(format!("a torn sector: {:x}, and from word {at} on {:x?}", all[0], &all[at..]))
        }
    }
}

fn parts(sector: &[u8]) -> impl Iterator<Item = u64> {
    sector.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap()))
}

/// A run of sectors.
#[derive(Clone, Copy, Debug)]
struct Run {
    start: u64,
    len: u64,
}

impl Run {
    fn sectors(self) -> std::ops::Range<usize> {
        self.start as usize..(self.start + self.len) as usize
    }
}

/// A request in flight and what it does.
#[derive(Debug)]
enum Op {
    Write(Run, u64),
    Zero(Run),
    /// Afterwards the sectors are zero or what they were: a read tells.
    Discard(Run),
    Read(Run),
    /// With the number of requests completed when it was submitted.
    Flush(u64),
}

/// A guest that writes, and what it knows of its disk.
pub struct Guest {
    /// Its end of the wire.
    pub disk: Session,
    /// What it decides by.
    pub random: Random,
    /// For each sector all that it may be after a new start, oldest first, each with the number
    /// of requests completed by then (the largest number while in flight). The last completed one
    /// is what the guest must read.
    sectors: Vec<Vec<(u64, u64)>>,
    busy: Vec<bool>,
    ops: Vec<HashMap<u16, Op>>,
    /// Requests completed.
    pub completed: u64,
    next_word: u64,
    /// Sectors that are read and written together.
    unit: u64,
}

const IN_FLIGHT: u64 = u64::MAX;

impl Guest {
    /// A guest whose disk holds these words, one a sector.
    pub fn new(disk: Session, random: Random, disk_words: impl Iterator<Item = u64>) -> Guest {
        let sectors: Vec<_> = disk_words.map(|word| vec![(word, 0)]).collect();
        let queues = disk.options.queues;
        Guest {
            disk,
            random,
            busy: vec![false; sectors.len()],
            sectors,
            ops: (0..queues).map(|_| HashMap::new()).collect(),
            completed: 0,
            next_word: 1,
            unit: 1,
        }
    }

    /// On a disk with blocks of so many sectors.
    pub fn unit(mut self, sectors: u64) -> Guest {
        self.unit = sectors;
        self
    }

    /// The disk has another size now; what is new of it is zeros. Nothing beyond the end may be in
    /// flight.
    pub fn resize(&mut self, sectors: u64) {
        self.sectors.resize(sectors as usize, vec![(0, 0)]);
        self.busy.resize(sectors as usize, false);
    }

    /// Somebody else wrote `word` to all sectors of a range of bytes.
    pub fn replace_range(&mut self, offset: u64, len: u64, word: u64) {
        let run = Run { start: offset / SECTOR, len: len / SECTOR };
        self.sectors[run.sectors()].fill(vec![(word, self.completed)]);
    }

    /// What must be read now.
    pub fn now(&self, at: usize) -> u64 {
        self.sectors[at].iter().rfind(|(_, done)| *done != IN_FLIGHT).unwrap().0
    }

    /// A run that no request in flight touches; mostly small, at places that often share clusters.
    fn free_run(&mut self) -> Option<Run> {
        let scale = 1 + self.random.below(8);
        let len = 1 + self.random.below(1 << scale);
        let start = self.random.below(self.sectors.len() as u64 / self.unit - len + 1);
        let run = Run { start: start * self.unit, len: len * self.unit };
        (!self.busy[run.sectors()].contains(&true)).then_some(run)
    }

    pub fn submit(&mut self, queue: usize) {
        if self.random.below(150) == 0 {
            return self.send(queue, &Request::flush(), Op::Flush(self.completed));
        }
        let Some(run) = self.free_run() else { return };
        let bytes = (run.start * SECTOR, run.len * SECTOR);
        let (op, request) = match self.random.below(12) {
            0 => (Op::Discard(run), Request::discard(&[bytes])),
            1 => (Op::Zero(run), Request::write_zeroes(&[bytes], self.random.below(2) == 0)),
            2 => (Op::Read(run), Request::read(bytes.0, bytes.1 as u32)),
            _ => {
                self.next_word += 1;
                let data = sector(self.next_word).repeat(run.len as usize);
                (Op::Write(run, self.next_word), Request::write(bytes.0, data))
            }
        };
        self.busy[run.sectors()].fill(true);
        let word = match op {
            Op::Write(_, word) => Some(word),
            Op::Zero(_) | Op::Discard(_) => Some(0),
            _ => None,
        };
        if let Some(word) = word {
            self.sectors[run.sectors()].iter_mut().for_each(|s| s.push((word, IN_FLIGHT)));
        }
        self.send(queue, &request, op);
    }

    fn send(&mut self, queue: usize, request: &Request, op: Op) {
        let head = self.disk.submit(queue, request).unwrap();
        self.ops[queue].insert(head, op);
    }

    /// Takes what is completed; whether there was anything.
    pub fn poll(&mut self, queue: usize) -> bool {
        let Some(completion) = self.disk.try_wait(queue).unwrap() else { return false };
        let op = self.ops[queue].remove(&completion.head).unwrap();
        let data = completion.ok().unwrap_or_else(|err| panic!("{op:?}: {err}"));
        self.completed += 1;
        let done = self.completed;
        match op {
            Op::Write(run, _) | Op::Zero(run) => {
                self.sectors[run.sectors()].iter_mut().for_each(|s| s.last_mut().unwrap().1 = done);
                self.busy[run.sectors()].fill(false);
            }
            Op::Discard(run) => {
                let request = Request::read(run.start * SECTOR, (run.len * SECTOR) as u32);
                self.send(queue, &request, Op::Read(run));
            }
            Op::Read(run) => {
                for (at, word) in run.sectors().zip(words(&data)) {
                    let last = self.sectors[at].last().copied().unwrap();
                    if last == (0, IN_FLIGHT) {
                        // After a discard.
                        assert!(word == 0 || word == self.now(at), "sector {at}: {word:x}");
                        self.sectors[at].last_mut().unwrap().1 = done;
                        self.sectors[at].push((word, done));
                    } else {
                        assert_eq!(word, self.now(at), "sector {at}");
                    }
                }
                self.busy[run.sectors()].fill(false);
            }
            Op::Flush(before) => {
                for sector in &mut self.sectors {
                    if let Some(kept) = sector.iter().rposition(|(_, done)| *done <= before) {
                        sector.drain(..kept);
                    }
                }
            }
        }
        true
    }

    /// Writes for a while, then leaves its requests in flight.
    pub fn work(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            for queue in 0..self.ops.len() {
                while self.ops[queue].len() < DEPTH {
                    let before = self.ops[queue].len();
                    self.submit(queue);
                    if self.ops[queue].len() == before {
                        break;
                    }
                }
                while self.poll(queue) {}
            }
            std::thread::yield_now();
        }
    }

    /// Waits for all that is in flight.
    pub fn settle(&mut self) {
        let end = Instant::now() + Duration::from_secs(60);
        while self.ops.iter().any(|ops| !ops.is_empty()) {
            assert!(Instant::now() < end, "these never end: {:?}", self.ops);
            for queue in 0..self.ops.len() {
                while self.poll(queue) {}
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// The whole disk.
    fn read_all(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        let mut offset = 0;
        let size = self.sectors.len() as u64 * SECTOR;
        while offset < size {
            let len = (size - offset).min(1 << 20);
            all.extend(self.disk.read(0, offset, len as u32).unwrap());
            offset += len;
        }
        all
    }

    /// Demands that every completed write is there. Nothing may be in flight.
    pub fn verify(&mut self) {
        assert!(self.ops.iter().all(HashMap::is_empty), "in flight: {:?}", self.ops);
        for (at, word) in words(&self.read_all()).into_iter().enumerate() {
            assert_eq!(word, self.now(at), "sector {at}: not what was written last");
        }
    }

    /// Whether a disk that holds `word` here may be what a new start finds.
    pub fn is_possible(&self, at: usize, word: u64) -> bool {
        self.sectors[at].iter().any(|(other, _)| *other == word)
    }

    /// Another guest on the same disk: demands that what was flushed is there, and starts from what
    /// it finds.
    ///
    /// A process that is killed may leave a sector torn where a write was in flight: the kernel stops
    /// copying where the next page of the guest's memory is not mapped yet, and in the buffers of this
    /// guest, where data follows a header, that is in the middle of a sector. It is written anew.
    pub fn replace(&mut self, disk: Session) {
        self.disk = disk;
        self.ops.iter_mut().for_each(HashMap::clear);
        self.busy.fill(false);
        let mut torn = Vec::new();
        for (at, sector) in self.read_all().chunks(SECTOR as usize).enumerate() {
            match whole(sector) {
                Ok(word) => {
                    let possible = self.is_possible(at, word);
                    let known = &mut self.sectors[at];
                    assert!(possible, "sector {at}: {word:x} instead of one of {known:x?}");
                    *known = vec![(word, self.completed)];
                }
                Err(err) => {
                    let known = &self.sectors[at];
                    let in_flight = known.iter().any(|(_, done)| *done == IN_FLIGHT);
                    let possible = parts(sector).all(|word| self.is_possible(at, word));
                    assert!(
                        in_flight && possible,
                        "sector {at}: {err}, instead of one of {known:x?}"
                    );
                    eprintln!("sector {at}, with a write in flight: {err}");
                    torn.push(at as u64 / self.unit * self.unit);
                }
            }
        }
        for start in torn {
            self.next_word += 1;
            let run = Run { start, len: self.unit };
            let data = sector(self.next_word).repeat(self.unit as usize);
            self.disk.write(0, start * SECTOR, &data).unwrap();
            self.disk.flush(0).unwrap();
            self.sectors[run.sectors()].fill(vec![(self.next_word, self.completed)]);
        }
    }
}
