//! The image's file as the adapter sees it: to read data from, and to write to a prepared place.

use std::sync::{Arc, Mutex};

use super::BLOCK;
use super::disk::{self, Disk, Token};
use crate::error::{Error, Result};
use crate::io::{AlignedBuf, Alignment, Buffers, File, Fut, Hole};
use crate::units::ByteRange;

/// The file, for reads of data that a mapping leads to.
#[derive(Debug)]
pub(super) struct Data {
    pub(super) disk: Arc<Disk>,
}

/// The file, for the one write that a place was prepared for.
#[derive(Debug)]
pub(super) struct Place {
    disk: Arc<Disk>,
    state: Mutex<PlaceState>,
}

#[derive(Debug, Default)]
struct PlaceState {
    /// Announces the write until it is made.
    token: Option<Token>,
    /// Whether the data is wanted for a record.
    wants_data: bool,
    /// The data that was written.
    data: Option<AlignedBuf>,
    /// What goes before and behind the data, in the same write.
    around: [Option<AlignedBuf>; 2],
}

impl Place {
    /// A place for one write, which `token` announces with what is `around` it: that is written
    /// with it, right before and right behind.
    pub(super) fn new(
        disk: &Arc<Disk>,
        token: Token,
        wants_data: bool,
        around: [Option<AlignedBuf>; 2],
    ) -> Arc<Place> {
        let state = PlaceState { token: Some(token), wants_data, data: None, around };
        Arc::new(Place { disk: Arc::clone(disk), state: Mutex::new(state) })
    }

    /// The data that was written, if a record wants it.
    pub(super) fn take_data(&self) -> Option<AlignedBuf> {
        self.state.lock().unwrap().data.take()
    }
}

/// What both ways to the file have in common.
macro_rules! forward_file {
    () => {
        fn name(&self) -> &str {
            self.disk.file().name()
        }

        fn len(&self) -> Result<u64> {
            self.disk.len()
        }

        fn alignment(&self) -> Alignment {
            Alignment { request: BLOCK.min(self.disk.file().alignment().request), memory: 1 }
        }

        fn read<'a>(&'a self, offset: u64, buf: Buffers) -> Fut<'a, ()> {
            Box::pin(self.disk.read(offset, buf))
        }

        fn write_zeroes<'a>(&'a self, _range: ByteRange, _may_unmap: bool) -> Fut<'a, ()> {
            Box::pin(async { Err(not_for_this()) })
        }

        fn discard<'a>(&'a self, _range: ByteRange) -> Fut<'a, ()> {
            Box::pin(async { Err(not_for_this()) })
        }

        fn flush<'a>(&'a self) -> Fut<'a, ()> {
            Box::pin(async { Err(not_for_this()) })
        }

        fn set_len<'a>(&'a self, _len: u64) -> Fut<'a, ()> {
            Box::pin(async { Err(not_for_this()) })
        }

        fn hole_at(&self, offset: u64) -> Result<Hole> {
            self.disk.file().hole_at(offset)
        }
    };
}

fn not_for_this() -> Error {
    Error::unsupported("only the image as a whole can do this")
}

impl File for Data {
    forward_file!();

    fn write<'a>(&'a self, _offset: u64, _buf: Buffers, _fua: bool) -> Fut<'a, ()> {
        Box::pin(async { Err(not_for_this()) })
    }
}

impl File for Place {
    forward_file!();

    fn write<'a>(&'a self, offset: u64, buf: Buffers, _fua: bool) -> Fut<'a, ()> {
        Box::pin(async move {
            let (token, wants_data, [before, behind]) = {
                let mut state = self.state.lock().unwrap();
                (state.token.take(), state.wants_data, std::mem::take(&mut state.around))
            };
            let Some(token) = token else { return Err(not_for_this()) };
            // The file and the record get the same bytes, whatever the guest does meanwhile.
            let memory = self.disk.file().alignment().memory.max(4096);
            let own = wants_data.then(|| disk::private_copy(&buf, memory));
            let data = own.as_ref().map_or(buf, AlignedBuf::buffers);
            let start = offset - before.as_ref().map_or(0, |before| before.len() as u64);
            let around = |around: Option<AlignedBuf>| around.map(|around| around.buffers());
            let all = match (around(before), around(behind)) {
                (None, None) => data,
                (before, behind) => Buffers::join(before.into_iter().chain([data]).chain(behind)),
            };
            self.disk.write(start, all, token).await?;
            self.state.lock().unwrap().data = own;
            Ok(())
        })
    }
}
