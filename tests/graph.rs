//! A daemon with many disks, in qemu-storage-daemon's grammar: its nodes, its exports, and the
//! commands that change them while they are served.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

mod common;

use common::{LoopDevice, Qmp, wait_until};
use serde_json::{Value, json};
use vublk::frontend::{Personality, Session, SessionOptions};
use vublk::images::{self, CreateRequest, ImageFormat, frozen};
use vublk::io::{File, HostFile, OpenOptions};

const DISK: u64 = 1 << 20;

/// A daemon and the directory it works in.
struct Daemon {
    dir: tempfile::TempDir,
    child: Child,
}

impl Daemon {
    /// With `disk.raw`, a raw image of [`DISK`] bytes, `more.qcow2`, and whatever `args` ask for;
    /// `DIR` in them stands for the directory.
    fn start(args: &[&str]) -> Daemon {
        let dir = prepare();
        let mut command = command(dir.path(), args);
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let child = command.stderr(log).stdout(Stdio::null()).spawn().unwrap();
        Daemon { dir, child }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn qmp(&self) -> Qmp {
        Qmp::connect(&self.path("qmp.sock"))
    }

    fn guest(&self, socket: &str) -> Session {
        wait_until("a socket", || self.path(socket).exists());
        Session::open(&self.path(socket), SessionOptions::new(Personality::Qemu)).unwrap()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap()
    }

    /// Ends it by `quit`.
    fn quit(mut self, qmp: &mut Qmp) {
        qmp.ok("quit", json!({}));
        assert!(self.child.wait().unwrap().success(), "{}", self.log());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
    }
}

fn prepare() -> tempfile::TempDir {
    let dir = tempfile::Builder::new().prefix("vublk-").tempdir().unwrap();
    std::fs::File::create(dir.path().join("disk.raw")).unwrap().set_len(DISK).unwrap();
    common::ok(dir.path(), &["create", "-q", "-f", "qcow2", "more.qcow2", &DISK.to_string()]);
    dir
}

fn command(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vublk"));
    command.arg("serve").current_dir(dir).stdin(Stdio::null());
    command.env_remove("VUBLK_LOG").env_remove("LISTEN_FDS").env_remove("RUNTIME_DIRECTORY");
    command.args(args.iter().map(|arg| arg.replace("DIR", dir.to_str().unwrap())));
    command
}

/// Two disks, each exported, and a monitor.
const TWO: &[&str] = &[
    "--blockdev",
    "driver=file,node-name=f0,filename=DIR/disk.raw",
    "--blockdev",
    "raw,node-name=d0,file=f0,discard=unmap",
    "--blockdev",
    r#"{"driver":"qcow2","node-name":"d1","file":{"driver":"file","filename":"DIR/more.qcow2"}}"#,
    "--export",
    "type=vhost-user-blk,id=e0,node-name=d0,addr.type=unix,addr.path=DIR/e0.sock,writable=on",
    "--export",
    "vhost-user-blk,id=e1,node-name=d1,addr.type=unix,addr.path=DIR/e1.sock,writable=on,num-queues=2",
    "--chardev",
    "socket,id=c0,path=DIR/qmp.sock,server=on,wait=off",
    "--monitor",
    "chardev=c0",
];

fn names(rows: &Value) -> Vec<String> {
    let rows = rows.as_array().unwrap().iter();
    rows.map(|row| row["node-name"].as_str().unwrap().to_string()).collect()
}

#[test]
fn many_disks_are_served_and_told() {
    let daemon = Daemon::start(TWO);
    let mut qmp = daemon.qmp();
    let blocks = qmp.ok("query-block", json!({}));
    assert_eq!(blocks[0]["device"], "e0");
    assert_eq!(blocks[0]["inserted"]["node-name"], "d0");
    assert_eq!(blocks[0]["inserted"]["drv"], "raw");
    assert_eq!(blocks[0]["inserted"]["children"], json!([{"child": "file", "node-name": "f0"}]));
    assert_eq!(blocks[1]["inserted"]["image"]["virtual-size"], DISK);
    assert_eq!(blocks[1]["inserted"]["image"]["format"], "qcow2");
    let nodes = qmp.ok("query-named-block-nodes", json!({"flat": true}));
    assert_eq!(names(&nodes)[0], "d1", "the newest first");
    assert_eq!(nodes.as_array().unwrap().len(), 4);
    let exports = qmp.ok("query-block-exports", json!({}));
    assert_eq!(exports[1]["type"], "vhost-user-blk");
    assert_eq!(exports[1]["x-vublk-connected"], false);

    let mut first = daemon.guest("e0.sock");
    let mut second = daemon.guest("e1.sock");
    first.write(0, 0, &[1; 4096]).unwrap();
    second.write(0, 0, &[2; 4096]).unwrap();
    assert_eq!(first.read(0, 0, 512).unwrap(), [1; 512]);
    assert_eq!(second.read(0, 0, 512).unwrap(), [2; 512]);
    let stats = qmp.ok("query-blockstats", json!({}));
    assert_eq!(stats[0]["stats"]["wr_bytes"], 4096);
    assert_eq!(stats[0]["stats"]["rd_operations"], 1);
    // One that fails is no read that was done.
    first.read(0, u64::MAX / 512 * 512, 512).unwrap_err();
    first.discard(0, 0, 8192).unwrap();
    let stats = qmp.ok("query-blockstats", json!({}))[0]["stats"].clone();
    assert_eq!([&stats["rd_operations"], &stats["failed_rd_operations"]], [1, 1]);
    assert_eq!([&stats["unmap_operations"], &stats["unmap_bytes"]], [1, 8192]);
    assert_eq!(qmp.ok("query-block-exports", json!({}))[1]["x-vublk-connected"], true);
    drop((first, second));
    daemon.quit(&mut qmp);
}

#[test]
fn nodes_and_exports_come_and_go() {
    let daemon = Daemon::start(TWO);
    let mut qmp = daemon.qmp();
    let in_use = qmp.fails("blockdev-del", json!({"node-name": "d0"}));
    assert_eq!(in_use, "Node d0 is in use: export 'e0'");
    let in_use = qmp.fails("blockdev-del", json!({"node-name": "f0"}));
    assert_eq!(in_use, "Node f0 is in use: node 'd0' (file)");

    let guest = daemon.guest("e0.sock");
    wait_until("the guest", || {
        qmp.ok("query-block-exports", json!({}))[0]["x-vublk-connected"] == true
    });
    let err = qmp.fails("block-export-del", json!({"id": "e0"}));
    assert!(err.starts_with("export 'e0' still in use"), "{err}");
    qmp.ok("block-export-del", json!({"id": "e0", "mode": "hard"}));
    assert_eq!(qmp.event("BLOCK_EXPORT_DELETED"), json!({"id": "e0"}));
    assert!(!daemon.path("e0.sock").exists());
    drop(guest);
    assert_eq!(qmp.fails("block-export-del", json!({"id": "e0"})), "Export 'e0' is not found");
    qmp.ok("blockdev-del", json!({"node-name": "d0"}));
    qmp.ok("blockdev-del", json!({"node-name": "f0"}));
    assert_eq!(
        qmp.fails("blockdev-del", json!({"node-name": "f0"})),
        "Failed to find node with node-name='f0'"
    );

    // The same again, read-only, in one go.
    let disk = daemon.path("disk.raw");
    let file = json!({"driver": "file", "filename": disk, "read-only": true});
    let raw = json!({"driver": "raw", "node-name": "d0", "read-only": true, "file": file});
    qmp.ok("blockdev-add", raw);
    let export = |id: &str, more: Value| {
        let addr = json!({"type": "unix", "path": daemon.path("again.sock")});
        let mut options = json!({"type": "vhost-user-blk", "id": id, "node-name": "d0",
                                 "addr": addr});
        options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        options
    };
    let err = qmp.fails("block-export-add", export("x", json!({"writable": true})));
    assert_eq!(err, "Block node is read-only: 'd0'");
    qmp.ok("block-export-add", export("x", json!({})));
    let err = qmp.fails("block-export-add", export("x", json!({})));
    assert_eq!(err, "Block export id 'x' is already in use");
    let mut guest = daemon.guest("again.sock");
    guest.write(0, 0, &[1; 512]).unwrap_err();
    drop(guest);
    daemon.quit(&mut qmp);
}

#[test]
fn refusals_are_qemus() {
    let daemon = Daemon::start(TWO);
    let mut qmp = daemon.qmp();
    let file = |name: &str| json!({"driver": "file", "filename": daemon.path(name)});
    let gone = daemon.path("gone").display().to_string();
    let add = |options: Value| ("blockdev-add", options);
    for ((command, arguments), expected) in [
        (
            add(json!({"driver": "raw", "file": "f0"})),
            "'node-name' must be specified for the root node",
        ),
        (
            add(json!({"driver": "raw", "node-name": "d0", "file": "f0"})),
            "Duplicate nodes with node-name='d0'",
        ),
        (add(json!({"driver": "raw", "node-name": "0", "file": "f0"})), "Invalid node-name: '0'"),
        (
            add(json!({"driver": "raw", "node-name": "x", "file": file("gone")})),
            &format!("Could not open '{gone}': No such file or directory"),
        ),
        (
            add(json!({"driver": "raw", "node-name": "x", "file": "nope"})),
            "Cannot find device='nope' nor node-name='nope'",
        ),
        (
            add(json!({"driver": "raw", "node-name": "x", "file": "f0"})),
            "Node f0 is in use: node 'd0' (file)",
        ),
        (
            add(json!({"driver": "nbd", "node-name": "x"})),
            "Parameter 'driver' does not accept value 'nbd'",
        ),
        (
            add(json!({"driver": "raw", "node-name": "x", "file": "f0", "offset": 1})),
            "Parameter 'offset' is unexpected",
        ),
        (
            add(json!({"driver": "file", "node-name": "x", "filename": "y", "aio": "native"})),
            "Parameter 'aio' is unexpected",
        ),
        (
            add(
                json!({"driver": "file", "node-name": "x", "filename": "y", "detect-zeroes": "on"}),
            ),
            "Parameter 'detect-zeroes' does not accept value 'on'",
        ),
        (
            add(json!({"driver": "file", "node-name": "x", "filename": "y", "force-share": true})),
            "force-share=on can only be used with read-only images",
        ),
        (
            ("block_resize", json!({"node-name": "d0", "size": 0})),
            "Parameter 'size' expects a >0 size",
        ),
        (
            ("block_resize", json!({"node-name": "nope", "size": 512})),
            "Cannot find device='' nor node-name='nope'",
        ),
        (
            ("blockdev-snapshot", json!({"node": "d0", "overlay": "e1"})),
            "Cannot find device='e1' nor node-name='e1'",
        ),
        (
            ("blockdev-snapshot", json!({"node": "d0", "overlay": "d1"})),
            "The overlay is already in use: export 'e1'",
        ),
        (
            ("blockdev-snapshot-sync", json!({"node-name": "d0", "snapshot-file": "x"})),
            "New overlay node-name missing",
        ),
        (
            (
                "blockdev-snapshot-sync",
                json!({"device": "e0", "snapshot-file": "x", "snapshot-node-name": "d1"}),
            ),
            "New overlay node-name already in use",
        ),
        (
            (
                "blockdev-snapshot-sync",
                json!({"device": "e0", "snapshot-file": "x", "format": "y"}),
            ),
            "Invalid snapshot format 'y'",
        ),
        (
            ("transaction", json!({"actions": [{"type": "abort", "data": {}}]})),
            "Transaction aborted using Abort action",
        ),
    ] {
        assert_eq!(qmp.fails(command, arguments.clone()), expected, "{command} {arguments}");
    }
    assert!(!daemon.path("x").exists());
    let nodes = qmp.ok("query-named-block-nodes", json!({"flat": true}));
    assert_eq!(nodes.as_array().unwrap().len(), 4, "a refusal leaves nothing");
    daemon.quit(&mut qmp);
}

/// Snapshots that cannot be: each is refused, and leaves no file, no node, no mark, and a guest that
/// goes on.
#[test]
fn snapshots_that_are_refused_leave_nothing() {
    let daemon = Daemon::start(TWO);
    let mut qmp = daemon.qmp();
    let mut guest = daemon.guest("e0.sock");
    guest.write(0, 0, &[1; 4096]).unwrap();
    let path = |name: &str| daemon.path(name).display().to_string();
    std::fs::create_dir(daemon.path("directory")).unwrap();
    std::fs::write(daemon.path("taken.raw"), "precious").unwrap();
    common::ok(daemon.dir.path(), &["create", "-q", "-f", "qcow2", "small", "512K"]);
    let file = |name: &str, more: Value| {
        let mut data = json!({"device": "e0", "snapshot-file": path(name)});
        data.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        data
    };
    let add_cow = json!({"format": "add-cow"});
    let small = format!("The overlay {} of ", daemon.path("small").display());
    let small = small.as_str();
    let cases = [
        ("its own file", file("disk.raw", json!({})), "cannot be its own backing file"),
        ("another disk's", file("more.qcow2", json!({})), "more.qcow2"),
        ("a directory", file("directory", json!({})), "directory"),
        ("no such directory", file("no/such", json!({})), "No such file or directory"),
        ("no name", json!({"device": "e0", "snapshot-file": ""}), "No such file or directory"),
        ("a long name", file(&"x".repeat(300), json!({})), "File name too long"),
        ("a path too long", file(&"x/".repeat(3000), add_cow.clone()), "File name too long"),
        (
            "a device that takes no overlay",
            json!({"device": "e0", "snapshot-file": "/dev/null"}),
            "/dev/null",
        ),
        ("NAME.raw is there", file("taken", add_cow.clone()), "taken.raw: exists already"),
        ("control characters", file("a\nb", add_cow), "control characters"),
        ("raw", file("x", json!({"format": "raw"})), "raw images cannot have a backing file"),
        ("a format nobody knows", file("x", json!({"format": "bochs"})), "Invalid snapshot format"),
        ("a mode nobody knows", file("x", json!({"mode": "y"})), "does not accept value 'y'"),
        ("existing, and not there", file("x", json!({"mode": "existing"})), "No such file"),
        ("existing, of another size", file("small", json!({"mode": "existing"})), small),
        (
            "a node name that is none",
            file("x", json!({"snapshot-node-name": "0"})),
            "Invalid node-name: '0'",
        ),
        (
            "a long node name",
            file("x", json!({"snapshot-node-name": "n".repeat(32)})),
            "Node name too long",
        ),
        ("a node name twice", file("x", json!({"snapshot-node-name": "d0"})), "already in use"),
        (
            "another protocol",
            json!({"device": "e0", "snapshot-file": "nbd:localhost:1"}),
            "the protocol 'nbd:' is not supported",
        ),
        (
            "a node's options",
            json!({"device": "e0", "snapshot-file": "json:{\"driver\": \"file\"}"}),
            "the protocol 'json:' is not supported",
        ),
        ("no device", json!({"snapshot-file": path("x")}), "Cannot find device"),
        (
            "no such device",
            json!({"device": "e9", "snapshot-file": path("x")}),
            "Cannot find device",
        ),
    ];
    let files = || {
        let files = std::fs::read_dir(daemon.dir.path()).unwrap();
        let mut files: Vec<_> = files.map(|entry| entry.unwrap().file_name()).collect();
        files.sort();
        files
    };
    let before = (files(), std::fs::read(daemon.path("more.qcow2")).unwrap());
    for (what, arguments, expected) in cases {
        let err = qmp.fails("blockdev-snapshot-sync", arguments);
        assert!(err.contains(expected), "{what}: {err}");
        assert!(before.0 == files(), "{what}: {:?}", files());
    }
    // One disk twice in one transaction.
    let action =
        |name: &str| json!({"type": "blockdev-snapshot-sync", "data": file(name, json!({}))});
    let err = qmp.fails("transaction", json!({"actions": [action("x"), action("y")]}));
    assert!(err.contains("is in use by blockdev-snapshot-sync"), "{err}");
    assert!(before == (files(), std::fs::read(daemon.path("more.qcow2")).unwrap()));
    assert_eq!(std::fs::read(daemon.path("taken.raw")).unwrap(), b"precious");
    let blocks = qmp.ok("query-block", json!({}));
    assert_eq!(blocks[0]["inserted"]["node-name"], "d0");
    assert_eq!(blocks[0]["inserted"]["x-vublk-frozen-below"], Value::Null);
    let nodes = qmp.ok("query-named-block-nodes", json!({"flat": true}));
    assert_eq!(nodes.as_array().unwrap().len(), 4);
    guest.write(0, 0, &[2; 4096]).unwrap();
    assert_eq!(guest.read(0, 0, 512).unwrap(), [2; 512]);
    drop(guest);
    daemon.quit(&mut qmp);
}

/// Or whoever opens the overlay later would see another disk, or none.
#[test]
fn an_overlay_names_no_path_that_its_base_has_left() {
    let daemon = Daemon::start(TWO);
    let mut qmp = daemon.qmp();
    let (dir, path) = (daemon.dir.path(), |name: &str| daemon.path(name));
    std::fs::rename(path("disk.raw"), path("away")).unwrap();
    for is_replaced in [false, true] {
        if is_replaced {
            std::fs::write(path("disk.raw"), [9; 512]).unwrap();
        }
        for format in ["qcow2", "add-cow"] {
            common::ok(dir, &["create", "-q", "-f", format, "there", &DISK.to_string()]);
            let there = std::fs::read(path("there")).unwrap();
            for (file, mode) in
                [("new", "absolute-paths"), ("there", "absolute-paths"), ("there", "existing")]
            {
                let data = json!({"device": "e0", "snapshot-file": path(file), "format": format,
                                  "mode": mode});
                let err = qmp.fails("blockdev-snapshot-sync", data);
                assert!(err.contains("disk.raw: is not the file of node 'd0' any more"), "{err}");
            }
            assert!(!path("new").exists() && !path("new.raw").exists());
            assert_eq!(std::fs::read(path("there")).unwrap(), there, "{format}");
            std::fs::remove_file(path("there")).unwrap();
            let _ = std::fs::remove_file(path("there.raw"));
        }
    }
    std::fs::rename(path("away"), path("disk.raw")).unwrap();
    qmp.take_snapshots("e0", dir, &["new"]);
    daemon.quit(&mut qmp);
}

/// An image that names such a file could not be opened again.
#[test]
fn no_image_is_made_to_stand_on_a_file_with_control_characters_in_its_name() {
    let daemon = Daemon::start(TWO);
    let mut qmp = daemon.qmp();
    let (dir, strange) = (daemon.dir.path(), "a\nb");
    let size = DISK.to_string();
    qmp.take_snapshots("e0", dir, &["s0"]);
    let file = json!({"device": "e0", "snapshot-file": daemon.path(strange)});
    qmp.ok("blockdev-snapshot-sync", file);
    let refusal = "control characters are not allowed in names";
    for format in ["qcow2", "add-cow"] {
        let data = json!({"device": "e0", "snapshot-file": daemon.path("s1"), "format": format});
        let err = qmp.fails("blockdev-snapshot-sync", data);
        assert!(err.contains(refusal), "{format}: {err}");
        assert!(!daemon.path("s1").exists() && !daemon.path("s1.raw").exists(), "{format}");
        // Nor one that was made beforehand.
        let base = ["-u", "-b", "disk.raw", "-F", "raw"];
        let args = [&["create", "-q", "-f", format][..], &base, &["over", &size]].concat();
        common::ok(dir, &args);
        let existing = json!({"device": "e0", "snapshot-file": daemon.path("over"),
                              "format": format, "mode": "existing"});
        let err = qmp.fails("blockdev-snapshot-sync", existing);
        assert!(err.contains(refusal), "{format}: {err}");
        common::ok(dir, &["map", "-U", "-f", format, "over"]);
        std::fs::remove_file(daemon.path("over")).unwrap();
    }
    common::ok(dir, &["map", "-U", "-f", "qcow2", strange]);
    // Nor offline.
    for (args, name) in [
        (
            &["create", "-q", "-f", "qcow2", "-b", strange, "-F", "qcow2", "-u", "s1", "1M"][..],
            "s1",
        ),
        (&["rebase", "-q", "-u", "-b", strange, "-F", "qcow2", "more"], "more"),
    ] {
        common::ok(dir, &["create", "-q", "-f", "qcow2", "more", "1M"]);
        let err = common::fails(dir, args, 1);
        assert!(err.contains(name) && err.contains(refusal), "{err}");
    }
    daemon.quit(&mut qmp);
}

/// An add-cow layer is two files, and a chain that is served is one that can be opened again.
#[test]
fn a_chain_does_not_become_longer_than_one_that_opens() {
    let daemon = Daemon::start(TWO);
    let mut qmp = daemon.qmp();
    qmp.ok("block-export-del", json!({"id": "e0"}));
    qmp.ok("blockdev-del", json!({"node-name": "d0"}));
    qmp.ok("blockdev-del", json!({"node-name": "f0"}));
    let path = |number: usize| daemon.path(&format!("s{number}"));
    for number in 1..=253 {
        let (below, format) = match number {
            1 => (daemon.path("disk.raw"), ImageFormat::Raw),
            _ => (path(number - 1), ImageFormat::AddCow),
        };
        images::create(&CreateRequest {
            path: path(number),
            format: ImageFormat::AddCow,
            size: Some(DISK),
            options: Vec::new(),
            backing: Some(below.to_str().unwrap().into()),
            backing_format: Some(format),
            backing_unchecked: true,
            allow_dirs: Vec::new(),
        })
        .unwrap();
    }
    let file = |path: PathBuf| json!({"driver": "file", "filename": path});
    let top = json!({"driver": "add-cow", "node-name": "s253", "file": file(path(253))});
    qmp.ok("blockdev-add", top);
    let addr = json!({"type": "unix", "path": daemon.path("long.sock")});
    let export = json!({"type": "vhost-user-blk", "id": "long", "node-name": "s253",
                        "addr": addr, "writable": true});
    qmp.ok("block-export-add", export);

    let snapshot = |number: usize, format: &str| {
        json!({"device": "long", "snapshot-file": path(number),
               "snapshot-node-name": format!("s{number}"), "format": format})
    };
    qmp.ok("blockdev-snapshot-sync", snapshot(254, "add-cow"));
    qmp.ok("blockdev-snapshot-sync", snapshot(255, "add-cow"));
    let err = qmp.fails("blockdev-snapshot-sync", snapshot(256, "add-cow"));
    assert!(err.contains("513 files") && err.contains("more than 512"), "{err}");
    assert!(!path(256).exists() && !daemon.path("s256.raw").exists());
    std::fs::write(path(256), "here before").unwrap();
    let err = qmp.fails("blockdev-snapshot-sync", snapshot(256, "add-cow"));
    assert!(err.contains("513 files"), "{err}");
    assert_eq!(std::fs::read(path(256)).unwrap(), b"here before");
    std::fs::remove_file(path(256)).unwrap();
    // Nor in the middle, where whoever opens the top later would not find it.
    let middle = json!({"node-name": "s254", "snapshot-file": daemon.path("m"),
                        "snapshot-node-name": "m"});
    let busy = "Node 's254' is busy: node is used as backing hd of 's255'";
    let err = qmp.fails("blockdev-snapshot-sync", middle);
    assert!(err.starts_with(busy), "{err}");
    assert!(!daemon.path("m").exists());
    common::ok(daemon.dir.path(), &["create", "-q", "-f", "qcow2", "x", &DISK.to_string()]);
    let node = json!({"driver": "qcow2", "node-name": "x", "backing": null,
                      "file": file(daemon.path("x"))});
    qmp.ok("blockdev-add", node);
    let err = qmp.fails("blockdev-snapshot", json!({"node": "s254", "overlay": "x"}));
    assert!(err.starts_with(busy), "{err}");
    let exports = qmp.ok("query-block-exports", json!({}));
    assert_eq!(exports[1]["node-name"], "s255");
    qmp.ok("blockdev-snapshot-sync", snapshot(256, "qcow2"));
    let err = qmp.fails("blockdev-snapshot-sync", snapshot(257, "qcow2"));
    assert!(err.contains("commit some"), "{err}");
    qmp.ok("block-export-del", json!({"id": "long"}));
    common::ok(daemon.dir.path(), &["create", "-q", "-f", "qcow2", "over", &DISK.to_string()]);
    let over = json!({"driver": "qcow2", "node-name": "over", "backing": "s256",
                      "file": file(daemon.path("over"))});
    let err = qmp.fails("blockdev-add", over);
    assert!(err.contains("513 files"), "{err}");
    qmp.ok("blockdev-del", json!({"node-name": "s256"}));
    common::ok(daemon.dir.path(), &["map", "-f", "qcow2", "s256"]);
    daemon.quit(&mut qmp);
}

/// A file system of its own; gone when dropped.
struct Mounted<'a>(&'a Path);

impl<'a> Mounted<'a> {
    /// Mounts one on a new directory; `None`, visibly, where that is not allowed.
    fn new(path: &'a Path, args: &[&str]) -> Option<Mounted<'a>> {
        std::fs::create_dir(path).unwrap();
        let mut mount = Command::new("mount");
        mount.args(args).arg("none").arg(path).stderr(Stdio::null());
        if mount.status().is_ok_and(|status| status.success()) {
            return Some(Mounted(path));
        }
        common::skip("a file system of its own, which only root may mount");
        None
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0).status();
    }
}

/// One that cannot do what the disk does: that is known before the overlay is made.
#[test]
fn an_overlay_that_cannot_be_opened_as_its_base_keeps_its_content() {
    let daemon = Daemon::start(TWO);
    let odd = daemon.path("odd");
    let Some(_mounted) = Mounted::new(&odd, &["-t", "ramfs"]) else { return };
    let mut qmp = daemon.qmp();
    std::fs::write(daemon.path("direct.raw"), vec![0; DISK as usize]).unwrap();
    let cache = json!({"direct": true});
    let file = json!({"driver": "file", "filename": daemon.path("direct.raw")});
    let node = json!({"driver": "raw", "node-name": "direct", "cache": cache, "file": file});
    qmp.ok("blockdev-add", node);
    for format in ["add-cow", "qcow2"] {
        std::fs::write(odd.join("x"), "here before").unwrap();
        let overlay = json!({"node-name": "direct", "snapshot-file": odd.join("x"),
                             "snapshot-node-name": "over", "format": format});
        let err = qmp.fails("blockdev-snapshot-sync", overlay.clone());
        assert!(err.contains("O_DIRECT"), "{err}");
        assert_eq!(std::fs::read(odd.join("x")).unwrap(), b"here before", "{format}");
        std::fs::remove_file(odd.join("x")).unwrap();
        qmp.fails("blockdev-snapshot-sync", overlay);
        assert_eq!(std::fs::read_dir(&odd).unwrap().count(), 0, "{format}");
    }
    daemon.quit(&mut qmp);
}

/// What a guest was told of its blocks holds for as long as it is there.
#[test]
fn a_guest_is_not_put_on_a_node_that_its_requests_are_too_small_for() {
    let daemon = Daemon::start(&[TWO, &["--allow-dir", "/dev"]].concat());
    let backing = daemon.path("device.img");
    std::fs::write(&backing, vec![0; DISK as usize]).unwrap();
    let Some(device) = LoopDevice::with_blocks(&backing, 4096) else { return };
    let mut qmp = daemon.qmp();
    let direct = json!({"direct": true});
    let node = |driver: &str, name: &str, file: &str, backing: Value| {
        let file = json!({"driver": "file", "filename": daemon.path(file)});
        json!({"driver": driver, "node-name": name, "file": file, "backing": backing,
               "cache": direct})
    };
    let has_direct = HostFile::open(&backing, OpenOptions { direct: true, ..Default::default() });
    if has_direct.map_or(4096, |file| file.alignment().request) > 512 {
        common::skip("a file system with direct I/O in units of 512 bytes");
        return;
    }
    // The base of a commit.
    let file = json!({"driver": "host_device", "filename": device.name()});
    let base = json!({"driver": "raw", "node-name": "base", "file": file, "cache": direct});
    common::ok(daemon.dir.path(), &["create", "-q", "-f", "qcow2", "top", &DISK.to_string()]);
    qmp.ok("blockdev-add", base);
    qmp.ok("blockdev-add", node("qcow2", "top", "top", json!("base")));
    let export = |id: &str, node: &str| {
        let addr = json!({"type": "unix", "path": daemon.path(&format!("{id}.sock"))});
        json!({"type": "vhost-user-blk", "id": id, "node-name": node, "addr": addr, "writable": true})
    };
    qmp.ok("block-export-add", export("small", "top"));
    let refused = "export 'small' has blocks of 512 bytes, and node 'base' takes requests in units \
                   of 4096 bytes";
    let commit = json!({"device": "small", "job-id": "j"});
    let err = qmp.fails("block-commit", commit);
    assert!(err.contains(refused), "{err}");
    assert_eq!(qmp.ok("query-jobs", json!({})), json!([]));
    // What comes to lie below an overlay may take larger units: the overlay reads whole ones.
    let add_cow = ["create", "-q", "-f", "add-cow", "over", &DISK.to_string()];
    common::ok(daemon.dir.path(), &add_cow);
    qmp.ok("blockdev-add", node("add-cow", "over", "over", Value::Null));
    let mut guest = daemon.guest("small.sock");
    guest.write(0, 512, &[2; 512]).unwrap();
    qmp.ok("blockdev-snapshot", json!({"node": "top", "overlay": "over"}));
    qmp.ok("block-commit", json!({"device": "small", "job-id": "j", "top-node": "top"}));
    let ended = qmp.event("BLOCK_JOB_COMPLETED");
    assert_eq!(ended["error"], Value::Null, "{ended}");
    guest.write(0, 0, &[1; 512]).unwrap();
    let both = [[1; 512], [2; 512]].concat();
    assert_eq!(guest.read(0, 0, 1024).unwrap(), both);
    assert_eq!(guest.read(0, 512, 512).unwrap(), [2; 512]);
    drop(guest);
    // An overlay.
    let image = format!("image-file={}", device.name());
    qmp.ok("block-export-del", json!({"id": "small", "mode": "hard"}));
    for name in ["over", "top", "base"] {
        qmp.ok("blockdev-del", json!({"node-name": name}));
    }
    common::ok(daemon.dir.path(), &["create", "-q", "-f", "add-cow", "-o", &image, "large"]);
    qmp.ok("blockdev-add", node("add-cow", "large", "large", Value::Null));
    let err = qmp.fails("blockdev-snapshot", json!({"node": "d0", "overlay": "large"}));
    assert!(err.contains("export 'e0' has blocks of 512 bytes"), "{err}");
    let mut guest = daemon.guest("e0.sock");
    guest.write(0, 0, &[1; 512]).unwrap();
    drop(guest);
    daemon.quit(&mut qmp);
}

/// A file system without room for an overlay: the disk goes on as it is.
#[test]
fn a_snapshot_without_space_is_none() {
    let daemon = Daemon::start(TWO);
    let full = daemon.path("full");
    let Some(_mounted) = Mounted::new(&full, &["-t", "tmpfs", "-o", "size=64k"]) else { return };
    let rest = std::fs::write(full.join("filler"), vec![0; 1 << 20]);
    assert!(rest.is_err(), "it has 64 KiB");
    let mut qmp = daemon.qmp();
    let mut guest = daemon.guest("e0.sock");
    guest.write(0, 0, &[1; 4096]).unwrap();
    for format in ["add-cow", "qcow2"] {
        let overlay = json!({"device": "e0", "snapshot-file": full.join("x"), "format": format});
        let err = qmp.fails("blockdev-snapshot-sync", overlay);
        assert!(err.contains("No space left on device") && err.contains("/full/x"), "{err}");
        let left: Vec<_> = std::fs::read_dir(&full).unwrap().collect();
        assert_eq!(left.len(), 1, "{format}: {left:?}");
        guest.write(0, 0, &[2; 4096]).unwrap();
    }
    let blocks = qmp.ok("query-block", json!({}));
    assert_eq!(blocks[0]["inserted"]["node-name"], "d0");
    assert_eq!(blocks[0]["inserted"]["x-vublk-frozen-below"], Value::Null);
    drop(guest);
    daemon.quit(&mut qmp);
}

#[test]
fn a_transaction_is_all_or_nothing() {
    let daemon = Daemon::start(TWO);
    let mut qmp = daemon.qmp();
    let mut guests = [daemon.guest("e0.sock"), daemon.guest("e1.sock")];
    for guest in &mut guests {
        guest.write(0, 0, &[1; 4096]).unwrap();
    }
    let snapshot = |device: &str, file: &str| {
        json!({"type": "blockdev-snapshot-sync", "data":
               {"device": device, "snapshot-file": format!("file:{}", daemon.path(file).display()),
                "snapshot-node-name": file}})
    };
    let both =
        |name: &str| vec![snapshot("e0", &format!("{name}0")), snapshot("e1", &format!("{name}1"))];

    let mut actions = both("a");
    actions.push(json!({"type": "abort", "data": {}}));
    qmp.fails("transaction", json!({"actions": actions}));
    // A file that cannot be made, after one that could.
    let mut actions = both("b");
    actions[1]["data"]["snapshot-file"] = "no/such/directory".into();
    qmp.fails("transaction", json!({"actions": actions}));
    // A file that was there is as it was, whatever is wrong with an action after it.
    std::fs::write(daemon.path("there"), "precious").unwrap();
    let wrong = [
        ("aborted", json!({"type": "abort", "data": {}})),
        ("no such directory", snapshot("e1", "no/such/there1")),
        ("no such device", snapshot("e9", "there1")),
        ("the same disk", snapshot("e0", "there1")),
        ("the same file", snapshot("e1", "there")),
        ("a file in use", snapshot("e1", "disk.raw")),
    ];
    for format in ["qcow2", "add-cow"] {
        for (what, action) in &wrong {
            let mut first = snapshot("e0", "there");
            first["data"]["format"] = format.into();
            let actions = json!([first, action]);
            qmp.fails("transaction", json!({"actions": actions}));
            assert_eq!(std::fs::read(daemon.path("there")).unwrap(), b"precious", "{what}");
            assert!(!daemon.path("there.raw").exists() && !daemon.path("there1").exists());
        }
    }
    // A node name twice.
    let mut actions = both("there");
    actions[1]["data"]["snapshot-node-name"] = "there0".into();
    std::fs::write(daemon.path("there0"), "precious").unwrap();
    let err = qmp.fails("transaction", json!({"actions": actions}));
    assert_eq!(err, "New overlay node-name already in use");
    assert_eq!(std::fs::read(daemon.path("there0")).unwrap(), b"precious");
    std::fs::remove_file(daemon.path("there0")).unwrap();
    for file in ["a0", "a1", "b0", "b1", "there1"] {
        assert!(!daemon.path(file).exists(), "{file} is left");
    }
    let blocks = qmp.ok("query-block", json!({}));
    assert_eq!(
        (&blocks[0]["inserted"]["node-name"], &blocks[1]["inserted"]["node-name"]),
        (&json!("d0"), &json!("d1"))
    );
    assert_eq!(blocks[0]["inserted"]["x-vublk-frozen-below"], Value::Null);
    guests[0].write(0, 0, &[1; 4096]).unwrap();

    // An overlay on one that the same transaction makes.
    let on_top = json!({"type": "blockdev-snapshot-sync", "data":
        {"node-name": "c0", "snapshot-file": daemon.path("top"), "snapshot-node-name": "top"}});
    let mut actions = both("c");
    actions.push(on_top);
    let err = qmp.fails("transaction", json!({"actions": actions}));
    assert_eq!(err, "Node 'c0' is busy: block device is in use by blockdev-snapshot-sync");
    assert!(!daemon.path("c0").exists() && !daemon.path("top").exists());

    qmp.ok("transaction", json!({"actions": both("c")}));
    let blocks = qmp.ok("query-block", json!({}));
    assert_eq!(blocks[0]["inserted"]["node-name"], "c0");
    assert_eq!(blocks[0]["inserted"]["backing_file_depth"], 1);
    assert_eq!(blocks[1]["inserted"]["image"]["backing-image"]["format"], "qcow2");
    assert_eq!(qmp.ok("x-vublk-query-pauses", json!({}))["count"], 1);
    for guest in &mut guests {
        assert_eq!(guest.read(0, 0, 512).unwrap(), [1; 512]);
        guest.write(0, 0, &[2; 4096]).unwrap();
        guest.flush(0).unwrap();
    }
    assert_eq!(std::fs::read(daemon.path("disk.raw")).unwrap()[..4096], [1; 4096]);
    let in_use = qmp.fails("blockdev-del", json!({"node-name": "d0"}));
    assert_eq!(in_use, "Node d0 is in use: node 'c0' (backing)");
    drop(guests);
    daemon.quit(&mut qmp);
}

#[test]
fn a_disk_that_grows_is_told_to_its_guest() {
    let daemon = Daemon::start(TWO);
    let mut qmp = daemon.qmp();
    for (export, socket) in [("e0", "e0.sock"), ("e1", "e1.sock")] {
        let mut guest = daemon.guest(socket);
        guest.write(0, DISK, &[1; 512]).unwrap_err();
        qmp.ok("block_resize", json!({"device": export, "size": 2 * DISK}));
        guest.client.wait_config_change(common::soon()).unwrap();
        let config = guest.client.get_config(0, 8).unwrap();
        assert_eq!(u64::from_le_bytes(config.try_into().unwrap()) * 512, 2 * DISK);
        guest.write(0, DISK, &[1; 512]).unwrap();
        assert_eq!(guest.read(0, 2 * DISK - 512, 512).unwrap(), [0; 512]);
    }
    let err = qmp.fails("block_resize", json!({"device": "e0", "size": DISK}));
    assert!(err.contains("x-vublk-shrink"), "{err}");
    let err = qmp.fails("block_resize", json!({"device": "e0", "size": 3 * DISK + 1}));
    assert!(err.contains("whole blocks"), "{err}");
    qmp.ok("block_resize", json!({"device": "e0", "size": DISK, "x-vublk-shrink": true}));
    assert_eq!(std::fs::metadata(daemon.path("disk.raw")).unwrap().len(), DISK);
    // A snapshot on top: the overlay has the size now, and nothing of the base shows beyond.
    let mut guest = daemon.guest("e0.sock");
    guest.write(0, DISK - 512, &[3; 512]).unwrap();
    let overlay = daemon.path("over");
    let overlay = json!({"device": "e0", "snapshot-file": overlay, "format": "add-cow"});
    qmp.ok("blockdev-snapshot-sync", overlay);
    let shrink = |size: u64| json!({"device": "e0", "size": size, "x-vublk-shrink": true});
    for size in [DISK / 2, 2 * DISK] {
        qmp.ok("block_resize", shrink(size));
        guest.client.wait_config_change(common::soon()).unwrap();
        let config = guest.client.get_config(0, 8).unwrap();
        assert_eq!(u64::from_le_bytes(config.try_into().unwrap()) * 512, size);
        guest.write(0, size, &[1; 512]).unwrap_err();
        guest.write(0, size - 512, &[1; 512]).unwrap();
    }
    assert_eq!(guest.read(0, DISK - 512, 512).unwrap(), [0; 512]);
    assert_eq!(std::fs::metadata(daemon.path("disk.raw")).unwrap().len(), DISK);
    drop(guest);
    // Nobody needs to be connected.
    qmp.ok("block_resize", shrink(4 * DISK));
    daemon.quit(&mut qmp);
}

#[test]
fn an_overlay_that_is_there_takes_the_place_of_its_base() {
    let daemon = Daemon::start(TWO);
    let mut qmp = daemon.qmp();
    let mut guest = daemon.guest("e0.sock");
    // In two clusters of the overlay, one of which will be copied up.
    const LOW: u64 = 128 << 10;
    guest.write(0, 0, &[1; 4096]).unwrap();
    guest.write(0, LOW, &[1; 4096]).unwrap();
    let overlay = daemon.path("over.qcow2");
    let create = ["create", "-q", "-f", "qcow2", "over.qcow2", &DISK.to_string()];
    common::ok(daemon.dir.path(), &create);
    let add = json!({"driver": "qcow2", "node-name": "over", "backing": null,
                     "file": {"driver": "file", "filename": overlay}});
    qmp.ok("blockdev-add", add);
    qmp.ok("blockdev-snapshot", json!({"node": "d0", "overlay": "over"}));
    assert_eq!(guest.read(0, 0, 512).unwrap(), [1; 512]);
    guest.write(0, 0, &[2; 512]).unwrap();
    assert_eq!(guest.read(0, 512, 512).unwrap(), [1; 512]);
    assert_eq!(guest.read(0, LOW, 512).unwrap(), [1; 512]);
    let frozen = qmp.ok("query-named-block-nodes", json!({"flat": true}));
    let d0 = frozen.as_array().unwrap().iter().find(|row| row["node-name"] == "d0").unwrap();
    assert_eq!(d0["ro"], true);

    // Written again, and no longer: what a commit does.
    let base = |read_only: bool| {
        json!({"options": [{"driver": "raw", "node-name": "d0", "file": "f0",
                            "discard": "unmap", "read-only": read_only}]})
    };
    qmp.ok("blockdev-reopen", base(false));
    qmp.ok("blockdev-reopen", base(true));
    let mut other = base(true);
    other["options"][0]["discard"] = "ignore".into();
    assert_eq!(qmp.fails("blockdev-reopen", other), "Cannot change the option 'discard'");
    let over = |backing: Value| {
        let nodes = qmp_children(&frozen, "over");
        json!({"options": [{"driver": "qcow2", "node-name": "over", "file": nodes,
                            "backing": backing}]})
    };
    let err = qmp.fails("blockdev-reopen", over("over".into()));
    assert_eq!(err, "Making 'over' a backing child of 'over' would create a cycle");
    qmp.ok("blockdev-reopen", over(Value::Null));
    assert_eq!(guest.read(0, LOW, 512).unwrap(), [0; 512], "without its base");
    qmp.ok("blockdev-reopen", over("d0".into()));
    assert_eq!(guest.read(0, LOW, 512).unwrap(), [1; 512]);
    drop(guest);
    daemon.quit(&mut qmp);
}

/// What one node keeps in another, or reads from it, is not changed behind its back.
#[test]
fn what_other_nodes_stand_on_is_neither_resized_nor_written() {
    let daemon = Daemon::start(TWO);
    let mut qmp = daemon.qmp();
    let path = |name: &str| daemon.path(name).display().to_string();
    let file = |name: &str, node: &str| json!({"driver": "file", "node-name": node, "filename": path(name)});
    std::fs::File::create(path("b.raw")).unwrap().set_len(DISK).unwrap();
    common::ok(daemon.dir.path(), &["create", "-q", "-f", "qcow2", "o", &DISK.to_string()]);
    qmp.ok("blockdev-add", file("b.raw", "fb"));
    qmp.ok("blockdev-add", json!({"driver": "raw", "node-name": "b", "file": "fb"}));
    qmp.ok("blockdev-add", file("o", "fo"));
    let over = json!({"driver": "qcow2", "node-name": "o", "file": "fo", "backing": "b"});
    qmp.ok("blockdev-add", over);

    let resize = |node: &str| json!({"node-name": node, "size": 512, "x-vublk-shrink": true});
    let conflict = "permissions 'resize' are both required by block_resize and unshared by node";
    let err = qmp.fails("block_resize", resize("fo"));
    assert!(err.starts_with("Permission conflict on node 'fo'") && err.contains(conflict), "{err}");
    let err = qmp.fails("block_resize", resize("b"));
    assert!(err.starts_with("Node 'b' is busy: node is used as backing hd of 'o'"), "{err}");
    let export = |node: &str, writable: bool| {
        json!({"type": "vhost-user-blk", "id": "x", "node-name": node, "writable": writable,
               "addr": {"type": "unix", "path": path("x.sock")}})
    };
    let err = qmp.fails("block-export-add", export("fb", true));
    assert!(err.contains("permissions 'write'") && err.contains("(uses node 'fb'"), "{err}");
    let err = qmp.fails("block-export-add", export("b", true));
    assert!(err.contains("node is used as backing hd of 'o'"), "{err}");
    qmp.ok("block-export-add", export("b", false));
    qmp.ok("block-export-del", json!({"id": "x"}));
    // The other way round: what is written gets no overlay but by a snapshot.
    common::ok(daemon.dir.path(), &["create", "-q", "-f", "qcow2", "p", &DISK.to_string()]);
    let late = json!({"driver": "qcow2", "node-name": "p", "file": file("p", "fp"),
                      "backing": "d0"});
    let err = qmp.fails("blockdev-add", late);
    assert!(err.contains("while it is written: export 'e0'"), "{err}");

    // A guest that writes by way of a file keeps that writable, and a backing is not forgotten.
    qmp.ok("block-export-add", export("o", true));
    let mut guest = daemon.guest("x.sock");
    let reopen = |options: Value| json!({"options": [options]});
    let mut read_only = file("o", "fo");
    read_only["read-only"] = true.into();
    let err = qmp.fails("blockdev-reopen", reopen(read_only.clone()));
    assert!(err.starts_with("Read-only block node 'fo' cannot support read-write users"), "{err}");
    guest.write(0, 0, &[1; 512]).unwrap();
    let without = json!({"driver": "qcow2", "node-name": "o", "file": "fo"});
    assert_eq!(qmp.fails("blockdev-reopen", reopen(without)), "backing is missing for 'o'");
    drop(guest);
    qmp.ok("block-export-del", json!({"id": "x", "mode": "hard"}));
    // Neither does a format that nobody uses.
    let err = qmp.fails("blockdev-reopen", json!({"options": [read_only.clone()]}));
    assert_eq!(
        err,
        "Read-only block node 'fo' cannot support read-write users: node 'o' (file); reopen that \
         read-only first"
    );
    let over = json!({"driver": "qcow2", "node-name": "o", "file": "fo", "backing": "b",
                      "read-only": true});
    qmp.ok("blockdev-reopen", json!({"options": [over, read_only]}));
    // With nobody on it, and no mark, it is the operator's.
    qmp.ok("blockdev-del", json!({"node-name": "o"}));
    qmp.ok("block_resize", resize("b"));
    daemon.quit(&mut qmp);
}

/// The name of the file node below a node.
fn qmp_children(nodes: &Value, name: &str) -> String {
    let node = nodes.as_array().unwrap().iter().find(|row| row["node-name"] == name).unwrap();
    node["children"][0]["node-name"].as_str().unwrap().to_string()
}

/// A disk that a snapshot has frozen is not served again by an old command line.
#[test]
fn what_is_frozen_is_not_served_for_writing() {
    let daemon = Daemon::start(TWO);
    let mut qmp = daemon.qmp();
    let overlay = daemon.path("s.qcow2");
    qmp.ok("blockdev-snapshot-sync", json!({"device": "e0", "snapshot-file": overlay}));
    qmp.ok("quit", json!({}));
    let Daemon { dir, child } = &daemon;
    let _ = child;
    wait_until("the end", || !dir.path().join("e0.sock").exists());
    let single = |args: &[&str]| {
        let output = command(dir.path(), args).output().unwrap();
        // Another start would end in the same way.
        assert_eq!(output.status.code(), Some(78));
        String::from_utf8(output.stderr).unwrap()
    };
    let err = single(&["--socket-path", "x.sock", "-f", "raw", "disk.raw"]);
    assert!(
        err.contains("the disk goes on in") && err.contains(overlay.to_str().unwrap()),
        "{err}"
    );
    let err = single(TWO);
    assert!(err.contains("--export") && err.contains("the disk goes on in"), "{err}");
    // Nor is it resized.
    let own = tempfile::tempdir().unwrap();
    let log = std::fs::File::create(own.path().join("log")).unwrap();
    let unused = [&TWO[..4], &TWO[10..]].concat();
    let child = command(dir.path(), &unused).stderr(log).spawn().unwrap();
    let mut resizing = Daemon { dir: own, child };
    let mut qmp = Qmp::connect(&dir.path().join("qmp.sock"));
    let err = qmp.fails("block_resize", json!({"node-name": "d0", "size": 2 * DISK}));
    assert!(err.contains("the disk goes on in"), "{err}");
    qmp.ok("quit", json!({}));
    assert!(resizing.child.wait().unwrap().success());
    // Without its overlay it is the disk again.
    std::fs::remove_file(&overlay).unwrap();
    let again = Daemon {
        dir: tempfile::tempdir().unwrap(),
        child: command(dir.path(), TWO).stderr(Stdio::null()).spawn().unwrap(),
    };
    let mut qmp = Qmp::connect(&dir.path().join("qmp.sock"));
    qmp.ok("quit", json!({}));
    drop(again);
}

/// An image that another disk goes on above of does not become an overlay, and a snapshot that is
/// undone leaves the marks of its overlay as they were.
#[test]
fn marks_of_an_overlay_are_respected() {
    let daemon = Daemon::start(TWO);
    let mut qmp = daemon.qmp();
    let path = |name: &str| daemon.path(name);
    for name in ["b", "c"] {
        let create = ["create", "-q", "-f", "qcow2", name, &DISK.to_string()];
        common::ok(daemon.dir.path(), &create);
    }
    let options = OpenOptions { write: true, ..OpenOptions::default() };
    let b = HostFile::open(&path("b"), options).unwrap();
    frozen::mark(&b, &path("c"));
    let content = std::fs::read(path("b")).unwrap();
    qmp.ok(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "b", "backing": null,
               "file": {"driver": "file", "filename": path("b")}}),
    );
    let snapshot = json!({"node": "d0", "overlay": "b"});
    let undone = json!({"actions": [{"type": "blockdev-snapshot", "data": snapshot},
                                    {"type": "abort", "data": {}}]});
    let onto_file = json!({"device": "e0", "snapshot-file": path("b")});
    for (command, arguments) in [
        ("blockdev-snapshot", snapshot.clone()),
        ("transaction", undone.clone()),
        ("blockdev-snapshot-sync", onto_file),
    ] {
        let err = qmp.fails(command, arguments);
        assert!(err.contains("the disk goes on in"), "{command}: {err}");
        assert_eq!(frozen::overlay_of(&b), Some(path("c")), "{command}");
    }
    assert_eq!(std::fs::read(path("b")).unwrap(), content);
    // One that its disk has left may be used again.
    frozen::clear(&b);
    frozen::mark_moved(&b, &path("c"));
    let err = qmp.fails("transaction", undone);
    assert!(err.contains("abort") || err.contains("Abort"), "{err}");
    assert_eq!(frozen::moved_to(&b), Some(path("c")));
    qmp.ok("blockdev-snapshot", snapshot);
    assert_eq!(frozen::moved_to(&b), None);
    daemon.quit(&mut qmp);
}

/// After a stream or a commit, marks tell what the disk stands on now, and nothing of what it stands on no more:
/// who gives that up must not be sent to the disk.
#[test]
fn marks_follow_a_job() {
    let daemon = Daemon::start(TWO);
    let mut qmp = daemon.qmp();
    let path = |name: &str| daemon.path(name);
    qmp.take_snapshots("e0", daemon.dir.path(), &["s1", "s2", "s3", "s4"]);
    let mark = |name: &str| {
        frozen::overlay_of(&HostFile::open(&path(name), OpenOptions::default()).unwrap())
    };
    qmp.ok("block-stream", json!({"device": "e0", "base-node": "s1"}));
    qmp.wait_for_jobs();
    // What stands on s2 needs it.
    let expected = [("disk.raw", Some("s1")), ("s1", Some("s4")), ("s2", Some("s3")), ("s3", None)];
    for (image, overlay) in expected {
        assert_eq!(mark(image), overlay.map(path), "{image}");
    }
    qmp.ok("block-stream", json!({"device": "e0"}));
    qmp.wait_for_jobs();
    // And what is left needs what it stands on.
    assert_eq!((mark("s1"), mark("disk.raw")), (Some(path("s2")), Some(path("s1"))));

    qmp.take_snapshots("e1", daemon.dir.path(), &["t1", "t2"]);
    qmp.ok("block-commit", json!({"device": "e1", "top-node": "t1"}));
    qmp.wait_for_jobs();
    assert_eq!((mark("t1"), mark("more.qcow2")), (None, Some(path("t2"))));
    daemon.quit(&mut qmp);
}

/// An overlay that was made beforehand with another backing file, or with none, would be another disk when it is
/// opened the next time.
#[test]
fn an_overlay_that_was_made_beforehand_names_what_it_is_put_on() {
    for (format, named) in
        [("qcow2", Some("other")), ("qcow2", None), ("add-cow", Some("other")), ("add-cow", None)]
    {
        let daemon = Daemon::start(TWO);
        let mut qmp = daemon.qmp();
        let (dir, path) = (daemon.dir.path(), |name: &str| daemon.path(name));
        let mut guest = daemon.guest("e0.sock");
        guest.write(0, 0, &[7; 4096]).unwrap();
        guest.flush(0).unwrap();
        common::ok(dir, &["create", "-q", "other", &DISK.to_string()]);
        let backing = named.map_or(vec![], |name| vec!["-u", "-b", name, "-F", "raw"]);
        let create = ["create", "-q", "-f", format];
        common::ok(dir, &[&create[..], &backing, &["over", &DISK.to_string()]].concat());
        let names = || {
            let info = common::ok(dir, &["info", "-U", "-f", format, "--output=json", "over"]);
            let info: Value = serde_json::from_str(&info).unwrap();
            info["full-backing-filename"].as_str().map(String::from)
        };
        let before = names();
        let snapshot = json!({"device": "e0", "snapshot-file": path("over"), "format": format,
                              "mode": "existing"});
        let undone = json!({"actions": [{"type": "blockdev-snapshot-sync", "data": snapshot},
                                        {"type": "abort", "data": {}}]});
        qmp.fails("transaction", undone);
        assert_eq!(names(), before, "{format} on {named:?}");
        qmp.ok("blockdev-snapshot-sync", snapshot);
        assert_eq!(guest.read(0, 0, 4096).unwrap(), [7; 4096]);
        assert_eq!(names().as_deref(), path("disk.raw").to_str(), "{format} on {named:?}");
        common::ok(dir, &["convert", "-U", "-f", format, "over", "copy"]);
        let copy = std::fs::read(path("copy")).unwrap();
        assert_eq!(copy[..4096], [7; 4096], "{format} on {named:?}");
        drop(guest);
        daemon.quit(&mut qmp);
    }
}

/// What was written after a commit would be hidden by what was there before.
#[test]
fn an_overlay_that_its_disk_has_left_is_not_put_on_it_again_with_what_it_holds() {
    for format in ["qcow2", "add-cow"] {
        let daemon = Daemon::start(TWO);
        let mut qmp = daemon.qmp();
        let path = |name: &str| daemon.path(name);
        let mut guest = daemon.guest("e0.sock");
        let snapshot = json!({"device": "e0", "snapshot-file": path("over"), "format": format});
        qmp.ok("blockdev-snapshot-sync", snapshot.clone());
        guest.write(0, 8192, &[1; 4096]).unwrap();
        qmp.ok("block-commit", json!({"device": "e0"}));
        qmp.complete_job();
        guest.write(0, 8192, &[2; 4096]).unwrap();
        let mut again = snapshot;
        again["mode"] = "existing".into();
        let err = qmp.fails("blockdev-snapshot-sync", again.clone());
        assert!(err.contains("over") && err.contains("the guest would see this again"), "{err}");
        assert_eq!(guest.read(0, 8192, 4096).unwrap(), [2; 4096]);
        // The way out.
        let size = DISK.to_string();
        std::fs::remove_file(path("over")).unwrap();
        let _ = std::fs::remove_file(path("over.raw"));
        let create = ["create", "-q", "-f", format, "-u", "-b", "disk.raw", "-F", "raw"];
        common::ok(daemon.dir.path(), &[&create[..], &["over", &size]].concat());
        qmp.ok("blockdev-snapshot-sync", again);
        assert_eq!(guest.read(0, 8192, 4096).unwrap(), [2; 4096]);
        drop(guest);
        daemon.quit(&mut qmp);
    }
}

/// `backing-file` is only another way to say where the base is.
#[test]
fn a_job_makes_no_image_name_another_than_its_base() {
    let daemon = Daemon::start(TWO);
    let mut qmp = daemon.qmp();
    qmp.take_snapshots("e0", daemon.dir.path(), &["s1", "s2", "s3"]);
    for other in ["more.qcow2", "s1", "s3"] {
        let stream = json!({"device": "e0", "base-node": "d0", "backing-file": other});
        let err = qmp.fails("block-stream", stream);
        assert!(err.contains(other) && err.contains("would see another disk"), "{err}");
    }
    let commit = json!({"device": "e0", "top-node": "s2", "base-node": "d0", "backing-file": "s2"});
    let err = qmp.fails("block-commit", commit);
    assert!(err.contains("would see another disk"), "{err}");
    assert_eq!(qmp.ok("query-jobs", json!({})), json!([]));
    // Relative to the image.
    let stream = json!({"device": "e0", "base-node": "d0", "backing-file": "disk.raw"});
    qmp.ok("block-stream", stream);
    qmp.wait_for_jobs();
    let info = common::ok(daemon.dir.path(), &["info", "-U", "s3"]);
    assert!(info.contains("backing file: disk.raw"), "{info}");
    daemon.quit(&mut qmp);
}

/// What another disk needs is not changed by a commit of this one; what a stream has left behind, and has been
/// told, is not in the way.
#[test]
fn a_base_that_another_disk_needs_is_not_committed_to() {
    let daemon = Daemon::start(TWO);
    let mut qmp = daemon.qmp();
    let path = |name: &str| daemon.path(name);
    qmp.take_snapshots("e0", daemon.dir.path(), &["s1", "s2", "s3"]);
    qmp.ok("block-stream", json!({"device": "e0", "base-node": "d0"}));
    qmp.wait_for_jobs();
    let base = HostFile::open(&path("disk.raw"), OpenOptions::default()).unwrap();
    assert!(frozen::is_frozen_below(&base, &path("s1")));
    std::fs::write(path("other"), "x").unwrap();
    frozen::mark(&base, &path("other"));
    let err = qmp.fails("block-commit", json!({"device": "e0"}));
    let goes_on = format!("the disk goes on in {}", path("other").display());
    assert!(err.contains("disk.raw") && err.contains(&goes_on), "{err}");
    assert_eq!(qmp.ok("query-jobs", json!({})), json!([]));
    std::fs::remove_file(path("other")).unwrap();
    qmp.ok("block-commit", json!({"device": "e0"}));
    qmp.complete_job();
    assert_eq!(frozen::overlay_of(&base), None);
    daemon.quit(&mut qmp);
}

/// A base that a commit changes shows other things to whatever else stands on it.
#[test]
fn what_stands_on_the_base_of_a_commit_is_not_served() {
    let daemon = Daemon::start(TWO);
    let mut qmp = daemon.qmp();
    let path = |name: &str| daemon.path(name);
    qmp.take_snapshots("e0", daemon.dir.path(), &["top", "over"]);
    common::ok(daemon.dir.path(), &["create", "-q", "-f", "qcow2", "n", &DISK.to_string()]);
    qmp.ok(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "n", "backing": "d0",
               "file": {"driver": "file", "filename": path("n")}}),
    );
    let commit = json!({"job-id": "j", "device": "over", "base-node": "d0"});
    qmp.ok("block-commit", commit);
    let export = |node: &str, writable: bool| {
        json!({"type": "vhost-user-blk", "id": "x", "node-name": node, "writable": writable,
               "addr": {"type": "unix", "path": path("x.sock")}})
    };
    let busy = "Node 'd0' is busy: block device is in use by block job: commit";
    assert_eq!(qmp.fails("block-export-add", export("n", true)), busy);
    assert_eq!(qmp.fails("block-export-add", export("n", false)), busy);
    assert_eq!(qmp.fails("block-export-add", export("d0", false)), busy);
    // The top shows what it showed.
    qmp.ok("block-export-add", export("over", false));
    qmp.ok("block-export-del", json!({"id": "x"}));
    qmp.ok("job-cancel", json!({"id": "j"}));
    qmp.wait_for_jobs();
    qmp.ok("block-export-add", export("n", true));
    daemon.quit(&mut qmp);
}

/// What is described in place goes with its parent, whatever it is called, and does not stay behind
/// where that cannot be made.
#[test]
fn children_that_are_described_in_place_go_with_their_parent() {
    let daemon = Daemon::start(TWO);
    let mut qmp = daemon.qmp();
    std::fs::File::create(daemon.path("a.raw")).unwrap().set_len(DISK).unwrap();
    let node = |driver: &str, name: &str, file: &str| {
        json!({"driver": driver, "node-name": name,
               "file": {"driver": "file", "node-name": format!("{name}f"),
                        "filename": daemon.path(file)}})
    };
    let before = names(&qmp.ok("query-named-block-nodes", json!({})));
    let err = qmp.fails("blockdev-add", node("qcow2", "x", "a.raw"));
    assert_eq!(qmp.fails("blockdev-add", node("qcow2", "x", "a.raw")), err);
    qmp.ok("blockdev-add", node("raw", "y", "a.raw"));
    let err = qmp.fails("blockdev-del", json!({"node-name": "yf"}));
    assert_eq!(err, "Node yf is in use: node 'y' (file)");
    qmp.ok("blockdev-del", json!({"node-name": "y"}));
    assert_eq!(names(&qmp.ok("query-named-block-nodes", json!({}))), before);
    daemon.quit(&mut qmp);
}

/// Nodes that are reopened with one command change together, or not at all.
#[test]
fn reopening_is_all_or_nothing() {
    let daemon = Daemon::start(TWO);
    let mut qmp = daemon.qmp();
    let mut guest = daemon.guest("e0.sock");
    guest.write(0, 0, &[1; 512]).unwrap();
    qmp.take_snapshots("e0", daemon.dir.path(), &["top"]);
    std::fs::File::create(daemon.path("a.raw")).unwrap().set_len(DISK).unwrap();
    let fault = json!({"driver": "fault", "node-name": "bad", "file":
                       {"driver": "raw", "node-name": "a", "file":
                        {"driver": "file", "node-name": "fa", "filename": daemon.path("a.raw")}}});
    qmp.ok("blockdev-add", fault);
    let nodes = qmp.ok("query-named-block-nodes", json!({"flat": true}));
    let top_file = qmp_children(&nodes, "top");
    let options = json!([
        {"driver": "raw", "node-name": "d0", "file": "f0", "discard": "unmap", "read-only": false},
        {"driver": "qcow2", "node-name": "top", "file": top_file, "backing": null,
         "discard": "unmap"},
        {"driver": "fault", "node-name": "bad", "file": "a", "inject-error": [{"iotype": "read"}]},
        {"driver": "raw", "node-name": "a", "file": "nope"},
    ]);
    let err = qmp.fails("blockdev-reopen", json!({"options": options}));
    assert_eq!(err, "Cannot change the option 'file'");
    assert!(qmp.ok("query-named-block-nodes", json!({"flat": true})) == nodes, "they have changed");
    assert_eq!(guest.read(0, 0, 512).unwrap(), [1; 512]);
    qmp.ok("blockdev-reopen", json!({"options": options.as_array().unwrap()[..2]}));
    assert_eq!(guest.read(0, 0, 512).unwrap(), [0; 512]);
    drop(guest);
    daemon.quit(&mut qmp);
}

#[test]
fn misuse_of_the_command_line_is_told() {
    let dir = prepare();
    for (args, expected) in [
        (&["--blockdev", "driver=nbd,node-name=x"][..], "does not accept value 'nbd'"),
        (&["--blockdev", "file,node-name=x"], "Parameter 'filename' is missing"),
        (&["--blockdev", "file,node-name=x,filename"], "Expected '=' after parameter 'filename'"),
        (
            &["--blockdev", "file,node-name=x,filename=disk.raw,read-only=maybe"],
            "Parameter 'read-only' expects 'on' or 'off'",
        ),
        (
            &["--export", "vhost-user-blk,id=e,node-name=x,addr.type=unix,addr.path=x.sock"],
            "Cannot find device='' nor node-name='x'",
        ),
        (&["--export", "nbd,id=e,node-name=x"], "Parameter 'type' does not accept value 'nbd'"),
        (&["--monitor", "chardev=c"], "chardev \"c\" not found"),
        (&["--chardev", "socket,id=c,path=x,server=on,wait=off"], "no --monitor uses it"),
        (&["--chardev", "socket,id=c,path=x", "--monitor", "c"], "expects 'on': a monitor listens"),
        (&["--blockdev", "file,node-name=x,filename=disk.raw", "disk.raw"], "cannot be used with"),
        (
            &["--blockdev", "file,node-name=x,filename=disk.raw", "--num-queues", "2"],
            "cannot be used with",
        ),
    ] {
        let output = command(dir.path(), args).output().unwrap();
        let err = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && err.contains(expected), "{args:?}: {err}");
    }
}
