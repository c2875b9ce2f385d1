//! Jobs on the jobs thread, with the test as the main thread: the traces that clients expect.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::task::Poll;
use std::time::{Duration, Instant};

use super::*;
use crate::block::{Graph, Node, NodeOptions, Rights, Root};
use crate::error::{Error, ErrorKind, Result};
use crate::formats::raw::Raw;
use crate::images::{Layers, StateDir};
use crate::io::{AlignedBuf, Fut, HostFile, OpenOptions};

/// How much is copied at a time.
const PIECE: u64 = 64 << 10;
const SIZE: u64 = 64 * PIECE;

/// What happens, as short words.
struct News {
    said: Sender<String>,
    tasks: Sender<MainTask>,
}

impl Listener for News {
    fn event(&self, event: &JobEvent) {
        let said = match event {
            JobEvent::Status { status, .. } => status.name().to_string(),
            JobEvent::Ready(figures) => format!("READY {}", figures.kind.name()),
            JobEvent::Pending { kind, .. } => format!("PENDING {}", kind.name()),
            JobEvent::Completed(figures, None) => {
                format!("COMPLETED {}/{}", figures.current, figures.total)
            }
            JobEvent::Completed(_, Some(error)) => format!("FAILED {error}"),
            JobEvent::Cancelled(_) => "CANCELLED".to_string(),
            JobEvent::Error { operation, action, .. } => {
                format!("ERROR {} {}", operation.name(), action.name())
            }
        };
        let _ = self.said.send(said);
    }

    fn on_main(&self, task: MainTask) {
        let _ = self.tasks.send(task);
    }
}

/// The main thread's part.
struct Desk {
    jobs: Jobs,
    said: Receiver<String>,
    tasks: Receiver<MainTask>,
}

fn layers() -> Layers {
    Layers::new(Graph::new(), Vec::new(), StateDir::None)
}

impl Desk {
    fn new() -> Desk {
        let (said_to, said) = channel();
        let (tasks_to, tasks) = channel();
        Desk { jobs: Jobs::new(News { said: said_to, tasks: tasks_to }), said, tasks }
    }

    /// What was said up to and with `last`.
    #[track_caller]
    fn until(&self, last: &str) -> Vec<String> {
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut all = Vec::new();
        while all.last().is_none_or(|said| said != last) {
            assert!(Instant::now() < deadline, "no {last:?} after {all:?}");
            let mut layers = layers();
            for task in self.tasks.try_iter() {
                task(&mut layers);
            }
            all.extend(self.said.recv_timeout(Duration::from_millis(1)));
        }
        all
    }

    #[track_caller]
    fn verb(&self, verb: Verb) {
        self.jobs.apply("j", verb).unwrap();
    }

    fn refused(&self, verb: Verb) -> String {
        match self.jobs.apply("j", verb) {
            Err(VerbError::Refused(text)) => text,
            other => panic!("{other:?}"),
        }
    }
}

/// Copies a disk, and then perhaps waits to be told how to end.
struct Copy {
    from: Root,
    to: Node,
    then_ready: bool,
    on_error: OnError,
    /// What happened on the main thread.
    finalized: &'static Mutex<Vec<String>>,
    fails_at_the_end: bool,
}

impl Copy {
    async fn piece(&self, context: &Context, offset: u64) -> Result<()> {
        loop {
            context.throttle(PIECE).await;
            let turn = context.turn().await;
            let buf = AlignedBuf::zeroed(PIECE as usize, 4096);
            let result = async {
                self.from.node().read(offset, buf.buffers()).await?;
                self.to.write(offset, buf.buffers(), false).await
            };
            let result = result.await;
            if result.is_ok() {
                context.advance(PIECE);
            }
            drop(turn);
            let Err(err) = result else { return Ok(()) };
            match context.on_error(self.on_error, Operation::Write, &err) {
                Action::Report => return Err(err),
                Action::Ignore => return Ok(()),
                Action::Stop => {}
            }
        }
    }
}

impl Body for Copy {
    fn run<'a>(&'a self, context: &'a Context) -> Fut<'a, ()> {
        Box::pin(async move {
            context.set_total(SIZE);
            for offset in (0..SIZE).step_by(PIECE as usize) {
                self.piece(context, offset).await?;
            }
            if self.then_ready {
                context.ready();
                context.wait_ending().await;
            }
            Ok(())
        })
    }

    fn finalize(&self, ending: Ending, _: &mut Layers) -> Result<()> {
        // Nobody else may be in the way: a gate of ours that closes must not wait for us.
        drop(self.from.quiesce());
        self.finalized.lock().unwrap().push(format!("{ending:?}"));
        if self.fails_at_the_end {
            return Err(Error::new(ErrorKind::Busy, "cannot swap"));
        }
        Ok(())
    }

    fn abort(&self, _: &mut Layers) {
        self.finalized.lock().unwrap().push("abort".into());
    }
}

/// Disks, and what has happened to them.
struct Bench {
    desk: Desk,
    from: Root,
    to: Node,
    finalized: &'static Mutex<Vec<String>>,
    _dir: tempfile::TempDir,
}

fn node(path: &Path, name: &str) -> Node {
    let options = OpenOptions { write: true, ..OpenOptions::default() };
    let file = HostFile::open(path, options).unwrap();
    let driver = std::sync::Arc::new(Raw::open(std::sync::Arc::new(file), false).unwrap());
    Node::new(driver, NodeOptions { name: name.into(), ..NodeOptions::default() })
}

impl Bench {
    fn new() -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let content: Vec<u8> = (0..SIZE).map(|i| (i / 512 * 7) as u8).collect();
        std::fs::write(dir.path().join("from"), content).unwrap();
        std::fs::write(dir.path().join("to"), vec![0; SIZE as usize]).unwrap();
        Bench {
            desk: Desk::new(),
            from: Root::new("job 'j'", node(&dir.path().join("from"), "from")),
            to: node(&dir.path().join("to"), "to"),
            finalized: Box::leak(Box::default()),
            _dir: dir,
        }
    }

    fn body(&self) -> Copy {
        Copy {
            from: self.from.clone(),
            to: self.to.clone(),
            then_ready: false,
            on_error: OnError::Report,
            finalized: self.finalized,
            fails_at_the_end: false,
        }
    }

    fn spec(&self) -> Spec {
        let hold = self.to.hold("job 'j'", Rights::WRITE, Rights::NONE).unwrap();
        let (roots, holds) = (vec![self.from.clone()], vec![hold]);
        Spec { roots, holds, ..Spec::new("j", JobKind::Mirror) }
    }

    fn start(&self, spec: Spec, body: Copy) {
        self.desk.jobs.start(spec, body).unwrap();
    }

    fn is_copied(&self) -> bool {
        let read = |name: &str| std::fs::read(self._dir.path().join(name)).unwrap();
        read("from") == read("to")
    }

    fn finalized(&self) -> Vec<String> {
        std::mem::take(&mut *self.finalized.lock().unwrap())
    }
}

#[test]
fn a_job_that_ends_by_itself() {
    let bench = Bench::new();
    bench.start(bench.spec(), bench.body());
    let busy = bench.to.hold("somebody", Rights::WRITE, Rights::ALL).unwrap_err().to_string();
    assert_eq!(busy, "Node 'to' is busy: block device is in use by job 'j'");
    let whole = format!("COMPLETED {SIZE}/{SIZE}");
    assert_eq!(
        bench.desk.until("null"),
        ["created", "running", "waiting", "pending", &whole, "concluded", "null"]
    );
    assert!(bench.is_copied());
    assert_eq!(bench.finalized(), ["Complete"]);
    assert_eq!(bench.desk.jobs.apply("j", Verb::Pause), Err(VerbError::NotFound));
    bench.to.hold("somebody", Rights::WRITE, Rights::ALL).unwrap();
}

#[test]
fn finalized_and_dismissed_by_hand() {
    let bench = Bench::new();
    let by_hand = Spec { auto_finalize: false, auto_dismiss: false, ..bench.spec() };
    bench.start(by_hand, bench.body());
    assert_eq!(
        bench.desk.until("PENDING mirror"),
        ["created", "running", "waiting", "pending", "PENDING mirror"]
    );
    assert_eq!(
        bench.desk.refused(Verb::Dismiss),
        "Job 'j' in state 'pending' cannot accept command verb 'dismiss'"
    );
    bench.desk.jobs.finalize("j", &mut layers()).unwrap();
    // By then it is over.
    let whole = format!("COMPLETED {SIZE}/{SIZE}");
    assert_eq!(bench.desk.said.try_iter().collect::<Vec<_>>(), [&whole, "concluded"]);
    assert_eq!(bench.desk.jobs.query().len(), 1);
    let resume = bench.desk.refused(Verb::Resume);
    assert_eq!(resume, "Can't resume a job that was not paused", "in whatever state");
    bench.desk.verb(Verb::Dismiss);
    assert_eq!(bench.desk.until("null"), ["null"]);
    // Cancelled at the last moment.
    let by_hand = Spec { auto_finalize: false, ..bench.spec() };
    bench.finalized();
    bench.start(by_hand, bench.body());
    bench.desk.until("PENDING mirror");
    bench.desk.verb(Verb::Cancel);
    assert_eq!(bench.desk.until("null"), ["aborting", "CANCELLED", "concluded", "null"]);
    assert_eq!(bench.finalized(), ["abort"]);
}

#[test]
fn ready_paused_and_completed_or_not() {
    let begin = ["created", "running", "ready", "READY mirror"];
    let bench = Bench::new();
    let start = || {
        bench.start(bench.spec(), Copy { then_ready: true, ..bench.body() });
        assert_eq!(bench.desk.until("READY mirror"), begin);
        bench.finalized();
    };
    let whole = format!("COMPLETED {SIZE}/{SIZE}");
    start();
    bench.desk.verb(Verb::Pause);
    assert_eq!(bench.desk.until("standby"), ["standby"]);
    assert_eq!(bench.desk.refused(Verb::Pause), "Job is already paused");
    // It does so once it may go on.
    bench.desk.verb(Verb::Complete);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(bench.desk.jobs.query()[0].status, Status::Standby);
    bench.desk.verb(Verb::Resume);
    let end = bench.desk.until("null");
    assert_eq!(end, ["ready", "waiting", "pending", &whole, "concluded", "null"]);
    assert_eq!(bench.finalized(), ["Complete"]);
    start();
    assert_eq!(bench.desk.refused(Verb::Resume), "Can't resume a job that was not paused");
    bench.desk.verb(Verb::Complete);
    bench.desk.verb(Verb::Complete);
    // It cannot stay any more, and goes over all the same.
    bench.desk.jobs.cancel_gently("j").unwrap();
    let refusal = "The active block job 'j' cannot be completed";
    assert_eq!(bench.desk.refused(Verb::Complete), refusal);
    let end = bench.desk.until("null");
    assert_eq!(end, ["waiting", "pending", &whole, "concluded", "null"]);
    assert_eq!(bench.finalized(), ["Complete"]);
    // Cancelled without force: the copy is good.
    start();
    bench.desk.jobs.cancel_gently("j").unwrap();
    assert_eq!(bench.desk.refused(Verb::Complete), refusal);
    bench.desk.jobs.cancel_gently("j").unwrap();
    let end = bench.desk.until("null");
    assert_eq!(end, ["waiting", "pending", &whole, "concluded", "null"]);
    assert_eq!(bench.finalized(), ["Stay"]);
    // And with force, even if it was told to complete.
    for completes in [false, true] {
        start();
        if completes {
            bench.desk.verb(Verb::Complete);
        }
        bench.desk.verb(Verb::Cancel);
        assert_eq!(bench.desk.until("null"), ["aborting", "CANCELLED", "concluded", "null"]);
        assert_eq!(bench.finalized(), ["abort"]);
    }
}

#[test]
fn pausing_and_cancelling_in_the_middle() {
    let bench = Bench::new();
    let slow = || Spec { speed: 8 * PIECE, auto_dismiss: false, ..bench.spec() };
    bench.start(slow(), bench.body());
    bench.desk.until("running");
    bench.desk.verb(Verb::Pause);
    assert_eq!(bench.desk.until("paused"), ["paused"]);
    let at = bench.desk.jobs.query()[0].clone();
    assert!(at.paused && !at.busy && at.current < SIZE && at.speed == 8 * PIECE, "{at:?}");
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(bench.desk.jobs.query()[0].current, at.current, "it works while paused");
    bench.desk.verb(Verb::Resume);
    assert_eq!(bench.desk.until("running"), ["running"]);
    bench.desk.verb(Verb::Cancel);
    assert_eq!(bench.desk.until("concluded"), ["aborting", "CANCELLED", "concluded"]);
    assert_eq!(bench.desk.jobs.query()[0].error.as_deref(), Some("Operation canceled"));
    bench.desk.verb(Verb::Dismiss);
    bench.desk.until("null");
    // Paused, and cancelled from there.
    bench.start(slow(), bench.body());
    bench.desk.until("running");
    bench.desk.verb(Verb::Pause);
    bench.desk.until("paused");
    let err = bench.desk.jobs.cancel_gently("j").unwrap_err();
    assert_eq!(err, VerbError::Refused("The block job for device 'j' is currently paused".into()));
    bench.desk.verb(Verb::Cancel);
    let end = bench.desk.until("concluded");
    assert_eq!(end, ["running", "aborting", "CANCELLED", "concluded"]);
    bench.desk.verb(Verb::Dismiss);
    bench.desk.until("null");
    // Without a limit the rest takes no time.
    bench.start(slow(), bench.body());
    bench.desk.until("running");
    bench.desk.jobs.set_speed("j", 0).unwrap();
    bench.desk.until("concluded");
    assert!(bench.is_copied());
}

#[test]
fn errors_are_treated_as_the_operator_wants() {
    let bench = Bench::new();
    let fail = |on_error| {
        let failing = crate::io::sim::SimFile::from_bytes("full", vec![0; SIZE as usize]);
        failing.fail(crate::io::sim::Fault {
            op: Some(crate::io::sim::SimOp::Write),
            after: 3,
            errno: libc::ENOSPC,
            for_good: false,
        });
        let driver = Raw::open(std::sync::Arc::new(failing), false).unwrap();
        let to = Node::new(std::sync::Arc::new(driver), NodeOptions::default());
        bench.start(bench.spec(), Copy { on_error, to, ..bench.body() });
    };
    fail(OnError::Report);
    let said = bench.desk.until("null");
    assert_eq!(said[2], "ERROR write report", "{said:?}");
    assert_eq!(said[3], "aborting");
    assert!(said[4].starts_with("FAILED ") && said[4].contains("No space left"), "{said:?}");
    fail(OnError::Ignore);
    let said = bench.desk.until("null");
    assert_eq!(said[2..4], ["ERROR write ignore", "waiting"], "{said:?}");
    fail(OnError::Enospc);
    let said = bench.desk.until("paused");
    assert_eq!(said[2..], ["ERROR write stop", "paused"], "{said:?}");
    assert_eq!(bench.desk.jobs.query()[0].io_status, IoStatus::NoSpace);
    bench.desk.verb(Verb::Resume);
    assert_eq!(bench.desk.jobs.query()[0].io_status, IoStatus::Ok);
    assert_eq!(bench.desk.until("null")[..2], ["running", "waiting"]);
    // What fails at the very end fails as a whole.
    bench.finalized();
    bench.start(bench.spec(), Copy { fails_at_the_end: true, ..bench.body() });
    let end = bench.desk.until("null");
    assert_eq!(end[3..], ["pending", "aborting", "FAILED cannot swap", "concluded", "null"]);
    assert_eq!(bench.finalized(), ["Complete", "abort"]);
}

#[test]
fn whoever_drains_the_disk_waits_for_a_turn_and_no_longer() {
    let bench = Bench::new();
    bench.start(Spec { speed: 16 * PIECE, ..bench.spec() }, bench.body());
    bench.desk.until("running");
    for _ in 0..20 {
        let quiesced = bench.from.quiesce();
        let before = bench.desk.jobs.query()[0].clone();
        assert!(!before.busy);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(bench.desk.jobs.query()[0].current, before.current, "it works meanwhile");
        drop(quiesced);
    }
    bench.desk.jobs.set_speed("j", 0).unwrap();
    // Gates that open and close as fast as they can.
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                drop(bench.from.quiesce());
            }
        });
        let end = bench.desk.until("null");
        over.store(true, Ordering::Relaxed);
        assert_eq!(end[0], "waiting", "and clients do not hear of it");
    });
    assert!(bench.is_copied());
}

#[test]
fn names_of_jobs() {
    let bench = Bench::new();
    let jobs = &bench.desk.jobs;
    for name in ["", "1", "a b", "#a", "ä"] {
        let err = jobs.check_id(name).unwrap_err().to_string();
        assert_eq!(err, format!("Invalid job ID '{name}'"));
    }
    bench.start(Spec { speed: 1, ..bench.spec() }, bench.body());
    let spec = Spec::new("j", JobKind::Create);
    let err = jobs.start(spec, bench.body()).unwrap_err().to_string();
    assert_eq!(err, "Job ID 'j' already in use");
    assert!(!jobs.are_over());
    jobs.cancel_all();
    bench.desk.until("null");
    assert!(jobs.are_over());
}

/// Does its work elsewhere.
struct Elsewhere(&'static AtomicU64);

impl Body for Elsewhere {
    fn run<'a>(&'a self, context: &'a Context) -> Fut<'a, ()> {
        Box::pin(async move {
            let count = self.0;
            context.set_total(1);
            let made = context.blocking(|| {
                std::thread::sleep(Duration::from_millis(20));
                Ok(41)
            });
            let made = made.await?;
            let main = context.on_main(move |_| {
                count.fetch_add(made + 1, Ordering::SeqCst);
                Ok(())
            });
            main.await?;
            context.set_current(1);
            Ok(())
        })
    }
}

#[test]
fn other_threads_help_and_other_kinds_have_fewer_events() {
    let desk = Desk::new();
    let count: &'static AtomicU64 = Box::leak(Box::default());
    for round in 1..=3 {
        desk.jobs.start(Spec::new("j", JobKind::Create), Elsewhere(count)).unwrap();
        let trace = ["created", "running", "waiting", "pending", "concluded"];
        assert_eq!(desk.until("concluded"), trace);
        assert_eq!(count.load(Ordering::SeqCst), 42 * round);
        let info = &desk.jobs.query()[0];
        assert_eq!((info.current, info.total, info.auto_dismiss), (1, 1, false));
        desk.verb(Verb::Dismiss);
        assert_eq!(desk.until("null"), ["null"]);
        // Long enough for the thread to end, or not: both must work.
        std::thread::sleep(Duration::from_millis(5 * (round - 1)));
    }
}

/// A request that the host takes its time for, as the test decides.
#[derive(Default)]
struct SlowRequest {
    state: Mutex<(bool, Option<std::task::Waker>)>,
    dropped_in_flight: AtomicBool,
}

impl SlowRequest {
    fn end(&self) {
        let mut state = self.state.lock().unwrap();
        state.0 = true;
        state.1.take().unwrap().wake();
    }

    async fn perform(&self) {
        struct InFlight<'a>(&'a SlowRequest);
        impl Drop for InFlight<'_> {
            fn drop(&mut self) {
                let is_over = self.0.state.lock().unwrap().0;
                self.0.dropped_in_flight.store(!is_over, Ordering::SeqCst);
            }
        }
        let _in_flight = InFlight(self);
        std::future::poll_fn(|cx| {
            let mut state = self.state.lock().unwrap();
            state.1 = Some(cx.waker().clone());
            if state.0 { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }
}

/// Has one such request under way, and would have another.
struct Patient {
    request: &'static SlowRequest,
    began: Sender<()>,
}

impl Body for Patient {
    fn run<'a>(&'a self, context: &'a Context) -> Fut<'a, ()> {
        Box::pin(async move {
            for _ in 0..2 {
                let _turn = context.turn().await;
                self.began.send(()).unwrap();
                self.request.perform().await;
            }
            Ok(())
        })
    }
}

/// What a request has with the kernel is not over when its future is dropped: it could land on what
/// the guest, or the graph, has made of the place since.
#[test]
fn a_cancelled_job_ends_what_it_has_in_flight() {
    let desk = Desk::new();
    let request: &'static SlowRequest = Box::leak(Box::default());
    let (began_to, began) = channel();
    let root = Bench::new().from;
    let spec = Spec { roots: vec![root.clone()], ..Spec::new("j", JobKind::Mirror) };
    desk.jobs.start(spec, Patient { request, began: began_to }).unwrap();
    began.recv().unwrap();
    desk.verb(Verb::Cancel);
    // The thread runs both in turn: when this one has run, the first has heard of its end.
    let count: &'static AtomicU64 = Box::leak(Box::default());
    desk.jobs.start(Spec::new("k", JobKind::Create), Elsewhere(count)).unwrap();
    desk.until("concluded");
    assert!(!request.dropped_in_flight.load(Ordering::SeqCst), "dropped in flight");
    request.end();
    assert_eq!(desk.until("null"), ["aborting", "CANCELLED", "concluded", "null"]);
    assert!(!request.dropped_in_flight.load(Ordering::SeqCst), "dropped in flight");
    assert!(began.try_recv().is_err(), "another request was begun");
}
