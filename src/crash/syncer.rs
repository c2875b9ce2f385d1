//! Holds a file of ours open, and fetches what checkers have left of it in the kernel's cache.
//!
//! A process that holds a file which it serves itself cannot die: the kernel closes its files before
//! it lets go of the connection, and writes back what it has of them first, which nobody is there to
//! take. So a thread holds the file that shares its descriptors with no other thread. What it waits
//! for fails as soon as the others have gone.

#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use crate::error::{Error, Result, ResultExt};

/// See the [module](self).
#[derive(Debug)]
pub struct Syncer {
    /// `None` only while dropping.
    asks: Option<Sender<()>>,
    answers: Receiver<Result<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Syncer {
    /// Opens the file at `path`, which is on a mount of ours.
    ///
    /// # Errors
    /// If that fails, or there is no thread to be had.
    pub fn start(path: PathBuf) -> Result<Syncer> {
        let (asks, asked) = channel();
        let (answer, answers) = channel();
        let thread = std::thread::Builder::new().name("vublk-sync".into()).spawn(move || {
            let file = open_alone(&path).context(|| path.display().to_string());
            let (file, opened) = match file {
                Ok(file) => (Some(file), Ok(())),
                Err(err) => (None, Err(err)),
            };
            // Whoever asks has gone if this fails.
            let _ = answer.send(opened);
            let Some(file) = file else { return };
            while asked.recv().is_ok() {
                let _ = answer.send(rustix::fs::fdatasync(&file).map_err(Error::from));
            }
        })?;
        let syncer = Syncer { asks: Some(asks), answers, thread: Some(thread) };
        syncer.answer()?;
        Ok(syncer)
    }

    /// What was written is ours on return. Waits for that.
    ///
    /// # Errors
    /// If we did not take it.
    pub fn sync(&self) -> Result<()> {
        if let Some(asks) = &self.asks {
            let _ = asks.send(());
        }
        self.answer()
    }

    fn answer(&self) -> Result<()> {
        let gone = |_| Error::invalid("the thread that holds a state's file has gone");
        self.answers.recv().map_err(gone)?
    }
}

impl Drop for Syncer {
    fn drop(&mut self) {
        drop(self.asks.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Opens a file and leaves this thread with no other descriptor; those of all other threads stay.
fn open_alone(path: &Path) -> Result<File> {
    // SAFETY: nothing in this thread uses a descriptor that it had before.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FILES) }?;
    let file = File::open(path)?;
    let own = file.as_raw_fd() as libc::c_uint;
    // SAFETY: closes descriptors of this thread's own table, which nobody else has.
    unsafe {
        if own > 0 {
            libc::syscall(libc::SYS_close_range, 0, own - 1, 0);
        }
        libc::syscall(libc::SYS_close_range, own + 1, libc::c_uint::MAX, 0);
    }
    Ok(file)
}
