//! The options of `vublk serve` for many disks, in the grammar of qemu-storage-daemon.
//!
//! ```text
//! --blockdev driver=file,node-name=f0,filename=/vm/disk.qcow2
//! --blockdev driver=qcow2,node-name=d0,file=f0
//! --export type=vhost-user-blk,id=e0,node-name=d0,addr.type=unix,addr.path=/run/e0.sock,writable=on
//! --chardev socket,id=c0,path=/run/qmp.sock,server=on,wait=off --monitor chardev=c0
//! ```
//!
//! Each may be JSON as well. They take effect in this order: nodes as given, exports as given,
//! monitors. What is not known is refused by name.

use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::Args;

use crate::control::blockdev::{self, BlockdevOptions};
use crate::control::commands::{BlockExportOptions, add_export};
use crate::control::qapi::{Flat, QmpResult};
use crate::control::{Disks, QmpError, keyval};
use crate::device::server::{ServerSocket, SocketRights};
use crate::error::{Error, Result};
use crate::qapi;

/// Nodes, exports and control sockets of a daemon with many disks.
#[derive(Clone, Debug, Default, Args)]
pub struct DaemonArgs {
    /// Add a node to the graph (driver=…,node-name=…, or JSON), as qemu-storage-daemon does
    #[arg(long = "blockdev", value_name = "OPTIONS")]
    blockdevs: Vec<String>,
    /// Serve a node on a socket of its own (type=vhost-user-blk,id=…,node-name=…,addr.type=unix,
    /// addr.path=…[,writable=on][,num-queues=N][,logical-block-size=N][,writethrough=on])
    #[arg(long = "export", value_name = "OPTIONS")]
    exports: Vec<String>,
    /// A socket for --monitor (socket,id=…,path=…,server=on,wait=off)
    #[arg(long = "chardev", value_name = "OPTIONS")]
    chardevs: Vec<String>,
    /// Take commands (QMP) on the socket of a --chardev (chardev=ID)
    #[arg(long = "monitor", value_name = "OPTIONS")]
    monitors: Vec<String>,
}

qapi! {
    /// A socket to listen on.
    pub struct ChardevSocket {
        /// Its path.
        pub path: Option<String>,
        /// Or the number of an inherited file descriptor.
        pub fd: Option<i64>,
        /// Whether to listen; must be on.
        pub server: Option<bool>,
        /// Whether to wait for a client before going on; must be off.
        pub wait: Option<bool>,
    }
}
qapi! {
    /// What a chardev is.
    pub union ChardevBackend by "backend" { Socket(ChardevSocket) = "socket" }
}
qapi! {
    /// A chardev.
    pub struct Chardev {
        /// Its name.
        pub id: String,
        /// What it is.
        pub backend: Flat<ChardevBackend>,
    }
}
qapi! {
    /// The protocol of a monitor.
    pub enum MonitorMode { Control = "control" }
}
qapi! {
    /// A monitor.
    pub struct MonitorOptions {
        /// The chardev it speaks on.
        pub chardev: String,
        /// Its name; it has no use.
        pub id: Option<String>,
        /// The protocol: QMP.
        pub mode: Option<MonitorMode>,
    }
}

impl DaemonArgs {
    /// Whether many disks are asked for.
    pub fn is_used(&self) -> bool {
        let lists = [&self.blockdevs, &self.exports, &self.chardevs, &self.monitors];
        lists.iter().any(|list| !list.is_empty())
    }

    /// Adds all nodes and exports.
    ///
    /// # Errors
    /// Names the option.
    pub fn set_up(&self, disks: &mut Disks) -> Result<()> {
        for text in &self.blockdevs {
            let named = |err| named(err, "--blockdev", text);
            let options: BlockdevOptions = keyval::parse(text, Some("driver")).map_err(named)?;
            blockdev::add(disks, &options).map_err(named)?;
        }
        for text in &self.exports {
            let named = |err| named(err, "--export", text);
            let options: BlockExportOptions = keyval::parse(text, Some("type")).map_err(named)?;
            add_export(disks, options).map_err(named)?;
        }
        Ok(())
    }

    /// The sockets of the monitors.
    ///
    /// # Errors
    /// Names the option.
    pub fn monitor_sockets(&self) -> Result<Vec<ServerSocket>> {
        let mut chardevs = Vec::new();
        for text in &self.chardevs {
            let chardev: Chardev = keyval::parse(text, Some("backend"))
                .map_err(|err| named(err, "--chardev", text))?;
            if chardevs.iter().any(|(other, _): &(Chardev, _)| other.id == chardev.id) {
                let err =
                    QmpError::generic(format!("Chardev with id '{}' already exists", chardev.id));
                return Err(named(err, "--chardev", text));
            }
            chardevs.push((chardev, text));
        }
        let mut sockets = Vec::new();
        for text in &self.monitors {
            let named_monitor = |err| named(err, "--monitor", text);
            let monitor: MonitorOptions =
                keyval::parse(text, Some("chardev")).map_err(named_monitor)?;
            let found = chardevs.iter().position(|(chardev, _)| chardev.id == monitor.chardev);
            let Some(found) = found else {
                return Err(named_monitor(QmpError::generic(format!(
                    "chardev \"{}\" not found",
                    monitor.chardev
                ))));
            };
            // One monitor for each.
            let (chardev, text) = chardevs.remove(found);
            sockets.push(listen(&chardev).map_err(|err| named(err, "--chardev", text))?);
        }
        match chardevs.first() {
            Some((_, text)) => {
                Err(named(QmpError::generic("no --monitor uses it"), "--chardev", text))
            }
            None => Ok(sockets),
        }
    }
}

fn listen(chardev: &Chardev) -> QmpResult<ServerSocket> {
    let ChardevBackend::Socket(socket) = &chardev.backend.0;
    if socket.server != Some(true) {
        return Err(QmpError::generic("Parameter 'server' expects 'on': a monitor listens"));
    }
    if socket.wait != Some(false) {
        return Err(QmpError::generic(
            "Parameter 'wait' expects 'off': disks are served meanwhile",
        ));
    }
    match (&socket.path, socket.fd) {
        (Some(path), None) => {
            let rights = SocketRights { mode: 0o600, group: None };
            Ok(ServerSocket::bind(&PathBuf::from(path), Some(rights))?)
        }
        (None, Some(fd)) => {
            let fd = RawFd::try_from(fd).map_err(|_| {
                QmpError::generic(format!("Parameter 'fd' of {fd} is no descriptor"))
            })?;
            Ok(ServerSocket::from_fd(fd)?)
        }
        _ => Err(QmpError::generic("Parameter 'path' or 'fd' is missing, or both are given")),
    }
}

fn named(err: QmpError, option: &str, text: &str) -> Error {
    Error::from(err).context(format!("{option} {text}"))
}
