//! Names of crash states: `E<n>[:s=<bits>[,torn=<k>@<bytes>]…]`.
//!
//! * `E<n>`: exactly the first n entries of the log were applied.
//! * `s=`: one character for each write or discard from entry n on, in log order, marks skipped,
//!   ending before the next flush (entry n itself may be a flush that carries data). 1 is applied,
//!   0 is missing, and so is all that the bits do not reach.
//! * `torn=k@b`: of the k-th of these (from 1) only the first b bytes reached the disk; `@-b`: only
//!   the last b. Its bit is 1.
//!
//! A name is ASCII without spaces, so it can stand in a command line, a file name or a URL. What is
//! checked here is the grammar; whether a log has such a state, [`History`](crate::crash::History)
//! knows.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::units::{ByteRange, SECTOR_SIZE};

/// The part of a torn write that reached the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kept {
    /// The first so many bytes.
    First(u64),
    /// The last so many bytes.
    Last(u64),
}

impl Kept {
    /// How many bytes.
    pub fn len(self) -> u64 {
        let (Kept::First(len) | Kept::Last(len)) = self;
        len
    }

    /// Whether there are none; no tear of a state has none.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// The part of `whole` that is kept. It must be longer than what is kept.
    pub fn of(self, whole: ByteRange) -> ByteRange {
        match self {
            Kept::First(len) => ByteRange { offset: whole.offset, len },
            Kept::Last(len) => ByteRange { offset: whole.end() - len, len },
        }
    }
}

/// A write of which only a part reached the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tear {
    /// Which of the writes, from 0. (In the text they count from 1.)
    pub write: usize,
    /// What is left of it.
    pub kept: Kept,
}

/// See the [module](self).
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct StateName {
    /// How many entries of the log are applied, all of them.
    pub prefix: u64,
    /// Which of the writes and discards after these are applied, too.
    pub applied: Vec<bool>,
    /// Which of the applied ones are torn; in order, at most one for each.
    pub torn: Vec<Tear>,
}

impl StateName {
    /// The state after the first `prefix` entries.
    pub fn prefix(prefix: u64) -> StateName {
        StateName { prefix, ..StateName::default() }
    }

    /// How the `write`-th of the writes is torn, if it is.
    pub fn tear(&self, write: usize) -> Option<Kept> {
        self.torn.iter().find(|tear| tear.write == write).map(|tear| tear.kept)
    }

    /// Without what a name need not say.
    pub fn trimmed(mut self) -> StateName {
        let used = self.applied.iter().rposition(|applied| *applied).map_or(0, |last| last + 1);
        self.applied.truncate(used);
        self
    }
}

impl fmt::Display for StateName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "E{}", self.prefix)?;
        if !self.applied.is_empty() {
            f.write_str(":s=")?;
            for applied in &self.applied {
                f.write_str(if *applied { "1" } else { "0" })?;
            }
        }
        for tear in &self.torn {
            match tear.kept {
                Kept::First(len) => write!(f, ",torn={}@{len}", tear.write + 1)?,
                Kept::Last(len) => write!(f, ",torn={}@-{len}", tear.write + 1)?,
            }
        }
        Ok(())
    }
}

impl FromStr for StateName {
    type Err = Error;

    /// # Errors
    /// Says which part of the name breaks the grammar.
    fn from_str(text: &str) -> Result<StateName> {
        let bad = |what: &str| {
            Error::invalid(format!(
                "'{text}' is not the name of a crash state: {what} (names are like E412, \
                 E412:s=01101 or E412:s=01101,torn=3@512)"
            ))
        };
        let (prefix, rest) = match text.split_once(':') {
            Some((prefix, rest)) => (prefix, Some(rest)),
            None => (text, None),
        };
        let number = prefix.strip_prefix('E').ok_or_else(|| bad("it does not begin with E"))?;
        let prefix = parse_number(number)
            .ok_or_else(|| bad("after E, the number of an entry is expected"))?;
        let mut name = StateName::prefix(prefix);
        let Some(rest) = rest else { return Ok(name) };
        let mut parts = rest.split(',');
        let bits = parts.next().and_then(|part| part.strip_prefix("s="));
        let bits = bits.filter(|bits| !bits.is_empty()).ok_or_else(|| bad("s=BITS must follow"))?;
        for bit in bits.chars() {
            name.applied.push(match bit {
                '0' => false,
                '1' => true,
                _ => return Err(bad("the bits after s= are 0 or 1")),
            });
        }
        for part in parts {
            let tear = part.strip_prefix("torn=").and_then(parse_tear);
            let tear = tear.ok_or_else(|| bad("a tear is torn=K@BYTES or torn=K@-BYTES"))?;
            if tear.kept.is_empty() || !tear.kept.len().is_multiple_of(SECTOR_SIZE) {
                return Err(bad("the bytes of a tear are a multiple of 512"));
            }
            if name.applied.get(tear.write) != Some(&true) {
                return Err(bad("only a write whose bit is 1 can be torn"));
            }
            if name.tear(tear.write).is_some() {
                return Err(bad("a write is torn twice"));
            }
            name.torn.push(tear);
        }
        name.torn.sort_by_key(|tear| tear.write);
        Ok(name)
    }
}

/// Plain digits; no sign and no leading zeros, so that a number has one spelling.
fn parse_number(text: &str) -> Option<u64> {
    let plain = text.bytes().all(|byte| byte.is_ascii_digit());
    let one_spelling = text == "0" || !text.starts_with('0');
    (plain && one_spelling).then(|| text.parse().ok()).flatten()
}

fn parse_tear(text: &str) -> Option<Tear> {
    let (write, kept) = text.split_once('@')?;
    let write = usize::try_from(parse_number(write)?.checked_sub(1)?).ok()?;
    let kept = match kept.strip_prefix('-') {
        Some(len) => Kept::Last(parse_number(len)?),
        None => Kept::First(parse_number(kept)?),
    };
    Some(Tear { write, kept })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways() {
        for text in ["E0", "E412", "E412:s=01101", "E7:s=11,torn=1@512,torn=2@-4096"] {
            assert_eq!(text.parse::<StateName>().unwrap().to_string(), text);
        }
        let name: StateName = "E7:s=11,torn=2@512,torn=1@-512".parse().unwrap();
        assert_eq!(name.to_string(), "E7:s=11,torn=1@-512,torn=2@512");
        assert_eq!(name.tear(0), Some(Kept::Last(512)));
        let name: StateName = "E7:s=0100".parse().unwrap();
        assert_eq!(name.trimmed().to_string(), "E7:s=01");
    }

    #[test]
    fn what_breaks_the_grammar_is_said() {
        for (text, what) in [
            ("", "does not begin with E"),
            ("412", "does not begin with E"),
            ("E", "number of an entry"),
            ("E-1", "number of an entry"),
            ("E+1", "number of an entry"),
            ("E01", "number of an entry"),
            ("E99999999999999999999", "number of an entry"),
            ("E1:", "s=BITS"),
            ("E1:s=", "s=BITS"),
            ("E1:torn=1@512", "s=BITS"),
            ("E1:s=012", "0 or 1"),
            ("E1:s=1,", "a tear is"),
            ("E1:s=1,torn=0@512", "a tear is"),
            ("E1:s=1,torn=1", "a tear is"),
            ("E1:s=1,torn=1@0", "multiple of 512"),
            ("E1:s=1,torn=1@100", "multiple of 512"),
            ("E1:s=01,torn=1@512", "whose bit is 1"),
            ("E1:s=1,torn=2@512", "whose bit is 1"),
            ("E1:s=1,torn=1@512,torn=1@-512", "torn twice"),
        ] {
            let err = text.parse::<StateName>().unwrap_err().to_string();
            assert!(err.contains(what), "{text}: {err}");
        }
    }
}
