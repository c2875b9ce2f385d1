//! `vublk serve` of a qcow2, add-cow or VHDX image is killed again and again while a guest writes.
//!
//! The guest is our own front-end, which keeps its in-flight area and reconnects as QEMU does. It
//! must find every write that it saw completed, flushed or not. If it does not come back, a new one
//! must find what was flushed, and the image must never be worse than leaky.
//!
//! `VUBLK_TEST_SEED` repeats the random choices (not the moments of the kills).

use std::path::Path;
use std::process::Output;
use std::time::Duration;

mod common;

use common::guest::{Guest, SECTOR, sector, words};
use common::{Backend, Random, Setup, have, ok, tool, tool_ok, vublk};
use vublk::frontend::{Personality, Request, Session, SessionOptions};

/// Size of the disk; the last cluster is not a whole one.
const DISK: u64 = (12 << 20) + 7 * SECTOR;
/// Size of the backing file, which ends in the middle of a cluster.
const BASE: u64 = (9 << 20) + 3 * SECTOR;
/// How often the process is killed in a test.
const KILLS: u32 = 24;
const QUEUES: u16 = 2;

/// What image is served, over a raw one.
#[derive(Clone, Copy, Debug)]
enum Image {
    /// With clusters of this size.
    Qcow2(&'static str),
    AddCow,
    /// Differencing, over a dynamic parent that holds the backing file's content; or over nothing.
    Vhdx {
        has_parent: bool,
    },
}

impl Image {
    fn format(self) -> &'static str {
        match self {
            Image::Qcow2(_) => "qcow2",
            Image::AddCow => "add-cow",
            Image::Vhdx { .. } => "vhdx",
        }
    }

    fn has_backing(self) -> bool {
        !matches!(self, Image::Vhdx { has_parent: false })
    }

    /// Whether this machine has what the test needs; says so if not.
    fn can_be_checked(self) -> bool {
        !matches!(self, Image::Qcow2(_)) || have("qemu-img")
    }
}

/// The process under test, restarted always with the same command.
struct Server {
    backend: Backend,
    image: Image,
    /// Where the image, its backing file and what is made of them are.
    dir: tempfile::TempDir,
    /// On tmpfs, unless the test wants it otherwise.
    state: tempfile::TempDir,
}

impl Server {
    /// `is_named`: whether the state directory is named, or merely offered.
    fn start(image: Image, state: tempfile::TempDir, is_named: bool) -> Server {
        let dir = tempfile::tempdir().unwrap();
        let base: Vec<u8> = (0..BASE / SECTOR).flat_map(|at| sector(base_word(at))).collect();
        std::fs::write(dir.path().join("base.raw"), base).unwrap();
        let mut options = format!("size={DISK}");
        if let Image::Qcow2(cluster_size) = image {
            options += &format!(",cluster_size={cluster_size}");
        }
        if matches!(image, Image::Vhdx { .. }) {
            options += ",block_size=1M";
        }
        let format = image.format();
        let mut create = vec!["create", "-q", "-f", format, "-o", &options];
        match image {
            Image::Vhdx { has_parent: false } => {}
            Image::Vhdx { has_parent: true } => {
                ok(dir.path(), &["convert", "-q", "-f", "raw", "-O", "vhdx", "base.raw", "base"]);
                create.extend(["-b", "base", "-F", "vhdx"]);
            }
            Image::Qcow2(_) | Image::AddCow => create.extend(["-b", "base.raw", "-F", "raw"]),
        }
        create.push("disk");
        ok(dir.path(), &create);
        let setup = match is_named {
            true => Setup::new(&["--state-dir", state.path().to_str().unwrap()]),
            false => Setup::new(&[]).env("RUNTIME_DIRECTORY", state.path()),
        };
        let backend = setup.format(format, &dir.path().join("disk")).start();
        Server { backend, image, dir, state }
    }

    fn kill(&mut self) {
        self.backend.kill();
    }

    fn restart(&mut self) {
        self.backend.spawn();
    }

    /// Ends it in order; nothing may be kept any more.
    fn stop(&mut self) {
        assert!(self.backend.terminate().success());
        let left: Vec<_> = std::fs::read_dir(self.state.path()).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
    }

    /// Asks both checkers, where there are two. Leaks are what kills leave in qcow2; anything else
    /// is an error.
    fn check(&self) {
        if matches!(self.image, Image::Vhdx { .. }) {
            return;
        }
        let args = ["check", "-U", "-f", self.image.format(), "--output=json", "disk"];
        let ours = vublk(self.dir.path(), &args);
        if matches!(self.image, Image::AddCow) {
            assert_eq!(ours.status.code(), Some(0), "{ours:?}");
            return;
        }
        let json = |output: Output| {
            assert!(matches!(output.status.code(), Some(0 | 3)), "{output:?}");
            serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
        };
        assert_eq!(json(ours), json(tool(self.dir.path(), "qemu-img", &args)));
    }

    /// What QEMU, or else we, read from the image.
    fn content(&self) -> Vec<u8> {
        let convert = ["convert", "-f", self.image.format(), "-O", "raw", "disk", "out.raw"];
        match self.image {
            Image::Qcow2(_) => tool_ok(self.dir.path(), "qemu-img", &convert),
            Image::AddCow | Image::Vhdx { .. } => ok(self.dir.path(), &convert),
        };
        std::fs::read(self.dir.path().join("out.raw")).unwrap()
    }
}

fn on_tmpfs() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("vublk-kill-").tempdir_in("/dev/shm").unwrap()
}

/// What the backing file holds.
fn base_word(at: u64) -> u64 {
    0xba5e_0000_0000_0000 | at
}

/// A guest on a fresh disk.
fn guest(server: &Server, name: &str) -> Guest {
    let below = if server.image.has_backing() { BASE / SECTOR } else { 0 };
    let word = |at: u64| if at < below { base_word(at) } else { 0 };
    Guest::new(connect(server), Random::new(name), (0..DISK / SECTOR).map(word))
}

fn connect(server: &Server) -> Session {
    let options = SessionOptions::new(Personality::Qemu).queues(QUEUES);
    server.backend.open(options)
}

/// The guest lives on. Every completed write must be there, every time.
fn comes_back(image: Image, state: tempfile::TempDir, is_named: bool, kills: u32) {
    if !image.can_be_checked() {
        return;
    }
    let mut server = Server::start(image, state, is_named);
    let mut guest = guest(&server, &format!("comes_back, {image:?}"));
    let mut while_redoing = 0;
    for round in 0..kills {
        let time = Duration::from_micros(guest.random.below(120_000));
        guest.work(time);
        server.kill();
        server.restart();
        // Also while it takes over what its predecessor left.
        while guest.random.below(3) == 0 {
            let delay = Duration::from_micros(guest.random.below(40_000));
            let reconnected = std::thread::scope(|scope| {
                scope.spawn(|| {
                    std::thread::sleep(delay);
                    server.kill();
                });
                guest.disk.options.timeout = Duration::from_millis(500);
                let reconnected = guest.disk.reconnect();
                guest.disk.options.timeout = Duration::from_secs(20);
                reconnected
            });
            while_redoing += u32::from(reconnected.is_err());
            server.restart();
        }
        guest.disk.reconnect().unwrap_or_else(|err| panic!("round {round}: {err}"));
        guest.settle();
        guest.verify();
    }
    eprintln!("{} requests, {while_redoing} more kills while reconnecting", guest.completed);
    guest.work(Duration::from_millis(50));
    guest.settle();
    guest.disk.stop().unwrap();
    server.stop();
    server.check();
    for (at, word) in words(&server.content()).into_iter().enumerate() {
        assert_eq!(word, guest.now(at), "sector {at} of the image");
    }
}

#[test]
fn completed_writes_survive_kills() {
    comes_back(Image::Qcow2("64k"), on_tmpfs(), true, KILLS);
}

#[test]
fn completed_writes_survive_kills_with_small_clusters() {
    comes_back(Image::Qcow2("4k"), on_tmpfs(), true, KILLS);
}

/// Without a directory on tmpfs, what allocates waits for the disk.
#[test]
fn completed_writes_survive_kills_without_a_state_directory() {
    comes_back(Image::Qcow2("64k"), tempfile::tempdir().unwrap(), false, 6);
}

#[test]
fn completed_writes_to_add_cow_survive_kills() {
    comes_back(Image::AddCow, on_tmpfs(), true, KILLS);
}

#[test]
fn completed_writes_to_add_cow_survive_kills_without_a_state_directory() {
    comes_back(Image::AddCow, tempfile::tempdir().unwrap(), false, 6);
}

#[test]
fn completed_writes_to_vhdx_survive_kills() {
    comes_back(Image::Vhdx { has_parent: false }, on_tmpfs(), true, KILLS);
}

#[test]
fn completed_writes_to_differencing_vhdx_survive_kills() {
    comes_back(Image::Vhdx { has_parent: true }, on_tmpfs(), true, KILLS);
}

#[test]
fn completed_writes_to_vhdx_survive_kills_without_a_state_directory() {
    comes_back(Image::Vhdx { has_parent: true }, tempfile::tempdir().unwrap(), false, 6);
}

/// What is kept for the guest is gone after a kill. It must not go on as if nothing had happened.
#[test]
fn a_guest_whose_kept_writes_are_gone_is_refused() {
    let mut server = Server::start(Image::Qcow2("64k"), on_tmpfs(), true);
    let mut guest = guest(&server, "a_guest_whose_kept_writes_are_gone_is_refused");
    let elsewhere = on_tmpfs();

    guest.work(Duration::from_millis(50));
    guest.settle();
    server.kill();
    move_all(server.state.path(), elsewhere.path());
    server.restart();
    is_refused(&server, &mut guest, 1);
    // That has decided nothing: with the right state directory all is well.
    server.kill();
    move_all(elsewhere.path(), server.state.path());
    server.restart();
    guest.disk.reconnect().unwrap();
    guest.settle();
    guest.verify();

    // Now it is lost for good. A guest that was reset has a new session.
    guest.work(Duration::from_millis(50));
    guest.settle();
    server.kill();
    move_all(server.state.path(), elsewhere.path());
    server.restart();
    is_refused(&server, &mut guest, 2);
    hang_up(&mut guest.disk);
    guest.replace(connect(&server));

    // A process that ends in order leaves nothing to lose.
    guest.work(Duration::from_millis(50));
    guest.settle();
    server.stop();
    server.restart();
    guest.disk.reconnect().unwrap();
    guest.verify();
    guest.disk.stop().unwrap();
    server.stop();
}

/// Demands that the guest's queues do not start, which QEMU does not ask about, and that the log has
/// said so `times` by now.
fn is_refused(server: &Server, guest: &mut Guest, times: usize) {
    let refusal = "queue 0 cannot start: disk: what its guest completed and did not flush was kept";
    guest.disk.reconnect().unwrap();
    common::wait_until("the refusal", || server.backend.log().matches(refusal).count() == times);
    guest.submit(0);
    std::thread::sleep(Duration::from_millis(50));
    assert!(!guest.poll(0), "a request completes");
}

/// Moves all files, over those that are there.
fn move_all(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::rename(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// The guest dies with the process. What it flushed must be there for the next one.
fn dies(image: Image) {
    if !image.can_be_checked() {
        return;
    }
    let mut server = Server::start(image, on_tmpfs(), true);
    let mut guest = guest(&server, &format!("dies, {image:?}"));
    for _ in 0..KILLS {
        let time = Duration::from_micros(guest.random.below(150_000));
        guest.work(time);
        server.kill();
        server.check();
        server.restart();
        guest.replace(connect(&server));
    }
    guest.settle();
    guest.verify();
    guest.disk.stop().unwrap();
    server.stop();
    server.check();
    for (at, word) in words(&server.content()).into_iter().enumerate() {
        assert_eq!(word, guest.now(at), "sector {at} of the image");
    }
}

#[test]
fn flushed_writes_survive_the_guest() {
    dies(Image::Qcow2("64k"));
}

#[test]
fn flushed_writes_to_add_cow_survive_the_guest() {
    dies(Image::AddCow);
}

#[test]
fn flushed_writes_to_vhdx_survive_the_guest() {
    dies(Image::Vhdx { has_parent: false });
    dies(Image::Vhdx { has_parent: true });
}

/// Closes the connection: one front-end is served at a time.
fn hang_up(disk: &mut Session) {
    let (nobody, _) = vublk::frontend::Wire::pair().unwrap();
    disk.client = vublk::frontend::Client::new(nobody, Duration::ZERO);
}

/// The connection breaks, and the process lives on: the same, without a restart in between. Then a
/// new guest comes to the same process, and one that may only read.
#[test]
fn sessions_follow_each_other_in_one_process() {
    if !have("qemu-img") {
        return;
    }
    let mut server = Server::start(Image::Qcow2("64k"), on_tmpfs(), true);
    let mut guest = guest(&server, "sessions_follow_each_other_in_one_process");
    for round in 0..6 {
        guest.work(Duration::from_millis(60));
        guest.disk.reconnect().unwrap_or_else(|err| panic!("round {round}: {err}"));
        guest.settle();
        guest.verify();
    }
    for _ in 0..3 {
        guest.work(Duration::from_millis(60));
        guest.settle();
        guest.disk.stop().unwrap();
        hang_up(&mut guest.disk);
        guest.replace(connect(&server));
    }
    guest.work(Duration::from_millis(60));
    guest.settle();
    server.stop();
    server.check();

    let image = server.dir.path().join("disk");
    server.backend = Setup::new(&["--read-only"]).format("qcow2", &image).start();
    let mut disk = connect(&server);
    let answer = disk.execute(0, &Request::write(0, vec![1; 512])).unwrap();
    assert!(answer.ok().is_err(), "a write to a read-only disk");
    guest.replace(disk);
    guest.verify();
    guest.disk.stop().unwrap();
    server.stop();
}
