//! Clients that mean harm, or break: none of them disturbs another.

use std::io::Write;
use std::time::Duration;

use crate::Served;
use crate::client::Qmp;
use crate::common::Random;

/// Resident memory of a process, in bytes.
fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

#[test]
fn garbage_costs_an_error_and_not_the_connection() {
    let mut served = Served::start(&[]);
    let mut qmp = served.client();
    for garbage in [
        &b"bad\n"[..],
        b"\xff",
        b"[[[[[[\xff",
        b"\"never ends\n",
        b"{\"execute\": \xfe\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0\0\0\0",
        b"}}}}]]]]",
    ] {
        qmp.send(garbage);
        // What follows a reset is read, whatever was before it.
        qmp.send(b"\xff\n{\"execute\": \"query-status\", \"id\": 7}");
        let mut errors = 0;
        while qmp.read().get("id").is_none() {
            errors += 1;
        }
        assert!(errors > 0, "{garbage:?} was taken");
    }
    served.assert_well();
}

/// A socket for an export is inherited, or it is none: no number takes from the process what it has.
#[test]
fn no_number_of_a_descriptor_takes_what_is_in_use() {
    let mut served = Served::start(&[]);
    let mut qmp = served.client();
    let fds = format!("/proc/{}/fd", served.backend.pid());
    let open = || -> std::collections::BTreeSet<String> {
        let names = std::fs::read_dir(&fds).unwrap().map(|entry| entry.unwrap().file_name());
        names.map(|name| name.into_string().unwrap()).collect()
    };
    let before = open();
    for number in &before {
        let add = format!(
            "{{'execute': 'block-export-add', 'arguments': {{'type': 'vhost-user-blk', 'id': 'e',
              'node-name': 'image', 'addr': {{'type': 'fd', 'str': '{number}'}}}}}}"
        );
        qmp.send(&add);
        let answer = qmp.read();
        assert!(answer["error"]["desc"].is_string(), "{number}: {answer}");
    }
    assert_eq!(open(), before);
    served.assert_well();
}

#[test]
fn depth_and_size_have_bounds() {
    let mut served = Served::start(&[]);
    let before = resident(served.backend.pid());
    let mut qmp = served.client();
    qmp.send("[".repeat(100_000));
    qmp.send("\u{1}");
    let first = qmp.read();
    assert_eq!(first["error"]["desc"], "JSON nesting depth limit exceeded");
    // 64 MiB of one string, of which 4 are kept.
    let mut big = served.client();
    big.send("\"");
    let piece = vec![b'x'; 1 << 20];
    for _ in 0..64 {
        big.send(&piece);
    }
    assert_eq!(big.read()["error"]["desc"], "JSON token size limit exceeded");
    big.send("\n{\"execute\": \"query-status\", \"id\": 1}");
    assert_eq!(big.read()["id"], 1);
    let grown = resident(served.backend.pid()).saturating_sub(before);
    assert!(grown < 16 << 20, "{grown} bytes more");
    served.assert_well();
}

#[test]
fn a_client_that_does_not_read_is_not_read_from() {
    let mut served = Served::start(&[]);
    let before = resident(served.backend.pid());
    let qmp = served.client();
    qmp.stream().set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    // Each answer has about 100 times the size of its question.
    let question = "{\"execute\": \"query-qmp-schema\"}".repeat(1000);
    let mut sent = 0;
    while (&mut qmp.stream()).write_all(question.as_bytes()).is_ok() {
        sent += question.len();
        assert!(sent < 64 << 20, "it takes questions for ever");
    }
    let grown = resident(served.backend.pid()).saturating_sub(before);
    assert!(grown < 16 << 20, "{grown} bytes more");
    served.assert_well();
    drop(qmp);
    served.assert_well();
}

#[test]
fn a_hundred_clients() {
    let mut served = Served::start(&[]);
    let mut clients: Vec<_> = (0..100).map(|_| served.client()).collect();
    for round in 0..3 {
        for qmp in &mut clients {
            qmp.send(format!("{{\"execute\": \"query-block\", \"id\": {round}}}"));
        }
        for qmp in &mut clients {
            assert_eq!(qmp.read()["id"], round);
        }
    }
    drop(clients);
    served.assert_well();
}

#[test]
fn more_clients_than_there_is_room_for_wait() {
    let mut served = Served::start(&[]);
    let mut clients: Vec<_> = (0..256).map(|_| Qmp::connect(&served.control)).collect();
    for qmp in &mut clients {
        qmp.read();
    }
    let mut late = Qmp::connect(&served.control);
    assert_eq!(late.read_within(Duration::from_millis(200)), None);
    clients.pop();
    assert!(late.read().get("QMP").is_some());
    drop(clients);
    served.assert_well();
}

#[test]
fn clients_that_leave_at_any_moment() {
    let mut served = Served::start(&[]);
    let random = &mut Random::new("qmp clients");
    let text = concat!(
        r#"{"execute": "qmp_capabilities"}{"execute": "query-block"}"#,
        r#"{"execute": "query-qmp-schema"}{"execute": "query-named-block-nodes"}"#,
    );
    for round in 0..300 {
        let mut qmp = Qmp::connect(&served.control);
        let len = random.below(text.len() as u64 + 1) as usize;
        if random.below(2) == 0 {
            qmp.read();
        }
        qmp.send(&text[..len]);
        if round % 3 == 0 {
            let _ = qmp.stream().shutdown(std::net::Shutdown::Write);
        }
    }
    served.assert_well();
    // Who only stops to send gets all answers.
    let mut qmp = Qmp::connect(&served.control);
    qmp.send(text);
    qmp.stream().shutdown(std::net::Shutdown::Write).unwrap();
    let answers = [(); 5].map(|()| qmp.read());
    assert!(answers[1..].iter().all(|answer| answer.get("return").is_some()));
    assert!(qmp.is_closed());
    served.assert_well();
}

#[test]
fn random_bytes_for_a_while() {
    let mut served = Served::start(&[]);
    let random = &mut Random::new("qmp clients");
    let words = [
        "{",
        "}",
        "[",
        "]",
        ":",
        ",",
        "\"execute\"",
        "\"query-block\"",
        "'id'",
        "1",
        "-",
        "\\",
        "\"",
        "'",
        "null",
        "\n",
        "\u{1}",
        "arguments",
        "1e9",
        "\"arguments\"",
    ];
    let mut clients: Vec<_> = (0..8).map(|_| served.client()).collect();
    for _ in 0..20_000 {
        let at = random.below(clients.len() as u64) as usize;
        let sent = if random.below(20) == 0 {
            clients[at].stream().write(&[random.below(256) as u8])
        } else {
            clients[at].stream().write(words[random.below(words.len() as u64) as usize].as_bytes())
        };
        sent.expect("the connection stays");
    }
    for qmp in &mut clients {
        qmp.send("\u{1}\u{1}");
        qmp.stream().write_all(b"\xff\n{\"execute\": \"query-status\", \"id\": \"end\"}").unwrap();
        while qmp.read().get("id").is_none_or(|id| id != "end") {}
    }
    served.assert_well();
}
