//! Where log lines go: stderr, as plain text or JSON.
//!
//! Plain lines are `time level target: message key=value …`, greppable and without colours unless
//! stderr is a terminal. The level comes from `--log-level`, else from the environment variable
//! `VUBLK_LOG`, else from the command. Either is a level (`info`), or a list of levels by part of
//! the program (`warn,vublk::device=debug`).

use std::io::{IsTerminal, Write};

use clap::{Args, ValueEnum};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;

use crate::error::{Error, Result};

/// The environment variable that sets the level.
pub const ENV: &str = "VUBLK_LOG";

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Plain text.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Options of every command.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Log options")]
pub struct LogArgs {
    /// What to log on stderr: off, error, warn, info, debug, trace, or a list by part of the
    /// program (warn,vublk::device=debug); the environment variable VUBLK_LOG does the same
    #[arg(long, global = true, value_name = "LEVEL")]
    pub log_level: Option<String>,
    /// How log lines look
    #[arg(long, global = true, value_enum, default_value_t, value_name = "FORMAT")]
    pub log_format: LogFormat,
}

/// Starts logging; `default` is the level if nobody says otherwise. A command that `ends_with_error` tells
/// by that what has failed.
///
/// # Errors
/// If the level makes no sense.
pub fn init(args: &LogArgs, default: LevelFilter, ends_with_error: bool) -> Result<()> {
    let from_env = std::env::var(ENV).ok().filter(|text| !text.is_empty());
    let mut targets = match (&args.log_level, &from_env) {
        (Some(text), _) => parse_level("--log-level", text)?,
        (None, Some(text)) => parse_level(ENV, text)?,
        (None, None) => with_default(Targets::new(), default),
    };
    if ends_with_error {
        targets = without_unfinished(targets);
    }
    let layer = tracing_subscriber::fmt::layer()
        .with_writer(|| OneLine(std::io::stderr()))
        .with_ansi(std::io::stderr().is_terminal());
    let registry = tracing_subscriber::registry();
    // Fails only if something was set before, which a test in this process may have done.
    let _ = match args.log_format {
        LogFormat::Text => {
            tracing::subscriber::set_global_default(registry.with(layer.with_filter(targets)))
        }
        LogFormat::Json => tracing::subscriber::set_global_default(
            registry.with(layer.json().with_filter(targets)),
        ),
    };
    Ok(())
}

/// Has each event stay one line: names in it come from images and clients, and may hold anything. Events
/// are written whole, and other commands to a terminal are taken out of them before.
struct OneLine<W>(W);

impl<W: Write> Write for OneLine<W> {
    fn write(&mut self, event: &[u8]) -> std::io::Result<usize> {
        let line = event.strip_suffix(b"\n").unwrap_or(event);
        if !line.iter().any(|byte| b"\n\r".contains(byte)) {
            return self.0.write(event);
        }
        let mut escaped = Vec::with_capacity(event.len() + 16);
        for byte in line {
            match byte {
                b'\n' => escaped.extend(b"\\n"),
                b'\r' => escaped.extend(b"\\r"),
                byte => escaped.push(*byte),
            }
        }
        escaped.extend(&event[line.len()..]);
        self.0.write_all(&escaped).map(|()| event.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}

fn parse_level(origin: &str, text: &str) -> Result<Targets> {
    let bad = || {
        Error::invalid(format!(
            "{origin}: '{text}' is not a log level (off, error, warn, info, debug, trace, or a \
             list such as warn,vublk::device=debug)"
        ))
    };
    // The parser behind this takes an empty text and numbers, too.
    let level = |text: &str| match text.starts_with(|c: char| c.is_ascii_alphabetic()) {
        true => text.parse::<LevelFilter>().map_err(|_| bad()),
        false => Err(bad()),
    };
    let mut targets = Targets::new();
    let mut default = LevelFilter::WARN;
    for part in text.split(',') {
        match part.split_once('=') {
            Some((target, text)) if !target.is_empty() => {
                targets = targets.with_target(target, level(text)?);
            }
            Some(_) => return Err(bad()),
            None => default = level(part)?,
        }
    }
    Ok(with_default(targets, default))
}

/// Sets the level of what was not named. The warnings of the imago crate tell of clusters that a
/// flush is going to settle; they are for those who debug, or who ask for them by name.
fn with_default(targets: Targets, default: LevelFilter) -> Targets {
    const QUIET: &str = "imago";
    let is_named = targets.iter().any(|(name, _)| name.starts_with(QUIET));
    let targets = match default < LevelFilter::DEBUG && !is_named {
        true => targets.with_target(QUIET, default.min(LevelFilter::ERROR)),
        false => targets,
    };
    targets.with_default(default)
}

/// Without the lines by which the imago crate tells, as an error, of each part of an image that was not
/// written out in the end: that follows from what the command failed of, which is told.
fn without_unfinished(targets: Targets) -> Targets {
    const TELLS: &str = "imago::qcow2::metadata";
    let is_quiet = !targets.would_enable(TELLS, &tracing::Level::WARN);
    let is_named = targets.iter().any(|(name, _)| name.starts_with("imago::"));
    match is_quiet && !is_named {
        true => targets.with_target(TELLS, LevelFilter::OFF),
        false => targets,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_imago_crate_is_quiet_unless_asked() {
        use tracing_subscriber::filter::LevelFilter as Level;
        let warns = |text: &str| {
            let targets = parse_level("--log-level", text).unwrap();
            targets.would_enable("imago::qcow2", &tracing::Level::WARN)
        };
        assert!(!warns("info") && !warns("warn,vublk=debug"));
        assert!(warns("debug") && warns("warn,imago=warn"));
        let targets = with_default(Targets::new(), Level::INFO);
        assert!(targets.would_enable("imago", &tracing::Level::ERROR));
        assert!(targets.would_enable("vublk", &tracing::Level::INFO));
        let targets = with_default(Targets::new(), Level::OFF);
        assert!(!targets.would_enable("imago", &tracing::Level::ERROR));
    }

    #[test]
    fn what_was_not_finished_is_told_to_who_asks() {
        let tells = |text: &str| {
            let targets = without_unfinished(parse_level("--log-level", text).unwrap());
            assert_eq!(
                targets.would_enable("imago::async_lru_cache", &tracing::Level::ERROR),
                text != "off"
            );
            targets.would_enable("imago::qcow2::metadata", &tracing::Level::ERROR)
        };
        assert!(!tells("warn") && !tells("info,vublk=debug") && !tells("off"));
        assert!(tells("debug") && tells("imago=warn") && tells("imago::qcow2=error"));
    }

    #[test]
    fn levels_are_words_or_lists() {
        for text in ["info", "off", "WARN", "warn,vublk::device=debug", "vublk=trace"] {
            parse_level("--log-level", text).unwrap();
        }
        for text in ["", "loud", "vublk=loud", "=info", "info,"] {
            let err = parse_level("--log-level", text).unwrap_err().to_string();
            assert!(err.starts_with("--log-level: '"), "{err}");
        }
    }
}
