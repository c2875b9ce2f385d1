//! `vublk log report`: shows what an exploration has found.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::cli::{DONE, output};
use crate::crash::report::Report;
use crate::error::Result;

/// How a report is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ReportOutput {
    /// For people
    #[default]
    Human,
    /// JSON
    Json,
    /// JUnit XML, for continuous integration
    Junit,
}

/// Show the results that `log explore --results FILE` has kept
#[derive(Debug, Args)]
pub struct ReportArgs {
    /// The results
    #[arg(value_name = "FILE")]
    results: PathBuf,
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    output: ReportOutput,
}

pub fn run(args: &ReportArgs) -> Result<u8> {
    print_report(&Report::load(&args.results)?, args.output)?;
    Ok(DONE)
}

/// Prints a report.
pub fn print_report(report: &Report, how: ReportOutput) -> Result<()> {
    match how {
        ReportOutput::Human => output::print(&report.to_text()),
        ReportOutput::Json => output::print_json(report),
        ReportOutput::Junit => output::print(&report.to_junit()?),
    }
}
