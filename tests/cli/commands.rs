//! create, resize, info, map, compare, check, and what all commands share.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::{Command, Stdio};

use vublk::images::frozen;
use vublk::io::{HostFile, OpenOptions};

use crate::common::{Random, fails, have, ok, tool, vublk};
use crate::{json, random_file};

#[test]
fn create_makes_sparse_files_of_the_right_size() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    assert_eq!(ok(d, &["create", "a", "1.5M"]), "Formatting 'a', fmt=raw size=1572864\n");
    let meta = std::fs::metadata(d.join("a")).unwrap();
    assert_eq!((meta.len(), meta.blocks()), (1_572_864, 0));
    assert_eq!(ok(d, &["create", "-q", "-f", "raw", "-o", "size=64K", "b"]), "");
    assert_eq!(std::fs::metadata(d.join("b")).unwrap().len(), 65536);
    // A size that is no multiple of a sector is rounded up, as qemu-img does.
    ok(d, &["create", "c", "1000001"]);
    assert_eq!(std::fs::metadata(d.join("c")).unwrap().len(), 1_000_448);
    for how in ["falloc", "full"] {
        ok(d, &["create", "-o", &format!("preallocation={how}"), how, "1M"]);
        let meta = std::fs::metadata(d.join(how)).unwrap();
        assert!(meta.blocks() * 512 >= 1 << 20, "{how}: {} blocks", meta.blocks());
        assert_eq!(meta.len(), 1 << 20);
    }
    // Overwriting leaves nothing of what was there.
    std::fs::write(d.join("b"), [7; 4096]).unwrap();
    ok(d, &["create", "b", "8K"]);
    assert_eq!(std::fs::read(d.join("b")).unwrap(), [0; 8192]);
    assert!(ok(d, &["create", "-o", "help"]).contains("preallocation"));
    let help = ok(d, &["measure", "-O", "qcow2", "-o", "help"]);
    assert!(help.contains("cluster_size") && !help.contains("preallocation"), "{help}");
    let help = ok(d, &["measure", "-O", "vhdx", "-o", "help"]);
    assert!(help.contains("block_size") && !help.contains("backing_file"), "{help}");
    for format in ["raw", "vhdx", "add-cow"] {
        let args = ["measure", "-O", format, "-o", "backing_file=b", "--size", "1M"];
        let line = fails(d, &args, 1);
        assert!(line.contains("'backing_file' does not change the size of"), "{line}");
    }
}

#[test]
fn resize_goes_both_ways_if_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let len = || std::fs::metadata(d.join("disk")).unwrap().len();
    ok(d, &["create", "disk", "1M"]);
    assert_eq!(ok(d, &["resize", "-f", "raw", "disk", "+1M"]), "Image resized.\n");
    assert_eq!(len(), 2 << 20);
    assert_eq!(ok(d, &["resize", "-q", "disk", "3M"]), "");
    assert_eq!(len(), 3 << 20);
    let line = fails(d, &["resize", "disk", "-1M"], 1);
    assert!(line.ends_with("use --shrink if that is meant"), "{line}");
    assert_eq!(len(), 3 << 20);
    ok(d, &["resize", "--shrink", "disk", "-1M"]);
    assert_eq!(len(), 2 << 20);
    let line = fails(d, &["resize", "--shrink", "disk", "-3M"], 1);
    assert!(line.contains("cannot take 3145728 bytes from a disk that has 2097152"), "{line}");
    let line = fails(d, &["resize", "--shrink", "disk", "0"], 1);
    assert!(line.contains("at least one block"), "{line}");
    let line = fails(d, &["resize", "disk", "+16383P"], 1);
    assert!(line.contains("is more than the"), "{line}");
    assert_eq!(len(), 2 << 20);
}

#[test]
fn info_and_map_say_what_qemu_img_says() {
    if !have("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let mut random = Random::new("info_and_map_say_what_qemu_img_says");
    for round in 0..10 {
        let len = 512 * (1 + random.below(10_000));
        random_file(&d.join("disk"), len, &mut random);
        let theirs = tool(d, "qemu-img", &["info", "--output=json", "-f", "raw", "disk"]);
        let theirs = json(std::str::from_utf8(&theirs.stdout).unwrap());
        assert_eq!(json(&ok(d, &["info", "--output=json", "disk"])), theirs, "round {round}");
        let chain = json(&ok(d, &["info", "--backing-chain", "--output=json", "disk"]));
        assert_eq!(chain, serde_json::json!([theirs]));

        let theirs = tool(d, "qemu-img", &["map", "--output=json", "-f", "raw", "disk"]);
        let theirs = json(std::str::from_utf8(&theirs.stdout).unwrap());
        let mut ours = json(&ok(d, &["map", "--output=json", "-f", "raw", "disk"]));
        for entry in ours.as_array_mut().unwrap() {
            let filename = entry.as_object_mut().unwrap().remove("filename");
            assert_eq!(filename.unwrap(), "disk");
        }
        assert_eq!(ours, theirs, "round {round}");
        let theirs = tool(d, "qemu-img", &["map", "-f", "raw", "disk"]);
        assert_eq!(ok(d, &["map", "disk"]), String::from_utf8(theirs.stdout).unwrap());
    }
    let human = ok(d, &["info", "disk"]);
    let theirs = tool(d, "qemu-img", &["info", "-f", "raw", "disk"]);
    assert_eq!(human, String::from_utf8(theirs.stdout).unwrap());
    let measured = tool(d, "qemu-img", &["measure", "--output=json", "-f", "raw", "disk"]);
    assert_eq!(
        json(&ok(d, &["measure", "--output=json", "disk"])),
        json(std::str::from_utf8(&measured.stdout).unwrap())
    );
}

#[test]
fn a_map_can_be_cut_and_piped() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    ok(d, &["create", "disk", "1M"]);
    let cut = ok(d, &["map", "--output=json", "-s", "64K", "-l", "4K", "disk"]);
    let entry = &json(&cut)[0];
    assert_eq!((entry["start"].as_u64(), entry["length"].as_u64()), (Some(65536), Some(4096)));
    let line = fails(d, &["map", "-s", "2M", "disk"], 1);
    assert!(line.contains("--start-offset 2097152 lies beyond"), "{line}");

    // A reader that leaves early is no error.
    let mut child = Command::new(env!("CARGO_BIN_EXE_vublk"))
        .args(["map", "disk"])
        .current_dir(d)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn compare_has_qemu_imgs_exit_codes() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    ok(d, &["create", "a", "4M"]);
    ok(d, &["create", "b", "4M"]);
    let run = |args: &[&str]| {
        let ours = vublk(d, &[&["compare"], args].concat());
        let said = String::from_utf8(ours.stdout).unwrap();
        if have("qemu-img") && !args.iter().any(|a| a.starts_with("--output")) {
            let args = [&["compare", "-f", "raw", "-F", "raw"], args].concat();
            let theirs = tool(d, "qemu-img", &args);
            assert_eq!(ours.status.code(), theirs.status.code(), "{args:?}");
            // Their offset of a mismatch is that of its sector, ours that of the byte.
            let words = |text: &str| text.replace(|c: char| c.is_ascii_digit(), "");
            assert_eq!(words(&said), words(&String::from_utf8_lossy(&theirs.stdout)), "{args:?}");
        }
        (ours.status.code().unwrap(), said)
    };
    assert_eq!(run(&["a", "b"]), (0, "Images are identical.\n".into()));
    assert_eq!(run(&["-s", "a", "b"]), (0, "Images are identical.\n".into()));
    let b = File::options().write(true).open(d.join("b")).unwrap();
    b.write_all_at(b"x", 3_333_333).unwrap();
    assert_eq!(run(&["a", "b"]).0, 1);
    assert_eq!(json(&run(&["--output=json", "a", "b"]).1)["offset"], 3_333_333);
    b.write_all_at(&[0; 512], 3_333_300).unwrap();
    assert_eq!(run(&["a", "b"]).0, 0);
    // The same content, but stored.
    let (code, said) = run(&["-s", "a", "b"]);
    assert!(code == 1 && said.contains("block status mismatch"), "{said}");
    ok(d, &["create", "b", "8M"]);
    assert_eq!(run(&["a", "b"]).0, 0);
    assert_eq!(run(&["-s", "a", "b"]), (1, "Strict mode: Image size mismatch!\n".into()));
    b.write_all_at(b"x", 7 << 20).unwrap();
    assert_eq!(run(&["a", "b"]).0, 1);
    assert_eq!(json(&run(&["--output=json", "a", "b"]).1)["offset"], 7 << 20);
    assert_eq!(run(&["-q", "a", "b"]), (1, String::new()));
    assert_eq!(run(&["a", "missing"]).0, 2);
    fails(d, &["compare", "missing", "a"], 2);
}

#[test]
fn a_raw_image_is_no_overlay() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    ok(d, &["create", "-q", "a", "1M"]);
    for how in [&["commit"][..], &["commit", "-d"], &["commit", "-b", "x"]] {
        let line = fails(d, &[how, &["a"]].concat(), 1);
        assert_eq!(line, "a: Image does not have a backing file");
    }
    let line = fails(d, &["reset", "a"], 1);
    assert!(line.starts_with("a: is raw, and only add-cow images can be reset; "), "{line}");
}

#[test]
fn there_is_nothing_to_check_in_raw() {
    let dir = tempfile::tempdir().unwrap();
    ok(dir.path(), &["create", "a", "1M"]);
    let line = fails(dir.path(), &["check", "a"], 63);
    assert_eq!(line, "a: raw images have nothing that could be checked");
}

#[test]
fn log_lines_come_as_text_or_json() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    ok(d, &["create", "a", "1M"]);
    let run = |args: &[&str], env: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vublk"));
        command.args(args).current_dir(d).env("VUBLK_LOG", env);
        String::from_utf8(command.output().unwrap().stderr).unwrap()
    };
    // A guessed format of something that is written to is worth a warning.
    let text = run(&["resize", "a", "1M"], "");
    assert!(text.contains(" WARN vublk::images::"), "{text}");
    assert!(text.contains(": a: no format was given"), "{text}");
    assert!(!text.contains('\x1b'), "colours in a file: {text:?}");
    let line = json(&run(&["--log-format=json", "resize", "a", "1M"], ""));
    assert_eq!(line["level"], "WARN");
    // But not to who wants to be told of errors only, unless that is asked for.
    assert_eq!(run(&["resize", "-q", "a", "1M"], ""), "");
    assert!(run(&["resize", "-q", "a", "1M"], "warn").contains(": a: no format was given"));
    assert_eq!(run(&["resize", "a", "1M"], "error"), "");
    assert_eq!(run(&["--log-level=off", "resize", "a", "1M"], "debug"), "");
    assert_eq!(run(&["resize", "a", "1M"], "off,vublk::images=error"), "");
    assert!(run(&["info", "a"], "loud").starts_with("vublk: VUBLK_LOG: 'loud' is not a log level"));
}

/// Names come from images and from clients of the control socket.
#[test]
fn no_name_makes_a_log_line_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let name = "a\n2026-01-01T00:00:00Z ERROR vublk: forged\r\u{1b}[2K";
    ok(dir.path(), &["create", name, "1M"]);
    let mut command = Command::new(env!("CARGO_BIN_EXE_vublk"));
    command.args(["resize", name, "1M"]).current_dir(dir.path()).env_remove("VUBLK_LOG");
    let text = String::from_utf8(command.output().unwrap().stderr).unwrap();
    assert!(text.contains("forged"), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.trim_end_matches('\n').chars().all(|c| !c.is_control()), "{text:?}");
}

#[test]
fn completions_and_manual_pages_are_made() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    for shell in ["bash", "zsh", "fish"] {
        let script = ok(d, &["completions", shell]);
        assert!(script.contains("convert") && script.contains("add-cow"), "{shell}");
        assert!(script.contains("directsync"), "{shell}");
    }
    // Who asks for help learns the names of formats, and only those that can be opened.
    for verb in ["serve", "create", "compare"] {
        let help = ok(d, &[verb, "-h"]);
        let words: Vec<_> = help.split_whitespace().collect();
        let names = "[possible values: raw, qcow2, vhdx, add-cow]";
        assert!(words.join(" ").contains(names), "{verb}: {help}");
    }
    ok(d, &["man", "pages"]);
    for page in ["vublk.1", "vublk-serve.1", "vublk-convert.1"] {
        assert!(d.join("pages").join(page).exists(), "{page}");
    }
}

/// Of a back-end that is started, a socket that was left is removed first. A file is no socket.
#[test]
fn a_file_in_the_place_of_a_socket_is_not_removed() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("disk.raw"), "precious").unwrap();
    let args = ["bench", "--start", "true", "--socket-path", "disk.raw"];
    let output = vublk(dir.path(), &args);
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(err.contains("disk.raw exists and is not a socket"), "{err}");
    assert_eq!(std::fs::read(dir.path().join("disk.raw")).unwrap(), b"precious");
}

#[test]
fn the_machine_is_measured_without_a_back_end() {
    let dir = tempfile::tempdir().unwrap();
    let machine = json(&ok(dir.path(), &["bench", "--machine", "--output", "json"]));
    let us = |what: &str| machine[what].as_f64().unwrap();
    assert!(us("system-call-us") > 0.0, "{machine}");
    // There and back is four system calls, at the least.
    assert!(us("same-cpu-us") > us("system-call-us"), "{machine}");
    let text = ok(dir.path(), &["bench", "--machine"]);
    assert!(text.contains("us on one CPU"), "{text}");
    for misuse in [&["bench"][..], &["bench", "--machine", "--socket-path", "s"]] {
        let output = vublk(dir.path(), misuse);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2));
        assert!(error.contains("--socket-path <PATH>"), "{error}");
    }
}

/// `commit -d` says that the overlay is to be removed. One that a live snapshot had made has held the disk.
#[test]
fn a_commit_of_a_live_snapshot_has_the_disk_go_on_in_the_base() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    ok(d, &["create", "-q", "-f", "raw", "base", "1M"]);
    ok(d, &["create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "mid"]);
    ok(d, &["create", "-q", "-f", "qcow2", "-b", "mid", "-F", "qcow2", "top"]);
    let options = OpenOptions { write: true, ..Default::default() };
    let base = HostFile::open(&d.join("base"), options).unwrap();
    // Where there is no place for the socket, all else has been looked at.
    let serve = |name| {
        let output = vublk(d, &["serve", "--socket-path", "no/s", name]);
        String::from_utf8(output.stderr).unwrap()
    };
    let is_frozen = || serve("base").contains("the disk goes on in");
    // Without -d, the disk stays where it is.
    frozen::mark(&base, &d.join("mid"));
    ok(d, &["commit", "-q", "-b", "base", "top"]);
    assert!(is_frozen());
    // What somebody else's overlay needs is not written to.
    std::fs::write(d.join("other"), "").unwrap();
    frozen::mark(&base, &d.join("other"));
    std::fs::write(d.join("data"), vec![7; 1 << 20]).unwrap();
    ok(d, &["convert", "-n", "-f", "raw", "-O", "qcow2", "data", "top"]);
    let line = fails(d, &["commit", "-q", "-d", "-b", "base", "top"], 1);
    assert!(line.contains("committing top: base: a snapshot was taken"), "{line}");
    assert!(line.contains(d.join("other").to_str().unwrap()), "{line}");
    assert_eq!(std::fs::read(d.join("base")).unwrap(), vec![0; 1 << 20]);
    assert!(is_frozen());
    assert!(serve("top").contains("no/s"));
    std::fs::remove_file(d.join("other")).unwrap();
    ok(d, &["commit", "-q", "-d", "-b", "base", "top"]);
    assert!(serve("base").contains("no/s"), "the mark is gone");
    let line = serve("top");
    assert!(
        line.contains("goes on in") && line.contains(d.join("base").to_str().unwrap()),
        "{line}"
    );
    // With no mark there was no snapshot, and both are the operator's.
    ok(d, &["create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "over"]);
    ok(d, &["commit", "-q", "-d", "over"]);
    assert!(serve("over").contains("no/s") && serve("base").contains("no/s"));
}

/// An overlay that a live snapshot had made takes the mark with it, from what it stood on to what it stands on.
#[test]
fn marks_of_snapshots_follow_a_rebase() {
    for format in ["qcow2", "add-cow"] {
        let dir = tempfile::tempdir().unwrap();
        let d = dir.path();
        for name in ["base", "other"] {
            ok(d, &["create", "-q", "-f", "raw", name, "1M"]);
        }
        ok(d, &["create", "-q", "-f", format, "-b", "base", "-F", "raw", "mid"]);
        ok(d, &["create", "-q", "-f", format, "-b", "mid", "-F", format, "top"]);
        let serve = |name| {
            let output = vublk(d, &["serve", "--socket-path", "no/s", name]);
            String::from_utf8(output.stderr).unwrap()
        };
        // Where there is no place for the socket, all else has been looked at.
        let is_free = |name| serve(name).contains("no/s");
        let goes_on_in =
            |overlay: &str| format!("the disk goes on in {}", d.join(overlay).display());
        let rebase = |how: &[&str]| ok(d, &[&["rebase", "-q"][..], how].concat());
        // Nothing is marked that was not: nobody has taken a snapshot.
        rebase(&["-b", "other", "-F", "raw", "top"]);
        rebase(&["-b", "mid", "-F", format, "top"]);
        assert!(["base", "other", "mid"].into_iter().all(is_free), "{format}");

        let file = |name: &str| {
            let options = OpenOptions { write: true, ..Default::default() };
            HostFile::open(&d.join(name), options).unwrap()
        };
        frozen::mark(&file("base"), &d.join("mid"));
        frozen::mark(&file("mid"), &d.join("top"));
        rebase(&["-b", "base", "-F", "raw", "top"]);
        assert!(is_free("mid"), "{format}: {}", serve("mid"));
        assert!(serve("base").contains(&goes_on_in("top")), "{format}: {}", serve("base"));
        rebase(&["-u", "-b", "other", "-F", "raw", "top"]);
        assert!(serve("other").contains(&goes_on_in("top")), "{format}: {}", serve("other"));
        // What was between still needs it.
        let said = serve("base");
        assert!(said.contains(d.join("mid").to_str().unwrap()), "{format}: {said}");
        std::fs::remove_file(d.join("mid")).unwrap();
        assert!(is_free("base"), "{format}: {}", serve("base"));
        rebase(&["-b", "", "top"]);
        assert!(is_free("other"), "{format}: {}", serve("other"));
    }
}

/// As qemu-img has it, and as `info --backing-chain` shows it.
#[test]
fn the_base_of_a_commit_is_found_from_here_and_from_its_overlay() {
    let dir = tempfile::tempdir().unwrap();
    let (d, sub) = (dir.path(), dir.path().join("sub"));
    std::fs::create_dir_all(sub.join("below")).unwrap();
    ok(d, &["create", "-q", "-f", "raw", "sub/below/base", "1M"]);
    ok(&sub, &["create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "below/mid"]);
    ok(&sub, &["create", "-q", "-f", "qcow2", "-b", "below/mid", "-F", "qcow2", "top"]);
    for (from, name) in [(d, "sub/below/base"), (d, "base"), (&sub, "base"), (d, "below/mid")] {
        let top = if from == d { "sub/top" } else { "top" };
        ok(from, &["commit", "-q", "-d", "-b", name, top]);
    }
    let line = fails(d, &["commit", "-q", "-d", "-b", "nowhere", "sub/top"], 1);
    assert!(line.contains("Did not find 'nowhere' in the backing chain"), "{line}");
}

/// One whose sectors are larger than the overlay's, which holds parts of them.
#[test]
fn a_rebase_reads_whole_sectors_of_the_new_backing_file() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    std::fs::write(d.join("old"), vec![b'O'; 1 << 20]).unwrap();
    std::fs::write(d.join("sector"), vec![b'S'; 512]).unwrap();
    ok(d, &["convert", "-O", "vhdx", "-o", "logical_sector_size=4096", "old", "new.vhdx"]);
    ok(d, &["create", "-q", "-f", "add-cow", "-b", "old", "-F", "raw", "top"]);
    ok(d, &["convert", "-n", "-f", "raw", "-O", "add-cow", "sector", "top"]);
    ok(d, &["convert", "top", "before"]);
    ok(d, &["rebase", "-q", "-b", "new.vhdx", "-F", "vhdx", "top"]);
    ok(d, &["compare", "-f", "raw", "before", "top"]);
}

/// A volume of the measured size has to hold it.
#[test]
fn what_is_measured_for_raw_has_whole_sectors() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    std::fs::write(d.join("odd"), [1; 1000]).unwrap();
    ok(d, &["convert", "odd", "copy"]);
    let size = std::fs::metadata(d.join("copy")).unwrap().len();
    for args in [&["odd"][..], &["--size", "1000"]] {
        let measured = json(&ok(d, &[&["measure", "--output=json"], args].concat()));
        assert_eq!(
            (&measured["required"], &measured["fully-allocated"]),
            (&size.into(), &size.into())
        );
    }
}

/// Neither is asked for where it is known that both read as zeros: that would take hours.
#[test]
fn a_rebase_of_a_large_disk_reads_what_there_is() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    for (name, at) in [("old", 5 << 40), ("new", 3 << 40)] {
        ok(d, &["create", "-q", "-f", "raw", name, "8T"]);
        let file = File::options().write(true).open(d.join(name)).unwrap();
        file.write_all_at(name.as_bytes(), at).unwrap();
    }
    ok(d, &["create", "-q", "-f", "qcow2", "-b", "old", "-F", "raw", "top"]);
    ok(d, &["rebase", "-q", "-b", "new", "-F", "raw", "top"]);
    ok(d, &["compare", "old", "top"]);
    ok(d, &["rebase", "-q", "-b", "", "top"]);
    ok(d, &["compare", "old", "top"]);
}

/// Or `vublk compare a b | head` would call different what is the same, and the other way round.
#[test]
fn exit_codes_tell_what_was_found_to_whom_nobody_listens() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    std::fs::write(d.join("a"), [1; 512]).unwrap();
    std::fs::write(d.join("b"), [2; 512]).unwrap();
    ok(d, &["create", "-q", "-f", "add-cow", "over", "1M"]);
    // Bits that the image file has no sectors for.
    File::options().write(true).open(d.join("over.raw")).unwrap().set_len(512).unwrap();
    let over = File::options().write(true).open(d.join("over")).unwrap();
    over.write_all_at(&[0xff; 8], 2560).unwrap();
    let code = |out: Stdio, args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vublk"));
        let command = command.current_dir(d).args(args).stdout(out).stderr(Stdio::null());
        command.status().unwrap().code().unwrap()
    };
    let unread = || {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        Stdio::from(writer)
    };
    let check = ["check", "-f", "add-cow", "over"];
    let expected = vublk(d, &check).status.code().unwrap();
    assert_ne!(expected, 0);
    assert_eq!(code(unread(), &check), expected);
    assert_eq!(code(unread(), &["compare", "a", "b"]), 1);
    assert_eq!(code(unread(), &["compare", "a", "a"]), 0);
    // What cannot be said at all is no difference.
    let full = || Stdio::from(File::options().write(true).open("/dev/full").unwrap());
    assert_eq!(code(full(), &["compare", "a", "a"]), 2);
    assert_eq!(code(unread(), &["--log-level", "none", "compare", "a", "a"]), 2);
}
