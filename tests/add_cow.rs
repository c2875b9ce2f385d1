//! add-cow on the command line: made, shown, converted, checked, refused.
//!
//! No other program reads the format, so contents are compared with what a plain model says, and
//! with `qemu-img` once they are raw.

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use serde_json::Value;

mod common;

use common::{Setup, fails, have, ok, ok_or, tool_ok, vublk};
use vublk::frontend::Request;
use vublk::images::frozen;
use vublk::io::{HostFile, OpenOptions};

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|err| panic!("{err}: {text}"))
}

/// Sectors filled with `first`, `first + 1`, …
fn numbered(first: u8, sectors: u8) -> Vec<u8> {
    (first..first + sectors).flat_map(|value| [value; 512]).collect()
}

/// A directory with `base` (raw, 40 sectors) and `top`, `top.raw` over it.
fn base_and_top() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("base"), numbered(1, 40)).unwrap();
    let made = ok(dir.path(), &["create", "-f", "add-cow", "-b", "base", "-F", "raw", "top"]);
    assert_eq!(
        made,
        "Formatting 'top', fmt=add-cow size=20480 image_file=top.raw backing_file=base \
         backing_fmt=raw\n"
    );
    dir
}

/// Sets bytes of the add-cow file.
fn patch(path: &Path, at: u64, bytes: &[u8]) {
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.write_all_at(bytes, at).unwrap();
}

/// Puts a sector into the image file and sets its bit.
fn own_sector(dir: &Path, sector: u64, value: u8) {
    patch(&dir.join("top.raw"), sector * 512, &[value; 512]);
    let mut bits = std::fs::read(dir.join("top")).unwrap();
    let byte = 2560 + sector as usize / 8;
    bits[byte] |= 1 << (sector % 8);
    patch(&dir.join("top"), byte as u64, &bits[byte..=byte]);
}

fn content(dir: &Path, image: &str) -> Vec<u8> {
    ok(dir, &["convert", "-q", "-f", "add-cow", image, "content"]);
    std::fs::read(dir.join("content")).unwrap()
}

#[test]
fn what_is_created_is_version_1_to_the_byte() {
    let dir = base_and_top();
    let d = dir.path();
    let bytes = std::fs::read(d.join("top")).unwrap();
    let mut expected = b"ADD_COW\xff\0\0\0\x01".to_vec();
    expected.resize(2565, 0);
    expected[12..16].copy_from_slice(b"base");
    expected[1036..1043].copy_from_slice(b"top.raw");
    assert!(bytes == expected);
    assert_eq!(std::fs::read(d.join("top.raw")).unwrap(), [0; 40 * 512]);
    assert!(content(d, "top") == numbered(1, 40));
    own_sector(d, 3, 0xaa);
    let mut model = numbered(1, 40);
    model[3 * 512..4 * 512].fill(0xaa);
    assert!(content(d, "top") == model);
    // Guessed by its magic, too.
    ok(d, &["compare", "-q", "top", "-F", "raw", "content"]);
}

#[test]
fn info_map_and_measure_tell_what_there_is() {
    let dir = base_and_top();
    let d = dir.path();
    own_sector(d, 0, 1);
    own_sector(d, 39, 2);
    let info = json(&ok(d, &["info", "--output=json", "top"]));
    assert_eq!(info["virtual-size"], 20480);
    assert_eq!(info["format"], "add-cow");
    assert_eq!(info["backing-filename"], "base");
    assert_eq!(info["backing-filename-format"], "raw");
    assert_eq!(info["format-specific"]["data"]["image-filename"], "top.raw");
    let chain = json(&ok(d, &["info", "--backing-chain", "--output=json", "top"]));
    assert_eq!(chain[1]["filename"], "base");
    let map = json(&ok(d, &["map", "--output=json", "top"]));
    let rows: Vec<_> = (map.as_array().unwrap().iter())
        .map(|row| (row["start"].as_u64().unwrap(), row["depth"].as_u64().unwrap()))
        .collect();
    assert_eq!(rows, [(0, 0), (512, 1), (39 * 512, 0)]);
    let measured = json(&ok(d, &["measure", "--output=json", "-O", "add-cow", "--size", "1G"]));
    assert_eq!(measured["required"], 2560 + (1 << 30) / 4096);
    assert_eq!(measured["fully-allocated"], 2560 + (1 << 30) / 4096 + (1 << 30));
}

#[test]
fn a_map_goes_on_behind_a_backing_with_an_odd_end() {
    let dir = base_and_top();
    let d = dir.path();
    std::fs::write(d.join("base"), [1; 1300]).unwrap();
    let map = json(&ok(d, &["map", "--output=json", "top"]));
    let end = map.as_array().unwrap().last().unwrap();
    assert_eq!(end["start"].as_u64().unwrap() + end["length"].as_u64().unwrap(), 20480);
}

#[test]
fn chains_remember_the_format_of_each_layer() {
    let dir = base_and_top();
    let d = dir.path();
    own_sector(d, 3, 0xaa);
    ok(d, &["create", "-q", "-f", "add-cow", "-b", "top", "-F", "add-cow", "over"]);
    let mut model = numbered(1, 40);
    model[3 * 512..4 * 512].fill(0xaa);
    assert!(content(d, "over") == model);
    ok(d, &["create", "-q", "-f", "qcow2", "-b", "over", "-F", "add-cow", "over.qcow2"]);
    ok(d, &["compare", "-q", "over.qcow2", "-F", "raw", "content"]);
    // A copy that has lost the attribute is not taken for raw when it plainly is not.
    std::fs::write(d.join("copy"), std::fs::read(d.join("over")).unwrap()).unwrap();
    let err = fails(d, &["convert", "copy", "x"], 1);
    assert!(err.contains("looks like add-cow") && err.contains("vublk rebase -u"), "{err}");
    assert!(!d.join("x").exists());
}

#[test]
fn convert_goes_to_and_from_it() {
    let dir = base_and_top();
    let d = dir.path();
    own_sector(d, 7, 0xaa);
    ok(d, &["convert", "-q", "-O", "add-cow", "top", "alone"]);
    ok(d, &["compare", "-q", "top", "alone"]);
    let info = json(&ok(d, &["info", "--output=json", "alone"]));
    assert_eq!(info["backing-filename"], Value::Null);
    ok(d, &["convert", "-q", "-O", "add-cow", "-B", "base", "-F", "raw", "top", "thin"]);
    ok(d, &["compare", "-q", "top", "thin"]);
    let check = json(&ok(d, &["check", "--output=json", "thin"]));
    assert_eq!(check["allocated-clusters"], 1);
    if have("qemu-img") {
        ok(d, &["convert", "-q", "-O", "qcow2", "top", "top.qcow2"]);
        ok(d, &["convert", "-q", "top", "plain"]);
        tool_ok(d, "qemu-img", &["compare", "-f", "qcow2", "-F", "raw", "top.qcow2", "plain"]);
    }
}

#[test]
fn an_existing_image_file_can_be_used_and_is_hidden() {
    let dir = base_and_top();
    let d = dir.path();
    std::fs::write(d.join("data"), [0x55; 8192]).unwrap();
    let args = ["create", "-q", "-f", "add-cow", "-o", "image-file=data", "-b", "base", "-F"];
    ok(d, &[&args[..], &["raw", "other"]].concat());
    assert!(content(d, "other") == numbered(1, 16));
    let refused = |args: &[&str]| fails(d, &[&["create", "-f", "add-cow"][..], args].concat(), 1);
    assert!(refused(&["-b", "base", "-F", "raw", "top"]).contains("image-file=top.raw"));
    let err = refused(&["-o", "image-file=gone", "-b", "base", "-F", "raw", "x"]);
    assert!(err.contains("gone: No such file") && err.contains("without -o image-file"), "{err}");
    let err = refused(&["-o", "image-file=base", "-b", "base", "-F", "raw", "x"]);
    assert!(err.contains("base: is both image file and backing file"), "{err}");
    for args in [&["-o", "image-file=base", "-b", "base"][..], &["-b", "x.raw"]] {
        // Whether it is looked at or not.
        let err = refused(&[args, &["-u", "-F", "raw", "x", "20K"]].concat());
        assert!(err.contains("is both image file and backing file"), "{err}");
        assert!(!d.join("x").exists() && !d.join("x.raw").exists());
    }
    let err = refused(&["-o", "image-file=data", "-b", "base", "-F", "raw", "data"]);
    assert!(err.contains("data"), "{err}");
    assert_eq!(std::fs::read(d.join("data")).unwrap(), [0x55; 8192], "not emptied");
    assert!(refused(&["-b", "base", "x"]).contains("say it with -F"));
    assert!(refused(&["-b", "gone", "-F", "raw", "x"]).contains("gone: No such file"));
    assert!(refused(&["x"]).contains("needs a size"));
    std::fs::write(d.join("odd"), [1; 1000]).unwrap();
    let err = refused(&["-o", "image-file=odd", "x"]);
    assert!(err.contains("image size is not a multiple of 512"), "{err}");
    assert!(!d.join("x").exists() && !d.join("x.raw").exists());
    let err = refused(&["-b", &"n".repeat(1024), "-u", "-F", "raw", "x", "1M"]);
    assert!(err.contains("too long, 1023 fit"), "{err}");
    assert!(!d.join("x").exists() && !d.join("x.raw").exists());
}

#[test]
fn check_finds_and_repairs_with_qemu_imgs_exit_codes() {
    let dir = base_and_top();
    let d = dir.path();
    let bytes = std::fs::read(d.join("top")).unwrap();
    assert!(ok(d, &["check", "top"]).contains("0/40 = 0.00% allocated"));
    std::fs::write(d.join("top"), &bytes[..2562]).unwrap();
    assert!(ok_or(d, &["check", "top"], 2).contains("bitmap is short: 2 of 5 bytes"));
    ok_or(d, &["check", "-r", "leaks", "top"], 2);
    assert!(ok(d, &["check", "-r", "all", "top"]).contains("1 corruptions"));
    assert!(std::fs::read(d.join("top")).unwrap() == bytes);
    std::fs::write(d.join("top"), [&bytes[..], &[0; 9]].concat()).unwrap();
    assert!(ok_or(d, &["check", "top"], 3).contains("leftover: 9 bytes"));
    ok(d, &["check", "-r", "leaks", "top"]);
    assert!(std::fs::read(d.join("top")).unwrap() == bytes);
}

#[test]
fn resize_changes_both_files() {
    let dir = base_and_top();
    let d = dir.path();
    ok(d, &["resize", "-q", "--shrink", "top", "8K"]);
    assert_eq!(std::fs::metadata(d.join("top.raw")).unwrap().len(), 8192);
    assert_eq!(std::fs::metadata(d.join("top")).unwrap().len(), 2562);
    ok(d, &["resize", "-q", "top", "30K"]);
    // What the backing has behind the old end does not show.
    let mut model = numbered(1, 16);
    model.resize(30 << 10, 0);
    assert!(content(d, "top") == model);
    assert!(ok(d, &["check", "top"]).contains("No errors"));
}

#[test]
fn hostile_files_are_refused_and_not_modified() {
    let dir = base_and_top();
    let d = dir.path();
    let good = std::fs::read(d.join("top")).unwrap();
    let refused = |change: &dyn Fn(&mut Vec<u8>), message: &str| {
        let mut bytes = good.clone();
        change(&mut bytes);
        std::fs::write(d.join("top"), &bytes).unwrap();
        for command in [&["info"][..], &["map"], &["check", "-r", "all"], &["resize"]] {
            let mut args = [command, &["-f", "add-cow", "top"]].concat();
            if command == ["resize"] {
                args.push("+1M");
            }
            let err = fails(d, &args, 1);
            assert!(err.contains(message), "{args:?}: {err}");
        }
        assert!(std::fs::read(d.join("top")).unwrap() == bytes, "{message}");
    };
    let name = |at: usize, name: &'static str| {
        move |bytes: &mut Vec<u8>| {
            bytes[at..at + 1024].fill(0);
            bytes[at..at + name.len()].copy_from_slice(name.as_bytes());
        }
    };
    refused(&|bytes| bytes.truncate(2559), "truncated add-cow header");
    refused(&|bytes| bytes.truncate(0), "not an add-cow file");
    refused(&|bytes| bytes[0] = 0, "not an add-cow file");
    refused(&|bytes| bytes[..4].copy_from_slice(b"ACOW"), "(ACOW) is not supported");
    refused(&|bytes| bytes[11] = 9, "add-cow version 9 is not supported, only 1");
    refused(&|bytes| bytes[12..1036].fill(b'x'), "backing_file: name is not terminated");
    refused(&|bytes| bytes[1036..2060].fill(b'x'), "image_file: name is not terminated");
    refused(&name(1036, ""), "image_file: name is empty");
    refused(&name(1036, "a\nb"), "control characters");
    refused(&name(1036, "gone"), "image file: gone: No such file");
    refused(&name(1036, "top"), "already part of this chain");
    refused(&name(1036, "../outside"), "No such file");
    refused(&name(1036, "/etc/passwd"), "--allow-dir");
    refused(&name(1036, "nbd:host:1"), "protocol 'nbd:' is not supported");
    refused(&name(1036, "/dev/null"), "--allow-dir");
    std::fs::create_dir(d.join("sub")).unwrap();
    refused(&name(1036, "sub"), "directory");
    // What the backing is matters to who reads it.
    let unreadable = |change: &dyn Fn(&mut Vec<u8>), message: &str| {
        let mut bytes = good.clone();
        change(&mut bytes);
        std::fs::write(d.join("top"), &bytes).unwrap();
        for args in [&["map", "top"][..], &["resize", "top", "+1M"]] {
            let err = fails(d, args, 1);
            assert!(err.contains(message), "{args:?}: {err}");
        }
        assert!(std::fs::read(d.join("top")).unwrap() == bytes, "{message}");
    };
    unreadable(&name(12, "gone"), "backing file: gone: No such file");
    unreadable(&name(12, "top.raw"), "already part of this chain");
    unreadable(&name(12, "/etc/passwd"), "--allow-dir");
    unreadable(&name(12, "json:{}"), "json:{}: missing field `driver`");
    assert_eq!(std::fs::metadata(d.join("top.raw")).unwrap().len(), 40 * 512);
}

/// What stands in an image's place to fool who opens it: links, pipes, one file in two roles. The
/// left column has the words of the format's description.
#[test]
fn files_that_are_not_what_they_seem_are_refused_and_not_modified() {
    use std::os::unix::fs::symlink;
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("secret"), vec![7; 40 * 512]).unwrap();
    let secret = outside.path().join("secret");
    let replace = |d: &Path, name: &str, target: &Path| {
        std::fs::remove_file(d.join(name)).unwrap();
        symlink(target, d.join(name)).unwrap();
    };
    type Plant<'a> = &'a dyn Fn(&Path);
    let cases: &[(&str, Plant<'_>, &str)] = &[
        (
            "image, backing, add-cow identical: image is add-cow, by a symbolic link",
            &|d| replace(d, "top.raw", Path::new("top")),
            "already part of this chain",
        ),
        (
            "image is add-cow, by a hard link",
            &|d| {
                std::fs::remove_file(d.join("top.raw")).unwrap();
                std::fs::hard_link(d.join("top"), d.join("top.raw")).unwrap();
            },
            "already part of this chain",
        ),
        (
            "backing is add-cow, by a symbolic link",
            &|d| replace(d, "base", Path::new("top")),
            "already part of this chain",
        ),
        (
            "backing is image, by a hard link",
            &|d| {
                std::fs::remove_file(d.join("base")).unwrap();
                std::fs::hard_link(d.join("top.raw"), d.join("base")).unwrap();
            },
            "already part of this chain",
        ),
        (
            "symlink policy: image leaves the directory",
            &|d| replace(d, "top.raw", &secret),
            "--allow-dir",
        ),
        (
            "symlink policy: backing leaves the directory",
            &|d| replace(d, "base", &secret),
            "--allow-dir",
        ),
        (
            "\"..\" policy: the name goes up and to another directory",
            &|d| {
                let up = "../".repeat(d.components().count());
                let name = format!("{up}{}", secret.display());
                let mut field = [0; 1024];
                field[..name.len()].copy_from_slice(name.as_bytes());
                patch(&d.join("top"), 12, &field);
            },
            "--allow-dir",
        ),
        (
            "a link that leads to itself",
            &|d| replace(d, "top.raw", Path::new("top.raw")),
            "symbolic link",
        ),
        (
            "image not a regular file or block device: a pipe",
            &|d| {
                std::fs::remove_file(d.join("top.raw")).unwrap();
                let mode = rustix::fs::Mode::from_raw_mode(0o600);
                let fifo = rustix::fs::FileType::Fifo;
                rustix::fs::mknodat(rustix::fs::CWD, d.join("top.raw"), fifo, mode, 0).unwrap();
            },
            "neither a regular file nor a block device",
        ),
        (
            "a socket",
            &|d| {
                std::fs::remove_file(d.join("top.raw")).unwrap();
                drop(std::os::unix::net::UnixListener::bind(d.join("top.raw")).unwrap());
            },
            "top.raw",
        ),
    ];
    for (what, plant, message) in cases {
        let dir = base_and_top();
        let d = dir.path();
        own_sector(d, 3, 0xaa);
        plant(d);
        let before = std::fs::read(d.join("top")).unwrap();
        let state = tempfile::Builder::new().prefix("vublk-").tempdir_in("/dev/shm").unwrap();
        let state_dir = state.path().to_str().unwrap();
        let serve = ["serve", "--socket-path", "s", "--state-dir", state_dir];
        for command in [&["map"][..], &["resize", "-q"], &["commit", "-q"], &serve] {
            let mut args = [command, &["-f", "add-cow", "top"]].concat();
            if command[0] == "resize" {
                args.push("+1M");
            }
            // Starting once more would not help.
            let code = if command[0] == "serve" { 78 } else { 1 };
            let err = fails(d, &args, code);
            assert!(err.contains(message), "{what}: {args:?}: {err}");
        }
        assert!(std::fs::read(d.join("top")).unwrap() == before, "{what}: modified");
    }
    assert!(std::fs::read(secret).unwrap() == vec![7; 40 * 512]);
}

/// What is odd and yet opened: each reads as the format's description says, is left as it is by who
/// only reads, and `check` names it.
#[test]
fn odd_files_read_as_the_format_says() {
    let mut model = numbered(1, 40);
    model[3 * 512..4 * 512].fill(0xaa);
    let zeros_from = |sector: usize| {
        let mut model = model.clone();
        model[sector * 512..].fill(0);
        model
    };
    let of_base = |sectors: u8| [&model[..4 * 512], &numbered(5, sectors - 4)[..]].concat();
    type Plant<'a> = &'a dyn Fn(&Path);
    let cases: &[(&str, Plant<'_>, Vec<u8>, &str, i32)] = &[
        (
            "missing bytes mean 0 on read",
            &|d| {
                let bytes = std::fs::read(d.join("top")).unwrap();
                std::fs::write(d.join("top"), &bytes[..2561]).unwrap();
            },
            model.clone(),
            "bitmap is short: 1 of 5 bytes",
            2,
        ),
        (
            "longer file: ignore the surplus",
            &|d| patch(&d.join("top"), 2565, &[0xff; 4000]),
            model.clone(),
            "image file is smaller than the highest set bit",
            2,
        ),
        (
            "bits past the last sector: ignore on read",
            &|d| {
                std::fs::OpenOptions::new()
                    .write(true)
                    .open(d.join("top.raw"))
                    .and_then(|file| file.set_len(37 * 512))
                    .unwrap();
                patch(&d.join("top"), 2564, &[0xe0]);
            },
            of_base(37),
            "bits are set past the end",
            3,
        ),
        (
            "reserved bytes non-zero: warn in check only",
            &|d| patch(&d.join("top"), 2100, &[1]),
            model.clone(),
            "reserved bytes of the header are not zero",
            0,
        ),
        (
            "an odd tail: ignore it",
            &|d| patch(&d.join("top.raw"), 40 * 512, &[9; 100]),
            model.clone(),
            "no whole sector and are ignored",
            0,
        ),
        (
            "backing shorter: zero fill, also inside the last partial sector",
            &|d| std::fs::write(d.join("base"), &numbered(1, 40)[..10 * 512]).unwrap(),
            zeros_from(10),
            "1/40",
            0,
        ),
        (
            "backing longer: the rest is invisible",
            &|d| std::fs::write(d.join("base"), numbered(1, 80)).unwrap(),
            model.clone(),
            "1/40",
            0,
        ),
        (
            "empty backing_file: bit 0 reads zeros",
            &|d| patch(&d.join("top"), 12, &[0; 4]),
            [&[0; 3 * 512][..], &[0xaa; 512], &[0; 36 * 512]].concat(),
            "1/40",
            0,
        ),
        (
            "when all bits are set, the image alone is the disk",
            &|d| {
                patch(&d.join("top"), 2560, &[0xff; 5]);
                std::fs::remove_file(d.join("base")).unwrap();
                std::fs::write(d.join("base"), "").unwrap();
            },
            [&[0; 3 * 512][..], &[0xaa; 512], &[0; 36 * 512]].concat(),
            "fully allocated: backing can be dropped",
            0,
        ),
    ];
    for (what, plant, expected, finding, code) in cases {
        let dir = base_and_top();
        let d = dir.path();
        own_sector(d, 3, 0xaa);
        plant(d);
        let before = std::fs::read(d.join("top")).unwrap();
        assert!(content(d, "top") == *expected, "{what}");
        let text = ok_or(d, &["check", "-f", "add-cow", "top"], *code);
        assert!(text.contains(finding), "{what}: {text}");
        assert!(std::fs::read(d.join("top")).unwrap() == before, "{what}: modified");
    }
}

/// An image file of terabytes has a bitmap of gigabytes, and neither is read into memory.
#[test]
fn a_huge_sparse_image_is_opened_in_little_memory() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    ok(d, &["create", "-q", "-f", "add-cow", "huge", "8T"]);
    patch(&d.join("huge"), 2560 + (1 << 30), &[1]);
    let limited = |command: &str| {
        let vublk = env!("CARGO_BIN_EXE_vublk");
        // In KiB, of address space: threads and libraries take most of it.
        let script = format!("ulimit -v 600000; {vublk} {command}");
        let output =
            std::process::Command::new("sh").current_dir(d).args(["-c", &script]).output().unwrap();
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{command}: {err}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(limited("info -f add-cow huge").contains("8 TiB"));
    assert!(limited("check -f add-cow huge").contains("1/17179869184"));
}

/// Names are taken relative to the add-cow file, when it is made and when it is opened, wherever the
/// command runs.
#[test]
fn names_are_relative_to_the_image_wherever_the_command_runs() {
    let dir = base_and_top();
    let d = dir.path();
    std::fs::create_dir(d.join("elsewhere")).unwrap();
    let there = d.join("elsewhere");
    let args = ["create", "-q", "-f", "add-cow", "-b", "base", "-F", "raw", "../second"];
    ok(&there, &args);
    assert!(d.join("second.raw").exists() && !there.join("second.raw").exists());
    ok(&there, &["compare", "-q", "-F", "raw", "../second", "../base"]);
    // What lies there under the same name is somebody else's.
    std::fs::write(there.join("base"), [0; 40 * 512]).unwrap();
    ok(&there, &["compare", "-q", "-F", "raw", "../second", "../base"]);
    let err =
        fails(&there, &["create", "-f", "add-cow", "-b", "third", "-F", "raw", "../third"], 1);
    assert!(err.contains("third"), "{err}");
    assert!(!d.join("third").exists());
    std::os::unix::fs::symlink("top", d.join("link")).unwrap();
    let args = ["create", "-f", "add-cow", "-b", "link", "-F", "add-cow", "top"];
    let before = std::fs::read(d.join("top")).unwrap();
    let err = fails(d, &args, 1);
    assert!(err.contains("top"), "{err}");
    assert!(std::fs::read(d.join("top")).unwrap() == before, "its own backing");
}

#[test]
fn cycles_are_refused_and_deep_chains_opened() {
    let dir = base_and_top();
    let d = dir.path();
    // Two overlays, each on the other.
    ok(d, &["create", "-q", "-f", "add-cow", "-b", "top", "-F", "add-cow", "over"]);
    ok(d, &["create", "-q", "-f", "add-cow", "-b", "over", "-F", "add-cow", "third"]);
    std::fs::rename(d.join("third"), d.join("top")).unwrap();
    for image in ["top", "over"] {
        let output = vublk(d, &["map", image]);
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{err}");
        assert!(err.contains("already part of this chain"), "{err}");
    }
    let dir = base_and_top();
    let d = dir.path();
    let mut below = "top".to_string();
    for layer in 0..210 {
        let name = format!("layer{layer}");
        let args = ["create", "-q", "-f", "add-cow", "-b", &below, "-F", "add-cow", "-u", &name];
        ok(d, &[&args[..], &["20K"]].concat());
        below = name;
    }
    assert!(content(d, &below) == numbered(1, 40));
    // Two files each, and the bottom.
    for layer in 210..300 {
        let name = format!("layer{layer}");
        let args = ["create", "-q", "-f", "add-cow", "-b", &below, "-F", "add-cow", "-u", &name];
        ok(d, &[&args[..], &["20K"]].concat());
        below = name;
    }
    let err = fails(d, &["map", &below], 1);
    assert!(err.contains("the chain of images is longer than 512 files"), "{err}");
}

#[test]
fn the_files_are_locked_each_for_itself() {
    let dir = base_and_top();
    let d = dir.path();
    // Another image over the same image file.
    let args = ["create", "-q", "-f", "add-cow", "-o", "image-file=top.raw", "-b", "base", "-F"];
    ok(d, &[&args[..], &["raw", "twin"]].concat());
    let socket = d.join("socket");
    let mut served = std::process::Command::new(env!("CARGO_BIN_EXE_vublk"))
        .current_dir(d)
        .args(["serve", "--socket-path", "socket", "top"])
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    for _ in 0..500 {
        if socket.exists() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let err = fails(d, &["resize", "twin", "+1M"], 1);
    assert!(err.contains("top.raw"), "{err}");
    fails(d, &["resize", "-f", "raw", "base", "+1M"], 1);
    ok(d, &["convert", "-q", "-f", "raw", "base", "copy"]);
    served.kill().unwrap();
    served.wait().unwrap();
}

#[test]
fn commit_pushes_down_and_empties() {
    let dir = base_and_top();
    let d = dir.path();
    own_sector(d, 3, 0xaa);
    own_sector(d, 39, 0xbb);
    ok(d, &["create", "-q", "-f", "add-cow", "-b", "top", "-F", "add-cow", "over"]);
    let before = content(d, "over");
    // Down to the bottom in one go; the overlay between then holds nothing that matters.
    assert_eq!(ok(d, &["commit", "top"]), "Image committed.\n");
    assert!(std::fs::read(d.join("base")).unwrap() == before);
    assert_eq!(std::fs::read(d.join("top")).unwrap()[2560..], [0; 5]);
    assert!(content(d, "over") == before);
    own_sector(d, 5, 0xcc);
    let changed = content(d, "over");
    assert_eq!(ok(d, &["commit", "-q", "-b", "base", "over"]), "");
    assert!(std::fs::read(d.join("base")).unwrap() == changed);
    // Into another add-cow image, which is locked for writing with its image file.
    let args = ["create", "-q", "-f", "add-cow", "-b", "over", "-F", "add-cow", "upper"];
    ok(d, &args);
    ok(d, &["commit", "-d", "upper"]);
    assert!(content(d, "upper") == changed);
    assert!(fails(d, &["commit", "-b", "nowhere", "over"], 1).contains("Did not find 'nowhere'"));
    ok(d, &["create", "-q", "-f", "add-cow", "alone", "1M"]);
    assert!(fails(d, &["commit", "alone"], 1).contains("does not have a backing file"));
    ok(d, &["create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "q"]);
    assert!(fails(d, &["commit", "q"], 1).contains("say -d"));
    ok(d, &["commit", "-d", "q"]);
}

#[test]
fn commit_grows_a_base_that_is_too_small() {
    let dir = base_and_top();
    let d = dir.path();
    ok(d, &["resize", "-q", "top", "30K"]);
    own_sector(d, 55, 0xaa);
    let before = content(d, "top");
    ok(d, &["commit", "-q", "top"]);
    assert!(std::fs::read(d.join("base")).unwrap() == before);
    // Or says which file cannot.
    ok(d, &["create", "-q", "-f", "vhdx", "small", "1M"]);
    ok(d, &["create", "-q", "-f", "add-cow", "-b", "small", "-F", "vhdx", "wide", "2M"]);
    let err = fails(d, &["commit", "wide"], 1);
    assert!(err.contains("committing wide (which is as it was) to small: "), "{err}");
}

/// A name that is written is one by which the image can be opened again.
#[test]
fn rebase_writes_no_name_that_is_refused_afterwards() {
    let dir = base_and_top();
    let d = dir.path();
    let before = content(d, "top");
    let elsewhere = tempfile::tempdir().unwrap();
    let out = elsewhere.path().join("out");
    std::fs::copy(d.join("base"), &out).unwrap();
    let out = out.to_str().unwrap();
    std::fs::hard_link(d.join("top.raw"), d.join("linked")).unwrap();
    for new in ["top.raw", "linked"] {
        for how in [&["rebase", "-u"][..], &["rebase"]] {
            let err = fails(d, &[how, &["-b", new, "-F", "raw", "top"]].concat(), 1);
            assert!(err.contains("is its image file"), "{err}");
        }
    }
    let err = fails(d, &["rebase", "-u", "-b", "./top", "-F", "raw", "top"], 1);
    assert!(err.contains("its own backing file"), "{err}");
    let err = fails(d, &["rebase", "-b", out, "-F", "raw", "top"], 1);
    assert!(err.contains("--allow-dir"), "{err}");
    // What the new one stands on is opened by way of the image, too.
    ok(d, &["create", "-q", "-f", "qcow2", "-u", "-b", out, "-F", "raw", "middle", "8192"]);
    let err = fails(d, &["rebase", "-b", "middle", "-F", "qcow2", "top"], 1);
    assert!(err.contains("--allow-dir"), "{err}");
    assert!(content(d, "top") == before);
    let allow = ["--allow-dir", elsewhere.path().to_str().unwrap()];
    ok(d, &[&["rebase", "-q", "-b", out, "-F", "raw", "top"][..], &allow].concat());
    let info = json(&ok(d, &["info", "--output=json", "top"]));
    assert_eq!(info["backing-filename"], out);
}

#[test]
fn rebase_keeps_the_content_or_only_the_name() {
    let dir = base_and_top();
    let d = dir.path();
    own_sector(d, 3, 0xaa);
    let before = content(d, "top");
    // Shorter, and other in some places.
    let mut other = numbered(1, 30);
    other[10 * 512..20 * 512].fill(0x77);
    std::fs::write(d.join("other"), &other).unwrap();
    assert_eq!(ok(d, &["rebase", "-b", "other", "-F", "raw", "top"]), "Image rebased.\n");
    assert!(content(d, "top") == before);
    let info = json(&ok(d, &["info", "--output=json", "top"]));
    assert_eq!(info["backing-filename"], "other");
    ok(d, &["rebase", "-q", "-b", "", "top"]);
    assert!(content(d, "top") == before);
    assert_eq!(json(&ok(d, &["info", "--output=json", "top"]))["backing-filename"], Value::Null);
    // Only the name, and the format.
    ok(d, &["convert", "-q", "-f", "raw", "-O", "qcow2", "base", "base.qcow2"]);
    ok(d, &["rebase", "-q", "-u", "-b", "base.qcow2", "-F", "qcow2", "top"]);
    assert!(content(d, "top") == before);
    let long = format!("{}base", "./".repeat(300));
    ok(d, &["rebase", "-q", "-u", "-b", &long, "-F", "raw", "top"]);
    assert!(content(d, "top") == before);
    let longer = format!("./{long}");
    let err = fails(d, &["rebase", "-u", "-b", &longer, "-F", "raw", "top"], 1);
    assert!(err.contains("rebase to a shorter name first"), "{err}");
    ok(d, &["rebase", "-q", "-u", "-b", "base", "-F", "raw", "top"]);
    assert!(content(d, "top") == before);
    let bytes = std::fs::read(d.join("top")).unwrap();
    assert!(bytes[16..1036].iter().all(|byte| *byte == 0), "nothing is left of the long name");
    assert!(fails(d, &["rebase", "-b", "other", "top"], 1).contains("say it with -F"));
    assert!(fails(d, &["rebase", "-b", "gone", "-F", "raw", "top"], 1).contains("gone"));
    assert!(fails(d, &["rebase", "-b", "top", "-F", "raw", "top"], 1).contains("top"));
    assert!(content(d, "top") == before);
}

#[test]
fn reset_forgets_what_was_written() {
    let dir = base_and_top();
    let d = dir.path();
    own_sector(d, 3, 0xaa);
    assert!(content(d, "top") != numbered(1, 40));
    assert_eq!(ok(d, &["reset", "top"]), "Image reset.\n");
    assert!(content(d, "top") == numbered(1, 40));
    assert!(ok(d, &["check", "top"]).contains("0/40"));
    // The space stays, unless it is to be given back.
    let blocks = || std::fs::metadata(d.join("top.raw")).unwrap().blocks();
    assert_ne!(blocks(), 0);
    assert_eq!(ok(d, &["reset", "-q", "--discard", "top"]), "");
    assert_eq!(blocks(), 0);
    assert!(content(d, "top") == numbered(1, 40));
    for reset in [&["reset", "-f", "raw", "base"][..], &["reset", "base"]] {
        assert!(fails(d, reset, 1).contains("only add-cow images can be reset"));
    }
    assert!(std::fs::read(d.join("base")).unwrap() == numbered(1, 40));
}

/// A start that is refused leaves nothing in the state directory; what a killed process left stays.
/// The overlay of a live snapshot shows what the image below had then: no command gives that up.
#[test]
fn what_a_snapshot_has_frozen_is_left_alone() {
    let dir = base_and_top();
    let d = dir.path();
    own_sector(d, 3, 0xaa);
    ok(d, &["create", "-q", "-f", "add-cow", "-b", "top", "-F", "add-cow", "over"]);
    ok(d, &["create", "-q", "other", "20K"]);
    let commands = [
        &["reset", "top"][..],
        &["resize", "--shrink", "top", "4K"],
        &["convert", "-n", "-O", "add-cow", "other", "top"],
    ];
    let over = d.join("over");
    let options = OpenOptions { write: true, ..Default::default() };
    let top = HostFile::open(&d.join("top"), options).unwrap();
    frozen::mark(&top, &over);
    let before = content(d, "over");
    for args in commands {
        let err = fails(d, args, 1);
        assert!(err.contains("top: a snapshot was taken of this disk"), "{args:?}: {err}");
        assert!(content(d, "over") == before, "{args:?}");
    }
    // Without the overlay it is anybody's.
    std::fs::remove_file(over).unwrap();
    for args in commands {
        ok(d, args);
        ok(d, &["resize", "-q", "top", "20K"]);
    }
}

#[test]
fn a_refused_start_leaves_the_state_directory_as_it_was() {
    for format in ["add-cow", "qcow2", "vhdx"] {
        let dir = tempfile::tempdir().unwrap();
        let d = dir.path();
        let state = tempfile::Builder::new().prefix("vublk-").tempdir_in("/dev/shm").unwrap();
        let files = || std::fs::read_dir(state.path()).unwrap().count();
        if format == "add-cow" {
            std::fs::write(d.join("base"), [1; 40 * 512]).unwrap();
            ok(d, &["create", "-q", "-f", format, "-b", "base", "-F", "raw", "disk"]);
        } else {
            ok(d, &["create", "-q", "-f", format, "disk", "4M"]);
        }
        // No place for its socket: the image is open by then.
        let state_dir = state.path().to_str().unwrap();
        let serve = ["serve", "--socket-path", "nowhere/s", "--state-dir", state_dir, "-f", format];
        fails(d, &[&serve[..], &["disk"]].concat(), 78);
        assert_eq!(files(), 0, "{format}");
        let image = d.join("disk");
        let setup = Setup::new(&["--state-dir", state_dir]).format(format, &image);
        let mut backend = setup.start();
        let mut disk = backend.qemu();
        disk.execute(0, &Request::write(0, vec![7; 512])).unwrap().ok().unwrap();
        backend.kill();
        assert_eq!(files(), 1, "{format}");
        fails(d, &[&serve[..], &["disk"]].concat(), 78);
        assert_eq!(files(), 1, "{format}");
        backend.spawn();
        disk.reconnect().unwrap();
        let read = disk.execute(0, &Request::read(0, 512)).unwrap();
        assert_eq!(read.data, [7; 512], "{format}");
        disk.stop().unwrap();
        assert!(backend.terminate().success());
        assert_eq!(files(), 0, "{format}");
    }
}

/// What the host has nothing of is passed over, however long it is.
#[test]
fn an_empty_disk_of_any_size_is_mapped_at_once() {
    // Other file systems have no files as long as its bitmap is.
    let Ok(dir) = tempfile::Builder::new().prefix("vublk-").tempdir_in("/dev/shm") else {
        return common::skip("no /dev/shm");
    };
    let d = dir.path();
    ok(d, &["create", "-q", "-f", "add-cow", "x", "7E"]);
    let map = ok(d, &["map", "--output=json", "x"]);
    assert_eq!(map.lines().count(), 1, "{map}");
    assert!(map.contains("\"length\":8070450532247928832,"), "{map}");
}
