//! A daemon with one disk, its control socket and its state directory, in directories of its own.

use std::path::{Path, PathBuf};

use serde_json::json;
use vublk::frontend::{Personality, SessionOptions};

use super::guest::{Guest, SECTOR, sector, words};
use super::{Backend, Qmp, Random, Setup, ok, vublk};

const QUEUES: u16 = 2;

/// What a base is filled with.
pub fn base_word(at: u64) -> u64 {
    0xba5e_0000_0000_0000 | at
}

/// See the module's text.
pub struct Host {
    pub backend: Backend,
    pub dir: tempfile::TempDir,
    pub state: tempfile::TempDir,
    /// Size of the disk in sectors.
    sectors: u64,
}

impl Host {
    /// With nothing served yet, and an image `base` full of data, of this size in bytes.
    pub fn with_base(size: u64) -> Host {
        let host = Host::new(size);
        let data: Vec<u8> = (0..host.sectors).flat_map(|at| sector(base_word(at))).collect();
        std::fs::write(host.path("base"), data).unwrap();
        host
    }

    /// That serves a new image `disk` of this size in bytes.
    pub fn with_disk(format: &'static str, size: u64) -> Host {
        let mut host = Host::new(size);
        ok(host.dir.path(), &["create", "-q", "-f", format, "disk", &size.to_string()]);
        host.backend = host.setup(format, "disk", &[]).start();
        host
    }

    fn new(size: u64) -> Host {
        let dir = tempfile::Builder::new().prefix("vublk-").tempdir().unwrap();
        let state = tempfile::Builder::new().prefix("vublk-").tempdir_in("/dev/shm").unwrap();
        Host { backend: Setup::new(&[]).prepare(), dir, state, sectors: size / SECTOR }
    }

    /// How an image is served, with more options.
    pub fn setup(&self, format: &'static str, image: impl AsRef<Path>, more: &[&str]) -> Setup {
        let (state, control) = (self.state.path().to_str().unwrap(), self.path("control.sock"));
        let mut args = vec!["--state-dir", state, "--control", control.to_str().unwrap()];
        args.extend(more);
        Setup::new(&args).format(format, &self.path(image))
    }

    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn qmp(&self) -> Qmp {
        Qmp::connect(&self.path("control.sock"))
    }

    /// A guest of a disk that shows the base.
    pub fn guest(&self, name: &str) -> Guest {
        let disk = self.backend.open(SessionOptions::new(Personality::Qemu).queues(QUEUES));
        Guest::new(disk, Random::new(name), (0..self.sectors).map(base_word))
    }

    /// Ends it in order; nothing may be kept any more.
    pub fn stop(&mut self, guest: &mut Guest) {
        guest.disk.stop().unwrap();
        assert!(self.backend.terminate().success(), "{}", self.backend.log());
        let left: Vec<_> = std::fs::read_dir(self.state.path()).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
    }

    /// What an image shows, in use or not.
    pub fn content(&self, format: &str, image: &str) -> Vec<u64> {
        ok(self.dir.path(), &["convert", "-q", "-U", "-f", format, "-O", "raw", image, "out"]);
        words(&std::fs::read(self.path("out")).unwrap())
    }

    /// Demands that an image that nobody uses is the guest's disk, and sound.
    pub fn is_disk(&self, guest: &Guest, format: &str, image: &str) {
        if format != "raw" {
            ok(self.dir.path(), &["check", "-f", format, image]);
        }
        self.shows(guest, format, image);
    }

    /// The same of an image whose process was killed: what was allocated when a kill came belongs to
    /// nobody, and qcow2 says so. Nothing else may be wrong.
    pub fn is_disk_of_killed(&self, guest: &Guest, format: &str, image: &str) {
        if format != "qcow2" {
            return self.is_disk(guest, format, image);
        }
        let check = vublk(self.dir.path(), &["check", "-f", format, image]);
        assert!(matches!(check.status.code(), Some(0 | 3)), "{check:?}");
        self.shows(guest, format, image);
    }

    /// Demands that an image that nobody uses shows the guest's disk.
    fn shows(&self, guest: &Guest, format: &str, image: &str) {
        let content = self.content(format, image);
        assert_eq!(content.len() as u64, self.sectors);
        for (at, word) in content.into_iter().enumerate() {
            assert_eq!(word, guest.now(at), "sector {at} of {image}");
        }
    }

    pub fn snapshot(&self, qmp: &mut Qmp, name: &str, format: &str) {
        let file = self.path(name);
        let arguments = json!({"device": "disk", "snapshot-file": file, "format": format});
        qmp.ok("blockdev-snapshot-sync", arguments);
    }
}
