//! What the guest tests share.
//!
//! ```text
//!  test ──► Scratch   directories for the images and the sockets of one test
//!       ──► Backend   the process under test: vublk, or qemu-storage-daemon as a stand-in
//!       ──► Guest     a QEMU process; lines from and to its serial port, with a deadline
//!              │         job: a cpio archive appended to the base initramfs
//!              └─► Qmp   QEMU's own control socket
//!       ──► load      random writes and checks; the same code runs inside the guest
//! ```
//!
//! Everything that waits has a deadline, and every process is killed when its owner is dropped, so
//! a test that fails leaves nothing behind. A test that panics prints the ends of the back-end's
//! log and of the guest's serial port.

// Each test program is built with all of this and uses a part.
#![allow(dead_code)]

pub mod backend;
pub mod cpio;
pub mod guest;
pub mod load;
pub mod qmp;
pub mod scratch;

pub use backend::{Backend, Disk, Program};
pub use guest::{Boot, Guest};
pub use scratch::Scratch;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Condvar, Mutex};

/// Returns from the test when guests cannot be booted here.
macro_rules! need_guests {
    ($test:literal) => {
        if !$crate::common::can_boot($test) {
            return;
        }
    };
}

/// Returns from the test when the stand-in cannot do what the test is about.
macro_rules! need_vublk {
    ($test:literal, $why:literal) => {
        if $crate::common::Program::chosen() != $crate::common::Program::Vublk {
            $crate::common::skip($test, concat!("the stand-in ", $why));
            return;
        }
    };
}

/// How long one boot may take from QEMU's start to its end.
pub const BOOT_DEADLINE_S: u64 = 300;

/// Guests that run at the same time, whatever the number of test threads.
const SLOTS: usize = 2;

static FREE_SLOTS: (Mutex<usize>, Condvar) = (Mutex::new(SLOTS), Condvar::new());

/// The right to run one guest; given back when dropped.
pub struct Slot(());

impl Slot {
    /// Waits for a free place.
    pub fn take() -> Slot {
        let (free, freed) = &FREE_SLOTS;
        let mut free = free.lock().unwrap_or_else(|broken| broken.into_inner());
        while *free == 0 {
            free = freed.wait(free).unwrap_or_else(|broken| broken.into_inner());
        }
        *free -= 1;
        Slot(())
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let (free, freed) = &FREE_SLOTS;
        *free.lock().unwrap_or_else(|broken| broken.into_inner()) += 1;
        freed.notify_one();
    }
}

/// Prints a line that the test runner does not swallow, as it does with `println!` of a test that
/// passes.
pub fn announce(line: &str) {
    let mut out = std::io::stderr().lock();
    // The leading newline ends what the runner may have begun to print.
    let _ = out.write_all(format!("\n{line}\n").as_bytes());
}

/// Where `integration/setup` puts the kernel and the base initramfs.
pub fn images() -> PathBuf {
    if let Some(dir) = std::env::var_os("VUBLK_INTEGRATION_DIR") {
        return dir.into();
    }
    // Cargo makes `tmp` inside the target directory, or inside the part of it that is for the
    // target it builds for.
    let tmp = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let mut places = tmp.ancestors().skip(1).take(2).map(|dir| dir.join("integration"));
    places.clone().find(|dir| dir.exists()).or_else(|| places.next()).expect("tmp has a parent")
}

/// Tells whether a program can be started.
pub fn has_program(name: &str) -> bool {
    Command::new(name).arg("--version").output().is_ok()
}

/// Tells whether guests can be booted here. If not, says so in a line that begins with `SKIP:`,
/// or panics when `VUBLK_REQUIRE_GUESTS` is set: what CI prepared must not be skipped silently.
pub fn can_boot(test: &str) -> bool {
    are_there(
        test,
        &["qemu-system-x86_64"],
        &[images().join("vmlinux"), images().join("base.cpio")],
    )
}

/// The same for what guests need to boot from a disk.
pub fn can_make_bootable(test: &str) -> bool {
    let edk_ii = guest::EDK_II.map(PathBuf::from);
    are_there(test, &["grub-mkrescue", "xorriso", "mformat"], &edk_ii)
}

fn are_there(test: &str, programs: &[&str], files: &[PathBuf]) -> bool {
    let mut missing: Vec<String> = Vec::new();
    missing.extend(programs.iter().filter(|name| !has_program(name)).map(|name| name.to_string()));
    let absent = files.iter().filter(|path| !path.exists());
    missing.extend(absent.map(|path| path.display().to_string()));
    if missing.is_empty() {
        return true;
    }
    skip(test, &format!("{} missing; run integration/setup", missing.join(", ")));
    false
}

/// Reports that a test was not run.
pub fn skip(test: &str, why: &str) {
    assert!(std::env::var_os("VUBLK_REQUIRE_GUESTS").is_none(), "guests are required, but: {why}");
    announce(&format!("SKIP: {test}: {why}"));
}

/// Runs a program to its end and returns what it printed; panics with that if it fails.
#[track_caller]
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("cannot start {program}: {error}"));
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{program} {arguments:?}: {}\n{text}", output.status);
    text
}

/// Runs a command of vublk's to its end and returns what it printed; panics with that if it fails.
#[track_caller]
pub fn vublk(arguments: &[&str]) -> String {
    run(env!("CARGO_BIN_EXE_vublk"), arguments)
}

/// The last `count` lines of a file, for a failing test's report.
pub fn tail(path: &Path, count: usize) -> String {
    let bytes = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}
