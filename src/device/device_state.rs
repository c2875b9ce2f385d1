//! The device's own state in a snapshot or migration (DEVICE_STATE).
//!
//! All a virtio-blk device has beyond its rings is the write cache's mode. The blob carries it,
//! and says which disk it belongs to, as it was at that time, so that a restore against another one
//! fails with a reason instead of giving a guest somebody else's blocks.
//!
//! ```text
//! offset  bytes
//!      0  8   "vublkdev"
//!      8  4   version, 1
//!     12  4   length of all this, 68
//!     16  1   write cache: 1 writeback, 0 write-through
//!     17  1   1 if the content is known, else 0
//!     18  6   zero
//!     24  8   size of the disk in sectors
//!     32  20  serial number, zeros behind it
//!     52  16  content: CRC32C of each sample, see [`identity`](super::identity)
//! ```
//!
//! All numbers little-endian. An empty blob is legal (a back-end without state wrote it) and says
//! nothing.
//!
//! The blob travels through a pipe of the front-end. It fits any pipe, so saving is one write that
//! does not wait. Loading waits: the front-end fills the pipe after our answer to the message that
//! brought it, so it is read when the front-end asks how it went (CHECK_DEVICE_STATE), by which
//! time it has been closed. A front-end that leaves it open costs its own connection
//! [`LOAD_TIMEOUT`], nothing else.

use std::fs::File;
use std::io::{Read, Write};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;

use super::identity::{DiskIdentity, SAMPLES};
use crate::error::{Error, ErrorKind, Result, ResultExt};

/// How long a front-end may take to fill and close the pipe once it has asked for the result.
pub const LOAD_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a pipe that cannot take the blob at once is waited for.
const SAVE_TIMEOUT: Duration = Duration::from_secs(2);

const MAGIC: &[u8; 8] = b"vublkdev";
const VERSION: u32 = 1;
const LEN: usize = 68;
/// Blobs longer than this are not read to their end.
const MAX_LEN: usize = 4096;

/// What a snapshot carries of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceState {
    /// Whether the guest had the write cache on.
    pub writeback: bool,
    /// Size of the disk in 512-byte sectors.
    pub capacity_sectors: u64,
    /// Which disk it was.
    pub identity: DiskIdentity,
}

impl DeviceState {
    /// The blob.
    pub fn to_bytes(&self) -> [u8; LEN] {
        let mut out = [0; LEN];
        out[..8].copy_from_slice(MAGIC);
        out[8..12].copy_from_slice(&VERSION.to_le_bytes());
        out[12..16].copy_from_slice(&(LEN as u32).to_le_bytes());
        out[16] = self.writeback.into();
        out[24..32].copy_from_slice(&self.capacity_sectors.to_le_bytes());
        out[32..52].copy_from_slice(&self.identity.serial);
        if let Some(content) = self.identity.content {
            out[17] = 1;
            for (bytes, crc) in out[52..].chunks_exact_mut(4).zip(content) {
                bytes.copy_from_slice(&crc.to_le_bytes());
            }
        }
        out
    }

    /// Parses a blob; `None` for an empty one.
    pub fn from_bytes(bytes: &[u8]) -> Result<Option<DeviceState>> {
        if bytes.is_empty() {
            return Ok(None);
        }
        let word = |at: usize| {
            bytes.get(at..at + 4).map(|b| u32::from_le_bytes(b.try_into().expect("four bytes")))
        };
        let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight"));
        if bytes.get(..8) != Some(MAGIC) {
            return Err(Error::corrupt("device state: not written by vublk"));
        }
        match word(8) {
            Some(VERSION) => {}
            found => {
                return Err(Error::unsupported(format!(
                    "device state: version {}, this vublk reads {VERSION}",
                    found.unwrap_or(0)
                )));
            }
        }
        if bytes.len() != LEN || word(12) != Some(LEN as u32) {
            return Err(Error::corrupt(format!(
                "device state: {} bytes that claim to be {}, version {VERSION} has {LEN}",
                bytes.len(),
                word(12).unwrap_or(0)
            )));
        }
        let flag = |at: usize, what: &str| match bytes[at] {
            byte @ (0 | 1) => Ok(byte == 1),
            byte => Err(Error::corrupt(format!("device state: {what} {byte}, neither 0 nor 1"))),
        };
        let writeback = flag(16, "write cache mode")?;
        let mut content = [0; SAMPLES];
        for (crc, at) in content.iter_mut().zip((52..).step_by(4)) {
            *crc = word(at).unwrap_or_default();
        }
        Ok(Some(DeviceState {
            writeback,
            capacity_sectors: long(24),
            identity: DiskIdentity {
                serial: bytes[32..52].try_into().expect("twenty bytes"),
                content: flag(17, "content flag")?.then_some(content),
            },
        }))
    }

    /// Refuses a state that belongs to another disk than `now`, or to another time of it.
    pub fn check_against(&self, now: &DeviceState) -> Result<()> {
        if self.capacity_sectors != now.capacity_sectors {
            return Err(Error::invalid(format!(
                "device state of another disk: it had {} sectors, this one has {}",
                self.capacity_sectors, now.capacity_sectors
            )));
        }
        self.identity.check_against(&now.identity)
    }
}

/// Writes `state` into the front-end's pipe and closes it. Waits at most two seconds.
pub fn save(mut pipe: File, state: &DeviceState) -> Result<()> {
    let what = || "device state: cannot write it to the front-end";
    set_nonblocking(&pipe).context(what)?;
    let bytes = state.to_bytes();
    let deadline = Instant::now() + SAVE_TIMEOUT;
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        match pipe.write(rest) {
            Ok(n) => rest = &rest[n..],
            Err(err) if err.kind() == std::io::ErrorKind::WouldBlock => {
                wait(&pipe, PollFlags::OUT, deadline).context(what)?;
            }
            Err(err) if err.kind() == std::io::ErrorKind::Interrupted => {}
            Err(err) => return Err(err).context(what),
        }
    }
    Ok(())
}

/// Reads a state from the front-end's pipe up to its end; `None` if there was nothing in it. Waits
/// at most `timeout`.
pub fn load(mut pipe: File, timeout: Duration) -> Result<Option<DeviceState>> {
    let what = || "device state: cannot read it from the front-end";
    set_nonblocking(&pipe).context(what)?;
    let deadline = Instant::now() + timeout;
    let mut bytes = vec![0; MAX_LEN];
    let mut len = 0;
    loop {
        if len == bytes.len() {
            return Err(Error::corrupt(format!("device state: longer than {MAX_LEN} bytes")));
        }
        match pipe.read(&mut bytes[len..]) {
            Ok(0) => return DeviceState::from_bytes(&bytes[..len]),
            Ok(n) => len += n,
            Err(err) if err.kind() == std::io::ErrorKind::WouldBlock => {
                wait(&pipe, PollFlags::IN, deadline).context(what)?;
            }
            Err(err) if err.kind() == std::io::ErrorKind::Interrupted => {}
            Err(err) => return Err(err).context(what),
        }
    }
}

fn set_nonblocking(file: &File) -> Result<()> {
    let flags = rustix::fs::fcntl_getfl(file)?;
    Ok(rustix::fs::fcntl_setfl(file, flags | OFlags::NONBLOCK)?)
}

/// Waits until `file` is ready for `events`, or has an error to report.
fn wait(file: &File, events: PollFlags, deadline: Instant) -> Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
        match poll(&mut [PollFd::new(file, events)], Some(&timeout)) {
            Ok(0) => return Err(Error::new(ErrorKind::Io, "the front-end let us wait too long")),
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(err) => return Err(err.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;

    fn pipe() -> (File, File) {
        let (read, write) = std::io::pipe().unwrap();
        (OwnedFd::from(read).into(), OwnedFd::from(write).into())
    }

    fn state() -> DeviceState {
        DeviceState {
            writeback: true,
            capacity_sectors: 2048,
            identity: DiskIdentity {
                serial: *b"a disk of twenty b. ",
                content: Some([7, 8, 9, 10]),
            },
        }
    }

    #[test]
    fn a_state_survives_the_pipe() {
        let (read, write) = pipe();
        save(write, &state()).unwrap();
        assert_eq!(load(read, LOAD_TIMEOUT).unwrap(), Some(state()));
    }

    #[test]
    fn an_empty_state_says_nothing() {
        let (read, write) = pipe();
        drop(write);
        assert_eq!(load(read, LOAD_TIMEOUT).unwrap(), None);
    }

    #[test]
    fn a_front_end_that_never_closes_or_never_reads_does_not_hold_us() {
        let (read, _write) = pipe();
        let err = load(read, Duration::from_millis(20)).unwrap_err();
        assert!(err.to_string().contains("too long"), "{err}");
        let (_read, mut write) = pipe();
        set_nonblocking(&write).unwrap();
        while write.write(&[0; 4096]).is_ok() {}
        assert!(save(write, &state()).is_err());
    }

    #[test]
    fn endless_states_are_cut_off() {
        let endless = File::open("/dev/zero").unwrap();
        let err = load(endless, LOAD_TIMEOUT).unwrap_err();
        assert!(err.to_string().contains("longer than"), "{err}");
    }

    #[test]
    fn every_broken_byte_is_noticed() {
        let good = state().to_bytes();
        assert_eq!(DeviceState::from_bytes(&good).unwrap(), Some(state()));
        for len in 1..LEN {
            assert!(DeviceState::from_bytes(&good[..len]).is_err(), "{len} bytes");
        }
        for at in 0..16 {
            let mut bad = good;
            bad[at] ^= 0x40;
            assert!(DeviceState::from_bytes(&bad).is_err(), "byte {at}");
        }
        for at in [16, 17] {
            let mut bad = good;
            bad[at] = 2;
            assert!(DeviceState::from_bytes(&bad).is_err(), "byte {at}");
        }
    }

    #[test]
    fn the_state_of_another_disk_is_refused() {
        let now = state();
        assert!(now.check_against(&now).is_ok());
        assert!(now.check_against(&DeviceState { capacity_sectors: 2049, ..now }).is_err());
        let other = DiskIdentity { content: Some([7, 8, 9, 11]), ..now.identity };
        let err = now.check_against(&DeviceState { identity: other, ..now }).unwrap_err();
        assert!(err.to_string().contains("another disk"), "{err}");
        let unread = DiskIdentity { content: None, ..now.identity };
        let saved = DeviceState { identity: unread, ..now };
        assert_eq!(DeviceState::from_bytes(&saved.to_bytes()).unwrap(), Some(saved));
    }
}
