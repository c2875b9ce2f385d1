//! QEMU's cache modes, as the command lines have them.

use std::str::FromStr;

use crate::error::{Error, Result};

/// QEMU's cache modes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheMode {
    /// The host's page cache; flushes are honoured.
    #[default]
    Writeback,
    /// O_DIRECT; flushes are honoured.
    None,
    /// The host's page cache; every write is durable before it completes.
    Writethrough,
    /// O_DIRECT; every write is durable before it completes.
    Directsync,
    /// The host's page cache; flushes are ignored.
    Unsafe,
}

impl CacheMode {
    /// The names, in the order that messages list them.
    pub const NAMES: [(&'static str, CacheMode); 5] = [
        ("writeback", CacheMode::Writeback),
        ("none", CacheMode::None),
        ("writethrough", CacheMode::Writethrough),
        ("directsync", CacheMode::Directsync),
        ("unsafe", CacheMode::Unsafe),
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, mode)| *mode == self).map_or("unknown", |(name, _)| name)
    }

    /// Whether the page cache is bypassed.
    pub fn is_direct(self) -> bool {
        matches!(self, CacheMode::None | CacheMode::Directsync)
    }

    /// Whether each write must be durable before it completes.
    pub fn is_writethrough(self) -> bool {
        matches!(self, CacheMode::Writethrough | CacheMode::Directsync)
    }

    /// Whether flushes are to be ignored.
    pub fn ignores_flush(self) -> bool {
        self == CacheMode::Unsafe
    }
}

impl std::fmt::Display for CacheMode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for CacheMode {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let known = Self::NAMES.iter().find(|(name, _)| *name == text).map(|(_, mode)| *mode);
        known.ok_or_else(|| {
            let names: Vec<_> = Self::NAMES.iter().map(|(name, _)| *name).collect();
            Error::invalid(format!("unknown cache mode '{text}' (known: {})", names.join(", ")))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cache_modes_have_names() {
        for (name, mode) in CacheMode::NAMES {
            assert_eq!(name.parse::<CacheMode>().unwrap(), mode);
            assert_eq!(mode.to_string(), name);
        }
        "off".parse::<CacheMode>().unwrap_err();
    }
}
