//! Copies of what guests write, each with the header of its entry in front.
//!
//! A guest may change a buffer while it is being written, and then the disk and the log would
//! differ. So the data is copied once, and the copy goes to both. The memory is used again and
//! again, and there is a limit to it: whoever would exceed it waits.

use std::future::poll_fn;
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};

use zerocopy::IntoBytes;

use crate::crc32c;
use crate::io::buf::Gather;
use crate::io::{AlignedBuf, Buffers, Scattered};
use crate::write_log::layout::{ENTRY_LEN, RawEntry};

/// Longest data of one entry, in bytes. Longer writes become several.
pub const MAX_DATA: u64 = 2 << 20;
/// Data of entries under way, in bytes; one entry is always allowed.
const MAX_IN_USE: u64 = 64 << 20;
/// Memory kept for later, in bytes.
const MAX_SPARE: usize = 8 << 20;
/// Data begins here in the memory of a copy, aligned for any disk; the header ends here.
const DATA_AT: usize = 64 << 10;
/// The same where headers are short.
const SHORT_DATA_AT: usize = 4096;
/// Smallest room for data.
const MIN_ROOM: usize = 4096;

/// Memory for copies. See the [module](self).
#[derive(Debug)]
pub struct Copies {
    sector_size: usize,
    /// Where data begins.
    data_at: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    in_use: u64,
    waiters: Vec<Waker>,
    spare: Vec<AlignedBuf>,
    spare_bytes: usize,
}

/// A header and the copy of an entry's data.
#[derive(Debug)]
pub struct EntryCopy {
    owner: Arc<Copies>,
    /// `None` once given back.
    memory: Option<AlignedBuf>,
    /// Length of the data in bytes.
    len: usize,
    /// CRC32C of header and data.
    pub crc: u32,
}

impl Copies {
    /// For a log with sectors of this size.
    pub fn new(sector_size: u32) -> Arc<Copies> {
        let sector_size = sector_size as usize;
        let data_at = if sector_size <= SHORT_DATA_AT { SHORT_DATA_AT } else { DATA_AT };
        Arc::new(Copies { sector_size, data_at, state: Mutex::default() })
    }

    /// A header alone. `text` follows its fields.
    pub fn header(self: &Arc<Self>, entry: &RawEntry, text: &[u8]) -> EntryCopy {
        self.state.lock().unwrap().in_use += self.charge(0);
        let mut copy = self.take(0);
        copy.fill(entry, text, |_| {});
        copy
    }

    /// A header with a copy of `data`, of at most [`MAX_DATA`] bytes. Waits for room.
    pub async fn copy(self: &Arc<Self>, entry: &RawEntry, data: &Buffers) -> EntryCopy {
        debug_assert!(data.len() <= MAX_DATA);
        let bytes = self.charge(data.len() as usize);
        poll_fn(|cx| {
            let mut state = self.state.lock().unwrap();
            if state.try_use(bytes) {
                return Poll::Ready(());
            }
            state.waiters.push(cx.waker().clone());
            Poll::Pending
        })
        .await;
        let mut copy = self.take(data.len() as usize);
        copy.fill(entry, &[], |room| data.copy_to_slice(room));
        copy
    }

    /// The same at once, or `None` if there is no room.
    pub fn try_copy(
        self: &Arc<Self>,
        entry: &RawEntry,
        data: Scattered<'_>,
        len: usize,
    ) -> Option<EntryCopy> {
        debug_assert!(len as u64 <= MAX_DATA);
        if !self.state.lock().unwrap().try_use(self.charge(len)) {
            return None;
        }
        let mut copy = self.take(len);
        copy.fill(entry, &[], |room| data.copy_to_slice(room));
        Some(copy)
    }

    /// What an entry with so much data counts for.
    fn charge(&self, len: usize) -> u64 {
        (self.sector_size + len) as u64
    }

    /// Memory for an entry that has been charged for.
    fn take(self: &Arc<Self>, len: usize) -> EntryCopy {
        let size = self.data_at + len.next_power_of_two().max(MIN_ROOM);
        let spare = {
            let mut state = self.state.lock().unwrap();
            let at = state.spare.iter().rposition(|memory| memory.len() == size);
            at.map(|at| {
                state.spare_bytes -= size;
                state.spare.swap_remove(at)
            })
        };
        let memory = spare.unwrap_or_else(|| AlignedBuf::zeroed(size, 4096));
        EntryCopy { owner: Arc::clone(self), memory: Some(memory), len, crc: 0 }
    }
}

impl State {
    /// Whether an entry of so many bytes may be made; then it counts.
    fn try_use(&mut self, bytes: u64) -> bool {
        let is_room = self.in_use == 0 || self.in_use + bytes <= MAX_IN_USE;
        if is_room {
            self.in_use += bytes;
        }
        is_room
    }
}

impl EntryCopy {
    /// Puts header and data together; `copy` has room for the data.
    fn fill(&mut self, entry: &RawEntry, text: &[u8], copy: impl FnOnce(&mut [u8])) {
        let (start, data_at) = (self.owner.data_at - self.owner.sector_size, self.owner.data_at);
        let end = data_at + self.len;
        let memory = self.memory.as_mut().expect("not given back").as_slice();
        let header = &mut memory[start..data_at];
        header[..ENTRY_LEN].copy_from_slice(entry.as_bytes());
        header[ENTRY_LEN..ENTRY_LEN + text.len()].copy_from_slice(text);
        header[ENTRY_LEN + text.len()..].fill(0);
        copy(&mut memory[data_at..end]);
        self.crc = crc32c::crc32c(&memory[start..end]);
    }

    /// The data, for the disk.
    pub fn data(&self) -> Buffers {
        let mut gather = Gather::default();
        gather.push(self.memory(), self.owner.data_at, self.len);
        gather.finish()
    }

    /// The same, while nobody else uses it.
    pub fn data_slice(&mut self) -> &[u8] {
        let data = self.owner.data_at..self.owner.data_at + self.len;
        &self.memory.as_mut().expect("not given back").as_slice()[data]
    }

    /// Adds header and data to what is written to the log.
    pub fn gather(&self, gather: &mut Gather) {
        let start = self.owner.data_at - self.owner.sector_size;
        gather.push(self.memory(), start, self.owner.sector_size + self.len);
    }

    /// Header and data, for the log.
    pub fn whole(&self) -> Buffers {
        let mut gather = Gather::default();
        self.gather(&mut gather);
        gather.finish()
    }

    fn memory(&self) -> &AlignedBuf {
        self.memory.as_ref().expect("not given back")
    }
}

impl Drop for EntryCopy {
    /// Gives the memory back, unless the host may still be using it.
    fn drop(&mut self) {
        let memory = self.memory.take().filter(AlignedBuf::is_unshared);
        let mut state = self.owner.state.lock().unwrap();
        state.in_use -= self.owner.charge(self.len);
        if let Some(memory) = memory
            && state.spare_bytes + memory.len() <= MAX_SPARE
        {
            state.spare_bytes += memory.len();
            state.spare.push(memory);
        }
        for waiter in state.waiters.drain(..) {
            waiter.wake();
        }
    }
}
