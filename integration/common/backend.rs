//! The process under test: it serves one image on one vhost-user socket.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::Scratch;
use super::qmp::Qmp;
use super::scratch::text;

/// Which program serves the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// The program this package builds.
    Vublk,
    /// QEMU's storage daemon, to tell a fault of the tests from a fault of vublk. It has no
    /// in-flight tracking, so tests that kill the back-end mean nothing with it.
    StorageDaemon,
}

impl Program {
    /// What `VUBLK_TEST_BACKEND` asks for: `qsd`, or nothing for vublk.
    pub fn chosen() -> Program {
        match std::env::var("VUBLK_TEST_BACKEND").as_deref() {
            Ok("qsd") => Program::StorageDaemon,
            Ok("vublk") | Err(_) => Program::Vublk,
            Ok(other) => panic!("VUBLK_TEST_BACKEND is {other:?}; known are vublk and qsd"),
        }
    }
}

/// A disk and how it is to be served.
#[derive(Clone, Debug)]
pub struct Disk {
    image: PathBuf,
    format: &'static str,
    queues: u32,
    block_size: u32,
    read_only: bool,
    serial: Option<String>,
    control: bool,
    options: Vec<String>,
}

impl Disk {
    /// A raw image with one queue and blocks of 512 bytes.
    pub fn raw(image: &Path) -> Disk {
        Disk {
            image: image.to_owned(),
            format: "raw",
            queues: 1,
            block_size: 512,
            read_only: false,
            serial: None,
            control: false,
            options: Vec::new(),
        }
    }

    /// A qcow2 image, otherwise the same.
    pub fn qcow2(image: &Path) -> Disk {
        Disk { format: "qcow2", ..Disk::raw(image) }
    }

    /// An add-cow image, otherwise the same.
    pub fn add_cow(image: &Path) -> Disk {
        Disk { format: "add-cow", ..Disk::raw(image) }
    }

    /// A VHDX image, otherwise the same.
    pub fn vhdx(image: &Path) -> Disk {
        Disk { format: "vhdx", ..Disk::raw(image) }
    }

    /// Has the back-end listen on a control socket, too: see [`Backend::qmp`].
    pub fn controlled(mut self) -> Disk {
        self.control = true;
        self
    }

    /// Records every write in this log.
    pub fn recorded(mut self, log: &Path) -> Disk {
        self.options.extend(["--log-writes".into(), text(log).into()]);
        self
    }

    /// Not the image, but a state of a log of it; what is written to that is forgotten at the end.
    pub fn crash_state(mut self, log: &Path, state: &str) -> Disk {
        self.options.extend(["--log", text(log), "--state", state].map(String::from));
        // What comes next is the image.
        self.options.push("--base".into());
        self
    }

    /// Neither takes nor respects locks of the image.
    pub fn unlocked(mut self) -> Disk {
        self.options.push("--no-lock".into());
        self
    }

    /// Serves up to this many queues.
    pub fn queues(mut self, queues: u32) -> Disk {
        self.queues = queues;
        self
    }

    /// Sets the logical block size.
    pub fn block_size(mut self, bytes: u32) -> Disk {
        self.block_size = bytes;
        self
    }

    /// Serves the disk without the right to write.
    pub fn read_only(mut self) -> Disk {
        self.read_only = true;
        self
    }

    /// Sets the serial number that the guest reads.
    pub fn serial(mut self, serial: &str) -> Disk {
        self.serial = Some(serial.to_owned());
        self
    }
}

/// A running back-end. Dropping it kills it.
pub struct Backend {
    program: Program,
    disk: Disk,
    socket: PathBuf,
    log: PathBuf,
    child: Child,
}

impl Backend {
    /// Starts the chosen program and waits for its socket.
    pub fn start(scratch: &Scratch, disk: &Disk) -> Backend {
        let program = Program::chosen();
        let socket = scratch.socket("disk.sock");
        let log = scratch.file("backend.log");
        File::create(&log).expect("a log file");
        let child = spawn(program, disk, &socket, &log);
        let mut backend = Backend { program, disk: disk.clone(), socket, log, child };
        backend.await_socket();
        backend
    }

    /// Has `vublk` explore with these arguments, and show states to a guest. What it prints goes to
    /// `report`.
    pub fn explore(scratch: &Scratch, vublk: &Path, arguments: &[&str], report: &Path) -> Backend {
        let socket = scratch.socket("explore.sock");
        let log = scratch.file("explore.log");
        let child = Command::new(vublk)
            .args(["log", "explore", "--guest", text(&socket)])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(File::create(report).expect("a file for the report"))
            .stderr(File::create(&log).expect("a log file"))
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {}: {error}", vublk.display()));
        let disk = Disk::raw(Path::new("a state"));
        let mut backend = Backend { program: Program::Vublk, disk, socket, log, child };
        backend.await_socket();
        backend
    }

    /// Waits for its end.
    #[track_caller]
    pub fn await_end(&mut self, end: Instant) -> ExitStatus {
        loop {
            if let Some(status) = self.child.try_wait().expect("a status") {
                return status;
            }
            assert!(Instant::now() < end, "the back-end did not end:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The socket it listens on.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Opens its control socket.
    pub fn qmp(&self, end: Instant) -> Qmp {
        assert!(self.disk.control, "a disk that is controlled");
        Qmp::connect(&control(&self.socket), end)
    }

    /// The number of queues it serves.
    pub fn queues(&self) -> u32 {
        self.disk.queues
    }

    /// Which program it is.
    pub fn program(&self) -> Program {
        self.program
    }

    /// What it printed so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Kills it so that it can do nothing about it, as a crash would.
    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.child.wait().expect("a killed back-end ends");
    }

    /// Asks it to stop, and returns how it ended. Panics if it takes longer than a minute.
    pub fn terminate(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.await_end(Instant::now() + Duration::from_secs(60))
    }

    /// Asks it to stop, and asserts that it ends in order.
    #[track_caller]
    pub fn assert_stops(&mut self) {
        let status = self.terminate();
        assert!(status.success(), "on SIGTERM the back-end ended with {status}:\n{}", self.log());
    }

    /// Starts it again after it ended, with the same command. Does not wait: whoever connects
    /// tries again by itself.
    pub fn restart(&mut self) {
        self.child = spawn(self.program, &self.disk, &self.socket, &self.log);
    }

    /// Panics if it has ended.
    pub fn assert_alive(&mut self) {
        if let Some(status) = self.child.try_wait().expect("a status") {
            panic!("the back-end ended by itself: {status}");
        }
    }

    /// Waits until the socket is there. It is looked at, not connected to: a connection would be
    /// a client.
    pub fn await_socket(&mut self) {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            self.assert_alive();
            let found = std::fs::symlink_metadata(&self.socket);
            if found.is_ok_and(|found| found.file_type().is_socket()) {
                return;
            }
            assert!(Instant::now() < end, "no socket {} after a minute", self.socket.display());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn signal(&mut self, signal: Signal) {
        self.assert_alive();
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).expect("our own child can be signalled");
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- back-end's log\n{}", super::tail(&self.log, 40));
        }
    }
}

fn spawn(program: Program, disk: &Disk, socket: &Path, log: &Path) -> Child {
    let mut command = match program {
        Program::Vublk => vublk(disk, socket),
        Program::StorageDaemon => storage_daemon(disk, socket),
    };
    let log = OpenOptions::new().append(true).open(log).expect("the log file");
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("a second handle"))
        .stderr(log)
        .spawn()
        .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"))
}

fn vublk(disk: &Disk, socket: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vublk"));
    command.args(["serve", "--socket-path", text(socket), "-f", disk.format]);
    command.args(["--num-queues", &disk.queues.to_string()]);
    if disk.block_size != 512 {
        command.args(["--block-size", &disk.block_size.to_string()]);
    }
    if let Some(serial) = &disk.serial {
        command.args(["--serial", serial]);
    }
    if disk.read_only {
        command.arg("--read-only");
    }
    if disk.control {
        command.arg("--control").arg(control(socket));
    }
    command.args(&disk.options).arg(&disk.image);
    command
}

/// The control socket beside a disk's socket.
fn control(socket: &Path) -> PathBuf {
    socket.with_extension("qmp")
}

fn storage_daemon(disk: &Disk, socket: &Path) -> Command {
    let Disk { image, format, queues, block_size, .. } = disk;
    let rights = if disk.read_only { "read-only=on" } else { "read-only=off,discard=unmap" };
    let writable = if disk.read_only { "off" } else { "on" };
    let mut command = Command::new("qemu-storage-daemon");
    command.arg("--blockdev").arg(format!(
        "driver=file,node-name=file,filename={},locking=off,{rights}",
        image.display()
    ));
    command.arg("--blockdev").arg(format!("driver={format},node-name=disk,file=file,{rights}"));
    command.arg("--export").arg(format!(
        "type=vhost-user-blk,id=disk,node-name=disk,addr.type=unix,addr.path={},\
         writable={writable},num-queues={queues},logical-block-size={block_size}",
        socket.display()
    ));
    command
}
