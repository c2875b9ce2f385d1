//! Options that several commands share, and the `key=value,…` grammar of `-o`.

use std::ffi::OsStr;
use std::marker::PhantomData;
use std::path::PathBuf;
use std::str::FromStr;

use clap::builder::{PossibleValue, TypedValueParser, ValueParserFactory};
use clap::{Arg, Args, Command, ValueEnum};

use crate::crash::StateName;
use crate::error::{Error, Result};
use crate::images::crash_state::StateOf;
use crate::images::{CacheMode, ImageFormat, Locking, OpenRequest};

/// How results are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    #[default]
    Human,
    /// For programs; field names are qemu-img's and stay as they are.
    Json,
}

/// A parser for values that have names, which help and completions list. What else can be read is up
/// to the type: the formats that are refused with a way out have names, too.
#[derive(Clone, Debug)]
pub struct Listed<T> {
    names: Vec<&'static str>,
    value: PhantomData<fn() -> T>,
}

impl<T> Listed<T> {
    fn new(names: impl Iterator<Item = &'static str>) -> Listed<T> {
        Listed { names: names.collect(), value: PhantomData }
    }
}

impl<T: FromStr<Err = Error> + Clone + Send + Sync + 'static> TypedValueParser for Listed<T> {
    type Value = T;

    fn parse_ref(
        &self,
        command: &Command,
        arg: Option<&Arg>,
        value: &OsStr,
    ) -> Result<T, clap::Error> {
        T::from_str.parse_ref(command, arg, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(self.names.iter().map(PossibleValue::new)))
    }
}

impl ValueParserFactory for ImageFormat {
    type Parser = Listed<ImageFormat>;

    fn value_parser() -> Self::Parser {
        Listed::new(ImageFormat::SUPPORTED.iter().map(|format| format.name()))
    }
}

impl ValueParserFactory for CacheMode {
    type Parser = Listed<CacheMode>;

    fn value_parser() -> Self::Parser {
        Listed::new(CacheMode::NAMES.iter().map(|(name, _)| *name))
    }
}

/// How an image that is only read is opened.
#[derive(Clone, Debug, Args)]
pub struct ReadArgs {
    /// Format of the image; guessed from its first bytes if not given
    #[arg(short = 'f', long = "format", value_name = "FORMAT")]
    pub format: Option<ImageFormat>,
    /// Look at what is left of a damaged image (vhdx); what is missing is told and reads as zeros
    #[arg(long)]
    salvage: bool,
    #[command(flatten)]
    state: StateArgs,
    #[command(flatten)]
    sharing: SharingArgs,
}

/// A state of a log of writes, in the place of the image, which is its base.
#[derive(Clone, Debug, Default, Args)]
pub struct StateArgs {
    /// Look at a disk that a power cut could have left: a state of this log of writes, of which the
    /// image is the base
    #[arg(long, value_name = "LOG", requires = "state")]
    log: Option<PathBuf>,
    /// The name of the state, as `log explore` prints it (E412:s=01101)
    #[arg(long, value_name = "NAME", requires = "log")]
    state: Option<StateName>,
}

impl StateArgs {
    /// Which state, if one is given.
    pub fn state_of(&self) -> Option<StateOf> {
        Some(StateOf { log: self.log.clone()?, state: self.state.clone()? })
    }
}

/// Who else may use the image, and what it may pull in.
#[derive(Clone, Debug, Args)]
pub struct SharingArgs {
    /// Read the image even while somebody else writes to it; what is read may be out of date or
    /// inconsistent
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// Allow images to pull in files (backing files, data files) from below DIR; their own
    /// directory is always allowed
    #[arg(long = "allow-dir", value_name = "DIR")]
    pub allow_dirs: Vec<PathBuf>,
}

impl SharingArgs {
    /// A request to read `path`.
    pub fn request(&self, path: &std::path::Path, format: Option<ImageFormat>) -> OpenRequest {
        let locking = if self.force_share { Locking::Share } else { Locking::Guard };
        OpenRequest {
            may_share: true,
            ..OpenRequest::read(path).format(format).locking(locking).allow_dirs(&self.allow_dirs)
        }
    }
}

impl ReadArgs {
    /// A request to read `path`.
    pub fn request(&self, path: &std::path::Path) -> OpenRequest {
        OpenRequest {
            salvage: self.salvage,
            state: self.state.state_of(),
            ..self.sharing.request(path, self.format)
        }
    }
}

/// Parses `-o key=value,key=value`. A doubled comma stands for a comma inside of a value; a key
/// without a value is `on`.
pub fn parse_options(texts: &[String]) -> Result<Vec<(String, String)>> {
    let mut options: Vec<(String, String)> = Vec::new();
    for text in texts {
        for part in split_commas(text) {
            let (key, value) = part.split_once('=').unwrap_or((&part, "on"));
            if key.is_empty() {
                return Err(Error::invalid(format!(
                    "-o {text}: an option has no name (key=value,key=value is expected)"
                )));
            }
            // The last one wins, as in QEMU.
            options.retain(|(known, _)| known != key);
            options.push((key.to_string(), value.to_string()));
        }
    }
    Ok(options)
}

/// Splits at single commas; a pair of them is one comma of the text.
fn split_commas(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            ',' if chars.peek() == Some(&',') => {
                chars.next();
                parts.last_mut().expect("never empty").push(',');
            }
            ',' => parts.push(String::new()),
            c => parts.last_mut().expect("never empty").push(c),
        }
    }
    parts
}

/// Takes an option out of a list.
pub fn take_option(options: &mut Vec<(String, String)>, key: &str) -> Option<String> {
    let at = options.iter().position(|(name, _)| name == key)?;
    Some(options.remove(at).1)
}

/// Whether `-o help` (or `?`) was asked for.
pub fn is_help(texts: &[String]) -> bool {
    texts.iter().any(|text| matches!(text.as_str(), "help" | "?"))
}

/// The text for `-o help`, with the options of the format that `is_taken` says are.
pub fn options_help(format: ImageFormat, is_taken: impl Fn(&str) -> bool) -> String {
    let mut text = format!("Supported {format} options:\n");
    let options = crate::images::create::options(format);
    for (name, meaning) in options.iter().filter(|(name, _)| is_taken(name)) {
        text += &format!("  {name}=<value> - {meaning}\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Vec<(String, String)> {
        parse_options(&[text.to_string()]).unwrap()
    }

    #[test]
    fn options_are_split_at_single_commas() {
        let pair = |k: &str, v: &str| (k.to_string(), v.to_string());
        assert_eq!(parse("size=1G"), [pair("size", "1G")]);
        assert_eq!(parse("a=1,b=x=y,c"), [pair("a", "1"), pair("b", "x=y"), pair("c", "on")]);
        assert_eq!(parse("file=a,,b,c=1"), [pair("file", "a,b"), pair("c", "1")]);
        assert_eq!(parse("a=1,a=2"), [pair("a", "2")]);
        assert_eq!(parse("a="), [pair("a", "")]);
    }

    #[test]
    fn options_without_a_name_are_refused() {
        for text in ["", "=1", "a=1,", ",a=1"] {
            assert!(parse_options(&[text.to_string()]).is_err(), "{text}");
        }
    }

    #[test]
    fn taking_removes() {
        let mut options = parse("a=1,b=2");
        assert_eq!(take_option(&mut options, "a").as_deref(), Some("1"));
        assert_eq!(take_option(&mut options, "a"), None);
        assert_eq!(options.len(), 1);
    }
}
