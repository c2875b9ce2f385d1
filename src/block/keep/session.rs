//! How a guest's session begins.

use std::sync::atomic::{AtomicBool, Ordering};

use super::Keep;
use crate::error::Result;
use crate::io::block_on;

/// A format that records in a [`Keep`] what must outlive the process.
pub trait Keeper {
    /// Where it records; without one, changes wait for the disk.
    fn records(&self) -> Option<&Keep>;

    /// Set while completed writes must survive this process: whoever changes the mapping then records
    /// that, or has it wait for the disk.
    fn session(&self) -> &AtomicBool;

    /// Waits for those who began a change before they could see that a session begins.
    fn settle(&self) -> impl Future<Output = ()>;

    /// Makes the changes durable that are not, if there are any.
    fn save(&self) -> impl Future<Output = Result<()>>;

    /// Nothing is recorded yet for the session that begins.
    fn has_begun(&self) {}
}

/// From now on, what a guest sees completed survives this process. A job may go on meanwhile, and its
/// changes be recorded as those of a guest; until the keep has begun, they wait for the disk. Blocks; not
/// for a future.
///
/// # Errors
/// If what is not recorded cannot be saved, or the keep not begin. Then no session begins.
pub fn begin_session(image: &impl Keeper, nonce: u128) -> Result<()> {
    let (session, keep) = (image.session(), image.records());
    if session.load(Ordering::SeqCst) && keep.is_none_or(|keep| keep.is_recording_for(nonce)) {
        return Ok(());
    }
    let before = session.swap(true, Ordering::SeqCst);
    let begun = block_on(async {
        image.settle().await;
        // What was begun before is not recorded.
        image.save().await?;
        let Some(keep) = keep else { return Ok(()) };
        keep.begin(nonce)?;
        image.has_begun();
        // What came between may have been recorded for the session before.
        image.save().await
    });
    if begun.is_err() {
        session.store(before, Ordering::SeqCst);
    }
    begun
}
