//! Images made by Windows, QEMU and by hand, with known content.
//!
//! They lie in `../shared/data` beside the repository (`VUBLK_TEST_DATA` names another place), or
//! the tests that need them are skipped.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::block::Node;
use crate::images::{self, OpenRequest};
use crate::io::{AlignedBuf, block_on};

/// Where the sample images are; `None`, with a line on stderr, if they are not here.
fn samples() -> Option<PathBuf> {
    let dir = match std::env::var_os("VUBLK_TEST_DATA") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data"),
    };
    if dir.join("vhdx").is_dir() {
        return Some(dir);
    }
    eprintln!("SKIP: no sample images in {}", dir.display());
    None
}

/// Unpacks a sample into `dir` under its name without the suffix.
fn unpack(samples: &Path, name: &str, dir: &Path) -> Option<PathBuf> {
    let (program, suffix) = if name.contains("iotest") { ("bzip2", "bz2") } else { ("xz", "xz") };
    let folder =
        if name.starts_with("ex") && !name.starts_with("ext2") { "spec-examples" } else { "vhdx" };
    let packed = samples.join(folder).join(format!("{name}.{suffix}"));
    let path = dir.join(name);
    let file = std::fs::File::create(&path).unwrap();
    let unpacked = Command::new(program).arg("-dc").arg(&packed).stdout(file).status();
    match unpacked {
        Ok(status) => assert!(status.success(), "{program} failed on {}", packed.display()),
        Err(err) => {
            eprintln!("SKIP: cannot unpack samples: {program}: {err}");
            return None;
        }
    }
    Some(path)
}

/// Feeds a disk's content to `sha256sum`, a piece at a time.
pub(super) fn content_hash(node: &Node) -> String {
    use std::io::Write;
    let mut child = Command::new("sha256sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("sha256sum is part of the coreutils");
    let mut pipe = child.stdin.take().unwrap();
    let mut offset = 0;
    while offset < node.size() {
        let len = (node.size() - offset).min(4 << 20);
        let mut buf = AlignedBuf::zeroed(len as usize, 4096);
        block_on(node.read(offset, buf.buffers())).unwrap();
        pipe.write_all(buf.as_slice()).unwrap();
        offset += len;
    }
    drop(pipe);
    let out = child.wait_with_output().unwrap();
    String::from_utf8(out.stdout).unwrap().split(' ').next().unwrap().to_string()
}

fn file_hash(path: &Path) -> String {
    let out = Command::new("sha256sum").arg(path).output().unwrap();
    String::from_utf8(out.stdout).unwrap().split(' ').next().unwrap().to_string()
}

/// Names of samples, with the sample they need beside them, their size and the hash of their
/// content.
const SAMPLES: &[(&str, Option<&str>, u64, &str)] = &[
    (
        "ntfs-fixed.vhdx",
        None,
        4 << 20,
        "5237dd895f38052344e2ef35a207fe9df08cd18d17b6ea857a1b93cc475e1f2e",
    ),
    (
        "ntfs-dynamic.vhdx",
        None,
        4 << 20,
        "b92731f8e4bf3532418444d22a9086823a8122569500acd09cd8d2ce20eb98e9",
    ),
    (
        "ntfs-parent.vhdx",
        None,
        4 << 20,
        "c5523065bc6ef82267be56c5f8888e2876ead8ba7edba2a65a3da8b076231b68",
    ),
    (
        "ntfs-differential.vhdx",
        Some("ntfs-parent.vhdx"),
        4 << 20,
        "1ef1fb5360247aa7d36a38415bc7bf6e1e52f62af5e6bd1283815e82584c7efc",
    ),
    (
        "ext2.vhdx",
        None,
        4 << 20,
        "a6c2f0e39afe6c6ab432ca5465349fcefe8dc944398e97b2d957d3f89dbb5d80",
    ),
    (
        "iotest-dirtylog-10G-4M.vhdx",
        None,
        10 << 30,
        "179cefe8b0587f123393eedf2aa7aa8d25798591178e6bc3950a09762f38f96f",
    ),
    (
        "ntfs-dynamic.crashed.vhdx",
        None,
        4 << 20,
        "b92731f8e4bf3532418444d22a9086823a8122569500acd09cd8d2ce20eb98e9",
    ),
    (
        "ntfs-fixed.crashed.vhdx",
        None,
        4 << 20,
        "5237dd895f38052344e2ef35a207fe9df08cd18d17b6ea857a1b93cc475e1f2e",
    ),
    (
        "ntfs-fixed.crashed-short.vhdx",
        None,
        4 << 20,
        "bb9f8df61474d25e71fa00722318cd387396ca1736605e1248821cc0de3d3af8",
    ),
    (
        "ntfs-differential.crashed.vhdx",
        Some("ntfs-parent.vhdx"),
        4 << 20,
        "1ef1fb5360247aa7d36a38415bc7bf6e1e52f62af5e6bd1283815e82584c7efc",
    ),
    ("exA.vhdx", None, 3 << 20, "7a27eb2c8fea1f7da4da6e8b56ac11936b0488177d7bddfeb0dcdff30eae1dea"),
    ("exB.vhdx", None, 3 << 20, "ef76a32f0360567f512daa9cd84c856791c9c3fd6589a5f82cce6fc7026c7fe7"),
    (
        "exD.avhdx",
        Some("exA.vhdx"),
        3 << 20,
        "b6e3a5c6c89a257436392a4cc694c2504d1facb7764682d030d4112cc54c264f",
    ),
    ("exE.vhdx", None, 4 << 20, "18ddf695636194db22eb9cff3b14db1c5c359d16865fa174b795319f54bd22ef"),
];

/// A directory with a sample and what it needs.
pub(super) fn unpacked(name: &str) -> Option<(tempfile::TempDir, PathBuf)> {
    let samples = samples()?;
    let dir = tempfile::tempdir().unwrap();
    let path = unpack(&samples, name, dir.path())?;
    let (_, parent, ..) = SAMPLES.iter().find(|(sample, ..)| *sample == name).unwrap();
    if let Some(parent) = parent {
        unpack(&samples, parent, dir.path())?;
    }
    Some((dir, path))
}

#[test]
fn samples_are_read_as_their_makers_wrote_them() {
    for (name, _, size, hash) in SAMPLES.iter().filter(|(_, _, size, _)| *size <= 4 << 20) {
        check_sample(name, *size, hash);
    }
}

/// Hashing ten gigabytes takes its time.
#[test]
fn a_large_sample_with_a_dirty_log_is_read_as_qemu_repairs_it() {
    for (name, _, size, hash) in SAMPLES.iter().filter(|(_, _, size, _)| *size > 4 << 20) {
        check_sample(name, *size, hash);
    }
}

fn check_sample(name: &str, size: u64, hash: &str) {
    let Some((_dir, path)) = unpacked(name) else { return };
    let before = file_hash(&path);
    let image = images::open(&OpenRequest::read(&path)).unwrap();
    assert_eq!(image.format, images::ImageFormat::Vhdx);
    assert_eq!(image.node.size(), size, "{name}");
    assert_eq!(content_hash(&image.node), hash, "{name}");
    drop(image);
    assert_eq!(file_hash(&path), before, "{name}: a reader changed the file");
}

#[test]
fn truncated_images_are_refused() {
    // With the length that would just do: all of what the disk uses of its last block.
    let enough = [
        ("ntfs-fixed.vhdx", 8 << 20),
        ("ntfs-dynamic.vhdx", 8 << 20),
        ("ext2.vhdx", 12 << 20),
        ("ntfs-fixed.crashed.vhdx", 4 << 20),
    ];
    for (name, len) in enough {
        let Some((_dir, path)) = unpacked(name) else { return };
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(len).unwrap();
        images::open(&OpenRequest::read(&path)).unwrap();
        for len in [len - 4096, 2 << 20, 70 << 10, 1000] {
            file.set_len(len).unwrap();
            let before = file_hash(&path);
            let request = OpenRequest::read(&path).format(Some(images::ImageFormat::Vhdx));
            let err = images::open(&request).unwrap_err().to_string();
            assert!(err.contains("truncated"), "{name} at {len}: {err}");
            assert!(err.starts_with(&path.display().to_string()), "{err}");
            assert_eq!(file_hash(&path), before, "{name} at {len}: changed");
        }
    }
}

#[test]
fn a_parent_must_be_the_one_the_child_was_made_from() {
    let Some((dir, path)) = unpacked("ntfs-differential.vhdx") else { return };
    let parent = dir.path().join("ntfs-parent.vhdx");
    let refused = |words: &str| {
        let err = images::open(&OpenRequest::read(&path)).unwrap_err().to_string();
        assert!(err.contains(words), "{err}");
    };
    // Another image under the parent's name.
    let samples = samples().unwrap();
    let other = unpack(&samples, "ntfs-fixed.vhdx", dir.path()).unwrap();
    std::fs::rename(&parent, dir.path().join("away")).unwrap();
    std::fs::rename(&other, &parent).unwrap();
    refused(
        "ntfs-parent.vhdx: the parent was modified since this child was created, or is another",
    );
    // None at all.
    std::fs::remove_file(&parent).unwrap();
    refused("ntfs-parent.vhdx: No such file or directory");
    // One in a place that images may not pull files from.
    let elsewhere = tempfile::tempdir().unwrap();
    let moved = elsewhere.path().join("parent.vhdx");
    std::fs::copy(dir.path().join("away"), &moved).unwrap();
    std::os::unix::fs::symlink(&moved, &parent).unwrap();
    refused("--allow-dir");
    let allowed = OpenRequest::read(&path).allow_dirs(&[elsewhere.path().to_path_buf()]);
    images::open(&allowed).unwrap();
    // The child itself.
    std::fs::remove_file(&parent).unwrap();
    std::os::unix::fs::symlink(&path, &parent).unwrap();
    refused("is already part of this chain");
}

#[test]
fn info_needs_no_parent_and_reads_no_data() {
    let Some((dir, path)) = unpacked("ntfs-differential.vhdx") else { return };
    std::fs::remove_file(dir.path().join("ntfs-parent.vhdx")).unwrap();
    let request = OpenRequest { backing: false, ..OpenRequest::read(&path) };
    let image = images::open(&request).unwrap();
    let details = image.node.driver().details();
    assert_eq!(details["type"], "differencing");
    assert_eq!(details["backing-filename"], "ntfs-parent.vhdx");
    assert_eq!(details["cluster-size"], 2 << 20);
    let buf = AlignedBuf::zeroed(512, 512);
    let err = block_on(image.node.read(0, buf.buffers())).unwrap_err().to_string();
    assert!(err.contains("metadata only"), "{err}");
}
