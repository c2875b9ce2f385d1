//! The content of a simulated disk: pages that copies share until one of them is changed.
//!
//! A test that cuts the power thousands of times makes a copy of the disk each time and changes
//! little of it. So a copy is a list of pointers, and pages that hold nothing but zeros are none. Nor
//! are whole groups of them, because damage can make a file of a terabyte that is almost all hole.

use std::sync::Arc;

/// Length of a page. Holes are told in units of it.
pub const PAGE: usize = 4096;

/// Pages of a group: 2 MiB.
const GROUP: usize = 512;

type Page = [u8; PAGE];
/// `None`: zeros.
type Group = [Option<Arc<Page>>; GROUP];

static ZEROS: Page = [0; PAGE];

/// Bytes; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Content {
    /// `None`: zeros. What is behind the end within the last group is zeros, too.
    groups: Vec<Option<Arc<Group>>>,
    len: usize,
}

impl Content {
    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Cuts it off, or makes it longer with zeros.
    pub fn resize(&mut self, len: usize) {
        if len < self.len {
            let group_end = len.next_multiple_of(GROUP * PAGE).min(self.len);
            self.zero(len, group_end - len);
        }
        self.groups.resize(len.div_ceil(GROUP * PAGE), None);
        self.len = len;
    }

    fn page(&self, offset: usize) -> Option<&Page> {
        let number = offset / PAGE;
        self.groups[number / GROUP].as_ref()?[number % GROUP].as_deref()
    }

    /// The place of a page.
    fn page_mut(&mut self, offset: usize) -> &mut Option<Arc<Page>> {
        let number = offset / PAGE;
        let empty = || Arc::new([const { None }; GROUP]);
        let group = self.groups[number / GROUP].get_or_insert_with(empty);
        &mut Arc::make_mut(group)[number % GROUP]
    }

    fn make_room(&mut self, end: usize) {
        if self.len < end {
            self.resize(end);
        }
    }

    /// Copies bytes in, and makes it longer if they end behind its end.
    pub fn write(&mut self, offset: usize, bytes: &[u8]) {
        self.make_room(offset + bytes.len());
        for (at, range) in pieces(offset, bytes.len()) {
            let part = &bytes[range];
            if self.page(at).is_none() && *part == ZEROS[..part.len()] {
                continue;
            }
            let page = self.page_mut(at);
            match part.len() == PAGE {
                true if part == ZEROS => *page = None,
                true => *page = Some(Arc::new(part.try_into().expect("a page"))),
                false => {
                    let page = Arc::make_mut(page.get_or_insert_with(|| Arc::new(ZEROS)));
                    page[at % PAGE..][..part.len()].copy_from_slice(part);
                }
            }
        }
    }

    /// As if zeros were written.
    pub fn zero(&mut self, offset: usize, len: usize) {
        self.make_room(offset + len);
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let piece = (PAGE - at % PAGE).min(end - at);
            if self.page(at).is_none() {
                at = self.run_end(at).min(end);
                continue;
            }
            let page = self.page_mut(at);
            match page {
                Some(page) if piece < PAGE => Arc::make_mut(page)[at % PAGE..][..piece].fill(0),
                _ => *page = None,
            }
            at += piece;
        }
    }

    /// Shows `f` the bytes from `offset` to `end`, which must not be behind the end, in pieces.
    pub fn read(&self, offset: usize, end: usize, mut f: impl FnMut(&[u8])) {
        assert!(end <= self.len, "{end} of {}", self.len);
        for (at, range) in pieces(offset, end - offset) {
            let page = self.page(at).unwrap_or(&ZEROS);
            f(&page[at % PAGE..][..range.len()]);
        }
    }

    /// All of it.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.len);
        self.read(0, self.len, |part| bytes.extend_from_slice(part));
        bytes
    }

    /// Whether the page around `offset` is zeros.
    pub fn is_zero_page(&self, offset: usize) -> bool {
        self.page(offset).is_none_or(|page| *page == ZEROS)
    }

    /// Up to where pages are zeros like that around `offset`, or are not like it; the end at most.
    pub fn run_end(&self, offset: usize) -> usize {
        let is_zero = self.is_zero_page(offset);
        let mut at = offset;
        while at < self.len && self.is_zero_page(at) == is_zero {
            let is_hole = self.groups[at / PAGE / GROUP].is_none();
            at = (at + 1).next_multiple_of(if is_hole { GROUP * PAGE } else { PAGE });
        }
        at.min(self.len)
    }
}

impl From<&[u8]> for Content {
    fn from(bytes: &[u8]) -> Content {
        let mut content = Content::default();
        content.resize(bytes.len());
        content.write(0, bytes);
        content
    }
}

/// A range cut at the ends of pages: where each piece begins, and which part of the range it is.
fn pieces(offset: usize, len: usize) -> impl Iterator<Item = (usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = offset + done;
        let piece = (PAGE - at % PAGE).min(len - done);
        let range = done..done + piece;
        done += piece;
        (piece > 0).then_some((at, range))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::sim::Rng;

    #[test]
    fn it_is_a_vector_of_bytes() {
        let mut rng = Rng::new(1);
        let (mut content, mut model) = (Content::default(), Vec::new());
        for step in 0..2000 {
            let offset = rng.below(40_000) as usize;
            let end = offset + rng.below(10_000) as usize;
            let (copy, before) = (content.clone(), model.clone());
            let byte = rng.below(3) as u8;
            if rng.one_in(4) {
                content.resize(offset);
                model.resize(offset, 0);
            } else {
                match byte {
                    0 => content.zero(offset, end - offset),
                    _ => content.write(offset, &vec![byte; end - offset]),
                }
                model.resize(model.len().max(end), 0);
                model[offset..end].fill(byte);
            }
            assert!(content.len() == model.len() && content.to_vec() == model, "step {step}");
            assert!(copy.to_vec() == before, "step {step}: a copy changed");
            for (at, page) in model.chunks(PAGE).enumerate() {
                let zeros = page.iter().all(|byte| *byte == 0);
                assert_eq!(content.is_zero_page(at * PAGE), zeros, "step {step}");
            }
        }
        assert!(Content::from(&model[..]).to_vec() == model);
    }

    #[test]
    fn a_terabyte_of_holes_costs_next_to_nothing() {
        let (far, len) = (1 << 40, (1 << 40) + 10 * PAGE);
        let mut content = Content::default();
        content.resize(len);
        content.write(far, &[7; PAGE + 1]);
        content.zero(PAGE, far - PAGE);
        assert!(content.run_end(0) == far && content.run_end(far) == far + 2 * PAGE);
        assert!(content.groups.iter().flatten().count() == 1 && content.clone().len() == len);
        content.resize(far + 1);
        content.resize(len);
        assert_eq!(content.run_end(far), far + PAGE);
        content.read(far, far + 2, |part| assert_eq!(part, [7, 0]));
    }
}
