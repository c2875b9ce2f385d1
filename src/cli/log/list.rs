//! `vublk log list`: the entries of a log, one a line.

use clap::Args;
use serde_json::{Value, json};

use crate::cli::log::source::{LogFileArgs, PartArgs};
use crate::cli::options::Output;
use crate::cli::{DONE, output};
use crate::error::Result;
use crate::io::block_on;
use crate::write_log::{Entry, Kind, Log, Mark};

/// Print this much at a time.
const CHUNK: usize = 64 << 10;

/// List the entries of a log: number, log sector, sector on the disk, sectors, flags, mark
#[derive(Debug, Args)]
pub struct ListArgs {
    #[command(flatten)]
    part: PartArgs,
    /// Only marks
    #[arg(long)]
    marks: bool,
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    log: LogFileArgs,
}

pub fn run(args: &ListArgs) -> Result<u8> {
    let log = args.log.open()?;
    let mut printer = Printer { output: args.output, text: String::new(), count: 0 };
    printer.begin();
    block_on(list(&log, args, &mut printer))?;
    printer.end()?;
    Ok(DONE)
}

async fn list(log: &Log, args: &ListArgs, printer: &mut Printer) -> Result<()> {
    let mut walk = log.walk_from(&args.part.start()).await?;
    let stop = args.part.stop();
    let mut count = 0;
    while let Some(entry) = walk.next().await? {
        count += 1;
        if !args.marks || entry.kind() == Kind::Mark {
            printer.entry(&entry, walk.mark())?;
        }
        if stop.at(&entry, walk.mark(), count).is_some() {
            break;
        }
    }
    Ok(())
}

/// An entry as JSON.
pub fn describe(entry: &Entry, mark: &Mark) -> Value {
    let mut value = json!({
        "entry": entry.number,
        "log-sector": entry.log_sector(),
        "sector": entry.sector(),
        "sectors": entry.sectors(),
        "flags": entry.flags.names(),
    });
    if entry.kind() == Kind::Mark {
        value["mark"] = mark.to_string().into();
    }
    value
}

/// Prints entries as they come, so that a log of any length can be listed.
struct Printer {
    output: Output,
    text: String,
    count: u64,
}

impl Printer {
    fn begin(&mut self) {
        match self.output {
            Output::Human => {
                self.text = "entry   log sector       sector  sectors  flags\n".into();
            }
            Output::Json => self.text = "[".into(),
        }
    }

    fn entry(&mut self, entry: &Entry, mark: &Mark) -> Result<()> {
        match self.output {
            Output::Human => {
                let Entry { number, flags, .. } = entry;
                let (log_sector, sector) = (entry.log_sector(), entry.sector());
                let sectors = entry.sectors();
                let line = format!("{number:<7} {log_sector:10} {sector:12} {sectors:8}  {flags}");
                self.text += &line;
                if entry.kind() == Kind::Mark {
                    self.text += &format!(" {mark}");
                }
                self.text.push('\n');
            }
            Output::Json => {
                self.text += if self.count == 0 { "\n    " } else { ",\n    " };
                self.text += &describe(entry, mark).to_string();
            }
        }
        self.count += 1;
        if self.text.len() >= CHUNK {
            output::print_or_end(&std::mem::take(&mut self.text))?;
        }
        Ok(())
    }

    fn end(mut self) -> Result<()> {
        if self.output == Output::Json {
            self.text += if self.count == 0 { "]\n" } else { "\n]\n" };
        }
        output::print_or_end(&self.text)
    }
}
