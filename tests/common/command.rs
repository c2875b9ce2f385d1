//! The commands of the program under test, and other tools to compare them with.

use std::path::Path;
use std::process::{Command, Output};

/// The program under test, in `dir`, with quiet logs. Exit code 124 if it does not end: a server that
/// was to be refused, say.
pub fn vublk(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new("timeout");
    command.current_dir(dir).env_remove("VUBLK_LOG").env_remove("LISTEN_FDS");
    command.args(["--kill-after=10", "300", env!("CARGO_BIN_EXE_vublk")]);
    command.args(["--log-level", "error"]).args(args).output().expect("it starts")
}

/// Runs it, demands success, and returns what it printed.
pub fn ok(dir: &Path, args: &[&str]) -> String {
    ok_or(dir, args, 0)
}

/// Runs it, demands this exit code, and returns what it printed.
pub fn ok_or(dir: &Path, args: &[&str], code: i32) -> String {
    let output = vublk(dir, args);
    assert_eq!(output.status.code(), Some(code), "vublk {args:?}: {output:?}");
    String::from_utf8(output.stdout).expect("output in UTF-8")
}

/// Runs it, demands this exit code, and returns the one line on stderr.
pub fn fails(dir: &Path, args: &[&str], code: i32) -> String {
    let output = vublk(dir, args);
    let stderr = String::from_utf8(output.stderr).expect("messages in UTF-8");
    assert_eq!(output.status.code(), Some(code), "vublk {args:?}: {stderr}");
    let line = stderr.strip_suffix('\n').unwrap_or_else(|| panic!("vublk {args:?}: {stderr:?}"));
    assert!(line.starts_with("vublk: ") && !line.contains('\n'), "vublk {args:?}: {stderr}");
    line["vublk: ".len()..].to_string()
}

/// Whether a tool is there; says so if not.
pub fn have(tool: &str) -> bool {
    let found = Command::new(tool).arg("--version").output().is_ok_and(|o| o.status.success());
    if !found {
        super::skip(&format!("{tool} is not installed"));
    }
    found
}

/// Runs another tool in `dir`.
pub fn tool(dir: &Path, name: &str, args: &[&str]) -> Output {
    let output = Command::new(name).current_dir(dir).args(args).output();
    output.unwrap_or_else(|err| panic!("{name}: {err}"))
}

/// Runs another tool in `dir`, demands success, and returns what it printed.
pub fn tool_ok(dir: &Path, name: &str, args: &[&str]) -> String {
    let output = tool(dir, name, args);
    assert!(output.status.success(), "{name} {args:?}: {output:?}");
    String::from_utf8(output.stdout).expect("output in UTF-8")
}
