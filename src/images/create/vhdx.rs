//! New VHDX images: options by name, and what a differencing image takes from its parent.

use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use super::{
    CreateRequest, Created, NewFile, OptionHelp, Prepared, check_not_own_backing, check_size,
    named_backing, open_backing,
};
use crate::block::open_gate;
use crate::error::{Error, Result, ResultExt};
use crate::formats::vhdx::create::{CreateOptions, Parent, default_block_size};
use crate::formats::vhdx::{self, Structure};
use crate::images::{Image, ImageFormat};
use crate::io::{File, HostFile, HostKind, OpenOptions, block_on};
use crate::units::parse_size;

/// The options that `create` knows.
pub(super) const OPTIONS: &[OptionHelp] = &[
    ("size", "size of the disk"),
    ("subformat", "dynamic (default) or fixed; with a backing file always differencing"),
    ("block_size", "unit of allocation, 1M to 256M, a power of two; default 32M, else 2M"),
    ("log_size", "size of the log, a multiple of 1M; default 1M"),
    ("block_state_zero", "on: call absent blocks zeros; off (default): call them never written"),
    ("logical_sector_size", "512 (default) or 4096; of the backing file if there is one"),
    ("physical_sector_size", "512 or 4096 (default); of the backing file if there is one"),
    ("backing_file", "the VHDX image below, as -b"),
    ("backing_fmt", "its format, as -F: vhdx"),
];

/// The options of a request by name.
struct Given<'a>(&'a [(String, String)]);

impl<'a> Given<'a> {
    fn text(&self, name: &str) -> Option<&'a str> {
        self.0.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// A size; QEMU's 0 stands for "as usual".
    fn size(&self, name: &str) -> Result<Option<u64>> {
        let Some(text) = self.text(name) else { return Ok(None) };
        let size = parse_size(text).context(|| format!("-o {name}"))?;
        Ok(Some(size).filter(|size| *size > 0))
    }

    fn switch(&self, name: &str) -> Result<bool> {
        match self.text(name) {
            None | Some("off" | "no" | "false") => Ok(false),
            Some("on" | "yes" | "true") => Ok(true),
            Some(other) => Err(Error::invalid(format!("-o {name}={other}: on or off?"))),
        }
    }
}

/// What the options say of an image of `size` bytes that stands on `parent`. The size is rounded
/// up to whole sectors.
///
/// # Errors
/// Names the option.
pub fn options_of(
    size: u64,
    options: &[(String, String)],
    parent: Option<Parent>,
    parent_structure: Option<&Structure>,
) -> Result<CreateOptions> {
    let given = Given(options);
    let is_fixed = match (given.text("subformat"), &parent) {
        (None | Some("dynamic"), _) => false,
        (Some("fixed"), _) => true,
        (Some("differencing"), Some(_)) => false,
        (Some("differencing"), None) => {
            return Err(Error::invalid("a differencing image needs a backing file (-b)"));
        }
        (Some(other), _) => {
            return Err(Error::invalid(format!(
                "-o subformat={other} is not known (known: dynamic, fixed)"
            )));
        }
    };
    let below = parent_structure.map(|structure| &structure.metadata);
    let sector = |name, usual| -> Result<u64> { Ok(given.size(name)?.unwrap_or(usual)) };
    let logical_sector =
        sector("logical_sector_size", below.map_or(512, |below| below.logical_sector))?;
    let physical_sector =
        sector("physical_sector_size", below.map_or(4096, |below| below.physical_sector))?;
    if let Some(below) = below.filter(|below| below.logical_sector != logical_sector) {
        return Err(Error::invalid(format!(
            "the backing file has logical sectors of {} bytes, and an image on it must have the \
             same",
            below.logical_sector
        )));
    }
    let usual = default_block_size(is_fixed, parent.is_some());
    let options = CreateOptions {
        block_size: given.size("block_size")?.unwrap_or(usual),
        log_size: given.size("log_size")?.unwrap_or(vhdx::create::DEFAULT_LOG_SIZE),
        is_fixed,
        block_state_zero: given.switch("block_state_zero")?,
        logical_sector,
        physical_sector,
        parent,
        ..CreateOptions::new(size.next_multiple_of(if logical_sector == 4096 { 4096 } else { 512 }))
    };
    options.check()?;
    Ok(options)
}

pub(super) fn prepare(request: &CreateRequest) -> Result<Prepared> {
    let name = || request.path.display().to_string();
    // Stays open (and locked) until the image is there.
    let below = parent_of(request).context(name)?;
    let size = match (request.size, &below) {
        (Some(size), _) => size,
        (None, Some(below)) => below.structure.geometry.disk_size,
        (None, None) => {
            return Err(Error::invalid(format!("{}: a new image needs a size", name())));
        }
    };
    check_size(size).context(name)?;
    if let Some(below) = below.as_ref().filter(|below| below.structure.geometry.disk_size != size) {
        tracing::warn!(
            "{}: has {size} bytes, but its backing file {}; Windows wants them to be the same",
            name(),
            below.structure.geometry.disk_size
        );
    }
    let (parent, structure) = match &below {
        Some(below) => (Some(below.parent.clone()), Some(&below.structure)),
        None => (None, None),
    };
    let options = options_of(size, &request.options, parent, structure).context(name)?;
    let len = vhdx::create::measure(&options).context(name)?.empty;
    let new = NewFile::open(&request.path, &request.allow_dirs)?;
    if new.file.kind() != HostKind::Regular {
        return Err(Error::unsupported(format!(
            "{}: a VHDX image grows, which a block device cannot; put it into a file, or use -f raw",
            name()
        )));
    }
    Ok(Prepared::new(move || {
        let file = Arc::clone(&new.file) as Arc<dyn File>;
        new.fill(len, vhdx::create::create(&file, &options))?;
        new.keep();
        Ok(Created { size: options.size, options: shown(&options, below.as_ref()) })
    }))
}

/// The options in effect.
fn shown(options: &CreateOptions, below: Option<&Below>) -> Vec<(String, String)> {
    let pair = |key: &str, value: String| (key.to_string(), value);
    let kind = match (below, options.is_fixed) {
        (Some(_), _) => "differencing",
        (None, true) => "fixed",
        (None, false) => "dynamic",
    };
    let mut shown = vec![
        pair("size", options.size.to_string()),
        pair("subformat", kind.into()),
        pair("block_size", options.block_size.to_string()),
        pair("log_size", options.log_size.to_string()),
        pair("logical_sector_size", options.logical_sector.to_string()),
        pair("physical_sector_size", options.physical_sector.to_string()),
    ];
    if options.block_state_zero {
        shown.push(pair("block_state_zero", "on".into()));
    }
    if let Some(below) = below {
        shown.push(pair("backing_file", below.reference.clone()));
        shown.push(pair("backing_fmt", "vhdx".into()));
    }
    shown
}

/// The image that a new one is to stand on.
struct Below {
    /// As the operator named it.
    reference: String,
    /// Locked until the new image is there, unless somebody uses it and that is known.
    _image: Option<Image>,
    structure: Structure,
    parent: Parent,
}

fn parent_of(request: &CreateRequest) -> Result<Option<Below>> {
    let (reference, format) = match named_backing(request)? {
        (None, None) => return Ok(None),
        (None, Some(_)) => {
            return Err(Error::invalid("the format of a backing file, but no backing file"));
        }
        (Some(file), None) => {
            return Err(Error::invalid(format!(
                "the backing file {file} is given without its format; say it with -F vhdx"
            )));
        }
        (Some(file), Some(format)) => (file, format.parse::<ImageFormat>()?),
    };
    if format != ImageFormat::Vhdx {
        return Err(Error::unsupported(format!(
            "a VHDX image can stand on VHDX images only, not on {format}; convert {reference}, or \
             create the overlay with -f qcow2"
        )));
    }
    let (structure, file, image) = match request.backing_unchecked {
        true => {
            check_not_own_backing(request, reference)?;
            let path = open_gate::combine(&request.path, reference);
            let file = Arc::new(HostFile::open(&path, OpenOptions::default()).context(|| {
                "a VHDX image names its backing file by an identity that is in that file, so it \
                 must be there, also with -u"
            })?);
            let structure = block_on(Structure::read_in_use(&(Arc::clone(&file) as _)))?;
            (structure, file, None)
        }
        false => {
            let image = open_backing(request, reference, Some(format))?;
            let file = Arc::clone(&image.file);
            (block_on(Structure::read(&(Arc::clone(&file) as _)))?, file, Some(image))
        }
    };
    let (relative, absolute) = parent_paths(&request.path, reference, file.path())?;
    let parent = block_on(Parent::of(&structure, &relative, &absolute))?;
    Ok(Some(Below { reference: reference.to_string(), _image: image, structure, parent }))
}

/// The parent's path from the child's directory, and from the root.
fn parent_paths(child: &Path, reference: &str, parent: &Path) -> Result<(String, String)> {
    let absolute = parent.canonicalize().context(|| parent.display().to_string())?;
    let relative = match Path::new(reference).is_absolute() {
        false => PathBuf::from(reference),
        true => {
            let dir = crate::block::open_gate::directory_of(child);
            let dir = dir.canonicalize().context(|| dir.display().to_string())?;
            from_to(&dir, &absolute)
        }
    };
    let text = |path: &Path| match path.to_str() {
        Some(text) if !text.contains('\\') => Ok(text.to_string()),
        _ => Err(Error::invalid(format!(
            "the backing file's path {} cannot be told in a VHDX image: it has a backslash, or is \
             not UTF-8",
            path.display()
        ))),
    };
    Ok((text(&relative)?, text(&absolute)?))
}

/// The path of `target` as seen from the directory `from`; both are absolute and resolved.
fn from_to(from: &Path, target: &Path) -> PathBuf {
    let (from, target): (Vec<_>, Vec<_>) =
        (from.components().collect(), target.components().collect());
    let same = from.iter().zip(&target).take_while(|(a, b)| a == b).count();
    let up = from[same..].iter().map(|_| Component::ParentDir);
    up.chain(target[same..].iter().copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_from_a_directory_to_a_file() {
        let path = |from, to| from_to(Path::new(from), Path::new(to));
        assert_eq!(path("/a/b", "/a/b/c.vhdx"), Path::new("c.vhdx"));
        assert_eq!(path("/a/b", "/a/c/d.vhdx"), Path::new("../c/d.vhdx"));
        assert_eq!(path("/a", "/b.vhdx"), Path::new("../b.vhdx"));
    }

    #[test]
    fn options_are_checked_by_name() {
        let of = |options: &[(&str, &str)]| {
            let own = |(key, value): &(&str, &str)| (key.to_string(), value.to_string());
            options_of(1000, &options.iter().map(own).collect::<Vec<_>>(), None, None)
        };
        let usual = of(&[("block_size", "0"), ("log_size", "0")]).unwrap();
        assert_eq!((usual.size, usual.block_size, usual.log_size), (1024, 32 << 20, 1 << 20));
        let fixed = of(&[("subformat", "fixed"), ("logical_sector_size", "4096")]).unwrap();
        assert_eq!((fixed.size, fixed.block_size, fixed.is_fixed), (4096, 2 << 20, true));
        let refused = |name, value, words: &str| {
            let err = of(&[(name, value)]).unwrap_err().to_string();
            assert!(err.contains(words), "{err}");
        };
        refused("subformat", "thin", "known: dynamic, fixed");
        refused("subformat", "differencing", "needs a backing file");
        refused("block_state_zero", "maybe", "on or off?");
        refused("block_size", "many", "-o block_size");
        refused("block_size", "3M", "a power of two");
        refused("logical_sector_size", "513", "neither 512 nor 4096");
    }
}
