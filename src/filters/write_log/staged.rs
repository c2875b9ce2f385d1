//! Entries of one thread whose data the host writes to the image like that of any other request.
//!
//! ```text
//! stage    copy it ─► the host writes the copy to the image
//! written  it waits for its place
//! settle   all that wait join the thread's batch (`batch`), and become one run
//! ```
//!
//! A task for each request would cost more than the copy: here there is one for each batch, and none
//! where the log takes writes in place.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};

use crate::block::driver::Pin;
use crate::block::{OwnedRangeGuard, Settled};
use crate::error::Result;
use crate::filters::write_log::WriteLog;
use crate::filters::write_log::batch::Pending;
use crate::filters::write_log::under_way::Note;
use crate::io::Fut;

/// See the [module](self).
#[derive(Debug, Default)]
pub struct Staged {
    /// With the host, by token.
    submitted: Vec<Option<Entry>>,
    /// Tokens that are free.
    free: Vec<u32>,
    /// On the image, and not in the log.
    written: Vec<Entry>,
}

/// An entry that is not in the log yet.
#[derive(Debug)]
pub struct Entry {
    /// What will be written to the log.
    pub pending: Pending,
    /// Until the entry is whole, and all before it.
    pub note: Note,
    /// Until the entry has its place.
    pub range: OwnedRangeGuard,
    /// Until the data is on the image.
    pub pin: Option<Pin>,
}

impl Staged {
    /// An entry whose data the host is about to write: its token, and the data.
    pub fn submit(&mut self, entry: Entry) -> (u32, &[u8]) {
        let token = self.free.pop().unwrap_or_else(|| {
            self.submitted.push(None);
            self.submitted.len() as u32 - 1
        });
        let entry = self.submitted[token as usize].insert(entry);
        (token, entry.pending.copy.data_slice())
    }

    /// The host is done with the entry called `token`. What it could not write is not logged, and
    /// remains noted.
    pub fn written(&mut self, token: u32, has_succeeded: bool) {
        let entry = self.submitted[token as usize].take().expect("submitted and not ended");
        self.free.push(token);
        if has_succeeded {
            self.add(entry);
        }
    }

    /// The data of an entry is on the image.
    pub fn add(&mut self, mut entry: Entry) {
        entry.pin = None;
        self.written.push(entry);
    }

    /// Puts what is written into the log; `None` if there is nothing.
    pub fn settle(&mut self, filter: &Arc<WriteLog>) -> Option<Settled> {
        if self.written.is_empty() {
            return None;
        }
        let entries = std::mem::take(&mut self.written);
        let mut logging: Fut<'static, ()> = Box::pin(log_entries(Arc::clone(filter), entries));
        // Where the log takes writes in place it is done with this, else it goes on as a task.
        let mut context = Context::from_waker(Waker::noop());
        Some(match logging.as_mut().poll(&mut context) {
            Poll::Ready(result) => Settled::Done(result),
            Poll::Pending => Settled::Later(logging),
        })
    }
}

async fn log_entries(filter: Arc<WriteLog>, entries: Vec<Entry>) -> Result<()> {
    let mut all = Vec::with_capacity(entries.len());
    let mut held = Vec::with_capacity(entries.len());
    for entry in entries {
        all.push(entry.pending);
        held.push((entry.note, entry.range));
    }
    filter.has_grown.store(true, Ordering::Relaxed);
    filter.recorder.append_all(all).await?;
    for (note, _range) in held {
        filter.under_way.leave(note);
    }
    Ok(())
}
