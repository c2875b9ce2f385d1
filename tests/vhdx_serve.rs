//! VHDX images that are served: to several queues at a time, past the page cache, with a log that has
//! to be replayed, while their size changes. Others must read what our guests wrote.
//!
//! `qemu-img` is the second opinion, and libvhdi for what QEMU does not know (4096-byte sectors,
//! parents): `integration/setup libvhdi` puts it below `target/integration`. The samples made by
//! Windows lie in `../shared/data` beside the repository (`VUBLK_TEST_DATA` names another place).
//! Tests that need one of these say so on stderr and pass where it is missing.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

mod common;

use common::guest::{Guest, SECTOR, sector, words};
use common::{Backend, LoopDevice, Qmp, Random, Setup, have, libvhdi, ok, tool_ok};
use serde_json::{Value, json};
use vublk::frontend::process::footprint;
use vublk::frontend::{Personality, Session, SessionOptions};

/// Size of an image's blocks.
const BLOCK: u64 = 1 << 20;
/// Size of the disk: not a whole number of blocks of 1 MiB.
const DISK: u64 = (20 << 20) + 8 * SECTOR;
/// Size of a parent's content, which ends within a block.
const BASE: u64 = (9 << 20) + 16 * SECTOR;
const QUEUES: u16 = 4;

fn base_word(at: u64) -> u64 {
    0xba5e_0000_0000_0000 | at
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|err| panic!("{err}: {text}"))
}

/// What kind of image is served, and how.
#[derive(Clone, Copy, Debug)]
struct Case {
    kind: Kind,
    sector: u64,
    args: &'static [&'static str],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Dynamic,
    Fixed,
    Differencing,
}

impl Case {
    /// Makes `disk` in `dir`; for a differencing one also `base`, of this size.
    fn create(&self, dir: &Path, base_size: u64) {
        let mut options = format!("block_size=1M,logical_sector_size={}", self.sector);
        let size = DISK.to_string();
        let mut args = vec!["create", "-q", "-f", "vhdx"];
        match self.kind {
            Kind::Dynamic => {}
            Kind::Fixed => options += ",subformat=fixed",
            Kind::Differencing => {
                let mut base: Vec<u8> =
                    (0..BASE / SECTOR).flat_map(|at| sector(base_word(at))).collect();
                base.resize(base_size as usize, 0);
                std::fs::write(dir.join("base.raw"), base).unwrap();
                let convert = ["convert", "-q", "-f", "raw", "-O", "vhdx", "-o", &options.clone()];
                ok(dir, &[&convert[..], &["base.raw", "base"]].concat());
                args.extend(["-b", "base", "-F", "vhdx"]);
            }
        }
        args.extend(["-o", &options, "disk", &size]);
        ok(dir, &args);
    }

    fn word(&self, at: u64) -> u64 {
        let from_base = self.kind == Kind::Differencing && at < BASE / SECTOR;
        if from_base { base_word(at) } else { 0 }
    }

    fn guest(&self, disk: Session, name: &str) -> Guest {
        let words = (0..DISK / SECTOR).map(|at| self.word(at));
        Guest::new(disk, Random::new(name), words).unit(self.sector / SECTOR)
    }

    /// Serves it to a guest, and has everybody read what is left.
    fn run(&self) {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        // As large as the child, as Windows has it; libvhdi knows nothing else.
        self.create(dir, DISK);
        let mut args = self.args.to_vec();
        let block = self.sector.to_string();
        args.extend(["--block-size", &block]);
        let mut backend = Setup::new(&args).format("vhdx", &dir.join("disk")).start();
        let options = SessionOptions::new(Personality::Qemu).queues(QUEUES);
        let mut guest = self.guest(backend.open(options), &format!("{self:?}"));
        for _ in 0..3 {
            guest.work(Duration::from_millis(120));
            guest.settle();
            guest.verify();
            guest.disk.flush(0).unwrap();
        }
        self.empty_blocks(&mut guest);
        guest.disk.stop().unwrap();
        assert!(backend.terminate().success(), "{}", backend.log());
        let log = backend.log();
        assert!(!log.contains("ERROR"), "{self:?}: {log}");
        eprintln!("{self:?}: {} requests", guest.completed);
        self.compare(dir, &guest);
    }

    /// Zeroes a whole block and discards another, which the guest's random work hardly ever does.
    fn empty_blocks(&self, guest: &mut Guest) {
        guest.disk.write_zeroes(0, 3 * BLOCK, BLOCK, true).unwrap();
        guest.replace_range(3 * BLOCK, BLOCK, 0);
        guest.disk.discard(0, 5 * BLOCK, BLOCK).unwrap();
        let left = guest.disk.read(0, 5 * BLOCK, BLOCK as u32).unwrap();
        if left.iter().all(|byte| *byte == 0) {
            guest.replace_range(5 * BLOCK, BLOCK, 0);
        }
        guest.verify();
    }

    /// Everybody reads from the image what the guest read last.
    fn compare(&self, dir: &Path, guest: &Guest) {
        ok(dir, &["check", "disk"]);
        ok(dir, &["convert", "-f", "vhdx", "-O", "raw", "disk", "out.raw"]);
        let content = std::fs::read(dir.join("out.raw")).unwrap();
        for (at, word) in words(&content).into_iter().enumerate() {
            assert_eq!(word, guest.now(at), "{self:?}: sector {at} of the image");
        }
        if self.kind != Kind::Differencing && self.sector == 512 && have("qemu-img") {
            tool_ok(dir, "qemu-img", &["check", "-q", "disk"]);
            tool_ok(dir, "qemu-img", &["compare", "-q", "-F", "raw", "disk", "out.raw"]);
        }
        let images: &[&str] =
            if self.kind == Kind::Differencing { &["disk", "base"] } else { &["disk"] };
        if let Some(theirs) = libvhdi::content(dir, images) {
            assert_eq!(theirs.len() as u64, DISK, "{self:?}: read by libvhdi");
            let blocks = content.chunks(BLOCK as usize).zip(theirs.chunks(BLOCK as usize));
            for (at, (ours, theirs)) in blocks.enumerate() {
                // A block of a child that is zeros (states 1 to 3) is for libvhdi what the sector
                // bitmap makes of it: the parent's data, or the file's first bytes.
                if self.kind != Kind::Differencing || ours.iter().any(|byte| *byte != 0) {
                    assert!(ours == theirs, "{self:?}: block {at} read by libvhdi");
                }
            }
        }
    }
}

const DIRECT: &[&str] = &["--cache", "none"];
const THREADS: &[&str] = &["--aio", "threads"];
const DIRECT_THREADS: &[&str] = &["--aio", "threads", "--cache", "none"];

fn run_all(kind: Kind, sector: u64) {
    for args in [&[][..], DIRECT, THREADS, DIRECT_THREADS] {
        Case { kind, sector, args }.run();
    }
}

#[test]
fn several_queues_write_to_a_dynamic_image() {
    run_all(Kind::Dynamic, 512);
}

#[test]
fn several_queues_write_to_a_differencing_image() {
    run_all(Kind::Differencing, 512);
}

#[test]
fn several_queues_write_to_a_fixed_image() {
    run_all(Kind::Fixed, 512);
}

#[test]
fn several_queues_write_to_images_of_large_sectors() {
    run_all(Kind::Dynamic, 4096);
    run_all(Kind::Differencing, 4096);
}

#[test]
fn writes_that_are_durable_at_once_and_flushes_that_are_ignored() {
    for args in
        [&["--cache", "writethrough"][..], &["--cache", "directsync"], &["--cache", "unsafe"]]
    {
        Case { kind: Kind::Dynamic, sector: 512, args }.run();
    }
    Case { kind: Kind::Differencing, sector: 512, args: &["--cache", "directsync"] }.run();
}

/// The SHA-256 of some bytes.
fn sha256(bytes: &[u8]) -> String {
    use std::io::Write;
    let mut child = Command::new("sha256sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("sha256sum is part of the coreutils");
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    let output = child.wait_with_output().unwrap();
    String::from_utf8(output.stdout).unwrap().split(' ').next().unwrap().to_string()
}

// ---- images of others -----------------------------------------------------------------------

/// QEMU writes an image, our guest writes on, and QEMU reads it; twice.
#[test]
fn images_go_back_and_forth_between_qemu_and_us() {
    if !have("qemu-img") || !have("qemu-io") {
        return;
    }
    for options in
        ["subformat=dynamic,block_size=1M", "subformat=fixed,block_size=2M", "block_state_zero=off"]
    {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let content: Vec<u8> =
            (0..DISK / SECTOR).flat_map(|at| sector(base_word(at % 9000))).collect();
        std::fs::write(dir.join("in.raw"), content).unwrap();
        let convert = ["convert", "-f", "raw", "-O", "vhdx", "-o", options, "in.raw", "disk"];
        tool_ok(dir, "qemu-img", &convert);
        let mut backend = Setup::new(&[]).format("vhdx", &dir.join("disk")).start();
        let options = SessionOptions::new(Personality::Qemu).queues(2);
        let known = (0..DISK / SECTOR).map(|at| base_word(at % 9000));
        let mut guest = Guest::new(backend.open(options), Random::new("back and forth"), known);
        for round in 0..2 {
            guest.work(Duration::from_millis(150));
            guest.settle();
            guest.verify();
            guest.disk.stop().unwrap();
            assert!(backend.terminate().success(), "{}", backend.log());
            tool_ok(dir, "qemu-img", &["check", "-q", "disk"]);
            tool_ok(dir, "qemu-img", &["convert", "-O", "raw", "disk", "out.raw"]);
            for (at, word) in words(&std::fs::read(dir.join("out.raw")).unwrap()).iter().enumerate()
            {
                assert_eq!(*word, guest.now(at), "round {round}: sector {at} read by QEMU");
            }
            // QEMU's turn: what it writes need not be words of a sector.
            let at = 5 << 20;
            tool_ok(
                dir,
                "qemu-io",
                &["-f", "vhdx", "-c", &format!("write -P 0x42 {at} 3M"), "disk"],
            );
            tool_ok(dir, "qemu-io", &["-f", "vhdx", "-c", &format!("write -P 0 {at} 3M"), "disk"]);
            backend.spawn();
            guest.replace_range(at, 3 << 20, 0);
            let options = SessionOptions::new(Personality::Qemu).queues(2);
            guest.disk = backend.open(options);
            guest.verify();
        }
    }
}

/// Where the sample images are; `None`, with a line on stderr, if they are not here.
fn samples() -> Option<PathBuf> {
    let dir = match std::env::var_os("VUBLK_TEST_DATA") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data"),
    };
    if dir.join("vhdx").is_dir() {
        return Some(dir.join("vhdx"));
    }
    common::skip(&format!("no sample images in {}", dir.display()));
    None
}

/// Samples with what they need, and the SHA-256 of their content.
const SAMPLES: &[(&str, Option<&str>, &str)] = &[
    (
        "ntfs-dynamic.crashed",
        None,
        "b92731f8e4bf3532418444d22a9086823a8122569500acd09cd8d2ce20eb98e9",
    ),
    (
        "ntfs-fixed.crashed",
        None,
        "5237dd895f38052344e2ef35a207fe9df08cd18d17b6ea857a1b93cc475e1f2e",
    ),
    (
        "ntfs-fixed.crashed-short",
        None,
        "bb9f8df61474d25e71fa00722318cd387396ca1736605e1248821cc0de3d3af8",
    ),
    (
        "ntfs-differential.crashed",
        Some("ntfs-parent"),
        "1ef1fb5360247aa7d36a38415bc7bf6e1e52f62af5e6bd1283815e82584c7efc",
    ),
    (
        "ntfs-differential",
        Some("ntfs-parent"),
        "1ef1fb5360247aa7d36a38415bc7bf6e1e52f62af5e6bd1283815e82584c7efc",
    ),
    ("ntfs-dynamic", None, "b92731f8e4bf3532418444d22a9086823a8122569500acd09cd8d2ce20eb98e9"),
    ("ntfs-fixed", None, "5237dd895f38052344e2ef35a207fe9df08cd18d17b6ea857a1b93cc475e1f2e"),
    ("ext2", None, "a6c2f0e39afe6c6ab432ca5465349fcefe8dc944398e97b2d957d3f89dbb5d80"),
];

fn unpack(samples: &Path, name: &str, dir: &Path) -> PathBuf {
    let path = dir.join(format!("{name}.vhdx"));
    let file = std::fs::File::create(&path).unwrap();
    let packed = samples.join(format!("{name}.vhdx.xz"));
    let status = Command::new("xz").arg("-dc").arg(&packed).stdout(file).status().expect("xz");
    assert!(status.success(), "{}", packed.display());
    path
}

fn read_all(backend: &Backend, size: u64) -> Vec<u8> {
    let mut session = backend.qemu();
    let part = 1 << 20;
    let content =
        (0..size / part).flat_map(|n| session.read(0, n * part, part as u32).unwrap()).collect();
    session.stop().unwrap();
    content
}

/// Images as a crash of Windows leaves them: served for reading they stay as they are, served for
/// writing they are replayed on disk, and the guest reads the same both times.
#[test]
fn what_crashed_is_served() {
    let Some(samples) = samples() else { return };
    for (name, parent, hash) in SAMPLES {
        let dir = tempfile::tempdir().unwrap();
        let path = unpack(&samples, name, dir.path());
        let parent = parent.map(|parent| unpack(&samples, parent, dir.path()));
        let before = std::fs::read(&path).unwrap();
        let parent_before = parent.as_ref().map(|parent| std::fs::read(parent).unwrap());
        for args in [&["--read-only"][..], &["--read-only", "--cache", "none"]] {
            let mut backend = Setup::new(args).format("vhdx", &path).start();
            assert_eq!(sha256(&read_all(&backend, 4 << 20)), *hash, "{name}, {args:?}");
            assert!(backend.terminate().success());
            assert!(std::fs::read(&path).unwrap() == before, "{name}, {args:?}: changed");
        }
        for args in [&[][..], &["--cache", "none"], &["--cache", "none", "--aio", "threads"]] {
            std::fs::write(&path, &before).unwrap();
            // Killed at once, and started again: a replay can be repeated.
            let mut backend = Setup::new(args).format("vhdx", &path).start();
            backend.wait_log("serving ");
            backend.kill();
            backend.spawn();
            assert_eq!(sha256(&read_all(&backend, 4 << 20)), *hash, "{name}, {args:?}");
            let mut session = backend.qemu();
            session.write(0, 1 << 20, &[0x5a; 4096]).unwrap();
            session.stop().unwrap();
            assert!(backend.terminate().success(), "{}", backend.log());
            let d = dir.path();
            let file = format!("{name}.vhdx");
            let info = json(&ok(d, &["info", "--output=json", &file]));
            let details = &info["format-specific"]["data"];
            assert_eq!(details["log-entries-to-replay"], 0, "{name}, {args:?}");
            ok(d, &["check", &file]);
            ok(d, &["convert", "-O", "raw", &file, "out.raw"]);
            let mut content = std::fs::read(d.join("out.raw")).unwrap();
            assert!(content[1 << 20..(1 << 20) + 4096].iter().all(|byte| *byte == 0x5a));
            // With what was there before in its place it is the same disk.
            std::fs::write(d.join("before.vhdx"), &before).unwrap();
            ok(d, &["convert", "-O", "raw", "before.vhdx", "before.raw"]);
            let was = std::fs::read(d.join("before.raw")).unwrap();
            content[1 << 20..(1 << 20) + 4096].copy_from_slice(&was[1 << 20..(1 << 20) + 4096]);
            assert_eq!(sha256(&content), *hash, "{name}, {args:?}: written on");
            if parent.is_none() && have("qemu-img") {
                tool_ok(d, "qemu-img", &["check", "-q", &file]);
                tool_ok(d, "qemu-img", &["compare", "-q", "-F", "raw", &file, "out.raw"]);
            }
        }
        if let (Some(parent), Some(before)) = (&parent, &parent_before) {
            assert!(std::fs::read(parent).unwrap() == *before, "{name}: its parent changed");
        }
    }
}

// ---- another size while a guest writes ------------------------------------------------------

/// A disk that is resized under load, with requests in flight; and now and then the process dies
/// while it does that.
#[test]
fn resized_under_a_guest() {
    for kind in [Kind::Dynamic, Kind::Fixed, Kind::Differencing] {
        let case = Case { kind, sector: 512, args: &[] };
        let dir = tempfile::tempdir().unwrap();
        let state =
            tempfile::Builder::new().prefix("vublk-resize-").tempdir_in("/dev/shm").unwrap();
        let dir = dir.path();
        // A disk that has become smaller than its parent cannot grow again.
        case.create(dir, BASE);
        let control = dir.join("control.sock");
        let args =
            ["--control", control.to_str().unwrap(), "--state-dir", state.path().to_str().unwrap()];
        let mut backend = Setup::new(&args).format("vhdx", &dir.join("disk")).start();
        let options = SessionOptions::new(Personality::Qemu).queues(2);
        let mut guest = case.guest(backend.open(options), &format!("resized, {kind:?}"));
        let mut size = DISK;
        let mut killed_in = 0;
        for round in 0..16 {
            guest.work(Duration::from_millis(40));
            let mut qmp = Qmp::connect(&control);
            let new = (10 << 20) + guest.random.below(40 << 10) * SECTOR;
            if new < size {
                // The guest is told first, and leaves the end alone.
                guest.settle();
                guest.resize(new / SECTOR);
                let command = json!({"device": "disk", "size": new});
                let err = qmp.fails("block_resize", command);
                assert!(err.contains("x-vublk-shrink"), "{err}");
            }
            let command = json!({"device": "disk", "size": new, "x-vublk-shrink": true});
            if round % 4 == 3 {
                qmp.send("block_resize", &command);
                std::thread::sleep(Duration::from_micros(guest.random.below(20_000)));
                backend.kill();
                drop(qmp);
                let _ = std::fs::remove_file(&control);
                backend.spawn();
                guest.disk.reconnect().unwrap_or_else(|err| panic!("{err}\n{}", backend.log()));
                let mut qmp = Qmp::connect(&control);
                let nodes = qmp.ok("query-named-block-nodes", json!({}));
                let node = nodes.as_array().unwrap().iter().find(|n| n["node-name"] == "image");
                let found = node.unwrap()["image"]["virtual-size"].as_u64().unwrap();
                assert!(found == size || found == new, "{kind:?}, round {round}: {found}");
                killed_in += u32::from(found == new);
                size = found;
                if new < found {
                    // What was cut off is not known any more. The guest may not be back yet.
                    common::wait_until("a smaller disk", || {
                        let done = qmp.run("block_resize", command.clone());
                        let is_back = |err: &String| !err.contains("has not come back yet");
                        assert!(!done.as_ref().is_err_and(is_back), "{done:?}");
                        done.is_ok()
                    });
                    size = new;
                }
            } else {
                qmp.ok("block_resize", command);
                size = new;
            }
            guest.settle();
            guest.resize(size / SECTOR);
            guest.verify();
        }
        eprintln!("{kind:?}: {} requests, {killed_in} of 4 kills came too late", guest.completed);
        guest.disk.stop().unwrap();
        assert!(backend.terminate().success(), "{}", backend.log());
        ok(dir, &["check", "disk"]);
        ok(dir, &["convert", "-f", "vhdx", "-O", "raw", "disk", "out.raw"]);
        let content = std::fs::read(dir.join("out.raw")).unwrap();
        assert_eq!(content.len() as u64, size);
        for (at, word) in words(&content).into_iter().enumerate() {
            assert_eq!(word, guest.now(at), "{kind:?}: sector {at} of the image");
        }
        if kind != Kind::Differencing && have("qemu-img") {
            tool_ok(dir, "qemu-img", &["check", "-q", "disk"]);
            tool_ok(dir, "qemu-img", &["compare", "-q", "-F", "raw", "disk", "out.raw"]);
        }
    }
}

/// An image on a block device ends where it ends: there is nothing to cut off, and nothing wrong.
#[test]
fn an_image_on_a_block_device_is_closed_without_a_warning() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let case = Case { kind: Kind::Dynamic, sector: SECTOR, args: &[] };
    case.create(dir, 0);
    // With room for blocks.
    let file = std::fs::File::options().write(true).open(dir.join("disk")).unwrap();
    file.set_len(64 << 20).unwrap();
    let Some(device) = LoopDevice::over(&dir.join("disk")) else { return };
    let mut backend = Setup::new(&[]).format("vhdx", device.path()).start();
    let options = SessionOptions::new(Personality::Qemu).queues(QUEUES);
    let mut guest = case.guest(backend.open(options), "an_image_on_a_block_device");
    guest.disk.write(0, 0, &sector(1).repeat(8)).unwrap();
    guest.disk.flush(0).unwrap();
    guest.disk.stop().unwrap();
    assert!(backend.terminate().success(), "{}", backend.log());
    let log = backend.log();
    assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
    ok(dir, &["check", "-f", "vhdx", device.name()]);
}

/// How much metadata a guest makes us look at decides nothing: the operator does.
#[test]
fn memory_for_metadata_has_the_bound_that_was_given() {
    const PAGES: u64 = 4096;
    let dir = tempfile::tempdir().unwrap();
    ok(dir.path(), &["create", "-q", "-f", "vhdx", "-o", "block_size=1M", "disk", "64T"]);
    let path = dir.path().join("disk");
    let memory = |most: &str| {
        let backend = Setup::new(&["--metadata-cache", most]).format("vhdx", &path).start();
        let mut disk = backend.qemu();
        for page in 0..PAGES {
            // 512 entries of the block allocation table further on.
            let content = disk.read(0, page * (512 << 20), SECTOR as u32).unwrap();
            assert!(content.iter().all(|byte| *byte == 0));
        }
        footprint(backend.pid()).unwrap().own()
    };
    let (little, much) = (memory("64K"), memory("64M"));
    assert!(much > little + PAGES * 4096 / 2, "{little} and {much} bytes");
}
