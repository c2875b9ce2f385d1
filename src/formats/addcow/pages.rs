//! The bitmap in memory: a bounded cache of its pages, read and changed without locks.
//!
//! ```text
//! page number ──► set of 8 tags (one cache line) ──► frame: 512 words, 32768 sectors, 16 MiB of disk
//!       └───────► summary: two bits per page: "all 0" and "all 1" need no frame
//! ```
//!
//! A page is 4096 bytes of bitmap. At most [`FRAMES`] are in memory; those without a set bit, or
//! without a clear one, are remembered by two bits instead. So a disk of any size that is fresh, or
//! all written, costs nothing, and any other 2 MiB at most.
//!
//! * **Readers** look at the tag, the words, and the tag again. A tag carries a version, so a frame
//!   that was given to another page meanwhile, and even back, is noticed.
//! * **Writers** *pin* the frame from before their data is written until its bits are set. A pin
//!   counts first and looks at the tag then; eviction takes the tag away first and looks at the
//!   count then. So one of them sees the other.
//! * **Bits** are set by atomic or on words; the frame then notes which 512-byte blocks of it are
//!   not on disk ([`Frame::dirty`]). A dirty or pinned frame is never evicted.
//!
//! Who changes what is resident holds `changing`. Bits are never cleared here but by
//! [`Pages::forget_all`], which needs everything quiet.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Mutex, OnceLock};

/// Length of a page, in bytes.
pub const PAGE_LEN: usize = 4096;
/// How many sectors a page tells of.
pub const PAGE_SECTORS: u64 = PAGE_LEN as u64 * 8;
/// How many pages are in memory at most.
pub const FRAMES: usize = SETS * WAYS;
/// What is written out as a unit: a sector of the host's disk, in bytes.
pub const BLOCK_LEN: usize = 512;

/// A prime: a guest that goes in steps of a power of two meets all of them.
const SETS: usize = 61;
const WAYS: usize = 8;
const WORDS: usize = PAGE_LEN / 8;
/// Words of a block.
const BLOCK_WORDS: usize = BLOCK_LEN / 8;
/// Disks with more pages than this have no summary of the rest: 64 TiB.
const MAX_SUMMARISED: u64 = 4 << 20;
/// A tag is a version above, and page + 1 in these bits; 0 there means empty.
const TAG_PAGE_BITS: u32 = 40;
const TAG_PAGE: u64 = (1 << TAG_PAGE_BITS) - 1;

/// The cache; see the [module](self).
pub struct Pages {
    /// [`SETS`] times [`WAYS`].
    tags: Box<[AtomicU64]>,
    frames: Box<[Frame]>,
    /// Two bits for each page: bit 0 "all zeros", bit 1 "all ones"; neither: unknown or resident.
    summary: Box<[AtomicU64]>,
    /// Held by who changes which pages are resident.
    changing: Mutex<Changing>,
}

#[derive(Default)]
struct Changing {
    /// Where the search for a victim starts in each set.
    hand: usize,
}

#[derive(Default)]
struct Frame {
    words: OnceLock<Box<[AtomicU64]>>,
    /// Writers, and flushes, that need the page to stay.
    pins: AtomicU32,
    /// One bit for each block with bits that are not on disk.
    dirty: AtomicU32,
    /// Used since the clock's hand came by.
    used: AtomicBool,
}

/// Where a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In this frame, under this tag.
    Frame(usize, u64),
    /// Nowhere, as all of its bits have this value.
    Uniform(bool),
    /// On disk only.
    Absent,
}

/// A page that cannot be made resident now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoRoom {
    /// All frames in question hold bits that are not on disk: flush first.
    Dirty,
    /// All are pinned: try again soon.
    Pinned,
}

impl Pages {
    /// A cache that knows nothing yet, for a bitmap of so many pages.
    pub fn new(pages: u64) -> Pages {
        let summarised = if pages <= MAX_SUMMARISED { pages } else { 0 };
        let zeros = |n: usize| (0..n).map(|_| AtomicU64::new(0)).collect();
        Pages {
            tags: zeros(FRAMES),
            frames: (0..FRAMES).map(|_| Frame::default()).collect(),
            summary: zeros(summarised.div_ceil(32) as usize),
            changing: Mutex::default(),
        }
    }

    /// Where the page is now. One that is about to be evicted, or just not, may seem absent: see
    /// [`Pages::absent`].
    #[inline]
    pub fn find(&self, page: u64) -> Place {
        // A page has its frame before the summary forgets it, and no bit of it changes until then.
        match self.summarised(page) {
            Place::Absent => match self.resident(page) {
                Some((frame, tag)) => Place::Frame(frame, tag),
                // Unless it has lost its frame between the two looks.
                None => self.summarised(page),
            },
            uniform => uniform,
        }
    }

    /// How many of the pages, from the first on, are on disk only. For those who load pages: to
    /// [`Pages::find`] a page may seem to be while somebody looks whether it can be evicted.
    pub fn absent(&self, pages: std::ops::Range<u64>) -> u64 {
        let _changing = self.changing.lock().unwrap();
        pages.take_while(|page| self.find(*page) == Place::Absent).count() as u64
    }

    /// Whether a page begins with this sector that is in no frame: one that is is quicker to look at
    /// than the host's file.
    pub fn is_far_page(&self, sector: u64) -> bool {
        let page = sector / PAGE_SECTORS;
        sector.is_multiple_of(PAGE_SECTORS) && !matches!(self.find(page), Place::Frame(..))
    }

    /// The first page that is in a frame, from `page` on. One that gets a frame meanwhile may be
    /// missed; none that keeps it is.
    pub fn first_resident(&self, page: u64) -> Option<u64> {
        // Who looks whether a page can be evicted takes its tag away for a moment.
        let _changing = self.changing.lock().unwrap();
        let tags = self.tags.iter().map(|tag| tag.load(Ordering::SeqCst) & TAG_PAGE);
        tags.filter(|tag| *tag > page).map(|tag| tag - 1).min()
    }

    #[inline]
    fn resident(&self, page: u64) -> Option<(usize, u64)> {
        let first = set_of(page);
        (first..first + WAYS).find_map(|frame| {
            let tag = self.tags[frame].load(Ordering::SeqCst);
            (tag & TAG_PAGE == page + 1).then_some((frame, tag))
        })
    }

    fn summarised(&self, page: u64) -> Place {
        let Some(word) = self.summary.get((page / 32) as usize) else { return Place::Absent };
        match word.load(Ordering::Acquire) >> (page % 32 * 2) & 3 {
            1 => Place::Uniform(false),
            2 => Place::Uniform(true),
            _ => Place::Absent,
        }
    }

    fn summarise(&self, page: u64, value: Option<bool>) {
        let Some(word) = self.summary.get((page / 32) as usize) else { return };
        let shift = page % 32 * 2;
        let bits = value.map_or(0, |value| 1 + u64::from(value));
        // Only holders of `changing` write here.
        let old = word.load(Ordering::Relaxed);
        word.store(old & !(3 << shift) | bits << shift, Ordering::Release);
    }

    /// The value of the bit of `sector`, and for how many sectors (at most `max`, and not beyond
    /// the page) it stays the same; `None` if that is not in memory.
    #[inline]
    pub fn run(&self, sector: u64, max: u64) -> Option<(bool, u64)> {
        let page = sector / PAGE_SECTORS;
        let max = max.min(PAGE_SECTORS - sector % PAGE_SECTORS);
        match self.find(page) {
            Place::Uniform(value) => Some((value, max)),
            Place::Absent => None,
            Place::Frame(frame, tag) => {
                let words = self.frames[frame].words.get()?;
                let run = run_in(words, sector % PAGE_SECTORS, max);
                // The words were read before the tag is looked at again.
                fence(Ordering::Acquire);
                if self.tags[frame].load(Ordering::Relaxed) != tag {
                    return None;
                }
                let used = &self.frames[frame].used;
                if !used.load(Ordering::Relaxed) {
                    used.store(true, Ordering::Relaxed);
                }
                Some(run)
            }
        }
    }

    /// Keeps the page of `sector` in memory until [`Pages::unpin`]. A page without a set bit gets
    /// its frame here. False if the page must be loaded first, or no frame is free.
    #[inline]
    pub fn pin(&self, sector: u64) -> bool {
        let page = sector / PAGE_SECTORS;
        match self.find(page) {
            Place::Frame(frame, tag) => {
                let pins = &self.frames[frame].pins;
                pins.fetch_add(1, Ordering::SeqCst);
                if self.tags[frame].load(Ordering::SeqCst) == tag {
                    return true;
                }
                pins.fetch_sub(1, Ordering::SeqCst);
                false
            }
            Place::Uniform(value) => {
                self.install_uniform(page, value).is_ok() && self.pin_again(page)
            }
            Place::Absent => false,
        }
    }

    /// Pins a page that was resident a moment ago.
    fn pin_again(&self, page: u64) -> bool {
        let Some((frame, tag)) = self.resident(page) else { return false };
        let pins = &self.frames[frame].pins;
        pins.fetch_add(1, Ordering::SeqCst);
        if self.tags[frame].load(Ordering::SeqCst) == tag {
            return true;
        }
        pins.fetch_sub(1, Ordering::SeqCst);
        false
    }

    /// Gives up a pin.
    #[inline]
    pub fn unpin(&self, sector: u64) {
        let (frame, _) = self.pinned(sector);
        self.frames[frame].pins.fetch_sub(1, Ordering::SeqCst);
    }

    fn pinned(&self, sector: u64) -> (usize, u64) {
        loop {
            if let Some(found) = self.resident(sector / PAGE_SECTORS) {
                return found;
            }
            // Somebody who looks for a victim has just taken the tag, and is about to notice.
            std::hint::spin_loop();
        }
    }

    /// Sets the bits of a run that lies inside a page that the caller has pinned. True if any of
    /// them was clear.
    #[inline]
    pub fn set(&self, sector: u64, count: u64) -> bool {
        let (frame, _) = self.pinned(sector);
        let frame = &self.frames[frame];
        let Some(words) = frame.words.get() else { unreachable!("a resident page has words") };
        let (mut at, end) = (sector % PAGE_SECTORS, sector % PAGE_SECTORS + count);
        debug_assert!(end <= PAGE_SECTORS);
        let mut blocks = 0;
        while at < end {
            let (word, bit) = ((at / 64) as usize, at % 64);
            let n = (64 - bit).min(end - at);
            let mask = ones(n) << bit;
            if words[word].fetch_or(mask, Ordering::SeqCst) & mask != mask {
                blocks |= 1 << (word / BLOCK_WORDS);
            }
            at += n;
        }
        if blocks != 0 {
            frame.dirty.fetch_or(blocks, Ordering::SeqCst);
        }
        blocks != 0
    }

    /// Memory that pages take, in bytes.
    #[cfg(test)]
    pub fn resident_bytes(&self) -> usize {
        self.frames.iter().filter(|frame| frame.words.get().is_some()).count() * PAGE_LEN
    }

    /// How many pins are held.
    #[cfg(test)]
    pub fn pins(&self) -> u32 {
        self.frames.iter().map(|frame| frame.pins.load(Ordering::SeqCst)).sum()
    }

    /// Whether any bit of the page has yet to be written out.
    #[cfg(test)]
    pub fn is_dirty(&self, page: u64) -> bool {
        self.resident(page)
            .is_some_and(|(frame, _)| self.frames[frame].dirty.load(Ordering::SeqCst) != 0)
    }

    /// Puts a page into memory, as read from disk. The caller makes sure that nobody else loads it.
    pub fn install(&self, page: u64, bytes: &[u8; PAGE_LEN]) -> Result<(), NoRoom> {
        let first = bytes[0];
        if matches!(first, 0 | 0xff)
            && bytes.iter().all(|byte| *byte == first)
            && (page / 32) < self.summary.len() as u64
        {
            let _changing = self.changing.lock().unwrap();
            if self.resident(page).is_none() {
                self.summarise(page, Some(first == 0xff));
            }
            return Ok(());
        }
        let word = |at: usize| {
            u64::from_le_bytes(bytes[at * 8..at * 8 + 8].try_into().expect("eight bytes"))
        };
        self.install_words(page, word)
    }

    /// Notes that these pages have no set bit. The caller has found all of them
    /// [absent](Pages::absent), and makes sure that nobody else loads them.
    pub fn note_empty(&self, pages: std::ops::Range<u64>) {
        let _changing = self.changing.lock().unwrap();
        for page in pages {
            self.summarise(page, Some(false));
        }
    }

    /// Gives a page of one value a frame.
    pub fn install_uniform(&self, page: u64, value: bool) -> Result<(), NoRoom> {
        self.install_words(page, |_| if value { u64::MAX } else { 0 })
    }

    fn install_words(&self, page: u64, word: impl Fn(usize) -> u64) -> Result<(), NoRoom> {
        let mut changing = self.changing.lock().unwrap();
        if self.resident(page).is_some() {
            return Ok(());
        }
        let frame = self.make_room(&mut changing, set_of(page))?;
        let slot = &self.frames[frame];
        let words = slot.words.get_or_init(|| (0..WORDS).map(|_| AtomicU64::new(0)).collect());
        // Readers of the page that was here before must find their tag gone before they can see
        // any of these.
        fence(Ordering::SeqCst);
        for (at, to) in words.iter().enumerate() {
            to.store(word(at), Ordering::Release);
        }
        slot.used.store(true, Ordering::Relaxed);
        let version = (self.tags[frame].load(Ordering::Relaxed) >> TAG_PAGE_BITS) + 1;
        self.tags[frame].store(version << TAG_PAGE_BITS | (page + 1), Ordering::SeqCst);
        // After the tag: who finds neither looks for the page on disk. Who pins the page finds its
        // tag only now, so no bit has changed yet.
        self.summarise(page, None);
        Ok(())
    }

    /// An empty frame of the set.
    fn make_room(&self, changing: &mut Changing, first: usize) -> Result<usize, NoRoom> {
        let empty = |frame: &usize| self.tags[*frame].load(Ordering::Relaxed) & TAG_PAGE == 0;
        if let Some(frame) = (first..first + WAYS).find(empty) {
            return Ok(frame);
        }
        let mut refused = NoRoom::Pinned;
        // The first round spares what was used lately.
        for step in 0..2 * WAYS {
            changing.hand = (changing.hand + 1) % WAYS;
            let frame = first + changing.hand;
            let slot = &self.frames[frame];
            if slot.used.swap(false, Ordering::Relaxed) && step < WAYS {
                continue;
            }
            if slot.dirty.load(Ordering::SeqCst) != 0 {
                refused = NoRoom::Dirty;
                continue;
            }
            if self.evict(frame) {
                return Ok(frame);
            }
        }
        Err(refused)
    }

    /// Takes a clean page out of its frame, unless somebody needs it.
    fn evict(&self, frame: usize) -> bool {
        let slot = &self.frames[frame];
        let tag = self.tags[frame].load(Ordering::Relaxed);
        self.tags[frame].store(tag & !TAG_PAGE, Ordering::SeqCst);
        if slot.pins.load(Ordering::SeqCst) != 0 || slot.dirty.load(Ordering::SeqCst) != 0 {
            self.tags[frame].store(tag, Ordering::SeqCst);
            return false;
        }
        if let Some(words) = slot.words.get() {
            let first = words[0].load(Ordering::Acquire);
            let uniform = matches!(first, 0 | u64::MAX)
                && words.iter().all(|word| word.load(Ordering::Acquire) == first);
            // Only now that the tag is gone and no writer is left: it counts as soon as it is there.
            self.summarise((tag & TAG_PAGE) - 1, uniform.then_some(first != 0));
        }
        true
    }

    /// Takes the next dirty page from frame `from` on for writing out, pinned: its frame, its
    /// number, the dirty blocks, and a copy of the page as it is now. The blocks count as clean
    /// from here on; [`Pages::written`] or [`Pages::not_written`] must follow.
    pub fn take_dirty(&self, from: usize) -> Option<DirtyPage> {
        (from..FRAMES).find_map(|frame| {
            let slot = &self.frames[frame];
            if slot.dirty.load(Ordering::SeqCst) == 0 {
                return None;
            }
            // Pinned before it looks clean. A dirty page is not evicted, so it is still there.
            slot.pins.fetch_add(1, Ordering::SeqCst);
            let page = loop {
                // Zero while somebody who looks for a victim is about to find it dirty.
                match self.tags[frame].load(Ordering::SeqCst) & TAG_PAGE {
                    0 => std::hint::spin_loop(),
                    tag => break tag - 1,
                }
            };
            let blocks = slot.dirty.swap(0, Ordering::SeqCst);
            let words = slot.words.get().expect("a dirty page has words");
            let mut bytes = Box::new([0; PAGE_LEN]);
            for (word, to) in words.iter().zip(bytes.chunks_exact_mut(8)) {
                to.copy_from_slice(&word.load(Ordering::SeqCst).to_le_bytes());
            }
            Some(DirtyPage { frame, page, blocks, bytes })
        })
    }

    /// The page is in its file.
    pub fn written(&self, page: &DirtyPage) {
        self.frames[page.frame].pins.fetch_sub(1, Ordering::SeqCst);
    }

    /// The page is not in its file: its blocks are dirty again.
    pub fn not_written(&self, page: &DirtyPage) {
        let slot = &self.frames[page.frame];
        slot.dirty.fetch_or(page.blocks, Ordering::SeqCst);
        slot.pins.fetch_sub(1, Ordering::SeqCst);
    }

    /// Forgets all pages, which must be clean, and what is known of the rest. Nobody may use any of
    /// them meanwhile.
    pub fn forget_all(&self) {
        let _changing = self.changing.lock().unwrap();
        for frame in 0..FRAMES {
            if self.tags[frame].load(Ordering::SeqCst) & TAG_PAGE != 0 {
                self.evict(frame);
            }
        }
        for word in &self.summary {
            word.store(0, Ordering::SeqCst);
        }
    }
}

/// A page on its way to the disk.
#[derive(Debug)]
pub struct DirtyPage {
    /// Where it is in memory.
    pub frame: usize,
    /// Its number.
    pub page: u64,
    /// One bit for each block that has changed.
    pub blocks: u32,
    /// All of it, as it was when it was taken.
    pub bytes: Box<[u8; PAGE_LEN]>,
}

impl std::fmt::Debug for Pages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let resident = self.tags.iter().filter(|tag| tag.load(Ordering::Relaxed) & TAG_PAGE != 0);
        write!(f, "Pages({} resident)", resident.count())
    }
}

/// The first frame of the set that a page belongs to. Neighbours go to different sets.
fn set_of(page: u64) -> usize {
    (page % SETS as u64) as usize * WAYS
}

/// As [`Pages::run`], in a page that is not in memory.
pub fn run_in_bytes(page: &[u8; PAGE_LEN], sector: u64, max: u64) -> (bool, u64) {
    let (first, last) = (sector % PAGE_SECTORS, PAGE_SECTORS);
    let bit = |at: u64| page[(at / 8) as usize] >> (at % 8) & 1 == 1;
    let value = bit(first);
    let same = (first..last).take(max.min(last) as usize).take_while(|at| bit(*at) == value);
    (value, same.count() as u64)
}

/// A word with the lowest `n` bits set, 1 to 64.
fn ones(n: u64) -> u64 {
    u64::MAX >> (64 - n)
}

/// The run of equal bits from `bit` of the page on, at most `max` long.
#[inline]
fn run_in(words: &[AtomicU64], bit: u64, max: u64) -> (bool, u64) {
    let word_at = |at: u64| words[(at / 64) as usize].load(Ordering::Acquire);
    let value = word_at(bit) >> (bit % 64) & 1 == 1;
    let flip = if value { u64::MAX } else { 0 };
    let mut len = 0;
    while len < max {
        let at = bit + len;
        // Bits that differ from the first, from `at` on.
        let differ = (word_at(at) ^ flip) >> (at % 64);
        let left = 64 - at % 64;
        let same = u64::from(differ.trailing_zeros()).min(left);
        len += same;
        if same < left {
            break;
        }
    }
    (value, len.min(max))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::sim::Rng;
    use std::sync::Arc;

    fn page_with(bits: &[u64]) -> [u8; PAGE_LEN] {
        let mut page = [0; PAGE_LEN];
        for bit in bits {
            page[(bit / 8) as usize] |= 1 << (bit % 8);
        }
        page
    }

    /// Pins, sets, unpins.
    fn set(pages: &Pages, sector: u64, count: u64) -> bool {
        assert!(pages.pin(sector));
        let changed = pages.set(sector, count);
        pages.unpin(sector);
        changed
    }

    #[test]
    fn runs_are_found_whatever_their_place() {
        let pages = Pages::new(2);
        assert_eq!(pages.run(0, 10), None);
        pages.install(0, &page_with(&[0, 3, 63, 64, 65, 32767])).unwrap();
        pages.install(1, &[0xff; PAGE_LEN]).unwrap();
        assert_eq!(pages.run(0, 100), Some((true, 1)));
        assert_eq!(pages.run(1, 100), Some((false, 2)));
        assert_eq!(pages.run(4, 100), Some((false, 59)));
        assert_eq!(pages.run(63, 100), Some((true, 3)));
        assert_eq!(pages.run(66, u64::MAX), Some((false, 32701)));
        assert_eq!(pages.run(66, 5), Some((false, 5)));
        // Runs end with the page.
        assert_eq!(pages.run(32767, 100), Some((true, 1)));
        assert_eq!(pages.run(32768, u64::MAX), Some((true, 32768)));
        assert_eq!(pages.find(1), Place::Uniform(true));
    }

    #[test]
    fn random_bits_agree_with_a_list() {
        let seed = 7;
        let mut rng = Rng::new(seed);
        let pages = Pages::new(1);
        pages.install(0, &[0; PAGE_LEN]).unwrap();
        let mut model = vec![false; PAGE_SECTORS as usize];
        for _ in 0..500 {
            let at = rng.below(PAGE_SECTORS);
            let count = 1 + rng.below(300.min(PAGE_SECTORS - at));
            let part = &mut model[at as usize..(at + count) as usize];
            assert_eq!(set(&pages, at, count), part.iter().any(|bit| !bit), "seed {seed}");
            part.fill(true);
            let at = rng.below(PAGE_SECTORS);
            let max = 1 + rng.below(2000);
            let rest = &model[at as usize..];
            let same = rest.iter().take_while(|bit| **bit == rest[0]).count() as u64;
            assert_eq!(pages.run(at, max), Some((rest[0], same.min(max))), "seed {seed}");
        }
    }

    #[test]
    fn dirty_blocks_are_taken_once_and_can_be_given_back() {
        let pages = Pages::new(8);
        pages.install(5, &page_with(&[9])).unwrap();
        let sector = 5 * PAGE_SECTORS;
        assert!(!set(&pages, sector + 9, 1));
        assert!(pages.take_dirty(0).is_none());
        assert!(set(&pages, sector + 4095, 2));
        let taken = pages.take_dirty(0).unwrap();
        assert_eq!((taken.page, taken.blocks), (5, 0b11));
        assert_eq!(taken.bytes[..], page_with(&[9, 4095, 4096])[..]);
        // What is set meanwhile is not in the copy, and is dirty again.
        set(&pages, sector + 1, 1);
        pages.not_written(&taken);
        let again = pages.take_dirty(0).unwrap();
        assert_eq!((again.blocks, again.bytes[0]), (0b11, 2));
        pages.written(&again);
        assert!(!pages.is_dirty(5));
    }

    #[test]
    fn neither_dirty_nor_pinned_pages_are_evicted() {
        let pages = Pages::new(10_000);
        // All of one set.
        let page = |i: u64| i * SETS as u64;
        for i in 0..WAYS as u64 {
            pages.install(page(i), &page_with(&[i])).unwrap();
        }
        for i in 0..WAYS as u64 {
            assert!(pages.pin(page(i) * PAGE_SECTORS));
        }
        assert_eq!(pages.install(page(20), &page_with(&[1])), Err(NoRoom::Pinned));
        pages.set(page(3) * PAGE_SECTORS + 100, 1);
        for i in 0..WAYS as u64 {
            pages.unpin(page(i) * PAGE_SECTORS);
        }
        for i in 20..60 {
            pages.install(page(i), &page_with(&[1])).unwrap();
        }
        assert_eq!(pages.run(page(3) * PAGE_SECTORS + 100, 5), Some((true, 1)));
        assert_eq!(pages.find(page(2)), Place::Absent);
        for i in 60..60 + WAYS as u64 {
            pages.install(page(i), &page_with(&[1])).unwrap();
            set(&pages, page(i) * PAGE_SECTORS + 9, 1);
            if i == 60 + WAYS as u64 - 2 {
                break;
            }
        }
        assert_eq!(pages.install(page(99), &page_with(&[1])), Err(NoRoom::Dirty));
    }

    #[test]
    fn evicted_pages_of_one_value_are_remembered() {
        let pages = Pages::new(10_000);
        pages.install(0, &page_with(&[0])).unwrap();
        set(&pages, 0, PAGE_SECTORS);
        let taken = pages.take_dirty(0).unwrap();
        pages.written(&taken);
        for i in 1..20 {
            pages.install(i * SETS as u64, &page_with(&[1])).unwrap();
        }
        assert_eq!(pages.find(0), Place::Uniform(true));
        // And get a frame again when they are written to.
        assert!(!set(&pages, 0, 1));
        assert!(matches!(pages.find(0), Place::Frame(..)));
    }

    #[test]
    fn threads_that_evict_each_others_pages_lose_no_bit() {
        // More pages of one set than frames: every pin may meet an eviction.
        const PAGES: u64 = 24;
        let pages = Arc::new(Pages::new(PAGES * SETS as u64));
        // Stands for the file.
        let disk = Arc::new(Mutex::new(vec![[0u8; PAGE_LEN]; PAGES as usize]));
        let loading = Arc::new(Mutex::new(()));
        let threads: Vec<_> = (0..4u64)
            .map(|me| {
                let (pages, disk, loading) =
                    (Arc::clone(&pages), Arc::clone(&disk), Arc::clone(&loading));
                std::thread::spawn(move || {
                    let mut rng = Rng::new(me);
                    for i in 0..2000u64 {
                        let n = rng.below(PAGES);
                        let sector = n * SETS as u64 * PAGE_SECTORS + me * 8000 + i;
                        while !pages.pin(sector) {
                            let _one = loading.lock().unwrap();
                            let page = n * SETS as u64;
                            let installed = match pages.find(page) {
                                Place::Frame(..) => Ok(()),
                                Place::Uniform(value) => pages.install_uniform(page, value),
                                Place::Absent => {
                                    let bytes = disk.lock().unwrap()[n as usize];
                                    pages.install(page, &bytes)
                                }
                            };
                            if installed == Err(NoRoom::Dirty) {
                                let mut from = 0;
                                while let Some(taken) = pages.take_dirty(from) {
                                    from = taken.frame + 1;
                                    let at = (taken.page / SETS as u64) as usize;
                                    disk.lock().unwrap()[at] = *taken.bytes;
                                    pages.written(&taken);
                                }
                            }
                        }
                        assert!(pages.set(sector, 1), "set twice");
                        pages.unpin(sector);
                        // What is in memory is right; what is not is on disk.
                        assert_ne!(pages.run(sector, 1), Some((false, 1)), "bit lost");
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        let mut from = 0;
        while let Some(taken) = pages.take_dirty(from) {
            from = taken.frame + 1;
            disk.lock().unwrap()[(taken.page / SETS as u64) as usize] = *taken.bytes;
        }
        let bits: u32 = disk.lock().unwrap().iter().flatten().map(|byte| byte.count_ones()).sum();
        assert_eq!(bits, 4 * 2000);
    }

    #[test]
    fn who_looks_for_a_victim_hides_no_page_from_those_who_load() {
        let pages = Arc::new(Pages::new(10_000));
        let page = |i: usize| (i * SETS) as u64;
        for i in 0..WAYS {
            pages.note_empty(page(i)..page(i) + 1);
            assert!(pages.pin(page(i) * PAGE_SECTORS));
        }
        let stop = Arc::new(AtomicBool::new(false));
        let (theirs, until) = (Arc::clone(&pages), Arc::clone(&stop));
        let other = std::thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                assert_eq!(theirs.install(page(WAYS), &page_with(&[7])), Err(NoRoom::Pinned));
            }
        });
        for i in 0..200_000 {
            let page = page(i % WAYS);
            if pages.absent(page..page + 1) > 0 {
                pages.note_empty(page..page + 1);
            }
        }
        stop.store(true, Ordering::Relaxed);
        other.join().unwrap();
        for i in 0..WAYS {
            pages.set(page(i) * PAGE_SECTORS, 1);
            assert_eq!(pages.run(page(i) * PAGE_SECTORS, 1), Some((true, 1)));
        }
    }
}
