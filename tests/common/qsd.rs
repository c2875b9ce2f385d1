//! `qemu-storage-daemon`, whose answers ours are compared with.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::Qmp;

/// A daemon with a monitor; gone when dropped.
#[derive(Debug)]
pub struct Qsd {
    child: Child,
    socket: PathBuf,
    /// A connection from the start. The monitor takes one at a time.
    first: Option<Qmp>,
}

impl Qsd {
    /// Starts one that works in `dir`; `None`, visibly, where it is not installed.
    pub fn start(dir: &Path) -> Option<Qsd> {
        if !super::have("qemu-storage-daemon") {
            return None;
        }
        let socket = dir.join("qsd.sock");
        let chardev = format!("socket,id=m,path={},server=on,wait=off", socket.display());
        let mut command = Command::new("qemu-storage-daemon");
        command.args(["--chardev", &chardev, "--monitor", "chardev=m"]).current_dir(dir);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut qsd = Qsd { child: command.spawn().expect("it starts"), socket, first: None };
        // While it starts, QEMU may close a connection that it has accepted, or one that follows
        // another too closely.
        super::wait_until("qemu-storage-daemon", || {
            qsd.first = Qmp::try_connect(&qsd.socket);
            qsd.first.is_some()
        });
        Some(qsd)
    }

    /// The connection, once.
    pub fn connect(&mut self) -> Qmp {
        self.first.take().expect("the first one")
    }

    /// Where its monitor listens, for who connects himself, to one at a time.
    pub fn socket(&mut self) -> &Path {
        self.first = None;
        &self.socket
    }
}

impl Drop for Qsd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
