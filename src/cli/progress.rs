//! The progress of long work, on stderr.
//!
//! On a terminal `-p` draws a bar. Elsewhere it stays silent, unless forced with
//! `--progress=always`: then a line `(42.00/100%)` is rewritten, as qemu-img does, which programs
//! know how to read.

use std::cell::Cell;
use std::io::{IsTerminal, Write};

use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};

/// When to show progress.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum When {
    /// Not at all.
    #[default]
    Never,
    /// If stderr is a terminal.
    Auto,
    /// Always; as plain text if stderr is no terminal.
    Always,
}

/// The option.
#[derive(Clone, Copy, Debug, Args)]
pub struct ProgressArgs {
    /// Show progress on stderr if it is a terminal; with =always in any case
    #[arg(
        short = 'p', long, value_name = "WHEN", value_enum, num_args = 0..=1, require_equals = true,
        default_value = "never", default_missing_value = "auto", hide_default_value = true
    )]
    pub progress: When,
}

/// Progress through a number of bytes.
#[derive(Debug)]
pub enum Progress {
    /// Shows nothing.
    Silent,
    /// Draws a bar.
    Bar(ProgressBar),
    /// Writes percentages.
    Text {
        /// Bytes in all.
        total: u64,
        /// Bytes done.
        done: Cell<u64>,
        /// What was written last, in hundredths of a percent.
        shown: Cell<u64>,
    },
}

impl Progress {
    /// Progress through `total` bytes of what `label` says.
    pub fn new(args: ProgressArgs, label: &str, total: u64) -> Progress {
        let terminal = std::io::stderr().is_terminal();
        match args.progress {
            When::Auto | When::Always if terminal => {
                let bar = ProgressBar::new(total);
                let template = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
                if let Ok(style) = ProgressStyle::with_template(template) {
                    bar.set_style(style);
                }
                bar.set_message(label.to_string());
                Progress::Bar(bar)
            }
            When::Always => {
                Progress::Text { total, done: Cell::new(0), shown: Cell::new(u64::MAX) }
            }
            _ => Progress::Silent,
        }
    }

    /// Says that `bytes` more are done.
    pub fn advance(&self, bytes: u64) {
        match self {
            Progress::Silent => {}
            Progress::Bar(bar) => bar.inc(bytes),
            Progress::Text { total, done, .. } => {
                done.set(done.get().saturating_add(bytes).min(*total));
                self.write_text();
            }
        }
    }

    /// Says that the work is done.
    pub fn finish(&self) {
        match self {
            Progress::Silent => {}
            Progress::Bar(bar) => bar.finish_and_clear(),
            Progress::Text { total, done, .. } => {
                done.set(*total);
                self.write_text();
                let _ = writeln!(std::io::stderr());
            }
        }
    }

    fn write_text(&self) {
        let Progress::Text { total, done, shown } = self else { return };
        let hundredths = match total {
            0 => 10_000,
            total => (u128::from(done.get()) * 10_000 / u128::from(*total)) as u64,
        };
        if shown.replace(hundredths) != hundredths {
            let mut stderr = std::io::stderr().lock();
            let _ = write!(stderr, "    ({}.{:02}/100%)\r", hundredths / 100, hundredths % 100);
            let _ = stderr.flush();
        }
    }
}

impl Drop for Progress {
    /// A bar that was left in the middle would garble the error message after it.
    fn drop(&mut self) {
        if let Progress::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}
