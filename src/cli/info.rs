//! `vublk info`: what an image is.
//!
//! The JSON is QEMU's `BlockNodeInfo` as `qemu-img info --output json` prints it; see
//! [`crate::images::info`].

use std::path::PathBuf;

use clap::Args;
use serde_json::{Map, Value};

use crate::cli::options::{Output, ReadArgs};
use crate::cli::size::human_size;
use crate::cli::{DONE, output};
use crate::error::Result;
use crate::images::info::describe;
use crate::images::{self, Locking, OpenRequest};
use crate::terminal::printable;

/// Show what an image is
#[derive(Debug, Args)]
pub struct InfoArgs {
    #[command(flatten)]
    read: ReadArgs,
    /// Show the backing files, too
    #[arg(short, long)]
    backing_chain: bool,
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    /// The image
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

pub fn run(args: &InfoArgs) -> Result<u8> {
    let request = args.read.request(&args.file);
    let locking = if request.locking == Locking::Share { Locking::Share } else { Locking::Inspect };
    let request = OpenRequest { locking, backing: false, ..request };
    let (images, stopped) = match args.backing_chain {
        true => images::open_chain(&request)?,
        false => (vec![images::open(&request)?], None),
    };
    let infos = images.iter().map(describe).collect::<Result<Vec<_>>>()?;
    match args.output {
        Output::Json if args.backing_chain => output::print_json(&infos)?,
        Output::Json => output::print_json(&infos[0])?,
        Output::Human => {
            let texts: Vec<_> = infos.iter().map(human).collect();
            output::print(&texts.join("\n"))?;
        }
    }
    stopped.map_or(Ok(DONE), Err)
}

/// The description in qemu-img's words.
fn human(info: &Value) -> String {
    let size = |value: &Value| value.as_u64().unwrap_or(0);
    let text_of = |value: &Value| value.as_str().unwrap_or_default().to_string();
    let virtual_size = size(&info["virtual-size"]);
    let mut lines = vec![
        format!("image: {}", text_of(&info["filename"])),
        format!("file format: {}", text_of(&info["format"])),
        format!("virtual size: {} ({virtual_size} bytes)", human_size(virtual_size)),
        format!("disk size: {}", human_size(size(&info["actual-size"]))),
    ];
    if info["encrypted"] == true {
        lines.push("encrypted: yes".into());
    }
    if let Some(cluster) = info["cluster-size"].as_u64() {
        lines.push(format!("cluster_size: {cluster}"));
    }
    if info["dirty-flag"] == true {
        lines.push("cleanly shut down: no".into());
    }
    if let Some(backing) = info["backing-filename"].as_str() {
        let full = text_of(&info["full-backing-filename"]);
        let actual =
            if full == backing { String::new() } else { format!(" (actual path: {full})") };
        lines.push(format!("backing file: {backing}{actual}"));
    }
    if let Some(format) = info["backing-filename-format"].as_str() {
        lines.push(format!("backing file format: {format}"));
    }
    if let Some(specific) = info["format-specific"]["data"].as_object() {
        lines.push("Format specific information:".into());
        push_tree(&mut lines, specific, 1);
    }
    for child in info["children"].as_array().into_iter().flatten() {
        let node = &child["info"];
        let len = size(&node["virtual-size"]);
        lines.push(format!("Child node '/{}':", text_of(&child["name"])));
        lines.push(format!("    filename: {}", text_of(&node["filename"])));
        lines.push(format!("    protocol type: {}", text_of(&node["format"])));
        lines.push(format!("    file length: {} ({len} bytes)", human_size(len)));
        lines.push(format!("    disk size: {}", human_size(size(&node["actual-size"]))));
    }
    lines.iter().map(|line| printable(line) + "\n").collect()
}

/// Writes an object as indented lines, `key: value`.
fn push_tree(lines: &mut Vec<String>, object: &Map<String, Value>, depth: usize) {
    for (key, value) in object {
        push_value(lines, &key.replace('-', " "), value, depth);
    }
}

/// Writes a value by this name: what has parts on lines of their own, those of a list by number.
fn push_value(lines: &mut Vec<String>, key: &str, value: &Value, depth: usize) {
    let indent = "    ".repeat(depth);
    match value {
        Value::Object(inner) => {
            lines.push(format!("{indent}{key}:"));
            push_tree(lines, inner, depth + 1);
        }
        Value::Array(parts) => {
            lines.push(format!("{indent}{key}:"));
            for (at, part) in parts.iter().enumerate() {
                push_value(lines, &format!("[{at}]"), part, depth + 1);
            }
        }
        Value::String(text) => lines.push(format!("{indent}{key}: {text}")),
        other => lines.push(format!("{indent}{key}: {other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_reaches_the_terminal_as_a_command() {
        let info = serde_json::json!({ "filename": "a\u{1b}[31mb\u{9b}ü" });
        let said = human(&info);
        assert!(said.starts_with("image: a\\u{1b}[31mb\\u{9b}ü\n"), "{said:?}");
    }

    #[test]
    fn no_name_makes_a_line_of_its_own() {
        let info = serde_json::json!({
            "filename": "a", "format": "qcow2", "backing-filename": "b\nfile format: raw",
        });
        let said = human(&info);
        let formats: Vec<_> = said.lines().filter(|line| line.starts_with("file format")).collect();
        assert_eq!(formats, ["file format: qcow2"], "{said}");
        assert!(said.contains("backing file: b\\nfile format: raw"), "{said}");
    }
}
