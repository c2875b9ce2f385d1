//! `--wait`: from the answer of a command to the end of the job it was about.

use std::time::{Duration, Instant};

use serde_json::{Map, Value};

use super::connection::Connection;
use crate::cli::progress::{Progress, ProgressArgs};
use crate::error::{Error, ErrorKind, Result};

/// How often to look at a job's progress.
const LOOK: Duration = Duration::from_millis(250);

/// The job that a command is about, by its arguments.
pub fn job_of(arguments: &Map<String, Value>) -> Option<String> {
    let names = ["job-id", "id", "device"];
    names.iter().find_map(|name| arguments.get(*name)?.as_str()).map(String::from)
}

/// Waits until the job is over. One that `command` has started may also be ready, or wait to be
/// finalized: what then happens is for others to decide.
///
/// # Errors
/// The job has failed, or was cancelled by somebody else.
pub fn until_over(
    connection: &mut Connection,
    command: &str,
    job: &str,
    progress: ProgressArgs,
) -> Result<()> {
    let is_verb = command.starts_with("job-") || command.starts_with("block-job-");
    let is_cancel = command.ends_with("-cancel");
    let failed = |why: &str| Err(Error::new(ErrorKind::Io, format!("job '{job}': {why}")));
    // Events tell of a job's end, unless it had ended before we came.
    let mut looks_without = 0;
    let mut bar = Bar { args: progress, label: job.to_string(), drawn: None };
    loop {
        while let Some(event) = connection.event(Some(Instant::now() + LOOK))? {
            let data = &event["data"];
            let is_ours = data["id"] == job || data["device"] == job;
            if !is_ours {
                continue;
            }
            match event["event"].as_str().unwrap_or_default() {
                "BLOCK_JOB_COMPLETED" => {
                    if let Some(error) = data["error"].as_str() {
                        return failed(error);
                    }
                }
                "BLOCK_JOB_CANCELLED" if !is_cancel => return failed("it was cancelled"),
                "JOB_STATUS_CHANGE" => match data["status"].as_str().unwrap_or_default() {
                    "null" => return bar.end(Ok(())),
                    "concluded" => return bar.end(result_of(connection, job, is_cancel)),
                    "ready" if !is_verb => return bar.end(Ok(())),
                    _ => {}
                },
                "BLOCK_JOB_PENDING" if !is_verb => return bar.end(Ok(())),
                _ => {}
            }
        }
        match find(connection, job)? {
            Some(info) => bar.draw(&info),
            None if looks_without > 0 => return bar.end(Ok(())),
            None => looks_without += 1,
        }
    }
}

/// How a job that is over has ended.
fn result_of(connection: &mut Connection, job: &str, is_cancel: bool) -> Result<()> {
    match find(connection, job)?.as_ref().and_then(|info| info["error"].as_str()) {
        Some(error) if !is_cancel => {
            Err(Error::new(ErrorKind::Io, format!("job '{job}': {error}")))
        }
        _ => Ok(()),
    }
}

fn find(connection: &mut Connection, job: &str) -> Result<Option<Value>> {
    let jobs = connection.execute("query-jobs", Value::Null)?;
    Ok(jobs.as_array().into_iter().flatten().find(|info| info["id"] == job).cloned())
}

/// The progress of a job, whose length may change.
struct Bar {
    args: ProgressArgs,
    label: String,
    /// With the length and place that were drawn last.
    drawn: Option<(Progress, u64, u64)>,
}

impl Bar {
    fn draw(&mut self, info: &Value) {
        let number = |name: &str| info[name].as_u64().unwrap_or(0);
        let (total, current) = (number("total-progress"), number("current-progress"));
        if self.drawn.as_ref().is_none_or(|(_, drawn, _)| *drawn != total) {
            self.drawn = Some((Progress::new(self.args, &self.label, total), total, 0));
        }
        if let Some((progress, _, at)) = &mut self.drawn {
            progress.advance(current.saturating_sub(*at));
            *at = (*at).max(current);
        }
    }

    fn end(self, result: Result<()>) -> Result<()> {
        if let Some((progress, ..)) = self.drawn {
            progress.finish();
        }
        result
    }
}
