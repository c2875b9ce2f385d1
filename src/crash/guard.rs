//! Ends checkers that outlive us.
//!
//! A process that is killed cannot end what it has started, and a checker without it would check nothing
//! and hold the memory and the files of a state. So a shell waits at a pipe that we alone hold, and when
//! that is closed it kills whatever has our name in its environment: checkers, what they have begun, and
//! what has left their process group since.
//!
//! A child that is just being started holds the pipe until it is what it is to be, name included; so
//! none is missed. What clears its environment, or belongs to another user, is.

use std::os::unix::process::CommandExt;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Where our name is in the environment.
const VARIABLE: &str = "VUBLK_EXPLORATION";

/// Its argument is the name. What is killed may have started others just before; so it is done again,
/// until there are none and once more after a while.
const SCRIPT: &str = r#"
trap '' HUP INT TERM
read -r nothing
end() {
  found=
  for file in $(grep -lF "$1" /proc/[0-9]*/environ 2>/dev/null); do
    pid=${file#/proc/}
    kill -9 "${pid%/environ}" 2>/dev/null && found=1
  done
}
tries=0
while end "$1"; [ -n "$found" ] && [ $tries -lt 100 ]; do tries=$((tries + 1)); done
sleep 1
end "$1"
"#;

/// The shell that waits for our end: its standard input, which is closed when we end, however. Started
/// with the first checker, and there until the end.
static GUARD: OnceLock<Option<ChildStdin>> = OnceLock::new();
/// What the names of all our checkers begin with.
static NAME: OnceLock<String> = OnceLock::new();

fn start(name: &str) -> std::io::Result<ChildStdin> {
    let mut shell = Command::new("sh");
    shell.args(["-c", SCRIPT, "vublk-guard", &format!("{VARIABLE}={name}")]);
    shell.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    // What the terminal sends is not for it.
    let mut child = shell.current_dir("/").process_group(0).spawn()?;
    let pipe = child.stdin.take();
    pipe.ok_or_else(|| std::io::Error::other("a shell without its standard input"))
}

/// Has a checker, and all that it starts, end with us. Returns what tells them from those of all other
/// checks, in their environment.
pub(super) fn mark(command: &mut Command) -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let name = NAME.get_or_init(|| format!("{}.", uuid::Uuid::new_v4().simple()));
    GUARD.get_or_init(|| {
        let warn = |err: &std::io::Error| {
            tracing::warn!("checkers will not end should this process be killed: sh: {err}");
        };
        start(name).inspect_err(warn).ok()
    });
    let value = format!("{name}{}", COUNT.fetch_add(1, Ordering::Relaxed));
    command.env(VARIABLE, &value);
    format!("{VARIABLE}={value}")
}
