//! Greeting, negotiation, framing, several clients, who may connect, the end.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use serde_json::json;

use crate::Served;
use crate::client::Qmp;
use crate::common::Setup;

#[test]
fn greeting_and_negotiation() {
    let served = Served::start(&["--name", "vm 7"]);
    let mut qmp = Qmp::connect(&served.control);
    let greeting = qmp.read();
    let version = &greeting["QMP"]["version"];
    assert!(version["qemu"]["major"].is_u64(), "{greeting}");
    assert!(version["package"].as_str().unwrap().starts_with("vublk "), "{greeting}");
    assert_eq!(greeting["QMP"]["capabilities"], json!(["oob"]));
    let not_found = |desc: &str| ("CommandNotFound".to_string(), desc.to_string());
    assert_eq!(
        qmp.error(r#"{"execute": "query-version"}"#),
        not_found("Expecting capabilities negotiation with 'qmp_capabilities'")
    );
    assert_eq!(qmp.ok(r#"{"execute": "qmp_capabilities"}"#), json!({}));
    assert_eq!(
        qmp.error(r#"{"execute": "qmp_capabilities"}"#),
        not_found("Capabilities negotiation is already complete, command ignored")
    );
    assert_eq!(qmp.error(r#"{"execute": "x"}"#), not_found("The command x has not been found"));
    assert_eq!(&qmp.ok(r#"{"execute": "query-version"}"#), version);
    assert_eq!(qmp.ok(r#"{"execute": "query-name"}"#), json!({"name": "vm 7"}));
    assert_eq!(qmp.ok(r#"{"execute": "query-tpm"}"#), json!([]));
}

#[test]
fn ids_come_back_whatever_they_are() {
    let served = Served::start(&[]);
    let mut qmp = served.client();
    for id in [json!(1), json!("__qmp#00001"), json!({"a": [1, null]}), json!(null), json!([])] {
        for command in ["query-status", "nope", "query-block"] {
            let answer = qmp.ask(json!({"execute": command, "id": id}).to_string());
            assert_eq!(answer.get("id"), Some(&id), "{answer}");
        }
    }
    assert!(qmp.ask(r#"{"execute": "query-status"}"#).get("id").is_none());
}

#[test]
fn structure_frames_and_lines_do_not() {
    let served = Served::start(&[]);
    let mut qmp = served.client();
    qmp.send(r#"{"execute":"query-status","id":1}{"execute":"query-tpm","id":2} {'execute':"#);
    assert_eq!([qmp.read()["id"].clone(), qmp.read()["id"].clone()], [1, 2]);
    qmp.send("\n\n'query-name', 'id': 3\n}");
    assert_eq!(qmp.read()["id"], 3);
    // A long line of commands, some of which run on another thread: answers keep the order.
    let line: String = (0..500)
        .map(|id| {
            let command = ["query-status", "query-block", "nope", "query-jobs"][id % 4];
            json!({"execute": command, "id": id}).to_string()
        })
        .collect();
    qmp.send(line);
    for id in 0..500 {
        assert_eq!(qmp.read()["id"], id);
    }
}

#[test]
fn each_client_gets_each_event() {
    let served = Served::start(&[]);
    let mut clients = [(); 3].map(|()| served.client());
    let mut silent = Qmp::connect(&served.control);
    silent.read();
    let socket = served.control.with_file_name("second.sock");
    let image = served.control.with_file_name("second.raw");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let file = json!({"driver": "file", "filename": image});
    let node = json!({"driver": "raw", "node-name": "n1", "file": file});
    clients[0].ok(json!({"execute": "blockdev-add", "arguments": node}).to_string());
    let export = json!({"type": "vhost-user-blk", "id": "e1", "node-name": "n1",
                        "addr": {"type": "unix", "path": socket}});
    clients[0].ok(json!({"execute": "block-export-add", "arguments": export}).to_string());
    clients[0].ok(r#"{"execute": "block-export-del", "arguments": {"id": "e1"}}"#);
    // The first one has had it before the answer, perhaps.
    for client in &mut clients[1..] {
        assert_eq!(client.event("BLOCK_EXPORT_DELETED"), json!({"id": "e1"}));
    }
    // Who has not ended the negotiation gets none.
    assert!(silent.ask(r#"{"execute": "qmp_capabilities"}"#).get("return").is_some());
}

#[test]
fn out_of_band() {
    let served = Served::start(&[]);
    let mut qmp = Qmp::connect(&served.control);
    qmp.read();
    let desc = qmp.error(r#"{"exec-oob": "qmp_capabilities"}"#).1;
    assert_eq!(desc, "QMP input member 'exec-oob' is unexpected");
    qmp.ok(r#"{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}"#);
    qmp.ok(r#"{"exec-oob": "query-jobs"}"#);
    let desc = qmp.error(r#"{"exec-oob": "quit"}"#).1;
    assert_eq!(desc, "The command quit does not support OOB");
}

fn permissions(socket: &Path) -> u32 {
    std::fs::metadata(socket).unwrap().permissions().mode() & 0o777
}

#[test]
fn who_may_connect() {
    let mode = |served: &Served| permissions(&served.control);
    assert_eq!(mode(&Served::start(&[])), 0o600);
    assert_eq!(mode(&Served::start(&["--control-mode", "640"])), 0o640);
    let group = rustix::process::getegid().as_raw().to_string();
    assert_eq!(mode(&Served::start(&["--control-group", &group])), 0o660);
}

#[test]
fn who_may_use_the_disks() {
    let group = rustix::process::getegid().as_raw().to_string();
    // The control socket is another matter.
    let served = Served::start(&["--socket-group", &group]);
    assert_eq!(permissions(&served.backend.socket), 0o660);
    assert_eq!(permissions(&served.control), 0o600);
    // Sockets that are made later, too.
    let socket = served.control.with_file_name("e1.sock");
    let export = json!({"type": "vhost-user-blk", "id": "e1", "node-name": "image",
        "addr": {"type": "unix", "path": socket}});
    served.client().ok(json!({"execute": "block-export-add", "arguments": export}).to_string());
    assert_eq!(permissions(&socket), 0o660);
    let served = Served::start(&["--socket-mode", "642"]);
    assert_eq!(permissions(&served.backend.socket), 0o642);
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_respected() {
    let mut served = Served::start(&[]);
    let control = served.control.to_str().unwrap().to_string();
    let mut second = Setup::new(&["--control", &control]).start();
    assert_eq!(second.wait_end().code(), Some(1));
    assert!(second.log().contains("a live process listens on it"), "{}", second.log());
    served.assert_well();
    served.backend.kill();
    assert!(served.control.exists());
    served.backend.spawn();
    crate::common::wait_until("a new control socket", || {
        std::os::unix::net::UnixStream::connect(&served.control).is_ok()
    });
    served.assert_well();
    assert!(served.backend.terminate().success());
    assert!(!served.control.exists(), "it leaves nothing behind");
    // Neither does it touch what is no socket.
    drop(UnixListener::bind(&served.control).unwrap());
    std::fs::remove_file(&served.control).unwrap();
    std::fs::write(&served.control, "precious").unwrap();
    let mut third = Setup::new(&["--control", &control]).start();
    assert_eq!(third.wait_end().code(), Some(78));
    assert_eq!(std::fs::read(&served.control).unwrap(), b"precious");
}

#[test]
fn quit_answers_and_ends() {
    let mut served = Served::start(&[]);
    let mut other = served.client();
    let mut qmp = served.client();
    assert_eq!(qmp.ok(r#"{"execute": "quit", "id": "last"}"#), json!({}));
    assert!(qmp.is_closed() && other.is_closed());
    assert!(served.backend.wait_end().success());
    assert!(!served.control.exists() && !served.backend.socket.exists());
}
