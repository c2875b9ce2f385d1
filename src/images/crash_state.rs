//! Crash states as images: a log, the disk as it was when logging began, and the name of a state.
//!
//! ```text
//! operator   --log w.log --state E9:s=01 base.img
//!            json:{"driver":"crash-state","log":"w.log","base":"base.img","state":"E9:s=01"}
//! add-cow    the same text, as the name of its backing file
//! ```
//!
//! A state is read-only. For a guest, an add-cow overlay is put on it: one that stays, in a file that
//! the operator names, or one whose files have no names any more once they are open, so that nothing
//! is left however the process ends.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::block::{Node, NodeOptions, graph};
use crate::crash::scratch::Scratch;
use crate::crash::{CrashState, History, StateName};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::formats::addcow;
use crate::images::lock::lock;
use crate::images::open::{open, open_host, open_over};
use crate::images::{Access, CreateRequest, Image, ImageFormat, OpenRequest, StateDir, create};
use crate::io::{File, HostFile, OpenOptions, block_on};
use crate::write_log::Log;

/// What the files of an overlay without a name of the operator's are called until they are open.
const OVERLAY: &str = "overlay";
const OVERLAY_DATA: &str = "overlay.raw";
/// What a name that stands for a state begins with.
const PREFIX: &str = "json:";

/// Which state of which log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateOf {
    /// The log: a file or a block device.
    pub log: PathBuf,
    /// The state.
    pub state: StateName,
}

/// A state with its base, as a text in the place of a file name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Named {
    driver: String,
    /// The log.
    pub log: String,
    /// The disk as it was when logging began.
    pub base: String,
    /// Its format; guessed if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_format: Option<String>,
    /// The name of the state.
    pub state: String,
}

/// Whether a file name stands for a state (or for something of the kind that is none).
pub fn is_name(name: &str) -> bool {
    name.starts_with(PREFIX)
}

impl Named {
    /// Reads it.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn parse(text: &str) -> Result<Named> {
        let bad = |what: String| {
            Error::invalid(format!(
                "{text}: {what}; json:{{\"driver\":\"{0}\",\"log\":…,\"base\":…,\"state\":…}} is what \
                 is understood",
                crate::crash::state::NAME
            ))
        };
        let json = text.strip_prefix(PREFIX).unwrap_or(text);
        // Before its options, which are another driver's.
        let value = serde_json::from_str::<serde_json::Value>(json).unwrap_or_default();
        if let Some(driver) = value["driver"].as_str().filter(|d| *d != crate::crash::state::NAME) {
            return Err(bad(format!("the driver '{driver}' is not known here")));
        }
        serde_json::from_str(json).map_err(|err| bad(err.to_string()))
    }

    /// What to open for it: `log` and `base` are the paths of its files, or where they were found.
    pub(super) fn request(
        &self,
        log: PathBuf,
        base: PathBuf,
        like: &OpenRequest,
    ) -> Result<OpenRequest> {
        let format = self.base_format.as_deref().map(str::parse).transpose()?;
        let state = Some(StateOf { log, state: self.state.parse()? });
        Ok(OpenRequest { path: base, format, state, ..like.clone() })
    }
}

impl std::fmt::Display for Named {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let json = serde_json::to_string(self).map_err(|_| std::fmt::Error)?;
        write!(f, "{PREFIX}{json}")
    }
}

/// What is below an image that is opened for [`crash_state`](self).
pub(super) fn request_for_base(request: &OpenRequest) -> Result<OpenRequest> {
    if request.access == Access::Write {
        return Err(Error::new(
            ErrorKind::ReadOnly,
            format!("{}: a crash state cannot be written to", request.path.display()),
        ));
    }
    let node_name = graph::auto_name();
    Ok(OpenRequest { state: None, node_name, ..request.clone() })
}

/// Opens a log's file; always through the page cache, for its sectors may be smaller than what the host
/// reads directly.
pub(super) fn open_log(path: &Path, request: &OpenRequest) -> Result<Arc<HostFile>> {
    let file = open_host(path, OpenOptions::default())?;
    let by_path = OpenRequest { path: path.into(), ..request.clone() };
    lock(&file, &by_path, ImageFormat::Raw)?;
    Ok(Arc::new(file))
}

/// The image of a state, of a log and a base that are open.
///
/// # Errors
/// If the log is damaged, does not belong to the base, or has no such state; or if it is open for direct
/// I/O on a host that reads no pieces as small as its sectors.
pub fn image(
    node_name: &str,
    log: &Arc<HostFile>,
    base: &Image,
    keep_base: bool,
    state: &StateName,
) -> Result<Image> {
    let (file, unit) = (Arc::clone(log) as Arc<dyn File>, log.alignment().request);
    let log_of_it = block_on(Log::open(file))?;
    if !log_of_it.sector_size().is_multiple_of(unit) {
        return Err(Error::unsupported(format!(
            "{}: its sectors of {} bytes are smaller than the host's units of {unit} for direct I/O; \
             open it with cache.direct=off",
            log.name(),
            log_of_it.sector_size()
        )));
    }
    let history = Arc::new(History::read(log_of_it, base.node.size())?);
    let driver = Arc::new(CrashState::new(history, base.node.clone(), state)?);
    let options = NodeOptions { name: node_name.into(), read_only: true, ..NodeOptions::default() };
    Ok(Image {
        node: Node::new(driver, options),
        file: Arc::clone(log),
        format: ImageFormat::CrashState,
        guessed: false,
        cache: base.cache,
        access: Access::Read,
        locking: base.locking,
        image_file: None,
        backing: keep_base.then(|| Box::new(base.clone())),
    })
}

/// Opens a state for a guest that writes, in blocks of `block_size` bytes, with an overlay on it. Without
/// a path for it, that has no name on the host and is gone with the process.
///
/// # Errors
/// As [`open`], or if the overlay at `path` is that of another state.
pub fn open_writable(request: &OpenRequest, block_size: u64, path: Option<&Path>) -> Result<Image> {
    let below = OpenRequest {
        access: Access::Read,
        node_name: graph::auto_name(),
        state_dir: StateDir::None,
        ..request.clone()
    };
    let state = open(&below)?;
    state.check_for_guest(block_size)?;
    overlay(state, request, path)
}

fn overlay(state: Image, of: &OpenRequest, path: Option<&Path>) -> Result<Image> {
    let Some(which) = &of.state else { return Ok(state) };
    let base = state.backing.as_ref().map_or(&state, |base| base);
    let named = Named {
        driver: crate::crash::state::NAME.into(),
        log: absolute(&which.log)?,
        base: absolute(&of.path)?,
        base_format: Some(base.format.to_string()),
        state: which.state.to_string(),
    };
    match path {
        Some(path) => {
            match HostFile::open(path, OpenOptions::default()) {
                Ok(file) => check_overlay(file, &named)?,
                Err(err) if err.kind() == ErrorKind::NotFound => {
                    make_overlay(path, &named, state.node.size())?;
                }
                Err(err) => return Err(err),
            }
            open_over(&overlay_request(path, of), state)
        }
        None => {
            let dir = TemporaryDir::make()?;
            let path = dir.0.path().join(OVERLAY);
            make_overlay(&path, &named, state.node.size())?;
            open_over(&overlay_request(&path, of), state)
        }
    }
}

fn overlay_request(path: &Path, of: &OpenRequest) -> OpenRequest {
    OpenRequest {
        path: path.into(),
        format: Some(ImageFormat::AddCow),
        access: Access::Write,
        state: None,
        ..of.clone()
    }
}

fn make_overlay(path: &Path, named: &Named, size: u64) -> Result<()> {
    let request = CreateRequest {
        path: path.into(),
        format: ImageFormat::AddCow,
        size: Some(size),
        options: Vec::new(),
        backing: Some(named.to_string()),
        backing_format: None,
        backing_unchecked: true,
        allow_dirs: Vec::new(),
    };
    create(&request).map(drop)
}

/// Refuses an overlay of something else.
fn check_overlay(file: HostFile, named: &Named) -> Result<()> {
    let name = file.name().to_string();
    let file = Arc::new(file) as Arc<dyn File>;
    let header = block_on(addcow::read_header(&file))?;
    let is_same = |text: &String| Named::parse(text).is_ok_and(|other| other == *named);
    if header.backing.as_ref().is_some_and(is_same) {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "{name}: is not an overlay of this state, but of {}; give another file, or remove it",
        header.backing.as_deref().unwrap_or("nothing")
    )))
}

fn absolute(path: &Path) -> Result<String> {
    let path = std::fs::canonicalize(path).context(|| path.display().to_string())?;
    let text = path.to_str().map(String::from);
    text.ok_or_else(|| Error::invalid(format!("{}: is not UTF-8", path.display())))
}

/// A directory for an overlay. It is removed, with the overlay's files, when this is dropped. What is open
/// stays open. What a killed process has left, the next one removes.
struct TemporaryDir(Scratch);

impl TemporaryDir {
    fn make() -> Result<TemporaryDir> {
        Scratch::new("vublk-state-", |_, dir| remove_overlay(dir)).map(TemporaryDir)
    }
}

impl Drop for TemporaryDir {
    fn drop(&mut self) {
        remove_overlay(self.0.dir());
    }
}

fn remove_overlay(dir: &OwnedFd) {
    for name in [OVERLAY, OVERLAY_DATA] {
        let _ = rustix::fs::unlinkat(dir, name, rustix::fs::AtFlags::empty());
    }
}

/// Opens the state that a request of the operator's is for.
pub(super) fn open_request(request: &OpenRequest, of: &StateOf) -> Result<Image> {
    let base = open(&request_for_base(request)?)?;
    let log = open_log(&of.log, request)?;
    if log.identity()? == base.file.identity()? {
        return Err(Error::invalid(format!("{}: is both log and base", log.name())));
    }
    image(&request.node_name, &log, &base, true, &of.state)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways_and_nothing_else_is_taken() {
        let text = r#"json:{"driver":"crash-state","log":"/a,b","base":"c","state":"E9:s=01"}"#;
        assert_eq!(Named::parse(text).unwrap().to_string(), text);
        for (text, words) in [
            ("json:{", "EOF"),
            (r#"json:{"driver":"raw","log":"a","base":"b","state":"E0"}"#, "driver 'raw'"),
            (r#"json:{"driver":"crash-state","log":"a","base":"b"}"#, "missing field `state`"),
            (r#"json:{"driver":"crash-state","log":"a","base":"b","state":"","x":1}"#, "`x`"),
        ] {
            let err = Named::parse(text).unwrap_err().to_string();
            assert!(err.contains(words), "{err}");
        }
    }
}
