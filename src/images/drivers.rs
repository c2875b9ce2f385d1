//! The driver of each format, for an image whose file is open and locked.

use std::sync::Arc;

use crate::block::{Driver, FormatDriver, Node};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::filters::GuessGuard;
use crate::formats::qcow2;
use crate::formats::raw::Raw;
use crate::formats::vhdx;
use crate::images::ImageFormat;
use crate::images::open::{Image, Opening, guess};
use crate::images::parents;
use crate::images::probe;
use crate::images::request::{Access, OpenRequest};
use crate::io::{File, block_on};

pub(super) fn open_raw(opening: &Opening<'_>, guessed: bool) -> Result<Arc<dyn Driver>> {
    let read_only = opening.request.access == Access::Read;
    let file = &opening.file;
    let raw = Raw::open(Arc::clone(file) as Arc<dyn File>, read_only)
        .context(|| file.name().to_string())?;
    if read_only {
        return Ok(Arc::new(raw));
    }
    if !guessed {
        doubt_raw(opening);
        return Ok(Arc::new(raw));
    }
    tracing::warn!(
        "{}: no format was given, and it was taken for raw; writes that would make its first \
         sector look like another format will fail. Say -f raw to allow them",
        file.name()
    );
    let recognise = |head: &[u8]| probe::by_magic(head).map(|format| format.to_string());
    Ok(Arc::new(GuessGuard::new(Arc::new(raw), file.name(), recognise)))
}

/// Says so if an image that was said to be raw looks like another: who meant that one destroys it by
/// the first write. It may also be what a guest has made of its disk. (An encrypted disk is given to
/// guests as raw.)
fn doubt_raw(opening: &Opening<'_>) {
    match guess(&opening.file) {
        Err(_) | Ok(ImageFormat::Raw | ImageFormat::Luks) => {}
        Ok(format) => tracing::warn!(
            "{}: looks like {format}, and is taken byte for byte, because the format given is raw; \
             leave that out if it is not meant",
            opening.file.name()
        ),
    }
}

pub(super) fn open_qcow2(opening: &mut Opening<'_>) -> Result<Arc<dyn Driver>> {
    let request = opening.request;
    let file = Arc::clone(&opening.file) as Arc<dyn File>;
    if !request.backing {
        return Ok(Arc::new(block_on(qcow2::Metadata::open(file))?));
    }
    let name = opening.file.name().to_string();
    let read_only = request.access == Access::Read;
    let header = block_on(qcow2::Header::read(&file))?;
    // Before any other file is touched on its behalf.
    header.check_supported(read_only).context(|| name.clone())?;
    let named = header.backing.as_ref().map(|b| (b.file.as_str(), b.format.as_deref()));
    let options = qcow2::OpenOptions {
        read_only,
        overrides_backing: opening.overridden.is_some(),
        backing: opening.backing(named)?,
        keep: if read_only { None } else { opening.keep("qcow2")? },
    };
    let image = block_on(qcow2::Qcow2::open(file, options))?;
    Ok(Arc::new(FormatDriver::new(image).context(|| name)?))
}

pub(super) fn open_vhdx(opening: &mut Opening<'_>) -> Result<Arc<dyn Driver>> {
    let request = opening.request;
    let file = Arc::clone(&opening.file) as Arc<dyn File>;
    let structure = match request.salvage {
        true => salvage_vhdx(request, &file)?,
        false => block_on(vhdx::Structure::read(&file)).map_err(with_way_out)?,
    };
    let mut backing = None;
    // An overlay that is opened on nothing is put on its parent before a guest uses it.
    let is_without = matches!(opening.overridden, Some(None));
    if request.backing {
        let locator = structure.metadata.parent.as_ref();
        let paths = locator.map(|locator| parents::of_locator(opening.file.path(), locator));
        backing = open_vhdx_parent(opening, &paths.unwrap_or_default())?;
        if !is_without {
            // Of several that it may stand on, which was found?
            let parent =
                opening.below().map(|image| format!(": its backing file: {}", image.name()));
            structure
                .check_parent(backing.as_ref())
                .context(|| format!("{}{}", file.name(), parent.unwrap_or_default()))?;
        }
    }
    let read_only = request.access == Access::Read;
    let options = vhdx::OpenOptions {
        read_only,
        backing,
        keep: if read_only { None } else { opening.keep("vhdx")? },
        cache: request.metadata_cache.unwrap_or(vhdx::DEFAULT_CACHE),
        lenient: !request.backing || request.salvage,
        alone: request.backing && is_without,
    };
    let image = block_on(vhdx::Vhdx::open(structure, options));
    let image = if request.salvage { image? } else { image.map_err(with_way_out)? };
    Ok(Arc::new(FormatDriver::new(image).context(|| file.name().to_string())?))
}

/// The error of a damaged VHDX image, with the command that tells more.
fn with_way_out(err: Error) -> Error {
    match err.kind() {
        ErrorKind::Corrupt => {
            Error::new(err.kind(), format!("{err}; `vublk check --explain` says what can be done"))
        }
        _ => err,
    }
}

/// Reads the structures of a damaged image, and says what is missing.
fn salvage_vhdx(request: &OpenRequest, file: &Arc<dyn File>) -> Result<vhdx::Structure> {
    if request.access == Access::Write {
        return Err(Error::invalid(format!(
            "{}: a damaged image can be salvaged by reading it only",
            file.name()
        )));
    }
    let structure = block_on(vhdx::salvage::read(file))?;
    let Some(report) = structure.salvaged.as_ref().filter(|report| !report.is_empty()) else {
        return Ok(structure);
    };
    for note in &report.notes {
        tracing::warn!("{}: {note}", file.name());
    }
    if report.missing.bytes > 0 {
        tracing::warn!(
            "{}: {} bytes of the disk are missing and read as zeros: {}",
            file.name(),
            report.missing.bytes,
            list_of(&report.missing)
        );
    }
    if report.doubtful.bytes > 0 {
        tracing::warn!(
            "{}: {} bytes of the disk may be another block's, because blocks share a place in the \
             file; compare them with a backup: {}",
            file.name(),
            report.doubtful.bytes,
            list_of(&report.doubtful)
        );
    }
    Ok(structure)
}

/// Says so if nothing of a chain that was to be salvaged is damaged. Top first.
pub(super) fn warn_if_whole<'a>(
    request: &OpenRequest,
    mut chain: impl Iterator<Item = &'a Image> + Clone,
) {
    if request.salvage
        && let Some(top) = chain.clone().next()
        && !chain.any(is_damaged)
    {
        tracing::warn!("{}: is not damaged; there is nothing to salvage", top.name());
    }
}

/// Whether salvaging found anything.
fn is_damaged(image: &Image) -> bool {
    let details = image.node.skip_filters().1.driver().details();
    let found = &details["salvage"];
    let is_some = |name: &str| found[name].as_u64().is_some_and(|bytes| bytes > 0);
    is_some("missing-bytes")
        || is_some("doubtful-bytes")
        || found["notes"].as_array().is_some_and(|notes| !notes.is_empty())
}

/// The first parts of the disk of a list.
fn list_of(parts: &vhdx::salvage::Parts) -> String {
    const SHOWN: usize = 8;
    let mut list: Vec<_> = parts.listed.iter().take(SHOWN).map(|range| range.to_string()).collect();
    if parts.listed.len() > SHOWN {
        list.push("… (vublk info --salvage lists more)".into());
    }
    list.join(", ")
}

/// Opens the parent that the operator says, or else the first that is there of those that the image
/// names.
fn open_vhdx_parent(opening: &mut Opening<'_>, paths: &[String]) -> Result<Option<Node>> {
    if opening.overridden.is_some() {
        return opening.backing(None);
    }
    let mut missing = None;
    for path in paths {
        // A file that is not there further down is told, not taken for this one.
        let is_missing = opening.resolve(path).is_err_and(|err| err.kind() == ErrorKind::NotFound);
        match opening.backing(Some((path, Some("vhdx")))) {
            Err(err) if is_missing && err.kind() == ErrorKind::NotFound => {
                missing = missing.or(Some(err));
            }
            found => return found,
        }
    }
    missing.map_or(Ok(None), Err)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images::{self, CacheMode, CreateRequest, ImageFormat};
    use std::path::Path;

    /// A chain `c2.vhdx` on `c1.vhdx` on `p.vhdx`, 3 MiB each.
    fn chain(dir: &Path) {
        for (name, backing) in
            [("p.vhdx", None), ("c1.vhdx", Some("p.vhdx")), ("c2.vhdx", Some("c1.vhdx"))]
        {
            images::create(&CreateRequest {
                size: Some(3 << 20),
                options: vec![("block_size".into(), "1M".into())],
                backing: backing.map(String::from),
                backing_format: backing.map(|_| ImageFormat::Vhdx),
                ..CreateRequest::new(dir.join(name), ImageFormat::Vhdx)
            })
            .unwrap();
        }
    }

    /// Neither where the header names it nor where an overlay is put on it.
    #[test]
    fn a_backing_whose_end_direct_io_does_not_reach_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("odd"), vec![1; 1000]).unwrap();
        let direct = |name: &str| OpenRequest::read(path(name)).cache(CacheMode::None);
        let odd = match images::open(&direct("odd").format(Some(ImageFormat::Raw))) {
            Ok(odd) if odd.node.limits().request_alignment > 1 => odd.node,
            _ => return println!("SKIP: no O_DIRECT in {}", dir.path().display()),
        };
        for format in [ImageFormat::Qcow2, ImageFormat::AddCow] {
            for (name, backing) in [("over", Some("odd")), ("alone", None)] {
                let name = format!("{name}.{format}");
                let request = CreateRequest {
                    size: Some(1 << 20),
                    backing: backing.map(String::from),
                    backing_format: backing.map(|_| ImageFormat::Raw),
                    ..CreateRequest::new(path(&name), format)
                };
                images::create(&request).unwrap();
            }
            let refusal = "1000 bytes does not end with a sector of";
            let over = format!("over.{format}");
            let err = images::open(&direct(&over)).unwrap_err().to_string();
            assert!(err.contains(&over) && err.contains(refusal), "{err}");
            images::open(&direct(&over).cache(CacheMode::Writeback)).unwrap();
            let alone = images::open(&direct(&format!("alone.{format}"))).unwrap().node;
            let quiesced = crate::block::Gate::new().quiesce();
            let err = alone.set_backing(Some(odd.clone()), &quiesced).unwrap_err().to_string();
            assert!(err.contains(refusal), "{err}");
            assert!(alone.backing().is_none());
        }
    }

    #[test]
    fn the_file_that_is_missing_is_named() {
        let dir = tempfile::tempdir().unwrap();
        chain(dir.path());
        let top = OpenRequest::read(dir.path().join("c2.vhdx"));
        images::open(&top).unwrap();
        std::fs::remove_file(dir.path().join("p.vhdx")).unwrap();
        let err = images::open(&top).unwrap_err().to_string();
        assert!(err.contains("c1.vhdx: its backing file: ") && err.contains("p.vhdx: No such"));
    }

    #[test]
    fn a_parent_is_found_whatever_the_case_of_its_name() {
        let dir = tempfile::tempdir().unwrap();
        chain(dir.path());
        std::fs::rename(dir.path().join("c1.vhdx"), dir.path().join("C1.VHDX")).unwrap();
        std::fs::rename(dir.path().join("p.vhdx"), dir.path().join("P.vhdx")).unwrap();
        let top = OpenRequest::read(dir.path().join("c2.vhdx"));
        let image = images::open(&top).unwrap();
        let parent = image.backing.as_ref().unwrap();
        assert!(parent.name().ends_with("C1.VHDX"), "{}", parent.name());
        let (all, stopped) = images::open_chain(&top).unwrap();
        assert!(all.len() == 3 && stopped.is_none(), "{stopped:?}");
        assert!(images::names_as_backing(&image, &parent.file).unwrap());
    }

    #[test]
    fn a_check_tells_of_a_parent_that_is_gone_or_changed() {
        let dir = tempfile::tempdir().unwrap();
        chain(dir.path());
        let child = OpenRequest::read(dir.path().join("c1.vhdx"));
        let check = || {
            let report = images::check_path(&child, None).unwrap().report.unwrap();
            assert_eq!(report.corruptions, 0);
            report.findings
        };
        assert_eq!(check(), []);
        // Another one under the same name.
        std::fs::remove_file(dir.path().join("p.vhdx")).unwrap();
        let other = tempfile::tempdir().unwrap();
        chain(other.path());
        std::fs::copy(other.path().join("p.vhdx"), dir.path().join("p.vhdx")).unwrap();
        let findings = check();
        assert!(findings[0].what.contains("modified since this child"), "{findings:?}");
        assert!(findings[0].explanation.is_some());
        std::fs::remove_file(dir.path().join("p.vhdx")).unwrap();
        let findings = check();
        assert!(findings[0].what.contains("p.vhdx: No such file"), "{findings:?}");
    }

    #[test]
    fn damage_is_found_anywhere_in_a_chain() {
        let dir = tempfile::tempdir().unwrap();
        chain(dir.path());
        let top = OpenRequest { salvage: true, ..OpenRequest::read(dir.path().join("c2.vhdx")) };
        let damaged = || {
            let image = images::open(&top).unwrap();
            let chain = std::iter::successors(Some(&image), |image| image.backing.as_deref());
            chain.map(is_damaged).collect::<Vec<_>>()
        };
        assert_eq!(damaged(), [false; 3]);
        let parent = std::fs::OpenOptions::new().write(true).open(dir.path().join("p.vhdx"));
        parent.unwrap().set_len(3 << 20).unwrap();
        assert_eq!(damaged(), [false, false, true]);
    }
}
