//! Live snapshots: taken while guests write, killed while they are taken, and committed again.
//!
//! The guest is our own front-end. Each sector holds the number of the write that wrote it, so a
//! frozen image tells which writes it has. It must be the disk at one instant: all writes that had
//! completed when the command was given, none that was started after its answer, and for each write
//! that it has everything that had completed before that one was started.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

mod common;

use common::{Host, Qmp, Random, have, skip, tool, tool_ok};
use serde_json::json;
use vublk::block::StatusKind;
use vublk::frontend::{Personality, Request, Session, SessionOptions};
use vublk::images::blockdev::{
    BackingChoice, FormatRequest, ProtocolRequest, open_format, open_protocol,
};
use vublk::images::{self, Access, CacheMode, ImageFormat, Locking, OpenRequest, StateDir};
use vublk::io::{AlignedBuf, block_on};
use vublk::units::ByteRange;

const SECTOR: u64 = 512;
const DISK: u64 = 4 << 20;
const SECTORS: usize = (DISK / SECTOR) as usize;
const QUEUES: u16 = 2;
const DEPTH: usize = 8;

/// Counts everything that happens, in one order for all threads.
static CLOCK: AtomicU64 = AtomicU64::new(1);

fn tick() -> u64 {
    CLOCK.fetch_add(1, Ordering::SeqCst)
}

/// A write: when it was started, and when it had completed.
#[derive(Clone, Copy, Debug)]
struct Write {
    number: u64,
    started: u64,
    completed: u64,
}

/// A guest that writes and reads back what it wrote.
struct Guest {
    disk: Session,
    random: Random,
    /// For each sector its writes, in their order.
    history: Vec<Vec<Write>>,
    busy: Vec<bool>,
    ops: Vec<HashMap<u16, Op>>,
    next: u64,
}

#[derive(Debug)]
enum Op {
    Write(usize, usize),
    Read(usize, usize),
    Flush,
}

fn sector(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(64)
}

fn numbers(bytes: &[u8]) -> Vec<u64> {
    let number = |sector: &[u8]| {
        assert!(sector.chunks(8).all(|word| word == &sector[..8]), "a torn sector");
        u64::from_le_bytes(sector[..8].try_into().unwrap())
    };
    bytes.chunks(SECTOR as usize).map(number).collect()
}

impl Guest {
    fn new(disk: Session, random: Random) -> Guest {
        Guest {
            disk,
            random,
            history: vec![Vec::new(); SECTORS],
            busy: vec![false; SECTORS],
            ops: (0..QUEUES).map(|_| HashMap::new()).collect(),
            next: 1,
        }
    }

    fn submit(&mut self, queue: usize) {
        let scale = self.random.below(6);
        let len = 1 + self.random.below(1 << scale) as usize;
        let start = self.random.below((SECTORS - len + 1) as u64) as usize;
        let (request, op) = match self.random.below(40) {
            0 => (Request::flush(), Op::Flush),
            choice => {
                if self.busy[start..start + len].contains(&true) {
                    return;
                }
                self.busy[start..start + len].fill(true);
                let at = start as u64 * SECTOR;
                if choice < 10 {
                    (Request::read(at, (len as u64 * SECTOR) as u32), Op::Read(start, len))
                } else {
                    let number = self.next;
                    self.next += 1;
                    let write = Write { number, started: tick(), completed: u64::MAX };
                    self.history[start..start + len].iter_mut().for_each(|h| h.push(write));
                    (Request::write(at, sector(number).repeat(len)), Op::Write(start, len))
                }
            }
        };
        let head = self.disk.submit(queue, &request).unwrap();
        self.ops[queue].insert(head, op);
    }

    fn poll(&mut self, queue: usize) -> bool {
        let Some(completion) = self.disk.try_wait(queue).unwrap() else { return false };
        let op = self.ops[queue].remove(&completion.head).unwrap();
        let data = completion.ok().unwrap_or_else(|err| panic!("{op:?}: {err}"));
        match op {
            Op::Flush => {}
            Op::Write(start, len) => {
                let now = tick();
                for history in &mut self.history[start..start + len] {
                    history.last_mut().unwrap().completed = now;
                }
                self.busy[start..start + len].fill(false);
            }
            Op::Read(start, len) => {
                for (at, number) in (start..start + len).zip(numbers(&data)) {
                    let last = self.history[at].last().map_or(0, |write| write.number);
                    assert_eq!(number, last, "sector {at} read by the guest");
                }
                self.busy[start..start + len].fill(false);
            }
        }
        true
    }

    fn turn(&mut self) {
        for queue in 0..usize::from(QUEUES) {
            for _ in 0..DEPTH {
                if self.ops[queue].len() < DEPTH {
                    self.submit(queue);
                }
            }
            while self.poll(queue) {}
        }
        std::thread::yield_now();
    }

    /// Writes until told to stop, then waits for what is in flight.
    fn work(&mut self, stop: &AtomicBool) {
        while !stop.load(Ordering::SeqCst) {
            self.turn();
        }
        self.settle();
    }

    fn settle(&mut self) {
        let deadline = common::soon();
        while self.ops.iter().any(|ops| !ops.is_empty()) {
            assert!(std::time::Instant::now() < deadline, "these never end: {:?}", self.ops);
            for queue in 0..usize::from(QUEUES) {
                while self.poll(queue) {}
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// What every sector must hold now.
    fn now(&self) -> Vec<u64> {
        self.history.iter().map(|h| h.last().map_or(0, |write| write.number)).collect()
    }

    fn read_all(&mut self) -> Vec<u64> {
        let part = 1 << 20;
        let parts = (0..DISK / part).map(|i| self.disk.read(0, i * part, part as u32).unwrap());
        parts.flat_map(|bytes| numbers(&bytes)).collect()
    }
}

/// When a snapshot was asked for, and when the answer was there.
#[derive(Clone, Copy, Debug)]
struct Moment {
    before: u64,
    after: u64,
}

/// Demands that an image is the disk at one instant within `moment`.
fn is_instant(what: &str, content: &[u64], history: &[Vec<Write>], moment: Moment) {
    let find = |at: usize| history[at].iter().position(|write| write.number == content[at]);
    let mut newest = moment.before;
    for at in 0..SECTORS {
        if content[at] != 0 {
            let found = find(at).unwrap_or_else(|| panic!("{what}: sector {at}: {}", content[at]));
            let started = history[at][found].started;
            assert!(started < moment.after, "{what}: sector {at} was written after the snapshot");
            newest = newest.max(started);
        }
    }
    for at in 0..SECTORS {
        let next = if content[at] == 0 { 0 } else { find(at).unwrap() + 1 };
        if let Some(missing) = history[at].get(next) {
            assert!(
                missing.completed > newest,
                "{what}: sector {at} lacks a write that had completed: {missing:?}, {newest}"
            );
        }
    }
}

/// What an image shows, with all that is below it.
fn read_image(path: &Path, format: ImageFormat) -> Vec<u64> {
    let image = images::open(&OpenRequest::read(path).format(Some(format))).unwrap();
    let mut buf = AlignedBuf::zeroed(DISK as usize, 4096);
    block_on(image.node.read(0, buf.buffers())).unwrap();
    numbers(buf.as_slice())
}

/// Puts what an overlay itself holds over `content`.
fn apply_overlay(path: &Path, format: ImageFormat, content: &mut [u64]) {
    let file = ProtocolRequest {
        node_name: "file".into(),
        path: path.to_path_buf(),
        driver: "file",
        access: Access::Read,
        auto_read_only: false,
        cache: CacheMode::Writeback,
        locking: Locking::Guard,
        lock_wait: Duration::ZERO,
        keeps_space: true,
    };
    let alone = FormatRequest {
        node_name: "alone".into(),
        format,
        access: Access::Read,
        keeps_space: true,
        backing: BackingChoice::Nothing,
        allow_dirs: Vec::new(),
        metadata_cache: None,
        state_dir: StateDir::None,
        settled: None,
    };
    let image = open_format(&open_protocol(&file).unwrap(), &alone).unwrap();
    let mut at = 0;
    while at < DISK {
        let range = ByteRange { offset: at, len: DISK - at };
        let status = block_on(image.node.block_status(range)).unwrap();
        if status.kind != StatusKind::Unallocated {
            let mut buf = AlignedBuf::zeroed(status.range.len as usize, 4096);
            block_on(image.node.read(at, buf.buffers())).unwrap();
            let start = (at / SECTOR) as usize;
            let part = numbers(buf.as_slice());
            content[start..start + part.len()].copy_from_slice(&part);
        }
        at = status.range.end();
    }
}

fn guest_of(host: &Host, name: &str) -> Guest {
    let options = SessionOptions::new(Personality::Qemu).queues(QUEUES);
    Guest::new(host.backend.open(options), Random::new(name))
}

/// Takes a snapshot, and notes when.
fn snapshot(host: &Host, qmp: &mut Qmp, name: &str, format: ImageFormat) -> Moment {
    let before = tick();
    host.snapshot(qmp, name, format.name());
    Moment { before, after: tick() }
}

/// The heart of it: two hundred snapshots in a row while a guest writes on two queues.
#[test]
fn many_snapshots_under_load() {
    under_load("raw", ImageFormat::Qcow2, 200);
}

#[test]
fn many_snapshots_with_add_cow_under_load() {
    under_load("raw", ImageFormat::AddCow, 200);
}

/// Differencing images, which know their parent by a GUID that changes when it is written to.
#[test]
fn many_snapshots_with_vhdx_under_load() {
    under_load("vhdx", ImageFormat::Vhdx, 50);
}

fn under_load(base: &'static str, format: ImageFormat, count: usize) {
    let mut host = Host::with_disk(base, DISK);
    let mut qmp = host.qmp();
    let mut guest = guest_of(&host, &format!("under_load, {format}"));
    let stop = Arc::new(AtomicBool::new(false));
    let worker = std::thread::spawn({
        let stop = Arc::clone(&stop);
        move || {
            guest.work(&stop);
            guest
        }
    });
    let moments: Vec<_> =
        (0..count).map(|i| snapshot(&host, &mut qmp, &format!("s{i}"), format)).collect();
    std::thread::sleep(Duration::from_millis(100));
    stop.store(true, Ordering::SeqCst);
    let mut guest = worker.join().unwrap();
    let pauses = qmp.ok("x-vublk-query-pauses", json!({}));
    assert_eq!(pauses["count"], count);
    eprintln!("{} writes, {count} snapshots, pauses {pauses}", guest.next - 1);
    assert_eq!(guest.read_all(), guest.now(), "the disk through {count} overlays");
    let stats = qmp.ok("query-blockstats", json!({}));
    assert_eq!(stats[0]["stats"]["x-vublk-errors"], 0);
    guest.disk.stop().unwrap();
    assert!(host.backend.terminate().success(), "{}", host.backend.log());

    // Opening a chain takes a stack frame for each of its images, and threads of tests have little.
    let check = std::thread::Builder::new().stack_size(64 << 20);
    let below: ImageFormat = base.parse().unwrap();
    let check = check.spawn(move || {
        check_all(&host, &guest, below, format, &moments);
        (host, guest)
    });
    let (host, guest) = check.unwrap().join().unwrap();
    // Nothing is committed to the parent of a VHDX image while it is served.
    if format != ImageFormat::Vhdx {
        commit_all(host, guest, format, count);
    }
}

/// Makes one file of the whole chain again, while the guest writes.
fn commit_all(mut host: Host, mut guest: Guest, format: ImageFormat, count: usize) {
    let top = host.path(format!("s{}", count - 1));
    host.backend = host.setup(format.name(), &top, &[]).start();
    guest.disk = host.backend.open(SessionOptions::new(Personality::Qemu).queues(QUEUES));
    let mut qmp = host.qmp();
    let stop = Arc::new(AtomicBool::new(false));
    let worker = std::thread::spawn({
        let stop = Arc::clone(&stop);
        move || {
            guest.work(&stop);
            guest
        }
    });
    let completed = |qmp: &mut Qmp| {
        let data = qmp.event("BLOCK_JOB_COMPLETED");
        assert_eq!(data["error"], serde_json::Value::Null, "{data}");
        assert_eq!(data["len"], data["offset"]);
    };
    if format == ImageFormat::AddCow {
        // All but two layers at once, then what is left of it.
        let second = host.path(format!("s{}", count - 2));
        qmp.ok("block-commit", json!({"device": "disk", "top": second, "base": host.path("disk")}));
        completed(&mut qmp);
        let disk = qmp.ok("query-block", json!({}))[0]["inserted"].take();
        assert_eq!(disk["backing_file_depth"], 1, "two images: {disk}");
    }
    qmp.ok("block-commit", json!({"device": "disk"}));
    qmp.event("BLOCK_JOB_READY");
    std::thread::sleep(Duration::from_millis(50));
    qmp.ok("block-job-complete", json!({"device": "disk"}));
    completed(&mut qmp);
    let disk = qmp.ok("query-block", json!({}))[0]["inserted"].take();
    assert_eq!(disk["backing_file_depth"], 0, "one image: {disk}");
    std::thread::sleep(Duration::from_millis(50));
    stop.store(true, Ordering::SeqCst);
    let mut guest = worker.join().unwrap();
    assert_eq!(guest.read_all(), guest.now(), "the disk after the commit of {count} overlays");
    guest.disk.stop().unwrap();
    assert!(host.backend.terminate().success(), "{}", host.backend.log());
    let content = numbers(&std::fs::read(host.path("disk")).unwrap());
    assert!(content == guest.now(), "one file again");
}

/// Demands that each frozen image is the disk at its instant, and the last overlay the disk as it is.
fn check_all(
    host: &Host,
    guest: &Guest,
    base: ImageFormat,
    format: ImageFormat,
    moments: &[Moment],
) {
    let count = moments.len();
    let mut content = read_image(&host.path("disk"), base);
    for (i, moment) in moments.iter().enumerate() {
        is_instant(&format!("snapshot {i}"), &content, &guest.history, *moment);
        if i % 66 == 65 || i == count - 1 {
            let below = format!("s{}", i - 1);
            common::ok(
                host.dir.path(),
                &["convert", "-f", format.name(), "-O", "raw", &below, "out.raw"],
            );
            let below = numbers(&std::fs::read(host.path("out.raw")).unwrap());
            assert!(below == content, "snapshot {i} read through its chain");
        }
        apply_overlay(&host.path(format!("s{i}")), format, &mut content);
    }
    assert!(content == guest.now(), "the last overlay is the disk");
    if format == ImageFormat::Qcow2 && have("qemu-img") {
        for i in (0..count).step_by(20) {
            tool_ok(host.dir.path(), "qemu-img", &["check", "-q", &format!("s{i}")]);
        }
    }
}

/// A daemon that dies while it takes snapshots. The guest lives on and must find every write that it
/// saw completed, whichever image is on top; and no old command line may be taken up.
fn killed(format: &'static str, overlays: &'static str, name: &str) {
    let mut host = Host::with_disk(format, DISK);
    let mut guest = guest_of(&host, name);
    let mut top = host.path("disk");
    let mut top_format = format;
    let mut taken = 0;
    let mut moments = Random::new(name);
    for round in 0..12 {
        let mut qmp = host.qmp();
        let stop = Arc::new(AtomicBool::new(false));
        let worker = std::thread::spawn({
            let stop = Arc::clone(&stop);
            move || {
                while !stop.load(Ordering::SeqCst) {
                    guest.turn();
                }
                guest
            }
        });
        std::thread::sleep(Duration::from_millis(5 + 7 * (round % 3)));
        let overlay = host.path(format!("k{round}.qcow2"));
        let file = overlay.clone();
        // Its answer is not waited for: the daemon may be gone before it answers.
        let arguments = json!({"device": "disk", "snapshot-file": file, "format": overlays});
        qmp.send("blockdev-snapshot-sync", &arguments);
        std::thread::sleep(Duration::from_micros(moments.below(1 + 20_000 * round)));
        host.backend.kill();
        stop.store(true, Ordering::SeqCst);
        guest = worker.join().unwrap();
        // An operator starts it with the same command first.
        let mut again = host.setup(top_format, &top, &[]).prepare();
        again.spawn();
        let refusal = "a snapshot was taken of this disk";
        common::wait_until("an answer", || {
            again.log().contains("serving ") || again.log().contains(refusal)
        });
        let refused = again.log().contains(refusal);
        if refused {
            assert!(!again.wait_end().success());
            assert!(again.log().contains(overlay.to_str().unwrap()), "{}", again.log());
            top = overlay;
            top_format = overlays;
            taken += 1;
            again = host.setup(top_format, &top, &[]).start();
        }
        host.backend = again;
        guest.disk.path = host.backend.socket.clone();
        guest.disk.reconnect().unwrap_or_else(|err| {
            panic!("round {round}, refused {refused}: {err}\n{}", host.backend.log())
        });
        guest.settle();
        assert!(guest.read_all() == guest.now(), "round {round}: completed writes are lost");
    }
    eprintln!("{taken} of 12 kills were after the point of no return");
    guest.disk.stop().unwrap();
    assert!(host.backend.terminate().success());
    assert!(read_image(&top, top_format.parse().unwrap()) == guest.now());
}

#[test]
fn killed_while_a_snapshot_of_raw_is_taken() {
    killed("raw", "qcow2", "killed_while_a_snapshot_of_raw_is_taken");
}

#[test]
fn killed_while_a_snapshot_of_qcow2_is_taken() {
    killed("qcow2", "qcow2", "killed_while_a_snapshot_of_qcow2_is_taken");
}

#[test]
fn killed_while_an_add_cow_overlay_is_made() {
    killed("raw", "add-cow", "killed_while_an_add_cow_overlay_is_made");
}

#[test]
fn killed_while_a_differencing_vhdx_is_made() {
    killed("vhdx", "vhdx", "killed_while_a_differencing_vhdx_is_made");
}

/// An overlay that is there already: made by a job or a command, opened without its parent, put on the
/// disk; and what is refused.
#[test]
fn differencing_vhdx_images_are_put_on_a_disk() {
    let mut host = Host::with_disk("vhdx", DISK);
    let mut qmp = host.qmp();
    let mut guest = guest_of(&host, "differencing_vhdx_images_are_put_on_a_disk");
    guest.disk.write(0, 0, &sector(1).repeat(8)).unwrap();
    let d = host.dir.path().to_path_buf();
    common::ok(&d, &["create", "-q", "-f", "raw", "plain.raw", "4M"]);
    let add = |name: &str, file: &str, backing: serde_json::Value| {
        let file = json!({"driver": "file", "filename": d.join(file)});
        json!({"driver": "vhdx", "node-name": name, "file": file, "backing": backing})
    };
    // Made from another disk that has the same size.
    common::ok(&d, &["create", "-q", "-f", "vhdx", "other", "4M"]);
    common::ok(&d, &["create", "-q", "-f", "vhdx", "-b", "other", "-F", "vhdx", "wrong"]);
    qmp.ok("blockdev-add", add("wrong", "wrong", json!(null)));
    let put = |overlay: &str| json!({"node": "disk", "overlay": overlay});
    let err = qmp.fails("blockdev-snapshot", put("wrong"));
    assert!(err.contains("was modified since this child was created"), "{err}");
    qmp.ok("blockdev-del", json!({"node-name": "wrong"}));
    // A dynamic image has no place for a parent.
    qmp.ok("blockdev-add", add("dynamic", "other", json!(null)));
    let err = qmp.fails("blockdev-snapshot", put("dynamic"));
    assert!(err.contains("has no parent"), "{err}");
    qmp.ok("blockdev-del", json!({"node-name": "dynamic"}));
    // The right one, made by the command line from the disk that is served.
    common::ok(&d, &["create", "-q", "-f", "vhdx", "-u", "-b", "disk", "-F", "vhdx", "top", "4M"]);
    qmp.ok("blockdev-add", add("top", "top", json!(null)));
    qmp.ok("blockdev-snapshot", put("top"));
    guest.disk.write(0, 4096, &sector(2).repeat(8)).unwrap();
    guest.disk.flush(0).unwrap();
    assert_eq!(numbers(&guest.disk.read(0, 0, 8192).unwrap()), [[1; 8], [2; 8]].concat());
    // And one above that, by its name in a transaction of two kinds.
    let file = host.path("higher");
    let sync = json!({"node-name": "top", "snapshot-file": file, "snapshot-node-name": "higher",
                      "format": "vhdx"});
    let action = json!({"type": "blockdev-snapshot-sync", "data": sync});
    qmp.ok("transaction", json!({"actions": [action]}));
    guest.disk.write(0, 8192, &sector(3).repeat(8)).unwrap();
    guest.disk.stop().unwrap();
    assert!(host.backend.terminate().success(), "{}", host.backend.log());
    let all = [[1; 8], [2; 8], [3; 8]].concat();
    for (name, written) in [("disk", 1), ("top", 2), ("higher", 3)] {
        let mut wanted = vec![0; SECTORS];
        wanted[..written * 8].copy_from_slice(&all[..written * 8]);
        assert!(read_image(&host.path(name), ImageFormat::Vhdx) == wanted, "{name}");
    }
    if let Some((size, _)) = common::libvhdi::reads(&d, &["higher", "top", "disk"]) {
        assert_eq!(size, DISK);
    }
}

/// VHDX overlays that were made before the guest wrote, from a disk that nobody had written to since it was
/// served: they know another DataWriteGuid than the disk has when they are put on it.
#[test]
fn differencing_vhdx_images_are_prepared_before_the_guest_writes() {
    let mut host = Host::with_disk("vhdx", DISK);
    let mut qmp = host.qmp();
    let mut guest =
        guest_of(&host, "differencing_vhdx_images_are_prepared_before_the_guest_writes");
    let d = host.dir.path().to_path_buf();
    let make = |name: &str, below: &str| {
        let size = DISK.to_string();
        let args = ["create", "-q", "-f", "vhdx", "-u", "-b", below, "-F", "vhdx", name, &size];
        common::ok(&d, &args);
    };
    make("o1", "disk");
    guest.disk.write(0, 0, &sector(1).repeat(8)).unwrap();
    let existing = |name: &str| json!({"device": "disk", "snapshot-file": d.join(name), "format": "vhdx", "mode": "existing"});
    qmp.ok("blockdev-snapshot-sync", existing("o1"));
    // The same as a node, above one that has just been put there.
    make("o2", "o1");
    let file = json!({"driver": "file", "filename": d.join("o2")});
    let node = json!({"driver": "vhdx", "node-name": "o2", "file": file, "backing": null});
    qmp.ok("blockdev-add", node);
    guest.disk.write(0, 4096, &sector(2).repeat(8)).unwrap();
    let nodes = qmp.ok("query-named-block-nodes", json!({"flat": true}));
    let is_o1 = |node: &&serde_json::Value| {
        node["drv"] == "vhdx" && node["file"].as_str().is_some_and(|file| file.ends_with("/o1"))
    };
    let o1 = nodes.as_array().unwrap().iter().find(is_o1).unwrap()["node-name"].clone();
    qmp.ok("blockdev-snapshot", json!({"node": o1, "overlay": "o2"}));
    // Before the first write to what it is put on.
    make("o3", "o2");
    qmp.ok("blockdev-snapshot-sync", existing("o3"));
    guest.disk.write(0, 8192, &sector(3).repeat(8)).unwrap();
    // What was made for another image stays refused.
    make("wrong", "disk");
    let err = qmp.fails("blockdev-snapshot-sync", existing("wrong"));
    assert!(err.contains("was modified since this child was created"), "{err}");
    guest.disk.stop().unwrap();
    assert!(host.backend.terminate().success(), "{}", host.backend.log());
    let all = [[1; 8], [2; 8], [3; 8]].concat();
    for (name, written) in [("disk", 1), ("o1", 2), ("o2", 2), ("o3", 3)] {
        let mut wanted = vec![0; SECTORS];
        wanted[..written * 8].copy_from_slice(&all[..written * 8]);
        assert!(read_image(&host.path(name), ImageFormat::Vhdx) == wanted, "{name}");
    }
}

/// Others who may not read the disk must not read what the guest writes from now on either.
#[test]
fn what_is_made_of_a_disk_is_no_more_open_than_the_disk() {
    use std::os::unix::fs::PermissionsExt;
    let rights = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    for (format, overlay) in [("raw", "qcow2"), ("raw", "add-cow"), ("vhdx", "vhdx")] {
        let host = Host::with_disk(format, DISK);
        let mut qmp = host.qmp();
        let private = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(host.path("disk"), private).unwrap();
        let (overlay_file, log) = (host.path("overlay"), host.path("w.log"));
        qmp.ok("x-vublk-log-start", json!({"device": "disk", "log": log}));
        qmp.ok("x-vublk-log-stop", json!({"device": "disk"}));
        host.snapshot(&mut qmp, "overlay", overlay);
        let mut made = vec![overlay_file, log.clone(), host.path("w.log.sidecar")];
        made.extend((overlay == "add-cow").then(|| host.path("overlay.raw")));
        for path in made {
            assert_eq!(rights(&path), 0o600, "{}", path.display());
        }
    }
}

/// Images that qemu-img reads as we do.
#[test]
fn qemu_reads_the_chain() {
    if !have("qemu-img") {
        return skip("qemu-img");
    }
    let mut host = Host::with_disk("raw", DISK);
    let mut qmp = host.qmp();
    let mut guest = guest_of(&host, "qemu_reads_the_chain");
    for i in 0..3 {
        guest.disk.write(0, i * 4096, &sector(i + 1).repeat(8)).unwrap();
        snapshot(&host, &mut qmp, &format!("q{i}.qcow2"), ImageFormat::Qcow2);
    }
    guest.disk.write(0, 16384, &sector(9).repeat(8)).unwrap();
    guest.disk.stop().unwrap();
    assert!(host.backend.terminate().success());
    let convert = ["convert", "-O", "raw", "q2.qcow2", "out.raw"];
    tool_ok(host.dir.path(), "qemu-img", &convert);
    let theirs = std::fs::read(host.path("out.raw")).unwrap();
    assert!(numbers(&theirs) == read_image(&host.path("q2.qcow2"), ImageFormat::Qcow2));
    let info = tool(host.dir.path(), "qemu-img", &["info", "--backing-chain", "q2.qcow2"]);
    let info = String::from_utf8_lossy(&info.stdout).into_owned();
    assert_eq!(info.matches("\nfile format: qcow2").count(), 3, "{info}");
}
