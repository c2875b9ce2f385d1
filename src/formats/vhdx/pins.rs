//! Who still uses a place in the file: a count that costs a request next to nothing.
//!
//! A block that was freed may be given to another part of the disk only when no request is under
//! way to its old place. Requests are not tracked one by one: each holds a *pin* while it lasts,
//! and pins belong to one of two generations.
//!
//! ```text
//! request:   pin (current generation) → look up the mapping → I/O → drop the pin
//! free:      change the mapping → begin(): the other generation becomes the current one
//!            → is_over(): all pins of the old generation are gone? then nobody uses the place
//! ```
//!
//! A pin is a clone of an `Arc` that belongs to the thread's slot, so threads do not share a cache
//! line.
//!
//! Why this is right: a pin counts from before the look-up, and both sides have a full barrier
//! between their store and their load. So either the request sees the new mapping, or whoever
//! frees sees its pin. A request that read the generation just before it changed, and pinned just
//! after, looks once more and tries again.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering, fence};

/// Slots for threads; threads beyond these share.
const SLOTS: usize = 16;

/// What pins share with their slot. Aligned, so that each counter has a cache line to itself.
#[derive(Debug)]
#[repr(align(128))]
pub struct Token;

/// Counts who uses places in the file.
#[derive(Debug)]
pub struct Pins {
    /// Even or odd: which half of the slots new pins come from.
    generation: AtomicUsize,
    slots: [[Arc<Token>; 2]; SLOTS],
}

static NEXT_SLOT: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static SLOT: Cell<usize> = Cell::new(NEXT_SLOT.fetch_add(1, Ordering::Relaxed) % SLOTS);
}

impl Pins {
    /// Nobody uses anything.
    pub fn new() -> Pins {
        let slots = std::array::from_fn(|_| std::array::from_fn(|_| Arc::new(Token)));
        Pins { generation: AtomicUsize::new(0), slots }
    }

    /// Keeps every place that the mapping leads to from now on, until the pin is dropped.
    #[inline]
    pub fn pin(&self) -> Arc<Token> {
        let slot = &self.slots[SLOT.get()];
        loop {
            let generation = self.generation.load(Ordering::Relaxed);
            let pin = Arc::clone(&slot[generation & 1]);
            fence(Ordering::SeqCst);
            if self.generation.load(Ordering::Relaxed) == generation {
                return pin;
            }
        }
    }

    /// Begins to wait for all who pinned before now, after mappings were changed; returns what to
    /// ask [`Pins::is_over`] for. The wait that was begun before must be over.
    pub fn begin(&self) -> usize {
        fence(Ordering::SeqCst);
        let generation = self.generation.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        generation
    }

    /// Whether nobody uses what was freed before `begin` any more.
    pub fn is_over(&self, generation: usize) -> bool {
        fence(Ordering::SeqCst);
        let over = self.slots.iter().all(|slot| Arc::strong_count(&slot[generation & 1]) == 1);
        fence(Ordering::SeqCst);
        over
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU64};

    #[test]
    fn earlier_pins_are_waited_for_and_later_ones_are_not() {
        let pins = Pins::new();
        let early = pins.pin();
        let wait = pins.begin();
        let late = pins.pin();
        assert!(!pins.is_over(wait));
        drop(early);
        assert!(pins.is_over(wait));
        let wait = pins.begin();
        assert!(!pins.is_over(wait));
        drop(late);
        assert!(pins.is_over(wait));
    }

    #[test]
    fn places_are_never_taken_from_under_a_user() {
        // `mapping` leads to the place in use; a place that was freed is marked, and nobody who
        // got there by the mapping may find the mark.
        let pins = Pins::new();
        let mapping = AtomicU64::new(0);
        let places: Vec<AtomicBool> = (0..2).map(|_| AtomicBool::new(false)).collect();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        let _pin = pins.pin();
                        let place = mapping.load(Ordering::Acquire) as usize;
                        for _ in 0..20 {
                            assert!(!places[place].load(Ordering::Relaxed), "used after free");
                        }
                    }
                });
            }
            for round in 0..20_000u64 {
                let old = (round % 2) as usize;
                mapping.store(1 - old as u64, Ordering::Release);
                let wait = pins.begin();
                while !pins.is_over(wait) {
                    std::thread::yield_now();
                }
                places[old].store(true, Ordering::Relaxed);
                places[old].store(false, Ordering::Release);
            }
            done.store(true, Ordering::Relaxed);
        });
    }
}
