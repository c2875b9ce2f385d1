//! The message sequences of real front-ends.
//!
//! Each sequence is a plain function over a [`Session`], so that a test can play half of one. They
//! differ in what real front-ends differ in: which protocol bits they take, when they send
//! SET_OWNER, how memory arrives, the order of a ring's messages, which index a ring restarts
//! from, and whether a pause asks for the ring's base.
//!
//! | | QEMU | Cloud Hypervisor | Firecracker |
//! |---|---|---|---|
//! | protocol bits | all that are offered | no back-end channel unless offered | CONFIG only |
//! | SET_OWNER | seventh | first | first |
//! | memory | ADD_MEM_REG one by one | SET_MEM_TABLE | SET_MEM_TABLE |
//! | a ring | NUM BASE ADDR KICK | NUM of all; ADDR BASE CALL KICK | NUM ADDR BASE CALL KICK ENABLE |
//! | restart index | used index | available index | – |
//! | pause | ENABLE 0, GET_VRING_BASE | ENABLE 0 only | – |

use super::client::{Client, feature, protocol};
use super::request::Config;
use super::session::Session;
use super::wire::id;
use crate::error::{Error, Result};

/// Whose behaviour a [`Session`] shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Personality {
    /// QEMU 10.
    #[default]
    Qemu,
    /// Cloud Hypervisor 53.
    CloudHypervisor,
    /// Firecracker.
    Firecracker,
}

/// Feature bits that all drivers here understand.
const COMMON: u64 = feature::VERSION_1 | feature::EVENT_IDX | feature::RO | feature::FLUSH;
/// Feature bits that a Linux guest takes under QEMU and Cloud Hypervisor.
const LINUX: u64 = COMMON
    | feature::INDIRECT_DESC
    | feature::SEG_MAX
    | feature::BLK_SIZE
    | feature::TOPOLOGY
    | feature::MQ
    | feature::DISCARD
    | feature::WRITE_ZEROES;

impl Personality {
    /// Feature bits it takes if they are offered, the protocol's own bit included.
    pub fn features(self) -> u64 {
        feature::PROTOCOL_FEATURES
            | match self {
                Personality::Qemu | Personality::CloudHypervisor => LINUX,
                Personality::Firecracker => COMMON,
            }
    }

    /// Protocol bits it takes if they are offered.
    pub fn protocol(self) -> u64 {
        let common = protocol::CONFIG
            | protocol::MQ
            | protocol::REPLY_ACK
            | protocol::CONFIGURE_MEM_SLOTS
            | protocol::INFLIGHT_SHMFD
            | protocol::LOG_SHMFD
            | protocol::DEVICE_STATE
            | protocol::BACKEND_REQ;
        match self {
            Personality::Qemu => common | protocol::RESET_DEVICE,
            Personality::CloudHypervisor => common,
            Personality::Firecracker => protocol::CONFIG,
        }
    }

    /// From the first message up to knowing the disk.
    pub fn connect(self, session: &mut Session) -> Result<()> {
        match self {
            Personality::Qemu => qemu_connect(session, true),
            Personality::CloudHypervisor => cloud_hypervisor_connect(session),
            Personality::Firecracker => firecracker_connect(session),
        }
    }

    /// From knowing the disk to running rings.
    pub fn start(self, session: &mut Session) -> Result<()> {
        match self {
            Personality::Qemu => qemu_start(session),
            Personality::CloudHypervisor => cloud_hypervisor_start(session),
            Personality::Firecracker => firecracker_start(session),
        }
    }

    /// Stops the rings; they can be started again.
    pub fn stop(self, session: &mut Session) -> Result<()> {
        match self {
            Personality::CloudHypervisor => cloud_hypervisor_pause(session),
            Personality::Qemu | Personality::Firecracker => qemu_stop(session),
        }
    }

    /// Carries on with a back-end that was restarted: rings and in-flight area are kept.
    pub fn reconnect(self, session: &mut Session) -> Result<()> {
        match self {
            Personality::Qemu => {
                qemu_connect(session, false)?;
                for (base, ring) in session.bases.iter_mut().zip(&session.rings) {
                    *base = ring.used_index();
                }
            }
            Personality::CloudHypervisor => {
                cloud_hypervisor_connect(session)?;
                for (base, ring) in session.bases.iter_mut().zip(&session.rings) {
                    *base = ring.available_index();
                }
            }
            Personality::Firecracker => {
                return Err(Error::unsupported("Firecracker does not reconnect"));
            }
        }
        self.start(session)
    }
}

/// Asks for the protocol bits and sets those that are wanted too.
fn negotiate_protocol(client: &mut Client, wanted: u64) -> Result<()> {
    if client.offered() & feature::PROTOCOL_FEATURES == 0 {
        return Ok(());
    }
    let bits = client.get_protocol_features()? & wanted;
    client.set_protocol_features(bits)
}

/// The feature bits to use: what is offered and wanted.
fn agreed_features(session: &Session) -> u64 {
    session.client.offered() & session.options.features
}

/// Tells the rings which notifications were agreed on.
fn configure_rings(session: &mut Session, features: u64) {
    for ring in &mut session.rings {
        ring.set_event_idx(features & feature::EVENT_IDX != 0);
    }
}

/// Checks that the back-end can serve as many queues as are wanted.
fn check_queues(session: &Session) -> Result<()> {
    let wanted = session.rings.len() as u64;
    if !session.client.has_protocol(protocol::MQ) {
        if wanted > 1 {
            return Err(Error::unsupported("the back-end serves one queue only"));
        }
        return Ok(());
    }
    let served = session.client.get_queue_num()?;
    if served < wanted {
        return Err(Error::unsupported(format!(
            "the back-end serves {served} queues, {wanted} are wanted"
        )));
    }
    Ok(())
}

/// Reads the configuration space into the session.
fn read_config(session: &mut Session, size: u32) -> Result<()> {
    if !session.client.has_protocol(protocol::CONFIG) {
        return Err(Error::unsupported("the back-end offers no configuration space"));
    }
    session.config = Config::parse(&session.client.get_config(0, size)?)?;
    Ok(())
}

/// Sets up the in-flight area: the kept one, or a new one.
fn set_up_inflight(session: &mut Session) -> Result<()> {
    if !session.client.has_protocol(protocol::INFLIGHT_SHMFD) {
        return Ok(());
    }
    if session.inflight.is_none() {
        let queues = session.rings.len() as u16;
        let size = session.options.queue_size;
        session.inflight = Some(session.client.get_inflight(queues, size)?);
    }
    if let Some(area) = &session.inflight {
        session.client.set_inflight(area)?;
    }
    Ok(())
}

/// QEMU: from the first message up to the configuration space, which it reads only when it
/// connects for the first time.
pub fn qemu_connect(session: &mut Session, first: bool) -> Result<()> {
    let client = &mut session.client;
    client.set_acknowledge(false);
    client.get_features()?;
    negotiate_protocol(client, session.options.protocol)?;
    check_queues(session)?;
    let client = &mut session.client;
    if client.has_protocol(protocol::CONFIGURE_MEM_SLOTS) {
        client.get_max_mem_slots()?;
    }
    if client.has_protocol(protocol::BACKEND_REQ) {
        let acknowledge = client.has_protocol(protocol::REPLY_ACK);
        client.set_acknowledge(acknowledge);
        client.set_backend_channel()?;
        client.set_acknowledge(false);
    }
    client.set_owner()?;
    client.get_features()?;
    for ring in &session.rings {
        let index = u32::from(ring.index());
        client.set_vring_call(index, Some(ring.call_fd()))?;
        client.set_vring_err(index, Some(ring.err_fd()))?;
    }
    if first { read_config(session, 57) } else { Ok(()) }
}

/// QEMU: the driver sets DRIVER_OK.
pub fn qemu_start(session: &mut Session) -> Result<()> {
    let features = agreed_features(session);
    session.client.set_acknowledge(false);
    session.client.set_features(features)?;
    configure_rings(session, features);
    set_up_inflight(session)?;
    let client = &mut session.client;
    for ring in &session.rings {
        client.set_vring_call(u32::from(ring.index()), Some(ring.call_fd()))?;
    }
    client.set_features(features)?;
    client.set_acknowledge(true);
    if client.has_protocol(protocol::CONFIGURE_MEM_SLOTS) {
        for region in session.memory.regions() {
            client.add_mem_reg(region)?;
        }
    } else {
        client.set_mem_table(&session.memory)?;
    }
    client.set_acknowledge(false);
    for (ring, base) in session.rings.iter().zip(&session.bases) {
        let index = u32::from(ring.index());
        client.set_vring_num(index, u32::from(ring.size()))?;
        client.set_vring_base(index, u32::from(*base))?;
        client.set_ring_addr(ring, false)?;
        client.set_vring_kick(index, Some(ring.kick_fd()))?;
    }
    enable_all(session, true)
}

/// QEMU: the guest stops, or the driver resets the device. Memory regions go too.
pub fn qemu_stop(session: &mut Session) -> Result<()> {
    enable_all(session, false)?;
    stop_rings(session)?;
    if session.client.has_protocol(protocol::CONFIGURE_MEM_SLOTS) {
        for region in session.memory.regions() {
            session.client.rem_mem_reg(region)?;
        }
    }
    Ok(())
}

/// QEMU: a reset of the machine or of the device, where RESET_DEVICE is in use.
pub fn qemu_reset(session: &mut Session) -> Result<()> {
    if session.client.has_protocol(protocol::RESET_DEVICE) {
        session.client.reset_device()?;
    }
    session.inflight = None;
    session.reset_rings();
    Ok(())
}

/// QEMU: migration begins. Everything the back-end writes to guest memory is marked in `log`.
pub fn qemu_start_log(session: &mut Session, log: &super::DirtyLog) -> Result<()> {
    session.client.set_log_base(log)?;
    let features = session.client.features() | feature::LOG_ALL;
    session.client.set_features(features)?;
    for ring in &session.rings {
        session.client.set_ring_addr(ring, true)?;
    }
    Ok(())
}

/// QEMU: migration ends or fails.
pub fn qemu_stop_log(session: &mut Session) -> Result<()> {
    let features = session.client.features() & !feature::LOG_ALL;
    session.client.set_features(features)?;
    for ring in &session.rings {
        session.client.set_ring_addr(ring, false)?;
    }
    Ok(())
}

/// Cloud Hypervisor: from the first message up to the configuration space.
pub fn cloud_hypervisor_connect(session: &mut Session) -> Result<()> {
    let client = &mut session.client;
    client.set_acknowledge(true);
    client.set_owner()?;
    client.get_features()?;
    negotiate_protocol(client, session.options.protocol)?;
    check_queues(session)?;
    read_config(session, Config::LEN)
}

/// Cloud Hypervisor: the driver activates the device.
pub fn cloud_hypervisor_start(session: &mut Session) -> Result<()> {
    let features = agreed_features(session);
    session.client.set_features(features)?;
    configure_rings(session, features);
    session.client.set_mem_table(&session.memory)?;
    for ring in &session.rings {
        session.client.set_vring_num(u32::from(ring.index()), u32::from(ring.size()))?;
    }
    set_up_inflight(session)?;
    for (ring, base) in session.rings.iter().zip(&session.bases) {
        let (client, index) = (&session.client, u32::from(ring.index()));
        client.set_ring_addr(ring, false)?;
        client.set_vring_base(index, u32::from(*base))?;
        client.set_vring_call(index, Some(ring.call_fd()))?;
        client.set_vring_kick(index, Some(ring.kick_fd()))?;
    }
    enable_all(session, true)?;
    if session.client.has_protocol(protocol::BACKEND_REQ) {
        session.client.set_backend_channel()?;
    }
    Ok(())
}

/// Cloud Hypervisor: pause before a snapshot. Nothing but "disable" is said, and once it is
/// acknowledged the back-end must leave guest memory alone.
pub fn cloud_hypervisor_pause(session: &mut Session) -> Result<()> {
    enable_all(session, false)
}

/// Cloud Hypervisor: resume after a pause.
pub fn cloud_hypervisor_resume(session: &mut Session) -> Result<()> {
    enable_all(session, true)
}

/// Cloud Hypervisor: one round of migration, which begins with a log of its own.
pub fn cloud_hypervisor_start_log(session: &mut Session, log: &super::DirtyLog) -> Result<()> {
    let features = session.client.features() | feature::LOG_ALL;
    session.client.set_features(features)?;
    session.client.set_log_base(log)?;
    for ring in &session.rings {
        session.client.set_ring_addr(ring, true)?;
    }
    Ok(())
}

/// Firecracker: from the first message up to the configuration space.
pub fn firecracker_connect(session: &mut Session) -> Result<()> {
    if session.rings.len() != 1 {
        return Err(Error::invalid("Firecracker gives a disk one queue"));
    }
    session.client.set_owner()?;
    session.client.get_features()?;
    let features = agreed_features(session);
    session.client.set_features(features)?;
    negotiate_protocol(&mut session.client, session.options.protocol)?;
    read_config(session, Config::LEN)
}

/// Firecracker: the driver activates the device.
pub fn firecracker_start(session: &mut Session) -> Result<()> {
    let features = agreed_features(session);
    session.client.set_features(features)?;
    configure_rings(session, features);
    session.client.set_mem_table(&session.memory)?;
    for (ring, base) in session.rings.iter().zip(&session.bases) {
        let (client, index) = (&session.client, u32::from(ring.index()));
        client.set_vring_num(index, u32::from(ring.size()))?;
        client.set_ring_addr(ring, false)?;
        client.set_vring_base(index, u32::from(*base))?;
        client.set_vring_call(index, Some(ring.call_fd()))?;
        client.set_vring_kick(index, Some(ring.kick_fd()))?;
        client.set_vring_enable(index, true)?;
    }
    // Nothing above is acknowledged; an answer says that it has all been understood.
    session.client.query(id::GET_FEATURES, &[], &[])?;
    Ok(())
}

/// Enables or disables all rings, started or not.
pub fn enable_all(session: &mut Session, enable: bool) -> Result<()> {
    for ring in &session.rings {
        session.client.set_vring_enable(u32::from(ring.index()), enable)?;
    }
    Ok(())
}

/// Stops all rings and keeps the indices they would restart from.
pub fn stop_rings(session: &mut Session) -> Result<()> {
    for (ring, base) in session.rings.iter().zip(&mut session.bases) {
        // The protocol counts in 16 bits here.
        *base = session.client.get_vring_base(u32::from(ring.index()))? as u16;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, BorrowedFd};
    use std::path::Path;
    use std::thread::{self, JoinHandle};
    use std::time::{Duration, Instant};

    use super::super::memory::{Pages, shared_file};
    use super::super::session::SessionOptions;
    use super::super::wire::{self, Fields, Payload, Wire};
    use super::*;

    /// A back-end that agrees to everything, and tells afterwards what it was sent: the number of
    /// each message.
    fn agreeable(wire: Wire) -> JoinHandle<Vec<u32>> {
        thread::spawn(move || {
            let deadline = || Instant::now() + Duration::from_secs(5);
            let area = shared_file("inflight", 8192, Pages::Small).unwrap();
            let mut seen = Vec::new();
            while let Ok(message) = wire.recv(deadline()) {
                seen.push(message.request);
                let number = |n: u64| Some(n.to_ne_bytes().to_vec());
                let mut fds: Vec<BorrowedFd<'_>> = Vec::new();
                let reply = match message.request {
                    id::GET_FEATURES => number(u64::MAX),
                    id::GET_PROTOCOL_FEATURES => number(u64::MAX & !protocol::STATUS),
                    id::GET_QUEUE_NUM | id::GET_MAX_MEM_SLOTS => number(64),
                    id::GET_CONFIG | id::GET_VRING_BASE => Some(message.payload.clone()),
                    id::GET_INFLIGHT_FD => {
                        fds.push(area.as_fd());
                        Some(Payload::new().u64(8192).u64(0).u32(0).u32(0).build())
                    }
                    id::SET_LOG_BASE => number(0),
                    _ if message.flags & wire::FLAG_NEED_REPLY != 0 => number(0),
                    _ => None,
                };
                if let Some(payload) = reply {
                    wire.send(message.request, wire::FLAG_REPLY, &payload, &fds, deadline())
                        .unwrap();
                }
            }
            seen
        })
    }

    /// Connects, starts and stops as `personality`, and returns what was sent in each step.
    fn messages(personality: Personality, queues: u16) -> [Vec<u32>; 3] {
        let sent = |steps: usize| {
            let (ours, theirs) = Wire::pair().unwrap();
            let back_end = agreeable(theirs);
            let client = Client::new(ours, Duration::from_secs(5));
            let options = SessionOptions::new(personality).queues(queues);
            let mut session = Session::with_client(client, Path::new(""), options).unwrap();
            type Step = fn(Personality, &mut Session) -> Result<()>;
            let all: [Step; 3] = [Personality::connect, Personality::start, Personality::stop];
            all.iter().take(steps).for_each(|step| step(personality, &mut session).unwrap());
            drop(session);
            back_end.join().unwrap()
        };
        let (one, two, three) = (sent(1), sent(2), sent(3));
        let (start, stop) = (two[one.len()..].to_vec(), three[two.len()..].to_vec());
        [one, start, stop]
    }

    #[test]
    fn qemu_sends_what_was_seen_on_the_wire() {
        let [connect, start, stop] = messages(Personality::Qemu, 2);
        assert_eq!(connect, [1, 15, 16, 17, 36, 21, 3, 1, 13, 14, 13, 14, 24]);
        let rings = [8, 10, 9, 12, 8, 10, 9, 12];
        assert_eq!(start[..6], [2, 31, 32, 13, 13, 2]);
        assert_eq!(start[6..], [&[37][..], &rings, &[18, 18]].concat());
        assert_eq!(stop, [18, 18, 11, 11, 38]);
    }

    #[test]
    fn cloud_hypervisor_sends_sizes_first_and_its_channel_last() {
        let [connect, start, stop] = messages(Personality::CloudHypervisor, 2);
        assert_eq!(connect, [3, 1, 15, 16, 17, 24]);
        assert_eq!(start, [2, 5, 8, 8, 31, 32, 9, 10, 13, 12, 9, 10, 13, 12, 18, 18, 21]);
        assert_eq!(stop, [18, 18]);
    }

    #[test]
    fn firecracker_enables_each_ring_with_it() {
        let [connect, start, _] = messages(Personality::Firecracker, 1);
        assert_eq!(connect, [3, 1, 2, 15, 16, 24]);
        assert_eq!(start, [2, 5, 8, 9, 10, 13, 12, 18, 1]);
    }

    #[test]
    fn qemu_reconnects_with_the_area_it_kept_and_from_the_used_index() {
        let (ours, theirs) = Wire::pair().unwrap();
        let first = agreeable(theirs);
        let options = SessionOptions::default();
        let client = Client::new(ours, Duration::from_secs(5));
        let mut session = Session::with_client(client, Path::new(""), options).unwrap();
        Personality::Qemu.connect(&mut session).unwrap();
        Personality::Qemu.start(&mut session).unwrap();
        // Three requests were made available, two of them completed.
        let used = session.rings[0].layout().used;
        session.memory.write(used + 2, &[2, 0]).unwrap();
        session.rings[0].force_available_index(3);
        let (ours, theirs) = Wire::pair().unwrap();
        session.client = Client::new(ours, Duration::from_secs(5));
        first.join().unwrap();
        let back_end = thread::spawn(move || {
            let mut bases = Vec::new();
            let deadline = Instant::now() + Duration::from_secs(5);
            let (relay, inner) = Wire::pair().unwrap();
            let answers = agreeable(inner);
            while let Ok(message) = theirs.recv(deadline) {
                if message.request == id::SET_VRING_BASE {
                    let mut fields = Fields::new(&message.payload);
                    bases.push((fields.u32().unwrap(), fields.u32().unwrap()));
                }
                let fds: Vec<BorrowedFd<'_>> = message.fds.iter().map(|fd| fd.as_fd()).collect();
                relay
                    .send(message.request, message.flags, &message.payload, &fds, deadline)
                    .unwrap();
                let silent = message.flags & wire::FLAG_NEED_REPLY == 0
                    && ![1, 15, 17, 36, 24, 31, 11].contains(&message.request);
                if !silent {
                    let answer = relay.recv(deadline).unwrap();
                    theirs
                        .send(answer.request, answer.flags, &answer.payload, &[], deadline)
                        .unwrap();
                }
            }
            drop(relay);
            (bases, answers.join().unwrap())
        });
        Personality::Qemu.reconnect(&mut session).unwrap();
        drop(session);
        let (bases, seen) = back_end.join().unwrap();
        assert_eq!(bases, [(0, 2)]);
        assert!(seen.contains(&id::SET_INFLIGHT_FD));
        assert!(!seen.contains(&id::GET_INFLIGHT_FD) && !seen.contains(&id::GET_CONFIG));
    }
}
