//! Where states are shown and checked: one place for each worker.
//!
//! ```text
//! in a file    by FUSE, or a copy ──► a program checks it
//! to a guest   on its disk ─────────► it says so itself
//! ```

use std::path::Path;
use std::sync::Arc;

use crate::block::Node;
use crate::crash::check::{Bounds, Checker, Verdict};
use crate::crash::copy::{CopiedFile, Copies};
use crate::crash::disk::StateDisk;
use crate::crash::fuse::{Mount, Reads, StateFile};
use crate::crash::history::History;
use crate::crash::name::StateName;
use crate::error::{Error, Result, ResultExt};
use crate::units::ByteRange;

/// Places for the workers, and where they are.
#[derive(Debug)]
pub struct Stage {
    /// One for each worker.
    pub(super) places: Vec<Place>,
    _mount: Option<Mount>,
    _copies: Option<Copies>,
    /// How states are shown, for the operator.
    pub how: String,
}

impl Stage {
    /// Looks for the best way to show states in files that the host has.
    ///
    /// # Errors
    /// If there is none.
    pub fn new(history: &Arc<History>, base: &Node, workers: usize, reads: Reads) -> Result<Stage> {
        let disk = |_| StateDisk::new(Arc::clone(history), base.clone());
        let place =
            |file| Place { history: Arc::clone(history), shown: Shown::File(Box::new(file)) };
        match Mount::new((0..workers).map(disk).collect(), reads) {
            Ok((mount, files)) => Ok(Stage {
                places: files.into_iter().map(ShownFile::Fuse).map(place).collect(),
                _mount: Some(mount),
                _copies: None,
                how: "states are shown through FUSE".into(),
            }),
            Err(err) => {
                let copies = Copies::new()?;
                let file = |i| ShownFile::Copy(CopiedFile::new(&copies, i, disk(i)));
                Ok(Stage {
                    places: (0..workers).map(file).map(place).collect(),
                    _mount: None,
                    _copies: Some(copies),
                    how: format!(
                        "no FUSE ({err}): each state is copied to a sparse file, which is slow"
                    ),
                })
            }
        }
    }

    /// The stage for a guest.
    pub fn of_guest(history: &Arc<History>, guest: Box<dyn GuestChecker>) -> Stage {
        Stage {
            places: vec![Place { history: Arc::clone(history), shown: Shown::Guest(guest) }],
            _mount: None,
            _copies: None,
            how: "states are shown to a guest".into(),
        }
    }

    /// Checks one state; with the end of what the checker printed.
    ///
    /// # Errors
    /// If the state cannot be shown, or the checker not be run.
    pub fn check(
        &mut self,
        name: &StateName,
        checker: &Checker,
        bounds: Bounds<'_>,
    ) -> Result<(Verdict, String)> {
        match self.places.first_mut() {
            Some(place) => place.check_and_listen(name, checker, bounds),
            None => Err(Error::invalid("no place to show a state in")),
        }
    }
}

/// A guest that is shown states and says whether they are good.
pub trait GuestChecker: Send + std::fmt::Debug {
    /// Shows it a state, left by a power cut after `mark`. A guest that takes too long has given a bad
    /// verdict. With what it says of the state.
    ///
    /// # Errors
    /// If there is no guest, which says nothing about the disk. Kind
    /// [`Cancelled`](crate::error::ErrorKind::Cancelled) if it was to end.
    fn check(
        &mut self,
        state: &StateName,
        mark: &str,
        bounds: Bounds<'_>,
    ) -> Result<(Verdict, String)>;
}

/// Where a worker shows its states.
#[derive(Debug)]
pub(super) struct Place {
    history: Arc<History>,
    shown: Shown,
}

#[derive(Debug)]
enum Shown {
    File(Box<ShownFile>),
    Guest(Box<dyn GuestChecker>),
}

/// The file in which states are shown.
#[derive(Debug)]
enum ShownFile {
    /// By FUSE.
    Fuse(StateFile),
    /// A copy.
    Copy(CopiedFile),
}

impl Place {
    /// Shows a state and checks it.
    pub fn check(
        &mut self,
        name: &StateName,
        checker: &Checker,
        bounds: Bounds<'_>,
    ) -> Result<Verdict> {
        let mark = self.mark(name, checker)?;
        match &mut self.shown {
            Shown::Guest(guest) => Ok(guest.check(name, &mark, bounds)?.0),
            Shown::File(file) => {
                file.show_to(name, checker, |path| checker.run(path, name, &mark, bounds, None))
            }
        }
    }

    /// The same, with the end of what the checker prints.
    pub fn check_and_listen(
        &mut self,
        name: &StateName,
        checker: &Checker,
        bounds: Bounds<'_>,
    ) -> Result<(Verdict, String)> {
        let mark = self.mark(name, checker)?;
        match &mut self.shown {
            Shown::Guest(guest) => guest.check(name, &mark, bounds),
            Shown::File(file) => file
                .show_to(name, checker, |path| checker.run_and_listen(path, name, &mark, bounds)),
        }
    }

    /// What a checker has read of the state, if that is known.
    pub fn looked_at(&self) -> Option<Vec<ByteRange>> {
        match &self.shown {
            Shown::File(file) => match &**file {
                ShownFile::Fuse(file) => Some(file.looked_at()),
                ShownFile::Copy(_) => None,
            },
            Shown::Guest(_) => None,
        }
    }

    /// The last mark before a state's power cut, if the checker wants to know; empty if there is none.
    fn mark(&self, name: &StateName, checker: &Checker) -> Result<String> {
        if !checker.wants_mark() {
            return Ok(String::new());
        }
        let (epoch, full) = self.history.expanded(name)?;
        let mark = self.history.last_mark(&epoch, &full);
        Ok(mark.map(|(_, text)| text.to_string()).unwrap_or_default())
    }
}

impl ShownFile {
    /// Shows a state while `check` runs, and sees to it that it had this state all the time. A checker
    /// that has the state shown by somebody else needs no file.
    fn show_to<T>(
        &mut self,
        name: &StateName,
        checker: &Checker,
        check: impl FnOnce(&Path) -> Result<T>,
    ) -> Result<T> {
        if checker.wants_file() {
            match self {
                ShownFile::Fuse(file) => file.show(name)?,
                ShownFile::Copy(file) => file.show(name)?,
            }
        }
        match self {
            ShownFile::Copy(file) => check(file.path()),
            ShownFile::Fuse(file) => {
                let verdict = check(file.path())?;
                file.settle().context(|| format!("state {name}"))?;
                Ok(verdict)
            }
        }
    }
}
