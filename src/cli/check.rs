//! `vublk check`: looks for errors in an image's metadata.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::cli::options::{Output, SharingArgs};
use crate::cli::{DONE, output, report};
use crate::error::Result;
use crate::images::check::Finding;
use crate::images::{self, CheckReport, ImageFormat, Repair};

/// The check could not be completed.
const INCOMPLETE: u8 = 1;
/// The image is corrupt.
const CORRUPT: u8 = 2;
/// Nothing is wrong but leaks.
const LEAKS: u8 = 3;
/// There is no check for this format.
const NO_CHECK: u8 = 63;

/// What to repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum RepairArg {
    /// Space that nothing uses
    Leaks,
    /// Everything
    All,
}

/// Check an image's metadata (exit code: 0 clean, 1 incomplete, 2 corrupt, 3 leaks, 63 no check)
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Format of the image; guessed from its first bytes if not given
    #[arg(short = 'f', long = "format", value_name = "FORMAT")]
    format: Option<ImageFormat>,
    #[command(flatten)]
    sharing: SharingArgs,
    /// Repair what is found
    #[arg(short, long, value_enum, value_name = "WHAT", conflicts_with = "force_share")]
    repair: Option<RepairArg>,
    /// Say of each finding where it is, what it means and what a repair does (vhdx)
    #[arg(long, conflicts_with = "quiet")]
    explain: bool,
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    /// Print nothing but errors
    #[arg(short, long)]
    pub quiet: bool,
    /// The image
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// What `--output json` prints: QEMU's ImageCheck.
#[derive(Serialize)]
struct ImageCheck<'a> {
    #[serde(flatten)]
    report: &'a CheckReport,
    filename: &'a str,
    format: &'static str,
    /// Not part of QEMU's output.
    #[serde(skip_serializing_if = "Option::is_none")]
    findings: Option<&'a Vec<Finding>>,
}

pub fn run(args: &CheckArgs) -> Result<u8> {
    let request = args.sharing.request(&args.file, args.format);
    let repair = args.repair.map(|what| match what {
        RepairArg::Leaks => Repair::Leaks,
        RepairArg::All => Repair::All,
    });
    let checked = images::check_path(&request, repair)?;
    let Some(result) = checked.report else {
        report(&crate::Error::unsupported(format!(
            "{}: {} images have nothing that could be checked",
            checked.name, checked.format
        )));
        return Ok(NO_CHECK);
    };
    match args.output {
        Output::Json => output::print_json(&ImageCheck {
            report: &result,
            filename: &checked.name,
            format: checked.format.name(),
            findings: args.explain.then_some(&result.findings),
        })?,
        Output::Human if args.quiet => {}
        Output::Human => output::print(&human(&result, args.explain))?,
    }
    Ok(exit_code(&result))
}

fn exit_code(report: &CheckReport) -> u8 {
    match report {
        CheckReport { check_errors: 1.., .. } => INCOMPLETE,
        CheckReport { corruptions: 1.., .. } => CORRUPT,
        CheckReport { leaks: 1.., .. } => LEAKS,
        _ => DONE,
    }
}

/// The report in qemu-img's words.
fn human(report: &CheckReport, explain: bool) -> String {
    let mut text = String::new();
    for finding in &report.findings {
        let mark = if finding.repaired { "Repaired: " } else { "" };
        text += &format!("{mark}{}\n", finding.what);
        if let Some(more) = finding.explanation.as_ref().filter(|_| explain) {
            text += &format!("    where:  {}\n", more.place);
            text += &format!("    means:  {}\n", more.meaning);
            text += &format!("    repair: {}\n", more.repair);
        }
    }
    if report.corruptions_fixed + report.leaks_fixed > 0 {
        text += &format!(
            "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    \
             {} corruptions\n\n",
            report.leaks_fixed, report.corruptions_fixed
        );
    }
    if report.corruptions + report.leaks + report.check_errors == 0 {
        text += "No errors were found on the image.\n";
    }
    if report.corruptions > 0 {
        text += &format!(
            "\n{} errors were found on the image.\nData may be corrupted, or further writes to the \
             image may corrupt it.\n",
            report.corruptions
        );
    }
    if report.leaks > 0 {
        text += &format!(
            "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no \
             harm to data.\n",
            report.leaks
        );
    }
    if report.check_errors > 0 {
        text +=
            &format!("\n{} internal errors have occurred during the check.\n", report.check_errors);
    }
    if let (Some(allocated), Some(total)) = (report.allocated_clusters, report.total_clusters)
        && total > 0
    {
        let percent = allocated as f64 * 100.0 / total as f64;
        // Of nothing, nothing is fragmented.
        let whole = allocated.max(1) as f64;
        let of_allocated = |part: Option<u64>| part.unwrap_or(0) as f64 * 100.0 / whole;
        text += &format!(
            "{allocated}/{total} = {percent:.2}% allocated, {:.2}% fragmented, {:.2}% compressed \
             clusters\n",
            of_allocated(report.fragmented_clusters),
            of_allocated(report.compressed_clusters)
        );
    }
    if let Some(end) = report.image_end_offset {
        text += &format!("Image end offset: {end}\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_qemu_imgs() {
        let report = |corruptions, leaks, check_errors| CheckReport {
            corruptions,
            leaks,
            check_errors,
            ..Default::default()
        };
        assert_eq!(exit_code(&report(0, 0, 0)), 0);
        assert_eq!(exit_code(&report(0, 0, 1)), 1);
        assert_eq!(exit_code(&report(1, 5, 1)), 1);
        assert_eq!(exit_code(&report(1, 5, 0)), 2);
        assert_eq!(exit_code(&report(0, 5, 0)), 3);
    }

    #[test]
    fn parts_of_nothing_are_none() {
        let report = CheckReport {
            total_clusters: Some(160),
            allocated_clusters: Some(0),
            fragmented_clusters: Some(0),
            ..Default::default()
        };
        let text = human(&report, false);
        assert!(text.contains("0/160 = 0.00% allocated, 0.00% fragmented, 0.00% comp"), "{text}");
    }

    #[test]
    fn json_has_qemu_imgs_names() {
        let report = CheckReport {
            image_end_offset: Some(262_144),
            total_clusters: Some(160),
            leaks: 2,
            ..Default::default()
        };
        let check =
            ImageCheck { report: &report, filename: "b.qcow2", format: "qcow2", findings: None };
        let json = serde_json::to_value(&check).unwrap();
        let expected = serde_json::json!({
            "image-end-offset": 262_144, "total-clusters": 160, "check-errors": 0, "leaks": 2,
            "filename": "b.qcow2", "format": "qcow2"
        });
        assert_eq!(json, expected);
    }
}
