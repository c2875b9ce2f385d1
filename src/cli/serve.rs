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

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FlockOperation, Mode, OFlags};

use crate::block::Root;
use crate::cli::serve_args::Aio;
use crate::cli::{DONE, ServeArgs};
use crate::control::{self, Daemon};
use crate::device::export::{CachePolicy, Export, ExportOptions};
use crate::device::handler::Device;
use crate::device::pool::Pool;
use crate::device::server::{Server, ServerSocket};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::images::Image;
use crate::io::footprint::give_back_start_up;
use crate::io::{EngineKind, block_on, reactor};

/// Serves a disk until told to stop; returns the exit code. [`ServeArgs::check`] has passed.
pub fn run(args: &ServeArgs) -> Result<u8> {
    // Before any thread exists, so that all of them inherit the mask and signals arrive here only.
    let signals = Signals::block()?;
    ignore_file_size_signal();
    let engine = match args.aio {
        None => EngineKind::Auto,
        Some(Aio::IoUring) => EngineKind::IoUring,
        Some(Aio::Threads) => EngineKind::Threads,
    };
    reactor::set_default_engine(engine);
    let image = crate::images::open(&args.open_request()?)?;
    image.check_for_guest(args.block_size)?;
    let pool = Arc::new(Pool::new(Arc::new(Export::new(
        Root::new(image.node.name(), image.node.clone()),
        export_options(args, engine),
    ))));
    let socket = listen(args)?;
    let where_ = socket.to_string();
    let pidfile = args.pidfile.as_deref().map(PidFile::write).transpose()?;
    say_what_is_served(args, &image, &where_);
    let mut daemon = Daemon::new(args.name.clone())?;
    let control = args.control.socket()?;
    let device = Device::new(image.node.name(), pool.clone());
    let server = Server::start(socket, Arc::clone(&device))?;
    let control = control
        .map(|socket| {
            tracing::info!("control socket on {socket}");
            control::Server::start(vec![socket], Arc::clone(daemon.shared()))
        })
        .transpose()?;
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);

    give_back_start_up();
    wait(&signals, &server, &device, &pool, &mut daemon)?;

    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    // Before the disk is drained, which may take long: the answer to `quit`, and no new commands.
    drop(control);
    daemon.end_jobs();
    server.stop();
    let closed = block_on(image.node.close());
    say_what_was_served(pool.export());
    drop(pidfile);
    closed.context(|| format!("cannot close {}", image.name()))?;
    Ok(DONE)
}

fn export_options(args: &ServeArgs, engine: EngineKind) -> ExportOptions {
    ExportOptions {
        serial: args.serial.clone().unwrap_or_else(|| "vublk".into()),
        block_size: args.block_size as u32,
        num_queues: usize::from(args.num_queues),
        queue_size: args.queue_size,
        threads: usize::from(args.threads.unwrap_or(args.num_queues)),
        cache: match args.cache {
            cache if cache.ignores_flush() => CachePolicy::Unsafe,
            cache if cache.is_writethrough() => CachePolicy::WriteThrough,
            _ => CachePolicy::WriteBack,
        },
        engine,
        poll_us: args.poll_us,
        read_only: args.read_only,
    }
}

/// The socket that the operator or systemd gave, or a new one at the path.
fn listen(args: &ServeArgs) -> Result<ServerSocket> {
    if let Some(path) = &args.socket_path {
        return ServerSocket::bind(path, None);
    }
    if let Some(fd) = args.fd {
        return ServerSocket::from_fd(fd);
    }
    let mut sockets = listenfd::ListenFd::from_env();
    ServerSocket::from_systemd(&mut sockets, 0)?.ok_or_else(|| {
        Error::new(ErrorKind::NotFound, "systemd has passed no socket; give --socket-path PATH")
    })
}

/// Waits until the process is to end.
fn wait(
    signals: &Signals,
    server: &Server,
    device: &Device,
    pool: &Pool,
    daemon: &mut Daemon,
) -> Result<()> {
    let shared = Arc::clone(daemon.shared());
    loop {
        let mut fds = [
            PollFd::new(&signals.fd, PollFlags::IN),
            PollFd::from_borrowed_fd(server.ended(), PollFlags::IN),
            PollFd::from_borrowed_fd(shared.main_wake(), PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other.context(|| "poll")?,
        };
        let (signalled, ended) = (!fds[0].revents().is_empty(), !fds[1].revents().is_empty());
        if ended {
            // The one front-end of a connected --fd has left.
            return Ok(());
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
            Some(libc::SIGHUP) => look_at_the_size_again(device, pool),
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

/// Tells the guest if the size of the disk has changed.
fn look_at_the_size_again(device: &Device, pool: &Pool) {
    match pool.export().refresh_capacity() {
        Ok(false) => {}
        Ok(true) => {
            let size = pool.export().node().size();
            tracing::info!("the size of the disk has changed: {size} bytes");
            device.notify_config_change();
        }
        Err(err) => tracing::error!("cannot look at the size of the disk again: {err}"),
    }
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

fn say_what_was_served(export: &Export) {
    let totals = export.totals().map(|(name, count)| format!("{name}={count}"));
    tracing::info!("served {}", totals.join(" "));
}

/// Has writes beyond the limit on the size of files (`ulimit -f`) fail, and not kill us: the guest
/// gets an error for that request and no more.
#[allow(unsafe_code)]
fn ignore_file_size_signal() {
    // SAFETY: no handler is installed that could run anything.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

/// SIGTERM, SIGINT and SIGHUP, as a file descriptor.
struct Signals {
    fd: OwnedFd,
}

#[allow(unsafe_code)]
impl Signals {
    /// Blocks the signals for this thread and those it starts.
    fn block() -> Result<Signals> {
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

    /// The next signal that has arrived.
    fn next(&self) -> Option<i32> {
        let mut info = std::mem::MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let size = size_of::<libc::signalfd_siginfo>();
        // SAFETY: `info` has room for the one structure asked for.
        let n = unsafe { libc::read(self.fd.as_raw_fd(), info.as_mut_ptr().cast(), size) };
        // SAFETY: the kernel has filled all of it.
        (n == size as isize).then(|| unsafe { info.assume_init() }.ssi_signo as i32)
    }

    /// From now on a signal has its usual effect: whoever sends a second one means it.
    fn let_the_next_one_kill(&self) {
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
        let file = rustix::fs::open(path, flags, Mode::from_raw_mode(0o644)).context(what)?;
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("{}: another process that is alive has written it", what()),
            ));
        }
        rustix::fs::ftruncate(&file, 0).context(what)?;
        let text = format!("{}\n", std::process::id());
        rustix::io::write(file.as_fd(), text.as_bytes()).context(what)?;
        Ok(PidFile { file, path: path.to_owned() })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
        let _ = rustix::fs::flock(&self.file, FlockOperation::Unlock);
    }
}
