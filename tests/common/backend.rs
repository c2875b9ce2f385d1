//! `vublk serve` as a child process, with its image, socket and log in a directory of its own.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use vublk::frontend::{Personality, Session, SessionOptions};

/// Size of the disk where a test says nothing else.
pub const DISK: u64 = 16 << 20;

/// How a back-end is to be started.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Size of the image.
    size: u64,
    /// Its format, as `-f` wants it.
    format: &'static str,
    /// Options of `vublk serve`, besides socket and image.
    args: Vec<String>,
    /// Shell text that runs before the process takes the shell's place; it sees the directory of
    /// the test as `$DIR`.
    prelude: String,
    /// Whether the shell is to run in a mount namespace of its own.
    private_mounts: bool,
    /// Environment.
    env: Vec<(String, String)>,
    /// Whether the back-end makes its own socket.
    binds: bool,
    /// The image, if it is not the file that is made for it.
    image: Option<PathBuf>,
    /// Whether the options say what is served, and where (`--blockdev`, `--export`).
    is_many: bool,
    /// Whether an image is given, besides what the options name.
    has_image: bool,
}

impl Setup {
    /// A raw disk of [`DISK`] zeros, served with these options.
    pub fn new(args: &[&str]) -> Setup {
        Setup {
            size: DISK,
            format: "raw",
            args: args.iter().map(|arg| arg.to_string()).collect(),
            prelude: String::new(),
            private_mounts: false,
            env: Vec::new(),
            binds: true,
            image: None,
            is_many: false,
            has_image: true,
        }
    }

    /// With an image of another size.
    pub fn size(mut self, size: u64) -> Setup {
        self.size = size;
        self
    }

    /// With shell text to run first, for instance `ulimit -n 20`.
    pub fn prelude(mut self, text: &str) -> Setup {
        self.prelude = text.into();
        self
    }

    /// With mounts that nobody else sees and that end with the process.
    pub fn private_mounts(mut self) -> Setup {
        self.private_mounts = true;
        self
    }

    /// With a variable in the environment.
    pub fn env(mut self, name: &str, value: &Path) -> Setup {
        self.env.push((name.into(), value.to_str().expect("a path in UTF-8").into()));
        self
    }

    /// Without `--socket-path`: the socket comes from elsewhere.
    pub fn without_socket(mut self) -> Setup {
        self.binds = false;
        self
    }

    /// With this image; none is made.
    pub fn image(mut self, path: &Path) -> Setup {
        self.image = Some(path.into());
        self
    }

    /// With no image but what the options name.
    pub fn without_image(mut self) -> Setup {
        self.has_image = false;
        self
    }

    /// With disks that the options describe; none is made, and no socket.
    pub fn many(mut self) -> Setup {
        self.is_many = true;
        self
    }

    /// With an image of another format than raw, which the test makes.
    pub fn format(mut self, format: &'static str, path: &Path) -> Setup {
        self.format = format;
        self.image(path)
    }

    /// Makes image and directory, but starts nothing.
    pub fn prepare(self) -> Backend {
        let dir = tempfile::Builder::new().prefix("vublk-").tempdir().expect("a directory");
        let image = self.image.clone().unwrap_or_else(|| {
            let image = dir.path().join("disk.raw");
            let file = File::create(&image).expect("an image");
            file.set_len(self.size).expect("room for an image");
            image
        });
        Backend {
            socket: dir.path().join("vu.sock"),
            image,
            dir,
            setup: self,
            child: None,
            runs: 0,
        }
    }

    /// Starts the back-end.
    pub fn start(self) -> Backend {
        let mut backend = self.prepare();
        backend.spawn();
        backend
    }
}

/// A back-end and what belongs to it.
#[derive(Debug)]
pub struct Backend {
    /// Where it listens.
    pub socket: PathBuf,
    /// What it serves.
    pub image: PathBuf,
    /// Where all of that is.
    pub dir: tempfile::TempDir,
    setup: Setup,
    child: Option<Child>,
    /// How often it was started.
    runs: u32,
}

impl Backend {
    /// Starts a back-end with these options on [`DISK`] zeros.
    pub fn start(args: &[&str]) -> Backend {
        Setup::new(args).start()
    }

    /// Starts the process, with the same command each time.
    pub fn spawn(&mut self) {
        self.spawn_with(None);
    }

    /// Starts the process with `stdin` as its standard input.
    pub fn spawn_with(&mut self, stdin: Option<OwnedFd>) {
        assert!(self.child.is_none(), "it runs already");
        self.runs += 1;
        self.child = Some(self.command(stdin).spawn().expect("the back-end starts"));
    }

    /// The command that [`Backend::spawn`] runs.
    fn command(&self, stdin: Option<OwnedFd>) -> Command {
        let program = env!("CARGO_BIN_EXE_vublk");
        let mut words: Vec<String> = Vec::new();
        if self.setup.private_mounts {
            words.extend(["unshare", "-rm", "--propagation", "private"].map(String::from));
        }
        if self.setup.private_mounts || !self.setup.prelude.is_empty() {
            let script = format!("{}\nexec \"$0\" \"$@\"", self.setup.prelude);
            words.extend(["sh".into(), "-ec".into(), script]);
        }
        words.extend([program, "serve"].map(String::from));
        words.extend(self.setup.args.iter().cloned());
        let is_single = !self.setup.is_many;
        if is_single && self.setup.binds {
            words.extend(["--socket-path".into(), self.socket.to_str().expect("UTF-8").into()]);
        }
        if is_single {
            words.extend(["-f".into(), self.setup.format.into()]);
            if self.setup.has_image {
                words.push(self.image.to_str().expect("UTF-8").into());
            }
        }
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).env("DIR", self.dir.path());
        command.env_remove("VUBLK_LOG").env_remove("LISTEN_FDS").env_remove("NOTIFY_SOCKET");
        command.env_remove("RUNTIME_DIRECTORY");
        command.envs(self.setup.env.iter().cloned());
        let log = File::options().create(true).append(true).open(self.log_path());
        command.stdin(stdin.map_or_else(Stdio::null, Stdio::from));
        command.stdout(Stdio::null()).stderr(log.expect("a log"));
        command
    }

    fn log_path(&self) -> PathBuf {
        self.dir.path().join("log")
    }

    /// Everything that the process wrote to standard error, over all runs.
    pub fn log(&self) -> String {
        std::fs::read(self.log_path())
            .map_or_else(|_| String::new(), |bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Waits until the log has a line with `text`.
    pub fn wait_log(&self, text: &str) {
        let deadline = super::soon();
        while !self.log().contains(text) {
            assert!(Instant::now() < deadline, "no {text:?} in the log:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Id of the process.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("it runs").id()
    }

    /// Whether the process lives.
    pub fn lives(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| child.try_wait().expect("a child").is_none())
    }

    /// Panics, with the log, if the process has died.
    pub fn assert_lives(&mut self) {
        assert!(self.lives(), "the back-end is dead:\n{}", self.log());
    }

    /// Kills the process in the middle of whatever it does (SIGKILL).
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("it runs");
        child.kill().expect("a child");
        child.wait().expect("a child");
    }

    /// Sends a signal.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.pid() as i32).expect("a process id");
        rustix::process::kill_process(pid, signal).expect("a living process");
    }

    /// Waits for the process to end by itself.
    pub fn wait_end(&mut self) -> ExitStatus {
        let mut child = self.child.take().expect("it runs");
        let deadline = super::soon();
        loop {
            if let Some(status) = child.try_wait().expect("a child") {
                return status;
            }
            if Instant::now() > deadline {
                let _ = child.kill();
                let _ = child.wait();
                panic!("the back-end does not end:\n{}", self.log());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// SIGTERM, and what it exits with.
    pub fn terminate(&mut self) -> ExitStatus {
        self.signal(rustix::process::Signal::TERM);
        self.wait_end()
    }

    /// Connects and starts queues, or panics with the log.
    pub fn open(&self, options: SessionOptions) -> Session {
        match Session::open(&self.socket, options) {
            Ok(session) => session,
            Err(err) => panic!("{err}\n{}", self.log()),
        }
    }

    /// A session of QEMU's with one queue.
    pub fn qemu(&self) -> Session {
        self.open(SessionOptions::new(Personality::Qemu))
    }

    /// What the image holds.
    pub fn content(&self) -> Vec<u8> {
        std::fs::read(&self.image).expect("an image")
    }

    /// Changes the image behind the back-end's back.
    pub fn scribble(&self, offset: u64, bytes: &[u8]) {
        let file = File::options().write(true).open(&self.image).expect("an image");
        file.write_all_at(bytes, offset).expect("room in the image");
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- log of the back-end, {} runs ---\n{}", self.runs, self.log());
        }
    }
}
