//! Checking and repairing images: what a format's checker reports.

use std::sync::Arc;

use serde::Serialize;

use crate::error::{Error, ErrorKind, Result};
use crate::formats::{qcow2, vhdx};
use crate::images::open::open_file;
use crate::images::{Access, Image, ImageFormat, OpenRequest, add_cow, open};
use crate::io::{File, HostFile, block_on};

/// What a check may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Give back space that nothing uses; safe always.
    Leaks,
    /// Everything that can be repaired; may lose what was damaged.
    All,
}

/// The outcome of a check. Serialises with the field names of `qemu-img check --output json`;
/// fields that do not apply to a format are left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CheckReport {
    /// End of the used part of the file, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_end_offset: Option<u64>,
    /// Clusters (blocks) that the disk consists of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_clusters: Option<u64>,
    /// How many of them are stored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allocated_clusters: Option<u64>,
    /// How many of those do not follow the one before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fragmented_clusters: Option<u64>,
    /// How many of those are stored compressed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compressed_clusters: Option<u64>,
    /// Things that could not be checked.
    pub check_errors: u64,
    /// Errors that can lose data.
    #[serde(skip_serializing_if = "is_zero")]
    pub corruptions: u64,
    /// Clusters that nothing uses.
    #[serde(skip_serializing_if = "is_zero")]
    pub leaks: u64,
    /// Errors that were repaired.
    #[serde(skip_serializing_if = "is_zero")]
    pub corruptions_fixed: u64,
    /// Leaks that were repaired.
    #[serde(skip_serializing_if = "is_zero")]
    pub leaks_fixed: u64,
    /// One sentence for each finding, in the order found. Not part of QEMU's output.
    #[serde(skip)]
    pub findings: Vec<Finding>,
}

/// Something that a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What is wrong, in a sentence.
    pub what: String,
    /// Whether it has been repaired.
    pub repaired: bool,
    /// More about it, where a format's check can say more.
    #[serde(flatten)]
    pub explanation: Option<Explanation>,
}

impl From<String> for Finding {
    fn from(what: String) -> Finding {
        Finding { what, ..Finding::default() }
    }
}

/// A finding in plain words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// Where it is, in the file and on the disk.
    #[serde(rename = "where")]
    pub place: String,
    /// What it means for the data.
    pub meaning: String,
    /// What a repair does about it, or why nothing.
    pub repair: String,
}

/// The check of an image by its path.
#[derive(Clone, Debug)]
pub struct Checked {
    /// The file's name.
    pub name: String,
    /// Its format.
    pub format: ImageFormat,
    /// The outcome; `None` if there is nothing to check in this format.
    pub report: Option<CheckReport>,
}

/// Checks the image that `request` names, which may be too damaged to be opened; with `repair`
/// repairs it. Of a differencing image that is good itself also says if its parent is not.
///
/// # Errors
/// If the file cannot be read, or the format's check cannot repair.
pub fn check_path(request: &OpenRequest, repair: Option<Repair>) -> Result<Checked> {
    let whole = OpenRequest { backing: true, access: Access::Read, ..request.clone() };
    let mut request = OpenRequest { backing: false, ..request.clone() };
    if repair.is_some() {
        request.access = Access::Write;
    }
    let (file, format) = open_file(&request)?;
    if format == ImageFormat::Vhdx {
        let name = file.name().to_string();
        let mut report = check_vhdx(&file, repair)?;
        let read = OpenRequest { format: Some(format), ..whole };
        // The locks are taken again.
        drop(file);
        if report.corruptions == 0 {
            report.findings.extend(look_at_parent(&read));
        }
        return Ok(Checked { name, format, report: Some(report) });
    }
    // The locks are taken again.
    drop(file);
    let image = open(&request)?;
    let report = check(&image, repair)?;
    Ok(Checked { name: image.name().to_string(), format: image.format, report })
}

/// Whether a good image cannot be opened because of what it stands on.
fn look_at_parent(request: &OpenRequest) -> Option<Finding> {
    let alone = OpenRequest { backing: false, ..request.clone() };
    let has_parent = |image: Image| image.node.driver().details().get("parent-locator").is_some();
    if !open(&alone).is_ok_and(has_parent) {
        return None;
    }
    let err = match open(request) {
        // Somebody uses it, or the host cannot read it: that says nothing of the images.
        Err(err) if !matches!(err.kind(), ErrorKind::Busy | ErrorKind::Io) => err,
        _ => return None,
    };
    Some(Finding {
        what: format!("the image is in order, but cannot be opened, because of its parent: {err}"),
        repaired: false,
        explanation: Some(Explanation {
            place: "the parent locator, which is in the metadata".into(),
            meaning: "what this image does not hold itself is in its parent, which must be there, \
                      and as it was when this image was made"
                .into(),
            repair:
                "nothing: bring the parent back, under one of the names that `vublk info` shows. \
                     If it was changed since, only a backup of it has what this image was made from"
                    .into(),
        }),
    })
}

fn check_vhdx(file: &Arc<HostFile>, repair: Option<Repair>) -> Result<CheckReport> {
    let repair = repair.map(|what| match what {
        Repair::Leaks => vhdx::check::Repair::ReplayOnly,
        Repair::All => vhdx::check::Repair::All,
    });
    let file = Arc::clone(file) as Arc<dyn File>;
    let found = block_on(vhdx::check::check(&file, repair))?;
    let unless_zero = |value: u64| Some(value).filter(|value| *value > 0);
    let finding = |finding: vhdx::explain::Finding| Finding {
        what: finding.what,
        repaired: finding.is_fixed,
        explanation: Some(Explanation {
            place: finding.place,
            meaning: finding.meaning,
            repair: finding.repair,
        }),
    };
    Ok(CheckReport {
        image_end_offset: unless_zero(found.image_end),
        total_clusters: unless_zero(found.blocks),
        allocated_clusters: unless_zero(found.allocated),
        fragmented_clusters: unless_zero(found.fragmented),
        corruptions: found.corruptions,
        corruptions_fixed: found.fixed,
        findings: found.findings.into_iter().map(finding).collect(),
        ..CheckReport::default()
    })
}

fn is_zero(value: &u64) -> bool {
    *value == 0
}

/// Checks an open image; with `repair` (which needs a writable one) repairs it. `None` if there is
/// nothing to check in its format.
///
/// # Errors
/// If the check itself fails, or the format's check cannot repair.
pub fn check(image: &Image, repair: Option<Repair>) -> Result<Option<CheckReport>> {
    match (image.format, repair) {
        (ImageFormat::Qcow2, Some(what)) => {
            let what = if what == Repair::Leaks { "leaks" } else { "all" };
            Err(Error::unsupported(format!(
                "{0}: qcow2 images are not repaired here; use qemu-img check -r {what} {0}",
                image.name()
            )))
        }
        (ImageFormat::Vhdx, _) => check_vhdx(&image.file, repair).map(Some),
        (ImageFormat::Qcow2, None) => {
            let file = Arc::clone(&image.file) as Arc<dyn File>;
            block_on(qcow2::check::check(&file)).map(|found| Some(report_of(found)))
        }
        (ImageFormat::AddCow, what) => {
            let fix_all = what == Some(Repair::All);
            add_cow::check(image, what.is_some(), fix_all).map(Some)
        }
        _ => Ok(None),
    }
}

fn report_of(found: qcow2::check::Found) -> CheckReport {
    let unless_zero = |value: u64| Some(value).filter(|value| *value > 0);
    CheckReport {
        image_end_offset: Some(found.image_end_offset),
        total_clusters: Some(found.total_clusters),
        allocated_clusters: unless_zero(found.allocated_clusters),
        fragmented_clusters: unless_zero(found.fragmented_clusters),
        compressed_clusters: unless_zero(found.compressed_clusters),
        check_errors: found.check_errors,
        corruptions: found.corruptions,
        leaks: found.leaks,
        corruptions_fixed: 0,
        leaks_fixed: 0,
        findings: found.findings.into_iter().map(Finding::from).collect(),
    }
}
