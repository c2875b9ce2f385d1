//! Looking up where a range of the disk lies, and bringing in the pages that say so.

use super::Vhdx;
use super::bat::{self, CHECKED, PARTIAL, PLAN_BITS, PRESENT};
use super::cache::{Page, WORDS, Words};
use super::disk;
use super::layout::{BITMAP_PRESENT, ENTRIES_PER_PAGE, PAGE, payload};
use crate::block::{Extent, ExtentKind, Plan, PlanExtent, Planned, driver::Pin};
use crate::error::{Error, Result, ResultExt};
use crate::units::ByteRange;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Longer plans are for the asynchronous path.
const MAX_EXTENTS: usize = 8;
/// Bits of a page of a sector bitmap.
const BITS_PER_PAGE: u64 = PAGE * 8;

/// Where a part of the disk, within one block, is to be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In the file.
    File(u64),
    /// Zeros; `explicit` if the BAT says so.
    Zero {
        explicit: bool,
    },
    Parent,
}

impl Vhdx {
    /// The page of the BAT that an entry is in, as its place in the file, and the word in it.
    pub(super) fn bat_word(&self, index: u64) -> (u64, usize) {
        let page = self.bat().offset + index / ENTRIES_PER_PAGE * PAGE;
        (page, (index % ENTRIES_PER_PAGE) as usize)
    }

    /// The entry of a payload block, if its page is in memory.
    #[inline]
    pub(super) fn entry_now(&self, block: u64) -> Option<u64> {
        let (page, word) = self.bat_word(self.geometry().payload_index(block));
        self.cache.word(page, word)
    }

    /// The entry at an index of the BAT, checked.
    ///
    /// # Errors
    /// If the entry is bad, which also refuses writes from then on.
    pub(super) async fn entry_at(&self, index: u64) -> Result<u64> {
        let (page, word) = self.bat_word(index);
        let entry = self.word(page, word).await?;
        if entry & CHECKED != 0 {
            return Ok(entry);
        }
        let file_len = self.file_len.load(Ordering::Acquire);
        let err = match self.checker().explain(index, entry, file_len) {
            // What is wrong with it could not be kept in memory.
            Ok(()) => Error::corrupt(format!("BAT entry {index}: bits that must be zero are set")),
            Err(err) => err,
        };
        let err = err.context(self.name().to_string());
        self.set_poison(&err);
        Err(err)
    }

    /// A word of a page, which is read from the file if need be.
    pub(super) async fn word(&self, page: u64, word: usize) -> Result<u64> {
        loop {
            if let Some(value) = self.cache.word(page, word) {
                return Ok(value);
            }
            self.load(page).await?;
        }
    }

    /// Brings a page into memory.
    pub(super) async fn load(&self, page: u64) -> Result<()> {
        loop {
            let loading = self.cache.loading(page).await;
            if self.cache.word(page, 0).is_some() {
                return Ok(());
            }
            let context = || format!("{}: metadata page at {page}", self.name());
            let bytes = disk::read(&self.file, page, PAGE).await.context(context)?;
            let mut words: Page = [0; WORDS];
            for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
                *word = u64::from_le_bytes(bytes.try_into().expect("8 bytes"));
            }
            let bat = self.bat();
            if page >= bat.offset && page < bat.end() {
                self.check_page((page - bat.offset) / 8, &mut words);
            }
            if self.cache.insert(page, &words) {
                return Ok(());
            }
            drop(loading);
            // Every frame is taken by a page that is not in its place yet.
            Box::pin(self.checkpoint()).await?;
        }
    }

    /// Marks the good ones of the BAT entries from `first` on.
    fn check_page(&self, first: u64, words: &mut Page) {
        let file_len = self.file_len.load(Ordering::Acquire);
        let entries = self.geometry().bat_entries();
        let checker = self.checker();
        for (index, word) in (first..entries).zip(words.iter_mut()) {
            match checker.is_good(index, *word, file_len) {
                true => *word |= CHECKED,
                false => *word &= !bat::MEMORY_BITS,
            }
        }
    }

    /// Where the sector bitmap of a block starts: the file offset of its page, and the first bit
    /// in the whole bitmap.
    pub(super) fn bitmap_page(&self, bitmap: u64, bit: u64) -> u64 {
        bitmap + bit / BITS_PER_PAGE * PAGE
    }

    /// The sector bitmap block of a partially present block.
    pub(super) async fn bitmap_of(&self, block: u64) -> Result<u64> {
        let index = self.geometry().bitmap_index(self.geometry().chunk_of(block));
        let entry = self.entry_at(index).await?;
        match bat::state(entry) {
            BITMAP_PRESENT => Ok(bat::offset(entry)),
            _ => {
                let err = Error::corrupt(format!(
                    "{}: block {block} is partially present, but its sector bitmap (BAT entry \
                     {index}) is not there",
                    self.name()
                ));
                self.set_poison(&err);
                Err(err)
            }
        }
    }

    /// As [`Vhdx::bitmap_of`], from memory.
    pub(super) fn bitmap_now(&self, block: u64) -> Option<u64> {
        let (page, word) =
            self.bat_word(self.geometry().bitmap_index(self.geometry().chunk_of(block)));
        let entry = self.cache.word(page, word)?;
        (entry & (CHECKED | 7) == CHECKED | BITMAP_PRESENT).then(|| bat::offset(entry))
    }

    /// Whether the first sector of `range` (within `block`) is in the file, and how far that
    /// holds. From memory; `None` if the page is not there.
    pub(super) fn bits_now(
        &self,
        bitmap: u64,
        block: u64,
        range: ByteRange,
    ) -> Option<(bool, u64)> {
        let shift = self.geometry().sector_shift;
        let bit = self.geometry().first_bit(block)
            + (self.geometry().within_block(range.offset) >> shift);
        let count = (range.len >> shift).max(1);
        let page = self.bitmap_page(bitmap, bit);
        let first = bit % BITS_PER_PAGE;
        let run = self.cache.read(page, |words| run_of_bits(words, first, count))?;
        Some((run.0, (run.1 << shift).min(range.len)))
    }

    /// As [`Vhdx::bits_now`], from the file if need be.
    pub(super) async fn bits(
        &self,
        bitmap: u64,
        block: u64,
        range: ByteRange,
    ) -> Result<(bool, u64)> {
        loop {
            if let Some(found) = self.bits_now(bitmap, block, range) {
                return Ok(found);
            }
            let within = self.geometry().within_block(range.offset) >> self.geometry().sector_shift;
            self.load(self.bitmap_page(bitmap, self.geometry().first_bit(block) + within)).await?;
        }
    }

    /// Where the start of `range` is, and how far that holds at least.
    async fn place_of(&self, range: ByteRange) -> Result<(Place, u64)> {
        let found = self.place_by_bat(range).await?;
        let (Place::File(at), len) = found else { return Ok(found) };
        // Of an image that is being salvaged, the file may end before.
        match self.present_len.saturating_sub(at) {
            0 => Ok((Place::Zero { explicit: true }, len)),
            there => Ok((Place::File(at), len.min(there))),
        }
    }

    /// The same by what the BAT says.
    async fn place_by_bat(&self, range: ByteRange) -> Result<(Place, u64)> {
        let block = self.geometry().block_of(range.offset);
        let within = self.geometry().within_block(range.offset);
        let part = self.in_first_block(range);
        let entry = self.entry_at(self.geometry().payload_index(block)).await?;
        let nowhere = match bat::state(entry) {
            payload::FULLY_PRESENT => {
                return Ok((Place::File(bat::offset(entry) + within), part.len));
            }
            payload::PARTIALLY_PRESENT => {
                let bitmap = self.bitmap_of(block).await?;
                let (present, len) = self.bits(bitmap, block, part).await?;
                let at = bat::offset(entry) + within;
                return Ok((if present { Place::File(at) } else { Place::Parent }, len));
            }
            payload::NOT_PRESENT if self.geometry().has_parent => Place::Parent,
            state => Place::Zero { explicit: state != payload::NOT_PRESENT },
        };
        #[cfg(test)]
        super::testing::reached(super::testing::Moment::LookedUp);
        let len = self.blocks_alike(block, entry) * self.geometry().block_size() - within;
        Ok((nowhere, len.min(range.len).max(part.len)))
    }

    /// How many blocks from this one on have this entry, at least: as far as one page in memory tells, and
    /// no other entry lies between them. A disk that holds next to nothing may have millions. The block's
    /// own may have changed since it was looked up; then those behind it may be like the new one.
    fn blocks_alike(&self, block: u64, entry: u64) -> u64 {
        let geometry = self.geometry();
        let (page, word) = self.bat_word(geometry.payload_index(block));
        let in_chunk = geometry.chunk_ratio() - block % geometry.chunk_ratio();
        let count = in_chunk.min(geometry.payload_blocks() - block) as usize;
        let end = (word + count).min(WORDS);
        let alike = self.cache.read(page, |page| {
            (word..end).take_while(|word| page.get(*word) == entry).count() as u64
        });
        alike.unwrap_or(1).max(1)
    }

    /// The part of a range that lies in the block of its start.
    pub(super) fn in_first_block(&self, range: ByteRange) -> ByteRange {
        let left = self.geometry().block_size() - self.geometry().within_block(range.offset);
        ByteRange { offset: range.offset, len: range.len.min(left) }
    }

    /// Where a range lies, from its start on, as far as it lies together.
    pub(super) async fn map_run(&self, range: ByteRange) -> Result<Extent> {
        let (first, len) = self.place_of(range).await?;
        let mut run = ByteRange { offset: range.offset, len };
        // Within what one page of the BAT tells, to keep what others wait for short.
        let page_of = |offset| {
            self.bat_word(self.geometry().payload_index(self.geometry().block_of(offset))).0
        };
        let limit = page_of(range.offset);
        while run.end() < range.end() && page_of(run.end()) == limit {
            let rest = ByteRange::between(run.end(), range.end());
            let (next, len) = self.place_of(rest).await?;
            let goes_on = match (first, next) {
                (Place::File(start), Place::File(at)) => at == start + run.len,
                (first, next) => first == next,
            };
            if !goes_on {
                break;
            }
            run.len += len;
        }
        let kind = match first {
            Place::File(offset) => ExtentKind::Data { file: Arc::clone(&self.file), offset },
            Place::Zero { explicit } => ExtentKind::Zero { explicit },
            Place::Parent => ExtentKind::Backing,
        };
        Ok(Extent { range: run, kind })
    }

    /// Resolves a read from memory.
    pub(super) fn plan_read<'a>(&'a self, range: ByteRange, plan: &mut Plan<'a>) -> Planned {
        let Some(host) = self.file.as_host() else { return Planned::NotNow };
        if self.opened.has_parent && !self.is_readable.load(Ordering::Relaxed) {
            return Planned::NotNow;
        }
        // Only who can write can move a block.
        let pin = (!self.read_only).then(|| self.pins.pin());
        let mut at = range;
        while !at.is_empty() {
            let part = self.in_first_block(at);
            let block = self.geometry().block_of(at.offset);
            let Some(entry) = self.entry_now(block) else { return Planned::NotNow };
            let inside = bat::offset(entry) + self.geometry().within_block(at.offset);
            let mut len = part.len;
            // `None`: the parent's.
            let extent = match entry & (PLAN_BITS & !bat::UNSETTLED) {
                PRESENT => Some(PlanExtent::File { file: host, offset: inside, len }),
                PARTIAL => {
                    let Some(bitmap) = self.bitmap_now(block) else { return Planned::NotNow };
                    let Some((is_here, run)) = self.bits_now(bitmap, block, part) else {
                        return Planned::NotNow;
                    };
                    len = run;
                    is_here.then_some(PlanExtent::File { file: host, offset: inside, len })
                }
                state if state & CHECKED == 0 => return Planned::NotNow,
                state if state == CHECKED && self.geometry().has_parent => None,
                _ => Some(PlanExtent::Zero { len }),
            };
            match extent {
                Some(extent) => plan.push(extent),
                None if plan.read_below(ByteRange { offset: at.offset, len }) == Planned::Ready => {
                }
                None => return Planned::NotNow,
            }
            if plan.extents.len() > MAX_EXTENTS {
                return Planned::NotNow;
            }
            at = ByteRange::between(at.offset + len, at.end());
        }
        if let Some(pin) = pin {
            plan.add_pin(Pin(pin as Arc<_>));
        }
        Planned::Ready
    }
}

/// The value of a bit, and how many of the `count` bits from it on have the same, up to the end of
/// the page.
fn run_of_bits(words: &Words<'_>, first: u64, count: u64) -> (bool, u64) {
    let mut at = first;
    let end = (first + count).min(BITS_PER_PAGE);
    let value = words.get((at / 64) as usize) >> (at % 64) & 1 == 1;
    while at < end {
        let word = words.get((at / 64) as usize) >> (at % 64);
        let same = if value { (!word).trailing_zeros() } else { word.trailing_zeros() };
        let left = 64 - at % 64;
        let same = u64::from(same).min(left);
        at += same;
        if same < left {
            break;
        }
    }
    (value, at.min(end) - first)
}

#[cfg(test)]
mod tests {
    use super::super::cache::PageCache;
    use super::super::testing::{Fixture, Moment, open_image, parent_node, read, visit_at, write};
    use super::*;
    use crate::block::Driver;
    use crate::io::block_on;
    use crate::io::sim::SimFile;
    use crate::units::MIB;
    use std::pin::pin;
    use std::task::{Context, Waker};

    #[test]
    fn runs_of_bits_are_found() {
        let cache = PageCache::new(1 << 20);
        let mut page: Page = [0; WORDS];
        page[0] = 0b0110;
        page[1] = u64::MAX;
        page[2] = 0b1;
        page[511] = 1 << 63;
        cache.insert(0, &page);
        let run = |first, count| cache.read(0, |words| run_of_bits(words, first, count)).unwrap();
        assert_eq!(run(0, 100), (false, 1));
        assert_eq!(run(1, 100), (true, 2));
        assert_eq!(run(1, 1), (true, 1));
        assert_eq!(run(3, 100), (false, 61));
        assert_eq!(run(64, 1000), (true, 65));
        assert_eq!(run(129, 1 << 20), (false, 32767 - 129));
        assert_eq!(run(32767, 100), (true, 1));
    }

    /// Entries of sector bitmaps lie between those of blocks, here between blocks 8191 and 8192: they are
    /// no blocks, although they look like those that have nothing.
    #[test]
    fn runs_of_blocks_do_not_count_the_entries_between_them() {
        let blocks = 8300;
        let file = SimFile::from_bytes("test.vhdx", Fixture::new(blocks * MIB).bytes());
        let disk = open_image(&file, None, None).unwrap();
        let data = [8100, 8194, 8299];
        for block in data {
            block_on(write(&disk, block * MIB, &[1; 512], true)).unwrap();
        }
        let mut found = Vec::new();
        for from in 0..blocks {
            let range = ByteRange::between(from * MIB + 512, blocks * MIB);
            let run = block_on(disk.format().map_run(range)).unwrap();
            let is_data = matches!(run.kind, ExtentKind::Data { .. });
            assert_eq!(is_data, data.contains(&from), "block {from}");
            // As far as it says, all are alike.
            let past = run.range.end().div_ceil(MIB);
            assert!((from + 1..past).all(|block| data.contains(&block) == is_data), "block {from}");
            found.push(past - from);
        }
        assert!(found.iter().any(|run| *run > 400), "one by one");
    }

    /// Zeros that were written to the second block long ago are zeros, although the first one becomes
    /// zeros, too, while it is looked up.
    #[test]
    fn a_block_that_changes_is_not_taken_for_those_behind_it() {
        let size = 4 * MIB;
        let bytes = Fixture { has_parent: true, ..Fixture::new(size) }.bytes();
        let backing = Some(parent_node(&vec![7; size as usize]));
        let disk =
            Arc::new(open_image(&SimFile::from_bytes("test.vhdx", bytes), backing, None).unwrap());
        let block = |number| ByteRange { offset: number * MIB, len: MIB };
        block_on(disk.write_zeroes(block(1), true)).unwrap();
        let other = Arc::clone(&disk);
        visit_at(Moment::LookedUp, move || {
            let mut zeroes = pin!(other.write_zeroes(block(0), true));
            let mut context = Context::from_waker(Waker::noop());
            assert!(zeroes.as_mut().poll(&mut context).is_ready());
        });
        let seen = block_on(read(&*disk, 0, 2 * MIB));
        assert!(
            seen[..MIB as usize].iter().all(|byte| *byte == 7),
            "as it was when it was looked up"
        );
        assert!(seen[MIB as usize..].iter().all(|byte| *byte == 0), "the parent's");
    }
}
