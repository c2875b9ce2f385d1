//! VHDX images by the commands: ours as others read them, and damaged ones.
//!
//! `qemu-img` is the second opinion, and libvhdi for what QEMU does not know (4096-byte sectors,
//! parents): `integration/setup libvhdi` puts it below `target/integration`. Tests that need one
//! of them say so on stderr and pass where it is missing.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

mod common;

use common::{Random, fails, have, libvhdi, ok, ok_or, tool_ok, vublk};

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|err| panic!("{err}: {text}"))
}

/// What we say: size and SHA-256 of the content.
fn we_read(dir: &Path, image: &str) -> (u64, String) {
    ok(dir, &["convert", "-f", "vhdx", "-O", "raw", image, "content.raw"]);
    let size = std::fs::metadata(dir.join("content.raw")).unwrap().len();
    let sum = tool_ok(dir, "sha256sum", &["content.raw"]);
    (size, sum.split(' ').next().unwrap().to_string())
}

#[test]
fn new_images_are_read_by_others() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let with_qemu = have("qemu-img");
    for (name, size, options) in [
        ("a.vhdx", "100M", "subformat=dynamic"),
        ("b.vhdx", "10M", "subformat=fixed"),
        ("c.vhdx", "3M", "block_size=1M,log_size=4M"),
        ("d.vhdx", "5G", "block_size=256M,block_state_zero=on"),
        ("e.vhdx", "64T", "physical_sector_size=512"),
        ("f.vhdx", "4097K", "subformat=fixed,block_size=1M"),
    ] {
        ok(d, &["create", "-f", "vhdx", "-o", options, name, size]);
        let info = json(&ok(d, &["info", "--output=json", name]));
        assert_eq!(info["format"], "vhdx");
        if !with_qemu {
            continue;
        }
        tool_ok(d, "qemu-img", &["check", name]);
        let theirs = json(&tool_ok(d, "qemu-img", &["info", "--output=json", name]));
        for key in ["virtual-size", "cluster-size", "dirty-flag"] {
            assert_eq!(info[key], theirs[key], "{name}: {key}");
        }
    }
    for name in ["a.vhdx", "b.vhdx", "c.vhdx", "f.vhdx"] {
        if let Some(read) = libvhdi::reads(d, &[name]) {
            assert_eq!(read, we_read(d, name), "{name}");
        }
    }
}

#[test]
fn images_of_qemu_with_data_are_measured_and_read() {
    if !have("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let mut random = Random::new("images of QEMU");
    let mut content = vec![0; 9 << 20];
    for _ in 0..10 {
        let at = random.below(content.len() as u64 - 4096) as usize;
        content[at..at + 4096].fill_with(|| random.below(256) as u8);
    }
    std::fs::write(d.join("raw"), &content).unwrap();
    for options in ["subformat=fixed", "block_size=1M", "block_state_zero=off,block_size=2M"] {
        tool_ok(d, "qemu-img", &["convert", "-O", "vhdx", "-o", options, "raw", "q.vhdx"]);
        ok(d, &["compare", "-F", "raw", "q.vhdx", "raw"]);
        if let Some(read) = libvhdi::reads(d, &["q.vhdx"]) {
            assert_eq!(read, we_read(d, "q.vhdx"));
        }
    }
    let measure = |args: &[&str]| {
        let all = [&["measure", "-O", "vhdx", "--output=json"], args].concat();
        let sizes = json(&ok(d, &all));
        (sizes["required"].as_u64().unwrap(), sizes["fully-allocated"].as_u64().unwrap())
    };
    assert_eq!(measure(&["--size", "10M", "-o", "subformat=fixed"]), (14_680_064, 14_680_064));
    assert_eq!(measure(&["--size", "10M"]), (4 << 20, 36 << 20));
    let (required, full) = measure(&["-o", "block_size=1M", "-f", "raw", "raw"]);
    assert!(required > 4 << 20 && required <= full && full == 13 << 20, "{required} {full}");
}

#[test]
fn differencing_images_name_their_parent_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    let d = &dir.path().canonicalize().unwrap();
    std::fs::create_dir(d.join("sub")).unwrap();
    let options = "block_size=1M,logical_sector_size=4096";
    ok(d, &["create", "-f", "vhdx", "-o", options, "base.vhdx", "5M"]);
    let text = ok(d, &["create", "-f", "vhdx", "-b", "base.vhdx", "-F", "vhdx", "child.avhdx"]);
    assert!(text.contains("subformat=differencing") && text.contains("size=5242880"), "{text}");
    let absolute = d.join("child.avhdx");
    let absolute = absolute.to_str().unwrap();
    ok(d, &["create", "-f", "vhdx", "-b", absolute, "-F", "vhdx", "sub/grandchild.avhdx"]);
    let base = json(&ok(d, &["info", "--output=json", "base.vhdx"]));
    let child = json(&ok(d, &["info", "--output=json", "child.avhdx"]));
    let details = |info: &Value| info["format-specific"]["data"].clone();
    let locator = details(&child)["parent-locator"].clone();
    let linkage = format!("{{{}}}", details(&base)["data-write-guid"].as_str().unwrap());
    assert_eq!(locator["parent_linkage"], linkage.as_str());
    assert_eq!(locator["relative_path"], ".\\base.vhdx");
    assert_eq!(locator["absolute_win32_path"], d.join("base.vhdx").to_str().unwrap());
    assert_eq!(details(&child)["logical-sector-size"], 4096);
    assert_eq!(details(&child)["page-83-guid"], details(&base)["page-83-guid"]);
    assert_eq!(child["backing-filename"], "base.vhdx");
    // What lies above needs a permission; what is moved is found by its absolute path.
    let allow = d.to_str().unwrap();
    let line = fails(d, &["map", "sub/grandchild.avhdx"], 1);
    assert!(line.contains("--allow-dir"), "{line}");
    ok(d, &["map", "--allow-dir", allow, "sub/grandchild.avhdx"]);
    std::fs::create_dir(d.join("moved")).unwrap();
    std::fs::rename(d.join("sub/grandchild.avhdx"), d.join("moved/g.avhdx")).unwrap();
    ok(d, &["map", "--allow-dir", allow, "moved/g.avhdx"]);
    std::fs::create_dir_all(d.join("further/down")).unwrap();
    std::fs::copy(d.join("moved/g.avhdx"), d.join("further/down/g.avhdx")).unwrap();
    let info = ["info", "--backing-chain", "--allow-dir", allow, "further/down/g.avhdx"];
    let text = ok(d, &info);
    assert!(text.contains(&format!("(actual path: {absolute})")), "{text}");
    if let Some(read) = libvhdi::reads(d, &["moved/g.avhdx", "child.avhdx", "base.vhdx"]) {
        let empty = tool_ok(d, "sh", &["-c", "head -c 5242880 /dev/zero | sha256sum"]);
        assert_eq!(read, (5 << 20, empty.split(' ').next().unwrap().to_string()));
    }
}

#[test]
fn an_overlay_is_committed_to_its_parent() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let data: Vec<u8> = (0..8u32 << 20).map(|at| (at >> 9) as u8).collect();
    std::fs::write(d.join("base.raw"), &data).unwrap();
    ok(d, &["convert", "-q", "-f", "raw", "-O", "vhdx", "base.raw", "base.vhdx"]);
    for (below, above) in [("base.vhdx", "mid.vhdx"), ("mid.vhdx", "top.vhdx")] {
        ok(d, &["create", "-q", "-f", "vhdx", "-b", below, "-F", "vhdx", above]);
    }
    let shown = we_read(d, "top.vhdx");
    // Nothing in it, so nothing changes. It is not emptied.
    assert!(fails(d, &["commit", "top.vhdx"], 1).contains("say -d"));
    ok(d, &["commit", "-q", "-d", "top.vhdx"]);
    assert_eq!(we_read(d, "top.vhdx"), shown);
    let mut other = data;
    other[3 << 20..][..5 << 10].fill(0xee);
    std::fs::write(d.join("other.raw"), &other).unwrap();
    ok(d, &["convert", "-q", "-n", "-f", "raw", "-O", "vhdx", "other.raw", "top.vhdx"]);
    let shown_before = shown;
    let shown = we_read(d, "top.vhdx");
    assert_ne!(shown, shown_before);
    ok(d, &["commit", "-q", "-d", "top.vhdx"]);
    assert_eq!([we_read(d, "top.vhdx"), we_read(d, "mid.vhdx")], [shown.clone(), shown.clone()]);
    ok(d, &["commit", "-q", "-b", "base.vhdx", "top.vhdx"]);
    for name in ["top.vhdx", "mid.vhdx", "base.vhdx"] {
        assert_eq!(we_read(d, name), shown, "{name}");
        ok(d, &["check", "-q", name]);
    }
    let details = |name: &str| {
        json(&ok(d, &["info", "--output=json", name]))["format-specific"]["data"].clone()
    };
    let locator = details("mid.vhdx")["parent-locator"].clone();
    let linkage = format!("{{{}}}", details("base.vhdx")["data-write-guid"].as_str().unwrap());
    assert_eq!(locator["parent_linkage"], linkage.as_str());
    assert_eq!(locator["parent_linkage2"], "{00000000-0000-0000-0000-000000000000}");
}

/// The base would have to grow, by which its children would not know it any more.
#[test]
fn an_overlay_that_is_larger_than_its_parent_is_not_committed() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    ok(d, &["create", "-q", "-f", "vhdx", "base.vhdx", "3M"]);
    ok(d, &["create", "-q", "-f", "vhdx", "-b", "base.vhdx", "-F", "vhdx", "top.vhdx"]);
    ok(d, &["resize", "-q", "top.vhdx", "5M"]);
    let line = fails(d, &["commit", "-q", "-d", "top.vhdx"], 1);
    assert!(line.contains("(vublk convert)") && !line.contains("vublk resize"), "{line}");
    ok(d, &["convert", "-q", "-f", "vhdx", "-O", "vhdx", "top.vhdx", "whole.vhdx"]);
    ok(d, &["compare", "-q", "top.vhdx", "whole.vhdx"]);
}

#[test]
fn creation_refuses_what_makes_no_sense() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    ok(d, &["create", "-f", "vhdx", "base.vhdx", "3M"]);
    ok(d, &["create", "base.raw", "3M"]);
    let refused = |args: &[&str], words: &str| {
        let all = [&["create", "-f", "vhdx"], args].concat();
        let line = fails(d, &all, 1);
        assert!(line.contains(words), "{args:?}: {line}");
        assert!(!d.join("new.vhdx").exists());
    };
    refused(&["new.vhdx"], "needs a size");
    refused(&["new.vhdx", "0"], "from one sector");
    refused(&["new.vhdx", "65T"], "64T");
    refused(&["-o", "cluster_size=64k", "new.vhdx", "1M"], "no option 'cluster_size'");
    refused(&["-o", "block_size=3M", "new.vhdx", "1M"], "power of two");
    let on = |base: &'static str, format| ["-b", base, "-F", format, "new.vhdx"];
    refused(&on("base.raw", "raw"), "can stand on VHDX images only");
    refused(&on("none.vhdx", "vhdx"), "none.vhdx: No such file");
    refused(&["-b", "base.vhdx", "new.vhdx"], "say it with -F vhdx");
    refused(
        &["-u", "-b", "none.vhdx", "-F", "vhdx", "new.vhdx", "3M"],
        "must be there, also with -u",
    );
    let with = |options| ["-o", options, "-b", "base.vhdx", "-F", "vhdx", "new.vhdx"];
    refused(&with("subformat=fixed"), "a fixed image cannot have a backing file");
    refused(&with("block_state_zero=on"), "would hide all of the backing file");
    refused(&with("logical_sector_size=4096"), "logical sectors of 512 bytes");
    let before = std::fs::read(d.join("base.vhdx")).unwrap();
    let own = ["create", "-f", "vhdx", "-b", "base.vhdx", "-F", "vhdx", "base.vhdx"];
    let line = fails(d, &own, 1);
    assert!(line.contains("its own backing file"), "{line}");
    assert!(std::fs::read(d.join("base.vhdx")).unwrap() == before);
}

/// Changes bytes of a file.
fn patch(path: &Path, offset: u64, bytes: &[u8]) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}

#[test]
fn check_explains_and_repairs() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    ok(d, &["create", "-f", "vhdx", "-o", "block_size=1M", "a.vhdx", "3M"]);
    let clean = ok(d, &["check", "a.vhdx"]);
    assert!(clean.starts_with("No errors were found"), "{clean}");
    // A damaged copy: found, explained, and repaired if that is asked for.
    patch(&d.join("a.vhdx"), 256 << 10, b"gone");
    let before = std::fs::read(d.join("a.vhdx")).unwrap();
    let text = ok_or(d, &["check", "--explain", "a.vhdx"], 2);
    for line in [
        "region table 2 of 2 is damaged (signature or checksum)",
        "    where:  65536 bytes at 262144 of the file",
        "    means:  the image works with the other copy, but has no spare one",
        "    repair: replaces it by the good copy at 196608",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
    assert!(std::fs::read(d.join("a.vhdx")).unwrap() == before);
    let report = json(&ok_or(d, &["check", "--explain", "--output=json", "a.vhdx"], 2));
    assert_eq!(report["corruptions"], 1);
    assert_eq!(report["findings"][0]["repaired"], false);
    assert_eq!(report["findings"][0]["where"], "65536 bytes at 262144 of the file");
    let text = ok(d, &["check", "-r", "all", "a.vhdx"]);
    assert!(text.contains("Repaired: region table 2") && text.contains("1 corruptions"), "{text}");
    ok(d, &["check", "a.vhdx"]);
    // Two blocks in one place: nothing is guessed.
    let twice = [(4u64 << 20 | 6).to_le_bytes(), (4u64 << 20 | 6).to_le_bytes()].concat();
    patch(&d.join("a.vhdx"), 3 << 20, &twice);
    std::fs::OpenOptions::new()
        .write(true)
        .open(d.join("a.vhdx"))
        .unwrap()
        .set_len(6 << 20)
        .unwrap();
    let before = std::fs::read(d.join("a.vhdx")).unwrap();
    let text = ok_or(d, &["check", "-r", "all", "--explain", "a.vhdx"], 2);
    assert!(text.contains("BAT entries 0 and 1 give the same part of the file"), "{text}");
    assert!(text.contains("    repair: nothing: whose data it is cannot be known"), "{text}");
    assert!(std::fs::read(d.join("a.vhdx")).unwrap() == before);
    let line = fails(d, &["map", "a.vhdx"], 1);
    assert!(line.contains("foreign data"), "{line}");
    // Salvaged, with a word on what may be another's.
    let info = json(&ok(d, &["info", "--salvage", "--output=json", "a.vhdx"]));
    let doubtful = &info["format-specific"]["data"]["salvage"]["doubtful"];
    assert_eq!(doubtful.as_array().map(Vec::len), Some(1), "{info}");
    // Truncated.
    std::fs::OpenOptions::new()
        .write(true)
        .open(d.join("a.vhdx"))
        .unwrap()
        .set_len(2 << 20)
        .unwrap();
    let text = ok_or(d, &["check", "--explain", "a.vhdx"], 2);
    assert!(text.contains("truncated") && text.contains("vublk convert --salvage"), "{text}");
    // Who does not know of these commands is led to them.
    for args in [&["map", "a.vhdx"][..], &["convert", "a.vhdx", "new.raw"]] {
        let line = fails(d, args, 1);
        assert!(line.ends_with("`vublk check --explain` says what can be done"), "{line}");
    }
}

/// What a kilobyte claims is not believed: 64 TiB of disk, and nothing of it there.
#[test]
fn small_files_with_large_claims_cost_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    ok(d, &["create", "-f", "vhdx", "-o", "block_size=1M", "big.vhdx", "64T"]);
    let big = d.join("big.vhdx");
    // The file takes some KiB, and says that it is large.
    use std::os::unix::fs::MetadataExt;
    assert!(std::fs::metadata(&big).unwrap().blocks() * 512 <= 1 << 20);
    for command in [&["info"][..], &["check"], &["map", "-l", "1T"]] {
        let args = [command, &["big.vhdx"]].concat();
        let output = Command::new("sh")
            .current_dir(d)
            .args(["-c", "ulimit -v 1000000; exec timeout -s KILL 20 \"$@\"", "sh"])
            .arg(env!("CARGO_BIN_EXE_vublk"))
            .args(&args)
            .output()
            .unwrap();
        assert!(output.status.success(), "{args:?}: {output:?}");
    }
    std::fs::OpenOptions::new().write(true).open(&big).unwrap().set_len(1024).unwrap();
    let line = fails(d, &["info", "-f", "vhdx", "big.vhdx"], 1);
    assert!(line.contains("truncated"), "{line}");
    ok_or(d, &["check", "-f", "vhdx", "big.vhdx"], 2);
}

#[test]
fn what_is_left_of_a_truncated_image_is_salvaged() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let options = "subformat=fixed,block_size=1M";
    ok(d, &["create", "-f", "vhdx", "-o", options, "a.vhdx", "8M"]);
    let mut random = Random::new("salvage");
    let content: Vec<u8> = (0..8 << 20).map(|_| random.below(256) as u8).collect();
    patch(&d.join("a.vhdx"), 4 << 20, &content);
    // Whole images are not in need of it.
    assert!(!ok(d, &["info", "a.vhdx"]).contains("salvage"));
    let len = 9 << 20 | 512;
    std::fs::OpenOptions::new().write(true).open(d.join("a.vhdx")).unwrap().set_len(len).unwrap();
    let before = std::fs::read(d.join("a.vhdx")).unwrap();
    let line = fails(d, &["convert", "-O", "raw", "a.vhdx", "b.raw"], 1);
    assert!(line.contains("truncated"), "{line}");
    let info = json(&ok(d, &["info", "--salvage", "--output=json", "a.vhdx"]));
    let salvage = &info["format-specific"]["data"]["salvage"];
    let there = len - (4 << 20);
    let missing = (8 << 20) - there;
    assert_eq!(salvage["missing-bytes"], missing);
    assert_eq!(salvage["missing"][0]["start"], there);
    assert_eq!(salvage["missing"][0]["length"], missing);
    ok(d, &["convert", "--salvage", "-O", "raw", "a.vhdx", "b.raw"]);
    let (head, tail) = content.split_at(there as usize);
    let found = std::fs::read(d.join("b.raw")).unwrap();
    assert!(found.len() == content.len() && found.starts_with(head));
    assert!(found[there as usize..].iter().all(|byte| *byte == 0) && tail.len() as u64 == missing);
    // Compared with what was salvaged, and with a backup in another format: from where they differ.
    fails(d, &["compare", "-q", "a.vhdx", "b.raw"], 2);
    ok(d, &["compare", "--salvage", "a.vhdx", "b.raw"]);
    ok(d, &["compare", "--salvage", "-F", "vhdx", "b.raw", "a.vhdx"]);
    std::fs::write(d.join("backup.raw"), &content).unwrap();
    let compared = vublk(d, &["compare", "--salvage", "-F", "raw", "a.vhdx", "backup.raw"]);
    assert_eq!(compared.status.code(), Some(1), "{compared:?}");
    let at = content.iter().enumerate().skip(there as usize).find(|(_, byte)| **byte != 0);
    let told = String::from_utf8(compared.stdout).unwrap();
    assert_eq!(told, format!("Content mismatch at offset {}!\n", at.unwrap().0));
    let line = fails(d, &["compare", "--salvage", "b.raw", "backup.raw"], 2);
    assert!(line.contains("only vhdx images can be salvaged"), "{line}");
    // What is missing is told.
    let output = Command::new(env!("CARGO_BIN_EXE_vublk"))
        .current_dir(d)
        .env_remove("VUBLK_LOG")
        .args(["map", "--salvage", "a.vhdx"])
        .output()
        .unwrap();
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.contains(&format!("{missing} bytes of the disk are missing")), "{told}");
    assert!(std::fs::read(d.join("a.vhdx")).unwrap() == before);
    ok(d, &["create", "c.raw", "1M"]);
    let line = fails(d, &["info", "--salvage", "c.raw"], 1);
    assert!(line.contains("only vhdx images can be salvaged"), "{line}");
    let line = vublk(d, &["serve", "--salvage", "--socket-path", "s", "a.vhdx"]);
    assert_eq!(line.status.code(), Some(2), "{line:?}");
}

#[test]
fn a_disk_that_is_cleared_leaves_a_short_file() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let len = |name: &str| std::fs::metadata(d.join(name)).unwrap().len();
    // So many MiB of data, and a hole.
    let fill = |data: usize| {
        std::fs::write(d.join("raw"), vec![1; data << 20]).unwrap();
        ok(d, &["resize", "-f", "raw", "raw", "20M"]);
        // One piece after the other, so that the file has the order of the disk.
        ok(d, &["convert", "-n", "-m", "1", "-f", "raw", "-O", "vhdx", "raw", "a.vhdx"]);
        ok(d, &["compare", "-F", "raw", "a.vhdx", "raw"]);
        ok(d, &["check", "a.vhdx"]);
        if have("qemu-img") {
            tool_ok(d, "qemu-img", &["check", "a.vhdx"]);
            tool_ok(d, "qemu-img", &["compare", "-F", "raw", "a.vhdx", "raw"]);
        }
    };
    for block in ["1M", "2M"] {
        let options = format!("block_size={block}");
        ok(d, &["create", "-f", "vhdx", "-o", &options, "a.vhdx", "20M"]);
        let fresh = len("a.vhdx");
        for _ in 0..2 {
            for data in [16, 4, 8, 0] {
                fill(data);
                assert_eq!(len("a.vhdx"), fresh + ((data as u64) << 20), "{block}, {data} MiB");
            }
        }
    }
}

#[test]
fn disks_are_resized() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let with_qemu = have("qemu-img");
    let mut random = Random::new("resize");
    for options in ["subformat=fixed,block_size=1M", "subformat=dynamic"] {
        ok(d, &["create", "-f", "vhdx", "-o", options, "a.vhdx", "3M"]);
        let mut content = vec![0; 3 << 20];
        if options.contains("fixed") {
            content.fill_with(|| random.below(256) as u8);
            patch(&d.join("a.vhdx"), 4 << 20, &content);
        }
        for size in [5 << 20, 200 << 20, (2 << 20) + 512, 6 << 20] {
            let size_text = u64::to_string(&size);
            if size < content.len() as u64 {
                let line = fails(d, &["resize", "a.vhdx", &size_text], 1);
                assert!(line.contains("use --shrink"), "{line}");
            }
            ok(d, &["resize", "--shrink", "a.vhdx", &size_text]);
            content.resize(size as usize, 0);
            std::fs::write(d.join("raw"), &content).unwrap();
            ok(d, &["compare", "-F", "raw", "a.vhdx", "raw"]);
            ok(d, &["check", "a.vhdx"]);
            if with_qemu {
                tool_ok(d, "qemu-img", &["check", "a.vhdx"]);
                tool_ok(d, "qemu-img", &["compare", "-F", "raw", "a.vhdx", "raw"]);
            }
            if let Some(read) = libvhdi::reads(d, &["a.vhdx"]) {
                assert_eq!(read, we_read(d, "a.vhdx"));
            }
        }
        let line = fails(d, &["resize", "a.vhdx", "6291457"], 1);
        assert!(line.contains("not a multiple of the 512 bytes"), "{line}");
    }
    let told = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vublk"));
        let output = command.current_dir(d).env_remove("VUBLK_LOG").args(args).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8([output.stdout, output.stderr].concat()).unwrap()
    };
    assert!(told(&["resize", "a.vhdx", "+1M"]).contains("images that stand on it"));
    assert_eq!(told(&["resize", "-q", "a.vhdx", "+1M"]), "");
    // A child knows its parent by what a resize changes.
    ok(d, &["create", "-f", "vhdx", "-b", "a.vhdx", "-F", "vhdx", "child.vhdx"]);
    ok(d, &["resize", "child.vhdx", "+1M"]);
    ok(d, &["map", "child.vhdx"]);
    ok(d, &["resize", "a.vhdx", "+1M"]);
    let line = fails(d, &["map", "child.vhdx"], 1);
    assert!(line.contains("was modified since this child was created"), "{line}");
}
