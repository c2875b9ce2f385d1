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
                    *base = ring.next_available();
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
