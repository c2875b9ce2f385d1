//! A writer that the host throttles must not stall its queue.
//!
//! The host throttles whoever dirties pages faster than the disk takes them. To see that, the limit
//! of dirty pages is lowered for a moment, which all of the host feels: the test runs only where
//! `VUBLK_TEST_DIRTY_LIMIT` is set, as root.

use std::time::{Duration, Instant};

use vublk::frontend::request::STATUS_OK;
use vublk::frontend::{Layout, Personality, Request, SessionOptions};

use crate::common::{Setup, skip, soon};

/// The host's limits of dirty pages, put back when dropped.
struct DirtyLimit {
    /// Files under /proc/sys/vm and what they held.
    before: Vec<(&'static str, String)>,
}

impl DirtyLimit {
    fn lower(bytes: u64) -> Option<DirtyLimit> {
        let mut before = Vec::new();
        for (in_bytes, in_percent, new) in [
            ("dirty_background_bytes", "dirty_background_ratio", bytes / 2),
            ("dirty_bytes", "dirty_ratio", bytes),
        ] {
            let read = |name| std::fs::read_to_string(format!("/proc/sys/vm/{name}")).ok();
            let bytes_before = read(in_bytes)?;
            // The one that is 0 is not in force, and becomes 0 again when the other is written.
            if bytes_before.trim() == "0" {
                before.push((in_percent, read(in_percent)?));
            } else {
                before.push((in_bytes, bytes_before));
            }
            let limit = DirtyLimit { before };
            std::fs::write(format!("/proc/sys/vm/{in_bytes}"), new.to_string()).ok()?;
            before = limit.keep();
        }
        Some(DirtyLimit { before })
    }

    /// Takes what there is to restore, without restoring it.
    fn keep(mut self) -> Vec<(&'static str, String)> {
        std::mem::take(&mut self.before)
    }
}

impl Drop for DirtyLimit {
    fn drop(&mut self) {
        for (name, value) in &self.before {
            let _ = std::fs::write(format!("/proc/sys/vm/{name}"), value);
        }
    }
}

#[test]
fn reads_go_on_while_writes_are_throttled() {
    if std::env::var_os("VUBLK_TEST_DIRTY_LIMIT").is_none() {
        return skip("lowers the host's dirty limit; set VUBLK_TEST_DIRTY_LIMIT to run it");
    }
    let backend = Setup::new(&[]).size(1 << 30).start();
    backend.scribble(0, &[7; 1 << 20]);
    let mut options = SessionOptions::new(Personality::Qemu);
    options.memory = 256 << 20;
    let mut session = backend.open(options);
    let Some(limit) = DirtyLimit::lower(4 << 20) else {
        return skip("no right to lower the host's dirty limit");
    };
    // More than the limit many times over, each write into fresh space.
    let mut writes = 0;
    let mut next = 0u64;
    let (mut reads, mut slowest) = (0, Duration::ZERO);
    let end = Instant::now() + Duration::from_secs(4);
    let deadline = soon() + Duration::from_secs(20);
    while Instant::now() < end {
        while writes < 32 {
            let at = (4 << 20) + next % 960 * (1 << 20);
            let request = Request::write(at, vec![next as u8; 1 << 20]);
            session.submit_as(0, &request, &Layout::indirect()).unwrap();
            (writes, next) = (writes + 1, next + 1);
        }
        let begin = Instant::now();
        let head = session.submit_as(0, &Request::read(0, 4096), &Layout::indirect()).unwrap();
        let read = session.wait_head(0, head, deadline).unwrap();
        assert_eq!(read.status, STATUS_OK);
        slowest = slowest.max(begin.elapsed());
        reads += 1;
        while let Some(done) = session.try_wait(0).unwrap() {
            assert_eq!(done.status, STATUS_OK);
            writes -= 1;
        }
    }
    drop(limit);
    eprintln!("{reads} reads, the slowest {slowest:?}, beside {next} throttled writes");
    while writes > 0 {
        session.wait(0, deadline).unwrap();
        writes -= 1;
    }
    assert!(reads > 50, "{reads} reads beside {next} writes");
    assert!(slowest < Duration::from_secs(1), "a read took {slowest:?}");
}
