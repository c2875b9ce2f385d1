//! Making new images.
//!
//! An existing file is overwritten, as `qemu-img create` does, but only after its locks say that
//! nobody uses it; and nothing of it changes before all that may be refused has been looked at
//! ([`NewFile`]). Block devices keep their size: the image must fit.

pub mod vhdx;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::block::open_gate::{self, OpenGate};
use crate::error::{Error, Result, ResultExt};
use crate::formats::qcow2;
use crate::images::kept::check_nobody_comes_back;
use crate::images::lock::lock_for_writing;
use crate::images::{
    Access, Image, ImageFormat, OpenRequest, add_cow, crash_state, frozen, open, storage,
};
use crate::io::{AlignedBuf, Alignment, File, HostFile, HostKind, OpenOptions, block_on};
use crate::units::parse_size;
use crate::units::{ByteRange, MIB, SECTOR_SIZE};

/// What to create.
#[derive(Clone, Debug)]
pub struct CreateRequest {
    /// Where.
    pub path: PathBuf,
    /// Which format.
    pub format: ImageFormat,
    /// Size of the disk in bytes; taken from the backing file if absent.
    pub size: Option<u64>,
    /// Options by name, as given with `-o`; checked here.
    pub options: Vec<(String, String)>,
    /// The backing file's name as it is to stand in the image, relative to the image's directory.
    pub backing: Option<String>,
    /// The backing file's format.
    pub backing_format: Option<ImageFormat>,
    /// Whether the backing file need not exist.
    pub backing_unchecked: bool,
    /// Directories from below which the backing file, and what a mark on the new file names, may pull in
    /// files.
    pub allow_dirs: Vec<PathBuf>,
}

impl CreateRequest {
    /// For an image of a format, with nothing else said.
    pub fn new(path: impl Into<PathBuf>, format: ImageFormat) -> CreateRequest {
        CreateRequest {
            path: path.into(),
            format,
            size: None,
            options: Vec::new(),
            backing: None,
            backing_format: None,
            backing_unchecked: false,
            allow_dirs: Vec::new(),
        }
    }
}

/// What was created.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Created {
    /// Size of the disk in bytes.
    pub size: u64,
    /// The options in effect, for display.
    pub options: Vec<(String, String)>,
}

/// A create option with what it means, for `-o help`.
pub type OptionHelp = (&'static str, &'static str);

/// The options that `create` knows for a format.
pub fn options(format: ImageFormat) -> &'static [OptionHelp] {
    match format {
        ImageFormat::Raw => &[
            ("size", "size of the disk"),
            ("preallocation", "off (default), falloc (reserve space) or full (write zeros)"),
        ],
        ImageFormat::Qcow2 => &[
            ("size", "size of the disk"),
            ("cluster_size", "unit of allocation, 512 to 2M, a power of two; default 64K"),
            ("refcount_bits", "width of a reference count, 1 to 64, a power of two; default 16"),
            ("backing_file", "the image below, as -b"),
            ("backing_fmt", "its format, as -F"),
            ("compat", "version of the format: 1.1 (default)"),
            ("preallocation", "off (default)"),
        ],
        ImageFormat::Vhdx => vhdx::OPTIONS,
        ImageFormat::AddCow => &[
            ("size", "size of the disk; that of the image file or backing file if not given"),
            ("image-file", "an existing raw image file; FILE.raw is made if not given"),
            ("backing-file", "the image below, as -b"),
            ("backing-fmt", "its format, as -F"),
            ("image_file", "another spelling of image-file"),
            ("backing_file", "another spelling of backing-file"),
            ("backing_fmt", "another spelling of backing-fmt"),
        ],
        _ => &[("size", "size of the disk")],
    }
}

/// An image that is about to be made: whatever may be refused has been looked at, and its file is open and
/// locked. As long as it is not written, a file that existed before is as it was, and one that did not goes
/// when this is dropped.
pub struct Prepared(Box<dyn FnOnce() -> Result<Created>>);

impl Prepared {
    pub(super) fn new(write: impl FnOnce() -> Result<Created> + 'static) -> Prepared {
        Prepared(Box::new(write))
    }

    /// Makes it.
    ///
    /// # Errors
    /// As for [`create`].
    pub fn write(self) -> Result<Created> {
        (self.0)()
    }
}

/// Creates an image.
///
/// # Errors
/// Names the file or the option. A file that did not exist before does not exist after a failure; an
/// existing one is as it was, unless the error says that what it contained is gone.
pub fn create(request: &CreateRequest) -> Result<Created> {
    prepare(request)?.write()
}

/// Does all of [`create`] that changes nothing.
///
/// # Errors
/// As for [`create`], but nothing is gone.
pub fn prepare(request: &CreateRequest) -> Result<Prepared> {
    let known = options(request.format);
    for (name, _) in &request.options {
        if !known.iter().any(|(option, _)| option == name) {
            let names: Vec<_> = known.iter().map(|(option, _)| *option).collect();
            return Err(Error::invalid(format!(
                "format {} has no option '{name}' (known: {})",
                request.format,
                names.join(", ")
            )));
        }
    }
    match request.format {
        ImageFormat::Raw => prepare_raw(request),
        ImageFormat::Qcow2 => prepare_qcow2(request),
        ImageFormat::Vhdx => vhdx::prepare(request),
        ImageFormat::AddCow => add_cow::prepare(request),
        other => Err(Error::unsupported(format!(
            "{}: {other} images cannot be created",
            request.path.display()
        ))),
    }
}

/// Looks at what would have an image refused when it is opened as `open` says, once it is there: a
/// backing file out of bounds, say, or no direct I/O on its file system. Returns what its file will demand
/// of requests then.
///
/// # Errors
/// As [`create`] and [`open()`]. An existing file is as it was, a new one is not there.
pub fn check_openable(create: &CreateRequest, request: &OpenRequest) -> Result<Alignment> {
    let name = || create.path.display().to_string();
    // That a raw image has none is for `create` to say.
    if let (Some(file), format) = named_backing(create)?
        && create.format != ImageFormat::Raw
        && !crash_state::is_name(file)
    {
        let context = || format!("{}: its backing file", name());
        let gate = OpenGate::new(&create.path, &request.allow_dirs)?;
        let path = gate.resolve(&create.path, file).context(context)?;
        let format = format.map(str::parse).transpose()?;
        let access = Access::Read;
        open(&OpenRequest { path, format, access, ..request.clone() }).context(context)?;
    }
    let _new = NewFile::open(&create.path, &request.allow_dirs)?;
    let direct = request.cache.is_direct();
    let file = OpenOptions { write: true, direct, ..Default::default() };
    Ok(HostFile::open(&create.path, file)?.alignment())
}

/// The backing file that is to be named, and its format, whichever way they were given.
pub(super) fn named_backing(request: &CreateRequest) -> Result<(Option<&str>, Option<&str>)> {
    let option = |name: &str| {
        let is_it = |(key, _): &&(String, String)| key.replace('-', "_") == name;
        request.options.iter().find(is_it).map(|(_, value)| value.as_str())
    };
    let file = only_one("backing file", request.backing.as_deref(), option("backing_file"))?;
    if let Some(file) = file {
        if file.is_empty() {
            let name = request.path.display();
            return Err(Error::invalid(format!("{name}: the name of the backing file is empty")));
        }
        // Where the operator says that it is not looked at, it may be for others, who can open it.
        let is_address = request.backing_unchecked || crash_state::is_name(file);
        let check = if is_address { open_gate::check_printable } else { open_gate::check_new_name };
        check(file).context(|| request.path.display().to_string())?;
    }
    let format = request.backing_format.map(ImageFormat::name);
    Ok((file, only_one("backing file's format", format, option("backing_fmt"))?))
}

/// The size of the new disk: as requested, or as the backing file's; a multiple of a sector.
pub(super) fn size_of(request: &CreateRequest, backing: Option<&Image>) -> Result<u64> {
    let size = match (request.size, backing) {
        (Some(size), _) => size,
        (None, Some(backing)) => backing.node.size(),
        (None, None) => {
            return Err(Error::invalid(format!(
                "{}: a new image needs a size",
                request.path.display()
            )));
        }
    };
    check_size(size).context(|| request.path.display().to_string())?;
    Ok(size.next_multiple_of(SECTOR_SIZE))
}

/// Refuses sizes that no file can have.
pub fn check_size(size: u64) -> Result<()> {
    const MAX: u64 = i64::MAX as u64 - (MIB - 1);
    if size > MAX {
        return Err(Error::invalid(format!(
            "a size of {size} bytes is more than the {MAX} allowed"
        )));
    }
    Ok(())
}

/// A file that is to become an image: open for writing, and locked. Until it is
/// [filled](NewFile::fill), nothing of one that existed before has changed. One that did not is removed
/// when this is dropped, unless it was [kept](NewFile::keep).
#[derive(Debug)]
pub struct NewFile {
    /// The file.
    pub file: Arc<HostFile>,
    /// Set if it is to be removed again.
    remove: Option<PathBuf>,
}

impl NewFile {
    /// Creates the file, or opens an existing one that nobody uses.
    pub fn open(path: &Path, allow_dirs: &[PathBuf]) -> Result<NewFile> {
        let write = OpenOptions { write: true, ..Default::default() };
        let existed = std::fs::symlink_metadata(path).is_ok();
        let file = HostFile::open(path, OpenOptions { create: !existed, ..write })?;
        let new = NewFile { file: Arc::new(file), remove: (!existed).then(|| path.to_path_buf()) };
        lock_for_writing(&new.file)?;
        if existed {
            check_nobody_comes_back(&new.file)?;
            frozen::check_not_frozen(&new.file, allow_dirs)?;
        }
        Ok(new)
    }

    /// Gives up what the file contains, and has `make` write the image, for which the file must have
    /// room for `len` bytes. Whatever may be refused has been looked at by then.
    ///
    /// # Errors
    /// Names the file. Says so if what it contained is lost.
    pub fn fill(&self, len: u64, make: impl Future<Output = Result<()>>) -> Result<()> {
        let name = self.file.name();
        block_on(self.check_room(len))
            .context(|| format!("{name}: making it {len} bytes large"))?;
        // What disk this was no longer matters.
        frozen::clear(&self.file);
        block_on(async {
            self.empty().await.context(|| name.to_string())?;
            make.await
        })
        .map_err(|err| self.given_up(err))
    }

    /// Refuses a length that the file cannot have.
    async fn check_room(&self, len: u64) -> Result<()> {
        let now = self.file.len()?;
        if len <= now {
            return Ok(());
        }
        match self.file.kind() {
            // The host knows, and says it of a file that keeps what it contains.
            HostKind::Regular => {
                self.file.set_len(len).await?;
                self.file.set_len(now).await
            }
            HostKind::BlockDevice => Err(Error::invalid(format!(
                "the device has only {now} bytes, and {len} are needed"
            ))),
        }
    }

    /// Empties the file. A device loses its first sector, so that nobody takes what it contains for an
    /// image of the format that it had.
    async fn empty(&self) -> Result<()> {
        match self.file.kind() {
            HostKind::Regular => self.file.set_len(0).await,
            HostKind::BlockDevice => {
                let zeros = AlignedBuf::zeroed(SECTOR_SIZE as usize, 4096);
                self.file.write(0, zeros.buffers(), false).await?;
                self.file.flush().await
            }
        }
    }

    /// Leaves nothing half-made behind, and adds to an error what became of a file that existed before.
    fn given_up(&self, err: Error) -> Error {
        if self.remove.is_some() {
            return err;
        }
        // The failure that brought us here is what the operator should see.
        let _ = block_on(self.empty());
        err.context(format!(
            "what {} contained is gone, and there is no new image in it",
            self.file.name()
        ))
    }

    /// Keeps the file.
    pub fn keep(mut self) {
        self.remove = None;
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(path) = &self.remove {
            // As above.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn prepare_raw(request: &CreateRequest) -> Result<Prepared> {
    if request.backing.is_some() {
        return Err(Error::invalid(
            "raw images cannot have a backing file; use a format that can (-f qcow2)",
        ));
    }
    let preallocation = request.options.iter().find(|(name, _)| name == "preallocation");
    let preallocation = preallocation.map_or("off".into(), |(_, value)| value.clone());
    if !matches!(&*preallocation, "off" | "falloc" | "full") {
        return Err(Error::invalid(format!(
            "unknown preallocation '{preallocation}' (known: off, falloc, full)"
        )));
    }
    let size = size_of(request, None)?;
    let new = NewFile::open(&request.path, &request.allow_dirs)?;
    Ok(Prepared::new(move || {
        new.fill(size, fill_raw(&new.file, size, &preallocation))?;
        new.keep();
        let mut options = vec![("size".to_string(), size.to_string())];
        if preallocation != "off" {
            options.push(("preallocation".into(), preallocation));
        }
        Ok(Created { size, options })
    }))
}

async fn fill_raw(file: &HostFile, size: u64, preallocation: &str) -> Result<()> {
    let made = async {
        if file.kind() == HostKind::Regular {
            file.set_len(size).await?;
        }
        match preallocation {
            "falloc" if size > 0 => {
                file.write_zeroes(ByteRange { offset: 0, len: size }, false).await
            }
            "full" => write_zeros(file, size).await,
            _ => Ok(()),
        }
    };
    made.await.context(|| format!("{}: making it {size} bytes large", file.name()))
}

fn prepare_qcow2(request: &CreateRequest) -> Result<Prepared> {
    let option = |name: &str| {
        request.options.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    };
    let mut options = qcow2::CreateOptions::new(0);
    if let Some(text) = option("cluster_size") {
        options.cluster_size = parse_size(text).context(|| "-o cluster_size")?;
    }
    if let Some(text) = option("refcount_bits") {
        options.refcount_bits =
            text.parse().map_err(|_| Error::invalid(format!("-o refcount_bits: '{text}'")))?;
    }
    options.check()?;
    for (name, allowed) in [("compat", &["1.1", "v3"][..]), ("preallocation", &["off"])] {
        if let Some(value) = option(name).filter(|value| !allowed.contains(value)) {
            return Err(Error::unsupported(format!(
                "-o {name}={value} is not supported for qcow2 (known: {})",
                allowed.join(", ")
            )));
        }
    }
    options.backing = backing_of(request)?;
    // Stays open (and locked) until the image is there.
    let backing = match &options.backing {
        Some(named) if !request.backing_unchecked => {
            let format = named.format.as_deref().map(str::parse).transpose()?;
            Some(open_backing(request, &named.file, format)?)
        }
        Some(named) => {
            check_not_own_backing(request, &named.file)?;
            None
        }
        None => None,
    };
    options.size = size_of(request, backing.as_ref())?;
    let new = NewFile::open(&request.path, &request.allow_dirs)?;
    let image = block_on(qcow2::NewImage::lay_out(Arc::clone(&new.file) as _, &options))?;
    Ok(Prepared::new(move || {
        new.fill(image.file_len(), image.write())?;
        new.keep();
        drop(backing);
        Ok(Created { size: options.size, options: shown_of_qcow2(options) })
    }))
}

/// The options in effect.
fn shown_of_qcow2(options: qcow2::CreateOptions) -> Vec<(String, String)> {
    let pair = |key: &str, value: String| (key.to_string(), value);
    let mut shown = vec![
        pair("cluster_size", options.cluster_size.to_string()),
        pair("size", options.size.to_string()),
    ];
    if let Some(named) = options.backing {
        shown.push(pair("backing_file", named.file));
        shown.extend(named.format.map(|format| pair("backing_fmt", format)));
    }
    shown.push(pair("refcount_bits", options.refcount_bits.to_string()));
    shown
}

/// What was given as an option of the command or with `-o`, but not as both.
fn only_one<'a>(
    what: &str,
    argument: Option<&'a str>,
    option: Option<&'a str>,
) -> Result<Option<&'a str>> {
    match (argument, option) {
        (Some(_), Some(_)) => Err(Error::invalid(format!("the {what} is given twice"))),
        (argument, option) => Ok(argument.or(option)),
    }
}

/// The backing file to name in the image. Its format is wanted: guessing it whenever the image is
/// opened is a hole.
fn backing_of(request: &CreateRequest) -> Result<Option<qcow2::Backing>> {
    let name = request.path.display();
    match named_backing(request)? {
        (None, None) => Ok(None),
        (None, Some(_)) => Err(Error::invalid(format!(
            "{name}: the format of a backing file, but no backing file"
        ))),
        (Some(file), None) => Err(Error::invalid(format!(
            "{name}: the backing file {file} is given without its format; say it with -F"
        ))),
        (Some(file), Some(format)) => {
            let format: ImageFormat = format.parse()?;
            let format = Some(format.name().to_string());
            Ok(Some(qcow2::Backing { file: file.to_string(), format }))
        }
    }
}

/// Opens the backing file that is to be named in a new image.
pub(super) fn open_backing(
    request: &CreateRequest,
    file: &str,
    format: Option<ImageFormat>,
) -> Result<Image> {
    let path = open_gate::combine(&request.path, file);
    check_not_own_backing(request, file)?;
    let open_request = OpenRequest::read(path).format(format).allow_dirs(&request.allow_dirs);
    open(&open_request).context(|| "the backing file")
}

/// Refuses the image's own file as its backing file, under whatever name: it would be emptied. One that is
/// not there, or cannot be opened, is another one.
pub(super) fn check_not_own_backing(request: &CreateRequest, backing: &str) -> Result<()> {
    let path = open_gate::combine(&request.path, backing);
    let file = |path: &Path| HostFile::open(path, OpenOptions::default()).ok();
    match (file(&request.path), file(&path)) {
        (Some(own), Some(backing)) if storage::shares(&own, &backing)? => Err(Error::invalid(
            format!("{}: an image cannot be its own backing file", request.path.display()),
        )),
        _ => Ok(()),
    }
}

/// Writes real zeros, so that the host has stored every block.
async fn write_zeros(file: &HostFile, size: u64) -> Result<()> {
    let zeros = AlignedBuf::zeroed(size.min(MIB) as usize, 4096);
    let mut offset = 0;
    while offset < size {
        let len = (size - offset).min(MIB);
        file.write(offset, zeros.buffers().slice(0, len), false).await?;
        offset += len;
    }
    file.flush().await
}
