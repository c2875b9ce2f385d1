//! Disk images: from a path to a node.
//!
//! [`open()`] is the one way from a path to a [`Node`](crate::block::Node), for every command and
//! for exports; [`create()`] makes new images. This room knows all formats and filters by name, so
//! that none of them needs to know another.
//!
//! ```text
//! path ──► HostFile ──► lock ──► probe (or -f) ──► driver ──► filter (guessed raw only) ──► Node
//!                                                    │
//!                                                    └── names other files? ──► open gate ──► again
//! ```
//!
//! To add a format: a variant of [`ImageFormat`], its magic in [`probe`], an arm in
//! [`open`](mod@open) and [`create`](mod@create), and (where it can be
//! checked) one in [`check`](mod@check).

mod add_cow;
pub mod blockdev;
mod cache_mode;
pub mod check;
pub mod crash_state;
pub mod create;
mod drivers;
pub mod frozen;
pub mod info;
mod kept;
pub mod layers;
mod lock;
pub mod open;
mod parents;
pub mod probe;
pub mod recording;
mod request;
pub mod resize;
mod storage;
mod users;

use std::fmt;
use std::str::FromStr;

pub use add_cow::{check_new_backing, set_backing};
pub use cache_mode::CacheMode;
pub use check::{CheckReport, Checked, Repair, check, check_path};
pub use create::{CreateRequest, Created, Prepared, create};
pub use layers::{Layer, Layers};
pub use lock::Locking;
pub use open::{
    Image, Opening, format_of, named_file, names_as_backing, open, open_alone, open_backing_of,
    open_chain,
};
pub use request::{Access, OpenRequest, StateDir};
pub use storage::shares as shares_storage;

use crate::error::Error;

/// A format by name. Holds what can be opened and what is merely recognised, so that a refusal can
/// say what the file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ImageFormat {
    /// The disk, byte for byte.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
    /// Hyper-V's format.
    Vhdx,
    /// A bitmap that says which sectors of a raw image override a backing file.
    AddCow,
    /// A JSON descriptor that gives any image dirty bitmaps.
    Qbm,
    /// A log of writes in dm-log-writes format; not a disk.
    WriteLog,
    /// A disk that a power cut could have left, of such a log and its base; not a file.
    CrashState,
    /// VMware's format.
    Vmdk,
    /// VirtualBox's format.
    Vdi,
    /// Virtual PC's format (VHD).
    Vpc,
    /// QEMU's enhanced disk format.
    Qed,
    /// The first qcow.
    Qcow,
    /// An encrypted disk.
    Luks,
    /// Parallels' format.
    Parallels,
    /// Bochs' format.
    Bochs,
    /// A compressed loop image.
    Cloop,
}

impl ImageFormat {
    /// Every format with the name that commands and other tools use for it.
    const NAMES: [(ImageFormat, &'static str); 16] = [
        (ImageFormat::Raw, "raw"),
        (ImageFormat::Qcow2, "qcow2"),
        (ImageFormat::Vhdx, "vhdx"),
        (ImageFormat::AddCow, "add-cow"),
        (ImageFormat::Qbm, "qbm"),
        (ImageFormat::WriteLog, "log-writes"),
        (ImageFormat::CrashState, crate::crash::state::NAME),
        (ImageFormat::Vmdk, "vmdk"),
        (ImageFormat::Vdi, "vdi"),
        (ImageFormat::Vpc, "vpc"),
        (ImageFormat::Qed, "qed"),
        (ImageFormat::Qcow, "qcow"),
        (ImageFormat::Luks, "luks"),
        (ImageFormat::Parallels, "parallels"),
        (ImageFormat::Bochs, "bochs"),
        (ImageFormat::Cloop, "cloop"),
    ];

    /// The formats that can be opened and created, in the order that messages list them.
    pub const SUPPORTED: &'static [ImageFormat] =
        &[ImageFormat::Raw, ImageFormat::Qcow2, ImageFormat::Vhdx, ImageFormat::AddCow];

    /// Its name, as QEMU has it where QEMU has it.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(f, _)| *f == self).map_or("unknown", |(_, name)| name)
    }

    /// Whether images of it can be opened.
    pub fn is_supported(self) -> bool {
        Self::SUPPORTED.contains(&self)
    }

    /// Why an image of this format cannot be opened, and what to do instead. For formats that are
    /// not [supported](ImageFormat::is_supported).
    pub fn refusal(self) -> Error {
        match self {
            ImageFormat::WriteLog => {
                Error::unsupported("is a log of writes (dm-log-writes), not a disk")
            }
            ImageFormat::CrashState => Error::unsupported(
                "a crash state is no file: give the image as it was when logging began, with --log \
                 LOG --state NAME",
            ),
            ImageFormat::Qbm => {
                Error::unsupported(format!("{self} images cannot be opened by this version yet"))
            }
            ImageFormat::Luks => Error::unsupported(
                "is an encrypted (luks) disk; give it to the guest as it is with -f raw",
            ),
            _ => Error::unsupported(format!(
                "{self} images are not supported; convert it (qemu-img convert -O qcow2), or say \
                 -f raw if the file is to be taken byte for byte"
            )),
        }
    }
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for ImageFormat {
    type Err = Error;

    /// # Errors
    /// Lists the supported names.
    fn from_str(text: &str) -> Result<Self, Error> {
        let known = Self::NAMES.iter().find(|(_, name)| *name == text).map(|(f, _)| *f);
        known.ok_or_else(|| {
            let names: Vec<_> = Self::SUPPORTED.iter().map(|f| f.name()).collect();
            Error::invalid(format!("unknown format '{text}' (known: {})", names.join(", ")))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways() {
        for (format, name) in ImageFormat::NAMES {
            assert_eq!(name.parse::<ImageFormat>().unwrap(), format);
            assert_eq!(format.to_string(), name);
        }
        let err = "qcow3".parse::<ImageFormat>().unwrap_err();
        assert_eq!(err.to_string(), "unknown format 'qcow3' (known: raw, qcow2, vhdx, add-cow)");
    }
}
