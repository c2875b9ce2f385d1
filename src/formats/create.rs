//! Making new images.
//!
//! An existing file is overwritten, as `qemu-img create` does, but only after its locks say that
//! nobody uses it. Block devices keep their size: the image must fit.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result, ResultExt};
use crate::formats::open::lock_for_writing;
use crate::formats::{ImageFormat, OpenRequest, open};
use crate::io::{AlignedBuf, File, HostFile, HostKind, OpenOptions, block_on};
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
        // HOOK(qcow2): its options.
        _ => &[("size", "size of the disk")],
    }
}

/// Creates an image.
///
/// # Errors
/// Names the file or the option. A file that did not exist before does not exist after a failure.
pub fn create(request: &CreateRequest) -> Result<Created> {
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
        ImageFormat::Raw => create_raw(request),
        // HOOK(qcow2): becomes `qcow2::create(request)`, with `size_of(request)` for the size and
        // `NewFile` for the file.
        ImageFormat::Qcow2 => Err(Error::unsupported(format!(
            "{}: qcow2 support is not built in yet",
            request.path.display()
        ))),
        other => Err(Error::unsupported(format!(
            "{}: {other} images cannot be created",
            request.path.display()
        ))),
    }
}

/// The size of the new disk: as requested, or as the backing file's; a multiple of a sector.
pub fn size_of(request: &CreateRequest) -> Result<u64> {
    let size = match (request.size, &request.backing) {
        (Some(size), _) => size,
        (None, Some(reference)) => {
            let path = crate::block::open_gate::combine(&request.path, reference);
            let base = OpenRequest::read(path).format(request.backing_format);
            open(&base).context(|| "the backing file")?.node.size()
        }
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

/// A file that is being made into an image. If it did not exist before and is not
/// [kept](NewFile::keep), dropping this removes it.
#[derive(Debug)]
pub struct NewFile {
    /// The file: open for writing, locked and (if regular) empty.
    pub file: HostFile,
    /// Set if it is to be removed again.
    remove: Option<PathBuf>,
}

impl NewFile {
    /// Creates the file, or empties an existing one that nobody uses.
    pub fn create(path: &Path) -> Result<NewFile> {
        let write = OpenOptions { write: true, ..Default::default() };
        let existed = std::fs::symlink_metadata(path).is_ok();
        let file = HostFile::open(path, OpenOptions { create: !existed, ..write })?;
        let new = NewFile { file, remove: (!existed).then(|| path.to_path_buf()) };
        lock_for_writing(&new.file)?;
        if new.file.kind() == HostKind::Regular {
            block_on(new.file.set_len(0)).context(|| new.file.name().to_string())?;
        }
        Ok(new)
    }

    /// Keeps the file.
    pub fn keep(mut self) {
        self.remove = None;
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(path) = &self.remove {
            // The failure that brought us here is what the operator should see.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn create_raw(request: &CreateRequest) -> Result<Created> {
    if request.backing.is_some() {
        return Err(Error::invalid(
            "raw images cannot have a backing file; use a format that can (-f qcow2)",
        ));
    }
    let preallocation = request.options.iter().find(|(name, _)| name == "preallocation");
    let preallocation = preallocation.map_or("off", |(_, value)| value.as_str());
    if !matches!(preallocation, "off" | "falloc" | "full") {
        return Err(Error::invalid(format!(
            "unknown preallocation '{preallocation}' (known: off, falloc, full)"
        )));
    }
    let size = size_of(request)?;
    let new = NewFile::create(&request.path)?;
    let file = &new.file;
    block_on(async {
        match file.kind() {
            HostKind::Regular => file.set_len(size).await?,
            HostKind::BlockDevice if file.len()? < size => {
                return Err(Error::invalid(format!(
                    "the device has only {} bytes, and {size} are needed",
                    file.len()?
                )));
            }
            HostKind::BlockDevice => {}
        }
        match preallocation {
            "falloc" if size > 0 => {
                file.write_zeroes(ByteRange { offset: 0, len: size }, false).await
            }
            "full" => write_zeros(file, size).await,
            _ => Ok(()),
        }
    })
    .context(|| format!("{}: making it {size} bytes large", file.name()))?;
    new.keep();
    let mut options = vec![("size".to_string(), size.to_string())];
    if preallocation != "off" {
        options.push(("preallocation".into(), preallocation.into()));
    }
    Ok(Created { size, options })
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
