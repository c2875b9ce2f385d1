//! The one error type of the library.
//!
//! An [`Error`] says what kind of failure it is (callers match on that), and carries a sentence
//! that names the thing, the place and, where there is one, the way out. Layers add context with
//! [`ResultExt::context`] at their edges, so the chain reads from the outside in:
//!
//! ```text
//! cannot serve disk.qcow2: backing file base.raw: No such file or directory
//! ```
//!
//! Errors are logged once, where they are handled, not where they are made.

use std::fmt;

/// Result with the library's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of failure an [`Error`] is. Mapped to a virtio status, an exit code and (with the
/// control socket) a QMP class in one place each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A named file, node or device does not exist.
    NotFound,
    /// The host or a policy of ours refuses access.
    PermissionDenied,
    /// Somebody else (another process, another node, a job) holds what is needed.
    Busy,
    /// The image or a message breaks its format.
    Corrupt,
    /// Legal, but not something this program does.
    Unsupported,
    /// The operator, guest or front-end asked for something that makes no sense.
    InvalidArgument,
    /// A range lies outside of the disk.
    OutOfRange,
    /// The disk or image may not be written.
    ReadOnly,
    /// The host has no space (or quota) left.
    NoSpace,
    /// An earlier failure made this node unsafe to write to.
    Poisoned,
    /// The operation was cancelled.
    Cancelled,
    /// Any other failure of the host.
    Io,
}

/// An error: its kind, a sentence, and the error below it if there is one.
pub struct Error {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
    /// The host's error number, where the failure came from a system call.
    errno: Option<i32>,
    /// See [`Error::lost_nothing`].
    lost_nothing: bool,
}

impl Error {
    /// Makes an error of `kind` with a full message.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Error { kind, message: message.into(), source: None, errno: None, lost_nothing: false }
    }

    /// The image, table or message does not keep to its format.
    pub fn corrupt(message: impl Into<String>) -> Self {
        Error::new(ErrorKind::Corrupt, message)
    }

    /// An argument of the operator or a peer makes no sense.
    pub fn invalid(message: impl Into<String>) -> Self {
        Error::new(ErrorKind::InvalidArgument, message)
    }

    /// Legal, but not supported here.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Error::new(ErrorKind::Unsupported, message)
    }

    /// Wraps a host error number (positive, as in `errno`).
    pub fn from_errno(errno: i32) -> Self {
        Error::from(std::io::Error::from_raw_os_error(errno))
    }

    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The host's error number, if a system call failed at the root of this.
    pub fn errno(&self) -> Option<i32> {
        self.errno
    }

    /// Whether it is certain that nothing was lost by this failure of a flush, or of a part of one: no
    /// sync of a file has failed, and another flush does it all.
    pub fn has_lost_nothing(&self) -> bool {
        self.lost_nothing
    }

    /// Says whether that is certain.
    pub fn lost_nothing(self, is_certain: bool) -> Self {
        Error { lost_nothing: is_certain, ..self }
    }

    /// Of a write of metadata that failed and that the next flush makes again: if the host had no room
    /// for it, it only waits for that, and nothing is lost.
    pub fn lost_nothing_if_full(self) -> Self {
        let is_full = self.kind == ErrorKind::NoSpace;
        self.lost_nothing(is_full)
    }

    /// Puts `message` before this error, which becomes its source. The kind stays. Two layers that name
    /// the same thing name it once.
    pub fn context(self, message: impl Into<String>) -> Self {
        let message = message.into();
        if message == self.message {
            return self;
        }
        Error {
            kind: self.kind,
            errno: self.errno,
            lost_nothing: self.lost_nothing,
            message,
            source: Some(Box::new(self)),
        }
    }
}

impl fmt::Display for Error {
    /// Writes the whole chain on one line, outermost first.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if let Some(source) = &self.source {
            write!(f, ": {source}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}({self})", self.kind)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|s| s.as_ref() as &(dyn std::error::Error + 'static))
    }
}

impl From<std::io::Error> for Error {
    fn from(err: std::io::Error) -> Self {
        use std::io::ErrorKind as K;
        let errno = err.raw_os_error();
        let kind = match (errno, err.kind()) {
            (Some(libc::ENOSPC | libc::EDQUOT), _) => ErrorKind::NoSpace,
            (Some(libc::EROFS), _) => ErrorKind::ReadOnly,
            (Some(libc::EBUSY | libc::EAGAIN), _) => ErrorKind::Busy,
            (Some(libc::EOPNOTSUPP | libc::ENOSYS), _) | (_, K::Unsupported) => {
                ErrorKind::Unsupported
            }
            (_, K::NotFound) => ErrorKind::NotFound,
            (_, K::PermissionDenied) => ErrorKind::PermissionDenied,
            (_, K::InvalidInput) => ErrorKind::InvalidArgument,
            (_, K::InvalidData) => ErrorKind::Corrupt,
            (_, K::UnexpectedEof) => ErrorKind::OutOfRange,
            _ => ErrorKind::Io,
        };
        let message = match errno {
            // "No such file or directory (os error 2)" reads better without the number.
            Some(errno) => describe_errno(errno),
            None => err.to_string(),
        };
        Error { kind, message, source: None, errno, lost_nothing: false }
    }
}

impl From<rustix::io::Errno> for Error {
    fn from(errno: rustix::io::Errno) -> Self {
        Error::from_errno(errno.raw_os_error())
    }
}

/// The host's words for an error number.
fn describe_errno(errno: i32) -> String {
    let text = std::io::Error::from_raw_os_error(errno).to_string();
    match text.rfind(" (os error") {
        Some(end) => text[..end].to_string(),
        None => text,
    }
}

/// Adds context to the error of a result.
pub trait ResultExt<T> {
    /// Puts a sentence before the error. The closure runs only on failure.
    fn context<M: Into<String>>(self, message: impl FnOnce() -> M) -> Result<T>;
}

impl<T, E: Into<Error>> ResultExt<T> for Result<T, E> {
    fn context<M: Into<String>>(self, message: impl FnOnce() -> M) -> Result<T> {
        self.map_err(|err| err.into().context(message()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_reads_from_the_outside_in() {
        let err = Error::from_errno(libc::ENOENT).context("backing file base.raw");
        let err = err.context("cannot serve disk.qcow2");
        assert_eq!(
            err.to_string(),
            "cannot serve disk.qcow2: backing file base.raw: No such file or directory"
        );
        assert_eq!(err.kind(), ErrorKind::NotFound);
        assert_eq!(err.errno(), Some(libc::ENOENT));
    }

    #[test]
    fn what_two_layers_name_is_named_once() {
        let named = || Error::invalid("no room").context("w.log");
        assert_eq!(named().context("w.log").to_string(), "w.log: no room");
        assert_eq!(
            named().context("copy").context("w.log").to_string(),
            "w.log: copy: w.log: no room"
        );
    }

    #[test]
    fn host_errors_keep_their_kind() {
        assert_eq!(Error::from_errno(libc::ENOSPC).kind(), ErrorKind::NoSpace);
        assert_eq!(Error::from_errno(libc::EDQUOT).kind(), ErrorKind::NoSpace);
        assert_eq!(Error::from_errno(libc::EIO).kind(), ErrorKind::Io);
        assert_eq!(Error::from_errno(libc::EACCES).kind(), ErrorKind::PermissionDenied);
    }
}
