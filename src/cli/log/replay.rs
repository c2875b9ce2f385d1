//! `vublk log replay`: makes a disk what it was at some point of a log.
//!
//! ```text
//! survey   the headers of the part: does it end where it should, does it fit the target?
//! apply    the entries in order; after some of them: flush, run the checker, stop if it fails
//! flush
//! ```
//!
//! The survey comes first so that nothing is written when the log is damaged, a mark is missing or
//! the target is too small.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::str::FromStr;

use clap::Args;
use serde_json::json;

use crate::block::Node;
use crate::cli::log::apply::Replayer;
use crate::cli::log::find::find_and_print;
use crate::cli::log::source::{LogFileArgs, PartArgs};
use crate::cli::options::Output;
use crate::cli::progress::{Progress, ProgressArgs};
use crate::cli::{DONE, output};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::images::{self, CacheMode, Image, ImageFormat, OpenRequest};
use crate::io::block_on;
use crate::write_log::{Entry, Flags, Kind, Log, Stopped, Walk};

/// Apply the entries of a log to a disk; options are those of replay-log
#[derive(Debug, Args)]
pub struct ReplayArgs {
    /// The disk to write to: a file, a block device or an image of any format. It must exist, be
    /// as large as the log's disk, and hold what that held when the log began
    #[arg(long, value_name = "TARGET")]
    replay: Option<PathBuf>,
    /// Format of the target; guessed from its first bytes if not given
    #[arg(short = 'f', long = "format", value_name = "FORMAT", requires = "replay")]
    format: Option<ImageFormat>,
    /// How the target is cached: writeback, none, or unsafe (no flush at the end)
    #[arg(short = 't', long, value_name = "MODE", default_value_t, hide_possible_values = true)]
    target_cache: CacheMode,
    #[command(flatten)]
    part: PartArgs,
    /// Leave discards out
    #[arg(long)]
    no_discard: bool,
    /// Leave out writes that lie wholly before this sector
    #[arg(long, value_name = "SECTOR")]
    start_sector: Option<u64>,
    /// Leave out writes that begin after this sector
    #[arg(long, value_name = "SECTOR")]
    end_sector: Option<u64>,
    /// Run the --fsck command after each flush, fua, discard or mark, or after every N-th entry
    #[arg(long, value_name = "N|flush|fua|discard|mark", requires = "fsck")]
    check: Option<Check>,
    /// The command that checks the disk; any exit code but 0 ends the replay with an error
    #[arg(long, value_name = "CMD", requires = "check")]
    fsck: Option<String>,
    /// Write nothing; print ENTRY@SECTOR of the entry at which the part ends, as `find` does
    #[arg(long, conflicts_with_all = ["replay", "num_entries"])]
    find: bool,
    /// Write nothing; print how many entries the log has
    #[arg(long, conflicts_with = "replay")]
    num_entries: bool,
    /// Name each entry that is applied; twice: also those that are left out
    #[arg(short, action = clap::ArgAction::Count)]
    verbose: u8,
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    progress: ProgressArgs,
    #[command(flatten)]
    log: LogFileArgs,
}

/// When the checker runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Check {
    /// After every n-th entry.
    Every(u64),
    /// After each entry with this flag.
    Flag(Flags),
}

impl FromStr for Check {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "flush" => Ok(Check::Flag(Flags::FLUSH)),
            "fua" => Ok(Check::Flag(Flags::FUA)),
            "discard" => Ok(Check::Flag(Flags::DISCARD)),
            "mark" => Ok(Check::Flag(Flags::MARK)),
            number => match number.parse() {
                Ok(0) | Err(_) => {
                    Err("a number from 1, or one of flush, fua, discard, mark is expected".into())
                }
                Ok(n) => Ok(Check::Every(n)),
            },
        }
    }
}

impl Check {
    fn is_due(self, entry: &Entry, count: u64) -> bool {
        match self {
            Check::Every(n) => count.is_multiple_of(n),
            Check::Flag(flag) => entry.flags.has(flag),
        }
    }
}

pub fn run(args: &ReplayArgs) -> Result<u8> {
    let log = args.log.open()?;
    if args.num_entries {
        output::print(&format!("{}\n", log.entries()))?;
    } else if args.find {
        return find_and_print(&log, &args.part, args.output);
    } else if let Some(target) = &args.replay {
        Replay { args, log: &log, path: target, is_heard: Cell::new(true) }.run()?;
    } else {
        let (sector_size, entries) = (log.sector_size(), log.entries());
        let line = format!("Log version=1, sectorsize={sector_size}, entries={entries}\n");
        output::print(&line)?;
    }
    Ok(DONE)
}

/// A replay of a part of a log.
struct Replay<'a> {
    args: &'a ReplayArgs,
    log: &'a Log,
    /// Where to.
    path: &'a Path,
    /// Whether somebody still reads which entries are applied. If not, the replay goes on: half of it
    /// would be no disk that ever was.
    is_heard: Cell<bool>,
}

/// What a part of a log will do to a disk.
#[derive(Clone, Copy, Debug)]
struct Survey {
    entries: u64,
    first: Option<u64>,
    last: Option<u64>,
    stopped: Stopped,
    written_bytes: u64,
    discarded_bytes: u64,
    /// The entry that reaches farthest into the disk.
    farthest: Option<Entry>,
    /// A power of two of which the ends of all that changes the disk are multiples, in bytes.
    unit: u64,
}

impl Replay<'_> {
    fn run(&self) -> Result<()> {
        let survey = block_on(self.survey())?;
        let mut target = Target::open(self.args, self.path)?;
        target.refuse_unfit(self.log, &survey)?;
        let progress = Progress::new(self.args.progress, "replaying", survey.written_bytes);
        let checks = self.apply(&mut target, &survey, &progress)?;
        progress.finish();
        if self.args.output == Output::Json {
            output::print_json(&json!({
                "filename": self.log.name(),
                "target": self.path.display().to_string(),
                "entries": survey.entries,
                "first-entry": survey.first,
                "last-entry": survey.last,
                "stopped-by": survey.stopped.name(),
                "written-bytes": survey.written_bytes,
                "discarded-bytes": survey.discarded_bytes,
                "checks": checks,
            }))?;
        }
        Ok(())
    }

    /// Goes through the part without touching the target.
    async fn survey(&self) -> Result<Survey> {
        let mut survey = Survey {
            entries: 0,
            first: None,
            last: None,
            stopped: Stopped::EndOfLog,
            written_bytes: 0,
            discarded_bytes: 0,
            farthest: None,
            unit: 1 << 63,
        };
        let mut walk = self.log.walk_from(&self.args.part.start()).await?;
        let stop = self.args.part.stop();
        while let Some(entry) = walk.next().await? {
            survey.add(&entry, self.applies(&entry));
            if let Some(why) = stop.at(&entry, walk.mark(), survey.entries) {
                survey.stopped = why;
                break;
            }
        }
        match (&stop.end_mark, survey.stopped) {
            (Some(mark), Stopped::EndOfLog) => Err(self.log.no_mark(mark)),
            _ => Ok(survey),
        }
    }

    /// Whether an entry is to have an effect.
    fn applies(&self, entry: &Entry) -> bool {
        match entry.kind() {
            Kind::Discard => !self.args.no_discard,
            Kind::Write => {
                let last = entry.sector() + entry.sectors() - 1;
                self.args.start_sector.is_none_or(|start| last >= start)
                    && self.args.end_sector.is_none_or(|end| entry.sector() <= end)
            }
            Kind::Flush | Kind::Mark => true,
        }
    }

    /// Applies the part and returns how often the checker ran.
    fn apply(&self, target: &mut Target<'_>, survey: &Survey, progress: &Progress) -> Result<u64> {
        let mut walk = block_on(self.log.walk_from(&self.args.part.start()))?.with_data();
        let (mut count, mut checks) = (0, 0);
        while count < survey.entries {
            let node = target.image()?.node.clone();
            let next =
                self.apply_until_check(&mut walk, node, survey.entries, &mut count, progress);
            if let Some((entry, command)) = block_on(next)? {
                target.check(command, &entry, self.args.output)?;
                checks += 1;
            }
        }
        if !self.args.target_cache.ignores_flush() {
            block_on(target.image()?.node.flush())?;
        }
        target.close()?;
        Ok(checks)
    }

    /// Applies entries up to the `end`th, or until the checker is due: then returns the entry after
    /// which it is, and the checker. `count` is how many entries of the part are done.
    async fn apply_until_check(
        &self,
        walk: &mut Walk<'_>,
        node: Node,
        end: u64,
        count: &mut u64,
        progress: &Progress,
    ) -> Result<Option<(Entry, &str)>> {
        let checker = self.args.check.zip(self.args.fsck.as_deref());
        let mut replayer = Replayer::new(self.log, node, !self.args.target_cache.ignores_flush());
        while *count < end {
            let Some(entry) = walk.next().await? else { break };
            *count += 1;
            let applies = self.applies(&entry);
            self.say(&entry, applies)?;
            if applies {
                replayer.apply(&entry, walk).await?;
                progress.advance(entry.data().map_or(0, |data| data.len));
            }
            if let Some((check, command)) = checker
                && check.is_due(&entry, *count)
            {
                replayer.settle().await?;
                return Ok(Some((entry, command)));
            }
        }
        replayer.settle().await?;
        Ok(None)
    }

    /// Names an entry, if that was asked for.
    fn say(&self, entry: &Entry, applies: bool) -> Result<()> {
        let verb = match (applies, self.args.verbose) {
            (true, 1..) => "replaying",
            (false, 2..) => "skipping",
            _ => return Ok(()),
        };
        if !self.is_heard.get() {
            return Ok(());
        }
        let (number, flags) = (entry.number, entry.flags);
        let is_heard = output::try_print(&format!(
            "{verb} {number}@{}: sector {}, size {}, flags {:#x}({flags})\n",
            entry.data_sector(),
            entry.sector(),
            entry.target.len,
            flags.0
        ))?;
        self.is_heard.set(is_heard);
        Ok(())
    }
}

impl Survey {
    fn add(&mut self, entry: &Entry, applies: bool) {
        self.entries += 1;
        self.first.get_or_insert(entry.number);
        self.last = Some(entry.number);
        if !applies || entry.target.is_empty() {
            return;
        }
        let bytes = match entry.kind() {
            Kind::Write => &mut self.written_bytes,
            _ => &mut self.discarded_bytes,
        };
        *bytes = bytes.saturating_add(entry.target.len);
        for place in [entry.target.offset, entry.target.len] {
            self.unit = self.unit.min(1 << place.trailing_zeros().min(63));
        }
        if self.farthest.is_none_or(|other| other.target.end() < entry.target.end()) {
            self.farthest = Some(*entry);
        }
    }
}

/// The disk that is written to.
struct Target<'a> {
    request: OpenRequest,
    path: &'a Path,
    /// `None` while a checker has it.
    image: Option<Image>,
}

impl<'a> Target<'a> {
    fn open(args: &ReplayArgs, path: &'a Path) -> Result<Target<'a>> {
        let mut request = OpenRequest::write(path).format(args.format).cache(args.target_cache);
        request.node_name = path.display().to_string();
        let image = images::open(&request).map_err(|err| match err.kind() {
            ErrorKind::NotFound => err.context(
                "the target must exist (vublk create -f raw makes one that reads as zeros)",
            ),
            _ => err,
        })?;
        // When it is opened again it is what it is now, whatever was written to it meanwhile.
        request.format = Some(image.format);
        Ok(Target { request, path, image: Some(image) })
    }

    fn image(&self) -> Result<&Image> {
        self.image.as_ref().ok_or_else(|| Error::invalid("the target is closed"))
    }

    /// Refuses a target that is the log, that cannot be written in pieces so small, or that is too small.
    fn refuse_unfit(&self, log: &Log, survey: &Survey) -> Result<()> {
        let image = self.image()?;
        let name = self.path.display();
        if log.file().as_host().map(|file| file.identity()).transpose()?
            == Some(image.file.identity()?)
        {
            return Err(Error::invalid(format!("{name}: is the log itself")));
        }
        let unit = image.node.limits().request_alignment;
        if survey.unit < unit {
            return Err(Error::unsupported(format!(
                "{name}: the host takes direct I/O on it only in units of {unit} bytes, and entries of the \
                 log change {} of them; use -t writeback",
                survey.unit
            )));
        }
        let size = image.node.size();
        match survey.farthest {
            Some(entry) if entry.target.end() > size => Err(Error::new(
                ErrorKind::OutOfRange,
                format!(
                    "{name}: entry {} writes past the end of the target: up to byte {}, and it \
                     has {size} (vublk resize {name} {})",
                    entry.number,
                    entry.target.end(),
                    entry.target.end()
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Runs the checker on what the target holds now.
    fn check(&mut self, command: &str, entry: &Entry, output: Output) -> Result<()> {
        block_on(self.image()?.node.flush())?;
        // The checker may use the image, and change it. The content of a raw one is seen by all who
        // have the file open; of any other format we must know nothing that may be outdated.
        let is_raw = self.image()?.format == ImageFormat::Raw;
        if !is_raw {
            self.close()?;
        }
        let status = run_shell(command, output).context(|| "--fsck")?;
        if !status.success() {
            return Err(Error::new(
                ErrorKind::Io,
                format!("Fsck errored out on entry {} ({status})", entry.number),
            ));
        }
        if !is_raw {
            self.image = Some(images::open(&self.request)?);
        }
        Ok(())
    }

    fn close(&mut self) -> Result<()> {
        match self.image.take() {
            // Nothing to close in a raw one, which may be left unflushed.
            Some(image) if image.format != ImageFormat::Raw => block_on(image.node.close()),
            _ => Ok(()),
        }
    }
}

/// Runs a command line. What it prints goes to stdout, unless that is JSON.
fn run_shell(command: &str, output: Output) -> Result<ExitStatus> {
    let stdout = match output {
        Output::Human => Stdio::inherit(),
        Output::Json => Stdio::from(std::io::stderr()),
    };
    Ok(Command::new("sh").arg("-c").arg(command).stdin(Stdio::null()).stdout(stdout).status()?)
}
