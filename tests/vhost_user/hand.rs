//! Chains laid by hand, for tests that put something wrong into them.

use std::time::{Duration, Instant};

use vublk::frontend::request::{STATUS_OK, STATUS_UNTOUCHED, header, kind};
use vublk::frontend::ring::{DESC_NEXT, DESC_WRITE};
use vublk::frontend::{Descriptor, Personality, Session, SessionOptions, UsedElement};

use crate::common::{Backend, soon};

/// A page of guest memory for each part of one request.
#[derive(Clone, Copy, Debug)]
pub struct Hand {
    /// Header.
    pub header: u64,
    /// Data, two pages.
    pub data: u64,
    /// Status.
    pub status: u64,
    /// Indirect table, one page.
    pub table: u64,
}

impl Hand {
    /// Takes pages of the session's memory.
    pub fn new(session: &mut Session) -> Hand {
        let mut pages = |n: u64| session.arena.alloc_pages(n * 4096).unwrap();
        Hand { header: pages(1), data: pages(2), status: pages(1), table: pages(1) }
    }

    /// Writes header and an untouched status.
    pub fn fill(&self, session: &Session, request: u32, sector: u64) {
        session.memory.write(self.header, &header(request, sector)).unwrap();
        session.memory.write(self.status, &[STATUS_UNTOUCHED]).unwrap();
    }

    /// The status byte.
    pub fn status_byte(&self, session: &Session) -> u8 {
        session.memory.read_vec(self.status, 1).unwrap()[0]
    }

    /// Descriptors of a read of one page, at the indices 0, 1, 2 of a table.
    pub fn read_chain(&self) -> [Descriptor; 3] {
        [
            Descriptor { addr: self.header, len: 16, flags: DESC_NEXT, next: 1 },
            Descriptor { addr: self.data, len: 4096, flags: DESC_NEXT | DESC_WRITE, next: 2 },
            Descriptor { addr: self.status, len: 1, flags: DESC_WRITE, next: 0 },
        ]
    }
}

/// Writes descriptors to the front of queue 0's table.
pub fn lay(session: &Session, chain: &[Descriptor]) {
    for (index, descriptor) in chain.iter().enumerate() {
        session.rings[0].write_descriptor(index as u16, *descriptor);
    }
}

/// Shows heads to the device.
pub fn push(session: &mut Session, heads: &[u16]) {
    let ring = &mut session.rings[0];
    heads.iter().for_each(|head| ring.push(*head));
    ring.publish();
    ring.kick().unwrap();
}

/// Shows one head and waits for its used element.
pub fn run(session: &mut Session, head: u16) -> UsedElement {
    push(session, &[head]);
    session.rings[0].wait_used(soon()).unwrap();
    session.rings[0].take_used().unwrap()
}

/// Reads by hand on queue 0 and demands success: the queue is alive.
pub fn assert_serves(session: &mut Session, hand: &Hand) {
    hand.fill(session, kind::IN, 0);
    lay(session, &hand.read_chain());
    let used = run(session, 0);
    assert_eq!((used.id, used.len), (0, 4097));
    assert_eq!(hand.status_byte(session), STATUS_OK);
}

/// Nothing more comes on queue 0 for a while.
pub fn assert_silent(session: &mut Session) {
    let before = session.rings[0].used_index();
    let end = Instant::now() + Duration::from_millis(30);
    while Instant::now() < end {
        assert_eq!(session.rings[0].used_index(), before, "the used index moves");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A session of two queues with pages for a request by hand on queue 0.
pub fn open(backend: &Backend) -> (Session, Hand) {
    let mut session = backend.open(SessionOptions::new(Personality::Qemu).queues(2));
    let hand = Hand::new(&mut session);
    (session, hand)
}
