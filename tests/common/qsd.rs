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
        let pidfile = dir.join("qsd.pid");
        let chardev = format!("socket,id=m,path={},server=on,wait=off", socket.display());
        let mut command = Command::new("qemu-storage-daemon");
        command.args(["--chardev", &chardev, "--monitor", "chardev=m", "--pidfile"]).arg(&pidfile);
        command.current_dir(dir);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut started = None;
        super::wait_until("qemu-storage-daemon", || {
            // The one before, if there was one, is gone by now.
            drop(started.take());
            let _ = std::fs::remove_file(&pidfile);
            let child = command.spawn().expect("it starts");
            let mut qsd = Qsd { child, socket: socket.clone(), first: None };
            // A connection that comes while its monitor is being set up may be forgotten, and with it
            // all that follow. This file is the last thing that it does before it serves.
            super::wait_until("the file with its number", || {
                std::fs::read(&pidfile).is_ok_and(|number| !number.is_empty())
            });
            qsd.first = Qmp::try_connect(&qsd.socket);
            let is_there = qsd.first.is_some();
            started = Some(qsd);
            is_there
        });
        started
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
