//! A guest as the checker: a small second disk, by which it is told of states and answers.
//!
//! ```text
//! explorer   show a state ─► ask ────────────────────────────────► verdict, or too late
//! guest      "ready" ─► reads the question ─► looks at the disk ─► "3 good" ─► reads the next one
//! ```
//!
//! Reading and writing sectors is all that a guest must be able to do, so any system can be asked.
//! What is read from the start of the disk, and what is written at [`ANSWER`], is text that ends with
//! a zero byte:
//!
//! | read at 0 | |
//! |---|---|
//! | `check N STATE MARK` | look at the disk: it is question N; MARK is the last one before the power cut |
//! | `wait` | there is no question now; ask again |
//! | `end` | there will be no more |
//!
//! | written | |
//! |---|---|
//! | `ready` | the guest has started |
//! | `N good` | the answer to question N |
//! | `N bad WHY` | and it may go on for more lines |
//!
//! A read waits up to [`PATIENCE`] for the next question, and no longer: a front-end that leaves waits
//! for it. Reads change nothing, so it does no harm that a guest looks for partitions here. A guest that
//! is `ready` again before it has answered was thrown over by what it saw.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use crate::block::driver::{BlockStatus, Driver, Limits, StatusKind};
use crate::crash::check::{Bounds, Verdict};
use crate::crash::name::StateName;
use crate::crash::stop::stopped;
use crate::error::{Error, Result};
use crate::io::{Buffers, Fut, clock};
use crate::units::{ByteRange, MIB, SECTOR_SIZE};

/// Name of the driver.
pub const NAME: &str = "mailbox";
/// Where answers are written.
pub const ANSWER: u64 = 4096;
/// Size of the disk: no system should find it too small.
const SIZE: u64 = MIB;
/// The most that is read as a question, and of an answer, in bytes.
const TEXT: usize = 4096;
/// The most of a mark that fits into a question.
const MARK: usize = 1024;
/// How long to wait between two looks at whether to end.
const LOOK: Duration = Duration::from_millis(100);
/// How long a read waits for a question.
pub const PATIENCE: Duration = Duration::from_secs(1);

/// See the [module](self). Between the explorer's thread and those that serve the disk.
#[derive(Debug, Default)]
pub struct Mailbox {
    state: Mutex<State>,
    heard: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// A guest is there that waits for a question.
    is_ready: bool,
    /// How many questions were asked.
    asked: u64,
    question: Question,
    /// The answer to the last one.
    answer: Option<(Verdict, String)>,
    /// Whether the guest knows that there will be no more.
    is_told: bool,
    /// Reads that wait for a question.
    readers: Vec<Waker>,
}

#[derive(Debug, Default)]
enum Question {
    #[default]
    None,
    Check(String),
    /// There will be no more.
    End,
}

impl Mailbox {
    /// Waits for a guest that is ready; whether there is one.
    pub fn wait_for_guest(&self, bounds: Bounds<'_>) -> bool {
        self.wait(self.lock(), bounds, |state| state.is_ready).is_ready
    }

    /// Asks the guest, which has `state` on its other disk by now, and waits for the verdict and what
    /// it says with it. One that takes too long has given a bad one.
    ///
    /// # Errors
    /// Kind [`Cancelled`](crate::error::ErrorKind::Cancelled) if it was to end.
    pub fn ask(
        &self,
        state: &StateName,
        mark: &str,
        bounds: Bounds<'_>,
    ) -> Result<(Verdict, String)> {
        let mut mailbox = self.lock();
        mailbox.asked += 1;
        mailbox.answer = None;
        let mark = one_line(mark);
        mailbox.question = Question::Check(format!("check {} {state} {mark}\n", mailbox.asked));
        mailbox.readers.drain(..).for_each(Waker::wake);
        let mut mailbox = self.wait(mailbox, bounds, |mailbox| mailbox.answer.is_some());
        mailbox.question = Question::None;
        if let Some(answer) = mailbox.answer.take() {
            return Ok(answer);
        }
        if bounds.stop.is_asked() {
            return Err(stopped());
        }
        // It may come yet, and then it is ready for the next one.
        mailbox.is_ready = false;
        let why = format!("the guest gave no answer in {} seconds", bounds.limit.as_secs());
        Ok((Verdict::Bad(why), String::new()))
    }

    /// Waits until something has come, or no longer.
    fn wait<'a>(
        &self,
        mut state: MutexGuard<'a, State>,
        bounds: Bounds<'_>,
        has_come: impl Fn(&State) -> bool,
    ) -> MutexGuard<'a, State> {
        let started = Instant::now();
        while !has_come(&state) && !bounds.stop.is_asked() && started.elapsed() < bounds.limit {
            let left = bounds.limit.saturating_sub(started.elapsed()).min(LOOK);
            let waited = self.heard.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state
    }

    /// There will be no more questions. A guest that is ready gets up to `limit` to read so.
    pub fn end(&self, limit: Duration) {
        let mut mailbox = self.lock();
        mailbox.question = Question::End;
        mailbox.readers.drain(..).for_each(Waker::wake);
        let waits = |mailbox: &mut State| mailbox.is_ready && !mailbox.is_told;
        drop(self.heard.wait_timeout_while(mailbox, limit, waits));
    }

    /// What the guest has written.
    fn hear(&self, text: &str) -> Result<()> {
        let (first, more) = text.split_once('\n').unwrap_or((text, ""));
        let mut words = first.trim_end().splitn(3, ' ');
        let (who, what) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let why = words.next().unwrap_or_default();
        let mut mailbox = self.lock();
        let number = who.parse().ok().filter(|number| (1..=mailbox.asked).contains(number));
        let answer = match (number, what) {
            _ if first.trim_end() == "ready" => {
                (Verdict::Bad("the guest started anew before it answered".into()), String::new())
            }
            (Some(_), "good") => (Verdict::Good, String::new()),
            (Some(_), "bad") if why.is_empty() => {
                (Verdict::Bad("the guest says that it is bad".into()), more.to_string())
            }
            (Some(_), "bad") => (Verdict::Bad(format!("the guest says: {why}")), more.to_string()),
            _ => return Err(unexpected(first)),
        };
        mailbox.is_ready = true;
        // An answer to an earlier question comes too late and says only that the guest is there.
        let is_asked = matches!(mailbox.question, Question::Check(_));
        if is_asked && mailbox.answer.is_none() && number.is_none_or(|n| n == mailbox.asked) {
            mailbox.answer = Some(answer);
        }
        self.heard.notify_all();
        Ok(())
    }

    /// What a read finds, as soon as there is something or enough time has passed.
    async fn question(&self) -> String {
        let mut late = pin!(clock::sleep(PATIENCE));
        poll_fn(|context| {
            let is_late = late.as_mut().poll(context).is_ready();
            let mut mailbox = self.lock();
            match &mailbox.question {
                Question::Check(text) if mailbox.answer.is_none() => Poll::Ready(text.clone()),
                Question::End => {
                    mailbox.is_told = true;
                    self.heard.notify_all();
                    Poll::Ready("end\n".into())
                }
                _ if is_late => Poll::Ready("wait\n".into()),
                _ => {
                    mailbox.readers.push(context.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }

    /// No thread panics while it holds the lock.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unexpected(text: &str) -> Error {
    let text: String = text.chars().take(80).collect();
    Error::invalid(format!(
        "the guest wrote {text:?} to its mailbox; 'ready', 'N good' and 'N bad WHY' are understood, \
         where N is the number of a question"
    ))
}

/// A mark as the rest of a line.
fn one_line(mark: &str) -> String {
    let mut len = mark.len().min(MARK);
    while !mark.is_char_boundary(len) {
        len -= 1;
    }
    mark[..len].chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// The mailbox as a disk.
#[derive(Debug)]
pub struct MailboxDisk(Arc<Mailbox>);

impl MailboxDisk {
    /// The disk of a mailbox.
    pub fn new(mailbox: Arc<Mailbox>) -> MailboxDisk {
        MailboxDisk(mailbox)
    }
}

/// Whatever else is done to it.
fn refuse<'a>() -> Fut<'a, ()> {
    Box::pin(async {
        let message = format!("a mailbox is written to at byte {ANSWER} and nowhere else");
        Err(Error::invalid(message))
    })
}

impl Driver for MailboxDisk {
    fn name(&self) -> &'static str {
        NAME
    }

    fn limits(&self) -> Limits {
        Limits {
            size: SIZE,
            request_alignment: SECTOR_SIZE,
            memory_alignment: 1,
            optimal_io: 0,
            discard_granularity: 0,
            read_only: false,
        }
    }

    fn read<'a>(&'a self, offset: u64, buf: Buffers) -> Fut<'a, ()> {
        Box::pin(async move {
            buf.fill_zero();
            if offset == 0 {
                let text = self.0.question().await;
                let len = buf.len().min(text.len() as u64);
                buf.slice(0, len).copy_from_slice(&text.as_bytes()[..len as usize]);
            }
            Ok(())
        })
    }

    fn write<'a>(&'a self, offset: u64, buf: Buffers, _fua: bool) -> Fut<'a, ()> {
        if offset != ANSWER {
            return refuse();
        }
        Box::pin(async move {
            let mut bytes = vec![0; TEXT.min(buf.len() as usize)];
            buf.slice(0, bytes.len() as u64).copy_to_slice(&mut bytes);
            let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
            self.0.hear(&String::from_utf8_lossy(&bytes[..end]))
        })
    }

    fn write_zeroes<'a>(&'a self, _range: ByteRange, _may_unmap: bool) -> Fut<'a, ()> {
        refuse()
    }

    fn discard<'a>(&'a self, _range: ByteRange) -> Fut<'a, ()> {
        refuse()
    }

    fn flush<'a>(&'a self) -> Fut<'a, ()> {
        Box::pin(async { Ok(()) })
    }

    fn block_status<'a>(&'a self, range: ByteRange) -> Fut<'a, BlockStatus> {
        let kind = StatusKind::Data;
        Box::pin(
            async move { Ok(BlockStatus { range, kind, host: None, depth: 0, compressed: false }) },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crash::stop::Stop;
    use crate::io::{AlignedBuf, block_on};

    const LONG: Duration = Duration::from_secs(60);
    const SHORT: Duration = Duration::from_millis(10);

    fn read(disk: &MailboxDisk) -> String {
        let mut buf = AlignedBuf::from_slice(&[1; 512], 512);
        block_on(disk.read(0, buf.buffers())).unwrap();
        let text = String::from_utf8(buf.to_vec()).unwrap();
        buf.as_slice().fill(0);
        text.trim_end_matches('\0').to_string()
    }

    fn write(disk: &MailboxDisk, text: &str) -> Result<()> {
        let mut bytes = text.as_bytes().to_vec();
        bytes.resize(512, 0);
        block_on(disk.write(ANSWER, AlignedBuf::from_slice(&bytes, 512).buffers(), false))
    }

    /// Asks, with a guest that reads the question and writes these answers.
    fn ask(mailbox: &Arc<Mailbox>, answers: &[&str]) -> (Verdict, String) {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let disk = MailboxDisk::new(Arc::clone(mailbox));
                let question = loop {
                    match read(&disk) {
                        question if question == "wait\n" => {}
                        question => break question,
                    }
                };
                let number = question.split(' ').nth(1).unwrap();
                assert_eq!(question, format!("check {number} E7:s=01 a ? mark\n"));
                for answer in answers {
                    let _ = write(&disk, &answer.replace('N', number));
                }
            });
            let (state, stop) = ("E7:s=01".parse().unwrap(), Stop::new().unwrap());
            mailbox.ask(&state, "a \n mark", Bounds { limit: LONG, stop: &stop }).unwrap()
        })
    }

    fn is_ready(mailbox: &Mailbox) -> bool {
        mailbox.wait_for_guest(Bounds { limit: SHORT, stop: &Stop::new().unwrap() })
    }

    fn bad(why: &str, output: &str) -> (Verdict, String) {
        (Verdict::Bad(why.into()), output.into())
    }

    #[test]
    fn questions_are_answered() {
        let mailbox = Arc::new(Mailbox::default());
        let disk = MailboxDisk::new(Arc::clone(&mailbox));
        assert!(!is_ready(&mailbox));
        assert_eq!(read(&disk), "wait\n", "a read ends, whatever happens");
        write(&disk, "ready\n").unwrap();
        assert!(is_ready(&mailbox));
        assert_eq!(ask(&mailbox, &["N good\n"]), (Verdict::Good, String::new()));
        let says = bad("the guest says: a file is gone", "its name\nand more\n");
        assert_eq!(ask(&mailbox, &["N bad a file is gone\nits name\nand more\n"]), says);
        assert_eq!(ask(&mailbox, &["N bad"]), bad("the guest says that it is bad", ""));
        mailbox.end(SHORT);
        assert_eq!(read(&disk), "end\n");
        // At once.
        mailbox.end(LONG);
    }

    #[test]
    fn a_guest_that_crashes_has_answered() {
        let mailbox = Arc::new(Mailbox::default());
        let anew = bad("the guest started anew before it answered", "");
        assert_eq!(ask(&mailbox, &["ready"]), anew);
        assert!(is_ready(&mailbox));
    }

    #[test]
    fn an_answer_that_comes_too_late_is_none() {
        let mailbox = Arc::new(Mailbox::default());
        let disk = MailboxDisk::new(Arc::clone(&mailbox));
        write(&disk, "ready").unwrap();
        let state = StateName::prefix(7);
        let stop = Stop::new().unwrap();
        let bounds = |limit| Bounds { limit, stop: &stop };
        let (verdict, _) = mailbox.ask(&state, "", bounds(SHORT)).unwrap();
        assert!(matches!(verdict, Verdict::Bad(how) if how.contains("no answer in")));
        assert!(!is_ready(&mailbox), "it may still be looking at that state");
        write(&disk, "1 good").unwrap();
        assert!(is_ready(&mailbox));
        assert_eq!(ask(&mailbox, &["1 bad", "N good"]), (Verdict::Good, String::new()));
        // Nor is one that nobody waits for any more.
        stop.ask();
        let err = mailbox.ask(&state, "", bounds(LONG)).unwrap_err();
        assert_eq!(err.kind(), crate::error::ErrorKind::Cancelled);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let mailbox = Arc::new(Mailbox::default());
        let disk = MailboxDisk::new(Arc::clone(&mailbox));
        for text in ["", "good", "1 good", "0 good", "readys", "\u{1f600}"] {
            let err = write(&disk, text).unwrap_err().to_string();
            assert!(err.contains("'N bad WHY'"), "{text}: {err}");
        }
        assert!(!is_ready(&mailbox));
        assert_eq!(ask(&mailbox, &["N fine", "N good"]), (Verdict::Good, String::new()));
        let elsewhere = AlignedBuf::zeroed(512, 512);
        let err = block_on(disk.write(0, elsewhere.buffers(), false)).unwrap_err();
        assert!(err.to_string().contains("at byte 4096"), "{err}");
    }
}
