//! One connection: receive a message, have it handled, answer, until the front-end leaves.
//!
//! The `vhost` crate's [`BackendReqHandler`] receives, decodes, calls the [`Handler`] and answers.
//! Around it stands what it lacks:
//!
//! * Before a message is received it is looked at (MSG_PEEK). That gives the log its name, tells
//!   when files could not be received (a full file table would otherwise make the codec lose the
//!   header and read the body as one), and gives us a second copy of the socket that
//!   SET_BACKEND_REQ_FD brings: the codec does not let go of its own.
//! * An error of the handler is not the end. Where the message could be refused the codec has sent
//!   the refusal, and the next message is received. Everything else ends the connection.
//! * A message may arrive in pieces. The codec reads a body with one call, so the socket is told
//!   not to return less than was asked for (SO_RCVLOWAT).
//!
//! The thread blocks in two places: for the next message, and in a drain. [`Stop::request`] ends
//! the first; the second ends by itself, as nothing a drain needs waits for this thread.
//!
//! When the loop ends, for whatever reason, all rings are drained and stopped, the mappings are
//! dropped and the disk is flushed *before* the socket is closed: a front-end that sees us go finds
//! every completed request in its used ring.

#![allow(unsafe_code)]

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use vhost::vhost_user::message::{FrontendReq, MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE};
use vhost::vhost_user::{BackendReqHandler, Error as WireError};

use super::handler::{Device, Handler};
use super::lines::limited;
use crate::error::{Error, ErrorKind, Result, ResultExt};

/// Size of a message's header: request, flags, size of the body.
const HEADER_LEN: usize = 12;
/// Why a connection ended without a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The front-end closed the socket, having sent something.
    FrontEndLeft,
    /// The front-end closed the socket without a word: somebody looked whether we are alive.
    Silent,
    /// [`Stop::request`].
    Stopped,
}

/// Ends a connection from another thread.
#[derive(Debug, Default)]
pub struct Stop {
    requested: AtomicBool,
    /// The socket of the connection that is being served.
    socket: Mutex<Option<Arc<UnixStream>>>,
}

impl Stop {
    /// Ends the connection after the message it is handling. Returns at once; any thread. New
    /// connections end as they begin.
    pub fn request(&self) {
        self.requested.store(true, Ordering::SeqCst);
        // Reading only, so that an answer that waits for a drain still gets out.
        self.shut_down(Shutdown::Read);
    }

    /// Ends the connection even if the front-end does not read our answer.
    pub fn force(&self) {
        self.requested.store(true, Ordering::SeqCst);
        self.shut_down(Shutdown::Both);
    }

    /// Whether the end was asked for.
    pub fn is_requested(&self) -> bool {
        self.requested.load(Ordering::SeqCst)
    }

    fn shut_down(&self, how: Shutdown) {
        if let Some(socket) = &*self.socket.lock().expect("a stop's lock is poisoned") {
            // Fails only if the front-end has gone already.
            let _ = socket.shutdown(how);
        }
    }

    fn attach(&self, socket: Option<Arc<UnixStream>>) {
        *self.socket.lock().expect("a stop's lock is poisoned") = socket;
        if self.is_requested() {
            self.shut_down(Shutdown::Read);
        }
    }
}

/// Serves a front-end on this thread until it leaves, breaks the protocol, or `stop` is requested.
/// When this returns no ring is live and no memory of the front-end is mapped.
///
/// # Errors
/// If the connection had to be ended: the message that broke it and why.
pub fn serve(stream: UnixStream, device: &Arc<Device>, stop: &Stop) -> Result<Ended> {
    let socket = Arc::new(stream.try_clone().context(|| "cannot serve the front-end")?);
    receive_whole_bodies(&socket).context(|| "cannot serve the front-end")?;
    stop.attach(Some(socket.clone()));
    let handler = Arc::new(Handler::new(device.clone()));
    let mut codec = BackendReqHandler::from_stream(stream, handler.clone());
    let result = serve_messages(&socket, &mut codec, &handler, stop);
    handler.close();
    stop.attach(None);
    result
}

fn serve_messages(
    socket: &UnixStream,
    codec: &mut BackendReqHandler<Handler>,
    handler: &Handler,
    stop: &Stop,
) -> Result<Ended> {
    let (name, lines) = (handler.device().name(), handler.device().lines());
    let mut silent = true;
    loop {
        if stop.is_requested() {
            return Ok(Ended::Stopped);
        }
        let Some(peeked) = peek(socket)? else {
            return Ok(match (stop.is_requested(), silent) {
                (true, _) => Ended::Stopped,
                (false, true) => Ended::Silent,
                (false, false) => Ended::FrontEndLeft,
            });
        };
        if std::mem::take(&mut silent) {
            limited!(lines, info, "{name}: front-end connected");
        }
        let (request, files) = (RequestName(peeked.request), peeked.files.len());
        tracing::trace!("{name}: {request}");
        // The other duplicates are closed here, before the files themselves are received.
        let peeked_socket = peeked.into_socket();
        if let Some(socket) = &peeked_socket {
            // The codec is about to receive it once more, and would lose the message if it cannot.
            let second = socket.try_clone();
            second.map_err(|_| out_of_files(&request))?;
        }
        handler.set_peeked_socket(peeked_socket);
        let result = codec.handle_request();
        handler.set_peeked_socket(None);
        match result {
            Ok(()) => {}
            Err(WireError::ReqHandlerError(err)) => {
                limited!(lines, warn, "{name}: {request} refused: {err}");
            }
            Err(_) if stop.is_requested() => return Ok(Ended::Stopped),
            Err(WireError::Disconnected) => return Ok(Ended::FrontEndLeft),
            Err(WireError::SocketBroken(err)) => {
                tracing::debug!("{name}: {request}: front-end left before the answer: {err}");
                return Ok(Ended::FrontEndLeft);
            }
            Err(err) => {
                let err = match handler.take_failure() {
                    Some(failure) => failure,
                    None => explain(&request, files, &err),
                };
                return Err(err.context(format!("{request} ends the connection")));
            }
        }
    }
}

/// Has reads return all that was asked for, as long as there is anybody to send it.
fn receive_whole_bodies(socket: &UnixStream) -> Result<()> {
    let bytes = (HEADER_LEN + MAX_MSG_SIZE) as libc::c_int;
    // SAFETY: the option takes an int; pointer and length are those of one.
    let rc = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            std::ptr::from_ref(&bytes).cast(),
            size_of_val(&bytes) as libc::socklen_t,
        )
    };
    if rc == 0 { Ok(()) } else { Err(std::io::Error::last_os_error().into()) }
}

/// What can be known of a message before it is received.
#[derive(Debug)]
struct Peeked {
    /// The request's number; 0, which none has, if not all of the header is there yet.
    request: u32,
    /// Duplicates of the files that it carries; closed with this.
    files: Vec<OwnedFd>,
}

impl Peeked {
    /// The duplicate of the one file, if this message brings the back-end channel.
    fn into_socket(self) -> Option<OwnedFd> {
        let [file] = <[OwnedFd; 1]>::try_from(self.files).ok()?;
        // The codec checks that it is a stream socket before it believes the message.
        Some(file).filter(|_| self.request == FrontendReq::SET_BACKEND_REQ_FD as u32)
    }
}

/// Waits for a message and looks at it without receiving it; `None` when there is nobody left to
/// send one.
fn peek(socket: &UnixStream) -> Result<Option<Peeked>> {
    let mut header = [0; HEADER_LEN];
    let mut space =
        [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_ATTACHED_FD_ENTRIES))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC;
    let received = loop {
        match recvmsg(socket, &mut [IoSliceMut::new(&mut header)], &mut control, flags) {
            Ok(received) => break received,
            Err(rustix::io::Errno::INTR) => {}
            // It was killed while our answer was on the way to it.
            Err(rustix::io::Errno::CONNRESET) => return Ok(None),
            Err(err) => return Err(Error::from(err).context("cannot receive a message")),
        }
    };
    if received.bytes == 0 {
        return Ok(None);
    }
    let request = match received.bytes {
        HEADER_LEN.. => u32::from_ne_bytes([header[0], header[1], header[2], header[3]]),
        _ => 0,
    };
    let mut files = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            files.extend(received);
        }
    }
    let name = RequestName(request);
    // Alignment may have left room for one more than the codec takes.
    if files.len() > MAX_ATTACHED_FD_ENTRIES
        || (files.len() == MAX_ATTACHED_FD_ENTRIES && received.flags.contains(ReturnFlags::CTRUNC))
    {
        return Err(Error::invalid(format!(
            "{name} carries more than {MAX_ATTACHED_FD_ENTRIES} files"
        )));
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(out_of_files(&name));
    }
    Ok(Some(Peeked { request, files }))
}

/// The error of a message whose files there is no room for.
fn out_of_files(request: &RequestName) -> Error {
    Error::new(
        ErrorKind::Io,
        format!("cannot receive the files of {request}: out of file descriptors (ulimit -n)"),
    )
}

/// A sentence for an error of the codec, which itself says little more than "invalid message".
fn explain(request: &RequestName, files: usize, err: &WireError) -> Error {
    match (FrontendReq::try_from(request.0), err) {
        (Ok(FrontendReq::SET_MEM_TABLE | FrontendReq::ADD_MEM_REG), _) if files == 0 => {
            Error::invalid(
                "no memory shared by the front-end: a region came without a file (QEMU: a \
                 memory-backend with share=on; Cloud Hypervisor: --memory shared=on)",
            )
        }
        (_, WireError::InactiveFeature(_)) => {
            Error::invalid("it needs VHOST_USER_F_PROTOCOL_FEATURES, which was not negotiated")
        }
        (_, WireError::InactiveOperation(bits)) => {
            Error::invalid(format!("it needs protocol feature {bits:?}, which was not negotiated"))
        }
        (Err(()), WireError::InvalidMessage) => {
            Error::unsupported("a message of this number is not known, and was not offered")
        }
        (_, WireError::PartialMessage) => {
            Error::new(ErrorKind::Corrupt, "the front-end left in the middle of it")
        }
        (_, err) => Error::corrupt(err.to_string()),
    }
}

/// A request's name, or its number if it has none.
struct RequestName(u32);

impl std::fmt::Display for RequestName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match FrontendReq::try_from(self.0) {
            Ok(request) => write!(f, "{request:?}"),
            Err(()) => write!(f, "message {}", self.0),
        }
    }
}
