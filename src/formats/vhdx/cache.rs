//! Pages of the BAT and of sector bitmaps in memory: bounded, and read without a lock.
//!
//! A page is 512 words of 8 bytes. The cache is set-associative: the place of a page in the file
//! decides the set, and any of the set's frames may hold it.
//!
//! Readers take no lock. A frame's tag says which page it holds; a reader looks at the tag, reads
//! words, and looks at the tag again. Whoever puts another page into the frame takes the tag away
//! first and gives it the new one last, so a reader that saw the same tag twice read words of that
//! page. Single words change in place, as whole words.
//!
//! Invariants:
//! * A frame that is *held* (its page differs from the file's) is never given to another page.
//! * Frames change owner only with their set's lock held, and pages are loaded one reader at a
//!   time, so that what was read from the file is still what the file has when it comes in.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Mutex, OnceLock};

use super::layout::{ENTRIES_PER_PAGE, PAGE};
use crate::block::{RangeGuard, RangeLock};
use crate::units::ByteRange;

/// Words of a page.
pub const WORDS: usize = ENTRIES_PER_PAGE as usize;
/// Frames of a set.
const WAYS: usize = 8;

/// Bits of a tag that count.
const VERSION_BITS: u32 = 24;

/// A page's words.
pub type Page = [u64; WORDS];

/// The upper part of the tag of the page at this offset of the file.
fn name_of(page: u64) -> u64 {
    page / PAGE + 1
}

/// The frame of a page.
struct Frame {
    /// The page's number plus one, 0 if there is none; below that how often the frame changed
    /// owner, so that a page that left and came back is not taken for one that stayed.
    tag: AtomicU64,
    /// Whether the page differs from the file's and must stay.
    held: AtomicBool,
    words: [AtomicU64; WORDS],
}

#[derive(Default)]
struct Set {
    /// Made when first needed.
    frames: [OnceLock<Box<Frame>>; WAYS],
    /// The frame to look at first for a page that comes in.
    hand: Mutex<usize>,
}

/// Pages by their offset in the file.
pub struct PageCache {
    sets: Box<[Set]>,
    /// Of pages that are being loaded, by their offset.
    loads: RangeLock,
}

/// Access to the words of a page that cannot leave meanwhile.
pub struct Words<'a> {
    frame: &'a Frame,
}

impl Words<'_> {
    /// Reads a word.
    pub fn get(&self, word: usize) -> u64 {
        self.frame.words[word].load(Ordering::Relaxed)
    }

    /// Changes a word; readers see the old or the new one.
    pub fn set(&self, word: usize, value: u64) {
        // Release: who sees the new word may use what was prepared for it.
        self.frame.words[word].store(value, Ordering::Release);
    }

    /// Says whether the page must stay.
    pub fn hold(&self, held: bool) {
        self.frame.held.store(held, Ordering::Relaxed);
    }

    /// A copy of the page.
    pub fn copy(&self) -> Box<Page> {
        Box::new(std::array::from_fn(|word| self.get(word)))
    }
}

impl PageCache {
    /// A cache of no more than `bytes`, which are taken when they are needed.
    pub fn new(bytes: u64) -> PageCache {
        let pages = bytes.div_ceil(PAGE).max(1);
        let sets = pages.div_ceil(WAYS as u64).next_power_of_two();
        // Rounded up, a set more than asked for; rounded down, half of it.
        let sets = if sets * WAYS as u64 * PAGE > bytes && sets > 1 { sets / 2 } else { sets };
        PageCache { sets: (0..sets).map(|_| Set::default()).collect(), loads: RangeLock::new() }
    }

    /// How many pages it can hold.
    pub fn capacity(&self) -> usize {
        self.sets.len() * WAYS
    }

    fn set(&self, page: u64) -> &Set {
        // Neighbours go to neighbouring sets; bits above are mixed in for sparse access.
        let number = page / PAGE;
        let index = number ^ (number >> 16);
        &self.sets[index as usize & (self.sets.len() - 1)]
    }

    /// Reads a word of the page at `page` of the file, if it is here.
    #[inline]
    pub fn word(&self, page: u64, word: usize) -> Option<u64> {
        self.read(page, |words| words.get(word))
    }

    /// Reads words of a page, if it is here. `f` may be called with words of another page, whose
    /// result is not used.
    #[inline]
    pub fn read<T>(&self, page: u64, f: impl Fn(&Words<'_>) -> T) -> Option<T> {
        for frame in &self.set(page).frames {
            let Some(frame) = frame.get() else { continue };
            let tag = frame.tag.load(Ordering::Acquire);
            if tag >> VERSION_BITS != name_of(page) {
                continue;
            }
            let result = f(&Words { frame });
            fence(Ordering::Acquire);
            if frame.tag.load(Ordering::Relaxed) == tag {
                return Some(result);
            }
        }
        None
    }

    /// Gives access to a page, which stays as long as `f` runs. `None` if it is not here.
    pub fn with<T>(&self, page: u64, f: impl FnOnce(&Words<'_>) -> T) -> Option<T> {
        let set = self.set(page);
        let _stay = set.hand.lock().unwrap();
        let is_it = |f: &Frame| f.tag.load(Ordering::Relaxed) >> VERSION_BITS == name_of(page);
        let frame = set.frames.iter().filter_map(OnceLock::get).find(|f| is_it(f))?;
        Some(f(&Words { frame }))
    }

    /// Makes the caller the one who loads the page at `page`. What it reads from the file while
    /// holding the guard is current.
    pub async fn loading(&self, page: u64) -> RangeGuard<'_> {
        self.loads.exclusive(ByteRange { offset: page, len: PAGE }).await
    }

    /// Forgets all pages. Nobody may be reading, and none may be held.
    pub fn clear(&self) {
        for set in &self.sets {
            let _alone = set.hand.lock().unwrap();
            for frame in set.frames.iter().filter_map(OnceLock::get) {
                let version = frame.tag.load(Ordering::Relaxed) & ((1 << VERSION_BITS) - 1);
                frame.tag.store(version, Ordering::Release);
            }
        }
    }

    /// Brings a page in, with the guard of [`PageCache::loading`] held. False if every frame that
    /// it could have is held.
    pub fn insert(&self, page: u64, words: &Page) -> bool {
        let set = self.set(page);
        let mut hand = set.hand.lock().unwrap();
        let order = (0..WAYS).map(|i| (*hand + i) % WAYS);
        let free = |way: &usize| {
            set.frames[*way].get().is_none_or(|frame| !frame.held.load(Ordering::Relaxed))
        };
        let Some(way) = order.clone().find(|way| set.frames[*way].get().is_none()).or_else(|| {
            let mut order = order;
            order.find(free)
        }) else {
            return false;
        };
        *hand = (way + 1) % WAYS;
        let frame = set.frames[way].get_or_init(|| {
            Box::new(Frame {
                tag: AtomicU64::new(0),
                held: AtomicBool::new(false),
                words: std::array::from_fn(|_| AtomicU64::new(0)),
            })
        });
        let version = frame.tag.load(Ordering::Relaxed).wrapping_add(1) & ((1 << VERSION_BITS) - 1);
        frame.tag.store(version, Ordering::Relaxed);
        // No reader that sees a new word may still find the old tag afterwards.
        fence(Ordering::Release);
        for (slot, word) in frame.words.iter().zip(words) {
            slot.store(*word, Ordering::Relaxed);
        }
        frame.tag.store(name_of(page) << VERSION_BITS | version, Ordering::Release);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    fn page_of(number: u64) -> Box<Page> {
        Box::new(std::array::from_fn(|word| number * 1000 + word as u64))
    }

    #[test]
    fn pages_come_and_go() {
        let cache = PageCache::new(32 * PAGE);
        assert_eq!(cache.capacity(), 32);
        for number in 0..100 {
            assert!(cache.insert(number * PAGE, &page_of(number)));
            assert_eq!(cache.word(number * PAGE, 7), Some(number * 1000 + 7));
        }
        let here = (0..100).filter(|number| cache.word(number * PAGE, 0).is_some()).count();
        assert_eq!(here, 32);
    }

    #[test]
    fn it_is_no_larger_than_allowed() {
        assert_eq!(PageCache::new(1).capacity(), WAYS);
        assert_eq!(PageCache::new(8 << 20).capacity(), 2048);
        assert_eq!(PageCache::new(100 * PAGE).capacity(), 64);
    }

    #[test]
    fn all_is_forgotten_at_once() {
        let cache = PageCache::new(32 * PAGE);
        (0..32).for_each(|number| assert!(cache.insert(number * PAGE, &page_of(number))));
        cache.clear();
        assert!((0..32).all(|number| cache.word(number * PAGE, 0).is_none()));
        assert!(cache.insert(PAGE, &page_of(7)));
        assert_eq!(cache.word(PAGE, 1), Some(7001));
    }

    #[test]
    fn held_pages_stay() {
        let cache = PageCache::new(WAYS as u64 * PAGE);
        for number in 0..WAYS as u64 {
            cache.insert(number * PAGE, &page_of(number));
            cache.with(number * PAGE, |words| words.hold(true)).unwrap();
        }
        assert!(!cache.insert(99 * PAGE, &page_of(99)));
        cache.with(3 * PAGE, |words| words.hold(false)).unwrap();
        assert!(cache.insert(99 * PAGE, &page_of(99)));
        assert_eq!(cache.word(3 * PAGE, 0), None);
        assert_eq!(cache.word(2 * PAGE, 0), Some(2000));
    }

    #[test]
    fn readers_never_see_words_of_another_page() {
        let cache = Arc::new(PageCache::new(WAYS as u64 * PAGE));
        let done = Arc::new(AtomicBool::new(false));
        let reader = {
            let (cache, done) = (Arc::clone(&cache), Arc::clone(&done));
            std::thread::spawn(move || {
                let mut hits = 0u64;
                let mut number = 0;
                while !done.load(Ordering::Relaxed) {
                    number = (number + 1) % 20;
                    let word = (number * 7 % 512) as usize;
                    if let Some(value) = cache.word(number * PAGE, word) {
                        assert_eq!(value, number * 1000 + word as u64);
                        hits += 1;
                    }
                }
                hits
            })
        };
        for round in 0..20_000 {
            cache.insert(round % 20 * PAGE, &page_of(round % 20));
        }
        done.store(true, Ordering::Relaxed);
        reader.join().unwrap();
    }
}
