//! What an earlier process kept for its guest, and what is done with the disk before that is back: the
//! guest must find every write that it saw completed, or nothing may have been done.

mod common;

use common::guest::sector;
use common::{Backend, Host, Setup, fails, ok};
use serde_json::{Value, json};
use vublk::frontend::{Personality, Session, SessionOptions};

const DISK: u64 = 1 << 20;

/// A daemon that was killed: its guest has seen a write completed that is in a keep and nowhere else.
fn killed(format: &'static str) -> (Host, Session) {
    let (mut host, guest) = served(format, "raw");
    host.backend.kill();
    (host, guest)
}

/// A daemon whose guest has seen a write completed, on a disk above another.
fn served(format: &'static str, below: &str) -> (Host, Session) {
    let mut host = Host::with_base(DISK);
    let dir = host.dir.path();
    if below != "raw" {
        ok(dir, &["convert", "-q", "-f", "raw", "-O", below, "base", "converted"]);
        std::fs::rename(dir.join("converted"), dir.join("base")).unwrap();
    }
    ok(dir, &["create", "-q", "-f", format, "-b", "base", "-F", below, "disk"]);
    host.backend = host.setup(format, "disk", &[]).start();
    let mut guest = host.backend.qemu();
    guest.write(0, 0, &sector(1)).unwrap();
    (host, guest)
}

/// The guest comes back, and finds what it has written.
fn comes_back(host: &Host, guest: &mut Session) {
    let back = guest.reconnect();
    back.unwrap_or_else(|err| panic!("{err}\n{}", host.backend.log()));
    assert!(guest.read(0, 0, 512).unwrap() == sector(1), "a completed write is lost");
}

/// In order; nothing is kept any more.
fn ends(host: &mut Host, guest: &mut Session) {
    guest.stop().unwrap();
    assert!(host.backend.terminate().success(), "{}", host.backend.log());
    let left: Vec<_> = std::fs::read_dir(host.state.path()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_base_that_the_operator_names_is_as_its_guest_knows_it() {
    for read_only in ["on", "off"] {
        let (mut host, mut guest) = killed("qcow2");
        ok(host.dir.path(), &["create", "-q", "-f", "qcow2", "-b", "disk", "-F", "qcow2", "over"]);
        let path = |name: &str| host.path(name).to_str().unwrap().to_string();
        let state = host.state.path().to_str().unwrap();
        let base = format!("qcow2,node-name=b,file.driver=file,file.filename={}", path("disk"));
        let base = format!("{base},read-only={read_only}");
        let over = format!("qcow2,node-name=o,file.driver=file,file.filename={}", path("over"));
        let over = format!("{over},backing=b");
        let export = format!(
            "vhost-user-blk,id=e0,node-name=o,addr.type=unix,addr.path={},writable=on",
            guest.path.display()
        );
        let args = ["--blockdev", &base, "--blockdev", &over, "--export", &export];
        let backend = Setup::new(&[&["--state-dir", state], &args[..]].concat()).many().start();
        // The socket of before is in its directory.
        let _before = std::mem::replace(&mut host.backend, backend);
        comes_back(&host, &mut guest);
        ends(&mut host, &mut guest);
    }
}

/// Nothing that relies on the disk, or changes it, is begun.
fn waits_for_the_guest(format: &'static str, command: &str, arguments: impl Fn(&Host) -> Value) {
    let (mut host, mut guest) = killed(format);
    host.backend.spawn();
    let refusal = host.qmp().fails(command, arguments(&host));
    assert!(refusal.contains("has not come back yet"), "{command}: {refusal}");
    assert!(!host.path("new").exists());
    comes_back(&host, &mut guest);
    host.qmp().ok(command, arguments(&host));
}

#[test]
fn a_stream_waits_for_the_guest() {
    for format in ["add-cow", "qcow2"] {
        waits_for_the_guest(format, "block-stream", |_| json!({"device": "disk", "job-id": "j"}));
    }
}

#[test]
fn a_commit_waits_for_the_guest() {
    for format in ["add-cow", "qcow2"] {
        waits_for_the_guest(format, "block-commit", |_| json!({"device": "disk", "job-id": "j"}));
    }
}

#[test]
fn a_snapshot_waits_for_the_guest() {
    let new = |host: &Host| {
        let file = host.path("new");
        json!({"device": "disk", "snapshot-file": file, "format": "qcow2"})
    };
    waits_for_the_guest("qcow2", "blockdev-snapshot-sync", new);
}

#[test]
fn a_new_size_waits_for_the_guest() {
    for format in ["add-cow", "qcow2"] {
        let larger = |_: &Host| json!({"device": "disk", "size": 2 * DISK});
        waits_for_the_guest(format, "block_resize", larger);
    }
}

#[test]
fn a_write_log_waits_for_the_guest() {
    let log = |host: &Host| json!({"device": "disk", "log": host.path("new")});
    waits_for_the_guest("qcow2", "x-vublk-log-start", log);
}

/// Nobody could tell what the disk was when such a log began.
#[test]
fn a_log_from_the_start_waits_for_the_guest() {
    let (mut host, mut guest) = killed("qcow2");
    let path = |name: &str| host.path(name).to_str().unwrap().to_string();
    let (disk, log, socket) = (path("disk"), path("new"), path("vu.sock"));
    let state = host.state.path().to_str().unwrap();
    let serve = ["serve", "-f", "qcow2", "--state-dir", state, "--socket-path", &socket];
    let recorded = [&serve[..], &["--log-writes", &log, &disk]].concat();
    let refusal = fails(host.dir.path(), &recorded, 1);
    assert!(refusal.contains("its guest has not come back yet"), "{refusal}");
    assert!(!host.path("new").exists());
    host.backend.spawn();
    comes_back(&host, &mut guest);
    ends(&mut host, &mut guest);
    assert!(!host.path("new").exists() && !host.path("new.sidecar").exists());
}

/// A restart that is one too many loses nothing.
#[test]
fn what_is_kept_stays_until_the_guest_is_back() {
    for format in ["add-cow", "qcow2"] {
        let (mut host, mut guest) = killed(format);
        host.backend.spawn();
        drop(host.qmp());
        assert!(host.backend.terminate().success());
        host.backend.spawn();
        comes_back(&host, &mut guest);
        ends(&mut host, &mut guest);
    }
}

/// Nothing was kept any more when the daemon was killed, because the guest had flushed. What is done with
/// the disk before that guest is back is not in its way.
#[test]
fn a_guest_that_had_flushed_comes_back_whatever_was_done_meanwhile() {
    type Change = fn(&Host);
    let snapshot = |host: &Host| {
        let file = host.path("new");
        host.qmp().ok("blockdev-snapshot-sync", json!({"device": "disk", "snapshot-file": file}));
    };
    let stream = |host: &Host| {
        let mut qmp = host.qmp();
        qmp.ok("block-stream", json!({"device": "disk"}));
        qmp.wait_for_jobs();
    };
    let commit = |host: &Host| {
        let mut qmp = host.qmp();
        qmp.ok("block-commit", json!({"device": "disk"}));
        qmp.complete_job();
    };
    let changes: [(&str, Change); 4] =
        [("nothing", |_| ()), ("a snapshot", snapshot), ("a stream", stream), ("a commit", commit)];
    for format in ["add-cow", "qcow2"] {
        for (what, change) in changes {
            eprintln!("{format}, {what}");
            let (mut host, mut guest) = served(format, "qcow2");
            guest.flush(0).unwrap();
            host.backend.kill();
            host.backend.spawn();
            change(&host);
            comes_back(&host, &mut guest);
            ends(&mut host, &mut guest);
        }
        // And a restart that is one too many.
        let (mut host, mut guest) = served(format, "qcow2");
        guest.flush(0).unwrap();
        host.backend.kill();
        host.backend.spawn();
        drop(host.qmp());
        assert!(host.backend.terminate().success(), "{}", host.backend.log());
        host.backend.spawn();
        comes_back(&host, &mut guest);
        ends(&mut host, &mut guest);
    }
}

/// Flushes are ignored, and nothing is kept for a guest without a region for requests in flight: so what
/// it had written was in memory only when a snapshot froze it. The next guest has seen it all the same.
#[test]
fn what_a_guest_without_a_session_has_left_in_a_frozen_image_survives_a_kill_of_the_next() {
    for format in ["add-cow", "qcow2"] {
        let mut host = Host::with_base(DISK);
        ok(host.dir.path(), &["create", "-q", "-f", format, "-b", "base", "-F", "raw", "disk"]);
        let start = |host: &Host, format: &str, image: &str| {
            let path = |name: &str| host.path(name).to_str().unwrap().to_string();
            let (socket, state) = (path("vu.sock"), host.state.path().to_str().unwrap());
            let disk = format!("{format},node-name=disk,cache.no-flush=on,file.driver=file");
            let disk = format!("{disk},file.filename={}", path(image));
            let export = "vhost-user-blk,id=disk,node-name=disk,writable=on,addr.type=unix";
            let export = format!("{export},addr.path={socket}");
            let control = path("control.sock");
            let args = ["--state-dir", state, "--control", &control, "--blockdev", &disk];
            let mut backend =
                Setup::new(&[&args[..], &["--export", &export]].concat()).many().start();
            backend.socket = socket.into();
            backend
        };
        host.backend = start(&host, format, "disk");
        let mut first = host.backend.open(SessionOptions::new(Personality::Firecracker));
        first.write(0, 0, &sector(1)).unwrap();
        host.snapshot(&mut host.qmp(), "over", "qcow2");
        drop(first);
        let mut second = host.backend.qemu();
        assert!(second.read(0, 0, 512).unwrap() == sector(1));
        host.backend.kill();
        host.backend = start(&host, "qcow2", "over");
        comes_back(&host, &mut second);
        ends(&mut host, &mut second);
    }
}

/// What was kept of an image that a snapshot froze before the kill is nobody's once the overlay is served.
#[test]
fn nothing_stays_of_an_image_below_the_one_that_its_guest_comes_back_to() {
    for format in ["add-cow", "qcow2"] {
        let (mut host, mut guest) = served(format, "raw");
        for name in ["between", "over"] {
            host.snapshot(&mut host.qmp(), name, "qcow2");
            guest.write(0, 512, &sector(2)).unwrap();
            guest.flush(0).unwrap();
        }
        host.backend.kill();
        let again = host.setup("qcow2", "over", &[]).start();
        let _before = std::mem::replace(&mut host.backend, again);
        guest.path.clone_from(&host.backend.socket);
        comes_back(&host, &mut guest);
        ends(&mut host, &mut guest);
    }
}

/// With the directory that is the default, and with another that the image is marked with.
#[test]
fn commands_that_write_wait_for_the_guest() {
    let dir = tempfile::tempdir().unwrap();
    let state = tempfile::Builder::new().prefix("vublk-").tempdir_in("/dev/shm").unwrap();
    let d = dir.path();
    ok(d, &["create", "-q", "-f", "raw", "base", "1M"]);
    let named = ["--state-dir", state.path().to_str().unwrap()];
    for (name, format, args) in
        [("a", "add-cow", &[][..]), ("b", "qcow2", &[]), ("c", "qcow2", &named)]
    {
        ok(d, &["create", "-q", "-f", format, "-b", "base", "-F", "raw", name]);
        let mut backend = Setup::new(args).format(format, &d.join(name)).start();
        let mut guest = backend.qemu();
        guest.write(0, 0, &sector(1)).unwrap();
        backend.kill();
        ok(d, &["create", "-q", "-f", "qcow2", "-b", name, "-F", format, "over"]);
        for command in [
            &["resize", "-f", format, name, "2M"][..],
            &["commit", "-d", "-f", format, name],
            &["rebase", "-f", format, "-b", "", name],
            &["rebase", "-u", "-f", format, "-b", "", name],
            &["convert", "-n", "-f", "raw", "-O", format, "base", name],
            &["check", "-r", "all", "-f", format, name],
            &["commit", "-f", "qcow2", "-d", "over"],
            &["create", "-f", "raw", name, "1M"],
            &["create", "-f", "qcow2", name, "1M"],
            &["convert", "-f", "raw", "-O", "vhdx", "base", name],
        ] {
            let refusal = fails(d, command, 1);
            assert!(refusal.contains("let the guest come back first"), "{command:?}: {refusal}");
        }
        let mut read = std::process::Command::new(env!("CARGO_BIN_EXE_vublk"));
        read.args(["convert", "-f", format, "-O", "raw", name, "out"]).current_dir(d);
        let said = String::from_utf8(read.output().unwrap().stderr).unwrap();
        assert!(said.contains("does not show here"), "{said}");
        backend.spawn();
        guest.reconnect().unwrap();
        assert!(guest.read(0, 0, 512).unwrap() == sector(1));
        guest.stop().unwrap();
        assert!(backend.terminate().success());
        ok(d, &["resize", "-q", "-f", format, name, "2M"]);
    }
}

/// Adds an export of the disk's node, on a socket beside the image.
fn export(host: &Host, id: &str, writable: bool) -> Result<Value, String> {
    let mut qmp = host.qmp();
    let node = qmp.ok("query-block", json!({}))[0]["inserted"]["node-name"].clone();
    let address = json!({"type": "unix", "path": host.path(id)});
    let arguments = json!({"type": "vhost-user-blk", "id": id, "node-name": node, "addr": address,
                           "writable": writable});
    qmp.run("block-export-add", arguments)
}

fn open(host: &Host, id: &str) -> Session {
    let options = SessionOptions::new(Personality::Qemu);
    Session::open(&host.path(id), options).unwrap_or_else(|err| panic!("{err}"))
}

/// A guest that only reads has a session of its own, which takes nothing from the one that writes.
#[test]
fn a_guest_that_only_reads_leaves_what_is_kept_for_one_that_writes() {
    for format in ["qcow2", "add-cow", "vhdx"] {
        let mut host = match format {
            "vhdx" => Host::with_disk("vhdx", DISK),
            _ => {
                let mut host = Host::with_base(DISK);
                let args = ["create", "-q", "-f", format, "-b", "base", "-F", "raw", "disk"];
                ok(host.dir.path(), &args);
                host.backend = host.setup(format, "disk", &[]).start();
                host
            }
        };
        let mut guest = host.backend.qemu();
        guest.write(0, 0, &sector(1)).unwrap();
        // It comes while the other runs ...
        export(&host, "reads", false).unwrap();
        let mut reader = open(&host, "reads");
        assert!(reader.read(0, 0, 512).unwrap() == sector(1), "{format}");
        guest.write(0, 128 << 10, &sector(2)).unwrap();
        host.backend.kill();
        host.backend.spawn();
        // ... or before that is back.
        export(&host, "reads", false).unwrap();
        let mut early = open(&host, "reads");
        early.read(0, 0, 512).unwrap();
        early.stop().unwrap();
        drop(early);
        reader.reconnect().unwrap_or_else(|err| panic!("{err}"));
        comes_back(&host, &mut guest);
        assert!(guest.read(0, 128 << 10, 512).unwrap() == sector(2), "{format}");
        assert!(reader.read(0, 128 << 10, 512).unwrap() == sector(2), "{format}");
        reader.stop().unwrap();
        ends(&mut host, &mut guest);
    }
}

/// What is kept is kept for one guest. Where images need that, a second one may not write.
#[test]
fn a_second_guest_that_writes_is_refused_where_one_is_kept_for() {
    let (mut host, mut guest) = killed("qcow2");
    host.backend.spawn();
    comes_back(&host, &mut guest);
    let refusal = export(&host, "writes", true).unwrap_err();
    assert!(refusal.contains("is written by export 'disk' already"), "{refusal}");
    assert!(!host.path("writes").exists());
    ends(&mut host, &mut guest);
    // Nothing is kept of raw images, until an overlay comes.
    host.backend = host.setup("raw", "base", &[]).start();
    export(&host, "writes", true).unwrap();
    let snapshot = json!({"device": "disk", "snapshot-file": host.path("new"), "format": "qcow2"});
    let refusal = host.qmp().fails("blockdev-snapshot-sync", snapshot);
    assert!(refusal.contains("is written by"), "{refusal}");
    assert!(!host.path("new").exists());
}

/// A new guest that was just beginning when its daemon was killed, too: it has a region, and has completed
/// nothing. What is kept for the guest before it is not in its way.
#[test]
fn a_guest_whose_queues_never_ran_is_a_new_one() {
    for format in ["qcow2", "add-cow"] {
        let (mut host, before) = killed(format);
        drop(before);
        let other = Backend::start(&[]);
        let mut guest = other.qemu();
        let area = guest.inflight.as_ref().unwrap();
        let (queues, size) = (area.queues(), area.queue_size());
        guest.inflight = Some(guest.client.get_inflight(queues, size).unwrap());
        host.backend.spawn();
        guest.path = host.backend.socket.clone();
        let begins = guest.reconnect();
        begins.unwrap_or_else(|err| panic!("{err}\n{}", host.backend.log()));
        guest.options.timeout = std::time::Duration::from_secs(5);
        guest.write(0, 0, &sector(3)).unwrap();
        host.backend.kill();
        host.backend.spawn();
        guest.reconnect().unwrap_or_else(|err| panic!("{err}"));
        assert!(guest.read(0, 0, 512).unwrap() == sector(3), "{format}");
        ends(&mut host, &mut guest);
    }
}
