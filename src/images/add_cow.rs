//! add-cow images by path: three files that belong together.
//!
//! The format names its image file and its backing file, but does not say what format the backing
//! file has. Guessing that would let whoever wrote to a raw backing choose what it is taken for. So
//! `create` remembers it in an extended attribute of the add-cow file ([`BACKING_FORMAT`]), which
//! leaves the file's bytes as the format wants them. A copy without the attribute has a raw
//! backing; one that does not look raw is refused until the operator has said what it is.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::XattrFlags;

use crate::block::{Driver, FormatDriver, open_gate};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::formats::addcow::{self, AddCow, Backing, Header};
use crate::images::check::CheckReport;
use crate::images::crash_state;
use crate::images::create::{
    NewFile, Prepared, check_not_own_backing, named_backing, open_backing,
};
use crate::images::open::{Opening, guess, open_host};
use crate::images::{Access, CreateRequest, Created, Image, ImageFormat, OpenRequest, open};
use crate::io::{AlignedBuf, File, HostFile, HostKind, OpenOptions, block_on};
use crate::units::SECTOR_SIZE;

/// The extended attribute with the name of the backing file's format.
const BACKING_FORMAT: &str = "user.vublk.backing-format";

/// Opens the image and image file of an add-cow file that is open and locked.
pub(super) fn open_driver(opening: &mut Opening<'_>) -> Result<Arc<dyn Driver>> {
    let request = opening.request;
    let read_only = request.access == Access::Read;
    let name = opening.file.name().to_string();
    // Headers and bits have any length and place, which O_DIRECT does not allow.
    let file = Arc::new(opening.file.buffered().context(|| name.clone())?) as Arc<dyn File>;
    let header = block_on(addcow::read_header(&file))?;
    let image = opening.child("image", &header.image, Some("raw"), request.access)?;
    let format = match &header.backing {
        Some(backing) if opening.overridden.is_none() => Some(backing_format(opening, backing)?),
        _ => None,
    };
    let named = header.backing.as_deref().map(|backing| (backing, format.as_deref()));
    let backing = match (request.backing, named) {
        (false, Some(_)) => Backing::Unopened,
        (false, None) => Backing::None,
        (true, named) => opening.backing(named)?.map_or(Backing::None, Backing::Node),
    };
    let options = addcow::OpenOptions {
        read_only,
        image: Arc::clone(&image.file) as Arc<dyn File>,
        backing,
        backing_format: format,
        keep: if read_only { None } else { opening.keep(addcow::NAME)? },
    };
    opening.image_file = Some(image.file);
    let image = block_on(AddCow::open(file, options))?;
    Ok(Arc::new(FormatDriver::new(image).context(|| name)?))
}

/// The format of the backing file that an add-cow file names.
fn backing_format(opening: &Opening<'_>, backing: &str) -> Result<String> {
    if crash_state::is_name(backing) {
        return Ok(ImageFormat::CrashState.name().into());
    }
    if let Some(format) = remembered_format(&opening.file, backing)? {
        return Ok(format.name().to_string());
    }
    let context = || format!("{}: its backing file", opening.file.name());
    let path = opening.resolve(backing).context(context)?;
    let file = open_host(&path, OpenOptions::default()).context(context)?;
    match guess(&file)? {
        ImageFormat::Raw => Ok(ImageFormat::Raw.name().into()),
        other => Err(Error::invalid(format!(
            "{}: its backing file {} looks like {other}, and an add-cow file does not say; say \
             what it is: vublk rebase -u -b {backing} -F {other} {0} (or -F raw)",
            opening.file.name(),
            path.display(),
        ))),
    }
}

/// The format that was remembered with [`remember_format`] of the backing file of this name; or, if
/// somebody died while he changed the name, of the one of the two that the header has now
/// ([`set_backing`]).
fn remembered_format(file: &HostFile, backing: &str) -> Result<Option<ImageFormat>> {
    let mut value = [0; 4096];
    let Ok(len) = rustix::fs::fgetxattr(file, BACKING_FORMAT, &mut value[..]) else {
        // Not there, or nothing like it on this file system.
        return Ok(None);
    };
    let text = String::from_utf8_lossy(&value[..len]);
    let named = text.lines().filter_map(|line| line.split_once(' '));
    let format = match text.contains(' ') {
        true => named.into_iter().find(|(_, name)| *name == backing).map(|(format, _)| format),
        false => Some(&*text),
    };
    let context = || format!("{}: {BACKING_FORMAT}", file.name());
    format.map(|format| format.parse().context(context)).transpose()
}

/// Remembers what format the backing file has under either of two names.
fn remember_both(file: &HostFile, formats: [(Option<&str>, Option<ImageFormat>); 2]) -> Result<()> {
    let line = |(name, format): (Option<&str>, Option<ImageFormat>)| {
        Some(format!("{} {}\n", format.unwrap_or(ImageFormat::Raw), name?))
    };
    let lines: String = formats.into_iter().filter_map(line).collect();
    remember(file, lines.as_bytes())
}

/// Remembers the format of the backing file with the add-cow file.
///
/// # Errors
/// If the file system cannot, and it matters, because raw is what is taken where nothing is said.
pub(super) fn remember_format(file: &HostFile, format: Option<ImageFormat>) -> Result<()> {
    let Some(format) = format else {
        forget_format(file);
        return Ok(());
    };
    match remember(file, format.name().as_bytes()) {
        Err(_) if format == ImageFormat::Raw => Ok(()),
        result => result.context(|| format!("the format of the backing file ({format})")),
    }
}

fn remember(file: &HostFile, value: &[u8]) -> Result<()> {
    rustix::fs::fsetxattr(file, BACKING_FORMAT, value, XattrFlags::empty())
        .context(|| format!("{}: cannot set the attribute {BACKING_FORMAT}", file.name()))
}

fn forget_format(file: &HostFile) {
    // Not there, or nothing like it on this file system.
    let _ = rustix::fs::fremovexattr(file, BACKING_FORMAT);
}

/// The longest name that lies in the first sector of the header, which a disk writes whole or not at
/// all, in bytes.
const SHORT_NAME: usize = 512 - 12 - 1;

/// A backing file as drivers are told of it.
fn named(backing: Option<&str>, format: Option<ImageFormat>) -> Option<(&str, &'static str)> {
    backing.map(|name| (name, format.unwrap_or(ImageFormat::Raw).name()))
}

/// Checks that an add-cow or qcow2 image can name this backing file (or none) from now on.
///
/// # Errors
/// Names the image and what is wrong with the name.
pub fn check_new_backing(
    image: &Image,
    backing: Option<&str>,
    format: Option<ImageFormat>,
) -> Result<()> {
    let name = || image.name().to_string();
    backing.map_or(Ok(()), open_gate::check_printable).context(name)?;
    match image.format {
        ImageFormat::AddCow => {}
        ImageFormat::Qcow2 => {
            return block_on(image.node.driver().check_rename_backing(named(backing, format)));
        }
        other => {
            return Err(Error::unsupported(format!(
                "{}: {other} images cannot be made to name this backing file here",
                image.name()
            )));
        }
    }
    let file = Arc::new(image.file.buffered().context(name)?) as Arc<dyn File>;
    let old = block_on(addcow::read_header(&file))?;
    let is_long = |name: &Option<String>| name.as_ref().is_some_and(|n| n.len() > SHORT_NAME);
    let new = Header { backing: backing.map(str::to_string), image: old.image.clone() };
    new.encode().context(name)?;
    if is_long(&old.backing) && is_long(&new.backing) {
        return Err(Error::unsupported(format!(
            "{}: a backing file name of more than {SHORT_NAME} bytes cannot be put in the place of \
             another such name without a moment when neither stands there; rebase to a shorter \
             name first",
            image.name()
        )));
    }
    Ok(())
}

/// Has an add-cow image name another backing file, or none; durable on return. A power cut leaves
/// the old name or the new one.
///
/// # Errors
/// Names the image. See [`check_new_backing`].
pub fn set_backing(
    image: &Image,
    backing: Option<&str>,
    format: Option<ImageFormat>,
) -> Result<()> {
    check_new_backing(image, backing, format)?;
    #[cfg(test)]
    super::frozen::tests::step();
    let name = || image.name().to_string();
    let named = named(backing, format);
    if image.format != ImageFormat::AddCow {
        return block_on(image.node.driver().rename_backing(named));
    }
    let file = image.file.buffered().context(name)?;
    let shared = Arc::new(image.file.buffered().context(name)?) as Arc<dyn File>;
    let old = block_on(addcow::read_header(&shared))?;
    let was_long = old.backing.as_ref().is_some_and(|name| name.len() > SHORT_NAME);
    let old_format = match &old.backing {
        Some(name) => remembered_format(&image.file, name)?,
        None => None,
    };
    let bytes = Header { backing: backing.map(str::to_string), image: old.image }.encode()?;
    // The first sector decides: a name ends in it, or goes on in what is there by then.
    let (first, rest) = (0..512, 512..addcow::layout::HEADER_LEN as usize);
    let order = if was_long { [first, rest] } else { [rest, first] };
    let changed = old_format != format;
    if changed && [old_format, format].iter().any(|f| f.is_some_and(|f| f != ImageFormat::Raw)) {
        // Whichever name the header has by the time it is read, it is taken for what it is.
        let old = (old.backing.as_deref(), old_format);
        remember_both(&image.file, [old, (backing, format)])?;
        block_on(file.flush()).context(name)?;
    }
    block_on(async {
        for part in order {
            let buf = AlignedBuf::from_slice(&bytes[part.clone()], 512);
            file.write(part.start as u64, buf.buffers(), false).await?;
            file.flush().await?;
        }
        Ok::<_, Error>(())
    })
    .context(name)?;
    if changed {
        remember_format(&file, format)?;
        block_on(file.flush()).context(name)?;
    }
    block_on(image.node.driver().rename_backing(named))
}

/// Prepares an add-cow file, and makes its image file unless one is given.
pub(super) fn prepare(request: &CreateRequest) -> Result<Prepared> {
    let path = &request.path;
    let name = || path.display().to_string();
    let option = |keys: [&str; 2]| {
        let found = request.options.iter().find(|(key, _)| keys.contains(&key.as_str()));
        found.map(|(_, value)| value.as_str())
    };
    let (backing, given_format) = named_backing(request)?;
    let format = match (backing, given_format) {
        // It says itself what it is.
        (Some(file), None) if crash_state::is_name(file) => None,
        (None, None) => None,
        (Some(_), Some(format)) => Some(format.parse::<ImageFormat>()?),
        (Some(file), None) => {
            return Err(Error::invalid(format!(
                "{}: the backing file {file} is given without its format; say it with -F",
                name()
            )));
        }
        (None, Some(_)) => {
            return Err(Error::invalid(format!(
                "{}: the format of a backing file, but no backing file",
                name()
            )));
        }
    };
    // Stays open (and locked) until the image is there.
    let below = match (backing, format) {
        (Some(file), Some(format)) if !request.backing_unchecked => {
            Some(open_backing(request, file, Some(format))?)
        }
        (Some(file), _) => {
            check_not_own_backing(request, file)?;
            None
        }
        _ => None,
    };
    let image = image_file(request, option(["image-file", "image_file"]), below.as_ref())?;
    if let (Some(file), None) = (backing, &below) {
        check_not_image_file(request, file, &image.file)?;
    }
    let header = Header { backing: backing.map(str::to_string), image: image.name.clone() };
    header.encode().context(name)?;
    let new = NewFile::open(path, &request.allow_dirs)?;
    if new.file.kind() != HostKind::Regular {
        return Err(Error::unsupported(format!(
            "{}: an add-cow image is a file; a device can be its image file (-o image-file=)",
            name()
        )));
    }
    if new.file.identity()? == image.file.identity()? {
        return Err(Error::invalid(format!("{}: an image cannot be its own image file", name())));
    }
    Ok(Prepared::new(move || {
        // All of it: what is locked stays so.
        let image = image;
        remember_format(&new.file, format)?;
        let len = addcow::layout::file_len(image.size);
        new.fill(len, addcow::create::create(new.file.as_ref(), &header, image.size))?;
        if let Some(new) = image.new {
            new.keep();
        }
        let file = Arc::clone(&new.file);
        new.keep();
        // The names are as durable as the content.
        let directory = open_gate::directory_of(file.path());
        std::fs::File::open(directory)?.sync_all().context(|| file.name().to_string())?;
        drop(below);
        let pair = |key: &str, value: String| (key.to_string(), value);
        let mut shown = vec![pair("size", image.size.to_string()), pair("image_file", image.name)];
        shown.extend(header.backing.map(|file| pair("backing_file", file)));
        shown.extend(format.map(|format| pair("backing_fmt", format.to_string())));
        Ok(Created { size: image.size, options: shown })
    }))
}

/// Refuses the image file as a backing file that is not looked at: nobody could ever open that.
fn check_not_image_file(request: &CreateRequest, backing: &str, image: &HostFile) -> Result<()> {
    let path = open_gate::combine(&request.path, backing);
    // One that is not there yet is another one.
    match HostFile::open(&path, OpenOptions::default()).and_then(|file| file.identity()) {
        Ok(backing) if backing == image.identity()? => Err(both_image_and_backing(&path)),
        _ => Ok(()),
    }
}

fn both_image_and_backing(path: &Path) -> Error {
    Error::invalid(format!("{}: is both image file and backing file", path.display()))
}

/// The image file of a new image.
struct ImageFile {
    /// As it is to be named.
    name: String,
    file: Arc<HostFile>,
    size: u64,
    /// Set if it was made just now.
    new: Option<NewFile>,
}

/// The image file that the operator named, or a new one beside the add-cow file: its name with
/// `.raw` behind it.
fn image_file(
    request: &CreateRequest,
    named: Option<&str>,
    below: Option<&Image>,
) -> Result<ImageFile> {
    let context = |path: &Path| format!("image file {}", path.display());
    let Some(named) = named else { return new_image_file(request, below) };
    open_gate::check_new_name(named).context(|| request.path.display().to_string())?;
    let path = open_gate::combine(&request.path, named);
    // Before it is locked, by ourselves.
    let is_below = |below: &Image| {
        let file = open_host(&path, OpenOptions::default()).and_then(|file| file.identity());
        file.ok() == below.file.identity().ok()
    };
    if below.is_some_and(is_below) {
        return Err(both_image_and_backing(&path));
    }
    let to_open = OpenRequest::write(&path).format(Some(ImageFormat::Raw));
    let image = open(&to_open).map_err(|err| match err.kind() {
        ErrorKind::NotFound => Error::new(
            ErrorKind::NotFound,
            format!("image file {err}; without -o image-file one is made"),
        ),
        _ => err.context(context(&path)),
    })?;
    let size = image.node.size();
    if !size.is_multiple_of(SECTOR_SIZE) || size == 0 {
        return Err(Error::invalid(format!(
            "image file {}: image size is not a multiple of 512: {size} bytes",
            path.display()
        )));
    }
    if let Some(wanted) = request.size.filter(|wanted| *wanted != size) {
        return Err(Error::invalid(format!(
            "image file {}: has {size} bytes and not the {wanted} asked for; the size of an add-cow \
             image is that of its image file",
            path.display()
        )));
    }
    if image.file.allocated_size()? > 0 {
        tracing::warn!(
            "image file {}: what it contains is hidden until it is overwritten",
            path.display()
        );
    }
    Ok(ImageFile { name: named.to_string(), file: image.file, size, new: None })
}

fn new_image_file(request: &CreateRequest, below: Option<&Image>) -> Result<ImageFile> {
    let size = super::create::size_of(request, below)?;
    if size == 0 {
        return Err(Error::invalid(format!(
            "{}: a size of 0 bytes cannot be: an add-cow image has at least one sector ({SECTOR_SIZE})",
            request.path.display()
        )));
    }
    let mut path = request.path.clone().into_os_string();
    path.push(".raw");
    let path = PathBuf::from(path);
    let base = path.file_name().and_then(|name| name.to_str());
    let Some(base) = base else {
        return Err(Error::invalid(format!("{}: is no name for a file", path.display())));
    };
    // A colon would make it an address.
    let name = if base.contains(':') { format!("./{base}") } else { base.to_string() };
    if std::fs::symlink_metadata(&path).is_ok() {
        return Err(Error::invalid(format!(
            "{0}: exists already, and would hold the data of the new image; give that another name, or \
             make this its image file, with what it contains hidden: vublk create -f add-cow -o \
             image-file={name}",
            path.display()
        )));
    }
    let new = NewFile::open(&path, &request.allow_dirs)?;
    let made = async {
        new.file.set_len(size).await?;
        new.file.flush().await
    };
    new.fill(size, async { made.await.context(|| path.display().to_string()) })?;
    Ok(ImageFile { name, file: Arc::clone(&new.file), size, new: Some(new) })
}

/// Checks, and repairs, an add-cow file.
pub(super) fn check(image: &Image, fix_leaks: bool, fix_all: bool) -> Result<CheckReport> {
    let file = Arc::new(image.file.buffered()?) as Arc<dyn File>;
    let data = image.image_file.as_ref().expect("an add-cow image has an image file");
    let len = data.len().context(|| data.name().to_string())?;
    let found = block_on(addcow::check::check(&file, len, fix_leaks, fix_all))?;
    Ok(CheckReport {
        image_end_offset: Some(addcow::layout::HEADER_LEN + found.sectors.div_ceil(8)),
        total_clusters: Some(found.sectors),
        allocated_clusters: Some(found.allocated),
        fragmented_clusters: Some(found.fragments),
        compressed_clusters: None,
        check_errors: 0,
        corruptions: found.corruptions,
        leaks: found.leaks,
        corruptions_fixed: found.corruptions_fixed,
        leaks_fixed: found.leaks_fixed,
        findings: found.findings.into_iter().map(Into::into).collect(),
    })
}
