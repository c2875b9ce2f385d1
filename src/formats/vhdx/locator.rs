//! The parent locator: how a differencing image says which image it stands on.
//!
//! It gives the parent's DataWriteGuid, and paths in the words of Windows. The relative path is
//! taken to be relative to the child's directory. Of the others, which name volumes that do not
//! exist here, only the file's name is of use (unless it is a path of this host): such a parent is looked for beside the child.
//! Whatever is found must have the right GUID, so looking in one place more does no harm.

use zerocopy::{FromBytes, IntoBytes};

use super::layout::{Guid, MAX_LOCATOR_ENTRIES, RawLocatorEntry, RawLocatorHeader, guid};
use crate::error::{Error, Result};
use crate::units::ByteRange;

/// What a parent locator says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Locator {
    /// Keys and values in the order they are stored.
    pub entries: Vec<(String, String)>,
}

impl Locator {
    /// Parses the metadata item.
    ///
    /// # Errors
    /// Says which entry is wrong, and how.
    pub fn parse(bytes: &[u8]) -> Result<Locator> {
        let Ok((header, rest)) = RawLocatorHeader::ref_from_prefix(bytes) else {
            return Err(Error::corrupt(format!("has only {} bytes", bytes.len())));
        };
        if header.locator_type != guid::VHDX_PARENT {
            return Err(Error::unsupported(format!(
                "has the type {}; only parents in VHDX format are known",
                header.locator_type
            )));
        }
        let count = header.entry_count.get();
        if count > MAX_LOCATOR_ENTRIES {
            return Err(Error::corrupt(format!(
                "has {count} entries; no more than {MAX_LOCATOR_ENTRIES} are believed"
            )));
        }
        let Ok((raw, _)) = <[RawLocatorEntry]>::ref_from_prefix_with_elems(rest, count.into())
        else {
            return Err(Error::corrupt("is shorter than its entries"));
        };
        let mut entries: Vec<(String, String)> = Vec::with_capacity(raw.len());
        for entry in raw {
            let key = text(bytes, entry.key_offset.get(), entry.key_length.get())?;
            let value = text(bytes, entry.value_offset.get(), entry.value_length.get())?;
            if entries.iter().any(|(other, _)| *other == key) {
                return Err(Error::corrupt(format!("has the key '{key}' twice")));
            }
            entries.push((key, value));
        }
        let locator = Locator { entries };
        if locator.linkages().next().is_none() {
            return Err(Error::corrupt("has no parent_linkage that is a GUID"));
        }
        if locator.paths().is_empty() {
            return Err(Error::corrupt("names no path"));
        }
        Ok(locator)
    }

    /// The metadata item.
    pub fn encode(&self) -> Vec<u8> {
        let header = RawLocatorHeader {
            locator_type: guid::VHDX_PARENT,
            reserved: 0.into(),
            entry_count: (self.entries.len() as u16).into(),
        };
        let mut bytes = header.as_bytes().to_vec();
        let mut strings = Vec::new();
        let start = bytes.len() + self.entries.len() * size_of::<RawLocatorEntry>();
        let mut push = |text: &str| {
            let at = start + strings.len();
            strings.extend(text.encode_utf16().flat_map(u16::to_le_bytes));
            (at as u32, (start + strings.len() - at) as u16)
        };
        for (key, value) in &self.entries {
            let (key_offset, key_length) = push(key);
            let (value_offset, value_length) = push(value);
            let entry = RawLocatorEntry {
                key_offset: key_offset.into(),
                value_offset: value_offset.into(),
                key_length: key_length.into(),
                value_length: value_length.into(),
            };
            bytes.extend_from_slice(entry.as_bytes());
        }
        bytes.extend(strings);
        bytes
    }

    /// Where in the metadata item, which was parsed, the value of a key is.
    pub fn place_of(bytes: &[u8], key: &str) -> Option<ByteRange> {
        let (header, rest) = RawLocatorHeader::ref_from_prefix(bytes).ok()?;
        let count = header.entry_count.get().into();
        let (raw, _) = <[RawLocatorEntry]>::ref_from_prefix_with_elems(rest, count).ok()?;
        let is_it = |entry: &&RawLocatorEntry| {
            text(bytes, entry.key_offset.get(), entry.key_length.get())
                .is_ok_and(|text| text == key)
        };
        let entry = raw.iter().find(is_it)?;
        let (offset, len) = (entry.value_offset.get().into(), entry.value_length.get().into());
        Some(ByteRange { offset, len })
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.entries.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    /// The DataWriteGuids that the parent may have. Windows writes an all-zero `parent_linkage2`,
    /// which matches nothing.
    pub fn linkages(&self) -> impl Iterator<Item = Guid> + '_ {
        ["parent_linkage", "parent_linkage2"]
            .into_iter()
            .filter_map(|key| self.get(key))
            .filter_map(Guid::parse)
            .filter(|guid| !guid.is_zero())
    }

    /// Where the parent may be, as paths of this host relative to the child's directory, the best
    /// first.
    pub fn paths(&self) -> Vec<String> {
        let mut paths: Vec<String> = Vec::new();
        let mut push = |path: String| {
            if !path.is_empty() && !paths.contains(&path) {
                paths.push(path);
            }
        };
        if let Some(relative) = self.get("relative_path") {
            let path = relative.replace('\\', "/");
            push(path.strip_prefix("./").unwrap_or(&path).to_string());
        }
        // Images made on this host name its path as it is, which Windows cannot mistake for one
        // of its own.
        if let Some(path) = self.get("absolute_win32_path").filter(|path| path.starts_with('/')) {
            push(path.to_string());
        }
        for key in ["relative_path", "volume_path", "absolute_win32_path"] {
            let name = self.get(key).and_then(|path| path.rsplit(['\\', '/']).next());
            push(name.unwrap_or_default().to_string());
        }
        paths
    }
}

/// A string of the item.
fn text(bytes: &[u8], offset: u32, length: u16) -> Result<String> {
    let (offset, length) = (offset as usize, usize::from(length));
    let outside = || {
        Error::corrupt(format!("a string of {length} bytes at {offset} lies outside of the item"))
    };
    if offset == 0 || length == 0 || !length.is_multiple_of(2) {
        return Err(outside());
    }
    let end = offset.checked_add(length).ok_or_else(outside)?;
    let bytes = bytes.get(offset..end).ok_or_else(outside)?;
    let units: Vec<u16> =
        bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect();
    let text = String::from_utf16(&units)
        .map_err(|_| Error::corrupt(format!("the string at {offset} is not UTF-16")))?;
    if text.contains('\0') {
        return Err(Error::corrupt(format!("the string at {offset} contains a NUL")));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn locator(entries: &[(&str, &str)]) -> Locator {
        let own = |(key, value): &(&str, &str)| (key.to_string(), value.to_string());
        Locator { entries: entries.iter().map(own).collect() }
    }

    const LINKAGE: (&str, &str) = ("parent_linkage", "{aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee}");

    #[test]
    fn what_is_written_is_read() {
        let written = locator(&[LINKAGE, ("relative_path", ".\\exA.vhdx")]);
        let bytes = written.encode();
        assert_eq!(bytes.len(), 194);
        assert_eq!(Locator::parse(&bytes).unwrap(), written);
        let place = Locator::place_of(&bytes, LINKAGE.0).unwrap();
        assert_eq!((place.len, &bytes[place.offset as usize..][..4]), (76, &b"{\0a\0"[..]));
        assert_eq!(Locator::place_of(&bytes, "parent_linkage2"), None);
    }

    #[test]
    fn paths_of_windows_are_looked_for_here() {
        let found = locator(&[
            LINKAGE,
            ("parent_linkage2", "{00000000-0000-0000-0000-000000000000}"),
            ("absolute_win32_path", "C:\\Projects\\base.vhdx"),
            ("volume_path", "\\\\?\\Volume{26A21BDA-A627-11D7-9931-806E6F6E6963}\\base.vhdx"),
            ("relative_path", ".\\sub\\parent.vhdx"),
        ]);
        assert_eq!(found.paths(), ["sub/parent.vhdx", "parent.vhdx", "base.vhdx"]);
        let here = locator(&[
            LINKAGE,
            ("relative_path", "..\\base.vhdx"),
            ("absolute_win32_path", "/srv/base.vhdx"),
        ]);
        assert_eq!(here.paths(), ["../base.vhdx", "/srv/base.vhdx", "base.vhdx"]);
        let linkages: Vec<_> = found.linkages().map(|guid| guid.to_string()).collect();
        assert_eq!(linkages, ["aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"]);
    }

    #[test]
    fn nonsense_is_refused() {
        let refused = |bytes: &[u8], words: &str| {
            let err = Locator::parse(bytes).unwrap_err().to_string();
            assert!(err.contains(words), "{err}");
        };
        let good = locator(&[LINKAGE, ("relative_path", "base.vhdx")]).encode();
        let with = |at: usize, bytes: &[u8]| {
            let mut changed = good.clone();
            changed[at..at + bytes.len()].copy_from_slice(bytes);
            changed
        };
        refused(&good[..10], "has only 10 bytes");
        refused(&with(0, &[0]), "has the type");
        refused(&with(18, &[0, 2]), "512 entries");
        refused(&with(18, &[100, 0]), "shorter than its entries");
        refused(&with(20, &[0; 4]), "outside of the item");
        refused(&with(20, &[0xff; 4]), "outside of the item");
        refused(&with(28, &[3, 0]), "outside of the item");
        refused(&with(44, &[0, 0]), "contains a NUL");
        refused(&with(44, &[0, 0xd8]), "is not UTF-16");
        refused(&locator(&[LINKAGE]).encode(), "names no path");
        refused(&locator(&[("relative_path", "a")]).encode(), "no parent_linkage");
        refused(&locator(&[LINKAGE, LINKAGE]).encode(), "twice");
    }
}
