//! Byte ranges and checked arithmetic for numbers that come from a disk or a guest.
//!
//! Inside the library offsets and lengths are bytes (`u64`). Sectors exist only where virtio
//! requests are parsed and in on-disk structures.

use std::fmt;

use crate::error::{Error, Result};

/// Size of the sector that virtio-blk counts in, whatever the block size of the disk.
pub const SECTOR_SIZE: u64 = 512;

/// A kibibyte, in bytes.
pub const KIB: u64 = 1 << 10;
/// A mebibyte, in bytes.
pub const MIB: u64 = 1 << 20;
/// A gibibyte, in bytes.
pub const GIB: u64 = 1 << 30;
/// A tebibyte, in bytes.
pub const TIB: u64 = 1 << 40;

/// The suffixes that multiply by powers of 1024, as in qemu-img; `b` and none are bytes.
const SUFFIXES: &[(char, u32)] =
    &[('b', 0), ('k', 10), ('m', 20), ('g', 30), ('t', 40), ('p', 50), ('e', 60)];

/// Parses a size: digits, an optional fraction and an optional suffix (b, k, K, M, G, T, P, E;
/// powers of 1024). A fraction must come out as whole bytes or is rounded down.
///
/// # Errors
/// Says what is wrong with the text.
pub fn parse_size(text: &str) -> Result<u64> {
    let bad = || {
        Error::invalid(format!(
            "'{text}' is not a size (digits, then nothing for bytes or one of K, M, G, T, P, E)"
        ))
    };
    let too_large = || Error::invalid(format!("the size '{text}' does not fit 64 bits"));
    let last = text.chars().last().ok_or_else(bad)?.to_ascii_lowercase();
    let shift = SUFFIXES.iter().find(|(suffix, _)| *suffix == last).map(|(_, shift)| *shift);
    let number = if shift.is_some() { &text[..text.len() - 1] } else { text };
    let shift = shift.unwrap_or(0);
    let (whole, fraction) = match number.split_once('.') {
        Some((whole, fraction)) if !fraction.is_empty() => (whole, fraction),
        Some(_) => return Err(bad()),
        None => (number, ""),
    };
    let all_digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || !all_digits(whole) || !all_digits(fraction) {
        return Err(bad());
    }
    let whole: u64 = whole.parse().map_err(|_| too_large())?;
    let bytes = whole.checked_mul(1 << shift).ok_or_else(too_large)?;
    // Eighteen digits after the point are more than any size of ours can use.
    let digits = &fraction[..fraction.len().min(18)];
    let fraction = match digits {
        "" => 0,
        _ => {
            let value: u128 = digits.parse().map_err(|_| bad())?;
            (value << shift) / 10u128.pow(digits.len() as u32)
        }
    };
    bytes.checked_add(fraction as u64).ok_or_else(too_large)
}

/// A run of bytes: `offset..offset + len`. The end never overflows: [`ByteRange::new`] checks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ByteRange {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

impl ByteRange {
    /// A range, or `None` if its end does not fit 64 bits.
    pub fn new(offset: u64, len: u64) -> Option<Self> {
        offset.checked_add(len)?;
        Some(ByteRange { offset, len })
    }

    /// The range from `start` up to `end`; empty if `end` is not after `start`.
    pub fn between(start: u64, end: u64) -> Self {
        ByteRange { offset: start, len: end.saturating_sub(start) }
    }

    /// One past the last byte.
    pub fn end(&self) -> u64 {
        self.offset + self.len
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether both ends are multiples of `align`, a power of two.
    pub fn is_aligned(&self, align: u64) -> bool {
        debug_assert!(align.is_power_of_two());
        (self.offset | self.len) & (align - 1) == 0
    }

    /// Whether the two share a byte.
    pub fn overlaps(&self, other: &ByteRange) -> bool {
        self.offset < other.end() && other.offset < self.end()
    }

    /// What the two share; empty if nothing.
    pub fn intersect(&self, other: &ByteRange) -> ByteRange {
        ByteRange::between(self.offset.max(other.offset), self.end().min(other.end()))
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes at {}", self.len, self.offset)
    }
}

/// Rounds `value` down to a multiple of `align`, a power of two.
pub fn align_down(value: u64, align: u64) -> u64 {
    debug_assert!(align.is_power_of_two());
    value & !(align - 1)
}

/// Rounds `value` up to a multiple of `align`, a power of two; `None` on overflow.
pub fn align_up(value: u64, align: u64) -> Option<u64> {
    debug_assert!(align.is_power_of_two());
    value.checked_add(align - 1).map(|v| v & !(align - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_do_not_overflow() {
        assert!(ByteRange::new(u64::MAX, 1).is_none());
        assert!(ByteRange::new(u64::MAX, 0).is_some());
        assert_eq!(align_up(u64::MAX, 512), None);
        assert_eq!(align_up(513, 512), Some(1024));
    }

    #[test]
    fn intersection_of_disjoint_ranges_is_empty() {
        let a = ByteRange { offset: 0, len: 10 };
        let b = ByteRange { offset: 10, len: 10 };
        assert!(!a.overlaps(&b));
        assert!(a.intersect(&b).is_empty());
        let c = ByteRange { offset: 5, len: 10 };
        assert_eq!(a.intersect(&c), ByteRange { offset: 5, len: 5 });
    }
}
