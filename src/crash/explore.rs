//! Exploring: every state of a log, each different disk checked once.
//!
//! ```text
//! this thread    epochs ─► states ─► fingerprint ─► seen before? ─► queue ─► results ─► report
//! workers        answered before? ─► show the state in a place of their own ─► checker ─► verdict
//! ```
//!
//! States come in an order that depends on the log and the options alone, so "all before the n-th
//! are done" is all that must be kept to go on later. Those that were done then are passed through
//! without being checked, only to know them again.

use std::collections::{BTreeMap, HashSet};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::block::Node;
use crate::crash::answers::Answers;
use crate::crash::check::{Bounds, Checker, Verdict};
use crate::crash::enumerate::{self, Reach};
use crate::crash::fingerprint::Fingerprints;
use crate::crash::fuse::Reads;
use crate::crash::history::{Epoch, History};
use crate::crash::name::StateName;
use crate::crash::report::{Failure, Report};
use crate::crash::shrink;
use crate::crash::stage::{Place, Stage};
use crate::crash::stop::Stop;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{HostFile, OpenOptions, block_on};
use crate::write_log::sidecar::Sidecar;

/// How often the report is saved and the operator is told.
const PACE: Duration = Duration::from_millis(500);
/// How many failures are described; of each epoch one.
const DESCRIBED: usize = 8;

/// How to explore.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Which states.
    pub reach: Reach,
    /// The checker, if states are to be checked and not only counted.
    pub checker: Option<Checker>,
    /// How many checkers at a time.
    pub workers: usize,
    /// How long a checker may take.
    pub limit: Duration,
    /// Check states, too, whose verdict is known from a state that was the same where the checker
    /// looked.
    pub check_alike: bool,
    /// End after so many failures.
    pub stop_after: Option<u64>,
    /// Where the report is kept.
    pub results: Option<PathBuf>,
    /// The command that checks the state whose name is put behind it.
    pub again: String,
    /// The command that serves it to a guest.
    pub serve: String,
    /// The log's sidecar, which knows in which order requests came and went.
    pub sidecar: Option<PathBuf>,
}

impl Plan {
    /// Whether an answer of the checker is one for other states, too, and what it read matters.
    pub fn reads(&self) -> Reads {
        let checker = self.checker.as_ref();
        match !self.check_alike && checker.is_some_and(Checker::reads_the_file_alone) {
            true => Reads::Exact,
            false => Reads::Unknown,
        }
    }
}

/// What the caller is told meanwhile.
pub trait Watch {
    /// What has been done so far.
    fn progress(&mut self, report: &Report);
}

/// A state that waits for a worker.
struct Task {
    ordinal: u64,
    name: StateName,
    /// See [`Run::promised`].
    promised: u64,
    /// What is known of its epoch; nothing if every state is to be checked.
    answers: Option<Arc<Mutex<Answers>>>,
}

/// What a worker has to say of a state.
enum Answer {
    Checked(Verdict),
    /// It is as good as one that was checked.
    Alike,
}

/// A state that is not counted yet, because one before it is not done.
enum Pending {
    /// A worker has it or will have it.
    Waiting(StateName),
    /// The same disk as another one.
    Duplicate,
    /// As good as another one.
    Alike,
    /// Not to be checked.
    Counted,
    /// Checked.
    Good,
    /// Checked, and not good.
    Bad(Box<Failure>),
}

/// How many states there are, duplicates included.
pub fn count(history: &History, plan: &Plan) -> u64 {
    history.epochs().map(|epoch| enumerate::count(history, &epoch, &plan.reach)).sum()
}

/// Explores, from where `report` stands, to the end or until `stop` is asked for. A report that is not
/// finished afterwards was stopped.
///
/// # Errors
/// If base or log cannot be read, the checker cannot be run, or the report not be kept. What was found
/// until then is in the report.
pub fn explore(
    history: &Arc<History>,
    base: &Node,
    plan: &Plan,
    report: &mut Report,
    stage: &mut Stage,
    watch: &mut dyn Watch,
    stop: &Stop,
) -> Result<()> {
    report.states = count(history, plan);
    let started = Instant::now();
    let before = report.seconds;
    let workers = if plan.checker.is_some() { stage.places.len() } else { 0 };
    let (tasks, queue) = sync_channel(workers * 4 + 1);
    let (answers, results) = channel();
    let (queue, ending) = (Mutex::new(queue), AtomicBool::new(false));
    let mut run = Run {
        history,
        plan,
        report,
        watch,
        stop,
        tasks: Some(tasks),
        results,
        started,
        before,
        said: Instant::now(),
        pending: BTreeMap::new(),
        given: 0,
        error: None,
    };
    std::thread::scope(|scope| {
        for place in stage.places.iter_mut().take(workers) {
            let (queue, ending, answers) = (&queue, &ending, answers.clone());
            scope.spawn(move || work(place, plan, stop, queue, ending, &answers));
        }
        drop(answers);
        if let Err(err) = run.generate(base) {
            run.fail(err);
        }
        ending.store(run.given < run.report.states, Ordering::Relaxed);
        run.tasks = None;
        // The workers end what they have in hand.
        while let Ok((ordinal, answer)) = run.results.recv() {
            run.take(ordinal, answer);
            if let Err(err) = run.say_now_and_then() {
                run.fail(err);
            }
            if run.is_stopped() {
                ending.store(true, Ordering::Relaxed);
            }
        }
    });
    run.keep_what_is_not_counted();
    let stopped = run.is_stopped() || run.report.done < run.report.states;
    run.report.seconds = before + started.elapsed().as_secs_f64();
    let described = match run.error {
        Some(err) => Err(err),
        None => describe_failures(history, plan, report, stage, stop),
    };
    // Failures that were not described yet are left for the next run.
    let is_described = report.failures.iter().all(|failure| failure.shrunk || failure.flaky);
    report.finished = !stopped && is_described && described.is_ok();
    let saved = plan.results.as_ref().map_or(Ok(()), |path| report.save(path));
    match described {
        Err(err) if err.kind() == ErrorKind::Cancelled => saved,
        other => other.and(saved),
    }
}

/// A worker: checks states until there are no more, or no more are wanted.
fn work(
    place: &mut Place,
    plan: &Plan,
    stop: &Stop,
    queue: &Mutex<Receiver<Task>>,
    ending: &AtomicBool,
    answers: &Sender<(u64, Result<Answer>)>,
) {
    let Some(checker) = &plan.checker else { return };
    loop {
        let task = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(task) = task else { return };
        if ending.load(Ordering::Relaxed) || stop.is_asked() {
            continue;
        }
        let answer = answer(place, &task, checker, Bounds { limit: plan.limit, stop });
        if answers.send((task.ordinal, answer)).is_err() {
            return;
        }
    }
}

fn answer(place: &mut Place, task: &Task, checker: &Checker, bounds: Bounds<'_>) -> Result<Answer> {
    let Some(answers) = &task.answers else {
        return place.check(&task.name, checker, bounds).map(Answer::Checked);
    };
    let answers = || answers.lock().unwrap_or_else(PoisonError::into_inner);
    if answers().has(&task.name, task.promised) {
        return Ok(Answer::Alike);
    }
    let verdict = place.check(&task.name, checker, bounds)?;
    if let (Verdict::Good, Some(read)) = (&verdict, place.looked_at()) {
        answers().learn(&task.name, task.promised, &read);
    }
    Ok(Answer::Checked(verdict))
}

/// An exploration that is under way.
struct Run<'a> {
    history: &'a Arc<History>,
    plan: &'a Plan,
    report: &'a mut Report,
    watch: &'a mut dyn Watch,
    stop: &'a Stop,
    /// `None` when all is given out.
    tasks: Option<SyncSender<Task>>,
    results: Receiver<(u64, Result<Answer>)>,
    started: Instant,
    /// Seconds spent by earlier runs.
    before: f64,
    said: Instant,
    /// States that are not counted yet, by their place in the order.
    pending: BTreeMap<u64, Pending>,
    /// How many states were looked at, done or given to a worker.
    given: u64,
    /// What ends it.
    error: Option<Error>,
}

impl Run<'_> {
    fn generate(&mut self, base: &Node) -> Result<()> {
        let history = Arc::clone(self.history);
        let mut prints = Fingerprints::new(&history, base)?;
        let mut seen = HashSet::new();
        let resumed = self.report.done;
        for epoch in history.epochs() {
            let print = Arc::new(prints.epoch(&epoch)?);
            let answers =
                (self.plan.reads() == Reads::Exact).then(|| Answers::new(Arc::clone(&print)));
            let answers = answers.map(|answers| Arc::new(Mutex::new(answers)));
            let flow = enumerate::visit(&history, &epoch, &self.plan.reach, &mut |name| {
                let promised = self.promised(&epoch, &name);
                let is_new = seen.insert((print.of(&name), promised));
                let ordinal = self.given;
                let task = Task { ordinal, name, promised, answers: answers.clone() };
                self.meet(task, is_new, resumed)
            });
            match flow {
                ControlFlow::Continue(()) => {}
                ControlFlow::Break(result) => return result,
            }
        }
        Ok(())
    }

    /// What the checker is told besides the disk: the number of the last mark, which may promise more
    /// of the same disk. 0 if it does not want to know.
    fn promised(&self, epoch: &Epoch, name: &StateName) -> u64 {
        match &self.plan.checker {
            Some(checker) if checker.wants_mark() => {
                self.history.last_mark(epoch, name).map_or(0, |(number, _)| number + 1)
            }
            _ => 0,
        }
    }

    /// The next state: known, done earlier, or to be checked.
    fn meet(&mut self, task: Task, is_new: bool, resumed: u64) -> ControlFlow<Result<()>> {
        if self.is_stopped() {
            return ControlFlow::Break(Ok(()));
        }
        let ordinal = task.ordinal;
        self.given += 1;
        if ordinal < resumed {
            return ControlFlow::Continue(());
        }
        let pending = match (&self.tasks, &self.plan.checker) {
            _ if !is_new => Pending::Duplicate,
            (Some(tasks), Some(_)) => {
                let name = task.name.clone();
                // Fails only if all workers have ended, which they do not before us.
                let _ = tasks.send(task);
                Pending::Waiting(name)
            }
            _ => Pending::Counted,
        };
        self.pending.insert(ordinal, pending);
        while let Ok((ordinal, answer)) = self.results.try_recv() {
            self.take(ordinal, answer);
        }
        self.count_done();
        // Asking costs a system call, and a state may cost less.
        let is_due = self.given.is_multiple_of(256) || self.plan.checker.is_some();
        if is_due && let Err(err) = self.say_now_and_then() {
            return ControlFlow::Break(Err(err));
        }
        ControlFlow::Continue(())
    }

    fn take(&mut self, ordinal: u64, answer: Result<Answer>) {
        let Some(pending) = self.pending.get_mut(&ordinal) else { return };
        match (answer, &*pending) {
            (Ok(Answer::Alike), _) => *pending = Pending::Alike,
            (Ok(Answer::Checked(Verdict::Bad(how))), Pending::Waiting(name)) => {
                *pending = Pending::Bad(Box::new(Failure::new(self.history, name, &how)));
            }
            (Ok(_), _) => *pending = Pending::Good,
            // This one is not done: it waits for another run.
            (Err(err), _) if err.kind() == ErrorKind::Cancelled => {}
            (Err(err), _) => self.fail(err),
        }
        self.count_done();
    }

    /// Counts what has nothing undone before it, so that what is kept is right whenever this process
    /// is killed.
    fn count_done(&mut self) {
        while let Some(first) = self.pending.first_entry() {
            if matches!(first.get(), Pending::Waiting(_)) {
                return;
            }
            let ordinal = *first.key();
            match first.remove() {
                Pending::Duplicate => self.report.duplicates += 1,
                Pending::Alike => self.report.alike += 1,
                Pending::Good => self.report.checked += 1,
                Pending::Bad(failure) => {
                    self.report.checked += 1;
                    self.report.failed += 1;
                    self.keep(*failure);
                }
                Pending::Counted | Pending::Waiting(_) => {}
            }
            self.report.done = ordinal + 1;
        }
    }

    /// Keeps the first failure of an epoch.
    fn keep(&mut self, failure: Failure) {
        let epoch = |failure: &Failure| failure.writes.first().map(|row| row.entry);
        let kept = &mut self.report.failures;
        if kept.len() < DESCRIBED && kept.iter().all(|other| epoch(other) != epoch(&failure)) {
            kept.push(failure);
        }
    }

    /// Keeps failures behind a state that is not done. The next run will find them again, and count
    /// them then.
    fn keep_what_is_not_counted(&mut self) {
        for pending in std::mem::take(&mut self.pending).into_values() {
            if let Pending::Bad(failure) = pending {
                self.keep(*failure);
            }
        }
    }

    /// Ends the exploration, because of the first error.
    fn fail(&mut self, err: Error) {
        self.error.get_or_insert(err);
    }

    fn is_stopped(&self) -> bool {
        self.stop.is_asked()
            || self.error.is_some()
            || self.plan.stop_after.is_some_and(|most| self.report.failed >= most)
    }

    fn say_now_and_then(&mut self) -> Result<()> {
        if self.said.elapsed() < PACE {
            return Ok(());
        }
        self.said = Instant::now();
        self.report.seconds = self.before + self.started.elapsed().as_secs_f64();
        self.watch.progress(self.report);
        match &self.plan.results {
            Some(path) => self.report.save(path),
            None => Ok(()),
        }
    }
}

/// Shrinks what was found and has the checker say what is wrong.
fn describe_failures(
    history: &History,
    plan: &Plan,
    report: &mut Report,
    stage: &mut Stage,
    stop: &Stop,
) -> Result<()> {
    let (Some(checker), Some(place)) = (&plan.checker, stage.places.first_mut()) else {
        return Ok(());
    };
    let bounds = Bounds { limit: plan.limit, stop };
    for failure in report.failures.iter_mut().filter(|failure| !failure.shrunk) {
        let found_as = failure.found_as.clone();
        let (epoch, found) = history.expanded(&found_as.parse()?)?;
        let (verdict, _) = place.check_and_listen(&found, checker, bounds)?;
        if verdict == Verdict::Good {
            failure.is_flaky(plan);
            continue;
        }
        let mut fails = |name: &StateName| -> Result<bool> {
            Ok(place.check(name, checker, bounds)? != Verdict::Good)
        };
        let least = shrink::shrink(history, &epoch, found, &mut fails)?;
        let (verdict, output) = place.check_and_listen(&least, checker, bounds)?;
        let Verdict::Bad(how) = verdict else {
            failure.is_flaky(plan);
            continue;
        };
        *failure =
            Failure { found_as, shrunk: true, output, ..Failure::new(history, &least, &how) };
        failure.reproduce = format!("{}{}", plan.again, failure.state);
        failure.serve = format!("{}{}", plan.serve, failure.state);
    }
    // What it would add is not worth the report.
    report.without_order = plan
        .sidecar
        .as_ref()
        .and_then(|path| add_order(history, path, &mut report.failures).err())
        .map(|err| err.to_string());
    Ok(())
}

impl Failure {
    /// A state that failed has passed: this one, or what was made of it.
    fn is_flaky(&mut self, plan: &Plan) {
        self.flaky = true;
        self.reproduce = format!("{}{}", plan.again, self.found_as);
        self.serve = format!("{}{}", plan.serve, self.found_as);
    }
}

/// Adds what the log's sidecar knows of the guilty writes.
fn add_order(history: &History, sidecar: &Path, failures: &mut [Failure]) -> Result<()> {
    if failures.is_empty() {
        return Ok(());
    }
    let file = HostFile::open(sidecar, OpenOptions::default())?;
    let mut sidecar = block_on(Sidecar::open(Arc::new(file)))?;
    failures.iter_mut().try_for_each(|failure| failure.add_order(history, &mut sidecar))
}
