//! Locks on the files of images, as QEMU takes them.
//!
//! A writer holds consistent read, write and resize, and shares consistent read and write unchanged; a
//! reader (a backing file, too) holds consistent read and shares the same. So readers coexist, a
//! writer is alone, and QEMU's virtio-blk devices, which do not share write either, refuse our images
//! as we refuse theirs. Whoever is in the way is named where it can be seen.

use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::images::request::{Access, OpenRequest};
use crate::images::{ImageFormat, users};
use crate::io::{File, HostFile, Rights};

/// How an image is guarded against others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Locking {
    /// As a user of the content: nobody else may write, and with [`Access::Write`] only readers
    /// that do not mind may be there.
    #[default]
    Guard,
    /// As a reader of the metadata only, like `qemu-img info`: a raw image has none and is not
    /// locked, others must not be written meanwhile.
    Inspect,
    /// As a reader who takes what comes while others write (`-U`).
    Share,
    /// Not at all.
    Off,
}

/// What a writer holds.
const WRITER: Rights = Rights::CONSISTENT_READ.and(Rights::WRITE).and(Rights::RESIZE);

/// What everybody who relies on the content lets others hold.
const SHARED: Rights = Rights::CONSISTENT_READ.and(Rights::WRITE_UNCHANGED);

/// What is held and what is shared with others; `None` without locks.
pub(super) fn lock_rights(locking: Locking, access: Access) -> Option<(Rights, Rights)> {
    match (locking, access) {
        (Locking::Off, _) => None,
        (Locking::Inspect, _) => Some((Rights::NONE, SHARED)),
        (Locking::Share, _) => Some((Rights::CONSISTENT_READ, Rights::ALL)),
        (Locking::Guard, Access::Read) => Some((Rights::CONSISTENT_READ, SHARED)),
        (Locking::Guard, Access::Write) => Some((WRITER, SHARED)),
    }
}

/// Takes the locks that the request asks for. `format` matters to [`Locking::Inspect`] only.
pub(super) fn lock(file: &HostFile, request: &OpenRequest, format: ImageFormat) -> Result<()> {
    if request.locking == Locking::Inspect && format == ImageFormat::Raw {
        return Ok(());
    }
    let Some((held, shared)) = lock_rights(request.locking, request.access) else {
        return Ok(());
    };
    let could_share = request.may_share && request.locking != Locking::Share;
    let advice = match could_share && request.access == Access::Read {
        true => "; -U reads it all the same",
        false => "",
    };
    lock_host(file, held, shared, request.lock_wait, advice)
}

/// Locks a host file as the sole writer: what creating and overwriting an image needs.
pub fn lock_for_writing(file: &HostFile) -> Result<()> {
    lock_host(file, WRITER, SHARED, Duration::ZERO, "")
}

/// How long a lock that no living process holds is waited for, by who may wait for others and by who
/// may not: what is looked at after a crash was in use a moment ago.
const ORPHANED_LOCK_WAIT: [Duration; 2] = [Duration::from_secs(15), Duration::from_secs(3)];

fn lock_host(
    file: &HostFile,
    held: Rights,
    shared: Rights,
    wait: Duration,
    advice: &str,
) -> Result<()> {
    let mut deadline = Instant::now() + wait;
    let mut is_orphaned = false;
    let orphaned_wait = ORPHANED_LOCK_WAIT[usize::from(wait.is_zero())];
    loop {
        match file.lock(held, shared) {
            Err(err) if err.kind() == ErrorKind::Busy && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            // A lock that no process holds is one that the kernel has not yet let go of: it does
            // so when the last I/O of the dead process has ended, which the disk decides.
            Err(err)
                if err.kind() == ErrorKind::Busy
                    && !std::mem::replace(&mut is_orphaned, true)
                    && users::of(file).is_empty() =>
            {
                tracing::info!(
                    "{}: locked, and no process can be seen that has it open; waiting up to {} s for \
                     the host to end the I/O of one that died",
                    file.name(),
                    orphaned_wait.as_secs()
                );
                deadline = Instant::now() + orphaned_wait;
            }
            Err(err) => return Err(with_users(file, err, advice)),
            Ok(()) => return Ok(()),
        }
    }
}

/// Changes the locks of a host file; see [`HostFile::relock`].
pub(super) fn relock(file: &HostFile, from: (Rights, Rights), to: (Rights, Rights)) -> Result<()> {
    file.relock(from, to).map_err(|err| with_users(file, err, ""))
}

/// Adds to a refusal who has the file open.
fn with_users(file: &HostFile, err: Error, advice: &str) -> Error {
    if err.kind() != ErrorKind::Busy {
        return err;
    }
    let users = users::of(file);
    if users == ["this process"] {
        return Error::new(
            ErrorKind::Busy,
            format!(
                "{}: cannot be shared; it is open in this process, as a node or as a part of some \
                 image{advice}",
                file.name()
            ),
        );
    }
    let open_in = if users.is_empty() {
        String::new()
    } else {
        format!("; it is open in {}", users.join(", "))
    };
    Error::new(ErrorKind::Busy, format!("{err}{open_in}{advice}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images::open;
    use crate::images::open::tests::file_of;

    #[test]
    fn locks_of_each_role() {
        let file = file_of(&[0; 4096]);
        let writer = OpenRequest::write(file.path()).format(Some(ImageFormat::Raw));
        let reader = OpenRequest::read(file.path());
        let held = open(&writer).unwrap();
        let err = open(&writer).unwrap_err();
        assert_eq!(err.kind(), ErrorKind::Busy);
        let err = open(&reader).unwrap_err();
        assert_eq!(err.kind(), ErrorKind::Busy);
        assert!(!err.to_string().contains("-U"), "{err}");
        let err = open(&OpenRequest { may_share: true, ..reader.clone() }).unwrap_err();
        assert!(err.to_string().contains("-U reads it all the same"), "{err}");
        open(&reader.clone().locking(Locking::Share)).unwrap();
        open(&reader.clone().locking(Locking::Inspect)).unwrap();
        drop(held);
        let first = open(&reader).unwrap();
        let second = open(&reader).unwrap();
        open(&writer).unwrap_err();
        drop((first, second));
        open(&writer).unwrap();
    }

    #[test]
    fn what_this_process_holds_itself_is_not_waited_for() {
        let file = file_of(&[0; 4096]);
        let writer = OpenRequest::write(file.path());
        let held = open(&writer).unwrap();
        let busy = open(&OpenRequest { lock_wait: Duration::from_millis(1), ..writer.clone() });
        let err = busy.unwrap_err().to_string();
        assert!(err.contains("it is open in this process"), "{err}");
        assert!(!err.contains("another"), "{err}");
        drop(held);
        open(&writer).unwrap();
    }

    /// As after a kill, when the kernel has I/O left to end: here the file is in a message that nobody
    /// receives.
    #[test]
    fn a_lock_that_no_process_holds_is_waited_for() {
        use rustix::net::{
            AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags,
            SocketType, sendmsg, socketpair,
        };
        use std::os::fd::AsFd;
        let file = file_of(&[0; 4096]);
        let writer = OpenRequest::write(file.path());
        let held = HostFile::open(file.path(), crate::io::OpenOptions::default()).unwrap();
        held.lock(WRITER, SHARED).unwrap();
        let (unix, flags) = (AddressFamily::UNIX, SocketFlags::CLOEXEC);
        let (ours, theirs) = socketpair(unix, SocketType::STREAM, flags, None).unwrap();
        let files = [held.as_fd()];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut message = SendAncillaryBuffer::new(&mut space);
        assert!(message.push(SendAncillaryMessage::ScmRights(&files)));
        let data = [std::io::IoSlice::new(b"x")];
        sendmsg(&ours, &data, &mut message, SendFlags::empty()).unwrap();
        drop(held);
        let freed = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            drop(theirs);
        });
        open(&writer).unwrap();
        freed.join().unwrap();
    }

    #[test]
    fn a_lock_can_be_waited_for() {
        let file = file_of(&[0; 4096]);
        let writer = OpenRequest::write(file.path());
        let held = open(&writer).unwrap();
        let freed = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            drop(held);
        });
        open(&OpenRequest { lock_wait: Duration::from_secs(10), ..writer }).unwrap();
        freed.join().unwrap();
    }
}
