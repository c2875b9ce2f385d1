//! The open gate: which files an image may pull in.
//!
//! An image is untrusted: its backing and data file names may be anybody's text. A name found in
//! an image is opened only if the file it leads to lies below
//!
//! * the directory of the image that the operator named, unless that is a device, which has all others of
//!   the host beside it, or
//! * a directory given with `--allow-dir`.
//!
//! Symbolic links and `..` are resolved before the comparison, and the caller compares once more
//! after opening ([`OpenGate::confirm`]), so a link that is swapped in between is noticed. Names
//! that the operator typed do not pass here. The number of files in a chain is bounded, and a file
//! may be in it once ([`Chain`]).

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Component, Path, PathBuf};

use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::io::HostFile;

/// The most files that a chain of images may have. More than anybody means, and few enough that a
/// hostile chain ends soon: 255 layers of two files each.
pub const MAX_DEPTH: usize = 512;

/// Decides which files may be pulled in by images.
#[derive(Clone, Debug, Default)]
pub struct OpenGate {
    /// Directories below which files may be opened, resolved.
    allowed: Vec<PathBuf>,
}

impl OpenGate {
    /// A gate for the image at `image` (as the operator named it) that also lets in what lies
    /// below `allow_dirs`.
    ///
    /// # Errors
    /// If one of `allow_dirs` is not a directory.
    pub fn new(image: &Path, allow_dirs: &[PathBuf]) -> Result<OpenGate> {
        let mut allowed = Vec::with_capacity(allow_dirs.len() + 1);
        let is_device = std::fs::metadata(image).is_ok_and(|it| it.file_type().is_block_device());
        if !is_device {
            // A directory that cannot be resolved allows nothing; opening the image itself will say
            // what is wrong with it.
            allowed.extend(directory_of(image).canonicalize().ok());
        }
        for dir in allow_dirs {
            let resolved =
                dir.canonicalize().context(|| format!("--allow-dir {}", dir.display()))?;
            if !resolved.is_dir() {
                return Err(Error::invalid(format!(
                    "--allow-dir {}: is not a directory",
                    dir.display()
                )));
            }
            allowed.push(resolved);
        }
        Ok(OpenGate { allowed })
    }

    /// The path that `reference`, found in the image at `from`, stands for: relative names are
    /// relative to the image's directory. The path is as written, for messages; it has been checked
    /// to lead to a file that may be opened.
    ///
    /// # Errors
    /// Kind [`PermissionDenied`](ErrorKind::PermissionDenied) if the gate is shut for it, with
    /// the option that opens it; names with control characters or a protocol prefix are refused.
    pub fn resolve(&self, from: &Path, reference: &str) -> Result<PathBuf> {
        check_name(reference)?;
        let path = combine(from, reference);
        let resolved = path.canonicalize().context(|| path.display().to_string())?;
        self.check(&path, &resolved)?;
        Ok(path)
    }

    /// Checks that an open file is still the one that [`OpenGate::resolve`] allowed.
    pub fn confirm(&self, file: &HostFile) -> Result<()> {
        // Without /proc there is nothing to compare with.
        let link = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
        match std::fs::read_link(link) {
            Ok(resolved) => self.check(file.path(), &resolved),
            Err(_) => Ok(()),
        }
    }

    fn check(&self, path: &Path, resolved: &Path) -> Result<()> {
        if self.allowed.iter().any(|dir| resolved.starts_with(dir)) {
            return Ok(());
        }
        let dir = directory_of(resolved);
        Err(Error::new(
            ErrorKind::PermissionDenied,
            format!(
                "{}: lies outside of the directories that images may pull files from; allow it \
                 with --allow-dir {}",
                path.display(),
                dir.display()
            ),
        ))
    }
}

/// The directory part of a path; `.` for a bare name.
pub fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if dir != Path::new("") => dir,
        Some(_) => Path::new("."),
        None => path,
    }
}

/// Where `reference` in the image at `from` points to, without touching the host. `./` is not
/// put before a name beside the image, so that messages show names as the operator types them.
pub fn combine(from: &Path, reference: &str) -> PathBuf {
    match from.parent() {
        Some(dir) => dir.join(reference),
        None => PathBuf::from(reference),
    }
}

/// Refuses to have an image name a file in a way that would have it refused from then on.
///
/// # Errors
/// Shows the name.
pub fn check_new_name(reference: &str) -> Result<()> {
    check_printable(reference)?;
    match protocol_of(reference) {
        None => Ok(()),
        Some(protocol) => Err(Error::unsupported(format!(
            "the file '{reference}': the protocol '{protocol}:' is not supported for files that an \
             image names (write ./{reference} if it is a file's name)"
        ))),
    }
}

/// Refuses control characters in a name that an image is to have.
///
/// # Errors
/// Shows the name.
pub fn check_printable(reference: &str) -> Result<()> {
    if reference.chars().any(char::is_control) {
        return Err(Error::invalid(format!(
            "the file '{}': control characters are not allowed in names",
            reference.escape_debug()
        )));
    }
    Ok(())
}

/// What stands before a colon in the first part of a name, which makes it an address.
fn protocol_of(reference: &str) -> Option<&str> {
    match Path::new(reference).components().next() {
        Some(Component::Normal(name)) => Some(name.to_str()?.split_once(':')?.0),
        _ => None,
    }
}

/// Refuses names that are not plain paths.
fn check_name(reference: &str) -> Result<()> {
    if reference.is_empty() {
        return Err(Error::corrupt("the image names a file with an empty name"));
    }
    if reference.chars().any(char::is_control) {
        return Err(Error::corrupt(format!(
            "the image names the file '{}': control characters are not allowed in names",
            reference.escape_debug()
        )));
    }
    if let Some(protocol) = protocol_of(reference) {
        return Err(Error::unsupported(format!(
            "the image names '{reference}': the protocol '{protocol}:' is not supported for files \
             that an image pulls in (write ./{reference} if it is a file's name)"
        )));
    }
    Ok(())
}

/// The files opened so far on behalf of one image, outermost first.
#[derive(Debug, Default)]
pub struct Chain {
    links: Vec<(u64, u64)>,
}

impl Chain {
    /// Adds a file.
    ///
    /// # Errors
    /// If it is in the chain already, or the chain is too long. Names the file.
    pub fn push(&mut self, file: &HostFile) -> Result<()> {
        let name = || file.path().display().to_string();
        let identity = file.identity().context(name)?;
        if self.links.contains(&identity) {
            return Err(Error::corrupt(format!(
                "{}: is already part of this chain of images, which would never end",
                name()
            )));
        }
        if self.links.len() >= MAX_DEPTH {
            return Err(Error::corrupt(format!(
                "{}: the chain of images is longer than {MAX_DEPTH} files",
                name()
            )));
        }
        self.links.push(identity);
        Ok(())
    }

    /// How many files are in the chain.
    pub fn len(&self) -> usize {
        self.links.len()
    }

    /// Whether nothing has been opened yet.
    pub fn is_empty(&self) -> bool {
        self.links.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::OpenOptions;

    /// A directory with `images/top`, `images/sub/base` and `secret`.
    fn tree() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("images/sub")).unwrap();
        for name in ["images/top", "images/sub/base", "secret"] {
            std::fs::write(dir.path().join(name), b"x").unwrap();
        }
        dir
    }

    #[test]
    fn the_images_own_tree_is_open() {
        let dir = tree();
        let top = dir.path().join("images/top");
        let gate = OpenGate::new(&top, &[]).unwrap();
        gate.resolve(&top, "sub/base").unwrap();
        gate.resolve(&top, dir.path().join("images/sub/base").to_str().unwrap()).unwrap();
        // A file further down may name one above it, as long as both are in the tree.
        gate.resolve(&dir.path().join("images/sub/base"), "../top").unwrap();
    }

    #[test]
    fn what_lies_elsewhere_needs_the_operator() {
        let dir = tree();
        let top = dir.path().join("images/top");
        let gate = OpenGate::new(&top, &[]).unwrap();
        std::os::unix::fs::symlink("../secret", dir.path().join("images/link")).unwrap();
        for name in ["../secret", "sub/../../secret", "link", "/etc/passwd"] {
            let err = gate.resolve(&top, name).unwrap_err();
            assert_eq!(err.kind(), ErrorKind::PermissionDenied, "{name}");
            assert!(err.to_string().contains("--allow-dir"), "{err}");
        }
        let wide = OpenGate::new(&top, &[dir.path().to_path_buf()]).unwrap();
        wide.resolve(&top, "../secret").unwrap();
        wide.resolve(&top, "link").unwrap();
    }

    #[test]
    fn names_that_are_no_paths_are_refused() {
        let dir = tree();
        let top = dir.path().join("images/top");
        let gate = OpenGate::new(&top, &[]).unwrap();
        let refusal = |name| gate.resolve(&top, name).unwrap_err().to_string();
        assert!(refusal("nbd:localhost:10809").contains("protocol 'nbd:'"));
        assert!(refusal("http://host/disk").contains("protocol 'http:'"));
        assert!(refusal("json:{}").contains("protocol 'json:'"));
        assert!(refusal("a\nb").contains("control characters"));
        assert!(refusal("").contains("empty name"));
        std::fs::write(dir.path().join("images/a:b"), b"x").unwrap();
        gate.resolve(&top, "./a:b").unwrap();
        assert!(refusal("missing").contains("No such file"));
    }

    #[test]
    fn a_file_swapped_after_the_check_is_noticed() {
        let dir = tree();
        let top = dir.path().join("images/top");
        let gate = OpenGate::new(&top, &[]).unwrap();
        let inside = HostFile::open(&top, OpenOptions::default()).unwrap();
        gate.confirm(&inside).unwrap();
        let outside = HostFile::open(&dir.path().join("secret"), OpenOptions::default()).unwrap();
        gate.confirm(&outside).unwrap_err();
    }

    #[test]
    fn chains_do_not_bite_their_tail() {
        let dir = tree();
        let open = |name| HostFile::open(&dir.path().join(name), OpenOptions::default()).unwrap();
        std::fs::hard_link(dir.path().join("secret"), dir.path().join("twin")).unwrap();
        let mut chain = Chain::default();
        chain.push(&open("secret")).unwrap();
        let err = chain.push(&open("twin")).unwrap_err();
        assert!(err.to_string().contains("already part"), "{err}");
    }

    #[test]
    fn chains_end() {
        let dir = tree();
        let mut chain = Chain::default();
        for i in 0..=MAX_DEPTH {
            let path = dir.path().join(format!("link{i}"));
            std::fs::write(&path, b"").unwrap();
            let pushed = chain.push(&HostFile::open(&path, OpenOptions::default()).unwrap());
            assert_eq!(pushed.is_ok(), i < MAX_DEPTH, "{i}");
        }
        assert_eq!(chain.len(), MAX_DEPTH);
    }

    #[test]
    fn allowing_what_is_no_directory_is_a_mistake() {
        let dir = tree();
        let top = dir.path().join("images/top");
        let err = OpenGate::new(&top, &[dir.path().join("secret")]).unwrap_err();
        assert!(err.to_string().contains("is not a directory"), "{err}");
        OpenGate::new(&top, &[dir.path().join("nowhere")]).unwrap_err();
    }
}
