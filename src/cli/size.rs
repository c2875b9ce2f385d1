//! Sizes as people write them: `512`, `64K`, `1.5G`, and for display.

use crate::error::{Error, Result};
pub use crate::units::parse_size;

/// A new size, absolute or relative to the old one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SizeChange {
    /// Exactly this many bytes.
    To(u64),
    /// This many bytes more.
    Grow(u64),
    /// This many bytes less.
    Shrink(u64),
}

impl SizeChange {
    /// The size that comes out for a disk of `old` bytes.
    pub fn apply(self, old: u64) -> Result<u64> {
        match self {
            SizeChange::To(size) => Ok(size),
            SizeChange::Grow(by) => old
                .checked_add(by)
                .ok_or_else(|| Error::invalid(format!("{old} + {by} bytes do not fit 64 bits"))),
            SizeChange::Shrink(by) => old.checked_sub(by).ok_or_else(|| {
                Error::invalid(format!("cannot take {by} bytes from a disk that has {old}"))
            }),
        }
    }
}

impl std::str::FromStr for SizeChange {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.strip_prefix(['+', '-']) {
            Some(by) if text.starts_with('+') => Ok(SizeChange::Grow(parse_size(by)?)),
            Some(by) => Ok(SizeChange::Shrink(parse_size(by)?)),
            None => Ok(SizeChange::To(parse_size(text)?)),
        }
    }
}

/// A size for people, as qemu-img writes it: three digits and a unit below 1000 of it.
pub fn human_size(bytes: u64) -> String {
    const UNITS: &[&str] = &["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    let mut value = bytes as f64;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let decimals = match value {
        v if v >= 99.95 => 0,
        v if v >= 9.995 => 1,
        v if v >= 0.9995 || v == 0.0 => 2,
        _ => 3,
    };
    let text = format!("{value:.decimals$}");
    let text = match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.'),
        false => &text,
    };
    format!("{text} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_qemu_img_reads_them() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("512b", 512),
            ("64k", 65536),
            ("64K", 65536),
            ("1.5G", 3 << 29),
            ("0.1K", 102),
            ("2T", 2 << 40),
            ("1P", 1 << 50),
            ("15E", 15 << 60),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse_size(text).unwrap(), bytes, "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused_with_the_text() {
        for text in ["", "K", "1.", ".5G", "-1", "+1", "1 G", "1GiB", "0x10", "1e3", "1,5G", "١K"]
        {
            let err = parse_size(text).unwrap_err().to_string();
            assert!(err.contains(&format!("'{text}'")), "{err}");
        }
        for text in ["16E", "18446744073709551616", "99999999999999999999999G"] {
            let err = parse_size(text).unwrap_err().to_string();
            assert!(err.contains("64 bits"), "{err}");
        }
    }

    #[test]
    fn changes_are_relative_or_not() {
        let change = |text: &str| text.parse::<SizeChange>().unwrap().apply(1000);
        assert_eq!(change("5").unwrap(), 5);
        assert_eq!(change("+1K").unwrap(), 2024);
        assert_eq!(change("-1000").unwrap(), 0);
        assert!(change("-1001").unwrap_err().to_string().contains("cannot take"));
        change("+18446744073709551615").unwrap_err();
        "++1".parse::<SizeChange>().unwrap_err();
    }

    #[test]
    fn sizes_are_shown_as_qemu_img_shows_them() {
        for (bytes, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (135_168, "132 KiB"),
            (1_572_864, "1.5 MiB"),
            (10 << 20, "10 MiB"),
            (1_000_448, "977 KiB"),
            (100 << 30, "100 GiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(human_size(bytes), text);
        }
    }
}
