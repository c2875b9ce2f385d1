//! What must outlive the process of whoever serves an image: where it goes, and what an earlier process
//! has left of it ([`crate::block::keep`]).

use crate::block::Keep;
use crate::error::{ErrorKind, Result};
use crate::images::request::{Access, OpenRequest, StateDir};
use crate::images::{ImageFormat, frozen, open};
use crate::io::{File, HostFile, OpenOptions, block_on};

/// Opens the place for what must outlive this process, if a guest is to be served.
pub(super) fn open_keep(
    request: &OpenRequest,
    file: &HostFile,
    format: &str,
) -> Result<Option<Keep>> {
    let (dir, required) = match &request.state_dir {
        StateDir::None => return Ok(None),
        StateDir::IfPossible(dir) => (dir, false),
        StateDir::Required(dir) => (dir, true),
    };
    match Keep::open(dir, file.identity()?, format) {
        Ok(keep) => Ok(Some(keep)),
        // Whoever serves the image from this very directory is in the way; nobody may ignore that.
        Err(err) if required || err.kind() == ErrorKind::Busy => Err(err),
        Err(err) => {
            tracing::warn!(
                "{}: writes that allocate will wait for the disk, because nothing can be kept \
                 across a kill of this process: {err}",
                file.name()
            );
            Ok(None)
        }
    }
}

/// Redoes what a process that was killed has kept for an image that a snapshot had frozen: until
/// such an image has been flushed, once, writes that its guest saw completed may be in its keep and
/// nowhere else. Returns the session they are of. Images without a snapshot's mark are left alone.
pub(super) fn settle(request: &OpenRequest) -> Result<Option<u128>> {
    let (StateDir::IfPossible(dir) | StateDir::Required(dir)) = &request.settle_in else {
        return Ok(None);
    };
    let Some(format) = request.format.filter(|format| *format != ImageFormat::Raw) else {
        return Ok(None);
    };
    let Ok(file) = HostFile::open(&request.path, OpenOptions::default()) else { return Ok(None) };
    if frozen::overlay_of(&file).is_none() {
        return Ok(None);
    }
    let identity = file.identity()?;
    drop(file);
    if !Keep::is_there(dir, identity, format.name()) {
        return Ok(None);
    }
    let keep = Keep::open(dir, identity, format.name())?;
    let (session, found) = (keep.session(), keep.found());
    drop(keep);
    let Some(nonce) = found else { return Ok(session) };
    let image = open(&OpenRequest {
        access: Access::Write,
        state_dir: request.settle_in.clone(),
        settle_in: StateDir::None,
        ..request.clone()
    })?;
    tracing::info!("{}: redoing what was kept of it when a snapshot was taken", image.name());
    let driver = image.node.driver();
    block_on(async {
        driver.resume(Some(nonce)).await?;
        driver.close().await
    })?;
    Ok(Some(nonce))
}
