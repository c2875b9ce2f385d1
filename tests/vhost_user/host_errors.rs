//! What the host may do to a disk: the guest is told, the process lives, the log has a line.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use vublk::frontend::request::{STATUS_IOERR, STATUS_OK};
use vublk::frontend::{Client, Personality, Request, Session, SessionOptions};

use crate::common::{Backend, LoopDevice, Setup, ok, skip, soon};

#[test]
fn an_image_truncated_under_us_fails_reads_beyond_its_end() {
    for args in [&[] as &[&str], &["--cache", "none"], &["--aio", "threads"]] {
        let mut backend = Backend::start(args);
        backend.scribble(0, &[7; 8192]);
        let mut session = backend.qemu();
        let file = std::fs::File::options().write(true).open(&backend.image).unwrap();
        file.set_len(4096).unwrap();
        let read = session.execute(0, &Request::read(8 << 20, 4096)).unwrap();
        assert_eq!(read.status, STATUS_IOERR, "{args:?}");
        backend.wait_log("truncated by another program");
        // Half of it is there.
        assert_eq!(session.execute(0, &Request::read(0, 8192)).unwrap().status, STATUS_IOERR);
        assert_eq!(session.read(0, 0, 4096).unwrap(), [7; 4096]);
        // It comes back.
        file.set_len(16 << 20).unwrap();
        assert_eq!(session.read(0, 8 << 20, 4096).unwrap(), [0; 4096]);
        session.write(0, 8 << 20, &[1; 4096]).unwrap();
        backend.assert_lives();
        drop(session);
        assert!(backend.terminate().success());
        // What failed moved nothing.
        let served = "reads=4 writes=1 flushes=0 bytes_read=8192 bytes_written=4096 errors=2 ";
        assert!(backend.log().contains(served), "{args:?}: {}", backend.log());
    }
}

#[test]
fn a_full_host_fails_writes_and_nothing_else() {
    let probe = Command::new("unshare")
        .args(["-rm", "--propagation", "private", "mount", "-t", "tmpfs", "none", "/mnt"])
        .output();
    if !probe.is_ok_and(|output| output.status.success()) {
        return skip("no right to mount a small file system");
    }
    for args in [&[] as &[&str], &["--aio", "threads"]] {
        let mount = "mkdir \"$DIR/full\"; mount -t tmpfs -o size=1m none \"$DIR/full\"; \
                     truncate -s 8M \"$DIR/full/disk\"; ln -s full/disk \"$DIR/link\"";
        let dir = tempfile::tempdir().unwrap();
        let mut backend = Setup::new(args).private_mounts().prelude(mount).prepare();
        backend.image = backend.dir.path().join("full/disk");
        drop(dir);
        backend.spawn();
        let mut session = backend.qemu();
        let mut written = 0;
        let failed = (0..32u64).find(|i| {
            let done = session.execute(0, &Request::write(i * 65536, vec![3; 65536])).unwrap();
            written += u64::from(done.status == STATUS_OK);
            done.status != STATUS_OK
        });
        assert!(failed.is_some_and(|i| i > 4), "{args:?}: {failed:?}, {written} written");
        backend.wait_log("write failed");
        assert!(backend.log().contains("nospace=true"), "{}", backend.log());
        assert_eq!(session.read(0, 0, 512).unwrap(), [3; 512]);
        // Room is made by the guest itself, and all is well.
        session.discard(0, 0, 256 << 10).unwrap();
        session.write(0, 4 << 20, &[4; 65536]).unwrap();
        session.flush(0).unwrap();
        backend.assert_lives();
    }
}

/// Formats that find space for what is new: a write for which there is none fails, and nothing else. What
/// was completed is flushed all the same, and once there is room, writing goes on.
#[test]
fn a_full_host_fails_writes_that_need_space_and_nothing_else() {
    const PIECE: usize = 65536;
    for (format, options) in
        [("qcow2", "size=64M"), ("add-cow", "size=64M"), ("vhdx", "size=64M,block_size=1M")]
    {
        let dir = tempfile::tempdir().unwrap();
        let Some(host) = SmallHost::new(dir.path()) else { return };
        ok(&host.0, &["create", "-q", "-f", format, "-o", options, "disk"]);
        host.fill_but(4 << 20);
        let image = host.0.join("disk");
        let mut backend = Setup::new(&[]).format(format, &image).start();
        let mut session = backend.qemu();
        let place = |number: u64| number * 37 % 256 * (256 << 10);
        let value = |number: u64| vec![number as u8 + 1; PIECE];
        let mut good = Vec::new();
        for number in 0..200 {
            let write = Request::write(place(number), value(number));
            if session.execute(0, &write).unwrap().status == STATUS_OK {
                good.push(number);
            }
            if number % 16 == 15 {
                session.flush(0).unwrap_or_else(|err| panic!("{format}: {err}"));
            }
        }
        assert!((8..100).contains(&good.len()), "{format}: {} written", good.len());
        backend.wait_log("write failed");
        std::fs::remove_file(host.0.join("filler")).unwrap();
        session.write(0, place(201), &value(201)).unwrap();
        session.flush(0).unwrap();
        for number in good.into_iter().chain([201]) {
            let read = session.read(0, place(number), PIECE as u32).unwrap();
            assert!(read == value(number), "{format}: {number}");
        }
        drop(session);
        assert!(backend.terminate().success(), "{format}: {}", backend.log());
    }
}

/// A small file system; gone when dropped.
struct SmallHost(PathBuf);

impl SmallHost {
    /// Makes one; `None`, visibly, where that is not allowed.
    fn new(dir: &Path) -> Option<SmallHost> {
        let (file, mount) = (dir.join("fs"), dir.join("host"));
        std::fs::File::create(&file).unwrap().set_len(24 << 20).unwrap();
        std::fs::create_dir(&mount).unwrap();
        let is_done = |command: &mut Command| command.output().is_ok_and(|o| o.status.success());
        if is_done(Command::new("mkfs.ext4").args(["-q", "-O", "^has_journal"]).arg(&file))
            && is_done(Command::new("mount").args(["-o", "loop"]).args([&file, &mount]))
        {
            return Some(SmallHost(mount));
        }
        skip("a file system of its own, which only root may mount");
        None
    }

    /// Leaves so many bytes.
    fn fill_but(&self, room: u64) {
        let status = rustix::fs::statvfs(&self.0).unwrap();
        let free = (status.f_bavail * status.f_frsize).saturating_sub(room);
        std::fs::write(self.0.join("filler"), vec![1; free as usize]).unwrap();
    }
}

impl Drop for SmallHost {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_limit_on_the_size_of_files_fails_writes_and_nothing_else() {
    for args in [&[] as &[&str], &["--aio", "threads"], &["--cache", "none"]] {
        // In units of 512 bytes.
        let mut backend = Setup::new(args).prelude("ulimit -f 2048").start();
        let mut session = backend.qemu();
        session.write(0, 0, &[1; 4096]).unwrap();
        let done = session.execute(0, &Request::write(8 << 20, vec![2; 4096]));
        let done = done.unwrap_or_else(|err| panic!("{args:?}: {err}\n{}", backend.log()));
        assert_eq!(done.status, STATUS_IOERR, "{args:?}");
        backend.wait_log("write failed");
        assert_eq!(session.read(0, 0, 4096).unwrap(), [1; 4096]);
        session.write(0, 4096, &[1; 4096]).unwrap();
        backend.assert_lives();
    }
}

#[test]
fn a_device_that_fails_fails_its_requests() {
    let dir = tempfile::tempdir().unwrap();
    let backing = dir.path().join("backing");
    let file = std::fs::File::create(&backing).unwrap();
    file.set_len(16 << 20).unwrap();
    let Some(device) = LoopDevice::over(&backing) else { return };
    let mut backend = Setup::new(&["--cache", "none"]).image(device.path()).start();
    let mut session = backend.qemu();
    session.write(0, 0, &[7; 4096]).unwrap();
    session.write(0, 8 << 20, &[8; 4096]).unwrap();
    session.flush(0).unwrap();
    // The device keeps its size, and has lost what is behind it.
    file.set_len(4096).unwrap();
    let done = session.execute(0, &Request::read(8 << 20, 4096)).unwrap();
    assert_eq!(done.status, STATUS_IOERR, "{}", backend.log());
    backend.wait_log("read failed");
    assert!(backend.log().contains("Input/output error"), "{}", backend.log());
    assert_eq!(session.read(0, 0, 4096).unwrap(), [7; 4096]);
    backend.assert_lives();
    drop(session);
    assert!(backend.terminate().success(), "{}", backend.log());
}

/// Many devices can discard and not zero (LVM's thin volumes, encrypted ones, most SATA disks). Over tmpfs, a
/// loop device becomes one with the first zeroes that it cannot make.
#[test]
fn a_device_that_cannot_zero_is_discarded_all_the_same() {
    use std::os::unix::fs::MetadataExt;
    const MB: u32 = 1 << 20;
    for args in [["--aio", "threads"], ["--cache", "none"], ["--cache", "writeback"]] {
        let Ok(dir) = tempfile::tempdir_in("/dev/shm") else { return skip("no /dev/shm") };
        let backing = dir.path().join("backing");
        let Some(device) = LoopDevice::new(&backing, 16 << 20) else { return };
        let backend = Setup::new(&args).image(device.path()).start();
        let mut session = backend.qemu();
        session.write_zeroes(0, 8 << 20, u64::from(MB), false).unwrap();
        let name = device.path().file_name().unwrap().to_str().unwrap();
        let limit = format!("/sys/block/{name}/queue/write_zeroes_max_bytes");
        if std::fs::read_to_string(limit).is_ok_and(|limit| limit.trim() != "0") {
            return skip("the loop devices of this kernel can zero whatever they are over");
        }
        session.write(0, 0, &vec![1; MB as usize]).unwrap();
        session.flush(0).unwrap();
        let space = || std::fs::metadata(&backing).unwrap().blocks() * 512;
        let before = space();
        session.write(0, 0, &vec![2; MB as usize]).unwrap();
        session.discard(0, 0, u64::from(MB)).unwrap();
        // Not what was there before the last write.
        let now = session.read(0, 0, MB).unwrap();
        assert!(now.iter().all(|byte| *byte == 0), "{args:?}: {:?}", &now[..16]);
        assert_eq!(space(), before - u64::from(MB), "{args:?}");
        // What is unmapped while it is zeroed reads as zeros, too.
        session.write(0, 0, &vec![3; MB as usize]).unwrap();
        session.write_zeroes(0, 0, u64::from(MB), true).unwrap();
        assert!(session.read(0, 0, MB).unwrap() == vec![0; MB as usize], "{args:?}");
    }
}

/// A block device of 64 MiB on a host that has 8 MiB for it: what is too much is lost when the page
/// cache is written back.
struct NoRoom {
    device: LoopDevice,
    mount: tempfile::TempDir,
}

impl NoRoom {
    fn new() -> Option<NoRoom> {
        let mount = tempfile::tempdir().unwrap();
        let args = ["-t", "tmpfs", "-o", "size=8m", "none"];
        let mounted = Command::new("mount").args(args).arg(mount.path()).output();
        if !mounted.is_ok_and(|output| output.status.success()) {
            skip("no right to mount a small file system");
            return None;
        }
        match LoopDevice::new(&mount.path().join("disk"), 64 << 20) {
            Some(device) => Some(NoRoom { device, mount }),
            None => {
                let _ = Command::new("umount").arg(mount.path()).status();
                None
            }
        }
    }
}

impl Drop for NoRoom {
    fn drop(&mut self) {
        // Lazily: the device is detached after this.
        let _ = Command::new("umount").arg("-l").arg(self.mount.path()).status();
    }
}

/// The kernel tells it to one of two syncs that run side by side.
#[test]
fn data_that_is_lost_is_lost_for_all_flushes() {
    for args in [&[] as &[&str], &["--aio", "threads"]] {
        let Some(host) = NoRoom::new() else { return };
        let mut backend = Setup::new(args).image(host.device.path()).start();
        let mut session = backend.open(SessionOptions::new(Personality::Qemu).queues(2));
        for i in 0..12 {
            session.write(0, i << 20, &vec![7; 1 << 20]).unwrap();
        }
        let heads = [0, 1].map(|queue| session.submit(queue, &Request::flush()).unwrap());
        for queue in [0, 1] {
            let done = session.wait_head(queue, heads[queue], soon()).unwrap();
            assert_eq!(done.status, STATUS_IOERR, "{args:?}, queue {queue}\n{}", backend.log());
        }
        backend.wait_log("writes are refused from now on");
        backend.assert_lives();
    }
}

/// The same where each write is to be durable by itself.
#[test]
fn a_durable_write_that_is_lost_fails() {
    let Some(host) = NoRoom::new() else { return };
    let mut backend = Setup::new(&["--cache", "writethrough"]).image(host.device.path()).start();
    let mut session = backend.open(SessionOptions::new(Personality::Qemu).queues(2));
    for i in 0..7 {
        session.write(0, i << 20, &vec![7; 1 << 20]).unwrap();
    }
    for i in 0..32 {
        let there = Request::write(0, vec![8; 65536]);
        let no_room = Request::write((20 << 20) + (i << 20), vec![9; 1 << 20]);
        let heads =
            [(0, there), (1, no_room)].map(|(queue, write)| session.submit(queue, &write).unwrap());
        session.wait_head(0, heads[0], soon()).unwrap();
        let done = session.wait_head(1, heads[1], soon()).unwrap();
        // The first of them may still fit.
        assert!(done.status == STATUS_IOERR || i < 2, "write {i}\n{}", backend.log());
    }
    backend.assert_lives();
}

/// Longer than any machine takes to answer.
const SLOW: Duration = Duration::from_secs(30);

#[test]
fn too_few_file_descriptors_are_said_clearly() {
    let mut served = 0;
    for limit in [3, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 20, 28, 40] {
        let mut backend = Setup::new(&[]).prelude(&format!("ulimit -n {limit}")).start();
        let deadline = soon();
        // Up and answering, or at its end.
        let answers = |socket: &Path| {
            Client::connect(socket, Duration::from_millis(500))
                .and_then(|mut client| client.get_features())
                .is_ok()
        };
        let complains =
            |log: String| log.contains("file descriptors") || log.contains("Too many open files");
        while backend.lives() && !complains(backend.log()) && !answers(&backend.socket) {
            assert!(Instant::now() < deadline, "{limit}: {}", backend.log());
            std::thread::sleep(Duration::from_millis(1));
        }
        if !backend.lives() {
            let status = backend.wait_end();
            let log = backend.log();
            assert!(
                status.code().is_some_and(|code| code > 0 && code < 128),
                "{limit}: {status}: {log}"
            );
            // The loader of programs may have spoken, and not we, where even it had too few.
            assert!(limit < 5 || log.lines().any(|l| l.starts_with("vublk: ")), "{limit}: {log}");
            continue;
        }
        // A client with many queues wants more descriptors than there are: it is refused or its
        // connection ends, and the process waits for the next one.
        let mut options = SessionOptions::default().queues(8);
        options.timeout = Duration::from_millis(700);
        loop {
            let outcome =
                Session::open(&backend.socket, options.clone()).and_then(|mut session| {
                    // QEMU asks for no acknowledgement of what it said last.
                    session.client.get_features()?;
                    session.write(0, 0, &[1; 512])
                });
            let Err(err) = outcome else {
                served += 1;
                break;
            };
            let deadline = Instant::now() + Duration::from_secs(5);
            while !complains(backend.log()) && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
            if complains(backend.log()) {
                break;
            }
            // Where the machine has much else to do, that was too short for any answer.
            assert_ne!(options.timeout, SLOW, "{limit}: {err}\n{}", backend.log());
            options.timeout = SLOW;
        }
        // It may have come as far as its socket, and no further, and be ending right now; not by a
        // crash.
        let lived = backend.lives();
        let status = if lived { backend.terminate() } else { backend.wait_end() };
        let log = backend.log();
        let gave_up = status.code().is_some_and(|code| code > 0 && code < 100)
            && log.lines().any(|line| line.starts_with("vublk: ") && complains(line.to_string()));
        assert!(gave_up || lived && status.success(), "{limit}: {status}, {log}");
    }
    // All 8 queues with their descriptors do not fit into any of these limits but the last.
    assert!(served <= 3, "{served} clients were served");
}
