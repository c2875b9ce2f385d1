//! The control thread: listeners, clients, and what other threads leave for them.
//!
//! See [`crate::control`] for who does what. The thread sleeps in one `epoll_wait`, without a
//! timeout unless an event waits for its limit.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};
use rustix::net::sockopt;
use serde_json::Value;

use super::client::Client;
use super::command::Run;
use super::daemon::Shared;
use super::inbox::Note;
use super::qapi::QmpResult;
use super::request::{Call, Request};
use crate::device::server::ServerSocket;
use crate::error::{Error, Result, ResultExt};

/// The most clients at a time; others wait until one has left.
const MAX_CLIENTS: usize = 256;
/// Pause after an accept that failed for want of file descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// How long clients have at the end to fetch what is left for them.
const STOP_GRACE: Duration = Duration::from_secs(1);

/// Mark of the inbox; listeners have the numbers after it, clients those from [`FIRST_CLIENT`].
const INBOX: u64 = 0;
const FIRST_CLIENT: u64 = 1 << 32;

/// The control thread's handle. Dropping it ends the thread.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts to serve clients on these sockets, which must listen.
    pub fn start(sockets: Vec<ServerSocket>, shared: Arc<Shared>) -> Result<Server> {
        let mut state = State::new(sockets, Arc::clone(&shared))?;
        shared.inbox.set_open(true);
        let thread = std::thread::Builder::new().name("vublk-qmp".into());
        let thread = thread.spawn(move || state.run()).context(|| "control thread")?;
        Ok(Server { shared, thread: Some(thread) })
    }

    /// Lets clients fetch what is left for them, and closes everything.
    pub fn stop(self) {}
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.inbox.leave(Note::Stop);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the control thread has panicked");
        }
    }
}

/// What the thread has.
struct State {
    epoll: std::os::fd::OwnedFd,
    /// Kept as they are, since they remove their files at the end.
    sockets: Vec<ServerSocket>,
    clients: BTreeMap<u64, Entry>,
    /// Clients for which there may be something to do.
    touched: BTreeSet<u64>,
    next_client: u64,
    /// Whether the listeners are watched.
    accepting: bool,
    /// When to try to accept again, after the host had nothing left.
    accept_again: Option<Instant>,
    shared: Arc<Shared>,
    stopping: bool,
}

struct Entry {
    client: Client,
    /// What epoll watches for.
    interest: epoll::EventFlags,
    /// Whether both directions of the connection are closed.
    hung_up: bool,
}

impl State {
    fn new(sockets: Vec<ServerSocket>, shared: Arc<Shared>) -> Result<State> {
        let mut state = State {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC).context(|| "epoll")?,
            sockets,
            clients: BTreeMap::new(),
            touched: BTreeSet::new(),
            next_client: FIRST_CLIENT,
            accepting: true,
            accept_again: None,
            shared,
            stopping: false,
        };
        state.watch()?;
        Ok(state)
    }

    fn watch(&mut self) -> Result<()> {
        let what = || "epoll";
        let inbox = self.shared.inbox.readable();
        epoll::add(&self.epoll, inbox, epoll::EventData::new_u64(INBOX), epoll::EventFlags::IN)
            .context(what)?;
        for (index, socket) in self.sockets.iter().enumerate() {
            let listener = socket.listener().ok_or_else(|| {
                Error::invalid(format!("{socket} does not listen; a control socket has to"))
            })?;
            let mark = epoll::EventData::new_u64(index as u64 + 1);
            epoll::add(&self.epoll, listener, mark, epoll::EventFlags::IN).context(what)?;
        }
        Ok(())
    }

    fn run(&mut self) {
        let mut ready: Vec<epoll::Event> = Vec::with_capacity(64);
        while !self.stopping {
            let now = Instant::now();
            let next = self.shared.events().release(now);
            let next = next.into_iter().chain(self.accept_again).min();
            // Where there is something to do already, only a look.
            let next = if self.touched.is_empty() { next } else { Some(now) };
            self.wait(&mut ready, next.map(|at| at.saturating_duration_since(now)));
            if self.accept_again.is_some_and(|at| at <= Instant::now()) {
                self.accept_again = None;
                self.accept_or_not();
            }
            for event in ready.drain(..) {
                match event.data.u64() {
                    INBOX => self.fetch(),
                    id if id < FIRST_CLIENT => self.accept(id as usize - 1),
                    id => self.serve(id, event.flags),
                }
            }
            // One after the other, never one inside of another: what is done for one may touch
            // others, or itself again. Each has one turn, then others are looked at.
            self.settle_touched();
        }
        self.say_goodbye();
    }

    fn settle_touched(&mut self) {
        for id in std::mem::take(&mut self.touched) {
            self.settle(id);
        }
    }

    fn wait(&self, ready: &mut Vec<epoll::Event>, timeout: Option<Duration>) {
        let timeout = timeout.map(|timeout| Timespec {
            tv_sec: timeout.as_secs() as i64,
            // Never a little too early, which would be a busy loop until it is time.
            tv_nsec: i64::from(timeout.subsec_nanos()),
        });
        ready.clear();
        let spare = rustix::buffer::spare_capacity(ready);
        match epoll::wait(&self.epoll, spare, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(err) => {
                // Cannot be, and must not become a busy loop.
                tracing::error!("epoll_wait: {err}");
                std::thread::sleep(ACCEPT_PAUSE);
            }
        }
    }

    /// Accepts one client.
    fn accept(&mut self, index: usize) {
        use rustix::io::Errno;
        let Some(listener) = self.sockets.get(index).and_then(ServerSocket::listener) else {
            return;
        };
        match listener.accept() {
            Ok((stream, _)) => {
                if let Err(err) = self.admit(stream, listener_name(listener)) {
                    tracing::warn!("a control client was turned away: {err}");
                }
            }
            Err(err) => {
                let exhausted = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
                let errno = err.raw_os_error().map(Errno::from_raw_os_error);
                // Otherwise the client has gone again.
                if errno.is_some_and(|errno| exhausted.contains(&errno)) {
                    tracing::warn!("a control client has to wait: {err}");
                    self.accept_again = Some(Instant::now() + ACCEPT_PAUSE);
                }
            }
        }
        self.accept_or_not();
    }

    fn admit(&mut self, stream: UnixStream, name: String) -> Result<()> {
        stream.set_nonblocking(true).context(|| "control client")?;
        let id = self.next_client;
        self.next_client += 1;
        if let Ok(peer) = sockopt::socket_peercred(&stream) {
            let (pid, uid) = (peer.pid.as_raw_nonzero(), peer.uid.as_raw());
            tracing::debug!(client = id - FIRST_CLIENT, %pid, uid, "control client on {name}");
        }
        let interest = epoll::EventFlags::empty();
        let mark = epoll::EventData::new_u64(id);
        epoll::add(&self.epoll, stream.as_fd(), mark, interest).context(|| "epoll")?;
        self.clients.insert(id, Entry { client: Client::new(stream), interest, hung_up: false });
        self.touched.insert(id);
        Ok(())
    }

    /// Watches the listeners if there is room for clients.
    fn accept_or_not(&mut self) {
        let accepting = self.clients.len() < MAX_CLIENTS && self.accept_again.is_none();
        if accepting == std::mem::replace(&mut self.accepting, accepting) {
            return;
        }
        let flags = if accepting { epoll::EventFlags::IN } else { epoll::EventFlags::empty() };
        for (index, socket) in self.sockets.iter().enumerate() {
            let mark = epoll::EventData::new_u64(index as u64 + 1);
            if let Some(listener) = socket.listener()
                && let Err(err) = epoll::modify(&self.epoll, listener, mark, flags)
            {
                tracing::error!("epoll_ctl: {err}");
            }
        }
    }

    /// Takes what other threads have left.
    fn fetch(&mut self) {
        for note in self.shared.inbox.take() {
            match note {
                Note::Event(line) => self.broadcast(&line),
                Note::Reply { client, id, result } => {
                    // The client may have left meanwhile.
                    if let Some(entry) = self.clients.get_mut(&client) {
                        entry.client.answered();
                        entry.client.reply(id, result);
                        self.touched.insert(client);
                    }
                }
                Note::Stop => self.stopping = true,
            }
        }
    }

    fn broadcast(&mut self, line: &str) {
        for (id, entry) in &mut self.clients {
            entry.client.event(line);
            self.touched.insert(*id);
        }
    }

    /// Something has happened to a client's socket.
    fn serve(&mut self, id: u64, flags: epoll::EventFlags) {
        let Some(entry) = self.clients.get_mut(&id) else { return };
        if flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR) {
            // Nobody is there to be answered. What was asked for is done all the same, and without
            // epoll, which would report this again and again.
            entry.hung_up = true;
            let _ = epoll::delete(&self.epoll, entry.client.stream());
        } else if entry.client.receive().is_err() {
            return self.remove(id);
        }
        self.touched.insert(id);
    }

    /// Runs a request that a client waits for, sends what it is owed, and decides what to watch
    /// for.
    fn settle(&mut self, id: u64) {
        let Some(entry) = self.clients.get_mut(&id) else { return };
        if entry.hung_up {
            entry.client.receive_rest();
        }
        if let Some(request) = entry.client.next_request() {
            self.run_request(id, request);
            self.touched.insert(id);
        }
        let Some(entry) = self.clients.get_mut(&id) else { return };
        if entry.hung_up {
            if entry.client.is_done() {
                self.remove(id);
            }
            return;
        }
        if entry.client.transmit().is_err() || entry.client.is_done() {
            return self.remove(id);
        }
        if entry.client.has_next_request() {
            // There was no room before it was sent, and no event of the socket tells of that.
            self.touched.insert(id);
        }
        let mut interest = epoll::EventFlags::empty();
        interest.set(epoll::EventFlags::IN, entry.client.wants_input());
        interest.set(epoll::EventFlags::OUT, entry.client.wants_output());
        if interest != entry.interest {
            entry.interest = interest;
            let mark = epoll::EventData::new_u64(id);
            if epoll::modify(&self.epoll, entry.client.stream(), mark, interest).is_err() {
                self.remove(id);
            }
        }
    }

    fn run_request(&mut self, id: u64, request: Request) {
        let Some(entry) = self.clients.get_mut(&id) else { return };
        let result = match request.call {
            Err(err) => Err(err),
            Ok(call) => {
                tracing::debug!(client = id - FIRST_CLIENT, "{}", call.name);
                match call.command(entry.client.is_negotiated()).map(|command| command.run) {
                    Err(err) => Err(err),
                    Ok(_) if !entry.client.is_negotiated() => entry.client.negotiate(call),
                    Ok(Run::Quick(run)) => {
                        let result = run(&self.shared, call.arguments);
                        // What it caused comes before its answer.
                        self.fetch();
                        result
                    }
                    Ok(Run::Main(run)) => {
                        entry.client.set_waiting();
                        return self.run_on_main(id, request.id, call, run);
                    }
                }
            }
        };
        if let Some(entry) = self.clients.get_mut(&id) {
            entry.client.reply(request.id, result);
        }
    }

    fn run_on_main(
        &self,
        client: u64,
        id: Option<Value>,
        call: Call,
        run: fn(&mut super::Daemon, serde_json::Map<String, Value>) -> QmpResult<Value>,
    ) {
        self.shared.on_main(move |daemon| {
            if daemon.is_quitting() {
                // The client finds the connection closed.
                return;
            }
            let result = run(daemon, call.arguments);
            daemon.shared().inbox.leave(Note::Reply { client, id, result });
        });
    }

    fn remove(&mut self, id: u64) {
        // Closing its socket takes it out of epoll, too.
        if self.clients.remove(&id).is_some() {
            tracing::debug!(client = id - FIRST_CLIENT, "control client has left");
            self.accept_or_not();
        }
    }

    /// Sends what is left, as far as clients take it in time.
    fn say_goodbye(&mut self) {
        self.shared.inbox.set_open(false);
        let deadline = Instant::now() + STOP_GRACE;
        let mut ready = Vec::with_capacity(64);
        loop {
            self.clients
                .retain(|_, entry| entry.client.transmit().is_ok() && entry.client.wants_output());
            let left = deadline.saturating_duration_since(Instant::now());
            if self.clients.is_empty() || left.is_zero() {
                return;
            }
            for (id, entry) in &self.clients {
                let mark = epoll::EventData::new_u64(*id);
                let _ =
                    epoll::modify(&self.epoll, entry.client.stream(), mark, epoll::EventFlags::OUT);
            }
            self.wait(&mut ready, Some(left.min(Duration::from_millis(50))));
        }
    }
}

fn listener_name(listener: &UnixListener) -> String {
    let address = listener.local_addr().ok();
    let path = address.as_ref().and_then(|address| address.as_pathname());
    path.map_or_else(String::new, |path| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;
    use crate::block::Graph;
    use crate::control::disks::{Disks, WorkerOptions};
    use crate::control::{Daemon, client};
    use crate::images::{Layers, StateDir};
    use crate::io::EngineKind;

    /// What was kept waiting for want of room is run when everything goes out at once: then no event
    /// of the socket comes any more that would remind us of it.
    #[test]
    fn requests_that_wait_for_room_are_run_when_there_is_some() {
        let workers = WorkerOptions { engine: EngineKind::Threads, threads: None, poll_us: 0 };
        let layers = Layers::new(Graph::new(), Vec::new(), StateDir::None);
        let daemon = Daemon::new(None, Disks::new(layers, workers)).unwrap();
        let mut state = State::new(Vec::new(), Arc::clone(daemon.shared())).unwrap();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        // As much as the host allows: all that may be unread finds a place in it.
        sockopt::set_socket_send_buffer_size(&theirs, 8 << 20).unwrap();
        state.admit(theirs, String::new()).unwrap();
        let id = FIRST_CLIENT;
        let ask = |mut ours: &UnixStream, text: &str| {
            std::io::Write::write_all(&mut ours, text.as_bytes()).unwrap();
        };
        let settle = |state: &mut State| {
            state.serve(id, epoll::EventFlags::IN);
            while !state.touched.is_empty() {
                state.settle_touched();
            }
        };
        ask(&ours, "{'execute': 'qmp_capabilities'}");
        settle(&mut state);
        ask(&ours, "{'execute': 'query-version', 'id': 'late'}");
        state.serve(id, epoll::EventFlags::IN);
        state.broadcast(&"x".repeat(client::MAX_UNREAD_REPLIES + 1));
        settle(&mut state);
        assert!(!state.clients[&id].client.wants_output(), "the socket's buffer is too small");
        ours.set_nonblocking(true).unwrap();
        let mut received = Vec::new();
        let _ = ours.read_to_end(&mut received);
        let received = String::from_utf8(received).unwrap();
        let last = received.lines().next_back().unwrap();
        assert!(last.contains("\"late\""), "{} bytes", last.len());
    }
}
