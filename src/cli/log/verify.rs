//! `vublk log verify`: whether a log is sound.
//!
//! Every entry is checked against the format's rules, and against its record where there is a
//! sidecar: the CRC of header and data (zeros are read, as no CRC covers them), and the order of
//! completions. It also says what other programs would not take.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use serde_json::{Value, json};

use crate::cli::log::source::LogFileArgs;
use crate::cli::options::Output;
use crate::cli::progress::{Progress, ProgressArgs};
use crate::cli::{DONE, output};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::io::{HostFile, OpenOptions, block_on};
use crate::units::ByteRange;
use crate::write_log::sidecar::{self, Record, RecordState, Sidecar, Slot};
use crate::write_log::{Entry, Flags, Kind, Log};

/// The log is damaged.
const DAMAGED: u8 = 2;
/// So many findings of one kind are printed.
const MOST_PRINTED: usize = 20;

/// Check a log: every entry, and its CRC where a sidecar has one (exit code 2: damaged)
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// The log's sidecar; LOG.sidecar if that exists
    #[arg(long, value_name = "FILE")]
    sidecar: Option<PathBuf>,
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    progress: ProgressArgs,
    #[command(flatten)]
    log: LogFileArgs,
}

/// What was found.
#[derive(Debug, Default)]
struct Findings {
    /// Entries that are sound.
    entries: u64,
    /// Of these, those with a record that agrees.
    with_record: u64,
    /// Entry and what is wrong with it.
    damage: Vec<(u64, String)>,
    /// What other programs would not take.
    notes: Vec<String>,
    /// Entries behind the count that are whole.
    uncounted: u64,
}

pub fn run(args: &VerifyArgs) -> Result<u8> {
    let log = args.log.open()?;
    let mut sidecar = open_sidecar(args, &log)?;
    let progress = Progress::new(args.progress, "verifying", log.file_len());
    let findings = block_on(verify(&log, sidecar.as_mut(), &progress))?;
    progress.finish();
    match args.output {
        Output::Human => output::print(&human(&log, sidecar.is_some(), &findings))?,
        Output::Json => output::print_json(&json!({
            "filename": log.name(),
            "sidecar": sidecar.as_ref().map(|sidecar| sidecar.name().to_string()),
            "counted-entries": log.entries(),
            "sound-entries": findings.entries,
            "entries-with-record": findings.with_record,
            "uncounted-entries": findings.uncounted,
            "damage": findings.damage.iter().map(|(entry, what)| {
                json!({ "entry": entry, "what": what })
            }).collect::<Vec<Value>>(),
            "notes": findings.notes,
        }))?,
    }
    Ok(if findings.damage.is_empty() { DONE } else { DAMAGED })
}

/// The sidecar that was named, or the one beside the log if it is there.
fn open_sidecar(args: &VerifyArgs, log: &Log) -> Result<Option<Sidecar>> {
    let beside = || log.file().as_host().map(|file| sidecar::default_path(file.path()));
    let Some(path) = args.sidecar.clone().or_else(beside) else { return Ok(None) };
    let file = match HostFile::open(&path, OpenOptions::default()) {
        Err(err) if err.kind() == ErrorKind::NotFound && args.sidecar.is_none() => return Ok(None),
        other => other?,
    };
    let sidecar = block_on(Sidecar::open(Arc::new(file)))?;
    if u64::from(sidecar.header().sector_size) != log.sector_size() {
        return Err(Error::invalid(format!(
            "{}: is not the sidecar of {} (another sector size)",
            sidecar.name(),
            log.name()
        )));
    }
    Ok(Some(sidecar))
}

async fn verify(
    log: &Log,
    mut sidecar: Option<&mut Sidecar>,
    progress: &Progress,
) -> Result<Findings> {
    let mut findings = Findings::default();
    let mut walk = log.walk();
    let mut done = 0;
    let mut completed = None;
    loop {
        let entry = match walk.next().await {
            Ok(Some(entry)) => entry,
            Ok(None) => break,
            // Without its size there is no way to the next one.
            Err(err) if err.kind() == ErrorKind::Corrupt => {
                findings.damage.push((findings.entries, err.to_string()));
                return Ok(findings);
            }
            Err(err) => return Err(err),
        };
        findings.entries += 1;
        findings.note_what_others_refuse(&entry);
        if let Some(sidecar) = &mut sidecar {
            match sidecar.slot(entry.number).await? {
                Slot::Record(record) => {
                    findings.compare(log, &entry, &record, completed).await?;
                    completed = Some(record.completed);
                }
                Slot::Broken => findings.damage.push((entry.number, torn(sidecar, entry.number))),
                Slot::Empty => {}
            }
        }
        progress.advance(entry.end_position() - done);
        done = entry.end_position();
    }
    if let Some(sidecar) = sidecar {
        findings.uncounted = count_behind(log, sidecar, walk.sector(), completed).await?;
        let last = log.entries() + findings.uncounted;
        if sidecar.slot(last).await? == Slot::Broken {
            let torn = torn(sidecar, last);
            findings.notes.push(format!("entry {last}, which is not counted: {torn}"));
        }
    }
    Ok(findings)
}

/// What is wrong with a record that is none.
fn torn(sidecar: &Sidecar, entry: u64) -> String {
    format!(
        "its record at byte {} of {} is torn, or of another entry",
        Record::position(entry),
        sidecar.name()
    )
}

/// How many entries behind the count are whole, as the next recording process would find.
async fn count_behind(
    log: &Log,
    sidecar: &mut Sidecar,
    mut sector: u64,
    mut completed: Option<u64>,
) -> Result<u64> {
    let mut count = 0;
    loop {
        let number = log.entries() + count;
        let Some(record) = sidecar.record(number).await? else { return Ok(count) };
        let is_newer = completed.is_none_or(|before| record.completed > before);
        let position = sector.saturating_mul(log.sector_size());
        let Ok(entry) = log.entry_at(number, position).await else { return Ok(count) };
        if !is_newer || !sidecar::matches(log, &entry, &record).await? {
            return Ok(count);
        }
        completed = Some(record.completed);
        sector = entry.end_sector();
        count += 1;
    }
}

impl Findings {
    async fn compare(
        &mut self,
        log: &Log,
        entry: &Entry,
        record: &Record,
        before: Option<u64>,
    ) -> Result<()> {
        let number = entry.number;
        let agrees = sidecar::matches(log, entry, record)
            .await
            .context(|| format!("{}: entry {number}", log.name()))?;
        if !agrees {
            let what = "header or data are not what its record says (CRC or place)";
            self.damage.push((number, what.into()));
        } else if record.state == RecordState::Zeros && !are_zeros(log, entry).await? {
            self.damage.push((number, "its data are not the zeros that its record says".into()));
        } else if before.is_some_and(|before| before >= record.completed) {
            self.damage.push((number, "its record says that it came before the last one".into()));
        } else {
            self.with_record += 1;
        }
        Ok(())
    }

    fn note_what_others_refuse(&mut self, entry: &Entry) {
        let note = if entry.flags.has(Flags::METADATA) {
            "QEMU's log-append does not take METADATA flags"
        } else if entry.kind() == Kind::Mark && entry.flags != Flags::MARK && entry.mark_len > 0 {
            "replay-log of xfstests takes no marks with other flags"
        } else {
            return;
        };
        if !self.notes.iter().any(|known| known == note) {
            self.notes.push(note.into());
        }
    }
}

/// Whether the data of an entry are zeros. Holes, which they mostly are, are not read.
async fn are_zeros(log: &Log, entry: &Entry) -> Result<bool> {
    const PIECE: u64 = 1 << 20;
    let Some(data) = entry.data() else { return Ok(true) };
    let mut at = data.offset;
    while at < data.end() {
        let hole = log.file().hole_at(at)?;
        let mut end = hole.range.end().min(data.end());
        if !hole.is_hole {
            end = end.min(at + PIECE);
            let piece = ByteRange::between(at, end);
            let bytes = log
                .read_bytes(piece)
                .await
                .context(|| format!("{}: entry {}: reading its zeros", log.name(), entry.number))?;
            if bytes.iter().any(|byte| *byte != 0) {
                return Ok(false);
            }
        }
        at = end;
    }
    Ok(true)
}

fn human(log: &Log, has_sidecar: bool, findings: &Findings) -> String {
    let mut lines = Vec::new();
    for (entry, what) in findings.damage.iter().take(MOST_PRINTED) {
        lines.push(format!("entry {entry}: {what}"));
    }
    if findings.damage.len() > MOST_PRINTED {
        lines.push(format!("… and {} more", findings.damage.len() - MOST_PRINTED));
    }
    let verdict = if findings.damage.is_empty() { "sound" } else { "DAMAGED" };
    let records = match has_sidecar {
        true => format!("{} agree with their records", findings.with_record),
        false => "no sidecar to compare them with".into(),
    };
    lines.push(format!("{}: {verdict}: {} entries, {records}", log.name(), findings.entries));
    if findings.uncounted > 0 {
        lines.push(format!("{} more entries are whole, but not counted yet", findings.uncounted));
    }
    lines.extend(findings.notes.iter().map(|note| format!("note: {note}")));
    lines.join("\n") + "\n"
}
