//! `vublk serve`: gives a disk to a guest.
//!
//! ```text
//! main thread      open the image ─► listen ─► ready ─► wait for a signal ─► drain, flush, close
//! server thread    accept a front-end, handle its messages, one after the other
//! workers          started with the first ring, ended when the front-end leaves
//! ```
//!
//! SIGTERM and SIGINT end it in order: what is in flight completes, everything is flushed, the
//! image is left in its cleanest state. A second one does not wait for the disk. SIGHUP looks at
//! the size of the image again and tells the guest if it has changed.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, Mode, OFlags};

use crate::block::{Graph, Keep, Node, graph};
use crate::cli::serve_args::{Aio, EXPORT};
use crate::cli::{DONE, ServeArgs};
use crate::control::disks::{ExportRequest, WorkerOptions};
use crate::control::{self, Daemon, Disks};
use crate::device::export::{CachePolicy, Export};
use crate::device::exports::Served;
use crate::device::server::{ServerSocket, SocketRights};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::images::{self, Image, Layers, OpenRequest, StateDir, crash_state, frozen};
use crate::io::footprint::give_back_start_up;
use crate::io::{EngineKind, reactor};

/// Exit code of a start that fails again until somebody changes what it was given: BSD's EX_CONFIG,
/// which systemd knows by name, too.
const MISCONFIGURED: u8 = 78;

/// Serves a disk until told to stop; returns the exit code.
pub fn run(args: &ServeArgs) -> Result<u8> {
    let mut is_ready = false;
    match args.check().and_then(|()| serve(args, &mut is_ready)) {
        Err(err) if !is_ready && !may_pass(&err) => {
            super::report(&err);
            Ok(MISCONFIGURED)
        }
        other => other,
    }
}

/// Whether what kept vublk from starting may have gone when it is started again with the same
/// arguments: somebody else's lock, a host short of something.
fn may_pass(err: &Error) -> bool {
    let is_path_wrong = matches!(
        err.errno(),
        Some(libc::ELOOP | libc::ENOTDIR | libc::EISDIR | libc::ENAMETOOLONG)
    );
    match err.kind() {
        _ if is_path_wrong => false,
        ErrorKind::NotFound
        | ErrorKind::PermissionDenied
        | ErrorKind::Corrupt
        | ErrorKind::Unsupported
        | ErrorKind::InvalidArgument
        | ErrorKind::OutOfRange
        | ErrorKind::ReadOnly => false,
        ErrorKind::Busy
        | ErrorKind::NoSpace
        | ErrorKind::Poisoned
        | ErrorKind::Cancelled
        | ErrorKind::Io => true,
    }
}

/// Does so. `is_ready` is set once guests can connect.
fn serve(args: &ServeArgs, is_ready: &mut bool) -> Result<u8> {
    // Before any thread exists, so that all of them inherit the mask and signals arrive here only.
    let signals = Signals::block()?;
    let engine = match args.aio {
        None => EngineKind::Auto,
        Some(Aio::IoUring) => EngineKind::IoUring,
        Some(Aio::Threads) => EngineKind::Threads,
    };
    reactor::set_default_engine(engine);
    if let StateDir::Required(dir) = args.state_dir() {
        // Not when the first snapshot needs it.
        Keep::check_dir(&dir)?;
    }
    // Before any client can come and use up the file descriptors.
    let mut daemon = Daemon::new(args.name.clone(), empty_disks(args, engine)?)?;
    let disks = daemon.disks_mut();
    let pidfile;
    let is_single = !args.daemon.is_used();
    let mut controls: Vec<ServerSocket> = Vec::new();
    if is_single {
        let faults = args.recording.fault()?;
        let request = args.open_request()?;
        let mut image = open_image(args, &request)?;
        if !args.read_only {
            frozen::check(&image.file, &request.allow_dirs)?;
        }
        let record = args.recording.request(&request, args.block_size);
        let mut recording = None;
        if let Some(record) = record {
            let (recorded, started) = images::recording::record_image(image, &record)?;
            (image, recording) = (recorded, Some(started));
        }
        image.check_for_guest(args.block_size)?;
        args.control.check_not(args.socket_path.as_deref())?;
        let socket = listen(args, disks.socket_rights)?;
        controls.extend(args.control.socket()?);
        pidfile = args.pidfile.as_deref().map(PidFile::write).transpose()?;
        say_what_is_served(args, &image, &socket.to_string());
        let node = disks.layers.add_format(image, None, true)?;
        if let Some(recording) = recording {
            disks.recordings.adopt(&node, &recording)?;
        }
        let mut node = node;
        if let Some(faults) = faults {
            let name = graph::auto_name();
            node = disks.faults.make(Some(&name), &node, faults);
            disks.layers.add_filter(node.clone(), false)?;
            tracing::warn!("this disk misbehaves, as --fault says");
        }
        disks.export(export_request(args, node, socket))?;
    } else {
        args.daemon.set_up(disks)?;
        controls.extend(args.control.socket()?);
        controls.extend(args.daemon.monitor_sockets()?);
        if disks.exports.is_empty() && controls.is_empty() {
            return Err(of_no_use());
        }
        pidfile = args.pidfile.as_deref().map(PidFile::write).transpose()?;
        disks.exports.iter().for_each(|served| say_what_is_exported(disks, served));
    }
    let ids: Vec<_> = daemon.disks().exports.iter().map(|served| served.id().to_string()).collect();
    ids.iter().for_each(|id| daemon.watch_export(id));
    let control = if controls.is_empty() {
        None
    } else {
        controls.iter().for_each(|socket| tracing::info!("control socket on {socket}"));
        Some(control::Server::start(controls, Arc::clone(daemon.shared()))?)
    };
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    *is_ready = true;

    wait(&signals, &mut daemon, is_single)?;

    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    // Before the disks are drained, which may take long: the answer to `quit`, and no new commands.
    drop(control);
    daemon.end_jobs();
    let (served, closed) = daemon.disks_mut().close();
    for export in &served {
        say_what_was_served(export, is_single);
    }
    drop(pidfile);
    closed?;
    Ok(DONE)
}

/// The refusal to wait for ever, as qemu-storage-daemon does.
fn of_no_use() -> Error {
    Error::invalid(
        "nothing would be served, and nobody could change that: give --export \
         type=vhost-user-blk,id=ID,node-name=NODE,addr.type=unix,addr.path=PATH, or --control PATH (or \
         --chardev and --monitor) to add exports later",
    )
}

/// Opens what is to be served.
fn open_image(args: &ServeArgs, request: &OpenRequest) -> Result<Image> {
    if request.state.is_none() || args.read_only {
        return images::open(request);
    }
    crash_state::open_writable(request, args.block_size, args.overlay.as_deref())
}

fn empty_disks(args: &ServeArgs, engine: EngineKind) -> Result<Disks> {
    let workers =
        WorkerOptions { engine, threads: args.threads.map(usize::from), poll_us: args.poll_us };
    let mut layers = Layers::new(Graph::new(), args.allow_dirs.clone(), args.state_dir());
    layers.metadata_cache = Some(args.metadata_cache);
    let mut disks = Disks::new(layers, workers);
    disks.socket_rights = args.disk_sockets.rights()?;
    Ok(disks)
}

fn export_request(args: &ServeArgs, node: Node, socket: ServerSocket) -> ExportRequest {
    ExportRequest {
        id: EXPORT.into(),
        node,
        socket,
        writable: !args.read_only,
        cache: match args.cache {
            cache if cache.ignores_flush() => CachePolicy::Unsafe,
            cache if cache.is_writethrough() => CachePolicy::WriteThrough,
            _ => CachePolicy::WriteBack,
        },
        block_size: args.block_size,
        num_queues: usize::from(args.num_queues),
        queue_size: args.queue_size,
        serial: args.serial.clone().unwrap_or_else(|| "vublk".into()),
    }
}

/// The socket that the operator or systemd gave, or a new one at the path.
fn listen(args: &ServeArgs, rights: Option<SocketRights>) -> Result<ServerSocket> {
    if let Some(path) = &args.socket_path {
        return ServerSocket::bind(path, rights);
    }
    if let Some(fd) = args.fd {
        return ServerSocket::from_fd(fd);
    }
    let mut sockets = listenfd::ListenFd::from_env();
    ServerSocket::from_systemd(&mut sockets, 0)?.ok_or_else(|| {
        Error::new(ErrorKind::NotFound, "systemd has passed no socket; give --socket-path PATH")
    })
}

/// Starting is over when nothing has happened here for so long. Then a front-end that was waiting has
/// connected, too, which runs code that is not needed again.
const STARTING: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };

/// Waits until the process is to end: a signal, `quit`, or (with a single disk) the front-end of a
/// connected socket has left.
fn wait(signals: &Signals, daemon: &mut Daemon, is_single: bool) -> Result<()> {
    let shared = Arc::clone(daemon.shared());
    let mut starting = Some(STARTING);
    loop {
        let mut fds = vec![
            PollFd::new(&signals.fd, PollFlags::IN),
            PollFd::from_borrowed_fd(shared.main_wake(), PollFlags::IN),
        ];
        let ended = daemon.disks().exports.iter().map(|served| served.ended());
        fds.extend(ended.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        match poll(&mut fds, starting.as_ref()) {
            Err(rustix::io::Errno::INTR) => continue,
            Ok(0) => {
                starting = None;
                give_back_start_up();
                continue;
            }
            other => other.context(|| "poll")?,
        };
        let signalled = !fds[0].revents().is_empty();
        let has_ended = fds[2..].iter().any(|fd| !fd.revents().is_empty());
        drop(fds);
        if has_ended {
            if is_single {
                return Ok(());
            }
            daemon.end_exports();
        }
        daemon.run_tasks();
        if daemon.is_quitting() {
            tracing::info!("quit: stopping; what is in flight completes first");
            signals.let_the_next_one_kill();
            return Ok(());
        }
        if !signalled {
            continue;
        }
        match signals.next() {
            Some(libc::SIGHUP) => look_at_the_sizes_again(daemon.disks()),
            Some(signal) => {
                let name = if signal == libc::SIGINT { "SIGINT" } else { "SIGTERM" };
                tracing::info!("{name}: stopping; what is in flight completes first");
                signals.let_the_next_one_kill();
                return Ok(());
            }
            None => {}
        }
    }
}

/// Tells guests if the size of their disk has changed.
fn look_at_the_sizes_again(disks: &Disks) {
    for served in disks.exports.iter() {
        match served.refresh_capacity() {
            Ok(false) => {}
            Ok(true) => {
                let size = served.export().node().size();
                tracing::info!("the size of {} has changed: {size} bytes", served.id());
            }
            Err(err) => {
                tracing::error!("cannot look at the size of {} again: {err}", served.id());
            }
        }
    }
    disks.graph().catch_up_all();
}

/// The same for an export of many.
fn say_what_is_exported(disks: &Disks, served: &Served) {
    let node = served.root().node();
    let access = if served.export().is_read_only() { "read-only" } else { "read-write" };
    let file = disks
        .layers
        .file_of(&node)
        .map_or_else(String::new, |file| format!(" of {}", file.path().display()));
    tracing::info!(
        "serving '{}' on {}: node '{}' ({}{file}, {} bytes, {access})",
        served.id(),
        served.socket(),
        node.name(),
        node.driver().name(),
        node.size(),
    );
}

/// One line for each thing an operator wants to see confirmed.
fn say_what_is_served(args: &ServeArgs, image: &Image, where_: &str) {
    let limits = image.node.limits();
    let guessed = if image.guessed { ", guessed" } else { "" };
    let access = if limits.read_only { "read-only" } else { "read-write" };
    tracing::info!(
        "serving {} ({}{guessed}, {} bytes, {access}, cache {}, blocks of {}) on {where_}",
        image.name(),
        image.format,
        limits.size,
        args.cache,
        args.block_size,
    );
    let mut below = image.backing.as_deref();
    while let Some(image) = below {
        let guessed = if image.guessed { ", guessed" } else { "" };
        let size = image.node.size();
        tracing::info!("  over {} ({}{guessed}, {size} bytes)", image.name(), image.format);
        below = image.backing.as_deref();
    }
}

fn say_what_was_served(export: &Export, is_single: bool) {
    let which = if is_single { String::new() } else { format!("'{}': ", export.name()) };
    tracing::info!("served {which}{}", export.totals());
}

/// SIGTERM, SIGINT and SIGHUP, as a file descriptor.
pub(super) struct Signals {
    fd: OwnedFd,
}

#[allow(unsafe_code)]
impl Signals {
    /// Blocks the signals for this thread and those it starts.
    pub(super) fn block() -> Result<Signals> {
        use std::os::fd::FromRawFd;
        let set = signal_set();
        // SAFETY: `set` is a valid set, the old one is not asked for.
        if unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) } != 0 {
            return Err(Error::from(std::io::Error::last_os_error()).context("pthread_sigmask"));
        }
        // SAFETY: `set` is a valid set.
        let fd = unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(Error::from(std::io::Error::last_os_error()).context("signalfd"));
        }
        // SAFETY: a new descriptor that nobody else owns.
        Ok(Signals { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// Waits for a signal.
    pub(super) fn wait(&self) -> i32 {
        loop {
            if let Some(signal) = self.next() {
                return signal;
            }
            let _ = poll(&mut [PollFd::new(&self.fd, PollFlags::IN)], None);
        }
    }

    /// The next signal that has arrived.
    pub(super) fn next(&self) -> Option<i32> {
        let mut info = std::mem::MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let size = size_of::<libc::signalfd_siginfo>();
        // SAFETY: `info` has room for the one structure asked for.
        let n = unsafe { libc::read(self.fd.as_raw_fd(), info.as_mut_ptr().cast(), size) };
        // SAFETY: the kernel has filled all of it.
        (n == size as isize).then(|| unsafe { info.assume_init() }.ssi_signo as i32)
    }

    /// From now on a signal has its usual effect: whoever sends a second one means it.
    pub(super) fn let_the_next_one_kill(&self) {
        let set = signal_set();
        // SAFETY: `set` is a valid set, the old one is not asked for.
        unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut()) };
    }
}

#[allow(unsafe_code)]
fn signal_set() -> libc::sigset_t {
    // SAFETY: an all-zero set is a valid argument of `sigemptyset`, and the calls only write it.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            libc::sigaddset(&mut set, signal);
        }
        set
    }
}

/// A file with our process id, locked while we live.
struct PidFile {
    file: OwnedFd,
    path: std::path::PathBuf,
}

impl PidFile {
    fn write(path: &Path) -> Result<PidFile> {
        let what = || format!("pid file {}", path.display());
        let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = loop {
            let file = rustix::fs::open(path, flags, Mode::from_raw_mode(0o644)).context(what)?;
            if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
                return Err(Error::new(
                    ErrorKind::Busy,
                    format!("{}: another process that is alive has written it", what()),
                ));
            }
            // Who had it locked may have removed it.
            if is_at(&file, path) {
                break file;
            }
        };
        let mut content = [0; 24];
        let len = rustix::io::pread(&file, &mut content, 0).context(what)?;
        let number = content[..len].strip_suffix(b"\n").unwrap_or(&content[..len]);
        if len == content.len() || !number.iter().all(u8::is_ascii_digit) {
            return Err(Error::invalid(format!(
                "{}: holds something else than the number of a process; it is not touched",
                what()
            )));
        }
        rustix::fs::ftruncate(&file, 0).context(what)?;
        let text = format!("{}\n", std::process::id());
        rustix::io::write(file.as_fd(), text.as_bytes()).context(what)?;
        Ok(PidFile { file, path: path.to_owned() })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if is_at(&self.file, &self.path) {
            let _ = std::fs::remove_file(&self.path);
        }
        let _ = rustix::fs::flock(&self.file, FlockOperation::Unlock);
    }
}

/// Whether the open file is the one at this path.
fn is_at(file: &OwnedFd, path: &Path) -> bool {
    match (rustix::fs::fstat(file), rustix::fs::lstat(path)) {
        (Ok(open), Ok(there)) => (open.st_dev, open.st_ino) == (there.st_dev, there.st_ino),
        _ => false,
    }
}
