//! Black box tests of the commands, with qemu-img as the second opinion where it is installed.
//!
//! Tests that need a tool or a right that is missing say so on stderr and pass.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::Value;

#[path = "../common/mod.rs"]
mod common;

mod commands;
mod convert;
mod create;
mod qcow2;
mod refusals;
mod serve;

use common::{Random, ok};

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|err| panic!("{err}: {text}"))
}

/// Makes a file of random runs: data, stored zeros, holes.
fn random_file(path: &Path, len: u64, random: &mut Random) -> Vec<u8> {
    let file = File::create(path).unwrap();
    file.set_len(len).unwrap();
    let mut content = vec![0; len as usize];
    for _ in 0..1 + random.below(20) {
        let start = random.below(len);
        let scale = 9 + random.below(12);
        let run = (1 + random.below(1 << scale)).min(len - start);
        let bytes = &mut content[start as usize..(start + run) as usize];
        if random.below(3) == 0 {
            bytes.fill(0);
        } else {
            bytes.iter_mut().for_each(|b| *b = random.below(256) as u8);
        }
        file.write_all_at(bytes, start).unwrap();
    }
    // Until they are on the disk, the blocks that a file takes are anybody's guess.
    file.sync_all().unwrap();
    content
}

/// The 4 KiB blocks of a file that are not holes, asked block by block.
fn stored_blocks(path: &Path) -> Vec<bool> {
    let map =
        json(&ok(Path::new("/"), &["map", "--output=json", "-f", "raw", path.to_str().unwrap()]));
    let mut blocks = vec![false; std::fs::metadata(path).unwrap().len().div_ceil(4096) as usize];
    for entry in map.as_array().unwrap().iter().filter(|e| e["data"] == true) {
        let (start, len) = (entry["start"].as_u64().unwrap(), entry["length"].as_u64().unwrap());
        for block in start / 4096..(start + len).div_ceil(4096) {
            blocks[block as usize] = true;
        }
    }
    blocks
}
