//! `vublk serve --log-writes` is killed again and again while a guest writes.
//!
//! After each kill the log must be valid and hold all that was flushed. The next process, with the
//! same command, goes on with it; once the guest is back and has flushed, the log replays to the
//! image, byte for byte. So it is with the host's cache and without it, and with the log on a block
//! device. `VUBLK_TEST_SEED` repeats the random choices (not the moments of the kills).

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

mod common;

use common::guest::{Guest, SECTOR, words};
use common::{Backend, LoopDevice, Random, Setup};
use vublk::frontend::{Personality, SessionOptions};
use vublk::io::{HostFile, OpenOptions, block_on};
use vublk::write_log::{Entry, Log};

/// Size of the disk.
const DISK: u64 = 2 << 20;
/// How often the process is killed.
const KILLS: u32 = 100;

/// What the entries that the superblock counts make of a disk of zeros, from one look at the log
/// to the next.
struct Replay {
    log: PathBuf,
    disk: Vec<u8>,
    last: Option<Entry>,
}

impl Replay {
    fn new(log: &Path) -> Replay {
        Replay { log: log.into(), disk: vec![0; DISK as usize], last: None }
    }

    /// Applies what was counted since the last look; every entry is checked by that.
    fn catch_up(&mut self) {
        let file = HostFile::open(&self.log, OpenOptions::default()).unwrap();
        block_on(async {
            let log = Log::open(Arc::new(file)).await.unwrap();
            let counted = self.last.map_or(0, |last| last.number + 1);
            assert!(log.entries() >= counted, "entries have gone: {} of {counted}", log.entries());
            let mut walk = match &self.last {
                Some(last) => log.walk_after(last),
                None => log.walk(),
            };
            while let Some(entry) = walk.next().await.unwrap() {
                let range = entry.target.offset as usize..entry.target.end() as usize;
                match entry.data() {
                    Some(data) => {
                        let bytes = log.read_bytes(data).await.unwrap();
                        self.disk[range].copy_from_slice(&bytes);
                    }
                    None => self.disk[range].fill(0),
                }
                self.last = Some(entry);
            }
        });
    }

    fn words(&self) -> Vec<u64> {
        words(&self.disk)
    }
}

fn connect(backend: &Backend) -> vublk::frontend::Session {
    backend.open(SessionOptions::new(Personality::Qemu).queues(2))
}

fn flush(guest: &mut Guest) {
    let answer = guest.disk.execute(0, &vublk::frontend::Request::flush()).unwrap();
    answer.ok().unwrap();
}

/// Kills the process while two queues write, so often; `log` is a new log or a device for one.
fn survives_kills(test: &str, log: &Path, options: &[&str]) {
    let own = ["--log-writes", log.to_str().unwrap(), "--log-super-update-interval", "97"];
    let mut backend = Setup::new(&[&own[..], options].concat()).size(DISK).start();
    let random = Random::new(test);
    let mut guest = Guest::new(connect(&backend), random, (0..DISK / SECTOR).map(|_| 0));
    let mut replay = Replay::new(log);
    for round in 0..KILLS {
        let time = Duration::from_micros(guest.random.below(40_000));
        guest.work(time);
        backend.kill();
        replay.catch_up();
        for (at, word) in replay.words().into_iter().enumerate() {
            assert!(guest.is_possible(at, word), "round {round}: sector {at}: {word:x} logged");
        }
        backend.spawn();
        guest.disk.reconnect().unwrap_or_else(|err| panic!("round {round}: {err}"));
        guest.settle();
        flush(&mut guest);
        replay.catch_up();
        let image = words(&std::fs::read(&backend.image).unwrap());
        for (at, word) in replay.words().into_iter().enumerate() {
            assert_eq!(word, guest.now(at), "round {round}: sector {at}: not what was written");
            assert_eq!(word, image[at], "round {round}: sector {at}: the image differs");
        }
    }
    guest.disk.stop().unwrap();
    assert!(backend.terminate().success());
    replay.catch_up();
    let last = replay.last.unwrap();
    let counted_in = backend.log().matches("an earlier process had not counted").count();
    eprintln!(
        "{test}: {} entries, {} MiB; counted in after {counted_in} kills",
        last.number + 1,
        last.end_position() >> 20
    );
    assert!(counted_in > 10, "hardly ever was anything left to be counted in: {counted_in}");
}

#[test]
fn a_log_survives_a_hundred_kills() {
    let dir = tempfile::tempdir().unwrap();
    survives_kills("a_log_survives_a_hundred_kills", &dir.path().join("w.log"), &[]);
}

#[test]
fn without_the_hosts_cache() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("w.log");
    survives_kills("without_the_hosts_cache", &log, &["--cache", "none"]);
}

#[test]
fn with_the_log_on_a_device() {
    let dir = tempfile::tempdir().unwrap();
    let Some(device) = LoopDevice::new(&dir.path().join("device"), 8 << 30) else {
        return;
    };
    let sidecar = dir.path().join("sidecar");
    let options = ["--log-sidecar", sidecar.to_str().unwrap()];
    survives_kills("with_the_log_on_a_device", device.path(), &options);
}
