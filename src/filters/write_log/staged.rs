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
use crate::block::{Attempt, OwnedRangeGuard, Settled, Submission};
use crate::error::Result;
use crate::filters::write_log::WriteLog;
use crate::filters::write_log::batch::Pending;
use crate::filters::write_log::in_place::Target;
use crate::filters::write_log::under_way::Note;
use crate::io::{Fut, Scattered};
use crate::write_log::layout::Flags;

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
struct Entry {
    /// What will be written to the log.
    pending: Pending,
    /// Until the entry is whole, and all before it.
    note: Note,
    /// Until the entry has its place.
    range: OwnedRangeGuard,
    /// Until the data is on the image.
    pin: Option<Pin>,
}

impl Staged {
    /// Performs a write, or has the host perform it.
    pub fn write<'a>(
        &'a mut self,
        filter: &WriteLog,
        target: Target<'a>,
        data: Scattered<'_>,
    ) -> Attempt<'a> {
        let Target { range, queue, file, offset, pin } = target;
        let Some(guard) = filter.in_flight.try_exclusive_owned(range) else {
            return Attempt::NotNow;
        };
        let header = filter.recorder.header(Flags::NONE, range, 0);
        let copies = filter.recorder.copies();
        let Some(mut copy) = copies.try_copy(&header, data, range.len as usize) else {
            return Attempt::NotNow;
        };
        let submitted = filter.recorder.tail().event();
        let note = filter.under_way.enter(range);
        let is_inline = file.inline().writes;
        if is_inline && let Err(err) = file.write_in_place(offset, copy.data_slice()) {
            return Attempt::Failed(err);
        }
        let data_sectors = header.nr_sectors.get();
        let queue = Some(queue);
        let pending = Pending { copy, data_sectors, zeros: false, submitted, queue };
        let entry = Entry { pending, note, range: guard, pin };
        if is_inline {
            self.add(entry);
            return Attempt::Pending;
        }
        let (token, data) = self.submit(entry);
        Attempt::Submit(Submission { file, offset, data, token })
    }

    /// An entry whose data the host is about to write: its token, and the data.
    fn submit(&mut self, entry: Entry) -> (u32, &[u8]) {
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
    fn add(&mut self, mut entry: Entry) {
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
