//! Jobs that take layers out of a chain, killed before each change of a header or a mark: what an overlay
//! stands on is not given to a guest for writing, and what it needs no more may be removed or made anew, but
//! is not given to a guest that had gone on above it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use super::commit::{self, CommitRequest};
use super::stream::{self, StreamRequest};
use super::*;
use crate::block::{Graph, Node};
use crate::error::Result;
use crate::images::frozen::tests::die_after;
use crate::images::{
    self, CreateRequest, ImageFormat, Layers, Locking, OpenRequest, StateDir, frozen,
};
use crate::io::{HostFile, OpenOptions};

const SIZE: u64 = 1 << 20;

/// What the jobs thread wants of this one.
enum Wish {
    Task(MainTask),
    /// The job waits to be completed.
    Complete,
    /// The job has ended.
    End,
}

struct Desk(Sender<Wish>);

impl Listener for Desk {
    fn event(&self, event: &JobEvent) {
        let _ = match event {
            JobEvent::Ready(_) => self.0.send(Wish::Complete),
            JobEvent::Completed(..) => self.0.send(Wish::End),
            _ => Ok(()),
        };
    }

    fn on_main(&self, task: MainTask) {
        let _ = self.0.send(Wish::Task(task));
    }
}

fn file(dir: &Path, name: &str) -> HostFile {
    HostFile::open(&dir.join(name), OpenOptions { write: true, ..OpenOptions::default() }).unwrap()
}

/// A chain of images, the lowest first, each frozen below the next.
fn make(dir: &Path, chain: &[(&str, ImageFormat)]) {
    for (at, (name, format)) in chain.iter().enumerate() {
        let below = at.checked_sub(1).map(|at| chain[at]);
        images::create(&CreateRequest {
            size: Some(SIZE),
            backing: below.map(|(name, _)| name.into()),
            backing_format: below.map(|(_, format)| format),
            ..CreateRequest::new(dir.join(name), *format)
        })
        .unwrap();
        if let Some((below, _)) = below {
            frozen::mark(&file(dir, below), &dir.join(name));
        }
    }
}

/// The top, open for writing, and those below it.
fn open(dir: &Path, top: (&str, ImageFormat)) -> (Layers, Vec<Node>) {
    let mut layers = Layers::new(Graph::new(), Vec::new(), StateDir::None);
    let request = OpenRequest::write(dir.join(top.0)).format(Some(top.1)).locking(Locking::Off);
    let image = images::open(&request).unwrap();
    let top = layers.add_format(image, None, true).unwrap();
    (layers, chain::between(&top, None).unwrap())
}

/// Runs a job and kills it after some changes of headers and marks. Returns whether it came to that.
fn is_killed(dir: &Path, top: (&str, ImageFormat), start: &Start, after: u32) -> bool {
    let (to_main, wishes): (_, Receiver<Wish>) = channel();
    let jobs = Jobs::new(Desk(to_main));
    let (mut layers, nodes) = open(dir, top);
    start(&jobs, &mut layers, nodes).unwrap();
    die_after(Some(after));
    let deadline = Instant::now() + Duration::from_secs(60);
    let work = || {
        loop {
            match wishes.recv_timeout(deadline - Instant::now()).unwrap() {
                Wish::Task(task) => task(&mut layers),
                Wish::Complete => jobs.apply("j", Verb::Complete).unwrap(),
                Wish::End => break,
            }
        }
    };
    let died = catch_unwind(AssertUnwindSafe(work));
    die_after(None);
    if let Err(reason) = &died {
        assert_eq!(reason.downcast_ref(), Some(&"killed by the test"));
        // Nothing is closed in order.
        std::mem::forget((jobs, layers));
    }
    died.is_err()
}

type Start = dyn Fn(&Jobs, &mut Layers, Vec<Node>) -> Result<()>;

fn check(dir: &Path, name: &str) -> std::result::Result<(), String> {
    frozen::check(&file(dir, name), &[]).map_err(|err| err.to_string())
}

/// The names of an image and of those below it, as their headers say.
fn names(dir: &Path, top: (&str, ImageFormat)) -> Vec<String> {
    let request = OpenRequest::read(dir.join(top.0)).format(Some(top.1)).locking(Locking::Off);
    let name = |image: &images::Image| image.file.path().file_name().unwrap().to_owned();
    let (chain, stopped) = images::open_chain(&request).unwrap();
    assert!(stopped.is_none(), "{stopped:?}");
    chain.iter().map(|image| name(image).into_string().unwrap()).collect()
}

/// Kills a job at each of its steps. What leaves the chain is `chain[leaves]`. Unless it `is_committed` to
/// what it stands on, that keeps its mark for it when the others are gone.
fn at_each_step(chain: &[(&str, ImageFormat)], leaves: usize, is_committed: bool, start: &Start) {
    let top = chain[chain.len() - 1];
    let (mut before, mut over) = (0, 0);
    for after in 0.. {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        make(dir, chain);
        let killed = is_killed(dir, top, start, after);
        let left = names(dir, top);
        for name in &left[1..] {
            let refused = check(dir, name).unwrap_err();
            assert!(refused.contains("goes on in"), "{after}: {refused}");
        }
        let leaves = chain[leaves].0;
        if left.iter().any(|name| name == leaves) {
            before += 1;
        } else {
            over += 1;
            // Nothing stands on it. It is only not what the guest that lives has left off with.
            frozen::check_not_frozen(&file(dir, leaves), &[])
                .unwrap_or_else(|err| panic!("{after}: {err}"));
            let refused = check(dir, leaves).unwrap_err();
            let goes_on = format!("goes on in {};", dir.join(top.0).display());
            assert!(refused.contains(&goes_on), "{after}: {refused}");
            if let (Some(below), false) = (left.get(1), is_committed) {
                std::fs::rename(dir.join(top.0), dir.join("away")).unwrap();
                let refused = check(dir, below).unwrap_err();
                let needed = dir.join(leaves);
                assert!(refused.contains(needed.to_str().unwrap()), "{after}: {refused}");
                std::fs::rename(dir.join("away"), dir.join(top.0)).unwrap();
            }
            // Nobody needs it, so the operator may remove it.
            std::fs::remove_file(dir.join(leaves)).unwrap();
            for name in &left[1..] {
                let refused = check(dir, name).unwrap_err();
                let goes_on = format!("goes on in {}", dir.join(top.0).display());
                assert!(refused.contains(&goes_on), "{after}: {refused}");
            }
        }
        if !killed {
            break;
        }
    }
    assert!(before > 1 && over > 1, "{before} kills before, {over} after");
}

fn stream_to(base: Option<usize>) -> Box<Start> {
    Box::new(move |jobs, layers, nodes| {
        let request = StreamRequest {
            top: nodes[0].clone(),
            base: base.map(|at| nodes[at].clone()),
            backing_file: None,
            on_error: OnError::Report,
            filter_name: None,
        };
        stream::start(jobs, layers, request, Spec::new("j", JobKind::Stream))
    })
}

#[test]
fn a_stream_of_the_whole_chain_leaves_nothing_frozen_wherever_it_is_killed() {
    for format in [ImageFormat::Qcow2, ImageFormat::AddCow] {
        at_each_step(&[("base", ImageFormat::Raw), ("top", format)], 0, false, &*stream_to(None));
    }
}

#[test]
fn a_stream_to_a_base_leaves_that_marked_wherever_it_is_killed() {
    for format in [ImageFormat::Qcow2, ImageFormat::AddCow] {
        let chain = [("base", ImageFormat::Raw), ("mid", ImageFormat::Qcow2), ("top", format)];
        at_each_step(&chain, 1, false, &*stream_to(Some(2)));
    }
}

#[test]
fn a_commit_below_the_top_leaves_the_base_marked_wherever_it_is_killed() {
    let chain =
        [("base", ImageFormat::Raw), ("mid", ImageFormat::Qcow2), ("top", ImageFormat::Qcow2)];
    let start: &Start = &|jobs, layers, nodes| {
        let request = CommitRequest {
            top: nodes[1].clone(),
            base: nodes[2].clone(),
            is_active: false,
            backing_file: None,
            on_error: OnError::Report,
            filter_name: None,
        };
        commit::start(jobs, layers, request, Spec::new("j", JobKind::Commit))
    };
    at_each_step(&chain, 1, true, start);
}

/// Wherever it is killed, the disk goes on in one image: the top, or the base.
#[test]
fn a_commit_of_the_top_leaves_one_disk_wherever_it_is_killed() {
    let chain =
        [("base", ImageFormat::Raw), ("mid", ImageFormat::Qcow2), ("top", ImageFormat::Qcow2)];
    let start: &Start = &|jobs, layers, nodes| {
        let request = CommitRequest {
            top: nodes[0].clone(),
            base: nodes.last().unwrap().clone(),
            is_active: true,
            backing_file: None,
            on_error: OnError::Report,
            filter_name: None,
        };
        commit::start(jobs, layers, request, Spec::new("j", JobKind::Commit))
    };
    // Of the layer below, or also through one in between.
    for chain in [&[chain[0], chain[2]][..], &chain] {
        let (mut before, mut over) = (0, 0);
        for after in 0.. {
            let dir = tempfile::tempdir().unwrap();
            let dir = dir.path();
            make(dir, chain);
            let killed = is_killed(dir, chain[chain.len() - 1], start, after);
            match (check(dir, "top"), check(dir, "base")) {
                (Ok(()), Err(refused)) => {
                    assert!(refused.contains("goes on in"), "{after}: {refused}");
                    before += 1;
                }
                (Err(refused), Ok(())) => {
                    assert!(refused.contains("committed"), "{after}: {refused}");
                    over += 1;
                }
                other => panic!("{after}: {other:?}"),
            }
            if !killed {
                break;
            }
        }
        assert!(before > 0 && over > 1, "{before} kills before, {over} after");
    }
}
