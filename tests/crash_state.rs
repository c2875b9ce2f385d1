//! Crash states as disks: served, exported, compared, looked at, and put together on the control
//! socket.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::{Value, json};

mod common;

use common::{LoopDevice, Qmp, Setup, fails, ok, vublk};
use vublk::frontend::{Personality, Session, SessionOptions};
use vublk::units::ByteRange;
use vublk::write_log::LogBuilder;

/// Size of the disk in bytes.
const DISK: usize = 1 << 20;
const BLOCK: usize = 4096;

/// A base of nines; the log: a mark, a write to block 0, a flush, then writes to blocks 1 and 2 and
/// a discard of block 0, a flush.
fn bed() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("base.img"), vec![9; DISK]).unwrap();
    let block = |n: u64| n * BLOCK as u64;
    let log = LogBuilder::new(512)
        .mark("start")
        .write(block(0), &[1; BLOCK])
        .flush()
        .write(block(1), &[2; BLOCK])
        .write(block(2), &[3; BLOCK])
        .discard(ByteRange { offset: 0, len: BLOCK as u64 })
        .flush();
    std::fs::write(dir.path().join("w.log"), log.finish()).unwrap();
    dir
}

/// The base with these bytes in its first blocks.
fn disk(blocks: &[&[u8]]) -> Vec<u8> {
    let mut disk = vec![9; DISK];
    let start: Vec<u8> = blocks.concat();
    disk[..start.len()].copy_from_slice(&start);
    disk
}

/// Every kind of name, and the disk that it means.
fn states() -> Vec<(&'static str, Vec<u8>)> {
    let (one, two, three) = (&[1; BLOCK][..], &[2; BLOCK][..], &[3; BLOCK][..]);
    let (nine, zero) = (&[9; BLOCK][..], &[0; BLOCK][..]);
    let torn: &[u8] = &[&[2; 512][..], &[9; BLOCK - 512]].concat();
    let tail: &[u8] = &[&[9; BLOCK - 1024][..], &[3; 1024]].concat();
    vec![
        ("E0", disk(&[])),
        ("E2", disk(&[one])),
        ("E3", disk(&[one])),
        ("E7", disk(&[zero, two, three])),
        ("E3:s=01", disk(&[one, nine, three])),
        ("E3:s=001", disk(&[zero])),
        ("E3:s=1,torn=1@512", disk(&[one, torn])),
        ("E3:s=11,torn=2@-1024", disk(&[one, two, tail])),
    ]
}

fn untouched(dir: &Path) -> bool {
    let again = bed();
    ["base.img", "w.log"].iter().all(|name| {
        std::fs::read(dir.join(name)).unwrap() == std::fs::read(again.path().join(name)).unwrap()
    })
}

#[test]
fn any_state_is_exported_and_compared() {
    let dir = bed();
    let d = dir.path();
    let of = |state: &'static str| ["--log", "w.log", "--state", state];
    for (name, content) in states() {
        ok(d, &[&["convert", "-f", "raw"][..], &of(name), &["base.img", "out.raw"]].concat());
        assert!(std::fs::read(d.join("out.raw")).unwrap() == content, "{name}");
        let compare = ["compare", "-f", "raw", "-F", "raw"];
        ok(d, &[&compare[..], &of(name), &["base.img", "out.raw"]].concat());
        let other = if name == "E0" { "E7" } else { "E0" };
        let output = vublk(d, &[&compare[..], &of(other), &["base.img", "out.raw"]].concat());
        assert_eq!(output.status.code(), Some(1), "{name} and {other}");
        // The same by one word.
        let json = format!(
            r#"json:{{"driver":"crash-state","log":"w.log","base":"base.img","base-format":"raw","state":"{name}"}}"#
        );
        ok(d, &["compare", "-F", "raw", &json, "out.raw"]);
    }
    assert!(untouched(d));
}

#[test]
fn a_state_is_described_and_mapped() {
    let dir = bed();
    let of = ["-f", "raw", "--log", "w.log", "--state", "E3:s=101", "--output", "json", "base.img"];
    let run = |verb: &str| -> Value {
        serde_json::from_str(&ok(dir.path(), &[&[verb][..], &of].concat())).unwrap()
    };
    let info = run("info");
    assert_eq!((&info["format"], &info["virtual-size"]), (&json!("crash-state"), &json!(DISK)));
    assert_eq!(info["format-specific"]["data"]["state"], "E3:s=101");
    let map = run("map");
    // Zeros of the discard; block 1 at its place in the log; the rest is the base's.
    assert_eq!((&map[0]["zero"], &map[0]["length"]), (&json!(true), &json!(BLOCK)));
    assert_eq!((&map[1]["filename"], &map[1]["depth"]), (&json!("w.log"), &json!(0)));
    let at = map[1]["offset"].as_u64().unwrap() as usize;
    let log = std::fs::read(dir.path().join("w.log")).unwrap();
    assert_eq!(log[at..at + BLOCK], [2; BLOCK]);
    assert_eq!((&map[2]["filename"], &map[2]["depth"]), (&json!("base.img"), &json!(1)));
    assert_eq!(map[2]["offset"], 2 * BLOCK);
}

#[test]
fn what_is_no_state_is_refused() {
    let dir = bed();
    let d = dir.path();
    let with = |state: &str| {
        fails(d, &["map", "-f", "raw", "--log", "w.log", "--state", state, "base.img"], 1)
    };
    assert!(with("E8").contains("E8: the log has 7 entries only"));
    assert!(with("E3:s=0111").contains("4 bits, but only 3 writes follow"));
    assert!(with("E3:s=001,torn=3@512").contains("write 3 is a discard"));
    std::fs::write(d.join("junk"), [9; BLOCK]).unwrap();
    let args = ["convert", "--log", "junk", "--state", "E0", "-f", "raw", "base.img", "x"];
    assert!(fails(d, &args, 1).contains("not a dm-log-writes log"));
    let args = ["serve", "--socket-path", "s", "--log", "w.log", "--base", "base.img"];
    let output = vublk(d, &args);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8(output.stderr).unwrap().contains("--state <NAME>"));
    let args = ["convert", "-f", "crash-state", "w.log", "x"];
    assert!(fails(d, &args, 1).contains("a crash state is no file"));
    let args = ["convert", r#"json:{"driver":"raw"}"#, "x"];
    assert!(fails(d, &args, 1).contains("is what is understood"));
    std::fs::write(d.join("small.img"), [9; BLOCK]).unwrap();
    let args = ["map", "-f", "raw", "--log", "w.log", "--state", "E0", "small.img"];
    assert!(fails(d, &args, 1).contains("entry 3 writes past the end of the disk"));
    // A log that somebody writes to may become another one.
    let args = ["convert", "--log", "w.log", "--state", "E0", "-f", "raw", "w.log", "x"];
    assert!(fails(d, &args, 1).contains("w.log: is both log and base"));
}

fn serve(dir: &Path, state: &str, more: &[&str]) -> (common::Backend, Session) {
    serve_over(dir, "raw", state, more)
}

/// The same, over a base in this format.
fn serve_over(
    dir: &Path,
    format: &'static str,
    state: &str,
    more: &[&str],
) -> (common::Backend, Session) {
    let path = |name: &str| dir.join(name).to_str().unwrap().to_string();
    let (log, base) = (path("w.log"), path("base.img"));
    let args = [&["--log", &log, "--base", &base, "--state", state][..], more].concat();
    let setup = Setup::new(&args).format(format, &dir.join("base.img"));
    let backend = setup.without_image().start();
    let session = backend.open(SessionOptions::new(Personality::Qemu));
    (backend, session)
}

fn whole(session: &mut Session) -> Vec<u8> {
    session.read(0, 0, DISK as u32).unwrap()
}

#[test]
fn a_state_is_served_and_what_is_written_is_forgotten() {
    let dir = bed();
    let d = dir.path();
    // As a process leaves it that was killed before its overlay was open.
    let left = d.join("tmp/vublk-state-0123456789abcdef0123456789abcdef");
    std::fs::create_dir_all(&left).unwrap();
    std::fs::set_permissions(&left, std::fs::Permissions::from_mode(0o700)).unwrap();
    std::fs::write(left.join("overlay"), "").unwrap();
    std::fs::write(left.join("overlay.raw"), "").unwrap();
    for (name, content) in states() {
        let args = ["--log", "w.log", "--base", "base.img", "--state", name].map(|arg| {
            if arg.ends_with(".log") || arg.ends_with(".img") {
                d.join(arg).to_str().unwrap().to_string()
            } else {
                arg.to_string()
            }
        });
        let args: Vec<_> = args.iter().map(String::as_str).collect();
        let mut backend = Setup::new(&args).without_image().env("TMPDIR", &d.join("tmp")).start();
        let mut session = backend.open(SessionOptions::new(Personality::Qemu));
        assert!(whole(&mut session) == content, "{name}");
        session.write(0, 4096, &[7; 512]).unwrap();
        session.flush(0).unwrap();
        session.discard(0, 0, 4096).unwrap();
        assert_eq!(session.read(0, 4096, 512).unwrap(), [7; 512]);
        assert_eq!(session.read(0, 8192, 512).unwrap(), content[8192..8704]);
        assert_eq!(std::fs::read_dir(d.join("tmp")).unwrap().count(), 0, "nothing has a name");
        drop(session);
        assert!(backend.terminate().success());
    }
    assert!(untouched(d));
}

/// A write of 4096 bytes that is torn at 512, which neither disk nor host reads by themselves.
#[test]
fn a_state_of_a_disk_with_large_sectors_is_served_in_these() {
    let dir = bed();
    let d = dir.path();
    let vhdx = ["convert", "-f", "raw", "-O", "vhdx", "-o", "logical_sector_size=4096"];
    ok(d, &[&vhdx[..], &["base.img", "4k.vhdx"]].concat());
    std::fs::rename(d.join("4k.vhdx"), d.join("base.img")).unwrap();
    let log = LogBuilder::new(4096).write(0, &[1; BLOCK]).write(BLOCK as u64, &[2; 2 * BLOCK]);
    std::fs::write(d.join("w.log"), log.finish()).unwrap();
    let (one, two, nine) = (&[1; BLOCK][..], &[2; BLOCK][..], &[9; BLOCK][..]);
    for (name, content) in [
        ("E0:s=1,torn=1@512", disk(&[&one[..512]])),
        ("E1:s=1,torn=1@-512", disk(&[one, nine, &nine[512..], &two[..512]])),
        ("E1:s=1,torn=1@4608", disk(&[one, two, &two[..512]])),
    ] {
        for cache in ["writeback", "none"] {
            let options = ["--block-size", "4096", "--cache", cache];
            let (mut backend, mut session) = serve_over(d, "vhdx", name, &options);
            assert!(whole(&mut session) == content, "{name}, {cache}");
            let block = session.read(0, BLOCK as u64, BLOCK as u32).unwrap();
            assert!(block == content[BLOCK..2 * BLOCK], "{name}, {cache}");
            session.write(0, 0, &[7; BLOCK]).unwrap();
            session.flush(0).unwrap();
            assert_eq!(session.read(0, 0, BLOCK as u32).unwrap(), [7; BLOCK]);
            drop(session);
            assert!(backend.terminate().success());
        }
        let of = ["--log", "w.log", "--state", name];
        ok(d, &[&["convert"][..], &of, &["base.img", "out.raw"]].concat());
        assert!(std::fs::read(d.join("out.raw")).unwrap() == content, "{name}");
    }
}

/// Direct I/O is in the units of the base's device. The log may have smaller ones all the same.
#[test]
fn a_state_over_a_device_with_large_blocks_is_read_directly() {
    let dir = bed();
    let d = dir.path();
    let Some(device) = LoopDevice::with_blocks(&d.join("base.img"), 4096) else { return };
    let args = ["--log", "w.log", "--base", device.name(), "-f", "raw", "--cache", "none"];
    let args = [&["serve", "--socket-path", "s", "--state", "E7"][..], &args].concat();
    let error = fails(d, &args, 78);
    assert!(error.contains("direct I/O only in units of 4096 bytes"), "{error}");
    for (name, content) in states() {
        let of = ["-f", "raw", "-T", "none", "--log", "w.log", "--state", name];
        ok(d, &[&["convert"][..], &of, &[device.name(), "out.raw"]].concat());
        assert!(std::fs::read(d.join("out.raw")).unwrap() == content, "{name}");
    }
}

#[test]
fn an_overlay_with_a_name_stays_and_belongs_to_its_state() {
    let dir = bed();
    let d = dir.path();
    let overlay = d.join("o.add-cow").to_str().unwrap().to_string();
    let (mut backend, mut session) = serve(d, "E3:s=01", &["--overlay", &overlay]);
    session.write(0, 4096, &[7; 4096]).unwrap();
    session.flush(0).unwrap();
    backend.kill();
    drop(session);
    let (mut backend, mut session) = serve(d, "E3:s=01", &["--overlay", &overlay]);
    let expected = disk(&[&[1; BLOCK], &[7; BLOCK], &[3; BLOCK]]);
    assert!(whole(&mut session) == expected);
    drop(session);
    assert!(backend.terminate().success());
    let args = [
        "serve",
        "--socket-path",
        "s",
        "--log",
        "w.log",
        "--base",
        "base.img",
        "-f",
        "raw",
        "--state",
        "E3",
        "--overlay",
        "o.add-cow",
    ];
    let err = fails(d, &args, 78);
    assert!(err.contains("o.add-cow: is not an overlay of this state, but of json:"), "{err}");
    std::fs::write(d.join("something"), [1; 5000]).unwrap();
    let mut args = args;
    args[12] = "something";
    assert!(fails(d, &args, 78).contains("is not an add-cow file"));
    // It knows what it stands on, as any image does.
    ok(d, &["convert", "-f", "add-cow", "o.add-cow", "out.raw"]);
    assert!(std::fs::read(d.join("out.raw")).unwrap() == expected);
    let info = ok(d, &["info", "o.add-cow"]);
    assert!(info.contains("E3:s=01"), "{info}");
    let chain = ok(d, &["info", "--backing-chain", "--output", "json", "o.add-cow"]);
    let chain: Vec<Value> = serde_json::from_str(&chain).unwrap();
    let formats: Vec<_> = chain.iter().map(|info| info["format"].as_str().unwrap()).collect();
    assert_eq!(formats, ["add-cow", "crash-state", "raw"]);
    // But not to anything anywhere.
    let elsewhere = tempfile::tempdir().unwrap();
    for name in ["o.add-cow", "o.add-cow.raw"] {
        std::fs::copy(d.join(name), elsewhere.path().join(name)).unwrap();
    }
    let err = fails(elsewhere.path(), &["convert", "-f", "add-cow", "o.add-cow", "out.raw"], 1);
    assert!(err.contains("lies outside of the directories"), "{err}");
    assert!(untouched(d));
}

#[test]
fn a_read_only_state_needs_no_overlay() {
    let dir = bed();
    let (mut backend, mut session) = serve(dir.path(), "E7", &["--read-only"]);
    assert!(whole(&mut session) == disk(&[&[0; BLOCK], &[2; BLOCK], &[3; BLOCK]]));
    drop(session);
    assert!(backend.terminate().success());
}

/// One front-end after another state, and the exploration that goes through all of them this way.
#[test]
fn a_guest_is_shown_one_state_after_the_other() {
    let dir = bed();
    let d = dir.path();
    let control = d.join("control.sock").to_str().unwrap().to_string();
    let (mut backend, mut session) = serve(d, "E0", &["--control", &control]);
    let mut qmp = Qmp::connect(Path::new(&control));
    for (name, content) in states() {
        qmp.ok("x-vublk-crash-present", json!({"device": "disk", "state": name}));
        assert!(whole(&mut session) == content, "{name}");
        // What was written to this one is not to be seen in the next.
        session.write(0, 0, &[7; 4 * BLOCK]).unwrap();
        assert_eq!(session.read(0, 0, 512).unwrap(), [7; 512]);
    }
    let err = qmp.fails("x-vublk-crash-present", json!({"device": "disk", "state": "E99"}));
    assert!(err.contains("E99: the log has 7 entries only"), "{err}");

    // The bug: block 2 without block 1.
    let (vublk, path) = (env!("CARGO_BIN_EXE_vublk"), |name: &str| d.join(name));
    let check = format!(
        "{vublk} qmp {control} x-vublk-crash-present device=disk state={{state}} >/dev/null && \
         echo {{state}} >> {}; case {{state}} in *s=01*) exit 1;; esac",
        path("seen").display()
    );
    let args = [
        "log", "explore", "w.log", "--base", "base.img", "-f", "raw", "-j", "1", "--check", &check,
    ];
    let report = common::vublk(d, &[&args[..], &["--output", "json"]].concat());
    assert_eq!(report.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&report.stdout).unwrap();
    assert_eq!(report["failures"][0]["state"], "E3:s=01", "{report}");
    let seen = std::fs::read_to_string(path("seen")).unwrap();
    assert!(seen.lines().count() as u64 >= report["checked"].as_u64().unwrap(), "{seen}");
    drop(session);
    assert!(backend.terminate().success());

    let overlay = d.join("o.add-cow").to_str().unwrap().to_string();
    let (mut backend, _session) = serve(d, "E0", &["--control", &control, "--overlay", &overlay]);
    let mut qmp = Qmp::connect(Path::new(&control));
    let err = qmp.fails("x-vublk-crash-present", json!({"device": "disk", "state": "E2"}));
    assert!(err.contains("belongs to one state"), "{err}");
    backend.kill();
    assert!(untouched(d));
}

/// Two states of one log over one base, one of them below a writable overlay.
#[test]
fn states_are_nodes_like_others() {
    let dir = bed();
    let d = dir.path();
    ok(d, &["create", "-q", "-f", "add-cow", "o.add-cow", &DISK.to_string()]);
    let path = |name: &str| d.join(name).to_str().unwrap().to_string();
    let control = path("control.sock");
    let base = format!("file,node-name=b,read-only=on,filename={}", path("base.img"));
    let export =
        format!("vhost-user-blk,id=e0,node-name=s0,addr.type=unix,addr.path={}", path("e0.sock"));
    let state = format!(
        "crash-state,node-name=s0,base=b,log.driver=file,log.filename={},state=E2",
        path("w.log")
    );
    let args =
        ["--control", &control, "--blockdev", &base, "--blockdev", &state, "--export", &export];
    let mut backend = Setup::new(&args).many().start();
    let mut qmp = Qmp::connect(Path::new(&control));
    let second = json!({"driver": "crash-state", "node-name": "s1", "base": "b", "state": "E7",
        "log": {"driver": "file", "filename": path("w.log")}});
    qmp.ok("blockdev-add", second.clone());
    qmp.ok(
        "blockdev-add",
        json!({"driver": "add-cow", "node-name": "o", "backing": "s1",
        "file": {"driver": "file", "filename": path("o.add-cow")}}),
    );
    qmp.ok(
        "block-export-add",
        json!({"type": "vhost-user-blk", "id": "e1", "node-name": "o",
        "writable": true, "addr": {"type": "unix", "path": path("e1.sock")}}),
    );
    let connect = |socket: &str| {
        Session::open(Path::new(&path(socket)), SessionOptions::new(Personality::Qemu)).unwrap()
    };
    let (mut first, mut other) = (connect("e0.sock"), connect("e1.sock"));
    assert!(whole(&mut first) == disk(&[&[1; BLOCK]]));
    other.write(0, 0, &[7; 512]).unwrap();
    let expected = [&[7; 512][..], &[0; BLOCK - 512]].concat();
    assert!(whole(&mut other) == disk(&[&expected, &[2; BLOCK], &[3; BLOCK]]));

    // The base stays what it is.
    let reopen = json!({"options": [
        {"driver": "file", "node-name": "b", "filename": path("base.img")}]});
    let err = qmp.fails("blockdev-reopen", reopen);
    assert!(err.contains("node 'b' is the base of a crash state, node 's0' (backing)"), "{err}");
    let err = qmp.fails("blockdev-del", json!({"node-name": "b"}));
    assert!(err.contains("node 's0' (backing), node 's1' (backing)"), "{err}");
    let nodes = qmp.ok("query-named-block-nodes", json!({}));
    let row = nodes.as_array().unwrap().iter().find(|row| row["node-name"] == "s1").unwrap();
    assert_eq!((&row["drv"], &row["ro"]), (&json!("crash-state"), &json!(true)));
    assert_eq!(row["image"]["format-specific"]["data"]["state"], "E7");

    let with = |key: &str, value: Value| {
        let mut options = second.clone();
        options["node-name"] = "s2".into();
        options[key] = value;
        options
    };
    for (options, words) in [
        (with("state", json!("E8")), "E8: the log has 7 entries only"),
        (with("state", json!("8")), "is not the name of a crash state"),
        (with("log", json!("s0")), "node 's0' is not a file: a log must be one"),
        (with("base", json!("o")), "must be read-only"),
    ] {
        let err = qmp.fails("blockdev-add", options);
        assert!(err.contains(words), "{err}");
    }
    let count = qmp.ok("query-named-block-nodes", json!({})).as_array().unwrap().len();
    assert_eq!(count, 7, "what was refused has left nothing");
    drop((first, other));
    assert!(backend.terminate().success());
    assert!(untouched(d));
}
