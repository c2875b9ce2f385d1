//! From a path to a node: lock, probe, open, and follow the files that an image names.
//!
//! Used by every command and by exports, so that all of them have the same rules:
//!
//! * **Locks** as QEMU's, on every file of the chain ([`Locking`]), taken before anything of the
//!   file is believed.
//! * **Guessing** only when no format was said; a writable image that was guessed to be raw stands
//!   behind a [`GuessGuard`](crate::filters::GuessGuard).
//! * **The open gate** ([`crate::block::open_gate`]) for every file that an image names.
//! * A refused image is not modified.

use std::iter;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::block::open_gate::{self, Chain, OpenGate};
use crate::block::{Driver, Keep, Node, NodeOptions, graph};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::images::cache_mode::CacheMode;
use crate::images::crash_state::{self, Named};
use crate::images::drivers::{open_qcow2, open_raw, open_vhdx, warn_if_whole};
use crate::images::kept::{check_settled, forget_below, open_keep, settle};
use crate::images::lock::{Locking, lock};
use crate::images::parents::backing_names;
use crate::images::request::{Access, OpenRequest, StateDir};
use crate::images::{ImageFormat, add_cow, probe};
use crate::io::{AlignedBuf, File, HostFile, HostKind, OpenOptions};

/// An open image.
#[derive(Clone, Debug)]
pub struct Image {
    /// The disk.
    pub node: Node,
    /// The file that the operator (or the image above) named.
    pub file: Arc<HostFile>,
    /// Its format.
    pub format: ImageFormat,
    /// Whether the format was guessed.
    pub guessed: bool,
    /// The cache mode it was opened with.
    pub cache: CacheMode,
    /// What it was opened for.
    pub access: Access,
    /// How its file is guarded against others.
    pub locking: Locking,
    /// The file with the data, for formats that have it in another than `file`.
    pub image_file: Option<Arc<HostFile>>,
    /// The image that it stands on, if it has one and that was opened, too.
    pub backing: Option<Box<Image>>,
}

impl Image {
    /// Name of the file, for messages.
    pub fn name(&self) -> &str {
        self.file.name()
    }

    /// Checks that the disk can be given to a guest with blocks of `block_size` bytes.
    ///
    /// # Errors
    /// Says what is wrong with the size and how to change it.
    pub fn check_for_guest(&self, block_size: u64) -> Result<()> {
        let name = self.name();
        let limits = self.node.limits();
        if limits.size == 0 {
            return Err(Error::invalid(format!(
                "{name}: is empty, and a disk needs a size: vublk resize -f {} {name} 10G",
                self.format
            )));
        }
        if !limits.size.is_multiple_of(block_size) {
            let up = limits.size.next_multiple_of(block_size);
            return Err(Error::invalid(format!(
                "{name}: its size of {} bytes is not a multiple of the block size of {block_size}; \
                 make it larger (vublk resize -f {} {name} {up}){}",
                limits.size,
                self.format,
                match block_size > 512 && limits.size.is_multiple_of(512) {
                    // The host's: formats end with whole sectors of theirs.
                    true if limits.request_alignment > 512 =>
                        " or use --block-size 512 and --cache writeback",
                    true => " or use --block-size 512",
                    false => "",
                },
            )));
        }
        // The host's limit, or the format's?
        if limits.request_alignment > block_size.max(self.unit_of_host()) {
            return Err(Error::unsupported(format!(
                "{name}: the disk has sectors of {0} bytes, which a guest with blocks of \
                 {block_size} would write in part; use --block-size {0}",
                limits.request_alignment
            )));
        }
        if limits.request_alignment > block_size {
            return Err(Error::unsupported(format!(
                "{name}: the host takes direct I/O only in units of {0} bytes, more than the \
                 block size of {block_size}; use --block-size {0} or --cache writeback",
                limits.request_alignment
            )));
        }
        Ok(())
    }

    /// The largest unit in bytes that the host demands for any of its files, and those that it stands on.
    fn unit_of_host(&self) -> u64 {
        let files = [Some(&self.file), self.image_file.as_ref()].into_iter().flatten();
        let own = files.map(|file| file.alignment().request).max().unwrap_or(1);
        own.max(self.backing.as_ref().map_or(1, |backing| backing.unit_of_host()))
    }
}

/// Opens an image and all that it stands on.
///
/// # Errors
/// Names the file, the reason and, where there is one, the way out.
pub fn open(request: &OpenRequest) -> Result<Image> {
    if let Some(state) = &request.state {
        return crash_state::open_request(request, state);
    }
    if let Some(text) = request.path.to_str().filter(|text| crash_state::is_name(text)) {
        let named = Named::parse(text)?;
        let (log, base) = (named.log.clone().into(), named.base.clone().into());
        return open(&named.request(log, base, request)?);
    }
    let gate = OpenGate::new(&request.path, &request.allow_dirs)?;
    let mut chain = Chain::default();
    let image = open_link(request, &gate, &mut chain, None)?;
    warn_if_whole(request, iter::successors(Some(&image), |image| image.backing.as_deref()));
    Ok(image)
}

/// Opens the image and each of its backing files by itself, top first, for a look at their
/// metadata. The nodes do not see their backing files' content. With it comes why there is no more, where
/// one of the backing files cannot be opened.
///
/// # Errors
/// As [`open`], if it is the image itself.
pub fn open_chain(request: &OpenRequest) -> Result<(Vec<Image>, Option<Error>)> {
    let gate = OpenGate::new(&request.path, &request.allow_dirs)?;
    let mut chain = Chain::default();
    let alone = OpenRequest { backing: false, ..request.clone() };
    let mut images = vec![open_link(&alone, &gate, &mut chain, None)?];
    let stopped = open_below(&alone, &gate, &mut chain, &mut images).err();
    warn_if_whole(request, images.iter());
    Ok((images, stopped))
}

fn open_below(
    request: &OpenRequest,
    gate: &OpenGate,
    chain: &mut Chain,
    images: &mut Vec<Image>,
) -> Result<()> {
    loop {
        let top = images.last().expect("never empty");
        let details = top.node.driver().details();
        let names = backing_names(top.file.path(), &details);
        let is_there = |name: &&String| {
            let resolved = gate.resolve(top.file.path(), name);
            !resolved.is_err_and(|err| err.kind() == ErrorKind::NotFound)
        };
        let Some(reference) = names.iter().find(is_there).or(names.first()) else {
            return Ok(());
        };
        let format = details["backing-filename-format"].as_str();
        let mut opening = Opening::new(request, Arc::clone(&top.file), gate, chain);
        let mut image = opening.child("backing", reference, format, Access::Read)?;
        // Only a state has been put on its base.
        let base = image.backing.take();
        images.push(image);
        images.extend(base.map(|base| *base));
    }
}

/// Opens what is to become the backing file of `top`, by the rules by which it will be opened then: as
/// `reference` in that image, through its gate, in one chain with its files.
///
/// # Errors
/// As [`open`]. Names `top`, too.
pub fn open_backing_of(
    top: &Image,
    reference: &str,
    format: Option<ImageFormat>,
    request: &OpenRequest,
) -> Result<Image> {
    let gate = OpenGate::new(top.file.path(), &request.allow_dirs)?;
    let mut chain = Chain::default();
    for file in [Some(&top.file), top.image_file.as_ref()].into_iter().flatten() {
        chain.push(file)?;
    }
    let mut opening = Opening::new(request, Arc::clone(&top.file), &gate, &mut chain);
    opening.child("backing", reference, format.map(ImageFormat::name), Access::Read)
}

/// Whether the image at `overlay` says that it stands on `file`. A mark on that file names it, so it is
/// opened by the rules for what an image names.
///
/// # Errors
/// If it cannot be opened, or is no image that could stand on another.
pub(super) fn stands_on(overlay: &Path, file: &HostFile, allow_dirs: &[PathBuf]) -> Result<bool> {
    let image = named_by_mark(overlay, file, allow_dirs)?;
    if image.format == ImageFormat::Raw {
        let name = overlay.display().to_string();
        return Err(Error::invalid("is no image of a format that has a backing file").context(name));
    }
    names_as_backing(&image, file)
}

/// Whether the chain of the image at `overlay`, which a mark on `file` names, goes to its end without that
/// file. Then the overlay may have been made anew since; or its header had no room for another name when a
/// snapshot put it there. A chain that ends at what is not there may be meant to go on in the file.
pub(super) fn stands_elsewhere(overlay: &Path, file: &HostFile, allow_dirs: &[PathBuf]) -> bool {
    let mut path = overlay.to_path_buf();
    for depth in 0..open_gate::MAX_DEPTH {
        let Ok(image) = named_by_mark(&path, file, allow_dirs) else { return false };
        if image.format == ImageFormat::Raw {
            // A raw file in the overlay's own place tells nothing.
            return depth > 0;
        }
        let names = backing_names(image.file.path(), &image.node.driver().details());
        if names.is_empty() {
            return true;
        }
        let below = |name: &String| open_gate::combine(image.file.path(), name);
        match names.iter().map(below).find(|path| path.exists()) {
            Some(below) if names_as_backing(&image, file).is_ok_and(|is_below| !is_below) => {
                path = below;
            }
            _ => return false,
        }
    }
    false
}

/// The image at the path of an overlay that a mark on `file` names, or of one below that.
fn named_by_mark(path: &Path, file: &HostFile, allow_dirs: &[PathBuf]) -> Result<Image> {
    let gate = OpenGate::new(file.path(), allow_dirs)?;
    let Some(reference) = path.to_str() else {
        return Err(Error::invalid("its path is not text").context(path.display().to_string()));
    };
    let path = gate.resolve(file.path(), reference)?;
    let request = OpenRequest { backing: false, ..OpenRequest::read(path).locking(Locking::Off) };
    let image = open_link(&request, &gate, &mut Chain::default(), None)?;
    gate.confirm(&image.file)?;
    Ok(image)
}

/// Whether an image names this file as its backing file.
///
/// # Errors
/// If the file cannot be looked at.
pub fn names_as_backing(image: &Image, file: &HostFile) -> Result<bool> {
    let identity = file.identity()?;
    let is_file = |name: &String| {
        let found = std::fs::metadata(open_gate::combine(image.file.path(), name));
        found.is_ok_and(|found| (found.dev(), found.ino()) == identity)
    };
    Ok(backing_names(image.file.path(), &image.node.driver().details()).iter().any(is_file))
}

/// The file that an image may pull in by this name, if it is there.
pub fn named_file(image: &Image, name: &str, allow_dirs: &[PathBuf]) -> Option<HostFile> {
    let gate = OpenGate::new(image.file.path(), allow_dirs).ok()?;
    let path = gate.resolve(image.file.path(), name).ok()?;
    let file = HostFile::open(&path, OpenOptions::default()).ok()?;
    gate.confirm(&file).ok()?;
    Some(file)
}

/// What a format's opening code has at hand.
#[derive(Debug)]
pub struct Opening<'a> {
    /// The request for this very file (for a backing file, the one made for it).
    pub request: &'a OpenRequest,
    /// The image's file, open and locked.
    pub file: Arc<HostFile>,
    gate: &'a OpenGate,
    chain: &'a mut Chain,
    /// What the operator says it stands on (or that it stands on nothing), whatever it names.
    pub(super) overridden: Option<Option<Image>>,
    /// Whether discards are ignored.
    pub(super) keeps_space: bool,
    /// The session whose records were redone below this image.
    pub(super) settled: Option<u128>,
    /// The file with the data, where that is another.
    pub(super) image_file: Option<Arc<HostFile>>,
    /// The image below, once it was opened.
    backing: Option<Image>,
}

impl<'a> Opening<'a> {
    /// An image in `file`, as `request` wants it.
    pub(super) fn new(
        request: &'a OpenRequest,
        file: Arc<HostFile>,
        gate: &'a OpenGate,
        chain: &'a mut Chain,
    ) -> Opening<'a> {
        Opening {
            request,
            file,
            gate,
            chain,
            overridden: None,
            keeps_space: false,
            settled: None,
            image_file: None,
            backing: None,
        }
    }
}

impl Opening<'_> {
    /// The image below: what the operator says, or else what the image names (`named`, a file and
    /// its format) by way of [`Opening::child`].
    pub fn backing(&mut self, named: Option<(&str, Option<&str>)>) -> Result<Option<Node>> {
        self.backing = match (self.overridden.take(), named) {
            (Some(given), _) => given,
            (None, Some((file, format))) => {
                Some(self.child("backing", file, format, Access::Read)?)
            }
            (None, None) => None,
        };
        Ok(self.backing.as_ref().map(|image| image.node.clone()))
    }

    /// The image that [`Opening::backing`] has opened last.
    pub(super) fn below(&self) -> Option<&Image> {
        self.backing.as_ref()
    }

    /// The place for what must outlive this process, if a guest is to be served.
    pub fn keep(&self, format: &str) -> Result<Option<Keep>> {
        let keep = open_keep(self.request, &self.file, format)?;
        if let (Some(keep), Some(nonce)) = (&keep, self.settled)
            && keep.session().is_none()
        {
            // The predecessor died while it put this image on the one below: nothing was written to
            // this one, and what the guest relies on has just been redone there.
            keep.bear(nonce)?;
        }
        if let (Some(_), Some(below)) = (&keep, &self.backing) {
            forget_below(self.request, &self.file, below);
        }
        Ok(keep)
    }

    /// The path of a file that this image names, if it may be opened.
    pub(super) fn resolve(&self, reference: &str) -> Result<PathBuf> {
        self.gate.resolve(self.file.path(), reference)
    }

    /// Opens a file that this image names, as an image of its own: a backing file (`access` read)
    /// or an external data file. `format` is what the image says of it; a missing one is guessed.
    pub fn child(
        &mut self,
        role: &str,
        reference: &str,
        format: Option<&str>,
        access: Access,
    ) -> Result<Image> {
        let name = self.file.name().to_string();
        let context = || format!("{name}: its {role} file");
        if access == Access::Read && crash_state::is_name(reference) {
            return self.child_state(reference).context(context);
        }
        let path = self.gate.resolve(self.file.path(), reference).context(context)?;
        let format = match format {
            Some(name) => Some(name.parse::<ImageFormat>().context(context)?),
            None => None,
        };
        let request = OpenRequest {
            path,
            format,
            access,
            state_dir: StateDir::None,
            settle_in: match &self.request.state_dir {
                StateDir::None => self.request.settle_in.clone(),
                dir => dir.clone(),
            },
            node_name: graph::auto_name(),
            ..self.request.clone()
        };
        if access == Access::Read {
            let settled = settle(&request).context(context)?;
            self.settled = self.settled.or(settled);
        }
        open_link(&request, self.gate, self.chain, Some(self.gate)).context(context)
    }

    /// Opens a crash state that this image names as what it stands on. Log and base pass the gate.
    fn child_state(&mut self, reference: &str) -> Result<Image> {
        let named = Named::parse(reference).map_err(|err| {
            let message = format!(
                "{err}; have the image name the file itself: vublk rebase -u -b FILE -F FORMAT {}",
                self.file.name()
            );
            Error::new(err.kind(), message)
        })?;
        let (log, base) = (self.resolve(&named.log)?, self.resolve(&named.base)?);
        let like = OpenRequest {
            access: Access::Read,
            state_dir: StateDir::None,
            node_name: graph::auto_name(),
            ..self.request.clone()
        };
        let request = named.request(log, base, &like)?;
        let Some(of) = &request.state else { return Err(ImageFormat::CrashState.refusal()) };
        let below = crash_state::request_for_base(&request)?;
        let base = open_link(&below, self.gate, self.chain, Some(self.gate))?;
        let log = crash_state::open_log(&of.log, &request)?;
        self.gate.confirm(&log)?;
        self.chain.push(&log)?;
        crash_state::image(&request.node_name, &log, &base, true, &of.state)
    }
}

/// Opens an image over another, whatever its own header names.
pub(super) fn open_over(request: &OpenRequest, backing: Image) -> Result<Image> {
    open_on(request, Some(backing))
}

/// Opens an image on nothing, whatever its own header names: for a change of that header. What it
/// leaves to its backing reads as zeros.
///
/// # Errors
/// As [`open`].
pub fn open_alone(request: &OpenRequest) -> Result<Image> {
    open_on(request, None)
}

fn open_on(request: &OpenRequest, backing: Option<Image>) -> Result<Image> {
    let gate = OpenGate::new(&request.path, &request.allow_dirs)?;
    let mut chain = Chain::default();
    let (file, format, guessed) = open_locked(request, &mut chain, None)?;
    let mut opening = Opening::new(request, file, &gate, &mut chain);
    opening.overridden = Some(backing);
    build(opening, format, guessed)
}

/// Opens one file of a chain. `confirm` is the gate it must (still) pass, for files that an image
/// named.
fn open_link(
    request: &OpenRequest,
    gate: &OpenGate,
    chain: &mut Chain,
    confirm: Option<&OpenGate>,
) -> Result<Image> {
    let (file, format, guessed) = open_locked(request, chain, confirm)?;
    build(Opening::new(request, file, gate, chain), format, guessed)
}

/// Opens and locks the file of an image, and says its format. Nothing of its content has been
/// believed yet.
pub(super) fn open_file(request: &OpenRequest) -> Result<(Arc<HostFile>, ImageFormat)> {
    let (file, format, _) = open_locked(request, &mut Chain::default(), None)?;
    Ok((file, format))
}

fn open_locked(
    request: &OpenRequest,
    chain: &mut Chain,
    confirm: Option<&OpenGate>,
) -> Result<(Arc<HostFile>, ImageFormat, bool)> {
    let options = OpenOptions {
        write: request.access == Access::Write,
        direct: request.cache.is_direct(),
        ..OpenOptions::default()
    };
    let file = Arc::new(open_host(&request.path, options)?);
    if let Some(gate) = confirm {
        gate.confirm(&file)?;
    }
    chain.push(&file)?;
    if request.locking != Locking::Inspect {
        lock(&file, request, ImageFormat::Raw)?;
    }
    let (format, guessed) = match request.format {
        Some(format) => (format, false),
        None => (guess(&file)?, true),
    };
    if guessed && confirm.is_some() {
        tracing::warn!(
            "{}: the image above does not say its format; {format} assumed",
            file.name()
        );
    }
    if request.locking == Locking::Inspect {
        lock(&file, request, format)?;
    }
    check_settled(request, &file, format)?;
    Ok((file, format, guessed))
}

/// Opens the image in a file that is open and locked.
pub(super) fn build(mut opening: Opening<'_>, format: ImageFormat, guessed: bool) -> Result<Image> {
    let driver = open_driver(&mut opening, format, guessed)?;
    let request = opening.request;
    let options = NodeOptions {
        name: request.node_name.clone(),
        read_only: request.access == Access::Read,
        keeps_space: opening.keeps_space,
    };
    Ok(Image {
        node: Node::new(driver, options),
        file: opening.file,
        format,
        guessed,
        cache: request.cache,
        access: request.access,
        locking: request.locking,
        image_file: opening.image_file,
        backing: opening.backing.map(Box::new),
    })
}

/// The driver of an image in a file that is open and locked.
pub(super) fn open_driver(
    opening: &mut Opening<'_>,
    format: ImageFormat,
    guessed: bool,
) -> Result<Arc<dyn Driver>> {
    if opening.request.salvage && format != ImageFormat::Vhdx {
        return Err(Error::unsupported(format!(
            "{}: only vhdx images can be salvaged, not {format}",
            opening.file.name()
        )));
    }
    match format {
        ImageFormat::Raw => open_raw(opening, guessed),
        ImageFormat::Qcow2 => open_qcow2(opening),
        ImageFormat::Vhdx => open_vhdx(opening),
        ImageFormat::AddCow => add_cow::open_driver(opening),
        other => Err(other.refusal().context(opening.file.name())),
    }
}

/// Opens a host file for a disk. Explains what only an operator of disks would be told.
pub(super) fn open_host(path: &Path, options: OpenOptions) -> Result<HostFile> {
    HostFile::open(path, options).map_err(|err| match err.kind() {
        ErrorKind::ReadOnly if options.write && err.errno().is_some() => {
            Error::new(err.kind(), format!("{err} (to open it for writing)"))
        }
        ErrorKind::PermissionDenied => {
            // Under systemd it is not the user who has typed the command.
            let (user, what) = (rustix::process::geteuid().as_raw(), options.write);
            let what = if what { "writing" } else { "reading" };
            Error::new(err.kind(), format!("{err} (to open it for {what}, as user {user})"))
        }
        ErrorKind::NotFound if path.to_str().is_some_and(has_protocol) => Error::unsupported(
            format!("{}: only files and block devices of this host are supported", path.display()),
        ),
        _ => err,
    })
}

/// Whether a path looks like an address on some other host (`nbd://…`, `ssh:…`).
fn has_protocol(path: &str) -> bool {
    const KNOWN: &[&str] =
        &["nbd", "http", "https", "ftp", "ftps", "ssh", "iscsi", "rbd", "gluster", "nfs", "json"];
    path.split_once(':').is_some_and(|(prefix, _)| {
        KNOWN.contains(&prefix) || prefix.split_once('+').is_some_and(|(p, _)| KNOWN.contains(&p))
    })
}

/// The format of the image of a request: what it says, or else what its first bytes look like.
///
/// # Errors
/// If the file cannot be read.
pub fn format_of(request: &OpenRequest) -> Result<ImageFormat> {
    match request.format {
        Some(format) => Ok(format),
        None => guess(&open_host(&request.path, OpenOptions::default())?),
    }
}

/// The format of an open file, by its first bytes.
pub fn guess(file: &HostFile) -> Result<ImageFormat> {
    let alignment = file.alignment();
    let unit = alignment.request.max(probe::HEAD_LEN as u64);
    let mut head = AlignedBuf::zeroed(unit as usize, alignment.memory.max(512));
    // A plain call, as the file may end inside of what direct I/O takes: it then reads what there is.
    let read = loop {
        match rustix::io::pread(file, head.as_slice(), 0) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other.context(|| format!("{}: reading", file.name()))?,
        }
    };
    Ok(probe::by_magic(&head.as_slice()[..read]).unwrap_or(ImageFormat::Raw))
}

/// Name of the driver at the bottom, as QEMU has it.
pub fn protocol_name(file: &HostFile) -> &'static str {
    match file.kind() {
        HostKind::Regular => "file",
        HostKind::BlockDevice => "host_device",
    }
}

/// The path by which a backing file named in the image at `from` would be opened, for display.
pub fn full_backing_name(from: &Path, reference: &str) -> PathBuf {
    match crash_state::is_name(reference) {
        true => reference.into(),
        false => open_gate::combine(from, reference),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A file with these bytes.
    pub fn file_of(bytes: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        file
    }

    #[test]
    fn guessed_raw_is_guarded_and_said_raw_is_not() {
        let file = file_of(&[0; 4096]);
        let image = open(&OpenRequest::write(file.path())).unwrap();
        assert!(image.guessed);
        assert_eq!(image.node.driver().name(), "guess-guard");
        drop(image);
        let raw = OpenRequest::write(file.path()).format(Some(ImageFormat::Raw));
        assert_eq!(open(&raw).unwrap().node.driver().name(), "raw");
    }

    #[test]
    fn files_shorter_than_what_direct_io_takes_are_looked_at() {
        for (bytes, format) in [
            (&b"KDMV"[..], ImageFormat::Vmdk),
            (b"ADD_COW\xff", ImageFormat::AddCow),
            (&[0; 100], ImageFormat::Raw),
            (b"", ImageFormat::Raw),
        ] {
            let file = file_of(bytes);
            let direct = OpenOptions { direct: true, ..Default::default() };
            // Not every file system has direct I/O.
            let Ok(file) = HostFile::open(file.path(), direct) else { return };
            assert_eq!(guess(&file).unwrap(), format);
        }
    }

    #[test]
    fn known_formats_are_named_in_the_refusal() {
        for (magic, word) in [
            (&b"{ \"QBM\": {} }"[..], "qbm images cannot be opened by this version yet"),
            (b"KDMV", "vmdk images are not supported"),
            (b"LUKS\xba\xbe", "luks"),
            (b"rhswfsj\0", "log of writes"),
        ] {
            let file = file_of(magic);
            let err = open(&OpenRequest::read(file.path())).unwrap_err();
            assert_eq!(err.kind(), ErrorKind::Unsupported);
            assert!(err.to_string().contains(word), "{err}");
            assert!(err.to_string().contains(file.path().to_str().unwrap()), "{err}");
            // The operator may insist.
            open(&OpenRequest::read(file.path()).format(Some(ImageFormat::Raw))).unwrap();
        }
    }

    #[test]
    fn files_that_an_image_names_pass_the_gate() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::create_dir(path("images")).unwrap();
        for name in ["images/top", "images/base", "images/data", "images/disk.vdi", "outside"] {
            std::fs::write(path(name), [0; 4096]).unwrap();
        }
        std::os::unix::fs::symlink("top", path("images/tail")).unwrap();
        let request = OpenRequest::write(path("images/top"));
        let options = OpenOptions { write: true, ..OpenOptions::default() };
        let file = Arc::new(HostFile::open(&request.path, options).unwrap());
        let gate = OpenGate::new(&request.path, &[]).unwrap();
        let mut chain = Chain::default();
        chain.push(&file).unwrap();
        let mut opening = Opening::new(&request, file, &gate, &mut chain);

        let base = opening.child("backing", "base", Some("raw"), Access::Read).unwrap();
        assert!(base.node.limits().read_only);
        assert!(base.node.name().starts_with("#block"));
        let data = opening.child("data", "data", None, Access::Write).unwrap();
        assert!(data.guessed && !data.node.limits().read_only);
        // The base is locked as a reader's, the data file as a writer's.
        open(&OpenRequest::read(path("images/base"))).unwrap();
        open(&OpenRequest::write(path("images/base"))).unwrap_err();
        open(&OpenRequest::read(path("images/data"))).unwrap_err();

        let mut refused = |reference, format, message: &str| {
            let err = opening.child("backing", reference, format, Access::Read).unwrap_err();
            let err = err.to_string();
            assert!(err.contains("top: its backing file: ") && err.contains(message), "{err}");
        };
        refused("../outside", None, "--allow-dir");
        refused("tail", None, "already part of this chain");
        refused("base", Some("qcow3"), "unknown format 'qcow3'");
        refused("disk.vdi", Some("vdi"), "vdi images are not supported");
        refused("gone", None, "No such file");
    }

    #[test]
    fn what_a_guest_cannot_use_is_said_with_the_way_out() {
        let check = |len: u64, block| {
            let file = tempfile::NamedTempFile::new().unwrap();
            file.as_file().set_len(len).unwrap();
            open(&OpenRequest::read(file.path())).unwrap().check_for_guest(block)
        };
        check(1 << 20, 4096).unwrap();
        assert!(check(0, 512).unwrap_err().to_string().contains("is empty"));
        let err = check(1000, 512).unwrap_err().to_string();
        assert!(err.contains("vublk resize") && err.ends_with(" 1024)"), "{err}");
        let err = check(512, 4096).unwrap_err().to_string();
        assert!(err.ends_with("or use --block-size 512"), "{err}");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("4k.vhdx");
        let format = ImageFormat::Vhdx;
        crate::images::create(&crate::images::CreateRequest {
            size: Some(8 << 20),
            options: vec![("logical_sector_size".into(), "4096".into())],
            ..crate::images::CreateRequest::new(&path, format)
        })
        .unwrap();
        let image = open(&OpenRequest::read(&path).format(Some(format))).unwrap();
        image.check_for_guest(4096).unwrap();
        let err = image.check_for_guest(512).unwrap_err().to_string();
        assert!(err.contains("sectors of 4096 bytes") && !err.contains("--cache"), "{err}");
    }

    #[test]
    fn other_hosts_are_refused_as_such() {
        let err = open(&OpenRequest::read("nbd://localhost/disk")).unwrap_err();
        assert!(err.to_string().contains("only files and block devices"), "{err}");
        let err = open(&OpenRequest::read("/nowhere/at/all")).unwrap_err();
        assert_eq!(err.to_string(), "/nowhere/at/all: No such file or directory");
    }
}
