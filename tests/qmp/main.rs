//! The control socket from outside: the wire, clients that were written for QEMU, hostile ones.

#[path = "../common/mod.rs"]
mod common;

mod against_qsd;
mod client;
mod commands;
mod create;
mod jobs;
mod malice;
mod python;
mod reopen;
mod wire;

use std::path::PathBuf;

use client::Qmp;
use common::{Backend, Setup};

/// A back-end with a control socket.
struct Served {
    backend: Backend,
    /// Where the control socket is.
    control: PathBuf,
    dir: tempfile::TempDir,
}

impl Served {
    fn start(args: &[&str]) -> Served {
        let dir = tempfile::Builder::new().prefix("vublk-").tempdir().expect("a directory");
        let control = dir.path().join("qmp.sock");
        let mut all = vec!["--control", control.to_str().expect("UTF-8")];
        all.extend(args);
        let mut backend = Setup::new(&all).start();
        backend.wait_log("control socket on");
        backend.assert_lives();
        Served { backend, control, dir }
    }

    /// A client past the negotiation.
    fn client(&self) -> Qmp {
        Qmp::negotiated(&self.control)
    }

    /// Asserts that others are served as ever.
    #[track_caller]
    fn assert_well(&mut self) {
        self.backend.assert_lives();
        self.client().ok(r#"{"execute": "query-status"}"#);
    }
}
