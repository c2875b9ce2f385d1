//! The life of the process: how it starts, how it is found, how it ends.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::process::{Command, Output};
use std::time::Duration;

use vublk::frontend::{Client, Personality, Session, SessionOptions, Wire};

use crate::common::driver::Cut;
use crate::common::{Backend, Driver, Random, Setup, wait_until};
use crate::features::unwritten_pages;
use crate::model::Model;

/// Runs `vublk serve` with these words, and expects it to end at once.
fn serve(words: &[&str]) -> Output {
    let mut command = Command::new("timeout");
    command.args(["-s", "KILL", "20", env!("CARGO_BIN_EXE_vublk"), "serve"]);
    command.env_remove("VUBLK_LOG").env_remove("LISTEN_FDS").args(words).output().unwrap()
}

/// What it says when it refuses: one line, and not "success".
fn refusal(words: &[&str]) -> String {
    let output = serve(words);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code().is_some_and(|code| code > 0), "{words:?}: {}", output.status);
    let line = text.lines().find(|line| line.starts_with("vublk: "));
    line.unwrap_or_else(|| panic!("{words:?}: {text:?}")).to_string()
}

#[test]
fn sigterm_drains_flushes_and_the_next_process_goes_on() {
    for signal in [rustix::process::Signal::TERM, rustix::process::Signal::INT] {
        let mut random = Random::new("sigterm");
        let mut backend = Backend::start(&[]);
        let session = backend.open(SessionOptions::new(Personality::Qemu).queues(2));
        let mut driver = Driver::new(session, Cut::Random, random.clone());
        let mut model = Model::new(backend.content(), 512);
        for _ in 0..20 {
            model.load(&mut driver, &mut random, 200).unwrap();
        }
        backend.signal(signal);
        let status = backend.wait_end();
        assert!(status.success(), "{status}: {}", backend.log());
        assert!(!backend.socket.exists(), "the socket is left behind");
        assert!(matches!(unwritten_pages(&backend.image), None | Some(0)), "not flushed");
        let area = driver.session.inflight.as_ref().unwrap();
        for queue in 0..2 {
            assert!(area.inflight_heads(queue).is_empty(), "left in flight");
        }
        // The guest lives on, and so does its disk.
        backend.spawn();
        driver.session.reconnect().unwrap();
        model.drain(&mut driver).unwrap();
        model.compare(&backend.content());
        assert!(backend.log().contains("served requests="), "{}", backend.log());
    }
}

#[test]
fn a_process_without_a_client_ends_at_once() {
    let mut backend = Backend::start(&[]);
    wait_until("the socket", || UnixStream::connect(&backend.socket).is_ok());
    assert!(backend.terminate().success());
}

/// A name that was mistyped, or a hard link that somebody has put there.
#[test]
fn a_pidfile_takes_the_place_of_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let (pidfile, other) = (dir.path().join("pid"), dir.path().join("other"));
    for content in ["precious", "123\nprecious", "1".repeat(100).as_str()] {
        std::fs::write(&pidfile, content).unwrap();
        let mut refused = Setup::new(&["--pidfile", pidfile.to_str().unwrap()]).prepare();
        refused.spawn();
        assert!(!refused.wait_end().success());
        assert!(refused.log().contains("holds something else"), "{}", refused.log());
        assert_eq!(std::fs::read_to_string(&pidfile).unwrap(), content);
    }
    // That of one that was killed does not matter.
    std::fs::write(&pidfile, "123456\n").unwrap();
    let mut backend = Backend::start(&["--pidfile", pidfile.to_str().unwrap()]);
    backend.qemu();
    assert_eq!(std::fs::read_to_string(&pidfile).unwrap(), format!("{}\n", backend.pid()));
    // One that has taken its place is not ours.
    std::fs::write(&other, "1\n").unwrap();
    std::fs::rename(&other, &pidfile).unwrap();
    assert!(backend.terminate().success());
    assert_eq!(std::fs::read_to_string(&pidfile).unwrap(), "1\n");
}

#[test]
fn the_pidfile_names_the_process_and_guards_it() {
    let dir = tempfile::tempdir().unwrap();
    let pidfile = dir.path().join("pid");
    let text = pidfile.to_str().unwrap();
    let mut backend = Backend::start(&["--pidfile", text]);
    backend.qemu();
    let pid = std::fs::read_to_string(&pidfile).unwrap();
    assert_eq!(pid.trim(), backend.pid().to_string());
    let other = dir.path().join("disk");
    std::fs::write(&other, [0; 4096]).unwrap();
    let socket = dir.path().join("s");
    let words = ["--socket-path", socket.to_str().unwrap(), "--pidfile", text, "-f", "raw"];
    let line = refusal(&[&words[..], &[other.to_str().unwrap()]].concat());
    assert!(line.contains("pid file"), "{line}");
    assert!(backend.terminate().success());
    assert!(!pidfile.exists());
    // One that a killed process left is taken over.
    backend.spawn();
    backend.qemu();
    backend.kill();
    assert!(pidfile.exists());
    backend.spawn();
    backend.qemu();
    assert_eq!(std::fs::read_to_string(&pidfile).unwrap().trim(), backend.pid().to_string());
}

#[test]
fn a_listening_socket_can_be_inherited() {
    for (words, prelude) in [
        (&["--fd", "3"] as &[&str], "exec 3<&0 </dev/null"),
        // As systemd does it.
        (&[], "exec 3<&0 </dev/null; export LISTEN_FDS=1 LISTEN_PID=$$"),
    ] {
        let mut backend = Setup::new(words).without_socket().prelude(prelude).prepare();
        let listener = UnixListener::bind(&backend.socket).unwrap();
        backend.spawn_with(Some(OwnedFd::from(listener.try_clone().unwrap())));
        for round in 0..3 {
            let mut session = backend.qemu();
            session.write(0, 0, &[round; 512]).unwrap();
        }
        // It belongs to whoever made it, and is still there for the next process.
        assert!(backend.terminate().success(), "{}", backend.log());
        assert!(backend.socket.exists());
        backend.spawn_with(Some(OwnedFd::from(listener)));
        assert_eq!(backend.qemu().read(0, 0, 512).unwrap(), [2; 512]);
    }
}

#[test]
fn a_connected_socket_serves_one_client_and_ends() {
    let mut backend =
        Setup::new(&["--fd", "3"]).without_socket().prelude("exec 3<&0 </dev/null").prepare();
    let (ours, theirs) = UnixStream::pair().unwrap();
    backend.spawn_with(Some(OwnedFd::from(theirs)));
    let client = Client::new(Wire::from_stream(ours), Duration::from_secs(10));
    let mut session =
        Session::negotiate(client, &backend.socket, SessionOptions::default()).unwrap();
    session.start().unwrap();
    session.write(0, 0, &[7; 512]).unwrap();
    drop(session);
    assert!(backend.wait_end().success(), "{}", backend.log());
    assert_eq!(backend.content()[..512], [7; 512]);
}

#[test]
fn readiness_is_announced_when_clients_can_come() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut backend = Setup::new(&[]).env("NOTIFY_SOCKET", &path).start();
    let mut bytes = [0; 256];
    let n = socket.recv(&mut bytes).unwrap();
    assert!(String::from_utf8_lossy(&bytes[..n]).lines().any(|line| line == "READY=1"));
    // At once, without trying again.
    Client::connect(&backend.socket, Duration::from_secs(10)).unwrap().get_features().unwrap();
    assert!(backend.terminate().success());
    let n = socket.recv(&mut bytes).unwrap();
    assert!(String::from_utf8_lossy(&bytes[..n]).contains("STOPPING=1"));
}

#[test]
fn sockets_in_the_way_are_replaced_only_if_nobody_listens() {
    let mut backend = Backend::start(&[]);
    backend.qemu();
    let socket = backend.socket.to_str().unwrap().to_string();
    let other = backend.dir.path().join("other.raw");
    std::fs::write(&other, [0; 4096]).unwrap();
    let image = other.to_str().unwrap();
    let line = refusal(&["--socket-path", &socket, "-f", "raw", image]);
    assert!(line.contains("in use") && line.contains(&socket), "{line}");
    // The one that listens was not harmed, even with a client and others waiting.
    let mut session = backend.qemu();
    let waiting = UnixStream::connect(&backend.socket).unwrap();
    refusal(&["--socket-path", &socket, "-f", "raw", image]);
    session.write(0, 0, &[1; 512]).unwrap();
    drop((session, waiting));
    backend.kill();
    assert!(backend.socket.exists());
    backend.spawn();
    backend.qemu();
    backend.wait_log("stale socket replaced");
    // Something that is no socket is left alone.
    let file = backend.dir.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    let line = refusal(&["--socket-path", file.to_str().unwrap(), "-f", "raw", image]);
    assert!(line.contains("not a socket"), "{line}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
}

#[test]
fn misuse_is_refused_in_one_line() {
    let backend = Backend::start(&[]);
    backend.qemu();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let socket = path("s");
    let long = path(&"x".repeat(120));
    std::fs::write(path("empty"), "").unwrap();
    std::fs::write(path("odd"), [0; 1000]).unwrap();
    let locked = backend.image.to_str().unwrap();
    for (words, says) in [
        (vec!["--socket-path", &long, "-f", "raw", locked], "107"),
        (vec!["--socket-path", &socket, "-f", "raw", locked], "another process"),
        (vec!["--socket-path", &socket, &path("missing")], "missing"),
        (vec!["--socket-path", &socket, "-f", "raw", &path("empty")], "empty"),
        (vec!["--socket-path", &socket, "-f", "raw", &path("odd")], "1000"),
        (vec!["--socket-path", &socket, dir.path().to_str().unwrap()], "directory"),
        (vec!["--socket-path", &path("no/such/dir"), "-f", "raw", locked], ""),
        (vec!["-f", "raw", locked], "--socket-path"),
        (vec!["--fd", "77", "-f", "raw", locked], ""),
    ] {
        let line = refusal(&words);
        assert!(line.contains(says), "{words:?}: {line}");
        assert!(!std::path::Path::new(&socket).exists(), "{words:?}: a socket is left behind");
    }
}

#[test]
fn capabilities_are_json() {
    let output = serve(&["--print-capabilities"]);
    assert!(output.status.success());
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["type"], "block");
    let features = json["features"].as_array().unwrap();
    assert!(features.contains(&"read-only".into()) && features.contains(&"blk-file".into()));
}

#[test]
fn a_client_that_says_nothing_does_not_hold_the_end_up() {
    let mut backend = Backend::start(&[]);
    let mut client = None;
    wait_until("the socket", || {
        client = UnixStream::connect(&backend.socket).ok();
        client.is_some()
    });
    assert!(backend.terminate().success());
    // It learns that we have gone.
    let mut client = client.expect("a connection");
    client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let end = client.read(&mut [0; 1]).map_err(|err| err.kind());
    assert!(matches!(end, Ok(0) | Err(std::io::ErrorKind::ConnectionReset)), "{end:?}");
}
