//! The socket that front-ends connect to, and the thread that serves them one after the other.
//!
//! ```text
//! --socket-path   bind ─┐
//! --fd, systemd   given ┼─► ServerSocket ─► thread: accept ─► serve ─► accept ─► …
//! --fd, connected       ┘                           one client at a time, the next one waits in
//!                                                   the backlog of the same socket
//! ```
//!
//! The socket is bound once and stays bound until the end: a front-end that reconnects every 100 ms
//! never finds a moment without it. What we have bound we unlink at the end, if it is still ours;
//! what was given to us we leave alone.
//!
//! # Replacing a stale socket
//!
//! `kill -9` leaves the socket's file behind, and the next process has to take its place. Whether
//! it is stale only a connection can tell: refused means that nobody listens. Two processes that
//! find the same stale socket would unlink each other's new one, so the look, the unlink and the
//! bind happen under a lock on the directory.

#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{AtFlags, FileType, FlockOperation, Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use super::connection::{self, Ended, Stop};
use super::handler::Device;
use super::lines::limited;
use crate::error::{Error, ErrorKind, Result, ResultExt};

/// Longest path of a socket: `sun_path` has 108 bytes, one of them for the end.
pub const MAX_SOCKET_PATH: usize = 107;
/// Clients that may wait while one is served.
const BACKLOG: i32 = 16;
/// How long a look at the path of another process is waited for.
const LOCK_TIMEOUT: Duration = Duration::from_secs(2);
/// Pause after an accept that failed for want of file descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// How long a front-end that does not read our last answer is waited for at the end.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// Where front-ends come from.
#[derive(Debug)]
pub struct ServerSocket {
    source: Source,
    /// What to unlink at the end.
    bound: Option<Bound>,
    /// What log lines and errors call it.
    description: String,
}

/// Who may connect to a socket that we make.
#[derive(Clone, Copy, Debug)]
pub struct SocketRights {
    /// Permission bits.
    pub mode: u32,
    /// Its group, if not that of the process.
    pub group: Option<rustix::fs::Gid>,
}

#[derive(Debug)]
enum Source {
    /// Accept one after the other.
    Listening(UnixListener),
    /// One front-end, connected already; there will be no other.
    Connected(UnixStream),
}

/// A socket's file that we made.
#[derive(Debug)]
struct Bound {
    path: PathBuf,
    /// Device and inode, to unlink nothing that took its place.
    identity: (u64, u64),
}

impl Drop for Bound {
    fn drop(&mut self) {
        let is_ours = std::fs::symlink_metadata(&self.path)
            .is_ok_and(|meta| (meta.dev(), meta.ino()) == self.identity);
        if is_ours && let Err(err) = std::fs::remove_file(&self.path) {
            tracing::warn!("cannot remove {}: {err}", self.path.display());
        }
    }
}

impl ServerSocket {
    /// Binds `path` and listens (`--socket-path`). A stale socket there is replaced. With `rights`
    /// the socket gets these before anybody can connect; without, the umask decides.
    ///
    /// # Errors
    /// The path is too long, something that is not a socket is there, or a live process listens.
    pub fn bind(path: &Path, rights: Option<SocketRights>) -> Result<ServerSocket> {
        let shown = path.display();
        let len = path.as_os_str().len();
        if len > MAX_SOCKET_PATH {
            return Err(Error::invalid(format!(
                "socket path is {len} bytes long, the system allows {MAX_SOCKET_PATH}: {shown} (a \
                 relative path may be shorter)"
            )));
        }
        let address =
            SocketAddrUnix::new(path).context(|| format!("socket path {shown:?} is not a path"))?;
        let _lock = lock_directory(path)?;
        remove_stale(path)?;
        let what = || format!("cannot listen on {shown}");
        let fd = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )
        .context(what)?;
        rustix::net::bind(&fd, &address).context(what)?;
        let meta = std::fs::symlink_metadata(path).context(what)?;
        let bound = Bound { path: path.to_owned(), identity: (meta.dev(), meta.ino()) };
        if let Some(rights) = rights {
            // Nobody can connect before listen.
            give_rights(path, rights).context(what)?;
        }
        rustix::net::listen(&fd, BACKLOG).context(what)?;
        Ok(ServerSocket {
            source: Source::Listening(fd.into()),
            bound: Some(bound),
            description: shown.to_string(),
        })
    }

    /// The socket that listens, if it is one.
    pub fn listener(&self) -> Option<&UnixListener> {
        match &self.source {
            Source::Listening(listener) => Some(listener),
            Source::Connected(_) => None,
        }
    }

    /// Takes over file descriptor `fd` of this process (`--fd`): a listening socket, or one that a
    /// front-end is connected to; then that one is served and no other.
    ///
    /// # Errors
    /// It is not open, was opened by this process itself, is not a Unix stream socket, or neither
    /// listens nor is connected. Then it is left as it is: a wrong number may be that of a disk.
    pub fn from_fd(fd: RawFd) -> Result<ServerSocket> {
        if fd <= 2 {
            return Err(Error::invalid(format!(
                "fd {fd} is standard input, output or error; a socket has to be 3 or more"
            )));
        }
        let description = format!("fd {fd}");
        // SAFETY: borrowed for these calls, which fail cleanly on a number that is not open.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
        let flags = rustix::io::fcntl_getfd(borrowed)
            .context(|| format!("{description} is not open in this process"))?;
        // What was inherited cannot have the flag, and what we open or take over always has it.
        if flags.contains(rustix::io::FdFlags::CLOEXEC) {
            return Err(Error::invalid(format!(
                "{description} was not inherited, but opened by this process itself"
            )));
        }
        check_listens(borrowed, &description)?;
        // SAFETY: it is an open socket that the operator gave us by number, and was not taken before;
        // nothing else in this process knows it.
        Self::from_owned(unsafe { OwnedFd::from_raw_fd(fd) }, description)
    }

    /// Takes the socket of this `index` that systemd passed (socket activation); `None` if it
    /// passed none.
    pub fn from_systemd(sockets: &mut listenfd::ListenFd, index: usize) -> Result<Option<Self>> {
        let description = format!("systemd socket {index}");
        let listener =
            sockets.take_unix_listener(index).context(|| format!("{description} is of no use"))?;
        listener.map(|listener| Self::from_owned(listener.into(), description)).transpose()
    }

    /// Sorts out what kind of socket it is.
    fn from_owned(fd: OwnedFd, description: String) -> Result<ServerSocket> {
        let listens = check_listens(fd.as_fd(), &description)?;
        rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
        let source = match listens {
            true => Source::Listening(fd.into()),
            false => Source::Connected(fd.into()),
        };
        match &source {
            // Somebody else may take what woke us.
            Source::Listening(listener) => listener.set_nonblocking(true)?,
            Source::Connected(stream) => stream.set_nonblocking(false)?,
        }
        Ok(ServerSocket { source, bound: None, description })
    }
}

impl std::fmt::Display for ServerSocket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.description)
    }
}

/// Gives the socket at `path` its rights. The directory may belong to somebody else, and he may have put
/// something else there by now: a link is not followed, and nothing but a socket is touched.
fn give_rights(path: &Path, rights: SocketRights) -> Result<()> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let there = rustix::fs::open(path, flags, Mode::empty())?;
    if FileType::from_raw_mode(rustix::fs::fstat(&there)?.st_mode) != FileType::Socket {
        return Err(Error::invalid("is not a socket any more"));
    }
    if let Some(group) = rights.group {
        rustix::fs::chownat(&there, "", None, Some(group), AtFlags::EMPTY_PATH)
            .context(|| format!("group {}", group.as_raw()))?;
    }
    // The only name by which older kernels change the mode of what is open like this.
    let name = format!("/proc/self/fd/{}", there.as_raw_fd());
    rustix::fs::chmod(name, Mode::from_raw_mode(rights.mode & 0o777))?;
    Ok(())
}

/// Whether a socket listens; else it is connected.
///
/// # Errors
/// It is neither, or not a Unix stream socket.
fn check_listens(fd: BorrowedFd<'_>, description: &str) -> Result<bool> {
    let wrong = |what: &str| Error::invalid(format!("{description} {what}"));
    let family = sockopt::socket_domain(fd).map_err(|_| wrong("is not a socket"))?;
    if family != AddressFamily::UNIX || sockopt::socket_type(fd)? != SocketType::STREAM {
        return Err(wrong("is not a Unix stream socket"));
    }
    let listens = sockopt::socket_acceptconn(fd)?;
    if !listens && rustix::net::getpeername(fd).is_err() {
        return Err(wrong("neither listens nor is connected"));
    }
    Ok(listens)
}

/// Locks the directory of `path` against other processes of ours; no lock if the directory cannot
/// be opened, as then nothing can be bound in it either, or somebody keeps the lock.
fn lock_directory(path: &Path) -> Result<Option<OwnedFd>> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = match rustix::fs::open(directory, flags, Mode::empty()) {
        Ok(fd) => fd,
        // A directory may allow to bind but not to list.
        Err(rustix::io::Errno::ACCESS) => return Ok(None),
        Err(err) => {
            return Err(Error::from(err).context(format!(
                "cannot listen on {}: directory {}",
                path.display(),
                directory.display()
            )));
        }
    };
    let deadline = Instant::now() + LOCK_TIMEOUT;
    while rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive).is_err() {
        if Instant::now() > deadline {
            tracing::debug!("{}: locked by somebody for long", directory.display());
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(Some(fd))
}

/// Removes a socket at `path` that nobody listens on.
///
/// # Errors
/// Somebody does, or it is no socket.
pub(crate) fn remove_stale(path: &Path) -> Result<()> {
    let shown = path.display();
    let meta = match std::fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(err) => return Err(err).context(|| format!("cannot look at {shown}")),
    };
    if !meta.file_type().is_socket() {
        return Err(Error::invalid(format!(
            "{shown} exists and is not a socket; it is not touched: remove it, or listen elsewhere"
        )));
    }
    match probe(path) {
        Ok(false) => {
            std::fs::remove_file(path)
                .context(|| format!("cannot remove the stale socket {shown}"))?;
            tracing::info!("{shown}: stale socket replaced");
            Ok(())
        }
        Ok(true) => Err(Error::new(
            ErrorKind::Busy,
            format!("{shown} is in use: a live process listens on it"),
        )),
        Err(err) => Err(err.context(format!("cannot tell whether {shown} is in use"))),
    }
}

/// Whether somebody listens on a socket. Never waits.
fn probe(path: &Path) -> Result<bool> {
    use rustix::io::Errno;
    let fd = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    match rustix::net::connect(&fd, &SocketAddrUnix::new(path)?) {
        // AGAIN: so many wait for it that there is no place for one more.
        Ok(()) | Err(Errno::AGAIN) => Ok(true),
        // PROTOTYPE: not a stream socket, but somebody's.
        Err(Errno::PROTOTYPE) => Ok(true),
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(false),
        Err(err) => Err(err.into()),
    }
}

/// The thread that serves a device to front-ends.
///
/// Dropping it stops it as [`Server::stop`] does.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    stop: Stop,
    /// Readable when `stop` was requested.
    stop_event: OwnedFd,
    /// Readable when the thread is about to end.
    ended_event: OwnedFd,
}

impl Server {
    /// Starts to serve `device` on `socket`.
    pub fn start(socket: ServerSocket, device: Arc<Device>) -> Result<Server> {
        let what = || format!("cannot serve on {socket}");
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let shared = Arc::new(Shared {
            stop: Stop::default(),
            stop_event: eventfd(0, flags).context(what)?,
            ended_event: eventfd(0, flags).context(what)?,
        });
        let name = format!("vu-{}", device.name()).replace('\0', "");
        let description = what();
        let (ready, started) = sync_channel(1);
        let thread = std::thread::Builder::new().name(name).spawn({
            let shared = shared.clone();
            move || {
                // The flush after a client has left must not fail for want of a descriptor.
                let prepared = crate::io::prepare_thread();
                let is_prepared = prepared.is_ok();
                let _ = ready.send(prepared);
                if is_prepared {
                    run(socket, &device, &shared);
                }
                raise(&shared.ended_event);
            }
        });
        let server = Server { shared, thread: Some(thread.context(|| description.clone())?) };
        let prepared = started.recv().map_err(|_| Error::invalid("the message thread died"))?;
        prepared.context(|| description)?;
        Ok(server)
    }

    /// Readable once the thread has nothing left to do: after a stop, or when the one front-end of
    /// a connected socket has left. For the main thread's poll; never read it.
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.shared.ended_event.as_fd()
    }

    /// Whether [`Server::ended`] is readable.
    pub fn has_ended(&self) -> bool {
        wait_any(&[self.ended()], Some(Duration::ZERO))
    }

    /// Asks the connection to end after the message it is handling, and returns at once. Use this
    /// to stop several servers at a time, before [`Server::stop`] of each.
    pub fn request_stop(&self) {
        self.shared.stop.request();
        raise(&self.shared.stop_event);
    }

    /// Ends the connection, waits until all rings are drained and the disk is flushed, and unlinks
    /// the socket if we had bound it. Must not be called on a thread that a drain needs.
    pub fn stop(mut self) {
        self.stop_and_join();
    }

    fn stop_and_join(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        self.request_stop();
        if !wait_readable(&[&self.shared.ended_event], Some(STOP_GRACE)) {
            // Either it drains, and goes on doing so, or the front-end does not read our answer.
            self.shared.stop.force();
        }
        if thread.join().is_err() {
            tracing::error!("a message thread has panicked");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop_and_join();
    }
}

/// Makes an eventfd readable.
fn raise(event: &OwnedFd) {
    // Cannot fail but for a counter at its end, which is readable too.
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}

/// Waits until one of the files is readable; false after `timeout`.
fn wait_readable(files: &[&OwnedFd], timeout: Option<Duration>) -> bool {
    let fds: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
    wait_any(&fds, timeout)
}

fn wait_any(fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> bool {
    let deadline = timeout.map(|timeout| Instant::now() + timeout);
    let mut fds: Vec<_> = fds.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let left = left.map(|left| Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: left.subsec_nanos().into(),
        });
        match poll(&mut fds, left.as_ref()) {
            Ok(ready) => return ready > 0,
            Err(rustix::io::Errno::INTR) => {}
            Err(err) => {
                tracing::error!("poll: {err}");
                std::thread::sleep(ACCEPT_PAUSE);
            }
        }
    }
}

/// The thread: one client after the other.
fn run(socket: ServerSocket, device: &Arc<Device>, shared: &Shared) {
    let ServerSocket { source, bound, description } = socket;
    match source {
        Source::Connected(stream) => serve(stream, device, shared),
        Source::Listening(listener) => {
            while let Some(stream) = accept(&listener, device.name(), &description, shared) {
                serve(stream, device, shared);
            }
        }
    }
    drop(bound);
}

/// The next client; `None` when it is time to stop.
fn accept(
    listener: &UnixListener,
    name: &str,
    description: &str,
    shared: &Shared,
) -> Option<UnixStream> {
    let mut failing = false;
    loop {
        wait_any(&[listener.as_fd(), shared.stop_event.as_fd()], None);
        if shared.stop.is_requested() {
            return None;
        }
        let err = match listener.accept() {
            Ok((stream, _)) => return Some(stream),
            Err(err) => err,
        };
        use std::io::ErrorKind as K;
        if matches!(err.kind(), K::WouldBlock | K::Interrupted | K::ConnectionAborted) {
            continue;
        }
        if !std::mem::replace(&mut failing, true) {
            tracing::error!("{name}: cannot accept on {description}, will try again: {err}");
        }
        // The client stays in the backlog, so the listener stays readable.
        wait_readable(&[&shared.stop_event], Some(ACCEPT_PAUSE));
    }
}

/// Serves one client and logs how it ended.
fn serve(stream: UnixStream, device: &Arc<Device>, shared: &Shared) {
    let (name, lines) = (device.name(), device.lines());
    match connection::serve(stream, device, &shared.stop) {
        Ok(Ended::FrontEndLeft) => limited!(lines, info, "{name}: front-end left"),
        Ok(Ended::Silent) => tracing::debug!("{name}: somebody connected and left"),
        Ok(Ended::Stopped) => tracing::info!("{name}: stopped"),
        Err(err) => limited!(lines, error, "{name}: {err}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::message_fuzzing::{Call, MockRings, send_message};
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::{AsRawFd, IntoRawFd};
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixDatagram;

    fn device() -> (Arc<Device>, Arc<MockRings>) {
        let rings = MockRings::new(1);
        (Device::new("test", rings.clone()), rings)
    }

    fn directory() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    fn message(result: Result<ServerSocket>) -> String {
        result.unwrap_err().to_string()
    }

    /// As a process has it from the one that started it.
    fn inherited(fd: impl Into<OwnedFd>) -> OwnedFd {
        let fd = fd.into();
        rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::empty()).unwrap();
        fd
    }

    /// Sends GET_FEATURES and waits for the answer; false if the connection is closed.
    fn talk(mut client: &UnixStream) -> bool {
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        send_message(client, 1, 1, &[], &[]).is_ok() && client.read_exact(&mut [0; 20]).is_ok()
    }

    #[test]
    fn misuse_of_a_path_is_told() {
        let dir = directory();
        let long = dir.path().join("x".repeat(120));
        let err = message(ServerSocket::bind(&long, None));
        assert!(err.contains("bytes long, the system allows 107"), "{err}");
        let file = dir.path().join("file");
        std::fs::write(&file, "precious").unwrap();
        let err = message(ServerSocket::bind(&file, None));
        assert!(err.contains("is not a socket; it is not touched"), "{err}");
        assert_eq!(std::fs::read(&file).unwrap(), b"precious");
        let err = message(ServerSocket::bind(&dir.path().join("no/such"), None));
        assert!(err.contains("No such file or directory"), "{err}");
        // The longest that goes.
        let len = MAX_SOCKET_PATH - dir.path().as_os_str().len() - 1;
        ServerSocket::bind(&dir.path().join("x".repeat(len)), None).unwrap();
    }

    #[test]
    fn a_live_socket_is_respected_and_a_stale_one_replaced() {
        let dir = directory();
        let path = dir.path().join("socket");
        let first = ServerSocket::bind(&path, None).unwrap();
        let err = message(ServerSocket::bind(&path, None));
        assert!(err.contains("a live process listens on it"), "{err}");
        assert!(UnixStream::connect(&path).is_ok(), "the live one is as it was");
        // As after kill -9: the file stays, nobody listens.
        let ServerSocket { source, bound, .. } = first;
        drop(source);
        std::mem::forget(bound);
        assert!(path.exists());
        let second =
            ServerSocket::bind(&path, Some(SocketRights { mode: 0o600, group: None })).unwrap();
        assert!(UnixStream::connect(&path).is_ok());
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        // A socket whose place was taken by another is not unlinked by its owner.
        std::fs::remove_file(&path).unwrap();
        let third = ServerSocket::bind(&path, None).unwrap();
        drop(second);
        assert!(path.exists());
        drop(third);
        assert!(!path.exists());
    }

    /// The directory may belong to whoever the socket is for.
    #[test]
    fn what_was_put_in_the_place_of_the_socket_keeps_its_rights() {
        let dir = directory();
        let (path, victim) = (dir.path().join("socket"), dir.path().join("victim"));
        std::fs::write(&victim, "secret").unwrap();
        let private = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(&victim, private).unwrap();
        std::os::unix::fs::symlink(&victim, &path).unwrap();
        let rights = SocketRights { mode: 0o666, group: Some(rustix::process::getegid()) };
        for _ in 0..2 {
            let err = give_rights(&path, rights).unwrap_err().to_string();
            assert!(err.contains("is not a socket any more"), "{err}");
            assert_eq!(std::fs::metadata(&victim).unwrap().permissions().mode() & 0o777, 0o600);
            std::fs::remove_file(&path).unwrap();
            std::fs::hard_link(&victim, &path).unwrap();
        }
    }

    #[test]
    fn many_processes_that_find_the_same_stale_socket_agree_on_one() {
        let dir = directory();
        let path = dir.path().join("socket");
        for _ in 0..20 {
            drop(UnixListener::bind(&path).unwrap());
            let results: Vec<_> = std::thread::scope(|scope| {
                let threads: Vec<_> =
                    (0..4).map(|_| scope.spawn(|| ServerSocket::bind(&path, None))).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
            assert!(UnixStream::connect(&path).is_ok());
        }
    }

    #[test]
    fn file_descriptors_are_sorted_out() {
        let dir = directory();
        for (fd, words) in [(1, "standard input"), (-1, "standard input"), (9999, "is not open")] {
            let err = message(ServerSocket::from_fd(fd));
            assert!(err.contains(words), "{err}");
        }
        // What is refused stays open: it may be somebody's disk.
        let refused = |fd: OwnedFd| {
            let err = message(ServerSocket::from_fd(fd.as_raw_fd()));
            assert!(rustix::io::fcntl_getfd(&fd).is_ok(), "{err}");
            err
        };
        let file = std::fs::File::open(dir.path()).unwrap();
        assert!(refused(inherited(file)).contains("is not a socket"));
        assert!(refused(inherited(UnixDatagram::unbound().unwrap())).contains("Unix stream"));
        let loose = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        let err = refused(inherited(loose));
        assert!(err.contains("neither listens nor is connected"), "{err}");
        let path = dir.path().join("given");
        let listener = UnixListener::bind(&path).unwrap();
        let ours = listener.try_clone().unwrap();
        assert!(refused(ours.into()).contains("was not inherited"));
        let given = inherited(listener).into_raw_fd();
        let socket = ServerSocket::from_fd(given).unwrap();
        assert!(matches!(socket.source, Source::Listening(_)));
        let err = message(ServerSocket::from_fd(given));
        assert!(err.contains("was not inherited"), "taken once: {err}");
        let given = socket;
        // Served as any other, and its file is not ours to remove.
        let server = Server::start(given, device().0).unwrap();
        assert!(talk(&UnixStream::connect(&path).unwrap()));
        server.stop();
        assert!(path.exists());
        // No activation by systemd.
        let mut none = listenfd::ListenFd::empty();
        assert!(ServerSocket::from_systemd(&mut none, 0).unwrap().is_none());
    }

    /// systemd's part is played by a shell: it has the socket as file 3 and says so in the
    /// environment, to a process of our own as the environment is the process's.
    #[test]
    fn sockets_of_systemd() {
        let dir = directory();
        let path = dir.path().join("activated");
        let listener = UnixListener::bind(&path).unwrap();
        let child = std::process::Command::new("sh")
            .args(["-c", "LISTEN_FDS=1 LISTEN_PID=$$ exec \"$0\" \"$@\" 3<&0"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "--ignored", "device::server::tests::sockets_of_systemd_child"])
            .stdin(OwnedFd::from(listener))
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        assert!(talk(&UnixStream::connect(&path).unwrap()));
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
        assert!(path.exists());
    }

    #[test]
    #[ignore = "sockets_of_systemd runs it, in an environment of its own"]
    fn sockets_of_systemd_child() {
        let mut sockets = listenfd::ListenFd::from_env();
        assert!(ServerSocket::from_systemd(&mut sockets, 1).unwrap().is_none());
        let socket = ServerSocket::from_systemd(&mut sockets, 0).unwrap().unwrap();
        let (device, rings) = device();
        let server = Server::start(socket, device).unwrap();
        while !rings.take_calls().contains(&Call::Disconnected) {
            std::thread::sleep(Duration::from_millis(1));
        }
        server.stop();
    }

    #[test]
    fn one_client_after_the_other_on_one_socket() {
        let dir = directory();
        let path = dir.path().join("socket");
        let (device, rings) = device();
        let server =
            Server::start(ServerSocket::bind(&path, None).unwrap(), device.clone()).unwrap();
        let inode = || std::fs::metadata(&path).unwrap().ino();
        let before = inode();
        // Somebody who only looks does no harm.
        drop(UnixStream::connect(&path).unwrap());
        let mut clients: Vec<_> = (0..5).map(|_| UnixStream::connect(&path).unwrap()).collect();
        while !clients.is_empty() {
            let client = clients.remove(0);
            assert!(talk(&client));
            if let Some(mut next) = clients.first() {
                // It waits: its message is taken, and not answered.
                next.set_read_timeout(Some(Duration::from_millis(30))).unwrap();
                send_message(next, 1, 1, &[], &[]).unwrap();
                assert!(next.read(&mut [0]).is_err(), "two clients at a time");
                drop(client);
                next.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
                next.read_exact(&mut [0; 20]).unwrap();
            }
        }
        assert_eq!(inode(), before, "the socket was not bound again");
        server.stop();
        assert!(!path.exists());
        let ends = rings.take_calls().iter().filter(|call| **call == Call::Disconnected).count();
        assert_eq!(ends, 6);
    }

    #[test]
    fn a_connected_socket_is_served_once() {
        let (mine, theirs) = UnixStream::pair().unwrap();
        let socket = ServerSocket::from_fd(inherited(theirs).into_raw_fd()).unwrap();
        let server = Server::start(socket, device().0).unwrap();
        assert!(talk(&mine));
        let ended = |timeout| wait_any(&[server.ended()], Some(timeout));
        assert!(!ended(Duration::from_millis(20)));
        drop(mine);
        assert!(ended(Duration::from_secs(20)));
        assert!(ended(Duration::ZERO), "it stays readable");
    }

    #[test]
    fn stop_ends_waiting_and_served_clients() {
        let dir = directory();
        let path = dir.path().join("socket");
        let start = || Server::start(ServerSocket::bind(&path, None).unwrap(), device().0).unwrap();
        // Nobody there.
        start().stop();
        // One is served, one waits; both find the socket closed.
        let server = start();
        let clients = [(); 2].map(|()| UnixStream::connect(&path).unwrap());
        assert!(talk(&clients[0]));
        server.request_stop();
        server.stop();
        assert!(!talk(&clients[0]) && !talk(&clients[1]));
        // Dropping does the same.
        drop(start());
        assert!(!path.exists());
    }

    #[test]
    fn stop_does_not_wait_for_a_client_that_reads_no_answers() {
        let (mut mine, theirs) = UnixStream::pair().unwrap();
        let socket = ServerSocket::from_fd(inherited(theirs).into_raw_fd()).unwrap();
        let server = Server::start(socket, device().0).unwrap();
        // Until neither questions nor answers find a place any more.
        mine.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
        let question: Vec<u8> = [1u32, 1, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
        while mine.write_all(&question).is_ok() {}
        let began = Instant::now();
        server.stop();
        assert!(began.elapsed() < STOP_GRACE * 3);
    }
}
