//! Messages in pieces, without sense or with too many files, and how a connection ends.

use super::*;

/// 32 files are what the protocol's implementations take.
#[test]
fn as_many_files_as_there_may_be() {
    let fe = FrontEnd::new(1);
    fe.negotiate(FEATURES);
    let mut table = words(&[32, 0]);
    for slot in 0..32 {
        table.extend(longs(&[slot * 0x2000, 0x1000, BASE + slot * 0x2000, 0]));
    }
    assert!(fe.accepts(R::SET_MEM_TABLE, &table, &[fe.memory.as_fd(); 32]));
    assert_eq!(fe.calls(), [Call::Memory(32)]);
}

#[test]
fn messages_in_pieces() {
    let fe = FrontEnd::new(1);
    fe.negotiate(FEATURES);
    let mut message = words(&[R::SET_VRING_NUM as u32, 9, 8]);
    message.extend(words(&[0, 64]));
    let pause = || std::thread::sleep(Duration::from_millis(20));
    for cut in [1, 11, 12, 13, 19] {
        send_bytes(&fe.socket, &message[..cut], &[]).unwrap();
        pause();
        send_bytes(&fe.socket, &message[cut..], &[]).unwrap();
        assert_eq!(long(&fe.answer(R::SET_VRING_NUM).0), 0, "cut at {cut}");
    }
    // Byte by byte.
    for byte in &message {
        send_bytes(&fe.socket, &[*byte], &[]).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(long(&fe.answer(R::SET_VRING_NUM).0), 0);
}

#[test]
fn what_cannot_be_understood_ends_the_connection_with_a_reason() {
    type Script = fn(&FrontEnd);
    let cases: [(&str, Script); 6] = [
        ("message 99 ends the connection", |fe| {
            send_message(&fe.socket, 99, 1, &[], &[]).unwrap();
        }),
        ("GET_STATUS ends the connection", |fe| fe.tell(R::GET_STATUS, &[], &[])),
        ("SET_VRING_ENABLE ends the connection: it needs VHOST_USER_F_PROTOCOL_FEATURES", |fe| {
            fe.tell(R::SET_FEATURES, &longs(&[VERSION_1]), &[]);
            fe.tell(R::SET_VRING_ENABLE, &words(&[0, 1]), &[]);
        }),
        ("the front-end left in the middle", |fe| {
            send_bytes(&fe.socket, &words(&[1, 1]), &[]).unwrap();
            fe.socket.shutdown(std::net::Shutdown::Write).unwrap();
        }),
        ("carries more than 32 files", |fe| {
            let event = event();
            fe.tell(R::SET_VRING_KICK, &longs(&[0]), &[event.as_fd(); 33]);
        }),
        ("SET_BACKEND_REQ_FD ends the connection: invalid AF_UNIX SOCK_STREAM", |fe| {
            let file = fe.memory.try_clone().unwrap();
            fe.tell(R::SET_BACKEND_REQ_FD, &[], &[file.as_fd()]);
        }),
    ];
    for (words, script) in cases {
        let fe = FrontEnd::new(1);
        fe.run(1);
        script(&fe);
        match fe.thread.join().unwrap() {
            Err(err) => assert!(err.to_string().contains(words), "{words}: {err}"),
            Ok(ended) => panic!("{words}: {ended:?}"),
        }
    }
}

#[test]
fn stop_drains_and_closes() {
    let fe = FrontEnd::new(2);
    fe.run(2);
    fe.stop.request();
    assert_eq!(fe.thread.join().unwrap().unwrap(), Ended::Stopped);
    assert!(fe.rings.live().is_empty());
    assert_eq!((&fe.socket).read(&mut [0]).unwrap(), 0, "closed");
    // During a drain, whose answer still gets out.
    let fe = FrontEnd::new(1);
    fe.run(1);
    let (entered, in_drain) = mpsc::channel();
    *fe.rings.on_stop.lock().unwrap() = Some(Box::new(move |_| {
        entered.send(()).unwrap();
        std::thread::sleep(Duration::from_millis(50));
    }));
    fe.tell(R::GET_VRING_BASE, &words(&[0, 0]), &[]);
    in_drain.recv().unwrap();
    fe.stop.request();
    fe.answer(R::GET_VRING_BASE);
    assert_eq!(fe.thread.join().unwrap().unwrap(), Ended::Stopped);
}

#[test]
fn somebody_who_only_looks() {
    let fe = FrontEnd::new(1);
    assert_eq!(fe.leave().unwrap(), Ended::Silent);
}

/// With no file descriptors left a message is not misread: the connection ends and says why, and
/// the process goes on. The limit is the process's, so this runs in one of its own.
#[test]
fn out_of_file_descriptors() {
    let status = std::process::Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "--ignored",
            "device::message_tests::wire::out_of_file_descriptors_child",
        ])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&status.stdout);
    assert!(status.status.success() && text.contains("1 passed"), "{text}");
}

#[test]
#[ignore = "out_of_file_descriptors runs it, in a process of its own"]
fn out_of_file_descriptors_child() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let fe = FrontEnd::new(1);
    fe.run(1);
    let event = event();
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, rustix::process::Rlimit { current: Some(64), ..limit }).unwrap();
    let mut hoard = Vec::new();
    while let Ok(file) = File::open("/dev/null") {
        hoard.push(file);
    }
    fe.tell(R::SET_VRING_CALL, &longs(&[0]), &[event.as_fd()]);
    let err = fe.thread.join().unwrap().unwrap_err().to_string();
    assert!(err.contains("SET_VRING_CALL") && err.contains("out of file descriptors"), "{err}");
    assert!(fe.rings.live().is_empty());
    // The next client, when there is room again.
    drop(hoard);
    let again = FrontEnd::connect(&fe.device, &fe.rings);
    again.run(1);
}

/// Thousands of connections leave no file behind.
#[test]
fn connections_leak_no_files() {
    let count = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let once = || {
        let fe = FrontEnd::new(1);
        fe.run(1);
        let region = fe.get_inflight(TWO_OF_128);
        assert!(fe.set_inflight(&region));
        let _channel = fe.channel();
        let event = event();
        for request in [R::SET_VRING_CALL, R::SET_VRING_ERR, R::SET_VRING_KICK] {
            assert!(fe.accepts(request, &longs(&[0]), &[event.as_fd()]));
        }
        fe.leave().unwrap();
    };
    once();
    let before = count();
    for _ in 0..300 {
        once();
    }
    // Other tests run beside this one and have files of their own.
    assert!(count() < before + 250, "{before} files before, {} after", count());
}

/// Whatever it sends, and however often it comes: it is not the front-end that decides how full the
/// disk with the log is.
#[test]
fn a_front_end_cannot_fill_the_log() {
    let fe = FrontEnd::new(2);
    fe.negotiate(FEATURES);
    for _ in 0..200 {
        fe.vring_base(5000);
        fe.get_inflight((1000, 16));
        assert!(!fe.accepts(R::SET_VRING_NUM, &words(&[0, 3]), &[]));
        fe.ask(R::CHECK_DEVICE_STATE, &[]);
    }
    // Queues that lose their memory, and features that change under queues.
    fe.run(2);
    for _ in 0..100 {
        assert!(fe.accepts(R::REM_MEM_REG, &region(0, MEMORY, 0), &[]));
        fe.add_memory();
        assert!(fe.accepts(R::SET_FEATURES, &longs(&[FEATURES | CONFIG_WCE]), &[]));
        assert!(fe.accepts(R::SET_FEATURES, &longs(&[FEATURES]), &[]));
    }
    let mut lines = fe.lines.load(Ordering::SeqCst);
    let (device, rings) = (fe.device.clone(), fe.rings.clone());
    fe.leave().unwrap();
    for _ in 0..200 {
        let fe = FrontEnd::connect(&device, &rings);
        fe.sync();
        let count = Arc::clone(&fe.lines);
        fe.leave().unwrap();
        lines += count.load(Ordering::SeqCst);
    }
    assert!((10..300).contains(&lines), "{lines} lines");
}
