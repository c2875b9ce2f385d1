//! A guest: a QEMU process that boots our kernel with a job.
//!
//! The guest says things by lines that begin with `@@` on its serial port, and hears lines there.
//! `@@NAME rest` answers [`Guest::expect`]. The first process, `integration/guest-init`, ends each
//! run with `@@rc STATUS` and powers off.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::backend::{Backend, Program};
use super::cpio::Archive;
use super::qmp::Qmp;
use super::scratch::text;
use super::{BOOT_DEADLINE_S, Scratch, Slot};

/// What to boot.
pub struct Boot<'a> {
    scratch: &'a Scratch,
    name: &'a str,
    job: String,
    cpus: u32,
    reboots: bool,
    behind_port: bool,
    memory_slots: bool,
    own_program: bool,
    mailbox: bool,
    firmware: Option<Firmware>,
    incoming: Option<String>,
    deadline: Duration,
}

/// What reads the first sectors of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Firmware {
    /// SeaBIOS.
    Bios,
    /// EDK II, as Debian has it.
    Efi,
}

/// Where Debian puts EDK II: the program, and the template of its variables.
pub const EDK_II: [&str; 2] =
    ["/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"];

/// What QEMU 10.0 says when it fails now and then under TCG with several processors, while the guest
/// sets up its devices.
const QEMU_BUG: &str = "iotlb_to_section: Assertion";

/// What our kernel is told.
const COMMAND_LINE: &str = "console=ttyS0 panic=-1 quiet loglevel=1 tsc=reliable mitigations=off \
    random.trust_cpu=on no_timer_check nokaslr apparmor=0 audit=0 8250.nr_uarts=1";

impl<'a> Boot<'a> {
    /// A guest that runs `job`, a shell script under `set -e`. `name` tells this boot's files from
    /// those of others in the same test.
    pub fn new(scratch: &'a Scratch, name: &'a str, job: impl Into<String>) -> Boot<'a> {
        Boot {
            scratch,
            name,
            job: job.into(),
            cpus: 1,
            reboots: false,
            behind_port: false,
            memory_slots: false,
            own_program: false,
            mailbox: false,
            firmware: None,
            incoming: None,
            deadline: Duration::from_secs(BOOT_DEADLINE_S),
        }
    }

    /// For a job that takes longer than others.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// The number of processors. Linux uses no more queues than it has of them.
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// Lets the guest reboot. Otherwise a reboot ends QEMU.
    pub fn reboots(mut self) -> Self {
        self.reboots = true;
        self
    }

    /// Puts the disk behind a port that it can be pulled out of.
    pub fn behind_port(mut self) -> Self {
        self.behind_port = true;
        self
    }

    /// Leaves room for more memory, which is plugged in while the guest runs.
    pub fn memory_slots(mut self) -> Self {
        self.memory_slots = true;
        self
    }

    /// Puts this test program into the guest as `/bin/guest-test`, for [`super::load`].
    pub fn with_own_program(mut self) -> Self {
        self.own_program = true;
        self
    }

    /// Gives it the back-end's mailbox as `/dev/vdb`, and `/bin/crash-guest`, which answers there.
    pub fn with_mailbox(mut self) -> Self {
        self.mailbox = true;
        self
    }

    /// Has the machine's firmware boot from the disk, which [`Boot::write_disk`] has made, with the drivers
    /// that firmware has. Otherwise QEMU loads the kernel.
    pub fn by_firmware(mut self, firmware: Firmware) -> Self {
        self.firmware = Some(firmware);
        self
    }

    /// Makes a raw disk of so many bytes that either firmware boots: GRUB, which says `@@grub` and its
    /// platform, our kernel, and the job.
    pub fn write_disk(&self, path: &Path, size: u64) {
        let root = self.scratch.file(&format!("{}.root", self.name));
        let boot = root.join("boot");
        std::fs::create_dir_all(boot.join("grub")).expect("a directory");
        let version = std::fs::read_to_string(super::images().join("kernel/version"));
        let version = version.expect("integration/setup writes it");
        let kernel = format!("kernel/boot/vmlinuz-{}", version.trim());
        std::fs::copy(super::images().join(kernel), boot.join("vmlinuz")).expect("a kernel");
        self.write_initrd(&boot.join("initrd.cpio"));
        let menu = format!(
            "serial\nterminal_input serial\nterminal_output serial\nset timeout=0\n\
             echo \"@@grub $grub_platform\"\nlinux /boot/vmlinuz {COMMAND_LINE}\n\
             initrd /boot/initrd.cpio\nboot\n"
        );
        std::fs::write(boot.join("grub/grub.cfg"), menu).expect("a menu");
        super::run("grub-mkrescue", &["-o", text(path), text(&root)]);
        std::fs::remove_dir_all(&root).expect("removed");
        let disk = File::options().write(true).open(path).expect("the disk");
        disk.set_len(size).expect("a longer disk");
    }

    /// Takes over the guest whose state comes from there, instead of booting: a file that it was saved
    /// in, or a socket that it will be sent to, as `migrate` names it (`file:…`, `unix:…`).
    pub fn incoming(mut self, uri: &str) -> Self {
        self.incoming = Some(uri.to_owned());
        self
    }

    /// Starts QEMU with `backend`'s disk as `/dev/vda`. Waits for a free slot first.
    pub fn start(self, backend: &Backend) -> Guest {
        let slot = Slot::take();
        let control = self.scratch.socket(&format!("{}.qmp", self.name));
        let mut device = device(backend, self.behind_port);

        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"]);
        if !self.reboots {
            command.arg("-no-reboot");
        }
        if has_kvm() {
            command.args(["-accel", "kvm", "-cpu", "host"]);
        } else {
            // Without RDRAND the tools that draw a UUID wait seconds for the guest's entropy.
            command.args(["-accel", "tcg,thread=multi", "-cpu", "qemu64,+rdrand"]);
        }
        let memory = if self.memory_slots { "512M,slots=4,maxmem=4G" } else { "512M" };
        command.args(["-smp", &self.cpus.to_string(), "-m", memory]);
        command.args(["-object", "memory-backend-memfd,id=memory,size=512M,share=on"]);
        command.args(["-machine", "q35,memory-backend=memory"]);
        match self.firmware {
            None => self.load_kernel(&mut command),
            Some(firmware) => {
                device["bootindex"] = 0.into();
                self.load_firmware(firmware, &mut command);
            }
        }
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", text(&control))]);
        // `reconnect-ms` makes QEMU wait for the socket at its start too.
        let chardev =
            format!("socket,id=disk-socket,path={},reconnect-ms=200", text(backend.socket()));
        command.args(["-chardev", &chardev]);
        if self.behind_port {
            command.args(["-device", "pcie-root-port,id=port0,chassis=1,slot=1"]);
        }
        command.args(["-device", &device_line(&device)]);
        if self.mailbox {
            let socket = format!("{}.mailbox", text(backend.socket()));
            command.args([
                "-chardev",
                &format!("socket,id=mailbox-socket,path={socket},reconnect-ms=200"),
            ]);
            // JSON as the other one: QEMU makes devices of the other form first.
            let device = serde_json::json!({
                "driver": "vhost-user-blk-pci", "chardev": "mailbox-socket", "num-queues": 1,
            });
            command.args(["-device", &device_line(&device)]);
        }
        if let Some(uri) = &self.incoming {
            command.args(["-incoming", uri]);
        }

        let log = self.scratch.file(&format!("{}.qemu", self.name));
        let transcript = self.scratch.file(&format!("{}.serial", self.name));
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command.stderr(File::create(&log).expect("a log file"));
        let started = Instant::now();
        let mut child = self.spawn(&mut command, &log);

        let (sender, lines) = channel();
        let serial = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut copy = File::create(&transcript).expect("a transcript");
        std::thread::spawn(move || {
            for line in serial.split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
                let at = started.elapsed().as_secs_f64();
                let _ = writeln!(copy, "{at:8.3} {line}");
                if let Some(start) = line.find("@@") {
                    let _ = sender.send(line[start + 2..].to_owned());
                }
            }
        });

        let keyboard = child.stdin.take().expect("a pipe");
        Guest {
            child,
            keyboard,
            lines,
            end: started + self.deadline,
            started,
            control,
            device,
            transcript,
            log,
            kernel: Vec::new(),
            said: HashMap::new(),
            slot: Some(slot),
        }
    }

    /// Starts QEMU, again if it ends with [`QEMU_BUG`] before the guest has said anything.
    fn spawn(&self, command: &mut Command, log: &Path) -> Child {
        for _ in 0..3 {
            let mut child = command.spawn().expect("QEMU starts");
            let serial = child.stdout.as_ref().expect("a pipe");
            let mut fds = [PollFd::new(serial, PollFlags::IN)];
            let second = Timespec { tv_sec: 1, tv_nsec: 0 };
            let end = Instant::now() + self.deadline;
            // One that takes over a guest is silent until that is there.
            while self.incoming.is_none() && fds[0].revents().is_empty() && Instant::now() < end {
                let _ = poll(&mut fds, Some(&second));
            }
            let has_spoken = fds[0].revents().contains(PollFlags::IN);
            if fds[0].revents().is_empty() || has_spoken {
                return child;
            }
            if !std::fs::read_to_string(log).is_ok_and(|said| said.contains(QEMU_BUG)) {
                return child;
            }
            let _ = child.wait();
            super::announce(&format!("{}: QEMU has ended by itself ({QEMU_BUG})", self.name));
        }
        command.spawn().expect("QEMU starts")
    }

    /// Starts the guest, waits for its end, and asserts that the job succeeded and that the kernel
    /// reported no error. Returns the guest for a look at what it said.
    pub fn run(self, backend: &Backend) -> Guest {
        let mut guest = self.start(backend);
        guest.finish();
        guest
    }

    fn load_kernel(&self, command: &mut Command) {
        let initrd = self.scratch.file(&format!("{}.cpio", self.name));
        self.write_initrd(&initrd);
        command.arg("-kernel").arg(super::images().join("vmlinux"));
        command.arg("-initrd").arg(&initrd);
        command.args(["-append", COMMAND_LINE]);
    }

    fn load_firmware(&self, firmware: Firmware, command: &mut Command) {
        if firmware == Firmware::Efi {
            let [program, template] = EDK_II;
            let variables = self.scratch.file(&format!("{}.variables", self.name));
            std::fs::copy(template, &variables).expect("EDK II's variables");
            let flash = "if=pflash,format=raw";
            command.args(["-drive", &format!("{flash},readonly=on,file={program}")]);
            command.args(["-drive", &format!("{flash},file={}", text(&variables))]);
        }
    }

    fn write_initrd(&self, path: &Path) {
        let mut archive = Archive::new();
        archive.file("jobs/default", 0o644, self.job.as_bytes());
        if self.own_program {
            // Debug information is most of a test program and no use in the guest.
            let own = std::env::current_exe().expect("the path of this program");
            let stripped = self.scratch.file(&format!("{}.program", self.name));
            super::run("strip", &["-o", text(&stripped), text(&own)]);
            let bytes = std::fs::read(stripped).expect("this program, stripped");
            archive.file("bin/guest-test", 0o755, &bytes);
        }
        if self.mailbox {
            archive.file("bin/crash-guest", 0o755, include_bytes!("../../contrib/crash-guest"));
        }
        let mut bytes =
            std::fs::read(super::images().join("base.cpio")).expect("the base initramfs");
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        bytes.extend(archive.finish());
        std::fs::write(path, bytes).expect("an initramfs");
    }
}

/// A running guest. Dropping it kills QEMU.
pub struct Guest {
    child: Child,
    keyboard: ChildStdin,
    lines: Receiver<String>,
    started: Instant,
    /// When the whole boot must be over.
    end: Instant,
    control: PathBuf,
    device: serde_json::Value,
    transcript: PathBuf,
    log: PathBuf,
    /// Messages of the guest's kernel of level "error" or worse.
    kernel: Vec<String>,
    /// The last text said under each name.
    said: HashMap<String, String>,
    /// Given back as soon as QEMU has ended, as tests keep a guest to ask what it said.
    slot: Option<Slot>,
}

impl Guest {
    /// Waits until the guest says `@@name …` and returns what follows the name.
    #[track_caller]
    pub fn expect(&mut self, name: &str) -> String {
        self.expect_while(name, || {})
    }

    /// The same, and calls `check` every now and then while the guest is silent: it panics when
    /// there is nothing left to wait for.
    #[track_caller]
    pub fn expect_while(&mut self, name: &str, mut check: impl FnMut()) -> String {
        loop {
            let line = self.next_line(name, &mut check);
            let (word, rest) = line.split_once(' ').unwrap_or((&line, ""));
            match word {
                "kernel" => self.kernel.push(rest.to_owned()),
                "rc" if name != "rc" => panic!("the job ended with {rest} before it said {name}"),
                _ => {}
            }
            self.said.insert(word.to_owned(), rest.to_owned());
            if word == name {
                return rest.to_owned();
            }
        }
    }

    /// All that the guest has said under a name up to now and was not waited for. Drops what it said
    /// under other names, but for complaints of its kernel.
    pub fn drain(&mut self, name: &str) -> Vec<String> {
        let mut found = Vec::new();
        while let Ok(line) = self.lines.try_recv() {
            match line.split_once(' ') {
                Some(("kernel", rest)) => self.kernel.push(rest.to_owned()),
                Some(("rc", status)) => panic!("the job ended with {status} too early"),
                Some((word, rest)) if word == name => found.push(rest.to_owned()),
                _ => {}
            }
        }
        found
    }

    /// Drops what the guest has said up to now, but for complaints of its kernel.
    pub fn forget(&mut self) {
        self.drain("");
    }

    /// Sends the guest a line. If QEMU is gone, the next [`Guest::expect`] tells.
    pub fn tell(&mut self, line: &str) {
        let _ = self.keyboard.write_all(format!("{line}\n").as_bytes());
    }

    /// Waits for the end of the job and of QEMU; asserts success of the one, a good end of the
    /// other, and no error from the guest's kernel.
    #[track_caller]
    pub fn finish(&mut self) {
        let status = self.expect("rc");
        assert_eq!(status, "0", "the job in the guest failed");
        self.await_exit();
        assert!(self.kernel.is_empty(), "the guest's kernel reported {:#?}", self.kernel);
    }

    /// Waits until QEMU has ended, and asserts that it ended well.
    #[track_caller]
    pub fn await_exit(&mut self) {
        loop {
            if let Some(status) = self.child.try_wait().expect("a status") {
                self.slot = None;
                assert!(status.success(), "QEMU ended with {status}");
                return;
            }
            assert!(Instant::now() < self.end, "QEMU did not end in time");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// What the guest said last under a name.
    #[track_caller]
    pub fn said(&self, name: &str) -> &str {
        self.said.get(name).unwrap_or_else(|| panic!("the guest never said {name}"))
    }

    /// Seconds since QEMU was started.
    pub fn seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    /// When this boot must be over.
    pub fn end(&self) -> Instant {
        self.end
    }

    /// Opens QEMU's control socket.
    pub fn qmp(&self) -> Qmp {
        Qmp::connect(&self.control, self.end)
    }

    /// The arguments of `device_add` that put the disk back in.
    pub fn device(&self) -> serde_json::Value {
        self.device.clone()
    }

    #[track_caller]
    fn next_line(&mut self, awaited: &str, check: &mut dyn FnMut()) -> String {
        loop {
            let left = self.end.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left.min(Duration::from_millis(500))) {
                Ok(line) => return line,
                Err(RecvTimeoutError::Timeout) if left.is_zero() => {
                    panic!("the guest did not say {awaited} in {:.1} s", self.seconds())
                }
                Err(RecvTimeoutError::Timeout) => check(),
                Err(RecvTimeoutError::Disconnected) => {
                    panic!("QEMU ended before the guest said {awaited}")
                }
            }
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- QEMU's messages\n{}", super::tail(&self.log, 20));
            eprintln!("--- serial port\n{}", super::tail(&self.transcript, 60));
        }
    }
}

/// The disk as QEMU's `device_add` takes it.
fn device(backend: &Backend, behind_port: bool) -> serde_json::Value {
    let mut device = serde_json::json!({
        "driver": "vhost-user-blk-pci",
        "id": "disk",
        "chardev": "disk-socket",
        "num-queues": backend.queues(),
    });
    if behind_port {
        device["bus"] = "port0".into();
    }
    if backend.program() == Program::StorageDaemon {
        // It offers the bit but reports a write-through cache, and then the guest never flushes.
        device["config-wce"] = false.into();
    }
    device
}

/// The same for the command line, which takes JSON too.
fn device_line(device: &serde_json::Value) -> String {
    device.to_string()
}

/// KVM only where the processor can: the device node may exist where it is of no use.
fn has_kvm() -> bool {
    let processors = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    processors.split_whitespace().any(|flag| flag == "vmx" || flag == "svm")
        && File::options().read(true).write(true).open("/dev/kvm").is_ok()
}
