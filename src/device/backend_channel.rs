//! The back-end channel: the one message we send without being asked, "the config space changed".
//!
//! The front-end hands us a socket (SET_BACKEND_REQ_FD). A change is twelve bytes on it: request 2,
//! flags 1 (the version), size 0. NEED_REPLY is never set: QEMU answers only after a GET_CONFIG on
//! the main channel, and some versions of Cloud Hypervisor not at all.
//!
//! Front-ends ignore the message while no ring is started, so a change is remembered until the
//! first ring is live. Three things must have come together, in any order: a change, a socket, a
//! live ring. [`BackendChannel`] is where they meet; any thread may report any of them, and none
//! of them ever blocks: the socket is written without waiting, and if it is full there is an unread
//! message of the same content in it already.

use std::os::fd::OwnedFd;
use std::sync::Mutex;

use rustix::net::SendFlags;

/// The message: header only, in the host's byte order as all of vhost-user.
const CONFIG_CHANGE: [u32; 3] = [2, 1, 0];

/// A connection's way to tell its front-end about changes. See the module's documentation.
#[derive(Default)]
pub struct BackendChannel {
    /// Held for a few instructions and one send that does not wait.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    socket: Option<OwnedFd>,
    live: bool,
    pending: bool,
}

/// What became of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notified {
    /// The message is on its way.
    Sent,
    /// It will be sent when the front-end can act on it.
    Deferred,
    /// The channel broke; the front-end will not learn of the change by us.
    Broken,
}

impl BackendChannel {
    /// The front-end gave us a socket; an older one is closed.
    pub fn set_socket(&self, socket: OwnedFd) -> Option<Notified> {
        let mut state = self.lock();
        state.socket = Some(socket);
        state.deliver()
    }

    /// Says whether any ring is live. Returns what became of a remembered change, if there is one.
    pub fn set_live(&self, live: bool) -> Option<Notified> {
        let mut state = self.lock();
        state.live = live;
        state.deliver()
    }

    /// The config space has changed.
    pub fn notify(&self) -> Notified {
        let mut state = self.lock();
        state.pending = true;
        state.deliver().unwrap_or(Notified::Deferred)
    }

    /// The front-end has read the config space, so it knows of every change before.
    pub fn config_was_read(&self) {
        self.lock().pending = false;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("the back-end channel's lock is poisoned")
    }
}

impl State {
    /// Sends a remembered change if everything it needs is there.
    fn deliver(&mut self) -> Option<Notified> {
        let socket = self.socket.as_ref().filter(|_| self.live && self.pending)?;
        self.pending = false;
        let mut bytes = [0; 12];
        for (to, word) in bytes.chunks_exact_mut(4).zip(CONFIG_CHANGE) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        // Twelve bytes go as a whole or not at all: a stream socket between processes takes its
        // buffer in larger pieces.
        match rustix::net::send(socket, &bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            // A full socket holds messages that nobody has read yet, and they say the same.
            Ok(_) | Err(rustix::io::Errno::AGAIN) => Some(Notified::Sent),
            Err(_) => {
                self.socket = None;
                Some(Notified::Broken)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    /// Everything that is in the socket now.
    fn drain(socket: &mut UnixStream) -> Vec<u8> {
        socket.set_nonblocking(true).unwrap();
        let mut out = Vec::new();
        let _ = socket.read_to_end(&mut out);
        out
    }

    #[test]
    fn change_socket_and_live_ring_meet_in_any_order() {
        // Each permutation of the three; the last one sends.
        for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
            let (mut theirs, ours) = UnixStream::pair().unwrap();
            let channel = BackendChannel::default();
            let mut ours = Some(ours);
            for (n, step) in order.into_iter().enumerate() {
                assert!(drain(&mut theirs).is_empty(), "{order:?} before step {n}");
                let result = match step {
                    0 => channel.set_socket(ours.take().unwrap().into()),
                    1 => channel.set_live(true),
                    _ => Some(channel.notify()).filter(|n| *n != Notified::Deferred),
                };
                assert_eq!(result, (n == 2).then_some(Notified::Sent), "{order:?} step {n}");
            }
            assert_eq!(drain(&mut theirs), [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
            // It is sent once.
            assert_eq!(channel.set_live(true), None);
            assert!(drain(&mut theirs).is_empty());
        }
    }

    #[test]
    fn a_full_or_closed_socket_never_blocks() {
        let (theirs, ours) = UnixStream::pair().unwrap();
        let channel = BackendChannel::default();
        channel.set_socket(ours.into());
        channel.set_live(true);
        for _ in 0..100_000 {
            assert_eq!(channel.notify(), Notified::Sent);
        }
        drop(theirs);
        assert_eq!(channel.notify(), Notified::Broken);
        assert_eq!(channel.notify(), Notified::Deferred);
    }

    #[test]
    fn reading_the_config_makes_a_pending_change_known() {
        let (mut theirs, ours) = UnixStream::pair().unwrap();
        let channel = BackendChannel::default();
        channel.set_socket(ours.into());
        assert_eq!(channel.notify(), Notified::Deferred);
        channel.config_was_read();
        assert_eq!(channel.set_live(true), None);
        assert!(drain(&mut theirs).is_empty());
    }
}
