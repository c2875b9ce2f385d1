//! `vublk bench`: a load generator for any vhost-user-blk back-end.
//!
//! ```text
//!  run ─► start (optional: the back-end's own start, timed)
//!      ─► Session: connect, negotiate, start queues
//!      ─► idle (optional: what the back-end does when nothing happens)
//!      ─► load: one thread for each queue, blocking on its call eventfd
//!           ramp ─► measure ─► stop ─► (verify: read everything back)
//!      ─► report: table or JSON
//! ```
//!
//! Modules: [`args`] the options, [`load`] the threads, [`verify`] the pattern that proves
//! integrity, [`start`] the back-end as a child process, [`machine`] what no back-end can do
//! without, [`report`] what is printed.

pub mod args;
pub mod load;
pub mod machine;
pub mod report;
pub mod start;
pub mod verify;

use std::thread;
use std::time::{Duration, Instant};

pub use args::BenchArgs;

use crate::error::{Error, Result, ResultExt};
use crate::frontend::process::{self, Footprint};
use crate::frontend::{Client, Session, SessionOptions, SlotShape, Wire, client::feature};
use crate::units::MIB;
use args::Output;
use report::{Backend, Idle, Report};
use start::Child;

/// Runs the command.
pub fn run(args: &BenchArgs) -> Result<()> {
    if args.machine {
        let machine = machine::Machine::measure()?;
        match args.output {
            Output::Human => print!("{}", machine.table()),
            Output::Json => println!("{}", machine.json()?),
        }
        return Ok(());
    }
    args.check()?;
    if let Some(command) = args.start.as_deref().filter(|_| args.start_rounds > 0) {
        let rounds = start::measure(args, command)?;
        return report::print_start(args, &rounds);
    }
    let (child, wire) = match &args.start {
        Some(command) => {
            let (child, wire) = Child::spawn(command, args.socket())?;
            (Some(child), wire)
        }
        None => {
            let deadline = Instant::now() + args.timeout;
            (None, Wire::connect_retry(args.socket(), Duration::from_millis(1), deadline)?)
        }
    };
    let report = measure(args, wire, child.as_ref())?;
    match args.output {
        Output::Human => print!("{}", report.table()),
        Output::Json => println!("{}", report.json()?),
    }
    if let Some(child) = child {
        child.stop()?;
    }
    match report.failures() {
        0 => Ok(()),
        n => Err(Error::corrupt(format!("{n} requests failed or returned wrong data"))),
    }
}

/// Connects, loads and measures.
fn measure(args: &BenchArgs, wire: Wire, child: Option<&Child>) -> Result<Report> {
    let client = Client::new(wire, args.timeout);
    let mut session = Session::negotiate(client, args.socket(), session_options(args))?;
    session.start()?;
    let pid = match args.pid.or(child.map(Child::pid)) {
        Some(pid) => Some(pid),
        None => session.client.wire().peer_pid().filter(|pid| process::usage(*pid).is_ok()),
    };
    if session.features() & feature::RO != 0 && args.writes() {
        return Err(Error::invalid("the disk is read-only; --rw read or randread would do"));
    }
    let mut report = Report::new(args, &session, pid);
    report.start_ms = child.map(Child::socket_ms);
    if let (Some(seconds), Some(pid)) = (args.idle, pid) {
        report.idle = Some(idle(pid, seconds)?);
    }
    if args.duration.is_zero() && args.requests.is_none() {
        return Ok(report);
    }
    let outcome = load::run(args, &mut session, pid)?;
    report.add_load(args, &outcome);
    report.backend = outcome.spent.as_ref().map(Backend::new);
    if !outcome.outages.is_empty() {
        report.pid = report.backend.map(|backend| backend.pid);
    }
    session.stop().context(|| "cannot stop the queues")?;
    Ok(report)
}

/// The session that the options ask for.
fn session_options(args: &BenchArgs) -> SessionOptions {
    let shape = slot_shape(args);
    let rings = u64::from(args.queues) * 64 * 1024;
    let mut options = SessionOptions::new(args.personality.into());
    options.queues = args.queues;
    options.queue_size = args.queue_size;
    options.memory = rings + u64::from(args.queues) * (shape.memory() + 4 * MIB) + MIB;
    options.pages = args.pages();
    options.timeout = args.timeout;
    if args.no_indirect {
        options.features &= !feature::INDIRECT_DESC;
    }
    if args.no_event_idx {
        options.features &= !feature::EVENT_IDX;
    }
    options
}

/// The slots that the options ask for.
fn slot_shape(args: &BenchArgs) -> SlotShape {
    SlotShape {
        count: args.iodepth,
        data: args.block_size,
        segment: args.segment,
        indirect: !args.no_indirect,
    }
}

/// Watches a back-end that has nothing to do.
fn idle(pid: u32, time: Duration) -> Result<Idle> {
    // What connecting set off should be over.
    thread::sleep(Duration::from_millis(300));
    let before = process::usage(pid)?;
    let begin = Instant::now();
    thread::sleep(time);
    let after = process::usage(pid)?;
    let seconds = begin.elapsed().as_secs_f64();
    let Footprint { rss, private, .. } = process::footprint(pid)?;
    Ok(Idle {
        seconds,
        cpu_us: (after.cpu - before.cpu).as_secs_f64() * 1e6,
        switches: after.switches.saturating_sub(before.switches),
        threads: after.threads,
        rss,
        private,
    })
}
