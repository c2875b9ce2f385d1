//! Black box tests of `vublk log`.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use vublk::frontend::{Layout, Personality, Request, SessionOptions};
use vublk::units::ByteRange;
use vublk::write_log::sidecar::Record;
use vublk::write_log::{Flags, LogBuilder};

mod common;

use common::{Setup, fails, have, ok, ok_or, tool, tool_ok, vublk};

fn json_of(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|err| panic!("{err}: {text}"))
}

/// A directory with the worked example of the format's description as `ex.log`.
fn example() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let log = LogBuilder::new(512)
        .mark("start")
        .write(3 * 512, &[0xab; 512])
        .discard(ByteRange { offset: 8 * 512, len: 1024 })
        .flush()
        .entry(Flags::FUA.and(Flags::METADATA), 4 * 512, &[0xcd; 512])
        .mark("dm-log-writes-end")
        .finish();
    std::fs::write(dir.path().join("ex.log"), log).unwrap();
    dir
}

#[test]
fn info_counts_what_a_log_holds() {
    let dir = example();
    let info = json_of(&ok(dir.path(), &["log", "info", "--output", "json", "ex.log"]));
    assert_eq!(
        info,
        json!({
            "filename": "ex.log", "version": 1, "sector-size": 512, "entries": 6,
            "file-bytes": 4608, "used-bytes": 4608, "writes": 2, "written-bytes": 1024,
            "discards": 1, "discarded-bytes": 1024, "flushes": 1, "fua": 1, "marks": 2,
            "disk-bytes": 5120,
        })
    );
    let text = ok(dir.path(), &["log", "info", "--log", "ex.log"]);
    for line in ["log: ex.log", "sector size: 512 bytes", "entries: 6", "    marks: 2"] {
        assert!(text.lines().any(|l| l == line), "{text}");
    }
}

#[test]
fn list_shows_entries() {
    let dir = example();
    let text = ok(dir.path(), &["log", "list", "ex.log"]);
    let expected = "\
entry   log sector       sector  sectors  flags
0                1            0        0  MARK start
1                2            3        1  NONE
2                4            8        2  DISCARD
3                5            0        0  FLUSH
4                6            4        1  FUA|METADATA
5                8            0        0  MARK dm-log-writes-end
";
    assert_eq!(text, expected);
    let list = ["log", "list", "--output", "json", "ex.log"];
    let all = json_of(&ok(dir.path(), &list));
    assert_eq!(all.as_array().unwrap().len(), 6);
    assert_eq!(
        all[4],
        json!({"entry": 4, "log-sector": 6, "sector": 4, "sectors": 1, "flags": ["FUA", "METADATA"]})
    );
    let part = [&list[..], &["--start-mark", "start", "--next-flush"]].concat();
    let numbers: Vec<_> = json_of(&ok(dir.path(), &part))
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| entry["entry"].as_u64().unwrap())
        .collect();
    assert_eq!(numbers, [1, 2, 3]);
    let marks = json_of(&ok(dir.path(), &[&list[..], &["--marks"]].concat()));
    assert_eq!(marks[1]["mark"], "dm-log-writes-end");
    std::fs::write(dir.path().join("empty.log"), LogBuilder::new(4096).finish()).unwrap();
    let none = ok(dir.path(), &["log", "list", "--output", "json", "empty.log"]);
    assert_eq!(json_of(&none), json!([]));
}

#[test]
fn find_prints_what_replay_log_prints() {
    let dir = example();
    let find = |args: &[&str]| ok(dir.path(), &[&["log", "find", "ex.log"], args].concat());
    assert_eq!(find(&["--end-mark", "start"]), "0@2\n");
    assert_eq!(find(&["--next-flush"]), "3@6\n");
    assert_eq!(find(&["--next-fua"]), "4@8\n");
    assert_eq!(find(&["--end-mark", "dm-log-writes-end"]), "5@9\n");
    assert_eq!(find(&["--limit", "2"]), "1@4\n");
    assert_eq!(find(&["--next-flush", "--start-entry", "3"]), "3@6\n");
    let found = json_of(&find(&["--next-fua", "--output", "json"]));
    assert_eq!(found, json!({"entry": 4, "next-log-sector": 8, "stopped-by": "fua"}));
    let not_found =
        |args: &[&str]| fails(dir.path(), &[&["log", "find", "ex.log"], args].concat(), 1);
    let err = not_found(&["--end-mark", "star"]);
    assert_eq!(err, "ex.log: no mark 'star' in what was searched (list shows the marks)");
    let err = not_found(&[]);
    assert_eq!(err, "ex.log: nothing found from the given start to the end of the log");
    let err = not_found(&["--start-entry", "6", "--next-flush"]);
    assert!(err.contains("invalid entry number 6"), "{err}");
}

#[test]
fn what_is_no_log_is_refused() {
    let dir = example();
    std::fs::write(dir.path().join("zeros"), [0; 4096]).unwrap();
    let err = fails(dir.path(), &["log", "info", "zeros"], 1);
    assert!(err.starts_with("zeros: not a dm-log-writes log"), "{err}");
    let err = fails(dir.path(), &["log", "list", "gone.log"], 1);
    assert_eq!(err, "gone.log: No such file or directory");
    let output = vublk(dir.path(), &["log", "info"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    // The example with a header that is not padded.
    let mut bytes = std::fs::read(dir.path().join("ex.log")).unwrap();
    bytes[0x420] = 1;
    std::fs::write(dir.path().join("bad.log"), bytes).unwrap();
    let err = fails(dir.path(), &["log", "info", "bad.log"], 1);
    assert_eq!(err, "bad.log: entry 1: its header is not padded with zeros");
}

/// The directory with sample data; `None`, visibly, where it is not.
fn data() -> Option<PathBuf> {
    let dir = std::env::var_os("VUBLK_TEST_DATA").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data")),
        PathBuf::from,
    );
    if !dir.is_dir() {
        eprintln!("SKIP: no sample data: {}", dir.display());
        return None;
    }
    Some(dir)
}

/// Unpacks a file of the sample data to `to`.
fn unpack(from: &Path, to: &Path) {
    let tool = if from.extension().is_some_and(|ext| ext == "zst") { "zstd" } else { "xz" };
    let bytes = tool_output(tool, &["-dc", from.to_str().unwrap()]);
    std::fs::write(to, bytes).unwrap();
}

fn tool_output(name: &str, args: &[&str]) -> Vec<u8> {
    let output = tool(Path::new("."), name, args);
    assert!(output.status.success(), "{name} {args:?}: {output:?}");
    output.stdout
}

fn sha256(file: &Path) -> String {
    let line = tool_ok(Path::new("."), "sha256sum", &[file.to_str().unwrap()]);
    line.split(' ').next().unwrap().to_string()
}

#[test]
fn replays_of_real_logs_equal_the_reference_at_every_prefix() {
    let Some(data) = data().filter(|_| have("zstd") && have("sha256sum")) else { return };
    for name in ["dm-ext4", "qemu-ext4"] {
        let dir = tempfile::tempdir().unwrap();
        let d = dir.path();
        unpack(&data.join(format!("logwrites/{name}.log.zst")), &d.join("w.log"));
        ok(d, &["create", "-q", "-f", "raw", "base.img", "64M"]);
        ok(d, &["create", "-q", "-f", "raw", "step.img", "64M"]);
        let table = std::fs::read_to_string(data.join(format!("logwrites/{name}.prefixes.tsv")));
        let mut done = 0;
        for line in table.unwrap().lines().filter(|line| !line.starts_with('#')) {
            let mut fields = line.split('\t');
            let count: u64 = fields.next().unwrap().parse().unwrap();
            let expected = fields.next().unwrap();
            // Ten entries more, on what the ones before have made.
            let (start, limit) = (done.to_string(), (count - done).to_string());
            let part = ["--start-entry", &start, "--limit", &limit];
            let replay = ["log", "replay", "--log", "w.log", "--replay", "step.img"];
            ok(d, &[&replay[..], &part].concat());
            assert_eq!(sha256(&d.join("step.img")), expected, "{name}: first {count} entries");
            done = count;
            // The crash state of the same name is the same disk, whatever way leads there.
            if count.is_multiple_of(40) {
                let state = format!("E{count}");
                let explore = ["log", "explore", "w.log", "--base", "base.img", "-f", "raw"];
                let look = ["--check", "sha256sum {}", "--state", &state];
                let printed = ok(d, &[&explore[..], &look].concat());
                assert!(printed.starts_with(expected), "{name}: {printed}");
            }
        }
        // In one go, to a raw file and to a qcow2 image, and backwards from the marks of the log.
        let last = sha256(&d.join("step.img"));
        ok(d, &["create", "-q", "-f", "raw", "once.img", "64M"]);
        ok(d, &["log", "replay", "w.log", "--replay", "once.img", "-t", "none"]);
        assert_eq!(sha256(&d.join("once.img")), last, "{name}");
        ok(d, &["create", "-q", "-f", "qcow2", "disk.qcow2", "64M"]);
        ok(d, &["log", "replay", "w.log", "--replay", "disk.qcow2"]);
        ok(d, &["compare", "disk.qcow2", "once.img"]);
    }
}

#[test]
fn replays_of_logs_by_qemu_give_qemus_image() {
    let Some(data) = data().filter(|_| have("xz") && have("sha256sum")) else { return };
    for name in ["q512", "q4k"] {
        let dir = tempfile::tempdir().unwrap();
        let d = dir.path();
        unpack(&data.join(format!("dm-log-writes/{name}.log.xz")), &d.join("w.log"));
        unpack(&data.join(format!("dm-log-writes/{name}.img.xz")), &d.join("by-qemu.img"));
        ok(d, &["create", "-q", "-f", "raw", "by-us.img", "8M"]);
        ok(d, &["log", "replay", "w.log", "--replay", "by-us.img", "-f", "raw"]);
        assert_eq!(sha256(&d.join("by-us.img")), sha256(&d.join("by-qemu.img")), "{name}");
    }
}

/// The 512 bytes of a sector of `disk.img`.
fn sector(dir: &Path, number: usize) -> Vec<u8> {
    std::fs::read(dir.join("disk.img")).unwrap()[number * 512..][..512].to_vec()
}

/// Fills `disk.img` with sevens.
fn fill(dir: &Path) {
    std::fs::write(dir.join("disk.img"), [7; 10 * 512]).unwrap();
}

#[test]
fn replay_has_replay_logs_options() {
    let dir = example();
    let d = dir.path();
    fill(d);
    let replay = |args: &[&str]| {
        fill(d);
        ok(d, &[&["log", "replay", "--log", "ex.log", "--replay", "disk.img"], args].concat())
    };
    assert_eq!(replay(&[]), "");
    assert_eq!((sector(d, 3), sector(d, 4)), (vec![0xab; 512], vec![0xcd; 512]));
    assert_eq!((sector(d, 8), sector(d, 9)), (vec![0; 512], vec![0; 512]));
    assert_eq!(sector(d, 5), [7; 512]);
    replay(&["--next-flush"]);
    assert_eq!((sector(d, 3), sector(d, 4)), (vec![0xab; 512], vec![7; 512]));
    replay(&["--no-discard", "--start-entry", "2"]);
    assert_eq!((sector(d, 3), sector(d, 4)), (vec![7; 512], vec![0xcd; 512]));
    assert_eq!(sector(d, 8), [7; 512]);
    // Discards are applied whatever sectors are asked for.
    replay(&["--start-sector", "4", "--end-sector", "5"]);
    assert_eq!((sector(d, 3), sector(d, 4)), (vec![7; 512], vec![0xcd; 512]));
    assert_eq!(sector(d, 8), [0; 512]);
    replay(&["--end-sector", "3"]);
    assert_eq!((sector(d, 3), sector(d, 4)), (vec![0xab; 512], vec![7; 512]));
    assert_eq!(
        replay(&["-v", "--limit", "3"]),
        "replaying 0@2: sector 0, size 0, flags 0x8(MARK)\n\
         replaying 1@3: sector 3, size 512, flags 0x0(NONE)\n\
         replaying 2@5: sector 8, size 1024, flags 0x4(DISCARD)\n"
    );
    let shown = replay(&["-vv", "--no-discard", "--start-entry", "2", "--limit", "1"]);
    assert_eq!(shown, "skipping 2@5: sector 8, size 1024, flags 0x4(DISCARD)\n");
    let summary = json_of(&replay(&["--output", "json", "--start-mark", "start", "--next-fua"]));
    assert_eq!(
        summary,
        json!({
            "filename": "ex.log", "target": "disk.img", "entries": 4, "first-entry": 1,
            "last-entry": 4, "stopped-by": "fua", "written-bytes": 1024,
            "discarded-bytes": 1024, "checks": 0,
        })
    );
    let line = ok(d, &["log", "replay", "--log", "ex.log"]);
    assert_eq!(line, "Log version=1, sectorsize=512, entries=6\n");
    assert_eq!(ok(d, &["log", "replay", "--log", "ex.log", "--num-entries"]), "6\n");
    let found = ok(d, &["log", "replay", "--log", "ex.log", "--find", "--next-flush"]);
    assert_eq!(found, "3@6\n");
}

/// Who reads only the first lines wants the whole disk all the same.
#[test]
fn a_replay_whose_reader_goes_away_is_finished() {
    let dir = example();
    let d = dir.path();
    fill(d);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_vublk"))
        .args(["log", "replay", "ex.log", "--replay", "disk.img", "-v"])
        .current_dir(d)
        .stdout(writer)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let heard = std::fs::read(d.join("disk.img")).unwrap();
    fill(d);
    ok(d, &["log", "replay", "ex.log", "--replay", "disk.img"]);
    assert!(std::fs::read(d.join("disk.img")).unwrap() == heard);
}

#[test]
fn checkers_run_where_they_are_told_to() {
    let dir = example();
    let d = dir.path();
    let run = |check: &str| {
        fill(d);
        let _ = std::fs::remove_file(d.join("runs"));
        // Notes the first byte of sector 3, as the checker sees it.
        let fsck = "od -An -v -tx1 -j1536 -N1 disk.img >> runs";
        ok(
            d,
            &["log", "replay", "ex.log", "--replay", "disk.img", "--check", check, "--fsck", fsck],
        );
        let runs = std::fs::read_to_string(d.join("runs")).unwrap_or_default();
        runs.split_whitespace().map(str::to_string).collect::<Vec<_>>()
    };
    assert_eq!(run("1"), ["07", "ab", "ab", "ab", "ab", "ab"]);
    assert_eq!(run("4"), ["ab"]);
    assert_eq!(run("mark"), ["07", "ab"]);
    assert_eq!(run("discard"), ["ab"]);
    assert_eq!(run("flush").len(), 1);
    assert_eq!(run("fua").len(), 1);
    let replay = ["log", "replay", "ex.log", "--replay", "disk.img"];
    let failing = [&replay[..], &["--check", "2", "--fsck", "test ! -e runs || exit 4"]].concat();
    let err = fails(d, &failing, 1);
    assert_eq!(err, "Fsck errored out on entry 1 (exit status: 4)");
    for wrong in
        [&["--check", "flush"][..], &["--fsck", "true"], &["--check", "0", "--fsck", "true"]]
    {
        assert_eq!(vublk(d, &[&replay[..], wrong].concat()).status.code(), Some(2), "{wrong:?}");
    }
}

#[test]
fn a_checker_may_change_an_image_of_any_format() {
    let dir = example();
    let d = dir.path();
    ok(d, &["create", "-q", "-f", "qcow2", "disk.qcow2", "64K"]);
    let own = env!("CARGO_BIN_EXE_vublk");
    // Replays the log's last write to the same image in between, as if it were a repair.
    let fsck = format!("{own} log replay ex.log --replay disk.qcow2 --start-entry 4");
    ok(
        d,
        &[
            "log",
            "replay",
            "ex.log",
            "--replay",
            "disk.qcow2",
            "--limit",
            "4",
            "--check",
            "flush",
            "--fsck",
            &fsck,
        ],
    );
    ok(d, &["convert", "-O", "raw", "disk.qcow2", "disk.img"]);
    assert_eq!((sector(d, 3), sector(d, 4)), (vec![0xab; 512], vec![0xcd; 512]));
}

#[test]
fn a_replay_that_cannot_be_right_writes_nothing() {
    let dir = example();
    let d = dir.path();
    fill(d);
    let replay = |log: &str, args: &[&str]| {
        let err = fails(d, &[&["log", "replay", log, "--replay", "disk.img"], args].concat(), 1);
        let content = std::fs::read(d.join("disk.img")).unwrap();
        assert!(content.iter().all(|byte| *byte == 7), "{log} {args:?}: something was written");
        err
    };
    let err = replay("ex.log", &["--end-mark", "nowhere"]);
    assert_eq!(err, "ex.log: no mark 'nowhere' in what was searched (list shows the marks)");
    let mut bytes = std::fs::read(d.join("ex.log")).unwrap();
    bytes[0xc10] = 0x80;
    std::fs::write(d.join("bad.log"), bytes).unwrap();
    assert_eq!(replay("bad.log", &[]), "bad.log: entry 4: unknown flags 0x80");
    let far =
        LogBuilder::new(512).write(0, &[1; 512]).discard(ByteRange { offset: 4096, len: 2048 });
    std::fs::write(d.join("far.log"), far.finish()).unwrap();
    let err = replay("far.log", &[]);
    assert_eq!(
        err,
        "disk.img: entry 1 writes past the end of the target: up to byte 6144, and it has 5120 \
         (vublk resize disk.img 6144)"
    );
    let log = std::fs::read(d.join("ex.log")).unwrap();
    let err = fails(d, &["log", "replay", "ex.log", "--replay", "ex.log", "-f", "raw"], 1);
    assert_eq!(err, "ex.log: is the log itself");
    assert_eq!(std::fs::read(d.join("ex.log")).unwrap(), log);
    let err = fails(d, &["log", "replay", "ex.log", "--replay", "none.img"], 1);
    assert!(err.contains("the target must exist") && err.contains("none.img"), "{err}");
    // Without the discard it fits.
    ok(d, &["log", "replay", "far.log", "--replay", "disk.img", "--no-discard"]);
}

/// Direct I/O on a disk with large blocks cannot write what a log of smaller ones has.
#[test]
fn a_replay_in_pieces_that_the_target_does_not_take_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    std::fs::write(d.join("disk.img"), vec![7; 16384]).unwrap();
    let log = LogBuilder::new(512).write(0, &[1; 4096]).flush().mark("whole");
    let log = log.discard(ByteRange { offset: 4096, len: 4096 + 512 });
    std::fs::write(d.join("w.log"), log.finish()).unwrap();
    let disk = d.join("disk.img");
    let Some(device) = common::LoopDevice::with_blocks(&disk, 4096) else { return };
    let replay = ["log", "replay", "w.log", "--replay", device.name(), "-f", "raw", "-t"];
    let err = fails(d, &[&replay[..], &["none"]].concat(), 1);
    assert!(err.contains("only in units of 4096 bytes") && err.contains("change 512"), "{err}");
    assert!(err.contains("-t writeback"), "{err}");
    assert!(std::fs::read(&disk).unwrap() == [7; 16384], "something was written");
    // What is chosen of it may do.
    ok(d, &[&replay[..], &["none", "--end-mark", "whole"]].concat());
    ok(d, &[&replay[..], &["writeback"]].concat());
    let mut expected = vec![7; 16384];
    expected[..4096].fill(1);
    expected[4096..8704].fill(0);
    assert!(std::fs::read(&disk).unwrap() == expected);
}

#[test]
fn discards_of_any_length_are_zeros_and_holes() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let len = 300 << 20;
    let log = LogBuilder::new(4096).write(0, &[5; 8192]).discard(ByteRange { offset: 0, len });
    let log = log.write(len - 4096, &[6; 4096]).finish();
    std::fs::write(d.join("w.log"), log).unwrap();
    ok(d, &["create", "-q", "-f", "raw", "disk.img", "300M"]);
    let file = std::fs::OpenOptions::new().write(true).open(d.join("disk.img")).unwrap();
    for at in [0u64, 150 << 20, 200 << 20] {
        std::os::unix::fs::FileExt::write_all_at(&file, &[9; 4096], at).unwrap();
    }
    ok(d, &["log", "replay", "w.log", "--replay", "disk.img"]);
    let content = std::fs::read(d.join("disk.img")).unwrap();
    let (zeros, last) = content.split_at(len as usize - 4096);
    assert!(zeros.iter().all(|byte| *byte == 0) && last.iter().all(|byte| *byte == 6));
    let stored = std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
    assert!(stored <= 64, "{stored} blocks");
}

/// Small and large entries, one over the other, at places that fit no page.
#[test]
fn entries_of_any_length_are_replayed_in_their_order() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let mut log = LogBuilder::new(512);
    let mut model = vec![0; 8 << 20];
    for i in 0..60usize {
        let len = [512, 300 << 10, 1 << 20, 4096, (3 << 20) + 512, 70 << 10][i % 6];
        let at = i * 1_234_944 % (model.len() - len) / 512 * 512;
        let data: Vec<u8> = (0..len).map(|n| (n / 512 * 7 + i) as u8).collect();
        model[at..at + len].copy_from_slice(&data);
        log = log.write(at as u64, &data);
    }
    std::fs::write(d.join("w.log"), log.finish()).unwrap();
    std::fs::write(d.join("model.raw"), &model).unwrap();
    for format in ["raw", "qcow2", "vhdx"] {
        ok(d, &["create", "-q", "-f", format, format, "8M"]);
        // Again, over what is there already.
        for _ in 0..2 {
            ok(d, &["log", "replay", "w.log", "-f", format, "--replay", format]);
            ok(d, &["compare", "-f", "raw", "-F", format, "model.raw", format]);
        }
    }
}

#[test]
fn an_empty_log_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    std::fs::write(d.join("w.log"), LogBuilder::new(4096).finish()).unwrap();
    fill(d);
    ok(d, &["log", "replay", "w.log", "--replay", "disk.img"]);
    assert_eq!(std::fs::read(d.join("disk.img")).unwrap(), [7; 10 * 512]);
}

/// Records some writes in `w.log` of a directory, and returns it. The image is `disk.raw` there.
fn recorded(options: &[&str]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("w.log");
    let image = dir.path().join("disk.raw");
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let log = ["--log-writes", log.to_str().unwrap()];
    let mut backend = Setup::new(&[&log[..], options].concat()).image(&image).start();
    let mut disk = backend.open(SessionOptions::new(Personality::Qemu));
    for request in [
        Request::write(4096, vec![1; 8192]),
        Request::write_zeroes(&[(65536, 32768)], true),
        Request::flush(),
        Request::discard(&[(4096, 4096)]),
        Request::write(8192, vec![2; 4096]),
        Request::flush(),
        Request::write(12288, vec![3; 4096]),
    ] {
        disk.execute(0, &request).unwrap().ok().unwrap();
    }
    disk.stop().unwrap();
    assert!(backend.terminate().success());
    dir
}

/// The kinds of the entries of a log.
fn kinds(dir: &Path, log: &str) -> Vec<String> {
    let list = json_of(&ok(dir, &["log", "list", "--output", "json", log]));
    let names = |entry: &Value| match entry["flags"].as_array().unwrap()[..] {
        [] => "WRITE".to_string(),
        ref flags => flags.iter().map(|flag| flag.as_str().unwrap()).collect::<Vec<_>>().join("|"),
    };
    list.as_array().unwrap().iter().map(names).collect()
}

#[test]
fn a_recorded_log_is_sound_and_replays_to_the_image() {
    for options in [&[][..], &["--log-sector-size", "4K", "--block-size", "4096"]] {
        let dir = recorded(options);
        let d = dir.path();
        let kinds = kinds(d, "w.log");
        assert_eq!(kinds[..6], ["WRITE", "WRITE", "FLUSH", "DISCARD", "WRITE", "FLUSH"]);
        assert_eq!(kinds.last().unwrap(), "MARK");
        let verified = json_of(&ok(d, &["log", "verify", "--output", "json", "w.log"]));
        assert_eq!(verified["entries-with-record"], verified["counted-entries"]);
        assert_eq!((&verified["damage"], &verified["notes"]), (&json!([]), &json!([])));
        ok(d, &["create", "-q", "-f", "raw", "new.raw", "1M"]);
        ok(d, &["log", "replay", "w.log", "--replay", "new.raw"]);
        assert!(
            std::fs::read(d.join("new.raw")).unwrap() == std::fs::read(d.join("disk.raw")).unwrap()
        );
        // The zeros are a hole.
        let stored =
            std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(d.join("w.log")).unwrap());
        assert!(stored * 512 < 65536, "{stored} blocks");
        // A changed byte of a record, of an entry that is counted and of what comes behind it.
        let sidecar = std::fs::read(d.join("w.log.sidecar")).unwrap();
        let counted = verified["counted-entries"].as_u64().unwrap();
        let mut damaged = sidecar.clone();
        damaged[Record::position(2) as usize + 20] ^= 1;
        damaged.resize(Record::position(counted + 1) as usize, 9);
        std::fs::write(d.join("w.log.sidecar"), damaged).unwrap();
        let text = ok_or(d, &["log", "verify", "w.log"], 2);
        let torn = format!("entry 2: its record at byte {} of", Record::position(2));
        assert!(text.starts_with(&torn), "{text}");
        assert!(
            text.contains(&format!("note: entry {counted}, which is not counted: its")),
            "{text}"
        );
        std::fs::write(d.join("w.log.sidecar"), sidecar).unwrap();
        // A changed byte of data.
        let mut bytes = std::fs::read(d.join("w.log")).unwrap();
        let data = if options.is_empty() { 1024 } else { 8192 };
        bytes[data + 700] ^= 1;
        std::fs::write(d.join("w.log"), &bytes).unwrap();
        let text = ok_or(d, &["log", "verify", "w.log"], 2);
        assert!(text.starts_with("entry 0: header or data are not what its record says"), "{text}");
        // And of what is to be zeros, which no CRC covers.
        bytes[data + 700] ^= 1;
        let zeros = data + 8192 + data / 2;
        bytes[zeros + 20000] = 1;
        std::fs::write(d.join("w.log"), bytes).unwrap();
        let text = ok_or(d, &["log", "verify", "w.log"], 2);
        assert!(text.starts_with("entry 1: its data are not the zeros"), "{text}");
    }
}

/// A guest that does not wait for its writes: the flush promises none of those in the ring with it.
#[test]
fn a_flush_comes_before_what_was_in_flight_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let (log, image) = (dir.path().join("w.log"), dir.path().join("disk.raw"));
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let mut backend = Setup::new(&["--log-writes", log.to_str().unwrap()]).image(&image).start();
    let mut disk = backend.open(SessionOptions::new(Personality::Qemu));
    let write = |sector: u64, byte| Request::write(sector * 512, vec![byte; 4096]);
    let mut at_once = |requests: &[Request]| {
        let prepare = |request| disk.prepare(0, request, &Layout::default()).unwrap();
        let heads: Vec<_> = requests.iter().map(prepare).collect();
        disk.publish(0).unwrap();
        for head in heads {
            let deadline = disk.deadline();
            disk.wait_head(0, head, deadline).unwrap().ok().unwrap();
        }
    };
    at_once(&[write(8, 1), write(16, 1), write(12, 2), Request::flush(), write(16, 3)]);
    at_once(&[write(64, 4), Request::discard(&[(32768, 4096)]), write(64, 5)]);
    disk.stop().unwrap();
    assert!(backend.terminate().success());
    let list = json_of(&ok(dir.path(), &["log", "list", "--output", "json", "w.log"]));
    let sectors: Vec<_> = list.as_array().unwrap().iter().map(|e| e["sector"].clone()).collect();
    assert_eq!(kinds(dir.path(), "w.log")[0], "FLUSH");
    assert_eq!(sectors[1..4], [json!(8), json!(16), json!(12)]);
    ok(dir.path(), &["create", "-q", "-f", "raw", "new.raw", "1M"]);
    ok(dir.path(), &["log", "replay", "w.log", "--replay", "new.raw"]);
    assert!(std::fs::read(dir.path().join("new.raw")).unwrap() == std::fs::read(image).unwrap());
}

/// What xfstests' replay-log refuses, besides what our reader does: see `docs/write-log.md`.
#[test]
fn a_recorded_log_keeps_to_what_replay_log_demands() {
    let dir = recorded(&[]);
    let bytes = std::fs::read(dir.path().join("w.log")).unwrap();
    let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    assert_eq!((number(0), number(8)), (0x006a_7366_7773_6872, 1));
    let mut at = 512;
    for entry in 0..number(16) {
        let (sectors, flags, data_len) = (number(at + 8), number(at + 16), number(at + 24));
        assert!(sectors > 0 || flags != 0, "entry {entry} is malformed");
        assert_eq!(flags & !0xf, 0, "entry {entry}: flags that QEMU does not take");
        let text = if flags == 8 { data_len } else { 0 };
        assert!(data_len == text && text < 480, "entry {entry}: data_len {data_len}");
        assert!(bytes[at + 32 + text..at + 512].iter().all(|b| *b == 0), "entry {entry}: padding");
        at += 512 * if flags & 4 != 0 { 1 } else { 1 + sectors };
    }
    assert_eq!(at, bytes.len(), "something stands behind the last entry");
}

#[test]
fn qemu_appends_to_our_log() {
    if !have("qemu-io") {
        return;
    }
    let dir = recorded(&[]);
    let d = dir.path();
    let before = kinds(d, "w.log");
    let options = "driver=blklogwrites,file.driver=file,file.filename=disk.raw,\
                   log.driver=file,log.filename=w.log,log-append=on";
    let commands = ["-c", "write -P 7 16384 4096", "-c", "flush"];
    tool_ok(d, "qemu-io", &[&["--image-opts", options][..], &commands].concat());
    let after = kinds(d, "w.log");
    assert_eq!(after[..before.len()], before, "QEMU changed what was there");
    assert_eq!(after[before.len()..][..2], ["WRITE", "FLUSH"]);
    ok(d, &["create", "-q", "-f", "raw", "new.raw", "1M"]);
    ok(d, &["log", "replay", "w.log", "--replay", "new.raw"]);
    assert!(
        std::fs::read(d.join("new.raw")).unwrap() == std::fs::read(d.join("disk.raw")).unwrap()
    );
    // What QEMU wrote has no records, and the image has changed: going on must be asked for.
    let log = d.join("w.log");
    let image = d.join("disk.raw");
    let args = ["serve", "--socket-path", "s", "-f", "raw", "--log-writes", "w.log", "disk.raw"];
    let err = fails(d, &args, 78);
    assert!(err.contains("disk.raw was changed after recording ended"), "{err}");
    let append = ["--log-writes", log.to_str().unwrap(), "--log-append"];
    let mut backend = Setup::new(&append).image(&image).start();
    let mut disk = backend.open(SessionOptions::new(Personality::Qemu));
    disk.execute(0, &Request::write(20480, vec![9; 4096])).unwrap().ok().unwrap();
    disk.stop().unwrap();
    assert!(backend.terminate().success());
    assert_eq!(kinds(d, "w.log")[after.len()..], ["WRITE", "FLUSH", "MARK"][..]);
    ok(d, &["log", "verify", "w.log"]);
}

/// Each would overwrite what the other one needs to go on.
#[test]
fn two_logs_never_share_a_sidecar() {
    let dir = recorded(&[]);
    let d = dir.path();
    let path = |name: &str| d.join(name).to_str().unwrap().to_string();
    let (log, sidecar) = (path("other.log"), path("s"));
    let mut other = Setup::new(&["--log-writes", &log, "--log-sidecar", &sidecar]).start();
    // Its socket is there when its log is.
    other.qemu().stop().unwrap();
    let serve = ["serve", "--socket-path", "x", "-f", "raw", "--log-writes", "new.log"];
    let err = fails(d, &[&serve[..], &["--log-sidecar", "s", "disk.raw"]].concat(), 1);
    assert!(err.contains("new.log: its sidecar: s"), "{err}");
    assert!(!d.join("new.log").exists());
    assert!(other.terminate().success(), "{}", other.log());
    ok(d, &["log", "verify", "other.log", "--sidecar", "s"]);
}

#[test]
fn recording_is_refused_where_it_cannot_be_right() {
    let dir = recorded(&[]);
    let d = dir.path();
    let fails = |args: &[&str], code| {
        fails(d, &[&["serve", "--socket-path", "s", "-f", "raw"], args].concat(), code)
    };
    let refused = |args: &[&str]| fails(args, 78);
    // By the lock that is ours.
    let err = fails(&["--log-writes", "disk.raw", "disk.raw"], 1);
    assert!(err.contains("disk.raw"), "{err}");
    let err = refused(&["-r", "--log-writes", "w.log", "disk.raw"]);
    assert!(err.contains("nothing to record"), "{err}");
    std::fs::copy(d.join("disk.raw"), d.join("copy.raw")).unwrap();
    let err = refused(&["--log-writes", "w.log", "copy.raw"]);
    assert!(err.contains("of another image") && err.contains("--log-overwrite"), "{err}");
    let err = refused(&["--log-writes", "new.log", "--log-sector-size", "1000", "disk.raw"]);
    assert!(err.contains("new.log: invalid log sector size 1000"), "{err}");
    assert!(!d.join("new.log").exists(), "a refused log was made");
    let err = refused(&["--log-writes", "new.log", "--log-sector-size", "128K", "disk.raw"]);
    assert!(err.contains("new.log: invalid log sector size 131072 (a power of two"), "{err}");
    let err = refused(&["--log-writes", "new.log", "--log-sector-size", "4096", "disk.raw"]);
    assert!(err.contains("--block-size 4096"), "{err}");
    let err = refused(&["--log-writes", "new.log", "--log-sector-size", "64K", "disk.raw"]);
    assert!(err.contains("blocks of 512; use a log with smaller sectors"), "{err}");
    std::fs::write(d.join("notes"), "some text").unwrap();
    let err = refused(&["--log-writes", "notes", "disk.raw"]);
    assert!(err.contains("neither empty nor a log of writes"), "{err}");
    assert_eq!(std::fs::read(d.join("notes")).unwrap(), b"some text");
    assert!(!d.join("new.log.sidecar").exists(), "a refused log has left its sidecar");

    // Nor is a file lost that is named as the sidecar by mistake.
    let disk = std::fs::read(d.join("disk.raw")).unwrap();
    std::fs::hard_link(d.join("disk.raw"), d.join("link.raw")).unwrap();
    for (sidecar, why) in [
        ("disk.raw", "disk.raw is disk.raw itself"),
        ("link.raw", "link.raw is disk.raw itself"),
        ("new.log", "new.log is new.log itself"),
        ("notes", "notes is neither empty nor the sidecar of a log"),
    ] {
        let err = refused(&["--log-writes", "new.log", "--log-sidecar", sidecar, "disk.raw"]);
        assert!(err.contains(why), "{err}");
        assert!(!d.join("new.log").exists());
    }
    assert!(std::fs::read(d.join("disk.raw")).unwrap() == disk, "the disk is lost");
    assert_eq!(std::fs::read(d.join("notes")).unwrap(), b"some text");

    // ext4 begins with 1024 zeros, and iso9660 with 32 KiB of them.
    for at in [1024, 32768, (3 << 20) - 512] {
        let mut file_system = vec![0; 3 << 20];
        file_system[at] = 0x53;
        std::fs::write(d.join("fs"), &file_system).unwrap();
        let err = refused(&["--log-writes", "fs", "disk.raw"]);
        assert!(err.contains("neither empty nor a log of writes"), "{err}");
        assert!(std::fs::read(d.join("fs")).unwrap() == file_system);
    }
}

/// Even if what is asked for is to start it anew.
#[test]
fn a_refused_command_leaves_the_log_as_it_was() {
    let dir = recorded(&[]);
    let d = dir.path();
    let read = || ["w.log", "w.log.sidecar"].map(|name| std::fs::read(d.join(name)).unwrap());
    let before = read();
    let serve = ["serve", "--socket-path", "s", "-f", "raw", "--log-writes", "w.log"];
    let larger = ["--log-overwrite", "--log-sector-size", "4096", "disk.raw"];
    let err = fails(d, &[&serve[..], &larger].concat(), 78);
    assert!(err.contains("w.log: log sectors of 4096 bytes are larger"), "{err}");
    assert!(read() == before, "the log is lost");
}

/// A loop device of a file, for as long as this lives.
struct Loop(String);

impl Loop {
    /// `None` if the host has none for us.
    fn new(file: &Path) -> Option<Loop> {
        let setup = Command::new("losetup").args(["--find", "--show"]).arg(file).output();
        match setup {
            Ok(output) if output.status.success() => {
                Some(Loop(String::from_utf8(output.stdout).unwrap().trim().into()))
            }
            _ => {
                common::skip("no loop devices here");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

/// By another path, which no lock and no inode number tells.
#[test]
fn a_log_is_not_put_on_the_disk_itself() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    for name in ["disk.raw", "other.raw"] {
        std::fs::write(d.join(name), vec![0; 1 << 20]).unwrap();
    }
    let Some(device) = Loop::new(&d.join("disk.raw")) else { return };
    let refused = |log: &str, image: &str, code| {
        let log = ["--log-writes", log, "--log-sidecar", "side", "--log-overwrite"];
        let serve = [&["serve", "--socket-path", "s", "-f", "raw"], &log[..], &[image]].concat();
        let err = fails(d, &serve, code);
        assert!(
            std::fs::read(d.join("disk.raw")).unwrap() == vec![0; 1 << 20],
            "it was written to"
        );
        err
    };
    let err = refused(&device.0, "disk.raw", 78);
    assert!(err.contains("is disk.raw itself, which is to be recorded, or part of it"), "{err}");
    let err = refused("disk.raw", &device.0, 78);
    assert!(err.contains(&format!("disk.raw: is {} itself", device.0)), "{err}");

    // As a mount has it.
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::EXCL;
    let _mounted = rustix::fs::open(&device.0, flags, rustix::fs::Mode::empty()).unwrap();
    let err = refused(&device.0, "other.raw", 1);
    assert!(err.contains(&format!("{}: is in use by the host: mounted", device.0)), "{err}");
}

/// A process that was killed is followed by one that goes on with its log, unless somebody wrote to
/// the disk in between: that is in no log.
#[test]
fn a_disk_that_was_changed_after_a_kill_is_not_recorded_on() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let (image, log) = (d.join("disk.raw"), d.join("w.log"));
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let setup = Setup::new(&["--log-writes", log.to_str().unwrap()]).image(&image);
    let mut backend = setup.start();
    let mut disk = backend.open(SessionOptions::new(Personality::Qemu));
    disk.execute(0, &Request::write(4096, vec![1; 4096])).unwrap().ok().unwrap();
    backend.kill();
    drop(disk);
    // As if the log had been written so long before the disk.
    let age = |seconds| {
        let then = std::time::SystemTime::now() - std::time::Duration::from_secs(seconds);
        for file in [&log, &d.join("w.log.sidecar")] {
            let file = std::fs::File::options().write(true).open(file).unwrap();
            file.set_modified(then).unwrap();
        }
    };
    let touched = std::fs::File::options().write(true).open(&image).unwrap();
    touched.set_modified(std::time::SystemTime::now()).unwrap();
    age(60);
    let args = ["serve", "--socket-path", "s", "-f", "raw", "--log-writes", "w.log", "disk.raw"];
    let err = fails(d, &args, 78);
    assert!(err.contains("was changed after the last entry") && err.contains("--log-append"));
    // Soon after the kill only the disk itself tells.
    age(5);
    std::os::unix::fs::FileExt::write_all_at(&touched, &[9], 5000).unwrap();
    let err = fails(d, &args, 78);
    assert!(err.contains("at byte 5000 of the disk there is not what entry 0 wrote"), "{err}");
    std::os::unix::fs::FileExt::write_all_at(&touched, &[1], 5000).unwrap();
    // What was in flight at the kill may be that much later.
    age(5);
    let mut again = Setup::new(&["--log-writes", log.to_str().unwrap()]).image(&image).start();
    common::wait_until("a disk", || again.log().contains("serving "));
    assert!(again.terminate().success(), "{}", again.log());
    assert_eq!(kinds(d, "w.log"), ["WRITE"]);
}

/// A log that is full fails what it cannot hold, and goes on when there is room again: the disk has
/// lost nothing.
#[test]
fn a_full_log_goes_on_when_there_is_room_again() {
    use rustix::process::{Pid, Resource, Rlimit, prlimit};
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let image = d.join("disk.raw");
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    for cache in ["writeback", "none"] {
        let log = d.join(format!("{cache}.log"));
        let options = ["--log-writes", log.to_str().unwrap(), "--cache", cache];
        let mut backend = Setup::new(&options).image(&image).start();
        let mut disk = backend.open(SessionOptions::new(Personality::Qemu));
        // Longer than the image, so that a limit on the length of files is felt by the log alone.
        for byte in 1..=4 {
            disk.write(0, 0, &vec![byte; 512 << 10]).unwrap();
        }
        disk.flush(0).unwrap();
        let full = std::fs::metadata(&log).unwrap().len();
        let pid = Pid::from_raw(backend.pid() as i32);
        let limit = |current| {
            prlimit(pid, Resource::Fsize, Rlimit { current, maximum: None }).unwrap();
        };
        limit(Some(full));
        for _ in 0..200 {
            disk.write(0, 4096, &[5; 512]).unwrap_err();
            disk.flush(0).unwrap_err();
        }
        assert_eq!(disk.read(0, 0, 512).unwrap(), [4; 512]);
        backend.wait_log(".log: File too large");
        // A guest that goes on and on does not fill the operator's disk as well.
        let lines = backend.log().matches("File too large").count();
        assert!(lines < 50, "{lines} lines");
        limit(None);
        disk.write(0, 4096, &[6; 512]).unwrap();
        disk.write(0, 8192, &[7; 512]).unwrap();
        disk.flush(0).unwrap();
        drop(disk);
        assert!(backend.terminate().success());
        let log = log.to_str().unwrap();
        ok(d, &["log", "verify", log]);
        ok(d, &["create", "-f", "raw", "copy.raw", "1M"]);
        ok(d, &["log", "replay", "-f", "raw", "--log", log, "--replay", "copy.raw"]);
        assert!(std::fs::read(d.join("copy.raw")).unwrap() == std::fs::read(&image).unwrap());
    }
}
