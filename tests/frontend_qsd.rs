//! The front-end against qemu-storage-daemon, a back-end that shares no code with it.
//!
//! Each test is skipped, with a line that says so, where the daemon is not installed.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use vublk::frontend::client::{feature, protocol};
use vublk::frontend::request::{STATUS_OK, STATUS_UNSUPP};
use vublk::frontend::{Layout, Personality, Request, Session, SessionOptions};

/// Size of the test disk.
const DISK: u64 = 16 << 20;

/// A running qemu-storage-daemon with one disk.
struct Daemon {
    child: Child,
    socket: PathBuf,
    image: PathBuf,
    _dir: tempfile::TempDir,
}

impl Daemon {
    /// Starts it; `None` where it is not installed.
    fn start(queues: u16) -> Option<Daemon> {
        let version = Command::new("qemu-storage-daemon").arg("--version").output();
        if !version.is_ok_and(|output| output.status.success()) {
            eprintln!("SKIPPED: qemu-storage-daemon is not installed");
            return None;
        }
        let dir = tempfile::tempdir().expect("a temporary directory");
        let image = dir.path().join("disk.raw");
        let file = std::fs::File::create(&image).expect("an image");
        file.set_len(DISK).expect("room for an image");
        let socket = dir.path().join("vu.sock");
        let mut daemon = Daemon { child: spawn(&image, &socket, queues), socket, image, _dir: dir };
        daemon.wait_up();
        Some(daemon)
    }

    /// Waits until the socket is there.
    fn wait_up(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !self.socket.exists() {
            assert!(Instant::now() < deadline, "qemu-storage-daemon did not come up");
            assert!(self.child.try_wait().expect("a child").is_none(), "it ended at once");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Kills it and starts it again on the same socket.
    fn restart(&mut self, queues: u16) {
        self.child.kill().expect("a living child");
        self.child.wait().expect("a child");
        std::fs::remove_file(&self.socket).expect("a stale socket");
        self.child = spawn(&self.image, &self.socket, queues);
        self.wait_up();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(image: &Path, socket: &Path, queues: u16) -> Child {
    Command::new("qemu-storage-daemon")
        .arg("--blockdev")
        .arg(format!("driver=file,node-name=f,filename={},discard=unmap", image.display()))
        .arg("--export")
        .arg(format!(
            "type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={},writable=on,\
             num-queues={queues}",
            socket.display()
        ))
        .stdin(Stdio::null())
        .spawn()
        .expect("qemu-storage-daemon starts")
}

fn open(daemon: &Daemon, personality: Personality, queues: u16) -> Session {
    let options = SessionOptions::new(personality).queues(queues);
    Session::open(&daemon.socket, options).expect("a session")
}

#[test]
fn every_request_does_what_it_says() {
    let Some(daemon) = Daemon::start(1) else { return };
    let mut disk = open(&daemon, Personality::Qemu, 1);
    assert_eq!(disk.config.bytes(), DISK);
    assert!(disk.features() & feature::FLUSH != 0);
    let data: Vec<u8> = (0..8192u32).map(|i| (i % 251) as u8).collect();
    disk.write(0, 4096, &data).unwrap();
    disk.flush(0).unwrap();
    assert_eq!(disk.read(0, 4096, 8192).unwrap(), data);
    let image = std::fs::read(&daemon.image).unwrap();
    assert_eq!(image[4096..4096 + 8192], data);

    disk.write_zeroes(0, 4096, 4096, false).unwrap();
    assert_eq!(disk.read(0, 4096, 4096).unwrap(), vec![0; 4096]);
    assert_eq!(disk.read(0, 8192, 4096).unwrap(), data[4096..]);
    disk.discard(0, 8192, 4096).unwrap();
    assert_eq!(disk.read(0, 8192, 4096).unwrap(), vec![0; 4096]);
    assert!(!disk.serial(0).unwrap().is_empty());

    // Failures come back as statuses, and the queue goes on.
    let unknown = Request { kind: 99, ..Request::flush() };
    assert_eq!(disk.execute(0, &unknown).unwrap().status, STATUS_UNSUPP);
    assert_ne!(disk.execute(0, &Request::read(DISK, 512)).unwrap().status, STATUS_OK);
    assert_eq!(disk.read(0, 0, 512).unwrap(), vec![0; 512]);
    let counters = disk.rings[0].counters();
    assert!(counters.kicks > 0 && counters.interrupts > 0);
    assert!(disk.pending(0).is_empty());
    disk.stop().unwrap();
}

#[test]
fn any_descriptor_layout_is_understood() {
    let Some(daemon) = Daemon::start(1) else { return };
    let mut disk = open(&daemon, Personality::Qemu, 1);
    let layouts = [
        Layout::default(),
        Layout::indirect(),
        Layout { segment: 512, ..Layout::default() },
        Layout { segment: 1000, ..Layout::indirect() },
        Layout { readable: vec![16 + 4096], ..Layout::default() },
        Layout { readable: vec![4, 5, 7], ..Layout::indirect() },
    ];
    for (i, layout) in layouts.iter().enumerate() {
        let data = vec![i as u8 + 1; 4096];
        let offset = i as u64 * 4096;
        let written = disk.execute_as(0, &Request::write(offset, data.clone()), layout).unwrap();
        assert_eq!((written.status, written.len), (STATUS_OK, 1), "{layout:?}");
        let read = disk.execute_as(0, &Request::read(offset, 4096), layout).unwrap();
        assert_eq!((read.status, read.len), (STATUS_OK, 4097), "{layout:?}");
        assert_eq!(read.data, data, "{layout:?}");
    }
    assert_eq!(disk.rings[0].free_descriptors(), 128);
}

#[test]
fn queues_are_independent_and_batches_complete() {
    let Some(daemon) = Daemon::start(4) else { return };
    let mut disk = open(&daemon, Personality::Qemu, 4);
    let deadline = disk.deadline();
    for queue in 0..4 {
        for i in 0..16u64 {
            let offset = (queue as u64 * 16 + i) * 512;
            let data = vec![(queue as u8) << 4 | i as u8; 512];
            disk.prepare(queue, &Request::write(offset, data), &Layout::indirect()).unwrap();
        }
        disk.publish(queue).unwrap();
    }
    for queue in (0..4).rev() {
        for _ in 0..16 {
            assert_eq!(disk.wait(queue, deadline).unwrap().status, STATUS_OK);
        }
    }
    for i in 0..64 {
        assert_eq!(disk.read(3, i * 512, 512).unwrap(), vec![i as u8; 512]);
    }
}

#[test]
fn all_three_personalities_get_a_disk() {
    let Some(daemon) = Daemon::start(1) else { return };
    for personality in [Personality::Qemu, Personality::CloudHypervisor, Personality::Firecracker] {
        let mut disk = open(&daemon, personality, 1);
        disk.write(0, 0, &[7; 512]).unwrap();
        assert_eq!(disk.read(0, 0, 512).unwrap(), [7; 512], "{personality:?}");
        let firecracker = personality == Personality::Firecracker;
        assert_eq!(disk.client.has_protocol(protocol::MQ), !firecracker);
    }
}

#[test]
fn queues_stop_and_start_again() {
    let Some(daemon) = Daemon::start(2) else { return };
    let mut disk = open(&daemon, Personality::Qemu, 2);
    for round in 0..3u8 {
        for queue in 0..2 {
            disk.write(queue, 512 * queue as u64, &[round; 512]).unwrap();
            assert_eq!(disk.read(queue, 512 * queue as u64, 512).unwrap(), [round; 512]);
        }
        disk.stop().unwrap();
        assert_eq!(disk.bases[0], disk.rings[0].next_available());
        disk.start().unwrap();
    }
}

#[test]
fn requests_left_in_flight_complete_after_a_restart() {
    let Some(mut daemon) = Daemon::start(1) else { return };
    let mut disk = open(&daemon, Personality::Qemu, 1);
    if !disk.client.has_protocol(protocol::INFLIGHT_SHMFD) {
        eprintln!("SKIPPED: this qemu-storage-daemon tracks nothing in flight");
        return;
    }
    disk.write(0, 0, &[1; 512]).unwrap();
    daemon.child.kill().unwrap();
    daemon.child.wait().unwrap();
    // Submitted to nobody: the next process must find them.
    let heads: Vec<u16> =
        (0..4).map(|i| disk.submit(0, &Request::write(i * 512, vec![9; 512])).unwrap()).collect();
    daemon.restart(1);
    disk.reconnect().unwrap();
    let deadline = disk.deadline();
    for head in heads {
        assert_eq!(disk.wait_head(0, head, deadline).unwrap().status, STATUS_OK);
    }
    assert_eq!(disk.read(0, 0, 2048).unwrap(), [9; 2048]);
    assert!(disk.inflight.as_ref().unwrap().inflight_heads(0).is_empty());
}

#[test]
fn memory_comes_and_goes_while_queues_run() {
    let Some(daemon) = Daemon::start(1) else { return };
    let mut disk = open(&daemon, Personality::Qemu, 1);
    let first = SessionOptions::default();
    let added = first.guest_addr + first.memory + (64 << 20);
    disk.hot_add(added, 1 << 20).unwrap();
    // A read into the new region, by a chain laid by hand.
    disk.write(0, 0, &[3; 4096]).unwrap();
    let request = Request::read(0, 4096);
    disk.memory.write(added, &request.readable()).unwrap();
    let chain = Layout::default().cut(added, 16, added + 4096, 4097);
    let ring = &mut disk.rings[0];
    let head = ring.add_chain(&chain).unwrap();
    ring.push(head);
    ring.publish();
    ring.kick_if_wanted().unwrap();
    ring.wait_used(Instant::now() + Duration::from_secs(10)).unwrap();
    let used = ring.take_used().unwrap();
    assert_eq!((used.id, used.len), (u32::from(head), 4097));
    ring.free_chain(used.id);
    assert_eq!(disk.memory.read_vec(added + 4096, 4097).unwrap()[..4096], [3; 4096]);
    disk.hot_remove(added).unwrap();
    assert_eq!(disk.read(0, 0, 512).unwrap(), [3; 512]);
}

#[test]
fn bench_verifies_a_disk_end_to_end() {
    let Some(daemon) = Daemon::start(2) else { return };
    let output = Command::new(env!("CARGO_BIN_EXE_vublk"))
        .args(["bench", "--rw", "randrw", "--verify", "--queues", "2", "--iodepth", "16"])
        .args(["--requests", "4000", "--ramp", "0", "--flush-every", "50", "--output", "json"])
        .arg("--socket-path")
        .arg(&daemon.socket)
        .output()
        .expect("vublk runs");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let load = &report["load"];
    assert!(load["requests"].as_u64().unwrap() >= 3900, "{text}");
    assert!(load["checked"].as_u64().unwrap() > 1000, "{text}");
    assert_eq!(load["mismatches"], 0, "{text}");
    assert_eq!(load["errors"], 0, "{text}");
    assert!(load["latency_us"]["p50"].as_f64().unwrap() > 0.0);
    assert!(report["backend"]["cpu_us_per_request"].as_f64().unwrap() > 0.0);
}

#[test]
fn bench_finds_data_that_changed_behind_its_back() {
    let Some(daemon) = Daemon::start(1) else { return };
    let mut bench = Command::new(env!("CARGO_BIN_EXE_vublk"))
        .args(["bench", "--rw", "randrw", "--verify", "--duration", "2", "--ramp", "0"])
        .args(["--range", "1m", "--output", "json", "--socket-path"])
        .arg(&daemon.socket)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("vublk runs");
    let vandal = std::fs::OpenOptions::new().write(true).open(&daemon.image).unwrap();
    let end = Instant::now() + Duration::from_secs(3);
    while bench.try_wait().unwrap().is_none() && Instant::now() < end {
        for block in 0..256u64 {
            std::os::unix::fs::FileExt::write_at(&vandal, &[0x55; 8], block * 4096 + 1000).unwrap();
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let output = bench.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(!output.status.success(), "{text}");
    let report: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert!(report["load"]["mismatches"].as_u64().unwrap() > 0, "{text}");
}

#[test]
fn bench_carries_on_across_kills() {
    let Some(mut daemon) = Daemon::start(2) else { return };
    let bench = Command::new(env!("CARGO_BIN_EXE_vublk"))
        .args(["bench", "--rw", "randrw", "--verify", "--duration", "3", "--ramp", "0"])
        .args(["--reconnect", "20", "--timeout", "20", "--queues", "2", "--output", "json"])
        // This daemon tracks nothing in flight, so there may be one request of each queue.
        .args(["--iodepth", "1", "--socket-path"])
        .arg(&daemon.socket)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("vublk runs");
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(600));
        daemon.restart(2);
    }
    let output = bench.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(report["load"]["outages_ms"].as_array().unwrap().len(), 3, "{text}");
    assert_eq!(report["load"]["mismatches"], 0, "{text}");
}
