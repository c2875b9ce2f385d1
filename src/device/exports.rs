//! The exports of a daemon: disks that are served, each on a socket of its own.
//!
//! ```text
//! Served ── Root ──► graph
//!    ├── Export, Pool      how it is served, its workers
//!    ├── Device            what front-ends see, for the life of the export
//!    └── Server            the socket, and the thread of its messages
//! ```
//!
//! An export ends when it is removed, or when the one front-end of a connected socket has left. Its
//! end drains the rings, stops the workers, flushes, and unlinks the socket; the node it stood on
//! stays. Dropping an export ends it as well.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::block::Root;
use crate::device::export::{Export, ExportOptions};
use crate::device::handler::Device;
use crate::device::pool::Pool;
use crate::device::server::{Server, ServerSocket};
use crate::error::{Error, Result};

/// A disk that is served on a socket.
pub struct Served {
    id: String,
    pool: Arc<Pool>,
    device: Arc<Device>,
    server: Server,
    /// What the socket is called in messages and answers.
    socket: String,
}

impl Served {
    /// Serves what `root` stands on. Its size is a multiple of the block size and not zero.
    ///
    /// # Errors
    /// If the socket's thread cannot be started.
    pub fn start(
        id: impl Into<String>,
        root: Root,
        options: ExportOptions,
        socket: ServerSocket,
    ) -> Result<Served> {
        let id = id.into();
        let described = socket.to_string();
        let pool = Arc::new(Pool::new(Arc::new(Export::new(id.clone(), root, options))));
        let device = Device::new(id.clone(), pool.clone());
        let server = Server::start(socket, Arc::clone(&device))?;
        Ok(Served { id, pool, device, server, socket: described })
    }

    /// Its name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The disk and how it is served.
    pub fn export(&self) -> &Arc<Export> {
        self.pool.export()
    }

    /// What it stands on, behind the gate of its workers.
    pub fn root(&self) -> &Root {
        &self.pool.export().root
    }

    /// Where front-ends connect to.
    pub fn socket(&self) -> &str {
        &self.socket
    }

    /// Whether a front-end is connected.
    pub fn is_connected(&self) -> bool {
        self.device.is_connected()
    }

    /// Readable once nothing is left to be served; see [`Server::ended`].
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.server.ended()
    }

    /// Whether the server has ended by itself.
    pub fn has_ended(&self) -> bool {
        self.server.has_ended()
    }

    /// Looks at the size of the disk again; the front-end is told if it has changed. The node's
    /// limits are up to date, and the gate may be closed.
    pub fn update_capacity(&self) -> bool {
        let changed = self.export().update_capacity();
        if changed {
            self.device.notify_config_change();
        }
        changed
    }

    /// Looks at what is below the disk again, in case the host has grown it; the front-end is told of
    /// a change. Blocks until the workers have drained.
    pub fn refresh_capacity(&self) -> Result<bool> {
        let changed = self.export().refresh_capacity()?;
        if changed {
            self.device.notify_config_change();
        }
        Ok(changed)
    }

    /// Asks it to end and returns at once: to end several at a time.
    pub fn request_stop(&self) {
        self.server.request_stop();
    }

    /// Ends it: see the [module](self). Blocks until all is drained and flushed. Returns what was
    /// served.
    pub fn stop(self) -> Arc<Export> {
        let Served { pool, server, .. } = self;
        server.stop();
        Arc::clone(pool.export())
    }
}

impl fmt::Debug for Served {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Served({} on {})", self.id, self.socket)
    }
}

/// All exports of a daemon, in the order they were added.
#[derive(Debug, Default)]
pub struct Exports {
    served: Vec<Served>,
}

impl Exports {
    /// The export of that name.
    pub fn get(&self, id: &str) -> Option<&Served> {
        self.served.iter().find(|served| served.id() == id)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Served> {
        self.served.iter()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.served.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.served.is_empty()
    }

    /// Adds one.
    pub fn add(&mut self, served: Served) {
        self.served.push(served);
    }

    /// Takes one out, to be [stopped](Served::stop).
    ///
    /// # Errors
    /// In QEMU's words, if there is none of that name.
    pub fn take(&mut self, id: &str) -> Result<Served> {
        match self.served.iter().position(|served| served.id() == id) {
            Some(at) => Ok(self.served.remove(at)),
            None => Err(Error::new(
                crate::error::ErrorKind::NotFound,
                format!("Export '{id}' is not found"),
            )),
        }
    }

    /// Takes out those whose servers have ended by themselves.
    pub fn take_ended(&mut self) -> Vec<Served> {
        let all = std::mem::take(&mut self.served);
        let (ended, going) = all.into_iter().partition(Served::has_ended);
        self.served = going;
        ended
    }

    /// Ends all, at the same time. Returns what was served.
    pub fn stop_all(&mut self) -> Vec<Arc<Export>> {
        for served in &self.served {
            served.request_stop();
        }
        self.served.drain(..).map(Served::stop).collect()
    }
}
