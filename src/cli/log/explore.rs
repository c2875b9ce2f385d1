//! `vublk log explore`: checks every disk that a power cut could have left.

use std::collections::BTreeSet;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde_json::json;

use crate::block::Node;
use crate::cli::log::guest::{Guest, mailbox_of};
use crate::cli::log::report::{ReportOutput, print_report};
use crate::cli::log::source::{LogFileArgs, PartArgs};
use crate::cli::progress::{ProgressArgs, When};
use crate::cli::serve::Signals;
use crate::cli::serve_args::parse_block_size;
use crate::cli::{DONE, output};
use crate::crash::check::{Bounds, Checker, Verdict, quoted};
use crate::crash::enumerate::{self, Reach};
use crate::crash::explore::{self, Plan, Watch};
use crate::crash::fuse::Reads;
use crate::crash::report::{Report, Subject};
use crate::crash::stage::Stage;
use crate::crash::stop::Stop;
use crate::crash::{History, StateName, orphans};
use crate::error::{Error, Result};
use crate::images::{self, ImageFormat, OpenRequest};
use crate::io::{HostFile, OpenOptions, block_on};
use crate::terminal::printable;
use crate::units::SECTOR_SIZE;
use crate::write_log::{Start, sidecar};

/// How long a checker may take, in seconds, if nobody says.
const TIMEOUT: u64 = 60;
/// Exit code if a state is not good.
const FAILED: u8 = 1;
/// The larger of the blocks that a disk can have.
const LARGE_BLOCK: u64 = 4096;

/// Which states are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum States {
    /// Nothing that was written after a flush is there
    Flush,
    /// Any of the writes between two flushes are there
    Reorder,
    /// And one of them in part: one sector or 4096 bytes of it, or all but that
    Torn,
}

/// Check every disk that a power cut could have left (exit code 1 if one is not good)
#[derive(Debug, Args)]
pub struct ExploreArgs {
    /// The disk as it was when logging began
    #[arg(long, value_name = "IMAGE")]
    base: PathBuf,
    /// Its format; guessed if not given
    #[arg(short = 'f', long, value_name = "FORMAT")]
    format: Option<ImageFormat>,
    /// ext4, or a command with {} for the path of the disk, which it may write to, {mark} for the
    /// last mark before, and {state} for the state's name; exit code 0 is good. If not given, states are
    /// only counted
    #[arg(long, value_name = "ext4|CMD")]
    check: Option<Checker>,
    /// Have a guest check the states: serve it the disk on SOCKET, another state for each question,
    /// and the mailbox with the questions on SOCKET.mailbox
    #[arg(long, value_name = "SOCKET", conflicts_with_all = ["check", "jobs", "check_alike"])]
    guest: Option<PathBuf>,
    /// Size of the blocks that the guest sees in bytes, 512 or 4096; those of the disk that was logged
    /// if not given, as far as log and base tell
    #[arg(long, value_name = "BYTES", requires = "guest", value_parser = parse_block_size)]
    block_size: Option<u64>,
    /// Check this state and no other
    #[arg(long, value_name = "NAME")]
    state: Option<StateName>,
    /// Which states
    #[arg(long, value_enum, value_name = "KIND", value_delimiter = ',',
          default_values_t = [States::Flush, States::Reorder])]
    states: Vec<States>,
    /// Where writes are torn, a power of two; a sector of the log and 4096 if not given. For a log whose
    /// sectors are larger than those of its disk
    #[arg(long, value_name = "BYTES", value_delimiter = ',', value_parser = tear_size)]
    torn_at: Vec<u64>,
    /// All subsets of up to N writes between two flushes; of more, chosen ones only
    #[arg(long, value_name = "N", default_value_t = 16,
          value_parser = clap::value_parser!(u32).range(0..=30))]
    all_subsets: u32,
    /// Random subsets of more writes than that
    #[arg(long, value_name = "N", default_value_t = 1000)]
    samples: u64,
    /// What the random subsets depend on
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// How many checkers run at a time; one for each CPU if not given
    #[arg(short = 'j', long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    jobs: Option<u16>,
    /// A checker that takes longer is killed, and the state is not good
    #[arg(long, value_name = "SECONDS", default_value_t = TIMEOUT,
          value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,
    /// Check states, too, that differ from a good one only where the checker did not look; for a
    /// checker that does not always do the same on the same disk
    #[arg(long, requires = "check")]
    check_alike: bool,
    /// End after N states that are not good
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    stop_after: Option<u64>,
    /// Keep the results in this file, and continue from it if it is there
    #[arg(long, value_name = "FILE")]
    results: Option<PathBuf>,
    /// The log's sidecar, which knows in which order requests were submitted and completed;
    /// LOG.sidecar if that exists
    #[arg(long, value_name = "FILE")]
    sidecar: Option<PathBuf>,
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    output: ReportOutput,
    #[command(flatten)]
    part: PartArgs,
    #[command(flatten)]
    progress: ProgressArgs,
    #[command(flatten)]
    log: LogFileArgs,
}

pub fn run(args: &ExploreArgs) -> Result<u8> {
    // Before any thread exists: signals are for this one.
    let stop = stop_on_signals(Signals::block()?)?;
    orphans::adopt()?;
    let log = args.log.open()?;
    let request = OpenRequest::read(&args.base).format(args.format);
    let base = images::open(&request)?;
    let mut history = History::read(log, base.node.size())?;
    learn_order(args, &mut history);
    let part = part(args, &history)?;
    if !args.torn_at.is_empty() && !args.states.contains(&States::Torn) {
        return Err(Error::invalid("--torn-at wants --states torn"));
    }
    // Nothing behind the part has happened, and all before it has.
    let history = Arc::new(history.up_to(part.end).since(part.start));
    let block_size = args.block_size.unwrap_or_else(|| blocks_of(&history, &base.node));
    let plan = plan(args, &history, block_size);
    if let Some(name) = &args.state {
        let Some(checker) = &plan.checker else {
            return Err(Error::invalid("--state wants a checker: --check, or --guest"));
        };
        let new = || Stage::new(&history, &base.node, 1, Reads::Unknown);
        let stage = invite(args, &request, block_size, &history, &stop, new)?;
        let Some(stage) = stage else { return Ok(FAILED) };
        return check_one(args, &history, stage, name, checker, &stop);
    }
    if explore::count(&history, &plan) == 0 {
        let name = history.log().name();
        return Err(Error::invalid(format!("{name}: has no states in what the options choose")));
    }
    let subject = subject(args, &history, base.node.size());
    let mut report = match &plan.results {
        Some(path) if path.exists() => resume(path, &subject, explore::count(&history, &plan))?,
        _ => Report::new(subject),
    };
    if report.finished {
        tracing::info!("all states were explored by an earlier run, whose results are told again");
        print_report(&report, args.output)?;
        return Ok(exit_code(&report));
    }
    let workers = if plan.checker.is_some() { plan.workers } else { 0 };
    let mut teller = Teller { progress: args.progress.progress };
    let new = || Stage::new(&history, &base.node, workers, plan.reads());
    let stage = invite(args, &request, block_size, &history, &stop, new)?;
    let Some(mut stage) = stage else { return Ok(FAILED) };
    if plan.checker.is_some() {
        teller.say(&stage.how);
    }
    let result =
        explore::explore(&history, &base.node, &plan, &mut report, &mut stage, &mut teller, &stop);
    teller.end();
    drop(stage);
    // What has ended it may have come after hours, and what was found is not less true for that.
    let is_worth_telling = result.is_ok() || report.done > 0 || !report.failures.is_empty();
    let told = if is_worth_telling { print_report(&report, args.output) } else { Ok(()) };
    result.and(told)?;
    Ok(exit_code(&report))
}

/// The stage of a guest, for which this waits as long as it takes, or else `without` one. `None` if the
/// operator does not want to wait any longer.
fn invite(
    args: &ExploreArgs,
    base: &OpenRequest,
    block_size: u64,
    history: &Arc<History>,
    stop: &Stop,
    without: impl FnOnce() -> Result<Stage>,
) -> Result<Option<Stage>> {
    let Some(socket) = &args.guest else { return without().map(Some) };
    let guest = Guest::serve(socket, Path::new(history.log().name()), base, block_size)?;
    let (disk, mailbox) = (socket.display(), mailbox_of(socket));
    // Without this nobody would know what there is to do.
    let _ = writeln!(std::io::stderr(), "waiting for a guest on {disk} and {}", mailbox.display());
    let is_there = guest.wait(Bounds { limit: Duration::MAX, stop });
    Ok(is_there.then(|| Stage::of_guest(history, Box::new(guest))))
}

/// The size of the blocks of the disk that was logged, as far as a guest can be shown it: the log's
/// sectors are no smaller.
fn blocks_of(history: &History, base: &Node) -> u64 {
    let at_least = history.log().sector_size().max(base.limits().request_alignment);
    let fits = base.size().is_multiple_of(LARGE_BLOCK);
    if at_least >= LARGE_BLOCK && fits { LARGE_BLOCK } else { SECTOR_SIZE }
}

fn exit_code(report: &Report) -> u8 {
    if report.failed > 0 || !report.finished { FAILED } else { DONE }
}

fn plan(args: &ExploreArgs, history: &History, block_size: u64) -> Plan {
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get());
    let states: BTreeSet<_> = args.states.iter().copied().collect();
    Plan {
        reach: Reach {
            reorder: states.contains(&States::Reorder),
            torn: tears(args, history),
            all_subsets: args.all_subsets,
            samples: args.samples,
            seed: args.seed,
        },
        checker: checker(args),
        workers: args.jobs.map_or(cpus, usize::from),
        limit: Duration::from_secs(args.timeout),
        check_alike: args.check_alike,
        stop_after: args.stop_after,
        results: args.results.clone(),
        again: again(args, history),
        serve: serve(args, history, block_size),
        sidecar: sidecar_of(args, history),
    }
}

/// Where writes are torn, as [`Reach`] has it.
fn tears(args: &ExploreArgs, history: &History) -> u64 {
    match (args.states.contains(&States::Torn), &args.torn_at[..]) {
        (false, _) => 0,
        (true, []) => enumerate::usual_tears(history),
        (true, sizes) => sizes.iter().fold(0, |all, size| all | size),
    }
}

fn tear_size(text: &str) -> std::result::Result<u64, String> {
    const MOST: u64 = 1 << 20;
    let size = text.parse().ok().filter(|n: &u64| n.is_power_of_two() && *n <= MOST);
    size.filter(|size| *size >= SECTOR_SIZE)
        .ok_or_else(|| format!("a power of two from {SECTOR_SIZE} to {MOST} is expected"))
}

/// Who checks.
fn checker(args: &ExploreArgs) -> Option<Checker> {
    args.check.clone().or(args.guest.is_some().then_some(Checker::Guest))
}

/// The entries that the options choose: the power fails when those before them are there, and no
/// later than the last of them.
fn part(args: &ExploreArgs, history: &History) -> Result<std::ops::Range<u64>> {
    let index = history.index();
    let start = match args.part.start() {
        Start::Entry(number) => number,
        Start::AfterMark(text) => {
            let mark = index.marks().iter().find(|(_, mark)| mark.0 == text.as_bytes());
            mark.map(|(number, _)| number + 1).ok_or_else(|| history.log().no_mark(&text))?
        }
    };
    let stop = args.part.stop();
    let no_mark = crate::write_log::Mark(Vec::new());
    for (count, number) in (start..history.len()).enumerate() {
        let at = index.marks().binary_search_by_key(&number, |(number, _)| *number);
        let mark = at.map_or(&no_mark, |i| &index.marks()[i].1);
        if stop.at(history.entry(number), mark, count as u64 + 1).is_some() {
            return Ok(start..number + 1);
        }
    }
    match &stop.end_mark {
        Some(text) => Err(history.log().no_mark(text)),
        None => Ok(start..history.len()),
    }
}

fn subject(args: &ExploreArgs, history: &History, size: u64) -> Subject {
    let states: BTreeSet<_> = args.states.iter().map(|states| format!("{states:?}")).collect();
    Subject {
        log: history.log().name().into(),
        entries: history.log().entries(),
        base: args.base.display().to_string(),
        size,
        check: checker(args).as_ref().map(ToString::to_string).unwrap_or_default(),
        options: format!(
            "{states:?} all-subsets={} samples={} seed={} part={:?}{}{}{}",
            args.all_subsets,
            args.samples,
            args.seed,
            args.part,
            if args.check_alike { " check-alike" } else { "" },
            if history.knows_order() { " order" } else { "" },
            match tears(args, history) {
                0 => String::new(),
                sizes => format!(" torn={sizes}"),
            }
        ),
        changed: (changed(history.log().name().as_ref()), changed(&args.base)),
    }
}

/// When a file was last changed; 0 if it does not say.
fn changed(path: &Path) -> i64 {
    use std::os::unix::fs::MetadataExt;
    let meta = std::fs::metadata(path);
    meta.map_or(0, |meta| meta.mtime() * 1_000_000_000 + meta.mtime_nsec())
}

/// What an earlier run has found of `states` states.
fn resume(path: &Path, subject: &Subject, states: u64) -> Result<Report> {
    let report = Report::load(path)?;
    if report.subject != *subject {
        return Err(Error::invalid(format!(
            "{}: holds the results of another exploration{} (log {}, {} entries, base {}, check \
             '{}', {}); give another file, or remove it",
            path.display(),
            if report.subject.changed == subject.changed {
                ""
            } else {
                ", as log or base were changed since"
            },
            report.subject.log,
            report.subject.entries,
            report.subject.base,
            report.subject.check,
            report.subject.options
        )));
    }
    if !report.adds_up(states) {
        return Err(Error::corrupt(format!(
            "{}: its numbers do not add up, and states would be left out; remove it",
            path.display()
        )));
    }
    Ok(report)
}

/// The command line that checks one state; its name is put at the end.
fn again(args: &ExploreArgs, history: &History) -> String {
    let check = match (&args.check, &args.guest) {
        (None, Some(socket)) => {
            let blocks = args.block_size.map(|size| format!(" --block-size {size}"));
            let socket = quoted(&socket.display().to_string());
            format!("--guest {socket}{}", blocks.unwrap_or_default())
        }
        (check, _) => {
            let check = check.as_ref().map(ToString::to_string).unwrap_or_default();
            format!("--check {}", quoted(&check))
        }
    };
    let timeout = match args.timeout {
        TIMEOUT => String::new(),
        seconds => format!(" --timeout {seconds}"),
    };
    // The last mark is one of those that had been made.
    let limit = match history.len() {
        all if all == history.log().entries() => String::new(),
        some => format!(" --limit {some}"),
    };
    format!("vublk log explore {} {check}{timeout}{limit} --state ", log_and_base(args, history))
}

/// The command line that serves one state to a guest; its name is put at the end.
fn serve(args: &ExploreArgs, history: &History, block_size: u64) -> String {
    let socket = "--socket-path /tmp/crash.sock";
    let blocks = match block_size {
        SECTOR_SIZE => String::new(),
        size => format!(" --block-size {size}"),
    };
    format!("vublk serve {socket} {}{blocks} --state ", log_and_base(args, history))
}

/// Log and base as options that mean the same in any directory.
fn log_and_base(args: &ExploreArgs, history: &History) -> String {
    let path = |path: &Path| {
        let full = std::fs::canonicalize(path).unwrap_or_else(|_| path.into());
        quoted(&full.display().to_string())
    };
    let format = args.format.map(|format| format!(" -f {format}")).unwrap_or_default();
    format!("--log {} --base {}{format}", path(Path::new(history.log().name())), path(&args.base))
}

/// Tells a history what the log's sidecar knows of the order of its requests. One that cannot be read is
/// told of in a report that wants it.
fn learn_order(args: &ExploreArgs, history: &mut History) {
    let Some(path) = sidecar_of(args, history) else { return };
    let learnt = HostFile::open(&path, OpenOptions::default())
        .and_then(|file| block_on(sidecar::Sidecar::open(Arc::new(file))))
        .and_then(|mut sidecar| history.learn_order(&mut sidecar));
    if let Err(err) = learnt {
        tracing::debug!("the order of requests is not known: {err}");
    }
}

/// The sidecar that was named, or the one beside the log if it is there.
fn sidecar_of(args: &ExploreArgs, history: &History) -> Option<PathBuf> {
    let beside = || sidecar::default_path(Path::new(history.log().name()));
    args.sidecar.clone().or_else(|| Some(beside()).filter(|path| path.exists()))
}

fn check_one(
    args: &ExploreArgs,
    history: &History,
    mut stage: Stage,
    name: &StateName,
    checker: &Checker,
    stop: &Stop,
) -> Result<u8> {
    let (_, full) = history.expanded(name)?;
    let bounds = Bounds { limit: Duration::from_secs(args.timeout), stop };
    let (verdict, printed) = stage.check(&full, checker, bounds)?;
    let how = match &verdict {
        Verdict::Good => "good".to_string(),
        Verdict::Bad(how) => how.clone(),
    };
    let good = verdict == Verdict::Good;
    match args.output {
        ReportOutput::Human => {
            let printed: String = printed.lines().map(|line| printable(line) + "\n").collect();
            output::print(&format!("{printed}{name}: {how}\n"))?;
        }
        _ => output::print_json(&json!({
            "state": name.to_string(), "good": good, "verdict": how, "output": printed,
        }))?,
    }
    Ok(if good { DONE } else { FAILED })
}

/// Has Ctrl-C and SIGTERM end what is under way. A second one kills.
fn stop_on_signals(signals: Signals) -> Result<Arc<Stop>> {
    let stop = Arc::new(Stop::new()?);
    let asked = Arc::clone(&stop);
    std::thread::spawn(move || {
        while !matches!(signals.wait(), libc::SIGINT | libc::SIGTERM) {}
        asked.ask();
        signals.let_the_next_one_kill();
        // This thread is the one that it is for.
        loop {
            std::thread::park();
        }
    });
    Ok(stop)
}

/// Tells the operator how it goes.
struct Teller {
    progress: When,
}

impl Teller {
    fn shows(&self) -> bool {
        match self.progress {
            When::Never => false,
            When::Auto => std::io::stderr().is_terminal(),
            When::Always => true,
        }
    }

    fn say(&self, text: &str) {
        if self.shows() {
            let _ = writeln!(std::io::stderr(), "{text}");
        }
    }

    fn end(&self) {
        self.say("");
    }
}

impl Watch for Teller {
    fn progress(&mut self, report: &Report) {
        if !self.shows() {
            return;
        }
        let left = report.states.saturating_sub(report.done) as f64;
        let rate = report.covered_per_second().max(0.001);
        let mut stderr = std::io::stderr().lock();
        let _ = write!(
            stderr,
            "    {}/{} states, {:.0}/s, {} duplicates, {} alike, {} failed, {:.0} s left    \r",
            report.done,
            report.states,
            rate,
            report.duplicates,
            report.alike,
            report.failed,
            left / rate
        );
        let _ = stderr.flush();
    }
}
