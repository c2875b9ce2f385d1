//! The guest that `vublk log explore --guest` asks: its two disks.
//!
//! ```text
//! SOCKET           an overlay on a state, another one for each question
//! SOCKET.mailbox   questions and answers
//! ```

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::block::{Graph, Node, NodeOptions, Root};
use crate::cli::serve_args::{MAX_QUEUE_SIZE, MAX_QUEUES};
use crate::control::disks::{ExportRequest, WorkerOptions};
use crate::control::{Disks, crash_states};
use crate::crash::StateName;
use crate::crash::check::{Bounds, Verdict};
use crate::crash::mailbox::{Mailbox, MailboxDisk};
use crate::crash::stage::GuestChecker;
use crate::device::export::{CachePolicy, ExportOptions};
use crate::device::exports::Served;
use crate::device::server::ServerSocket;
use crate::error::{Error, ErrorKind, Result};
use crate::images::crash_state::{self, StateOf};
use crate::images::{Access, Layers, OpenRequest, StateDir};
use crate::io::EngineKind;

/// Name of the export that shows the states.
const DISK: &str = "disk";
/// What the sockets' names differ by.
const MAILBOX: &str = ".mailbox";
/// Block size of the mailbox in bytes.
const MAILBOX_BLOCK: u32 = 512;
/// How long a guest may take to hear that this is the end.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Both disks, served. Guests may come and go.
pub struct Guest {
    disks: Disks,
    mailbox: Arc<Mailbox>,
    /// `None` once it has ended.
    letters: Option<Served>,
}

impl Guest {
    /// Serves the disks on `socket` and on the one beside it; that with the states has blocks of
    /// `block_size` bytes. `base` is how the disk as it was when logging began is opened.
    ///
    /// # Errors
    /// As for `vublk serve`.
    pub fn serve(socket: &Path, log: &Path, base: &OpenRequest, block_size: u64) -> Result<Guest> {
        let workers = WorkerOptions { engine: EngineKind::Auto, threads: None, poll_us: 0 };
        let layers = Layers::new(Graph::new(), Vec::new(), StateDir::None);
        let mut disks = Disks::new(layers, workers);
        // What it shows until the first question: nothing was written yet.
        let state = Some(StateOf { log: log.into(), state: StateName::prefix(0) });
        let request = OpenRequest { access: Access::Write, state, ..base.clone() };
        let image = crash_state::open_writable(&request, block_size, None)?;
        let node = disks.layers.add_format(image, None, true)?;
        disks.export(ExportRequest {
            id: DISK.into(),
            node,
            socket: ServerSocket::bind(socket, None)?,
            writable: true,
            cache: CachePolicy::WriteBack,
            block_size,
            num_queues: MAX_QUEUES.into(),
            queue_size: MAX_QUEUE_SIZE,
            serial: DISK.into(),
        })?;
        let mailbox = Arc::new(Mailbox::default());
        let disk = Arc::new(MailboxDisk::new(Arc::clone(&mailbox)));
        let node = Node::new(disk, NodeOptions::default());
        let options = ExportOptions {
            serial: "mailbox".into(),
            block_size: MAILBOX_BLOCK,
            num_queues: MAX_QUEUES.into(),
            queue_size: MAX_QUEUE_SIZE,
            threads: 1,
            cache: CachePolicy::WriteThrough,
            engine: EngineKind::Auto,
            poll_us: 0,
            read_only: false,
        };
        let socket = ServerSocket::bind(&mailbox_of(socket), None)?;
        let letters = Served::start("mailbox", Root::new("mailbox", node), options, socket)?;
        Ok(Guest { disks, mailbox, letters: Some(letters) })
    }

    /// Waits for a guest that is ready; whether there is one.
    pub fn wait(&self, bounds: Bounds<'_>) -> bool {
        self.mailbox.wait_for_guest(bounds)
    }
}

/// Where the mailbox of a disk is served.
pub fn mailbox_of(socket: &Path) -> PathBuf {
    let mut name = socket.as_os_str().to_owned();
    name.push(MAILBOX);
    name.into()
}

impl GuestChecker for Guest {
    fn check(
        &mut self,
        state: &StateName,
        mark: &str,
        bounds: Bounds<'_>,
    ) -> Result<(Verdict, String)> {
        if !self.wait(bounds) {
            return Err(Error::new(
                ErrorKind::Busy,
                format!(
                    "no guest was ready for state {state} in {} seconds; with --results, the \
                     exploration can go on from here once there is one",
                    bounds.limit.as_secs()
                ),
            ));
        }
        crash_states::present(&mut self.disks, DISK, state)?;
        self.mailbox.ask(&state.clone().trimmed(), mark, bounds)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.mailbox.end(LAST_WORDS);
        if let Some(letters) = self.letters.take() {
            letters.stop();
        }
        if let (_, Err(err)) = self.disks.close() {
            tracing::warn!("the disk that was shown to a guest: {err}");
        }
    }
}

impl std::fmt::Debug for Guest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Guest")
    }
}
