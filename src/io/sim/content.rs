//! The content of a simulated disk: pages that copies share until one of them is changed.
//!
//! A test that cuts the power thousands of times makes a copy of the disk each time and changes
//! little of it. So a copy is a list of pointers, and pages that hold nothing but zeros are none.

use std::sync::Arc;

/// Length of a page. Holes are told in units of it.
pub const PAGE: usize = 4096;

type Page = [u8; PAGE];

static ZEROS: Page = [0; PAGE];

/// Bytes; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Content {
    /// `None`: zeros. What is behind the end within the last page is zeros, too.
    pages: Vec<Option<Arc<Page>>>,
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
            let inside = len % PAGE;
            if let Some(Some(page)) = self.pages.get_mut(len / PAGE).filter(|_| inside > 0) {
                Arc::make_mut(page)[inside..].fill(0);
            }
        }
        self.pages.resize(len.div_ceil(PAGE), None);
        self.len = len;
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
            let page = &mut self.pages[at / PAGE];
            match part.len() == PAGE {
                true if part == ZEROS => *page = None,
                true => *page = Some(Arc::new(part.try_into().expect("a page"))),
                false => {
                    if page.is_none() && *part == ZEROS[..part.len()] {
                        continue;
                    }
                    let page = Arc::make_mut(page.get_or_insert_with(|| Arc::new(ZEROS)));
                    page[at % PAGE..][..part.len()].copy_from_slice(part);
                }
            }
        }
    }

    /// As if zeros were written.
    pub fn zero(&mut self, offset: usize, len: usize) {
        self.make_room(offset + len);
        for (at, range) in pieces(offset, len) {
            let page = &mut self.pages[at / PAGE];
            match page {
                _ if range.len() == PAGE => *page = None,
                Some(page) => Arc::make_mut(page)[at % PAGE..][..range.len()].fill(0),
                None => {}
            }
        }
    }

    /// Shows `f` the bytes from `offset` to `end`, which must not be behind the end, in pieces.
    pub fn read(&self, offset: usize, end: usize, mut f: impl FnMut(&[u8])) {
        assert!(end <= self.len, "{end} of {}", self.len);
        for (at, range) in pieces(offset, end - offset) {
            let page = self.pages[at / PAGE].as_deref().unwrap_or(&ZEROS);
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
        self.pages[offset / PAGE].as_deref().is_none_or(|page| *page == ZEROS)
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
}
